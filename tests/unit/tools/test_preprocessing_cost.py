"""`python tools/preprocessing_cost.py`: the ways agree, every one is timed, and the document can be read."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("open_clip", reason="open_clip's transform is one of the ways")

import preprocessing_cost as pictures
from preprocessing_cost import PLAIN, agree, as_table, grow, main, time_all, ways, write_photos

from sparse_vlm.errors import UserError
from sparse_vlm.images.decode import load_image

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


@pytest.fixture
def small(monkeypatch) -> None:
    monkeypatch.setattr(pictures, "MEGAPIXELS", (0.05, 1.3))
    monkeypatch.setattr(pictures, "TOWERS", ("tiny",))


def test_photos_have_the_size_and_the_grain_of_a_camera():
    image = load_image(EXAMPLES / "coffee.jpg")
    data = grow(image, 2.0)
    width, height = Image.open(io.BytesIO(data)).size
    assert width * height == pytest.approx(2e6, rel=0.01) and width / height == pytest.approx(1.5, rel=0.01)
    assert 0.2 < len(data) / 2e6 < 0.5  # bytes a pixel


def test_ways_agree(tmp_path, small):
    photos = write_photos([load_image(EXAMPLES / "chelsea.jpg")], tmp_path)
    how = ways()
    for photo in photos[0.05]:
        assert torch.equal(how["sparse-vlm"](photo), how[PLAIN](photo))
    found = agree(photos, how)
    assert [(one.megapixels, one.way) for one in found] == [(size, way) for size in (0.05, 1.3) for way in how]
    assert min(one.lowest for one in found) > 0.999
    drafted = [one for one in found if (one.megapixels, one.way) == (1.3, "sparse-vlm")]
    assert drafted[0].lowest < 1 - 1e-7, "no draft was made"


def test_document_and_table(small, capsys):
    main([str(EXAMPLES)], limit=1, rounds=3, json_file="-")
    document = json.loads(capsys.readouterr().out)
    assert document["format"] == "sparse-vlm/pictures/1" and {"torch", "pillow"} <= document["versions"].keys()
    assert len(document["times"]) == 2 * 2 * len(ways()) + 4  # sizes and threads, and a tower in batches
    assert all(0 < time["low"] <= time["ms"] <= time["high"] and time["rounds"] == 3 for time in document["times"])
    times, agreements = (
        [of(**each) for each in document[name]] for name, of in (("times", pictures.Time), ("agreement", pictures.Agreement))
    )
    table = as_table(times, agreements)
    assert "| sparse-vlm | 2 |" in table and "| tiny | 1 |" in table
    assert all(line.count("|") == 5 for line in table.splitlines() if line)

    main([str(EXAMPLES)], limit=1, rounds=0)
    assert capsys.readouterr().out == table[table.index("| cosine") :], "the same photos, so the same cosines"


def test_too_few_rounds_are_refused(tmp_path):
    with pytest.raises(UserError, match="--rounds is 2; a median needs 3"):
        time_all({}, {}, 2)
