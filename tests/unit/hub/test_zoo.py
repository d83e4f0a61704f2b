"""The zoo as it is published, and publishing into it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparse_vlm.errors import UserError
from sparse_vlm.hub import store, zoo

CARD = "# new\n\n" + "\n".join(f"## {section}\n\nsomething\n" for section in zoo.CARD_SECTIONS[True])


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the zoo's index and cards (without the weights, which are large), and nothing of ours in it."""
    root = tmp_path / "model_zoo"
    index = json.loads((store.zoo_folder() / "index.json").read_text())
    index["models"] = {name: model for name, model in index["models"].items() if model["sources"]}
    for name in index["models"]:
        (root / name).mkdir(parents=True)
        shutil.copyfile(store.zoo_folder() / name / "card.md", root / name / "card.md")
    (root / "index.json").write_text(json.dumps(index))
    monkeypatch.setattr(store, "zoo_folder", lambda: root)
    return root


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    folder = tmp_path / "trained"
    (folder / "checkpoints").mkdir(parents=True)
    save_file({"weight": torch.ones(4)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "curve.png").write_bytes(b"picture")
    (folder / "card.md").write_text(CARD)
    return folder


def add(folder: Path, **changes):
    return zoo.add("new", folder, **{"kind": "tower", "license": "Apache-2.0", "summary": "s", "card": folder / "card.md", **changes})


def test_published_zoo_is_in_order():
    assert zoo.check() == []


def test_index_is_written_as_the_code_writes_it(copy, trained):
    add(trained)
    written = (copy / "index.json").read_text()
    add(trained)
    assert (copy / "index.json").read_text() == written


def test_added_model_is_located_and_refreshed(copy, trained, home):
    model = add(trained, needs=["smollm2-135m-instruct"])
    assert sorted(model.files) == ["config.json", "model.safetensors"]
    assert store.entry("new") == model
    assert next(iter(store.entries())) == "new"
    assert store.locate("new", kind="tower") == copy / "new"
    assert sorted(path.name for path in (copy / "new").iterdir()) == ["card.md", "config.json", "model.safetensors"]
    assert zoo.check() == []

    (trained / "config.json").write_text('{"changed": true}')
    add(trained, card=None)
    assert (store.locate("new") / "config.json").read_text() == '{"changed": true}'
    assert zoo.check() == []


@pytest.mark.parametrize(
    ("spoil", "changes", "message"),
    [
        (lambda folder: (folder / "card.md").write_text("# new\n"), {}, "its card has no section '## Data'"),
        (
            lambda folder: (folder / "card.md").write_text(CARD.replace("## Recipe\n\nsomething", "## Recipe")),
            {},
            "says nothing under '## Recipe'",
        ),
        (lambda folder: (folder / "card.md").unlink(), {}, "it has no card.md"),
        (lambda folder: (folder / "model.safetensors").unlink(), {}, "holds no safetensors"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(bytes(60_000_001)),
            {},
            "model.safetensors is 60 MB; a file may have 60 MB",
        ),
        (
            lambda folder: [(folder / f"{name}.safetensors").write_bytes(bytes(50_000_000)) for name in "abcd"],
            {},
            "with it the zoo would be above 170 MB",
        ),
        (lambda folder: None, {"kind": "llm"}, "kind 'llm' cannot be added"),
        (lambda folder: None, {"needs": ["nothing"]}, "needs nothing, which the zoo does not have"),
        (lambda folder: shutil.rmtree(folder), {}, "no such folder"),
    ],
)
def test_what_the_zoo_cannot_hold_is_refused_and_changes_nothing(copy, trained, spoil, changes, message):
    before = (copy / "index.json").read_text()
    spoil(trained)
    with pytest.raises(UserError) as caught:
        add(trained, **changes)
    assert message in str(caught.value)
    assert (copy / "index.json").read_text() == before
    assert sorted(path.name for path in copy.iterdir()) == ["all-minilm-l6-v2", "index.json", "smollm2-135m-instruct"]


def test_check_sees_what_went_wrong(copy, trained, home):
    add(trained)
    (copy / "new" / "config.json").write_text("{ }")
    (copy / "new" / "model.pt").write_bytes(b"")
    (copy / "stray").mkdir()
    (copy / "smollm2-135m-instruct" / "card.md").write_text("# nothing\n")
    found = "\n".join(zoo.check())
    for expected in (
        "new: config.json: ",
        "model.pt is not in the index",
        "stray: a folder without an entry",
        "has no section '## Licence'",
    ):
        assert expected in found


def test_pull_brings_what_a_model_needs(copy, trained, home, monkeypatch):
    add(trained, needs=["all-minilm-l6-v2"])
    asked = []
    monkeypatch.setattr(store, "fetch", lambda sources, files, folder, name: asked.append(name))
    assert list(zoo.pull("new")) == ["new", "all-minilm-l6-v2"]
    assert asked == ["all-minilm-l6-v2"]


def test_maintainers_command_says_what_is_wrong(trained):
    line = [sys.executable, "-m", "sparse_vlm.zoo", "add", "new", str(trained / "nowhere")]
    line += ["--kind", "tower", "--license", "Apache-2.0", "--summary", "s"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"sparse-vlm: {trained / 'nowhere'}: no such folder\n"
