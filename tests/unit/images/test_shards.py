"""Tars of photos made small once: what is in them, going on where a run stopped, and what is refused."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from sparse_vlm.images import shards
from sparse_vlm.images.photos import PhotoSet
from sparse_vlm.images.shards import INDEX, main, write_shards

KEYS = ["large", "small", "tall", "broken", "upright"]


def encoded(width: int, height: int, form: str = "JPEG", **options: object) -> bytes:
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    stream = io.BytesIO()
    Image.fromarray(np.stack([across, down, across], -1).astype(np.uint8)).save(stream, form, **options)
    return stream.getvalue()


@pytest.fixture
def source(tmp_path) -> Path:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    files = {
        "large.jpg": encoded(401, 301),
        "large.json": '{"captions": ["ein Maß"], "label": 3}'.encode(),
        "small.webp": encoded(70, 50, "WEBP"),
        "small.json": b"{}",
        "tall.of.all.png": encoded(90, 300, "PNG"),
        "broken.jpg": encoded(300, 300)[:900],
        "upright.jpg": encoded(402, 200, exif=exif),
    }
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return tmp_path / "photos.tar"


@pytest.mark.parametrize("threads", [1, 3])
def test_photos_become_small_and_keep_what_is_known_of_them(source, tmp_path, threads):
    index = write_shards(PhotoSet(source), tmp_path / "out", side=64, threads=threads)
    before, after = ({photo.key: photo for photo in PhotoSet(path)} for path in (source, tmp_path / "out/photos.tar"))
    assert list(before) == KEYS and list(after) == [key for key in KEYS if key != "broken"]
    sizes = {key: photo.load().size for key, photo in after.items()}
    assert sizes == {"large": (85, 64), "small": (70, 50), "tall": (64, 213), "upright": (64, 128)}
    assert after["small"].read() == before["small"].read() and after["large"].info == {"captions": ["ein Maß"], "label": 3}
    for key in ("large", "upright"):
        expected = before[key].load().resize(sizes[key], Image.Resampling.BICUBIC)
        off = np.asarray(after[key].load()).astype(int) - np.asarray(expected)
        assert abs(off).mean() < 1.5
    (entry,) = index["shards"].values()
    assert (entry["photos"], entry["copied"], list(entry["unreadable"])) == (4, 1, ["broken"])
    assert "photos.tar:broken: truncated" in entry["unreadable"]["broken"]
    assert json.loads((tmp_path / "out" / INDEX).read_text()) == index
    with tarfile.open(tmp_path / "out/photos.tar") as archive:
        assert archive.getnames()[:3] == ["large.jpg", "large.json", "small.webp"]


def test_a_run_that_was_interrupted_goes_on(source, tmp_path, monkeypatch):
    out, shrink, made = tmp_path / "out", shards.shrink, []

    def stops(photo, side):
        made.append(photo.key)
        if photo.key == "upright":
            raise KeyboardInterrupt
        return shrink(photo, side)

    monkeypatch.setattr(shards, "shrink", stops)
    command = [str(source), "--out", str(out), "--side", "64", "--per-shard", "2", "--threads", "1"]
    assert main(command) == 130
    assert sorted(path.name for path in out.iterdir()) == ["photos-00000.tar", "photos-00001.tar", INDEX]
    monkeypatch.setattr(shards, "shrink", lambda photo, side: made.append(f"{photo.key} again") or shrink(photo, side))
    assert main(command) == 0
    assert made == [*KEYS, "upright again"]
    assert len(PhotoSet(str(out / "*.tar"))) == 4
    whole = write_shards(PhotoSet(source), tmp_path / "whole", side=64, per_shard=2)
    assert whole["shards"] == json.loads((out / INDEX).read_text())["shards"]
    for name in whole["shards"]:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_folders_become_tars(tmp_path):
    (tmp_path / "birds/far").mkdir(parents=True)
    for name in ("a.jpg", "far/a.png"):
        (tmp_path / "birds" / name).write_bytes(encoded(200, 100, "PNG" if name.endswith("png") else "JPEG"))
    write_shards(PhotoSet(tmp_path / "birds"), tmp_path / "out", side=50)
    found = {photo.key: photo.load().size for photo in PhotoSet(tmp_path / "out/birds.tar")}
    assert found == {"a": (100, 50), "far/a": (100, 50)}
    (tmp_path / "birds/a.png").write_bytes(encoded(20, 10, "PNG"))
    with pytest.raises(Exception, match=r"a.jpg and \S*a.png would both be a in a tar"):
        write_shards(PhotoSet(tmp_path / "birds"), tmp_path / "more")


def test_mistakes_are_one_line(source, tmp_path, capsys):
    out = tmp_path / "out"

    def refused(*arguments: str) -> str:
        assert main([str(each) for each in arguments]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("shards: ")
        return said

    assert main([str(source), "--out", str(out), "--side", "64"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("4 photos in 1 tar,") and "left out: 1 that cannot be read" in said and "photos.tar:broken: truncated" in said
    assert "begun with" in refused(source, "--out", out, "--side", "65")
    assert "not of our making" in refused(source, "--out", tmp_path)
    assert "it must be at least 1" in refused(source, "--out", out, "--side", "0")
    assert "no such file" in refused(tmp_path / "gone.tar", "--out", out)
    (tmp_path / "two").mkdir()
    (tmp_path / "two/photos.tar").write_bytes(source.read_bytes())
    assert "another source gives a photos.tar as well" in refused(source, tmp_path / "two/photos.tar", "--out", tmp_path / "third")
    with tarfile.open(source, "a") as archive:
        archive.addfile(tarfile.TarInfo("empty.jpg"), io.BytesIO())
    assert "made of other photos" in refused(source, "--out", out, "--side", "64")
    (out / INDEX).write_text("[]")
    assert "not an index of ours" in refused(source, "--out", out, "--side", "64")
    (tmp_path / "milk.jpg").write_bytes(b"milk")
    assert "none of the 1 photos can be read" in refused(tmp_path / "milk.jpg", "--out", tmp_path / "fourth")


def test_help_has_an_example():
    done = subprocess.run([sys.executable, "-m", "sparse_vlm.images.shards", "--help"], capture_output=True, text=True, check=True)
    assert "Example: python -m sparse_vlm.images.shards" in done.stdout
