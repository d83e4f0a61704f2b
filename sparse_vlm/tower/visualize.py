"""Token regions of a tower on a photo, as data and as a figure. With a focus: the cells, the map that placed them, and the pixels of
each initial token. Without: RoIs and sampling points at every sampling.

Shape legend: n latent tokens, P sampling points a token, M x M the predicted map, p x p pixels of a patch. RoIs (x0, y0, x1, y1) and
points (x, y) are relative to the tower's input, the whole photo or its centre crop, (0, 0) its top-left corner; the figure shows them
over the whole photo.

Notable: the RoIs between the repeats of a unit are recovered from its sampling points: points have the RoI's centre as mean and a third
of its size as standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sparse_vlm.errors import UserError, printable
from sparse_vlm.images.preprocess import Preprocessor
from sparse_vlm.roi import crop_rois, image_extent
from sparse_vlm.tower import SparseFormer, SparseFormerConfig
from sparse_vlm.utils.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

MOVED = 0.02  # of the input's side: movement is shown where some token moved at least this far
INK, PAPER, MUTED = "#22262b", "#ffffff", "#6b7280"
DIM = 0.5  # lightness of the photo in the largest cells
SAMPLE = "#2dd4bf"
STILL_TO_FAR = ("#7cc7ff", "#ffe066", "#ff4d4d")
WIDE = 2.5  # width by height of a photo, from which on panels stand below each other
SHOWN_SIDE = 1024  # pixels of the photo behind a panel; more cannot be seen


@dataclass(frozen=True)
class SamplingStep:
    """One sampling: the RoIs (n, 4) of the tokens and their sampling points (n, P, 2)."""

    rois: Tensor
    points: Tensor


@dataclass(frozen=True)
class TokenRegions:
    """The RoIs of the tokens on one photo.

    Attributes:
        photo: the whole photo.
        crop: the tower's input: (x0, y0, x1, y1) in the photo's pixels.
        start: initial RoIs, (n, 4).
        samplings: in order.
        end: RoIs after the last unit, (n, 4).
        variation: of a tower with a focus, (M, M): predicted variance of the teacher's features around each place, in windows of the two
            smaller scales; 1 is their variance over all images.
        patches: of a tower with a focus, (n, 3, p, p), 0 to 1: the pixels of each initial token.
    """

    photo: Image.Image
    crop: tuple[float, float, float, float]
    start: Tensor
    samplings: tuple[SamplingStep, ...]
    end: Tensor
    variation: Tensor | None = None
    patches: Tensor | None = None

    @property
    def moved(self) -> Tensor:
        """Distance that each RoI's centre moved, (n,), relative to the input's side."""
        return ((self.end - self.start)[:, :2] + (self.end - self.start)[:, 2:]).div(2).norm(dim=-1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for json; RoIs are relative to `crop`."""
        steps = [("start", self.start), *((f"look {i}", step.rois) for i, step in enumerate(self.samplings, 1)), ("end", self.end)]
        return {
            "size": list(self.photo.size),
            "crop": [round(number, 2) for number in self.crop],
            "steps": [{"name": name, "rois": [[round(x, 5) for x in roi] for roi in rois.tolist()]} for name, rois in steps],
        }


@torch.inference_mode()
def trace_regions(tower: SparseFormer, photo: Image.Image) -> TokenRegions:
    """Encode a photo and record the RoIs and sampling points of the tokens."""
    config = tower.config
    inputs = Preprocessor.of(config)(photo).to(tower.initial_roi.weight.device)
    start, variation, patches = tower.first_cells(*inputs), None, None
    output = tower(inputs.pixels, output_rois=True, image_sizes=inputs.image_sizes)
    if tower.focus is not None:
        extent = None if inputs.image_sizes is None else image_extent(inputs.image_sizes, inputs.pixels)
        variation = tower.focus(inputs.pixels, extent=extent)[0, -2:].mean(0).exp().cpu()
        mean, std = (torch.tensor(of, device=inputs.pixels.device).view(3, 1, 1) for of in (config.image_mean, config.image_std))
        patches = (crop_rois(inputs.pixels, start, config.glance.patch_size, extent)[0] * std + mean).clamp(0, 1).cpu()
    samplings = tuple(SamplingStep(rois_of_points(points[0]).cpu(), points[0].cpu()) for points in output.sampling_points)
    return TokenRegions(photo, seen_box(config, photo.size), start[0].cpu(), samplings, output.rois[0].cpu(), variation, patches)


def rois_of_points(points: Tensor) -> Tensor:
    """RoIs (..., 4) of sampling points (..., P, 2): the mean is the centre, three standard deviations the size."""
    centre, half = points.mean(dim=-2), 1.5 * points.std(dim=-2)
    return torch.cat([centre - half, centre + half], dim=-1)


def seen_box(config: SparseFormerConfig, photo_size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part of a photo that a tower sees, (x0, y0, x1, y1) in the photo's pixels."""
    return (0.0, 0.0, *map(float, photo_size)) if config.fit == "whole" else crop_box(photo_size, config.image_size)


def crop_box(photo_size: tuple[int, int], side: int) -> tuple[float, float, float, float]:
    """The part of a photo that `images.preprocess.resize_and_crop` keeps, in the photo's pixels."""
    width, height = photo_size
    short = min(width, height)
    new = max(side, int(side * width / short)), max(side, int(side * height / short))
    left, top = round((new[0] - side) / 2), round((new[1] - side) / 2)
    across, down = width / new[0], height / new[1]
    return left * across, top * down, (left + side) * across, (top + side) * down


def draw(regions: TokenRegions, title: str) -> Figure:
    """A figure: with a focus its cells, the map and the patches; else the initial RoIs and each sampling. The last panel shows the movement
    of tokens, where they move."""
    from matplotlib.figure import Figure

    panels: list[Callable[[Axes], None]] = []
    if regions.variation is None:
        panels += [
            partial(_start, regions=regions),
            *(partial(_sampling, regions=regions, number=number) for number in range(len(regions.samplings))),
        ]
    else:
        panels += [partial(draw_panel, regions=regions) for draw_panel in (_cells, _variation, _patches)]
    if regions.moved.max() >= MOVED:
        panels.append(partial(_movement, regions=regions))
    aspect = regions.photo.width / regions.photo.height
    columns = min((3, 4), key=lambda columns: -len(panels) % columns)  # whichever leaves fewer empty panels
    columns = min(len(panels), columns if aspect < WIDE else 1)
    rows = -(-len(panels) // columns)
    width = max(4.2 * columns, 7.0)
    panel = (width - 0.3 * (columns + 1)) / columns / aspect
    figure = Figure(
        figsize=(width, rows * (panel + 0.48) + (1.3 if regions.variation is None else 1.0)), dpi=110, facecolor=PAPER, layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.12)
    figure.suptitle(title, fontsize=14, fontweight="bold", color=INK, parse_math=False)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, draw_panel in zip(axes, panels, strict=False):
        draw_panel(axis)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    _legend(figure, regions)
    return figure


def as_label(name: str) -> str:
    """A name that matplotlib shows literally: no formulas between dollars, and no hidden labels after an underscore."""
    shown = printable(name).replace("$", r"\$")
    return f"\N{ZERO WIDTH SPACE}{shown}" if shown.startswith("_") else shown


def save_figure(figure: Figure, path: str | Path, dpi: float | None = None) -> None:
    """Write a figure atomically; the suffix decides the format.

    Args:
        dpi: the figure's own by default.

    Raises:
        UserError: a suffix that matplotlib does not support, or a path that cannot be written to.
    """
    path = Path(path)
    form = path.suffix.lower().lstrip(".")
    known = figure.canvas.get_supported_filetypes()
    if form not in known:
        raise UserError(f"{path}: cannot draw {path.suffix or 'without a suffix'}; use one of {', '.join(sorted(known))}")
    try:
        with atomic_path(path) as part:
            figure.savefig(part, format=form, dpi=dpi or figure.dpi)
    except OSError as error:
        raise UserError(f"{path}: cannot write here ({error.strerror or error})") from None


def token_colours(rois: Tensor) -> np.ndarray:
    """A colour (n, 3) for each token by the position of its RoI (n, 4): hue by angle, saturation by distance from the middle."""
    from matplotlib.colors import hsv_to_rgb

    across, down = ((rois[:, :2] + rois[:, 2:]) / 2 - 0.5).numpy().T
    hue = (np.arctan2(down, across) / (2 * np.pi)) % 1
    saturation = np.clip(0.15 + 1.6 * np.hypot(across, down), 0, 0.8)
    return hsv_to_rgb(np.stack([hue, saturation, np.ones_like(hue)], axis=-1))


def _to_photo(points: Tensor, crop: tuple[float, float, float, float]) -> np.ndarray:
    """Points (..., 2) relative to the crop to the photo's pixels."""
    x0, y0, x1, y1 = crop
    return points.numpy() * (x1 - x0, y1 - y0) + (x0, y0)


def _panel(axis: Axes, regions: TokenRegions, title: str, light: float = 0.72) -> None:
    """The photo, desaturated and darkened so that colours stand out, darkest outside of the tower's input."""
    from matplotlib.patches import Rectangle

    width, height = regions.photo.size
    pixels = _shown(regions.photo)
    scale = pixels.shape[1] / width, pixels.shape[0] / height
    x0, y0, x1, y1 = regions.crop
    pixels = (pixels + pixels.mean(axis=-1, keepdims=True)) / 2
    lights = np.full((*pixels.shape[:2], 1), 0.3, dtype=np.float32)
    lights[round(y0 * scale[1]) : round(y1 * scale[1]), round(x0 * scale[0]) : round(x1 * scale[0])] = light
    axis.imshow(pixels * lights, extent=(0, width, height, 0), interpolation="antialiased")
    if (x1 - x0) * (y1 - y0) < 0.99 * width * height:
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="white", linewidth=1.6, zorder=2))
    axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axis.set_title(title, fontsize=10.5, color=INK, loc="left")
    for spine in axis.spines.values():
        spine.set_visible(False)


def _shown(photo: Image.Image) -> np.ndarray:
    """The pixels of a photo at the resolution of a panel, (h, w, 3) float32, 0 to 1."""
    shown = photo.copy()
    shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return np.asarray(shown, dtype=np.float32) / 255


def _cells(axis: Axes, regions: TokenRegions) -> None:
    """The photo, from `DIM` in the largest cells to its own lightness in the smallest."""
    area = (regions.start[:, 2:] - regions.start[:, :2]).prod(dim=-1).log()
    spread = area.max() - area.min()
    # rows of a grid may differ by a cell; a split makes cells four times smaller
    finer = ((area.max() - area) / spread if spread > math.log(2) else torch.ones_like(area)).tolist()
    _panel(axis, regions, f"{len(regions.start)} tokens, each with its cell", light=DIM)
    photo, pixels = _shown(regions.photo), axis.images[0].get_array().copy()
    height, width = pixels.shape[:2]
    for (low, high), light in zip(_to_photo(regions.start.view(-1, 2, 2), regions.crop), finer, strict=True):
        (left, top), (right, bottom) = (np.round(corner / regions.photo.size * (width, height)).astype(int) for corner in (low, high))
        pixels[top:bottom, left:right] = photo[top:bottom, left:right] * (DIM + (1 - DIM) * light)
    axis.images[0].set_data(pixels)
    _regions(axis, regions, regions.start, token_colours(regions.start))


def _variation(axis: Axes, regions: TokenRegions) -> None:
    """The predicted map in colours over the photo, with a colour bar."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    _panel(axis, regions, "Predicted detail", light=DIM)
    x0, y0, x1, y1 = regions.crop
    seen = _shown(regions.photo.crop(tuple(round(side) for side in regions.crop))).mean(-1)
    fine = F.interpolate(100 * regions.variation[None, None], size=seen.shape, mode="bicubic")[0, 0].clamp(min=0).numpy()
    scale = ScalarMappable(Normalize(0, fine.max()), cmap=colormaps["inferno"])
    light = 0.35 + 0.65 * seen[..., None]
    axis.imshow(scale.to_rgba(fine)[..., :3] * light, extent=(x0, x1, y1, y0), zorder=1)
    axis.set(xlim=(0, regions.photo.width), ylim=(regions.photo.height, 0))
    _bar(axis, scale, "predicted variance of the teacher's features, % of that of all images")


def _patches(axis: Axes, regions: TokenRegions) -> None:
    """Each cell at the resolution to which it is scaled."""
    side = regions.patches.shape[-1]
    _panel(axis, regions, f"The pixels of each initial token: {side} x {side}")
    for (low, high), patch in zip(_to_photo(regions.start.view(-1, 2, 2), regions.crop), regions.patches, strict=True):
        pixels = patch.permute(1, 2, 0).numpy()
        axis.imshow(pixels, extent=(low[0], high[0], high[1], low[1]), interpolation="nearest", zorder=2)
    width, height = regions.photo.size
    axis.set(xlim=(0, width), ylim=(height, 0))


def _start(axis: Axes, regions: TokenRegions) -> None:
    sides = regions.start[:, 2:] - regions.start[:, :2]
    cover = max(1.0, float(sides.prod(dim=-1).sum()))  # mean number of regions over a pixel
    _panel(axis, regions, f"Start: {len(regions.start)} tokens, each with its region")
    _regions(axis, regions, regions.start, token_colours(regions.start), fill=0.45 / cover)


def _sampling(axis: Axes, regions: TokenRegions, number: int) -> None:
    step, colours = regions.samplings[number], token_colours(regions.start)
    _panel(axis, regions, f"Sampling {number + 1}: {step.points.shape[1]} points a token")
    _regions(axis, regions, step.rois, colours)
    at = _to_photo(step.points, regions.crop)
    dots = np.repeat(colours, at.shape[1], axis=0)
    axis.scatter(*at.reshape(-1, 2).T, s=7, c=dots, linewidths=0.35, edgecolors="black", zorder=3)


def _regions(axis: Axes, regions: TokenRegions, rois: Tensor, colours: np.ndarray, fill: float = 0.0) -> None:
    from matplotlib.patches import Rectangle

    corners = _to_photo(rois.view(-1, 2, 2), regions.crop)
    for (low, high), colour in zip(corners, colours, strict=True):
        axis.add_patch(Rectangle(low, *(high - low), facecolor=(*colour, fill), edgecolor=colour, linewidth=1.1, zorder=2))


def _movement(axis: Axes, regions: TokenRegions) -> None:
    """Arrows from the initial to the final centre of each RoI, coloured by length."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    areas = [(rois[:, 2:] - rois[:, :2]).prod(dim=-1).mean() for rois in (regions.start, regions.end)]
    centres = [_to_photo((rois[:, :2] + rois[:, 2:]) / 2, regions.crop) for rois in (regions.start, regions.end)]
    far = 100 * regions.moved.numpy()
    _panel(axis, regions, f"End: moved by {far.mean():.1f} % on average, area times {areas[1] / areas[0]:.2f}")
    scale = ScalarMappable(Normalize(0, far.max()), cmap=LinearSegmentedColormap.from_list("movement", STILL_TO_FAR))
    colours = scale.to_rgba(far)
    _regions(axis, regions, regions.end, colours[:, :3])
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
    _bar(axis, scale, "distance from the initial centre (dot), % of the input's side")


def _bar(axis: Axes, scale: ScalarMappable, label: str) -> None:
    """A colour bar below a panel."""
    bar = axis.figure.colorbar(scale, cax=axis.inset_axes([0, -0.05, 1, 0.025]), orientation="horizontal")
    axis.set_xlabel(label, fontsize=8.5, color=MUTED, labelpad=30)  # on the panel, so that the layout leaves room
    bar.ax.tick_params(labelsize=8, colors=MUTED)
    bar.outline.set_visible(False)


def _legend(figure: Figure, regions: TokenRegions) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries = [
        Line2D([], [], color="#9ca3af", linewidth=1.6, label="white frame: the tower's input"),
        Patch(facecolor="none", edgecolor=SAMPLE, linewidth=1.4, label="a token's region, coloured by its initial place"),
        Line2D([], [], color=SAMPLE, marker="o", markersize=4, markeredgecolor="black", linestyle="", label="a sampling point"),
    ]
    if regions.variation is not None:
        return  # titles and the bar suffice
    figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), frameon=False, fontsize=9.5, labelcolor=INK)
