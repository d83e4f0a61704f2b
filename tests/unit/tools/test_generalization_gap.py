"""Students on photos that they learnt from, and on held-out ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("open_clip", reason="the teacher is open_clip's")

import generalization_gap as gap

from sparse_vlm import SparseFormer
from sparse_vlm.distill.inherit import inherit
from sparse_vlm.distill.recipes import get_recipe
from sparse_vlm.errors import UserError
from sparse_vlm.teachers import load_teacher


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A teacher, itself as a student, a student that has learnt nothing yet, and photos of which two are held out."""
    from tiny_teacher import write_teacher

    folder = tmp_path_factory.mktemp("gap")
    teacher = write_teacher(folder / "teacher")
    source = load_teacher(teacher)
    for name in ("vit", "elastic"):
        torch.manual_seed(0)
        recipe = get_recipe(name)
        tower = SparseFormer(recipe.config(source.spec))
        inherit(tower, source, recipe)
        tower.save_pretrained(folder / name)
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for key in (f"photo{i}" for i in (0, 1, 2, 3, 4, 5, 122, 126)):  # the last two are held out by their hashes
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((64, 64)).save(folder / "photos" / f"{key}.png")
    return {"teacher": teacher, **{name: str(folder / name) for name in ("vit", "elastic", "photos")}}


def test_the_teacher_itself_is_as_close_to_both(scene: dict[str, str]) -> None:
    rows = gap.measure(scene["vit"], scene["teacher"], [scene["photos"]], [None])
    assert [(row["photos"], row["cosine"].units) for row in rows] == [("learnt from", 6), ("held out", 2)]
    for row in rows:
        assert row["tokens"] == 16
        assert row["cosine"].value > 0.95  # random embeddings, centred, lie so close together that bfloat16 shows
        assert row["token_cosine"].value > 0.95


def test_numbers_of_tokens_are_told_apart(scene: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    options = {"teacher": scene["teacher"], "data": [scene["photos"]], "tokens": [9, 16], "threads": 1}
    gap.main(scene["elastic"], as_json=True, **options)
    rows = json.loads(capsys.readouterr().out)
    assert [(row["tokens"], row["photos"]) for row in rows] == [(n, group) for n in (9, 16) for group in ("learnt from", "held out")]
    values = [row["cosine"]["value"] for row in rows]
    assert max(values[:2]) < min(values[2:])  # nothing is learnt yet, but sixteen cells are the teacher's patches, nine are not
    gap.main(scene["elastic"], as_json=False, **options)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith(f"| 9 | learnt from | 6 | {rows[0]['cosine']['value']:.3f} [")
    assert len(lines) == 2 + 4


def test_photos_of_which_none_is_held_out_are_refused(scene: dict[str, str], tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "photo1.png")
    with pytest.raises(UserError, match="1 photos are too few"):
        gap.measure(scene["vit"], scene["teacher"], [str(tmp_path)], [None])
