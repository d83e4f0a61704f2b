"""The page and the command of `sparse-vlm report`."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_files import CHATS, PAIRS, TWO, bench_of, comparison_of, eval_of, right, write

from sparse_vlm.report.frontier import AXES
from sparse_vlm.report.notes import notes
from sparse_vlm.report.page import render
from sparse_vlm.report.records import Scenario
from sparse_vlm.utils.files import LOCK

ROOT = Path(__file__).resolve().parents[3]


class Page(HTMLParser):
    """Tags in their order, ids, what is referred to, and text."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.refers: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open += [] if tag in self.VOID else [tag]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.refers += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href", "srcset", "data")]
        for name, value in attrs:
            if name in ("style", "clip-path", "fill"):
                self.refers += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone(tmp_path: Path) -> None:
    html = render(comparison_of(tmp_path, bench_of(TWO), [eval_of(CHATS), eval_of(CHATS, task="gqa")], PAIRS))
    page = Page(html)
    assert page.open == [] and page.tags.count("svg") == 2 * len(AXES)
    assert not {"script", "link", "iframe", "img"} & set(page.tags) and "@import" not in html
    assert len(set(page.ids)) == len(page.ids) and page.refers
    assert all(target.strip("\"'").startswith("#") and target.strip("\"'")[1:] in page.ids for target in page.refers)
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in html and "prefers-color-scheme: dark" in html
    assert len(html.encode()) < 200_000
    text = " ".join(page.text.split())
    for part in ("tiny-chat in place of pool-chat", "−37 %", "+10.0 [", "batch of 1, answers of 128 tokens", "What was not measured"):
        assert part in text


def test_the_page_does_not_run_what_a_name_holds(tmp_path: Path) -> None:
    name = "<script>alert(1)<"
    html = render(comparison_of(tmp_path, bench_of({name: (49, 80.0, 6.0), "tiny": (49, 30.0, 1.6)}), [], []))
    page = Page(html)
    assert "script" not in page.tags and name in page.text


def test_a_page_of_the_same_files_is_the_same(tmp_path: Path) -> None:
    comparison = comparison_of(tmp_path, bench_of(TWO), [eval_of(CHATS)], PAIRS)
    assert render(comparison) == render(comparison)


def test_the_page_is_installed_with_the_package() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read toml")
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    assert sorted(p.name for p in (ROOT / "sparse_vlm" / "report").iterdir() if p.suffix not in ("", ".py")) == data["sparse_vlm.report"]


def test_folders_do_not_travel_with_the_page(tmp_path: Path) -> None:
    document = bench_of({"models/mine/vit": (256, 80.0, 6.0), "models/mine/tiny": (49, 30.0, 1.6)}, llm="models/mine/llm")
    comparison = comparison_of(tmp_path, document, [], [], Scenario("models/mine/llm", "bfloat16", 1, 64))
    assert notes(comparison, "where_not")[0].startswith("tiny (49 tokens) against vit (256 tokens)")
    assert "models/mine" not in render(comparison)
    chats = {f"chats/mine/{name}": own for name, own in CHATS.items()}
    pairs = [f"{name}={cost}" for name, cost in zip(chats, ("models/mine/vit", "models/mine/tiny"), strict=True)]
    document = bench_of({"models/mine/vit": (49, 80.0, 6.0), "models/mine/tiny": (49, 30.0, 1.6)})
    html = render(comparison_of(tmp_path, document, [eval_of({**chats, "chats/mine/lonely": (9, right(0.5))})], pairs))
    assert "/mine" not in html and "cost of vit</span>" in html and "The cost of lonely in this scenario." in html


# ---- the command


def test_the_command_writes_the_page_and_pictures(command: Any, tmp_path: Path) -> None:
    bench, report = write(tmp_path, "bench.json", bench_of(TWO)), write(tmp_path, "report.json", eval_of(CHATS))
    pairs = [part for pair in PAIRS for part in ("--pair", pair)]
    done = command("report", "--bench", str(bench), "--eval", str(report), *pairs, "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("tiny-chat in place of pool-chat: 135m, bfloat16, batch of 1\n* First token after 85 ms")
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name != LOCK) == ["frontier.pope-accuracy.png", "report.html"]
    assert str(tmp_path) not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--batch", "3"], "sparse-vlm: --batch 3: not measured, "),
        (["--baseline", "tiny", "--candidate", "tiny"], "sparse-vlm: --baseline and --candidate are both tiny; name two models\n"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(command: Any, tmp_path: Path, arguments: list[str], line: str) -> None:
    bench = write(tmp_path, "bench.json", bench_of(TWO))
    done = command("report", "--bench", str(bench), *arguments, "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(line) and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_one_model_alone_is_not_compared(command: Any, tmp_path: Path) -> None:
    bench = write(tmp_path, "bench.json", bench_of({"tiny": (49, 30.0, 1.6)}))
    done = command("report", "--bench", str(bench), "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and "holds tiny alone in this scenario; measure a second model beside it" in done.stderr
