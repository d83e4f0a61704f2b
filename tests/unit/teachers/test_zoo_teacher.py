"""Teachers of the zoo: int8 weights, loaded by name, read as open_clip's are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("open_clip")

import open_clip
from tiny_teacher import write_teacher

from sparse_vlm.errors import UserError
from sparse_vlm.hub import store
from sparse_vlm.teachers import load_teacher
from sparse_vlm.teachers.load import is_teacher
from sparse_vlm.teachers.zoo import dequantize, quantize, save_zoo_teacher


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """The folder of a teacher in a zoo of its own, and the same teacher as an open_clip folder."""
    name = write_teacher(tmp_path / "open_clip")
    folder = tmp_path / "zoo" / "small"
    config = json.loads((tmp_path / "open_clip" / "open_clip_config.json").read_text())
    save_zoo_teacher(open_clip.create_model(name).visual, config, folder)
    monkeypatch.setattr(store, "zoo_folder", lambda: tmp_path / "zoo")
    write_index(folder)
    return folder, name


def write_index(folder: Path) -> None:
    files = {path.name: {"size": path.stat().st_size, "sha256": store.sha256(path)} for path in folder.iterdir()}
    entry = {"kind": "teacher", "summary": "small", "license": "MIT", "files": files, "sources": [], "needs": []}
    (folder.parent / "index.json").write_text(json.dumps({"format": store.INDEX_FORMAT, "models": {folder.name: entry}}))


def test_rows_are_kept_to_half_a_step() -> None:
    torch.manual_seed(0)
    state = {"weight": torch.randn(5, 7) * torch.tensor([[1e-3], [1.0], [50.0], [0.0], [1.0]]), "bias": torch.randn(5)}
    stored = quantize(state)
    assert stored["weight"].dtype == torch.int8 and torch.equal(stored["bias"], state["bias"])
    error = (dequantize(stored)["weight"] - state["weight"]).abs()
    assert torch.all(error <= state["weight"].abs().amax(1, keepdim=True) / 127 / 2 + 1e-6)


def test_a_teacher_of_the_zoo_is_loaded_by_name(zoo: tuple[Path, str]) -> None:
    _, name = zoo
    assert is_teacher("small") and not is_teacher("smaller")
    ours, theirs = load_teacher("small"), load_teacher(name)
    assert ours.spec.licence == "MIT" and ours.spec.activation == theirs.spec.activation
    assert (ours.spec.num_blocks, ours.spec.patch_size, ours.spec.image_mean) == (
        theirs.spec.num_blocks,
        theirs.spec.patch_size,
        theirs.spec.image_mean,
    )
    pixels = torch.randn(3, 3, 56, 56)
    with torch.no_grad():
        embeds, expected = ours(pixels)[0], theirs(pixels)[0]
    assert torch.cosine_similarity(embeds, expected).min() > 0.999


def test_a_damaged_teacher_is_one_line(zoo: tuple[Path, str]) -> None:
    folder, _ = zoo
    shutil.copyfile(folder / "open_clip_config.json", folder.parent / "kept.json")
    (folder / "open_clip_config.json").write_text('{"model_cfg": {"vision_cfg": {}}}')
    write_index(folder)
    with pytest.raises(UserError, match="open_clip_config.json: not the configuration of a teacher"):
        load_teacher("small")
    config = json.loads((folder.parent / "kept.json").read_text())
    config["model_cfg"]["vision_cfg"]["layers"] = 3
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    write_index(folder)
    with pytest.raises(UserError, match="transformer.resblocks.2"):
        load_teacher("small")
