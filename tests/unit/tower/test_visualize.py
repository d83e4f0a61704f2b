"""What the tokens look at: numbers read back from the points, the crop on the photo, and the image itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_tower import elastic

from sparse_vlm.cli import main
from sparse_vlm.errors import UserError
from sparse_vlm.images.preprocess import resize_and_crop
from sparse_vlm.roi import grid_rois, points_in_rois, standardize_offsets
from sparse_vlm.tower import FocusConfig, SparseFormer, SparseFormerConfig, UnitConfig
from sparse_vlm.tower.focus import MAP, SCALES
from sparse_vlm.tower.visualize import crop_box, draw, rois_of_points, save_figure, token_colours, trace_regions


@pytest.fixture(scope="module")
def tower() -> SparseFormer:
    """9 tokens that look twice with the same weights and once more, and move their RoIs a lot."""
    torch.manual_seed(0)
    config = SparseFormerConfig(
        units=(UnitConfig(64, ("SAMPLING_M", "ROI_ADJ"), repeats=2), UnitConfig(64, ("SAMPLING_M", "ATTN", "MLP"))),
        num_latent_tokens=9,
        embed_dim=16,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        image_size=64,
        conv_dim=8,
        num_points=5,
        head="avg",
        token_init="each",
    )
    tower = SparseFormer(config).eval()
    with torch.no_grad():
        tower.units()[0].roi_adjust_module[-1].weight.normal_(std=0.3)
    return tower


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (70, 140, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the real command line."""
    monkeypatch.setattr("sys.argv", ["sparse-vlm", "look", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_rois_are_read_back_from_points():
    rois = torch.tensor([[0.1, 0.2, 0.5, 0.9], [-0.3, 0.0, 1.4, 0.2]])
    offsets = torch.randn(2, 16, 2, generator=torch.Generator().manual_seed(0))
    points = points_in_rois(rois, standardize_offsets(offsets))
    torch.testing.assert_close(rois_of_points(points), rois, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(640, 480), (300, 451), (64, 64), (50, 40)])
def test_crop_box_is_what_the_tower_sees(size):
    """An image whose pixels say where they are: the crop's own corners must agree with the box."""
    width, height = size
    across = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    down = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    ramp = Image.fromarray(np.stack([across, down, down], axis=-1).astype(np.uint8))
    seen = np.asarray(resize_and_crop(ramp, 64)).astype(float)
    x0, y0, x1, y1 = crop_box(size, 64)
    tolerance = 255 * 1.5 / min(64, *size)
    assert seen[32, :, 0].min() == pytest.approx(255 * x0 / width, abs=tolerance)
    assert seen[32, :, 0].max() == pytest.approx(255 * x1 / width, abs=tolerance)
    assert seen[:, 32, 1].min() == pytest.approx(255 * y0 / height, abs=tolerance)
    assert seen[:, 32, 1].max() == pytest.approx(255 * y1 / height, abs=tolerance)


def test_follow_has_every_look(tower, photo):
    regions = trace_regions(tower, photo)
    assert [step.points.shape for step in regions.samplings] == [(9, 5, 2)] * 3
    torch.testing.assert_close(regions.start, grid_rois(9))
    torch.testing.assert_close(regions.samplings[0].rois, regions.start, atol=1e-4, rtol=0)
    torch.testing.assert_close(regions.samplings[2].rois, regions.end, atol=1e-4, rtol=0)  # the last sampling is after the last adjusting
    assert (regions.samplings[1].rois - regions.start).abs().max() > 0.01
    assert [step["name"] for step in regions.to_dict()["steps"]] == ["start", "look 1", "look 2", "look 3", "end"]


def test_colours_tell_tokens_apart():
    colours = token_colours(grid_rois(49))
    assert len({tuple(np.round(colour, 3)) for colour in colours}) == 49


def test_figure_has_a_panel_for_each_step(tower, photo, tmp_path):
    figure = draw(trace_regions(tower, photo), "a $title with_a dollar$")
    titles = [axis.get_title(loc="left") for axis in figure.axes if axis.get_title(loc="left")]
    assert len(titles) == 5 and titles[0].startswith("Start") and titles[-1].startswith("End")
    save_figure(figure, tmp_path / "look.png")
    drawn = np.asarray(Image.open(tmp_path / "look.png").convert("RGB"))
    assert drawn.shape[1] > 1000 and drawn.std() > 20
    assert [path.name for path in tmp_path.iterdir()] == ["look.png"]


def test_figure_of_another_kind_is_one_line(tower, photo, tmp_path):
    figure = draw(trace_regions(tower, photo), "title")
    with pytest.raises(UserError, match="use one of .*png"):
        save_figure(figure, tmp_path / "look.docx")
    with pytest.raises(UserError, match="cannot write here"):
        save_figure(figure, tmp_path / "nowhere" / "look.png")


def test_command(tower, photo, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tower.save_pretrained("tower")
    photo.save("photo.png")
    assert command(monkeypatch, "photo.png", "--model", "tower", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["image"] == "photo.png" and report["size"] == [140, 70] and report["crop"] == [35, 0, 105, 70]
    assert np.shape(report["steps"][-1]["rois"]) == (9, 4)
    assert not (tmp_path / "look.png").exists()
    assert command(monkeypatch, "photo.png", "--model", "tower") == 0
    assert Image.open("look.png").format == "PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jpg"], "missing.jpg: no such file"),
        (["photo.png", "--model", "no-such-tower"], "no-such-tower"),
        (["photo.png", "--model", "empty"], "empty"),
    ],
)
def test_bad_input_is_one_line(photo, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    photo.save("photo.png")
    (tmp_path / "empty").mkdir()
    assert command(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1 and message in captured.err


# ---- towers with a focus


@pytest.fixture(scope="module")
def focused() -> SparseFormer:
    """A tower of whole images that splits cells to the right, where its map is made to be high."""
    tower = elastic(focus=FocusConfig(evenness=0.0), fit="whole")

    def right(pixels: torch.Tensor, region: torch.Tensor | None = None, extent: torch.Tensor | None = None) -> torch.Tensor:
        return torch.linspace(-4, 0, MAP).expand(len(pixels), len(SCALES), MAP, MAP)

    tower.focus.forward = right
    return tower


def test_follow_has_cells_map_and_patches_of_the_whole_photo(focused, photo):
    regions = trace_regions(focused, photo)
    assert regions.crop == (0, 0, *photo.size)
    area = (regions.start[:, 2:] - regions.start[:, :2]).prod(-1)
    assert area.sum() == pytest.approx(1) and area.min() < 0.5 * area.max()
    centres = (regions.start[:, 0] + regions.start[:, 2]) / 2
    assert centres[area == area.min()].min() > 0.5, "small cells are where the map is high"
    np.testing.assert_allclose(regions.variation[0], np.exp(np.linspace(-4, 0, MAP)), rtol=1e-5)
    assert regions.patches.shape == (16, 3, 14, 14)
    # the mean of a cell's patch is that of the photo there
    pixels = np.asarray(photo, dtype=float) / 255
    x0, y0, x1, y1 = (regions.start[0].numpy() * [140, 70, 140, 70]).round().astype(int)
    assert regions.patches[0].mean().item() == pytest.approx(pixels[y0:y1, x0:x1].mean(), abs=0.03)


def test_figure_of_a_focus_has_cells_map_and_patches(focused, photo, tmp_path):
    figure = draw(trace_regions(focused, photo), "title")
    titles = [axis.get_title(loc="left") for axis in figure.axes if axis.get_title(loc="left")]
    assert titles == [
        "16 tokens, each with its cell",
        "Predicted detail",
        "The pixels of each initial token: 14 x 14",
    ]
    cells, _, patches = figure.axes[:3]
    assert len(cells.patches) == 16 and len(patches.images) == 1 + 16
    shown = np.asarray(cells.images[0].get_array())
    assert shown[:, :5].mean() < 0.7 * shown[:, -5:].mean(), "large cells are darker"
    save_figure(figure, tmp_path / "look.webp")
    assert Image.open(tmp_path / "look.webp").format == "WEBP"


def test_even_cells_are_not_darkened(photo):
    figure = draw(trace_regions(elastic(focus=FocusConfig(evenness=100.0), fit="whole"), photo), "title")
    shown = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_allclose(shown, np.asarray(photo) / 255, atol=1e-6)


def test_movement_is_shown_only_where_something_moved(photo):
    figure = draw(trace_regions(elastic(), photo), "title")  # no looks, no RoI adjusting
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["Start: 16 tokens, each with its region"]


def test_command_of_a_focus_takes_tokens(tmp_path, photo, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    elastic(focus=FocusConfig(), fit="whole").save_pretrained("tower")
    photo.save("photo.png")
    assert command(monkeypatch, "photo.png", "--model", "tower", "--tokens", "9", "--json", "--output", "look.webp") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["crop"] == [0, 0, 140, 70] and np.shape(report["steps"][0]["rois"]) == (9, 4)
    assert (tmp_path / "look.webp").is_file()
