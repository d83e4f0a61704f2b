"""A run's folder and its teacher's cache: whole, had by one run, and never taken for what they are not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

open_clip = pytest.importorskip("open_clip", reason="bootstrapping needs open_clip")

from commands import run_command  # noqa: E402

from sparse_vlm.distill.cache import TeacherCache  # noqa: E402
from sparse_vlm.distill.views import ViewSet  # noqa: E402
from sparse_vlm.errors import UserError  # noqa: E402
from sparse_vlm.hub import store  # noqa: E402
from sparse_vlm.images.photos import PhotoSet  # noqa: E402
from sparse_vlm.roi import grid_rois  # noqa: E402
from sparse_vlm.teachers import Teacher  # noqa: E402
from sparse_vlm.train import run  # noqa: E402


def draw(folder: Path, count: int, suffix: str = "png") -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(rng.integers(0, 255, (64, 80, 3), dtype=np.uint8)).save(folder / f"{index:03d}.{suffix}")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("photos") / "few", 120)


# ---- the folder


@pytest.mark.parametrize("text", ["{", "[1]", "null", '"a"', "[" * 100_000, "\xff"])
def test_damaged_settings_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.json").write_bytes(text.encode("latin-1"))
    with (
        pytest.raises(UserError, match=r"settings.json: (cannot be read|holds no JSON object).*choose another --out"),
        run.locked_run(tmp_path, {}),
    ):
        pass


def test_what_is_only_named_like_a_checkpoint_is_none(tmp_path: Path) -> None:
    for name in ("checkpoint-old", "checkpoint-", "checkpoint-3-copy", "checkpoint-7"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "complete").write_text("{}")
    assert [path.name for path in run.marked_checkpoints(tmp_path)] == ["checkpoint-7"]
    assert run.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-7"


def test_a_start_that_fails_leaves_nothing_and_a_run_that_fails_its_checkpoints(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    with pytest.raises(UserError, match=r"run: No space left on device"), run.locked_run(out, {"seed": 0}):
        (out / "checkpoints" / "checkpoint-1").mkdir(parents=True)  # not written to its end
        raise OSError(28, "No space left on device")
    assert not out.exists()
    with pytest.raises(KeyError), run.locked_run(out, {"seed": 0}):
        (out / "checkpoints" / "checkpoint-1").mkdir(parents=True)
        (out / "checkpoints" / "checkpoint-1" / "complete").write_text("{}")
        (out / "checkpoints" / "checkpoint-2").mkdir()
        raise KeyError
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-1"]
    with pytest.raises(UserError, match="another seed"), run.locked_run(out, {"seed": 1}):
        pass
    with run.locked_run(out, {"seed": 0}):
        pass


def test_a_complete_run_is_known_by_all_that_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "tower_adapter").mkdir()
    (tmp_path / "tower_adapter" / "adapter_config.json").write_text("{}")
    assert not run.finished(tmp_path, {"seed": 0})
    (tmp_path / "training.json").write_text(json.dumps({"settings": {"seed": 0}, "files": run.written_files(tmp_path)}))
    assert run.finished(tmp_path, {"seed": 0}) and "is complete" in capsys.readouterr().err
    assert not run.finished(tmp_path, {"seed": 1})
    (tmp_path / "training.json").write_text(
        json.dumps({"settings": {"seed": 0, "relation_weight": 0.0}, "files": run.written_files(tmp_path)})
    )
    assert run.finished(tmp_path, {"seed": 0}), "of an earlier version"
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert not run.finished(tmp_path, {"seed": 0})


def test_an_unfinished_run_is_not_called_a_folder_without_a_tower(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(UserError, match="unfinished run and no model yet; give the command that began it again"):
        store.locate(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert store.locate(tmp_path) == tmp_path


def bootstrap(teacher_name: str, photos: Path, out: Path, **more: str) -> subprocess.CompletedProcess[str]:
    line = ["bootstrap", "--recipe", "elastic", "--teacher", teacher_name, "--data", str(photos), "--views", "80", "--threads", "1"]
    line += ["--set", "views_per_photo=1", "--set", "batch_size=16", "--set", "dropped=0"]
    options = {"out": str(out), "cache": str(out.parent / "cache"), **more}
    return run_command(*line, *(part for name, value in options.items() for part in (f"--{name}", value)))


def test_the_same_command_on_a_finished_run_changes_nothing(teacher_name: str, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "student[bold]"
    first = bootstrap(teacher_name, photos, out)
    assert first.returncode == 0, first.stderr
    assert f"student written to {out};" in first.stdout  # a bracket is no markup
    assert first.stderr.count(" views, loss ") >= 1  # also of a run of seconds
    weights, checkpoints = (out / "model.safetensors").read_bytes(), sorted((out / "checkpoints").iterdir())
    again = bootstrap(teacher_name, photos, out)
    assert again.returncode == 0 and "is complete" in again.stderr
    assert (out / "model.safetensors").read_bytes() == weights and sorted((out / "checkpoints").iterdir()) == checkpoints
    # as if it had been killed after its last checkpoint
    (out / "model.safetensors").write_bytes(weights[:1000])
    (out / "training.json").unlink()
    rest = bootstrap(teacher_name, photos, out)
    assert rest.returncode == 0 and "resuming at step 5 of 5" in rest.stderr, rest.stderr
    assert (out / "model.safetensors").read_bytes() == weights and sorted((out / "checkpoints").iterdir()) == checkpoints


@pytest.mark.parametrize(("named", "line"), [("folder", "is a folder; write local-dir:{folder}"), ("file", "is a file; ")])
def test_a_teacher_that_is_a_path_alone_is_told_its_prefix(named: str, line: str, teacher_name: str, photos: Path, tmp_path: Path) -> None:
    folder = teacher_name.removeprefix("local-dir:")
    names = {"folder": folder, "file": f"{folder}/open_clip_model.safetensors"}
    done = bootstrap(names[named], photos, tmp_path / "out")
    assert done.returncode == 2 and line.format(**names) in done.stderr and done.stderr.count("\n") == 1


# ---- the cache


def test_other_photos_under_the_same_names_are_other_views(tmp_path: Path) -> None:
    folder = draw(tmp_path / "a", 4, "bmp")
    known = ViewSet(list(PhotoSet(folder)), 1, 56).describe()
    assert ViewSet(list(PhotoSet(draw(tmp_path / "b", 4, "bmp"))), 1, 56).describe() == known  # wherever they lie
    first, last = folder / "000.bmp", folder / "003.bmp"
    one, other = first.read_bytes(), last.read_bytes()
    first.write_bytes(other), last.write_bytes(one)
    assert ViewSet(list(PhotoSet(folder)), 1, 56).describe() != known


def cache_of(folder: Path, teacher: Teacher, photos: Path) -> TeacherCache:
    return TeacherCache(folder, teacher, list(PhotoSet(photos))[:8], 2, grid_rois(9))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("patches-0.npy", lambda data: data[: len(data) // 4]),
        ("embeds-1.npy", lambda data: data[:-1]),
        ("patches-1.npy", lambda data: data + b"\0"),
        ("embeds-0.npy", lambda data: b""),
        ("sums-0.npy", lambda data: data.replace(b"<u4", b"<i4")),
        ("sums-0.npy", lambda data: data.replace(b"'fortran_order'", b"(((((((((((((((")),
        ("rows_done-0", lambda data: b"x"),
        ("rows_done-1", lambda data: b"-1"),
        ("rows_done-1", lambda data: b"9"),
    ],
)
def test_arrays_that_are_not_as_they_say_are_asked_for_again(
    name: str, change: object, teacher: Teacher, photos: Path, tmp_path: Path
) -> None:
    whole = cache_of(tmp_path, teacher, photos)
    whole.fill(teacher)
    wanted = [whole.outputs(row) for row in range(16)]
    path = whole.folder / name
    path.write_bytes(change(path.read_bytes()))
    again = cache_of(tmp_path, teacher, photos)
    assert again.done == 8
    again.fill(teacher)
    for row in range(16):
        assert all(torch.equal(a, b) for a, b in zip(again.outputs(row), wanted[row], strict=True))


@pytest.mark.parametrize("name", ["embeds-0.npy", "patches-0.npy"])
def test_a_row_that_is_not_what_was_written_is_never_learnt_from(name: str, teacher: Teacher, photos: Path, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, teacher, photos)
    cache.fill(teacher)
    data = bytearray((cache.folder / name).read_bytes())
    data[-64:] = bytes(64)  # of the same size, as a copy that was cut off leaves it
    (cache.folder / name).write_bytes(data)
    again = cache_of(tmp_path, teacher, photos)
    again.outputs(0)
    with pytest.raises(UserError, match=r"row 7 of view 0 is damaged"):
        again.outputs(7)
    with pytest.raises(UserError, match=r"row 7 of view 0"):
        again.statistics()


def test_a_cache_without_room_is_one_line_before_the_teacher_is_asked(teacher: Teacher, photos: Path, tmp_path: Path) -> None:
    full = OSError(28, "No space left on device")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=r"patches-0|embeds-0.*No space left on device"):
        patch.setattr("os.posix_fallocate", lambda *arguments: (_ for _ in ()).throw(full))
        cache_of(tmp_path, teacher, photos)
    assert not list(tmp_path.rglob("*.npy")) and not list(tmp_path.rglob("*.tmp"))


def test_two_who_want_a_cache_fill_it_once(teacher_name: str, teacher: Teacher, photos: Path, tmp_path: Path) -> None:
    hold = """
import sys, time
from pathlib import Path
from sparse_vlm.utils.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(1)
"""
    cache = cache_of(tmp_path, teacher, photos)
    holder = subprocess.Popen([sys.executable, "-c", hold, str(cache.folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    cache.fill(teacher)
    assert holder.wait() == 0 and cache.done == 16


# ---- an export's folder


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda out: (out / "README.md").write_text("my notes"), "README.md is not what the export wrote"),
        (lambda out: (out / "mine").mkdir(), "holds mine, which no export wrote"),
        (lambda out: (out / "link").symlink_to("nowhere"), "holds link, which no export wrote"),
        (lambda out: (out / "export.json").write_text('{"format": "sparse-vlm/export/1", "files": []}'), "no export of sparse-vlm"),
        (lambda out: (out / "export.json").write_text("[1]"), "no export of sparse-vlm"),
        (lambda out: None, None),
    ],
)
def test_only_what_an_export_wrote_is_replaced(change: object, line: str | None, tmp_path: Path) -> None:
    from sparse_vlm.export.run import DESCRIPTION, FORMAT, _check_out

    (tmp_path / "onnx").mkdir()
    for name in ("README.md", "onnx/model.onnx"):
        (tmp_path / name).write_text(name)
    files = {name: {"size": len(name), "sha256": store.sha256(tmp_path / name)} for name in ("README.md", "onnx/model.onnx")}
    (tmp_path / DESCRIPTION).write_text(json.dumps({"format": FORMAT, "model": "tiny", "files": files}))
    change(tmp_path)
    if line is None:
        _check_out(tmp_path, replace=True)
        with pytest.raises(UserError, match="add --replace"):
            _check_out(tmp_path, replace=False)
        return
    with pytest.raises(UserError, match=line):
        _check_out(tmp_path, replace=True)
