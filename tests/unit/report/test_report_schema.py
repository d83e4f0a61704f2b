"""Documents that were changed or damaged are refused by file and part, and any name is drawn."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import run_command
from report_files import CHATS, TWO, bench_of, eval_of, right, write

from sparse_vlm.errors import UserError
from sparse_vlm.report.quality import read_quality
from sparse_vlm.report.records import read_bench


def set_at(document: dict, way: tuple, value: object) -> dict:
    part = document
    for key in way[:-1]:
        part = part[key]
    part[way[-1]] = value
    return document


@pytest.mark.parametrize(
    ("way", "value", "line"),
    [
        (("machine",), None, "machine is null, and must be an object"),
        (("machine", "cores"), True, "machine.cores is true, and must be a whole number of at least 1"),
        (("machine", "accelerator"), {"name": 1}, "machine.accelerator.name is 1, and must be a text"),
        (("llms",), [], "requests[0] (vit+pool) is of a model, an LLM or measurements that it does not hold"),
        (("models", 0, "name"), "another", "requests[0] (vit+pool) is of a model, an LLM"),
        (("measurements",), [], "requests[0] (vit+pool) is of a model, an LLM or measurements"),
        (("peaks",), [], "peaks holds no bfloat16"),
        (("requests",), {}, "requests is an object, and must be a list"),
        (("requests", 0, "ms"), "x", 'requests[0].ms is "x", and must be an object'),
        (("requests", 0, "ms", "ttft"), float("nan"), "not JSON (NaN is no JSON number)"),
        (("requests", 1, "batch"), 0, "requests[1].batch is 0, and must be a whole number of at least 1"),
        (("requests", 0, "macs"), 10**400, "requests[0].macs is 1000"),
        (("measurements", 0, "ms", "median"), "fast", 'measurements[0].ms.median is "fast", and must be a number above 0'),
        (("versions",), {"torch": None}, "versions.torch is null, and must be a text"),
        (("pictures", 0, "pixels"), [1], "pictures[0].pixels must be width and height"),
    ],
)
def test_a_benchmark_with_a_part_of_another_kind_is_refused_by_file_and_part(tmp_path: Path, way: tuple, value: object, line: str) -> None:
    path = write(tmp_path, "bench.json", set_at(bench_of(TWO), way, value))
    with pytest.raises(UserError, match=re.escape(line)) as raised:
        read_bench(path)
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("way", "value", "line"),
    [
        (("models",), {}, "results[0] is of build/pool-chat in pope, which it does not describe"),
        (("models", "tiny-chat"), [], "models.tiny-chat is a list, and must be an object"),
        (("tasks",), [], "tasks is a list, and must be an object"),
        (("results", 0, "metrics", "accuracy", "value"), "x", 'results[0].metrics.accuracy.value is "x"'),
        (("results", 0, "metrics", "accuracy", "value"), float("inf"), "not JSON (Infinity is no JSON number)"),
        (("results", 0, "metrics", "accuracy", "unit"), "miles", "results[0] is in 'miles', a unit that is not known here"),
        (("results", 0, "metrics"), None, "results[0].metrics is null, and must be an object"),
        (("paired",), [{"task": 1}], "paired[0].task is 1, and must be a text"),
    ],
)
def test_a_report_with_a_part_of_another_kind_is_refused_by_file_and_part(tmp_path: Path, way: tuple, value: object, line: str) -> None:
    path = write(tmp_path, "report.json", set_at(eval_of(CHATS), way, value))
    with pytest.raises(UserError, match=re.escape(line)) as raised:
        read_quality([path])
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": "sparse-vlm/eval/1", "models": ' + '{"a":' * 50_000])
def test_a_document_nested_too_deep_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"report.json: (nested too deep|not JSON)"):
        read_quality([write(tmp_path, "report.json", text)])


def test_any_name_is_drawn_as_it_is(tmp_path: Path) -> None:
    names = ["$\\frac{$", "_hidden", "<b>&amp;", "a\x1b[31m\ud800", "[bold]x[/bold]"]
    document = bench_of({name: (49, 30.0 + i, 1.6) for i, name in enumerate(names)})
    report = eval_of({name: (49, right(0.6)) for name in names}, kind="tower")
    paths = [write(tmp_path, name, document) for name, document in (("bench.json", document), ("report.json", report))]
    done = run_command("report", "--bench", str(paths[0]), "--eval", str(paths[1]), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;amp;" in page and "<b>&amp;" not in page
    assert "\x1b" not in page + done.stdout and "a\\x1b[31m\\ud800" in page
    assert (tmp_path / "out" / "frontier.pope-accuracy.png").stat().st_size > 1000
