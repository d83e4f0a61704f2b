"""Tasks in which detail decides, and controls that place a tower's cells otherwise."""

from __future__ import annotations

import colorsys
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_fakes import FakeEmbedder, evaluate, write_tar
from PIL import Image
from tiny_tower import elastic

from sparse_vlm.errors import UserError
from sparse_vlm.eval import placement, rendered_words, run, small_objects
from sparse_vlm.eval.embedders import tower_embedder
from sparse_vlm.eval.tasks import TASKS
from sparse_vlm.images.preprocess import Inputs, to_uint8
from sparse_vlm.teachers import Teacher, TeacherOutput
from sparse_vlm.tower import FocusConfig, SparseFormer
from sparse_vlm.tower.focus import plain_grid


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    hues = [tuple(round(255 * part) for part in colorsys.hsv_to_rgb(i / 15, 1, 1)) for i in range(15)]
    write_tar(root / small_objects.OBJECTS, [(f"hue_{i:02d}", colour, {}) for i, colour in enumerate(hues)])
    write_tar(root / small_objects.BACKGROUNDS, [(f"loud_{i}", hues[3 * i], {}) for i in range(5)])
    return root


class Brightest(FakeEmbedder):
    """Embeds the strongest colours of an image, which are those of a photo on a plain ground."""

    def __init__(self, name: str, kind: str = "tower", width: int = 4, seen: int = 32) -> None:
        super().__init__(name)
        self.kind, self.width, self.size = kind, width, seen

    def encode(self, inputs: Inputs, region: torch.Tensor | None = None) -> torch.Tensor:
        flat = inputs.pixels.flatten(2)
        strongest = (flat.amax(1) - flat.amin(1)).topk(4).indices
        colour = flat.gather(2, strongest.unsqueeze(1).expand(-1, 3, -1)).mean(2) / 255
        return torch.cat([colour, colour[:, :1] * colour[:, 1:2]], 1)[:, : self.width]


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeEmbedder]:
    made = {
        "sharp": Brightest("sharp"),
        "blind": FakeEmbedder("blind", 1.0),
        "teacher": Brightest("teacher", "teacher"),
        "local-dir:other": Brightest("local-dir:other", "teacher", 3),
        "wide": Brightest("wide", "tower", 3),
    }
    monkeypatch.setattr(run, "tower_embedder", lambda name, control, count, teacher: made[name])
    monkeypatch.setattr(run, "teacher_embedder", made.__getitem__)
    return made


def test_small_objects_are_found_by_who_sees_them(data: Path, models: dict[str, FakeEmbedder]) -> None:
    report = evaluate(["sharp", "blind", "local-dir:other"], ["small-objects"], data, teacher="teacher")
    of = {column.model: result for column, result in report.results["small-objects"].items()}
    assert list(of) == ["sharp", "blind", "local-dir:other", "teacher"], "the teacher is measured too, and a ViT of another width"
    assert list(of["sharp"].metrics) == [f"{scene.name} R@1" for scene in small_objects.SCENES]
    for name in ("sharp", "teacher"):
        assert of[name].metrics["112 px on plain R@1"].value > 0.9, name
    assert of["blind"].metrics["112 px on plain R@1"].value < 0.4
    assert of["sharp"].metrics["112 px on photos R@1"].value < of["sharp"].metrics["112 px on plain R@1"].value
    assert of["sharp"].metrics["40 px on plain R@1"].units == 15 == len(of["sharp"].predictions)
    assert set(of["sharp"].details) == {f"{scene.name} R@5" for scene in small_objects.SCENES}
    assert report.paired("small-objects", "112 px on plain R@1", run.Column("sharp"), run.Column("blind")).low > 0
    with pytest.raises(UserError, match="wide embeds into 3 dimensions, the teacher teacher into 4"):
        evaluate(["wide"], ["small-objects"], data, teacher="teacher")


def test_small_objects_are_as_many_as_the_limit(data: Path, models: dict[str, FakeEmbedder], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_objects, "CANDIDATES", 10)
    for limit, count in ((None, 10), (4, 4)):
        (result,) = evaluate([], ["small-objects"], data, teacher="teacher", limit=limit).results["small-objects"].values()
        assert len(result.predictions) == count


def test_a_composition_is_the_same_each_time_and_keeps_the_photo() -> None:
    photo = Image.new("RGB", (224, 224), (255, 0, 0))
    one, again, next_one = (np.asarray(small_objects.compose(photo, i, 40)) for i in (3, 3, 4))
    assert one.shape == (224, 224, 3) and np.array_equal(one, again) and not np.array_equal(one, next_one)
    assert (one == (255, 0, 0)).all(-1).sum() == 40 * 40
    ground = Image.new("RGB", (224, 224), (0, 0, 255))
    pasted = np.asarray(small_objects.compose(photo, 3, 40, ground))
    assert (pasted == (0, 0, 255)).all(-1).sum() == 224 * 224 - 40 * 40
    assert np.asarray(ground)[..., 0].max() == 0, "a background is not painted on"


def test_ties_count_against_the_model() -> None:
    assert small_objects.rank_of_own(np.array([[0.9, 0.9, 0.1], [0.2, 0.5, 0.1], [0.3, 0.2, 0.1]])).tolist() == [2, 1, 3]


class Reader(FakeEmbedder):
    """Embeds how much of a grey photo is written on."""

    def encode(self, inputs: Inputs, region: torch.Tensor | None = None) -> torch.Tensor:
        written = ((inputs.pixels - 128).abs() > 16).float().mean((1, 2, 3))
        return torch.stack([written, 1 - written], 1)


def test_large_letters_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    write_tar(tmp_path / "eval/flickr8k_retrieval.tar", [(f"{i:03d}", (128, 128, 128), {}) for i in range(60)])
    monkeypatch.setattr(rendered_words, "WORDS", ("I", "MW"))
    monkeypatch.setattr(rendered_words, "HEIGHTS", (1, 40))
    monkeypatch.setattr(run, "tower_embedder", lambda name, control, count, teacher: Reader(name))
    (result,) = evaluate(["reader"], ["rendered-words"], tmp_path).results["rendered-words"].values()
    assert result.metrics["letters of 40 % top-1"].value > 0.95
    assert result.metrics["letters of 1 % top-1"].value < 0.8
    assert len(result.predictions) == 120 and {row["word"] for row in result.predictions} == {"I", "MW"}


@pytest.mark.parametrize("size", [(300, 120), (120, 300)])
@pytest.mark.parametrize("height", rendered_words.HEIGHTS)
def test_words_are_as_high_as_said_and_within_the_centre(size: tuple[int, int], height: int) -> None:
    photo = Image.new("RGB", size, (128, 128, 128))
    for seed in range(4):
        written = np.asarray(rendered_words.write(photo, "HEN", height, seed)).astype(int)
        rows, columns = np.nonzero((written != 128).any(-1))
        edge = max(1, round(height * 1.2 / 10))
        assert rows.max() - rows.min() + 1 == pytest.approx(height * 1.2 + 2 * edge, abs=2.1)
        left, top = ((side - 120) // 2 for side in size)
        assert left <= columns.min() and columns.max() < left + 120 and top <= rows.min() and rows.max() < top + 120
        assert {written.min(), written.max()} == {0, 255}, "black and white"


def test_every_word_fits_at_every_height() -> None:
    for word in rendered_words.WORDS:
        font = rendered_words.dejavu(round(rendered_words.HEIGHTS[-1] * 2.24 / rendered_words.CAPITALS))
        left, _, right, _ = font.getbbox(word, stroke_width=round(rendered_words.HEIGHTS[-1] * 0.224))
        assert right - left <= 224, word


def test_words_are_equally_often_and_change_with_the_height() -> None:
    numbers = [rendered_words.word_numbers(500, height) for height in rendered_words.HEIGHTS]
    assert all(np.bincount(of).tolist() == [25] * 20 for of in numbers)
    assert not np.array_equal(numbers[0], numbers[1])


# ---- controls


class FakeTeacher(Teacher):
    """Patches that vary at the left of an image alone."""

    def __init__(self, tower: SparseFormer) -> None:
        torch.nn.Module.__init__(self)
        config = tower.config
        self.spec = dataclasses.make_dataclass("Spec", ["name", "image_size", "image_mean", "image_std"])(
            "teacher", 56, config.image_mean, config.image_std
        )
        self.asked: list[torch.Tensor] = []

    def forward(self, pixels: torch.Tensor) -> TeacherOutput:
        self.asked.append(pixels)
        patches = torch.randn(len(pixels), 16, 16, 8, generator=torch.Generator().manual_seed(1))
        patches[:, :, 8:] *= 0.01
        return TeacherOutput(torch.zeros(len(pixels), 4), patches.flatten(1, 2))


@pytest.fixture
def tower() -> SparseFormer:
    return elastic(focus=FocusConfig(evenness=0.0))


def cells(tower: SparseFormer, pixels: torch.Tensor, **more: object) -> torch.Tensor:
    with torch.no_grad():
        return tower(pixels, **more).rois


def test_control_grid_is_the_uniform_grid(tower: SparseFormer) -> None:
    pixels = torch.randn(2, 3, 56, 112)
    assert not torch.equal(cells(tower, pixels), plain_grid(16, torch.full((2,), 2.0)))
    placement.replace_focus(tower, "t", "grid", None)
    assert torch.equal(cells(tower, pixels), plain_grid(16, torch.full((2,), 2.0)))
    assert torch.equal(cells(tower, pixels, num_tokens=9), plain_grid(9, torch.full((2,), 2.0)))


def test_control_random_splits_as_often_and_the_same_way_each_time(tower: SparseFormer) -> None:
    pixels = torch.randn(8, 3, 56, 56)
    placement.replace_focus(tower, "t", "random", None)
    one, again = cells(tower, pixels, num_tokens=25), cells(tower, torch.randn(8, 3, 56, 56), num_tokens=25)
    assert torch.equal(one, again), "whatever the image is"
    assert len({tuple(of.flatten().tolist()) for of in one}) > 2, "each image has its own"
    area = (one[..., 2:] - one[..., :2]).prod(-1)
    assert torch.allclose(area.sum(-1), torch.ones(8)) and (area.amin(-1) < 0.5 * area.amax(-1)).all()


def test_control_teacher_splits_where_its_features_vary(tower: SparseFormer) -> None:
    teacher = FakeTeacher(tower)
    placement.replace_focus(tower, "t", "teacher", teacher)
    found = cells(tower, torch.randn(2, 3, 40, 80))
    centres, area = (found[..., 0] + found[..., 2]) / 2, (found[..., 2:] - found[..., :2]).prod(-1)
    assert (area[centres > 0.6].min() > 2 * area[centres < 0.4].min()).all()
    assert teacher.asked[0].shape == (2, 3, 56, 56), "the teacher is shown all of the image at its own size"
    assert not any("teacher" in name for name, _ in tower.named_modules()), "the teacher is no part of the tower"


@pytest.mark.parametrize("control", placement.PLACEMENTS)
def test_controls_hold_in_optimized_towers(control: str, tmp_path: Path) -> None:
    elastic(focus=FocusConfig(evenness=0.0), fit="whole").save_pretrained(tmp_path / "t")
    plain = SparseFormer.from_pretrained(tmp_path / "t")
    teacher = FakeTeacher(plain)
    embedder = tower_embedder(str(tmp_path / "t"), control, 9, dataclasses.make_dataclass("Holder", ["module"])(teacher))
    assert embedder.name == f"{tmp_path / 't'}, 9 tokens, {control}"
    inputs = embedder.pixels([Image.effect_noise((40, 20), 90).convert("RGB"), Image.effect_noise((20, 56), 90).convert("RGB")])
    placement.replace_focus(plain, "t", control, teacher)
    with torch.no_grad():
        expected = plain(inputs.pixels.float(), num_tokens=9, image_sizes=inputs.image_sizes).image_embeds
    found = embedder.encode(inputs)
    assert torch.allclose(found, expected, atol=0.05 * float(expected.abs().max()))


def test_a_grid_costs_no_focus(tmp_path: Path) -> None:
    elastic(focus=FocusConfig()).save_pretrained(tmp_path / "t")
    elastic().save_pretrained(tmp_path / "plain")
    own, grid, plain = (
        tower_embedder(str(tmp_path / name), control) for name, control in (("t", "none"), ("t", "grid"), ("plain", "none"))
    )
    assert (grid.macs, grid.parameters) == (plain.macs, plain.parameters) and own.macs > grid.macs


def test_controls_that_do_not_apply(tower: SparseFormer, tmp_path: Path) -> None:
    elastic().save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="plain has no focus, so grid is not a control of it"):
        tower_embedder(str(tmp_path / "plain"), "grid")
    with pytest.raises(UserError, match="name it with --teacher"):
        placement.replace_focus(tower, "t", "teacher", None)
    other = FakeTeacher(elastic(image_mean=(0.1,) * 3))
    with pytest.raises(UserError, match="t normalises images otherwise than teacher"):
        placement.replace_focus(tower, "t", "teacher", other)


def test_tasks_are_there() -> None:
    assert isinstance(TASKS["small-objects"], small_objects.SmallObjects)
    assert isinstance(TASKS["rendered-words"], rendered_words.RenderedWords)
    assert to_uint8(rendered_words.write(Image.new("RGB", (9, 9)), "OWL", 10, 0)).shape == (3, 9, 9), "tiny photos do"
