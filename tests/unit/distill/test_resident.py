"""Photos that a device keeps, and the views that it makes of them; views that are mixed; teacher and student compiled."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import finish
from PIL import Image
from torch import nn

pytest.importorskip("open_clip", reason="bootstrapping needs open_clip")


from sparse_vlm.distill.live import LiveTeacher, PatchLinear, replace_patch_convolutions
from sparse_vlm.distill.resident import ResidentPhotos, view_crop
from sparse_vlm.distill.views import ViewSet, mix
from sparse_vlm.errors import UserError
from sparse_vlm.images.photos import PhotoSet
from sparse_vlm.teachers import load_teacher
from sparse_vlm.train.batches import Augmentation, ResidentViews, collate
from sparse_vlm.utils.devices import compiling, free_memory

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth images, wide, high and square, and one file that is none; enough that some are held out."""
    folder = tmp_path_factory.mktemp("photos")
    chance = np.random.default_rng(0)
    for i in range(160):
        size = [(120, 80), (70, 110), (90, 90), (400, 300)][i % 4]
        coarse = Image.fromarray(chance.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:03}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def test_a_devices_views_are_those_of_pillow(photos: Path) -> None:
    views = ViewSet(PhotoSet(photos), 3, 56)
    told: list[int] = []
    kept = ResidentPhotos(views, CPU, told.append)
    assert sum(told) == len(views.photos) == 161
    broken = next(i for i, photo in enumerate(views.photos) if "broken" in photo.key)
    assert list(views.unreadable) == [broken] and "not an image" in views.unreadable[broken]
    rows = [view * 161 + index for view in range(3) for index in range(8)]
    batch = collate([ResidentViews(views, kept, rows)[i] for i in range(len(rows))])
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        "photo": (torch.int64, (24,)), "box": (torch.float32, (24, 4)), "flipped": (torch.bool, (24,)),
    }  # fmt: skip
    found = Augmentation(56, 56, kept, 0.0, seed=0)(batch, step=1)["pixels"].float()
    wanted = torch.stack([views.pixels(row) for row in rows]).float()
    apart = (found - wanted).abs().mean((1, 2, 3))
    assert apart.max() < 2.5  # of 255
    mirrored = (found.flip(-1) - wanted).abs().mean((1, 2, 3))
    assert (mirrored > 3 * apart).all(), "an image of these does not look like its mirror image"


def test_two_sizes_are_the_same_views(photos: Path) -> None:
    views = ViewSet(list(PhotoSet(photos))[:4], 2, 56)
    kept = ResidentPhotos(views, CPU)
    batch = collate([ResidentViews(views, kept, range(4, 8))[i] for i in range(4)])
    shown = Augmentation(112, 56, kept, 0.5, seed=3)(batch, step=7)
    assert shown["pixels"].shape == (4, 3, 112, 112) and shown["teacher_pixels"].shape == (4, 3, 56, 56)
    smaller = nn.functional.avg_pool2d(shown["pixels"].float(), 2)
    assert (smaller - shown["teacher_pixels"].float()).abs().mean() < 1.5, "mixed alike, too"
    again = Augmentation(112, 56, kept, 0.5, seed=3)(batch, step=7)
    assert torch.equal(again["pixels"], shown["pixels"])
    assert not torch.equal(Augmentation(112, 56, kept, 0.5, seed=3)(batch, step=8)["pixels"], shown["pixels"])


def test_view_0_is_the_centre(photos: Path) -> None:
    views = ViewSet(list(PhotoSet(photos))[:1], 1, 56)
    box, flipped = view_crop(views, (120, 80), 0)
    assert box == pytest.approx((1 / 6, 0, 5 / 6, 1)) and not flipped


def test_photos_that_do_not_fit_are_refused(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_memory(CPU) is None or free_memory(CPU) > 1 << 20
    monkeypatch.setattr("sparse_vlm.distill.resident.free_memory", lambda device: 3_000_000)
    with pytest.raises(UserError, match=r"161 decoded photos take 0.0 GB, and cpu has 0.0 GB free"):
        ResidentPhotos(ViewSet(PhotoSet(photos), 1, 56), CPU)


def test_mixed_views_lie_between_two() -> None:
    pixels = torch.stack([torch.full((3, 4, 4), value, dtype=torch.uint8) for value in (0, 100, 200, 250)])
    whole = mix(pixels, 1.0, torch.Generator().manual_seed(0))
    for i, (low, high) in enumerate([(0, 250), (0, 100), (100, 200), (200, 250)]):
        assert whole[i].unique().numel() == 1 and low < whole[i, 0, 0, 0] < high
    assert torch.equal(mix(pixels, 0.0, torch.Generator().manual_seed(0)), pixels)
    many = torch.tensor([0, 255], dtype=torch.uint8).repeat(1024).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    changed = (mix(many, 0.25, torch.Generator().manual_seed(1)) != many).any((1, 2, 3)).float().mean()
    assert 0.22 < changed < 0.28


def test_patches_are_one_matrix_product(teacher_name: str) -> None:
    teacher = load_teacher(teacher_name)
    one, other = LiveTeacher(teacher, None), LiveTeacher(teacher, None)
    replace_patch_convolutions(other._teacher)
    assert [type(module) for module in other._teacher.modules()].count(PatchLinear) == 1
    assert not any(isinstance(module, PatchLinear) for module in teacher.modules()), "the teacher itself is left as it is"
    pixels = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    for convolved, multiplied in zip(one(pixels), other(pixels), strict=True):
        assert (convolved - multiplied).norm() <= 0.02 * convolved.norm()
    padded = nn.Sequential(nn.Conv2d(3, 4, 2, stride=2, padding=1), nn.Conv2d(4, 4, 3, stride=2))
    replace_patch_convolutions(padded)
    assert all(isinstance(layer, nn.Conv2d) for layer in padded)


def test_a_student_learns_from_photos_that_the_device_keeps(teacher_name: str, photos: Path, tmp_path: Path) -> None:
    line = ["bootstrap", "--recipe", "elastic", "--threads", "1", "--teacher", teacher_name, "--data", str(photos), "--views", "320"]
    line += ["--set", "views_per_photo=0", "--set", "mixed=0.5", "--resident"]
    said = finish(*line, "--out", str(tmp_path / "one"))
    assert "decoding: 161/161 photos" in said and "left out: 1 of 161 photos" in said
    history = json.loads((tmp_path / "one" / "training.json").read_text())
    assert history["settings"]["resident"] and history["settings"]["mixed"] == 0.5
    curve = [h["eval_loss"] for h in history["history"] if "eval_loss" in h]
    assert curve[-1] < curve[0]


def test_compiled_parts_compute_the_same(teacher_name: str, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler itself is torch's: its graphs are run as they are here, at one number of tokens after the other."""
    from sparse_vlm.distill.inherit import inherit
    from sparse_vlm.distill.recipes import RECIPES
    from sparse_vlm.tower import SparseFormer
    from sparse_vlm.train.distillation import compile_parts

    def compile_eagerly(module: nn.Module) -> None:
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    teacher = load_teacher(teacher_name)
    tower = SparseFormer(RECIPES["elastic"].config(teacher.spec))
    inherit(tower, teacher, RECIPES["elastic"])
    ask, pixels = LiveTeacher(teacher, None), torch.randn(2, 3, 56, 56)
    plain = [tower(pixels, num_tokens=count).image_embeds for count in (49, 20, 9)]
    answer = ask(torch.zeros(2, 3, 56, 56, dtype=torch.uint8))
    compile_parts(tower, ask)
    assert all(unit._compiled_call_impl is not None for unit in tower.units())
    for count, wanted in zip((49, 20, 9), plain, strict=True):
        assert torch.allclose(tower(pixels, num_tokens=count).image_embeds, wanted, atol=1e-5)
    assert torch.allclose(ask(torch.zeros(2, 3, 56, 56, dtype=torch.uint8))[0], answer[0], atol=1e-2)


def test_a_compiler_that_fails_is_one_line() -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    with (
        pytest.raises(UserError, match="--compile: torch could not compile the student .*; leave --compile away"),
        compiling("the student"),
    ):
        raise InvalidCxxCompiler
    with pytest.raises(ValueError, match="own"), compiling("the student"):
        raise ValueError("an error of its own")


@pytest.mark.parametrize("options", [["--resident"], ["--set", "mixed=0.5"]])
def test_cached_answers_go_with_the_views_they_were_given_for(options: list[str], teacher_name: str, photos: Path, tmp_path: Path) -> None:
    from commands import run_command

    done = run_command("bootstrap", "--teacher", teacher_name, "--data", str(photos), "--out", str(tmp_path / "out"), *options)
    assert done.returncode == 2 and "add --set views_per_photo=0" in done.stderr
    assert not (tmp_path / "out").exists()
