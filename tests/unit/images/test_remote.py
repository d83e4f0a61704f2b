"""Photos that lie elsewhere: URLs, from a server of the test's own, and data sets of Hugging Face, from a folder."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from sparse_vlm.errors import UserError
from sparse_vlm.images.decode import ImageError
from sparse_vlm.images.photos import PhotoSet


def tar_of(*colours: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for colour in colours:
            picture = io.BytesIO()
            Image.new("RGB", (40, 30), colour).save(picture, "PNG")
            for suffix, data in (("png", picture.getvalue()), ("json", json.dumps({"captions": [colour]}).encode())):
                member = tarfile.TarInfo(f"{colour}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


class Server:
    """Serves files, with ranges; `cut` ends an answer after so many bytes."""

    def __init__(self) -> None:
        self.files = {"/a-0.tar": tar_of("red", "blue"), "/a-1.tar": tar_of("green")}
        self.cut: int | None = None
        self.asked: list[tuple[str, str | None]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                span = self.headers.get("Range")
                server.asked.append((self.path, span))
                if self.path not in server.files:
                    self.send_error(404)
                    return
                start = int(span.removeprefix("bytes=").rstrip("-")) if span else 0
                data = server.files[self.path][start:]
                self.send_response(206 if span else 200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: server.cut])

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("SPARSE_VLM_HOME", str(tmp_path / "home"))
    made = Server()
    yield made
    made.http.shutdown()


def test_tars_are_fetched_once_by_their_urls(server: Server) -> None:
    told: list[tuple[str, int, int]] = []
    photos = PhotoSet(server.url + "/a-{0..1}.tar", lambda *what: told.append(what))
    assert [photo.key for photo in photos] == ["red", "blue", "green"]
    assert photos[2].load().getpixel((0, 0)) == (0, 128, 0) and photos[2].info["captions"] == ["green"]
    size = len(server.files["/a-1.tar"])
    assert told[-1] == (server.url + "/a-1.tar", size, size)
    assert len(PhotoSet(server.url + "/a-{0..1}.tar")) == 3
    assert len(server.asked) == 2, "what is here is not asked for again"


def test_several_processes_fetch_a_tar_once_on_every_machine(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "9")  # the first process of a machine that shares no disk with that of rank 0
    monkeypatch.setenv("LOCAL_RANK", "0")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: len(PhotoSet(server.url + "/a-0.tar")), range(4)))
    assert found == [2] * 4 and len(server.asked) == 1


def test_a_download_that_was_cut_off_goes_on(server: Server, tmp_path: Path) -> None:
    server.cut = 3000
    with pytest.raises(UserError, match="give the command again"):
        PhotoSet(server.url + "/a-0.tar")
    assert not list((tmp_path / "home").rglob("*.tar")), "half a tar is not read as photos"
    server.cut = None
    assert len(PhotoSet(server.url + "/a-0.tar")) == 2
    assert server.asked == [("/a-0.tar", None), ("/a-0.tar", "bytes=3000-")]


def test_what_cannot_be_fetched_is_one_line(server: Server) -> None:
    with pytest.raises(UserError, match="404"):
        PhotoSet(server.url + "/none.tar")
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(UserError, match="cannot be fetched"):
        PhotoSet(server.url + "/a-0.tar")


def test_braces_name_several_files(tmp_path: Path) -> None:
    for name in ("p-08", "p-09", "p-10"):
        (tmp_path / f"{name}.tar").write_bytes(tar_of("red"))
    assert len(PhotoSet(str(tmp_path / "p-{08..10}.tar"))) == 3
    with pytest.raises(ImageError, match=r"p-11.tar: no such file"):
        PhotoSet(str(tmp_path / "p-{08..11}.tar"))
    with pytest.raises(ImageError, match="braces do not match"):
        PhotoSet(str(tmp_path / "p-{08..10.tar"))


def test_a_data_set_of_hugging_face_becomes_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="data sets of Hugging Face need datasets")
    monkeypatch.setenv("SPARSE_VLM_HOME", str(tmp_path / "home"))
    pictures = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    features = datasets.Features(
        {"image": datasets.Image(), "caption": datasets.Value("string"), "kind": datasets.ClassLabel(names=["a", "b"])}
    )
    rows = datasets.Dataset.from_dict({"image": pictures, "caption": ["one", "two"], "kind": [1, 0]}, features=features)
    (tmp_path / "set").mkdir()
    rows.to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    photos = PhotoSet(f"hf:{tmp_path / 'set'}:train")
    assert [photo.load().getpixel((0, 0)) for photo in photos] == [(255, 0, 0), (0, 0, 255)]
    assert [(p.info["captions"], p.info["label"], p.info["label_name"]) for p in photos] == [(["one"], 1, "b"), (["two"], 0, "a")]
    with pytest.raises(UserError, match="name the split"):
        PhotoSet("hf:somebody/something")
    with pytest.raises(UserError, match="needs one column of images"):
        rows.remove_columns("image").to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
        PhotoSet(f"hf:{tmp_path}/set/:train")
    assert not list((tmp_path / "home").rglob("*.part"))
