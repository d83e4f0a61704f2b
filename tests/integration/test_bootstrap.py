"""Inheriting from a teacher and learning from it, with a real open_clip ViT of toy size and generated images."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import ALONE, TWO, finish, run_command
from PIL import Image
from tiny_teacher import write_teacher

open_clip = pytest.importorskip("open_clip", reason="bootstrapping needs open_clip")

from sparse_vlm import SparseFormer  # noqa: E402
from sparse_vlm.distill.cache import TeacherCache  # noqa: E402
from sparse_vlm.distill.inherit import inherit, plan, resize_patch_embedding  # noqa: E402
from sparse_vlm.distill.live import LiveTeacher  # noqa: E402
from sparse_vlm.distill.loss import parameter_groups  # noqa: E402
from sparse_vlm.distill.recipes import RECIPES, changed  # noqa: E402
from sparse_vlm.distill.views import ViewSet, make_view  # noqa: E402
from sparse_vlm.errors import UserError  # noqa: E402
from sparse_vlm.images.photos import PhotoSet  # noqa: E402
from sparse_vlm.images.preprocess import normalize  # noqa: E402
from sparse_vlm.roi import grid_rois  # noqa: E402
from sparse_vlm.teachers import Teacher, TeacherError, load_teacher  # noqa: E402


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of coloured rectangles on noise."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(160):
        picture = rng.integers(0, 80, (64, 80, 3), dtype=np.uint8)
        x, y = rng.integers(0, 50), rng.integers(0, 40)
        picture[y : y + 24, x : x + 30] = rng.integers(0, 255, 3)
        Image.fromarray(picture).save(folder / f"{index:03d}.png")
    return folder


def student(teacher: Teacher, recipe: str = "tiny") -> SparseFormer:
    torch.manual_seed(0)
    return SparseFormer(RECIPES[recipe].config(teacher.spec)).eval()


@pytest.mark.parametrize("recipe", [name for name in RECIPES if not name.startswith("paper")])
def test_every_tensor_of_both_sides_is_accounted_for(teacher: Teacher, recipe: str) -> None:
    fitting = dataclasses.replace(RECIPES[recipe], dropped=min(1, RECIPES[recipe].dropped))  # this teacher has two blocks
    tower = SparseFormer(fitting.config(teacher.spec))
    rows = plan(tower, teacher, fitting)
    assert {row.source for row in rows if row.source} == set(teacher.tensors)
    assert sorted(row.target for row in rows if row.target) == sorted(tower.state_dict())
    assert all(row.reason for row in rows if row.fate == "left out")


def test_an_inherited_block_computes_what_the_teachers_block_computes(teacher: Teacher) -> None:
    tower = student(teacher)
    inherit(tower, teacher, RECIPES["tiny"])
    assert teacher.spec.activation == "quick_gelu" and teacher.spec.norm_pre
    x = torch.randn(2, 17, 64)
    rois = torch.zeros(2, 16, 4)
    unit = tower.units()[-1]
    unit.ops = ("ATTN", "MLP")
    with torch.no_grad():
        ours, _ = unit(x, rois, None, None)
        theirs = teacher.model.transformer.resblocks[1](x)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_with_one_cell_a_patch_the_student_begins_as_the_teacher(teacher: Teacher, teacher_name: str, tmp_path: Path) -> None:
    """The warm start adds nothing but pooling: where a cell is a patch, student and teacher agree."""
    done = run_command("bootstrap", "--recipe", "vit", "--teacher", teacher_name, "--out", str(tmp_path))
    assert done.returncode == 0 and "nothing was to be trained" in done.stdout, done.stdout + done.stderr
    tower = SparseFormer.from_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        ours, theirs = tower(pixels), teacher(pixels)
    assert torch.allclose(ours.image_embeds, theirs.embeds, atol=1e-4)
    assert torch.allclose(ours.last_hidden_state[:, 1:], theirs.patches, atol=1e-4)
    assert torch.equal(ours.rois[0], grid_rois(16))


def test_a_resized_patch_embedding_answers_as_the_old_one_to_the_shrunken_patch() -> None:
    torch.manual_seed(0)
    weight, patch = torch.randn(4, 3, 14, 14), torch.rand(1, 3, 32, 32)
    shrunken = torch.nn.functional.interpolate(patch, size=(14, 14), mode="bicubic", antialias=True)
    new = (resize_patch_embedding(weight, 32) * patch).sum((1, 2, 3))
    assert torch.allclose(new, (weight * shrunken).sum((1, 2, 3)), atol=1e-3)


def test_frozen_units_are_not_trained(teacher: Teacher) -> None:
    tower = student(teacher)
    rows = inherit(tower, teacher, dataclasses.replace(RECIPES["tiny"], frozen=1))
    assert all(row.fate == "frozen" for row in rows if row.source.startswith("blocks.1."))
    assert not tower.units()[1].mlp.fc1.weight.requires_grad
    assert tower.units()[0].mlp.fc1.weight.requires_grad


def test_a_teacher_stays_frozen_and_in_eval_mode(teacher: Teacher) -> None:
    teacher.train()
    assert not teacher.training and not teacher.model.training
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_teacher_without_a_cls_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="CLS token"):
        load_teacher(write_teacher(tmp_path / "vit", pool_type="avg"))


def test_views_can_be_replayed() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 70, 3), dtype=np.uint8))
    one, again = (np.asarray(make_view(image, 56, "a", 1, 0)) for _ in range(2))
    assert (one == again).all()
    assert (one != np.asarray(make_view(image, 56, "a", 2, 0))).any()
    assert (one != np.asarray(make_view(image, 56, "b", 1, 0))).any()


def test_an_interrupted_cache_goes_on_where_it_stopped(teacher: Teacher, photos: Path, tmp_path: Path) -> None:
    few = list(PhotoSet(photos))[:24]

    def cache(folder: Path) -> TeacherCache:
        return TeacherCache(folder, teacher, few, 2, grid_rois(49))

    class Stop(Exception):
        pass

    def stop(rows: int) -> None:
        raise Stop

    whole, broken = cache(tmp_path / "whole"), cache(tmp_path / "broken")
    whole.fill(teacher, batch_size=4)
    with pytest.raises(Stop):
        broken.fill(teacher, batch_size=4, on_rows=stop)
    asked: list[int] = []
    broken = cache(tmp_path / "broken")
    broken.fill(teacher, batch_size=4, on_rows=asked.append)
    assert broken.done == len(broken) == 48
    for row in range(48):
        assert all(map(torch.equal, whole.outputs(row), broken.outputs(row)))
    cache(tmp_path / "broken").fill(teacher, on_rows=stop)  # full: the teacher is not asked again


@pytest.mark.parametrize(("supported", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_teacher_is_asked_in_what_the_machine_multiplies_in(
    teacher: Teacher, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, supported: bool, dtype: torch.dtype
) -> None:
    """Bfloat16 without instructions for it is emulated, eight times slower than float32 for a ViT."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    asked: list[torch.dtype] = []
    cast = Teacher.cast
    monkeypatch.setattr(Teacher, "cast", lambda self, dtype: asked.append(dtype) or cast(self, dtype))
    TeacherCache(tmp_path, teacher, list(PhotoSet(photos))[:4], 1, grid_rois(49)).fill(teacher)
    assert asked == [dtype]


def test_more_views_a_photo_keep_those_that_are_cached(teacher: Teacher, photos: Path, tmp_path: Path) -> None:
    few = list(PhotoSet(photos))[:8]
    one = TeacherCache(tmp_path, teacher, few, 1, grid_rois(49))
    one.fill(teacher)
    first = [one.outputs(row) for row in range(8)]
    two = TeacherCache(tmp_path, teacher, few, 2, grid_rois(49))
    assert (two.done, len(two)) == (8, 16)
    asked: list[int] = []
    two.fill(teacher, on_rows=asked.append)
    assert sum(asked) == 8
    for row in range(8):
        assert all(map(torch.equal, first[row], two.outputs(row)))
    embeds, _ = two.outputs(8 + 3)  # view 1 of photo 3
    pixels = normalize(two.pixels(8 + 3), teacher.spec.image_mean, teacher.spec.image_std).unsqueeze(0)
    assert torch.cosine_similarity(embeds, teacher(pixels).embeds[0], dim=0) > 0.999


def test_rates_are_relative_to_the_size_of_what_they_change(teacher: Teacher) -> None:
    tower = student(teacher)
    recipe = RECIPES["tiny"]
    new = {row.target for row in inherit(tower, teacher, recipe) if row.fate == "new"}
    groups = parameter_groups(tower, new, 1e-3, 2.0, 5e-6, 0.05)
    trained = [p for p in tower.parameters() if p.requires_grad]
    assert sorted(map(id, trained)) == sorted(id(p) for group in groups for p in group["params"]), "each tensor once"
    assert len(groups) < len(trained) / 2

    def size(name: str) -> float:
        return tower.get_parameter(name).square().mean().sqrt().item()

    def group(name: str) -> dict[str, Any]:
        return next(group for group in groups if any(p is tower.get_parameter(name) for p in group["params"]))

    about = 2**0.125 - 1  # half a quarter of an octave
    weight, looking = "layers.1.mlp.fc1.weight", "layers.0.adaptive_mixing.out_proj.weight"
    assert group(weight)["lr"] == pytest.approx(1e-3 * size(weight), rel=about)
    assert size(looking) == 0
    assert group(looking)["lr"] == pytest.approx(2e-3 * 0.02, rel=about)  # as a fresh layer's
    conv = "feat_extractor.conv1.weight"
    assert group(conv)["lr"] == pytest.approx(2e-3 * size(conv), rel=about)
    assert group("norm.weight")["lr"] == pytest.approx(1e-5, rel=about)  # ones, which count as 0.01
    assert group("layers.0.roi_offset_bias")["lr"] == 5e-6
    assert group("layers.0.roi_offset_bias")["weight_decay"] == group("norm.weight")["weight_decay"] == 0 < group(weight)["weight_decay"]


def arguments(teacher_name: str, photos: Path, out: Path, views: int) -> list[str]:
    where = ["--data", str(photos), "--out", str(out), "--cache", str(out.parent / "cache"), "--views", str(views)]
    return ["bootstrap", "--recipe", "tiny", "--threads", "1", "--teacher", teacher_name, *where]


@pytest.fixture(scope="module")
def finished(teacher_name: str, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run to its end."""
    out = tmp_path_factory.mktemp("run") / "student"
    finish(*arguments(teacher_name, photos, out, 1280))
    return out


def test_a_short_bootstrap_learns(finished: Path) -> None:
    history = json.loads((finished / "training.json").read_text())["history"]
    cosines = [h["eval_cosine"] for h in history if "eval_cosine" in h]
    losses = [h["loss"] for h in history if "loss" in h]
    assert cosines[-1] > cosines[0] + 0.005
    measured = [h["step"] for h in history if "eval_cosine" in h]
    assert len(measured) == len(set(measured)) and measured[-1] == 80
    assert losses[-1] < losses[0]
    assert (finished / "loss.png").stat().st_size > 10_000
    assert SparseFormer.from_pretrained(finished).config.num_latent_tokens == 49


def test_python_trains_as_the_command_does(teacher_name: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sparse_vlm.train import BootstrapConfig, bootstrap

    config = BootstrapConfig(
        teacher_name, data=[photos], recipe="tiny", changes={"batch_size": 8}, views=32, out=tmp_path / "student", cache=tmp_path / "cache"
    )
    result = bootstrap(config)
    assert result.completed and result.out == tmp_path / "student" and {"loss", "cosine", "token_cosine"} <= result.metrics.keys()
    assert "student" not in capsys.readouterr().out, "only a reporter prints"
    assert json.loads((result.out / "settings.json").read_text())["batch_size"] == 8
    written = (result.out / "model.safetensors").stat().st_mtime_ns
    assert bootstrap(config) == result and (result.out / "model.safetensors").stat().st_mtime_ns == written, "nothing is trained twice"
    for wrong in (dataclasses.replace(config, changes={"batch_size": 0.5}), dataclasses.replace(config, data=())):
        with pytest.raises(UserError, match="batch_size|--data"):
            bootstrap(wrong)


def test_a_live_teacher_says_what_a_cached_one_says(teacher: Teacher, photos: Path, tmp_path: Path) -> None:
    few = list(PhotoSet(photos))[:6]
    cache = TeacherCache(tmp_path, teacher, few, 2, grid_rois(49))
    cache.fill(teacher)
    views = ViewSet(few, 2, teacher.spec.image_size)
    live = LiveTeacher(teacher, grid_rois(49))
    embeds, tokens = live(torch.stack([views.pixels(row) for row in (2, 9)]))
    for i, row in enumerate((2, 9)):
        assert torch.allclose(cache.outputs(row)[0], embeds[i], atol=0.02) and torch.allclose(cache.outputs(row)[1], tokens[i], atol=0.02)


@pytest.mark.parametrize("recipe", ["tiny", "elastic"])
def test_a_student_learns_from_a_teacher_that_answers_at_every_step(recipe: str, teacher_name: str, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "broken.png").write_bytes(b"no picture")
    line = arguments(teacher_name, folder, tmp_path / "student", 480)
    line[line.index("tiny")] = recipe
    options = ["--set", "views_per_photo=0", *(["--set", "resolution=64"] if recipe == "tiny" else [])]
    said = finish(*line, *options)
    assert "no view is shown twice" in said
    assert "left out: 1 of 161 photos cannot be read" in said and "broken.png: not an image" in said
    assert not (tmp_path / "cache").exists()
    curve = [h["eval_loss"] for h in json.loads((tmp_path / "student" / "training.json").read_text())["history"] if "eval_loss" in h]
    assert curve[-1] < curve[0]
    assert SparseFormer.from_pretrained(tmp_path / "student").config.image_size == (64 if recipe == "tiny" else 56)


def test_a_student_of_any_budget_learns_from_all_of_the_teachers_patches(teacher_name: str, photos: Path, tmp_path: Path) -> None:
    line = arguments(teacher_name, photos, tmp_path / "student", 320)
    line[line.index("tiny")] = "elastic"
    assert "computed again in the backward pass" in finish(*line, "--gradient-checkpointing")
    tower = SparseFormer.from_pretrained(tmp_path / "student", num_tokens=20)
    assert tower(torch.zeros(1, 3, 56, 56)).last_hidden_state.shape == (1, 21, 64)
    assert torch.equal(SparseFormer.from_pretrained(tmp_path / "student").initial_roi.weight, grid_rois(49))


def test_cells_are_averaged_from_patches_that_another_run_kept(teacher: Teacher, photos: Path, tmp_path: Path) -> None:
    few, cells = list(PhotoSet(photos))[:8], grid_rois(9)
    asked = TeacherCache(tmp_path / "asked", teacher, few, 1, cells)
    asked.fill(teacher)
    TeacherCache(tmp_path / "kept", teacher, few, 1, None).fill(teacher)
    kept = TeacherCache(tmp_path / "kept", teacher, few, 1, cells)
    kept.fill(None)  # nobody is there to be asked
    for row in range(8):
        assert all(torch.allclose(a, b, atol=2e-3) for a, b in zip(asked.outputs(row), kept.outputs(row), strict=True))


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from types import SimpleNamespace

    from sparse_vlm.train.run import MarkComplete, latest_checkpoint

    for step in (100, 20, 200):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(range(step)))
        MarkComplete().on_save(
            SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=step, is_world_process_zero=True), None
        )
    for step in (30, 300):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert latest_checkpoint(tmp_path).name == "checkpoint-200"
    said = capsys.readouterr().err
    assert "checkpoint-300 was not written to its end and is left out" in said and "checkpoint-30 " not in said
    weights = tmp_path / "checkpoint-200" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")  # of the same size
    assert latest_checkpoint(tmp_path).name == "checkpoint-100"
    assert "checkpoint-200 is damaged (model.safetensors is not what was written)" in capsys.readouterr().err
    (tmp_path / "checkpoint-100" / "model.safetensors").unlink()
    (tmp_path / "checkpoint-20" / "complete").write_text("{")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        latest_checkpoint(tmp_path)


def test_photos_that_cannot_be_read_are_named_and_left_out(teacher_name: str, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    whole = (folder / "003.png").read_bytes()
    (folder / "003.png").write_bytes(whole[: len(whole) // 2])
    (folder / "004.png").write_text("no picture")
    said = finish(*arguments(teacher_name, folder, tmp_path / "student", 320))
    assert "left out: 2 of 160 photos cannot be read" in said and "003.png: truncated" in said and "004.png: not an image" in said
    document = json.loads((tmp_path / "student" / "training.json").read_text())
    assert [line.rpartition("/")[2].partition(" (")[0] for line in document["unreadable"]] == [
        "003.png: truncated or damaged image",
        "004.png: not an image",
    ]
    assert all(h["loss"] < 2 for h in document["history"] if "loss" in h)


def stop_and_go_on(line: list[str], out: Path, how: signal.Signals, start: list[str] = ALONE) -> None:
    """Run the command until its first checkpoint, stop it some steps later, and run it again to its end."""
    first = subprocess.Popen([*start, *line], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 400
    while not list(out.glob("checkpoints/checkpoint-*/complete")):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.05)
    time.sleep(random.random())
    first.send_signal(how)
    log, _ = first.communicate(timeout=200)
    assert first.returncode != 0 and not (out / "model.safetensors").exists(), log
    if how != signal.SIGKILL:
        assert "give the same command again" in log, log
    finish(*line, start=start)


def assert_same(one: Path, other: Path) -> None:
    ours, theirs = SparseFormer.from_pretrained(one).state_dict(), SparseFormer.from_pretrained(other).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_ends_where_an_uninterrupted_one_does(
    how: signal.Signals, teacher_name: str, photos: Path, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished.parent / "cache", tmp_path / "cache")
    out = tmp_path / "student"
    stop_and_go_on(arguments(teacher_name, photos, out, 1280), out, how)
    assert_same(out, finished)


@pytest.fixture(scope="module")
def alone(teacher_name: str, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """What one process learns."""
    out = tmp_path_factory.mktemp("alone") / "student"
    return learn(out, arguments(teacher_name, photos, out, 320))[1]


def learn(out: Path, line: list[str], start: list[str] = ALONE) -> tuple[str, list[float]]:
    """What a run says, and its losses."""
    said = finish(*line, start=start)
    losses = losses_of(out)
    assert len(losses) == 18 + 4
    assert not list(out.glob("*.tmp"))
    return said, losses


def losses_of(out: Path) -> list[float]:
    history = json.loads((out / "training.json").read_text())["history"]
    # the last batch of an epoch is not full, and two processes fill it up
    losses = [h["loss"] for h in history if "loss" in h and h["step"] % 10]
    return losses + list({h["step"]: h["eval_loss"] for h in history if "eval_loss" in h}.values())


needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="sharing optimizer and weights needs DeepSpeed")


@pytest.mark.parametrize("engine", ["", pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed)])
def test_two_processes_learn_what_one_does(engine: str, teacher_name: str, photos: Path, alone: list[float], tmp_path: Path) -> None:
    out = tmp_path / "two" / "student"
    options = ["--deepspeed", engine] if engine else []
    said, losses = learn(out, [*arguments(teacher_name, photos, out, 320), *options], TWO)
    assert losses == pytest.approx(alone, rel=2e-2)  # bfloat16, where the machine has it
    assert said.count("student written to") == 1
    assert {path.name for path in out.glob("*.safetensors")} == {"model.safetensors"}
    SparseFormer.from_pretrained(out)
    assert not [path for path in out.rglob("*") if "teacher" in path.name], "the teacher is in no checkpoint"
    if engine == "zero3":
        shutil.copytree(tmp_path / "two" / "cache", tmp_path / "again" / "cache")
        again = tmp_path / "again" / "student"
        stop_and_go_on([*arguments(teacher_name, photos, again, 320), *options], again, signal.SIGTERM, TWO)
        # also where a checkpoint was written that the undisturbed run did not write
        assert losses_of(again) == losses
        assert_same(again, out)


def test_another_run_in_the_same_folder_is_refused(teacher_name: str, photos: Path, finished: Path) -> None:
    done = run_command(*arguments(teacher_name, photos, finished, 640))
    assert done.returncode == 2
    assert re.search(r"another views", done.stderr) and "Traceback" not in done.stderr


def test_checkpoints_of_an_unknown_run_are_never_resumed(tmp_path: Path) -> None:
    from sparse_vlm.train.run import lock_settings

    (tmp_path / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    lock_settings(tmp_path, {"seed": 0})  # what is not whole does not count
    (tmp_path / "settings.json").unlink()
    (tmp_path / "checkpoints" / "checkpoint-3" / "complete").touch()
    with pytest.raises(UserError, match="unknown run"):
        lock_settings(tmp_path, {"seed": 0})


def test_unknown_recipes_are_one_line() -> None:
    from sparse_vlm.distill.recipes import get_recipe

    with pytest.raises(UserError, match="known are tiny"):
        get_recipe("tinny")


def test_numbers_of_a_recipe_change_the_student(teacher: Teacher) -> None:
    tiny = RECIPES["tiny"]
    config = changed(tiny, ["looks=1", "points=9", "dropped=1", "resolution=112"]).config(teacher.spec)
    assert [unit.ops for unit in config.units] == [("SAMPLING_M", "ATTN", "MLP")]
    assert (config.num_points, config.image_size) == (9, 112)
    assert changed(tiny, ["frozen=1"]).mapping(teacher.spec) == [(0, True), (1, False)]
    assert changed(tiny, ["dropped=1"]).mapping(teacher.spec) == [(1, True)]
    for change in ("dropped=2", "frozen=3", "dropped=-1"):
        with pytest.raises(UserError, match="the teacher has 2 blocks"):
            changed(tiny, [change]).config(teacher.spec)
    focus = dataclasses.replace(RECIPES["tiny-focus"], dropped=1)
    twins = dataclasses.replace(RECIPES["tiny-focus-twins"], dropped=1)
    starts = [SparseFormer(recipe.config(teacher.spec)).initial_roi.weight for recipe in (focus, twins)]
    assert [len(rois.unique(dim=0)) for rois in starts] == [48, 37]
    assert focus.config(teacher.spec).num_tokens == 49 and focus.mapping(teacher.spec) == [(None, False), (None, False), (1, True)]


def test_the_students_pictures_may_be_larger_than_the_teachers(teacher: Teacher, photos: Path, tmp_path: Path) -> None:
    from sparse_vlm.train.batches import CachedViews

    cache = TeacherCache(tmp_path, teacher, list(PhotoSet(photos))[:4], 1, grid_rois(49))
    cache.fill(teacher)
    small, large = (CachedViews(cache, [2], size)[0]["pixels"].float() for size in (56, 112))
    assert (small.shape, large.shape) == ((3, 56, 56), (3, 112, 112))
    assert (torch.nn.functional.avg_pool2d(large, 2) - small).abs().mean() < 12, "the same view"


def test_numbers_of_a_recipe_can_be_changed() -> None:
    recipe = changed(RECIPES["tiny"], ["lr=1e-3", "batch_size=8"])
    assert (recipe.lr, recipe.batch_size, recipe.views) == (1e-3, 8, RECIPES["tiny"].views)
    with pytest.raises(UserError, match="no number called 'summary'; it has looks, points"):
        changed(recipe, ["summary=3"])
    with pytest.raises(UserError, match="'fast' is not a number"):
        changed(recipe, ["lr=fast"])
    with pytest.raises(UserError, match="'1.5' is not a whole number"):
        changed(recipe, ["batch_size=1.5"])
