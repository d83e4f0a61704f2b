"""Tars, jsons and samples as strangers write them: read right, or named in one line."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparse_vlm.data.conversations import MIXTURES, examples_of_photos
from sparse_vlm.data.dataset import files_of, photos_of, read_conversations
from sparse_vlm.data.llava import Fence, LlavaFile, image_in, mistakes_of
from sparse_vlm.data.records import scan
from sparse_vlm.errors import UserError, printable
from sparse_vlm.images.photos import PhotoSet
from sparse_vlm.utils.documents import LFS, parse_json
from sparse_vlm.vlm.prompts import text_of

JPEG = io.BytesIO()
Image.new("RGB", (48, 40), (200, 20, 20)).save(JPEG, "JPEG")
JPEG = JPEG.getvalue()
Member = tuple[str, bytes, dict[str, object]]


def tar_of(path: Path, *members: Member | tuple[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data, *more in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in (more[0] if more else {}).items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(data))
    return path


def sized(path: Path, size: bytes) -> None:
    """Write another size into the first header."""
    data = bytearray(path.read_bytes())
    data[124:136] = size
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 256 + sum(data[156:512]))
    path.write_bytes(data)


def test_links_lead_to_what_they_name(tmp_path):
    members = [("a/0.jpg", JPEG), ("1.jpg", b"", {"type": tarfile.LNKTYPE, "linkname": "a/0.jpg"})]
    members += [
        ("a/2.jpg", b"", {"type": tarfile.SYMTYPE, "linkname": "../1.jpg"}),
        ("0.json", b'{"label": 3}'),
        ("a/0.json", b'{"label": 4}'),
    ]
    found = {photo.key: photo for photo in PhotoSet(tar_of(tmp_path / "photos.TAR", *members))}
    assert list(found) == ["a/0", "1", "a/2"] and all(photo.read() == JPEG for photo in found.values())
    assert [photo.info for photo in found.values()] == [{"label": 4}, {}, {}]


def test_keys_end_at_the_first_full_stop(tmp_path):
    members = [
        ("v1.5/0.left.JPG", JPEG),
        ("v1.5/0.json", b'{"label": 1}'),
        ("v1.5/0.seg.json", b"milk"),
        ("._1.jpg", b"\0"),
        ("._1.json", b"\0"),
    ]
    members += [
        ("__MACOSX/._0.jpg", b"\0"),
        ("1.JFIF", JPEG),
        ("1.JSON", b'\xef\xbb\xbf{"label": 2}'),
        ("folder.jpg", b"", {"type": tarfile.DIRTYPE}),
    ]
    found = {photo.key: photo.info for photo in PhotoSet(tar_of(tmp_path / "photos.tar", *members))}
    assert found == {"v1.5/0": {"label": 1}, "1": {"label": 2}}
    twice = tar_of(tmp_path / "twice.tar", ("0.jpg", b"old"), ("0.jpg", JPEG))
    assert [photo.read() for photo in PhotoSet(twice)] == [JPEG], "a tar's later member replaces the earlier one of its name"


LINK = {"type": tarfile.SYMTYPE}
TARS = {
    "two pictures": ([("0.jpg", JPEG), ("0.mask.png", JPEG)], r"0.jpg and 0.mask.png are two images of one key, 0\b"),
    "link out": ([("a.jpg", JPEG), ("a.json", b"", LINK | {"linkname": "/etc/passwd"})], "a.json: a link to /etc/passwd, which is not in"),
    "loop": ([("a.jpg", b"", LINK | {"linkname": "b.jpg"}), ("b.jpg", b"", LINK | {"linkname": "a.jpg"})], "a.jpg: a link to "),
    "device": ([("a.jpg", b"", {"type": tarfile.CHRTYPE})], "a.jpg: is no file"),
    "latin-1": ([("a.jpg", JPEG), ("a.json", b'{"a": "\xff"}')], "a.json: not a readable json file .not UTF-8 at byte 7"),
    "deep": ([("a.jpg", JPEG), ("a.json", b"[" * 100_000)], "a.json: not a readable json file .nested too deep"),
    "digits": ([("a.jpg", JPEG), ("a.json", b'{"label": ' + b"9" * 5000 + b"}")], "a.json: not a readable json file .holds a number"),
    "null": ([("a.jpg", JPEG), ("a.json", b"null")], "a.json: holds null, not an object"),
    "list": ([("a.jpg", JPEG), ("a.json", b"[1]")], r"a.json: holds \[1\], not an object"),
    "pointer": ([("a.jpg", JPEG), ("a.json", LFS + b"v1\n")], "a.json: a git-lfs pointer"),
    "pax": ([("a.jpg", JPEG, {"pax_headers": {f"k{i}": "v" for i in range(2000)}})], "a.jpg: its pax header sets 2,00"),
}


@pytest.mark.parametrize("kind", TARS)
def test_hostile_tars_are_one_line_that_names_the_member(tmp_path, kind):
    members, why = TARS[kind]
    path = tar_of(tmp_path / "photos.tar", *members)
    with pytest.raises(UserError, match=f"^{path}: {why}") as caught:
        PhotoSet(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "why"), [(b"\x80" + (2**62).to_bytes(11, "big"), "more than the tar holds|not a readable"), (b"\xff" * 12, "")]
)
def test_sizes_beyond_the_tar_are_refused(tmp_path, size, why):
    path = tar_of(tmp_path / "photos.tar", ("a.jpg", JPEG), form=tarfile.GNU_FORMAT)
    sized(path, size)
    with pytest.raises(UserError, match=f"^{path}: .*(?:more than the tar holds|not a readable webdataset tar)"):
        PhotoSet(path)


def test_chained_headers_and_what_is_no_tar(tmp_path):
    path = tmp_path / "photos.tar"
    block = tar_of(path, ("a.jpg", JPEG)).read_bytes()
    header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    header[156:157] = b"x"
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:512]))
    path.write_bytes(bytes(header) * 5000 + block)
    with pytest.raises(UserError, match=f"^{path}: not a readable webdataset tar"):
        PhotoSet(path)
    for data, why in (
        (gzip.compress(block), r"is compressed \(gzip\)"),
        (LFS + b"v1\n", "a git-lfs pointer"),
        (b"<html>", "not a readable"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=f"^{path}: {why}"):
            PhotoSet(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="not a regular file"):
        PhotoSet(path)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b'{"a": 1, "a": 2}', "holds the key 'a' twice"),
        (b'{"a": [NaN]}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": ' * 5000, "nested too deep"),
        (b"9" * 5000, "too many digits"),
        (b'{"a": "\xe9"}', "not UTF-8 at byte 7"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": \0}', "Expecting value"),
        (b"", "Expecting value"),
        (LFS + b"v1\n", "git-lfs pointer"),
    ],
)
def test_jsons_that_are_none(tmp_path, data, why):
    with pytest.raises(UserError, match=f"^a.json: .*{why}"):
        parse_json(data, "a.json")
    (tmp_path / "data.json").write_bytes(b"[" + data + b"]")
    (tmp_path / "data.jsonl").write_bytes(b'{"id": 1}\r\n\r\n' + data + b'\r\n{"id": 2}\r\n')
    if data and not data.startswith((LFS, b"\xff\xfe")):
        with pytest.raises(UserError, match=rf"data.json, line 1, byte \d+: not a LLaVA json \(.*{why.partition(' at ')[0]}"):
            list(scan(tmp_path / "data.json"))
        found = list(scan(tmp_path / "data.jsonl"))
        assert (
            [record.number for record in found] == [1, 3, 4] and found[2].value == {"id": 2} and why.partition(" at ")[0] in found[1].error
        )


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert parse_json(b"\xef\xbb\xbf[1]", "a.json") == [1]
    for name, data in (("a.json", b"[1]"), ("b.jsonl", b"1"), ("C.NDJSON", b"1")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + data)
        assert [record.value for record in scan(tmp_path / name)] == [1]
    assert [path.name for path, _ in files_of(["DATA.JSON", "x.tar"])] == ["DATA.JSON"]


def sample(question: str = "<image>\nWhat?", answer: str = "A cup.", **more: object) -> dict[str, object]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": "a.jpg", "conversations": turns, **more}


@pytest.mark.parametrize(
    ("made", "kinds"),
    [
        (sample(images=["a.jpg"]), ["other media"]),
        (sample(video="a.mp4"), ["other media"]),
        (sample(audio=["a.wav"]), ["other media"]),
        (sample("<image>\n<video>\nWhat?"), []),
        (sample("<video>\nWhat?", image=None), ["other media"]),
        (sample("What? <audio>", image=None), ["other media"]),
        (sample("What does <video> do in HTML?", image=None), []),
        (sample(images=[], video=None), []),
        (sample(answer="A cup \ud83d"), ["broken text"]),
        (sample(image="\udcff.jpg"), ["broken text"]),
        (sample(answer="A cup \U0001f600"), []),
    ],
)
def test_what_is_not_learnt_from_is_a_problem(made, kinds):
    assert [mistake.kind for mistake in mistakes_of(made)] == kinds


def test_training_names_the_sample(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([sample(id="good"), sample(id="\x1b[31mbad", answer="\ud83d")]))
    with pytest.raises(UserError, match=r"data.json:1 \(id \\x1b\[31mbad\): turn 1 holds half of a character"):
        LlavaFile(tmp_path / "data.json", tmp_path, {})


def test_the_image_folder_is_a_fence(tmp_path, monkeypatch):
    folder = tmp_path / "images"
    for name in ("images/in", "other"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.jpg").write_bytes(JPEG)
    (folder / "link").symlink_to(tmp_path / "other")
    (folder / "file.jpg").symlink_to(tmp_path / "other/a.jpg")
    (folder / "inner.jpg").symlink_to(folder / "in/a.jpg")
    fence = Fence(folder)
    inside = ["in/a.jpg", "in/../in/a.jpg", str(folder / "in/a.jpg"), "inner.jpg", "gone.jpg", "a\0b.jpg"]
    outside = [
        "../other/a.jpg",
        str(tmp_path / "other/a.jpg"),
        "link/a.jpg",
        "file.jpg",
        "in/../../other/a.jpg",
        "..",
        "link/../other/a.jpg",
    ]
    assert not any(map(fence.left_by, inside)) and all(map(fence.left_by, outside))
    monkeypatch.chdir(tmp_path)
    assert Fence(Path("images")).left_by("../other/a.jpg") and not Fence(Path()).left_by("images/in/a.jpg")
    (tmp_path / "data.json").write_text(json.dumps([sample(image=name, id=name) for name in ("in/a.jpg", "link/a.jpg")]))
    with pytest.raises(UserError, match=r"data.json:1 \(id link/a.jpg\): 'link/a.jpg' leads out of .*--allow-outside"):
        LlavaFile(tmp_path / "data.json", folder, {})
    assert len(LlavaFile(tmp_path / "data.json", folder, {}, allow_outside=True)) == 2
    assert image_in(folder, "a\0b.jpg").size == image_in(folder, "in").size == -1


def dataset_of(path: Path, folder: Path):
    return read_conversations(files_of([str(path)]), photos_of([str(path)]), folder, MIXTURES["instruct"])


def test_a_fingerprint_is_of_what_is_said(tmp_path):
    def of(*samples: dict[str, object], name: str = "data.json") -> str:
        (tmp_path / name).write_text(json.dumps(samples, indent=1 if name == "data.json" else None))
        return dataset_of(tmp_path / name, tmp_path).fingerprint()

    first = of(sample(answer="red"))
    assert first == of(sample(answer="red"), name="moved.json")
    assert len({first, of(sample(answer="tan")), of(sample(answer="red", image="b.jpg")), of(sample("What?\n<image>", "red"))}) == 4

    def of_tar(caption: str) -> str:
        info = json.dumps({"captions": [caption]}).encode()
        return dataset_of(tar_of(tmp_path / "photos.tar", ("a.jpg", JPEG), ("a.json", info)), tmp_path).fingerprint()

    assert of_tar("A red cup.") != of_tar("A tan cup.") and of_tar("A red cup.") == of_tar("A red cup.")


def test_one_caption_is_one_text(tmp_path):
    path = tar_of(tmp_path / "photos.tar", ("a.jpg", JPEG), ("a.json", b'{"captions": "a brown cup"}'))
    (example,) = examples_of_photos(list(PhotoSet(path)), MIXTURES["align"])
    assert [text_of(conversation[-1]) for conversation in example.conversations] == ["A brown cup."]
    assert example.photos[0].info["captions"] == ["a brown cup"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("captions", {"en": "a cup"}),
        ("captions", [["a cup"]]),
        ("captions", 7),
        ("captions", ["a cup \ud83d"]),
        ("label_name", ["cup"]),
        ("prompt", 3),
        ("objects", "cup"),
        ("objects", [{"name": "cup"}]),
        ("qa", {"q": "What?", "a": "cup"}),
        ("qa", ["What?"]),
        ("qa", [{"q": "What?"}]),
        ("vsr", [{"statement": "The cup is red.", "label": "yes"}]),
    ],
)
def test_what_is_known_of_a_photo_has_its_types(tmp_path, key, value):
    known = {"captions": ["a cup"], key: value}
    path = tar_of(tmp_path / "photos.tar", ("a.jpg", JPEG), ("a.json", json.dumps(known).encode()))
    for stage in ("read", "align", "instruct"):
        with pytest.raises(UserError, match=f"^photos.tar:a: '{key}' in its json"):
            examples_of_photos(list(PhotoSet(path)), MIXTURES[stage])


def test_cached_tokens_are_those_of_the_pictures_that_are_there(tmp_path):
    """Images of one name and one size in bytes, in another folder or in the old ones' place."""
    from sparse_vlm import SparseFormer
    from sparse_vlm.data.samples import FeatureCache

    for folder, colours in (("a", ("navy", "gold")), ("b", ("white", "black"))):
        (tmp_path / folder).mkdir()
        for name, colour in zip(("0.bmp", "1.bmp"), colours, strict=True):
            Image.new("RGB", (48, 40), colour).save(tmp_path / folder / name)
    tower = SparseFormer.from_pretrained("tiny")

    def tokens(folder: str, cache: str = "cache") -> np.ndarray:
        features_cache = FeatureCache(tmp_path / cache, tower, [image_in(tmp_path / folder, name) for name in ("0.bmp", "1.bmp")])
        missing = len(features_cache.missing([0, 1]))
        features_cache.fill([0, 1])
        return np.stack([features_cache[0].float().numpy(), features_cache[1].float().numpy()]), missing

    first, _ = tokens("a")
    again, missing = tokens("a")
    assert np.array_equal(first, again) and missing == 0
    other, _ = tokens("b")
    assert np.array_equal(other, tokens("b", "fresh")[0]) and not np.array_equal(other, first)
    for name in ("0.bmp", "1.bmp"):
        shutil.copy(tmp_path / "b" / name, tmp_path / "a" / name)
    assert np.array_equal(tokens("a")[0], other)


def test_printable_obeys_nothing():
    assert printable("a\x1b[2Jb\nc\udcffd\u202ee\x9bf café 猫 \U0001f600") == "a\\x1b[2Jb\\nc\\udcffd\\u202ee\\x9bf café 猫 \U0001f600"
