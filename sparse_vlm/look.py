"""What a tower's tokens look at: their regions and sampling points at every look, as numbers and as a picture over the photo.

Shape legend: n latent tokens, P sampling points a token. RoIs (x0, y0, x1, y1) and points (x, y) are relative to what the tower sees,
the whole photo or its centre crop, (0, 0) its top-left corner; the picture shows them over the whole photo.

Notable: a unit may look several times, and then only its points tell where its RoIs stood in between. Since points are spread around
their RoI's centre with a standard deviation of a third of its size, centre and size can be read back from them exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparse_vlm.errors import UserError, printable
from sparse_vlm.files import aside
from sparse_vlm.preprocess import Preprocessor
from sparse_vlm.tower import SparseFormer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, PAPER, MUTED = "#22262b", "#ffffff", "#6b7280"
SAMPLE = "#2dd4bf"
STILL_TO_FAR = ("#7cc7ff", "#ffe066", "#ff4d4d")
SHOWN_SIDE = 1024  # pixels of the photo behind a panel; more cannot be seen


@dataclass(frozen=True)
class Look:
    """One look: the RoIs (n, 4) from which the tokens looked, and the points (n, P, 2) that they sampled."""

    rois: Tensor
    points: Tensor


@dataclass(frozen=True)
class Gaze:
    """How the tokens went over one photo.

    Attributes:
        photo: the whole photo.
        crop: what the tower saw of it: (x0, y0, x1, y1) in the photo's pixels.
        start: RoIs before anything was looked at, (n, 4).
        looks: every look in order.
        end: RoIs after the last unit, (n, 4).
    """

    photo: Image.Image
    crop: tuple[float, float, float, float]
    start: Tensor
    looks: tuple[Look, ...]
    end: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Plain data for json; RoIs are relative to the crop."""
        steps = [("start", self.start), *((f"look {i}", look.rois) for i, look in enumerate(self.looks, 1)), ("end", self.end)]
        return {
            "size": list(self.photo.size),
            "crop": [round(number, 2) for number in self.crop],
            "steps": [{"name": name, "rois": [[round(x, 5) for x in roi] for roi in rois.tolist()]} for name, rois in steps],
        }


@torch.inference_mode()
def follow(tower: SparseFormer, photo: Image.Image) -> Gaze:
    """Run a tower over a photo and keep where its tokens looked."""
    config = tower.config
    inputs = Preprocessor.of(config)(photo).to(tower.initial_roi.weight.device)
    output = tower(inputs.pixels, output_rois=True, image_sizes=inputs.image_sizes)
    looks = tuple(Look(rois_of_points(points[0]).cpu(), points[0].cpu()) for points in output.points_per_look)
    seen = (0.0, 0.0, *map(float, photo.size)) if config.fit == "whole" else crop_box(photo.size, config.image_size)
    return Gaze(photo, seen, tower.first_cells(*inputs)[0].cpu(), looks, output.rois[0].cpu())


def rois_of_points(points: Tensor) -> Tensor:
    """RoIs (..., 4) from the points (..., P, 2) that were spread in them: mean is the centre, three standard deviations the size."""
    centre, half = points.mean(dim=-2), 1.5 * points.std(dim=-2)
    return torch.cat([centre - half, centre + half], dim=-1)


def crop_box(photo_size: tuple[int, int], side: int) -> tuple[float, float, float, float]:
    """The part of a photo that `preprocess.resize_and_crop` keeps, in the photo's pixels."""
    width, height = photo_size
    short = min(width, height)
    new = max(side, int(side * width / short)), max(side, int(side * height / short))
    left, top = round((new[0] - side) / 2), round((new[1] - side) / 2)
    across, down = width / new[0], height / new[1]
    return left * across, top * down, (left + side) * across, (top + side) * down


def draw(gaze: Gaze, title: str) -> Figure:
    """A figure with a panel for the start, one for each look, and one for how far every token moved."""
    from matplotlib.figure import Figure

    panels = len(gaze.looks) + 2
    columns = min((3, 4), key=lambda columns: -panels % columns)  # whichever leaves fewer places empty
    rows = -(-panels // columns)
    width = 4.2 * columns
    panel = (width - 0.3 * (columns + 1)) / columns * gaze.photo.height / gaze.photo.width
    height = rows * (panel + 0.48) + 1.3
    figure = Figure(figsize=(width, height), dpi=110, facecolor=PAPER, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.12)
    figure.suptitle(title, fontsize=14, fontweight="bold", color=INK, parse_math=False)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    sides = gaze.start[:, 2:] - gaze.start[:, :2]
    cover = max(1.0, float(sides.prod(dim=-1).sum()))  # regions over a place, on average
    colours = token_colours(gaze.start)

    _panel(axes[0], gaze, f"Start: {len(gaze.start)} tokens, each with its region")
    _regions(axes[0], gaze, gaze.start, colours, fill=0.45 / cover)
    for number, (look, axis) in enumerate(zip(gaze.looks, axes[1:], strict=False), 1):
        _panel(axis, gaze, f"Look {number}: {look.points.shape[1]} points a token")
        _regions(axis, gaze, look.rois, colours)
        at = _to_photo(look.points, gaze.crop)
        dots = np.repeat(colours, at.shape[1], axis=0)
        axis.scatter(*at.reshape(-1, 2).T, s=7, c=dots, linewidths=0.35, edgecolors="black", zorder=3)
    _movement(figure, axes[panels - 1], gaze)
    for axis in axes[panels:]:
        axis.set_axis_off()
    _legend(figure)
    return figure


def as_label(name: str) -> str:
    """A name as matplotlib shows it and no otherwise: a dollar begins no formula, and an underscore hides nothing from a legend."""
    shown = printable(name).replace("$", r"\$")
    return f"\N{ZERO WIDTH SPACE}{shown}" if shown.startswith("_") else shown


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure aside and rename it; the suffix decides the format.

    Raises:
        UserError: a suffix that matplotlib cannot write, or a place that cannot be written to.
    """
    path = Path(path)
    form = path.suffix.lower().lstrip(".")
    known = figure.canvas.get_supported_filetypes()
    if form not in known:
        raise UserError(f"{path}: cannot draw {path.suffix or 'without a suffix'}; use one of {', '.join(sorted(known))}")
    try:
        with aside(path) as part:
            figure.savefig(part, format=form)
    except OSError as error:
        raise UserError(f"{path}: cannot write here ({error.strerror or error})") from None


def token_colours(rois: Tensor) -> np.ndarray:
    """A colour (n, 3) for each token by where its RoI (n, 4) stands: hue goes round the picture, pale in the middle, strong outside."""
    from matplotlib.colors import hsv_to_rgb

    across, down = ((rois[:, :2] + rois[:, 2:]) / 2 - 0.5).numpy().T
    hue = (np.arctan2(down, across) / (2 * np.pi)) % 1
    saturation = np.clip(0.15 + 1.6 * np.hypot(across, down), 0, 0.8)
    return hsv_to_rgb(np.stack([hue, saturation, np.ones_like(hue)], axis=-1))


def _to_photo(points: Tensor, crop: tuple[float, float, float, float]) -> np.ndarray:
    """Points (..., 2) relative to the crop to the photo's pixels."""
    x0, y0, x1, y1 = crop
    return points.numpy() * (x1 - x0, y1 - y0) + (x0, y0)


def _panel(axis: Axes, gaze: Gaze, title: str) -> None:
    """The photo, dark where the tower does not see it."""
    from matplotlib.patches import Rectangle

    width, height = gaze.photo.size
    shown = gaze.photo.copy()
    shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    pixels = np.asarray(shown, dtype=np.float32) / 255
    scale = shown.width / width, shown.height / height
    x0, y0, x1, y1 = gaze.crop
    pixels = (pixels + pixels.mean(axis=-1, keepdims=True)) / 2  # paler, so that the tokens' colours stand out
    light = np.full((*pixels.shape[:2], 1), 0.3, dtype=np.float32)
    light[round(y0 * scale[1]) : round(y1 * scale[1]), round(x0 * scale[0]) : round(x1 * scale[0])] = 0.72
    axis.imshow(pixels * light, extent=(0, width, height, 0), interpolation="antialiased")
    axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="white", linewidth=1.6, zorder=2))
    axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axis.set_title(title, fontsize=10.5, color=INK, loc="left")
    for spine in axis.spines.values():
        spine.set_visible(False)


def _regions(axis: Axes, gaze: Gaze, rois: Tensor, colours: np.ndarray, fill: float = 0.0) -> None:
    from matplotlib.patches import Rectangle

    corners = _to_photo(rois.view(-1, 2, 2), gaze.crop)
    for (low, high), colour in zip(corners, colours, strict=True):
        axis.add_patch(Rectangle(low, *(high - low), facecolor=(*colour, fill), edgecolor=colour, linewidth=1.1, zorder=2))


def _movement(figure: Figure, axis: Axes, gaze: Gaze) -> None:
    """Arrows from where each RoI's centre was to where it is, coloured by how far that is."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    areas = [(rois[:, 2:] - rois[:, :2]).prod(dim=-1).mean() for rois in (gaze.start, gaze.end)]
    centres = [_to_photo((rois[:, :2] + rois[:, 2:]) / 2, gaze.crop) for rois in (gaze.start, gaze.end)]
    far = (((gaze.end - gaze.start)[:, :2] + (gaze.end - gaze.start)[:, 2:]) / 2).norm(dim=-1).numpy() * 100
    _panel(axis, gaze, f"End: moved by {far.mean():.1f} % on average, area times {areas[1] / areas[0]:.2f}")
    scale = ScalarMappable(Normalize(0, max(far.max(), 1.0)), cmap=LinearSegmentedColormap.from_list("movement", STILL_TO_FAR))
    colours = scale.to_rgba(far)
    _regions(axis, gaze, gaze.end, colours[:, :3])
    axis.quiver(
        *centres[0].T,
        *(centres[1] - centres[0]).T,
        color=colours,
        angles="xy",
        scale_units="xy",
        scale=1,
        width=0.007,
        headwidth=4,
        zorder=3,
    )
    axis.scatter(*centres[0].T, s=9, color="white", linewidths=0, zorder=4)
    bar = figure.colorbar(scale, cax=axis.inset_axes([0, -0.05, 1, 0.025]), orientation="horizontal")
    bar.set_label("distance from its dot at the start, % of the frame's side", fontsize=8.5, color=MUTED)
    bar.ax.tick_params(labelsize=8, colors=MUTED)
    bar.outline.set_visible(False)


def _legend(figure: Figure) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries = [
        Line2D([], [], color="#9ca3af", linewidth=1.6, label="white frame: what the tower sees"),
        Patch(facecolor="none", edgecolor=SAMPLE, linewidth=1.4, label="a token's region, in the colour of its place at the start"),
        Line2D([], [], color=SAMPLE, marker="o", markersize=4, markeredgecolor="black", linestyle="", label="a point it reads"),
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), frameon=False, fontsize=9.5, labelcolor=INK)
