"""Looks, the map, cells, the focus, attention and layers of few rows on a CPU, of an inference tower, in C++.

Shape legend: B images, n tokens, P points a token, C channels of the map, O points after mixing, d width of a token, H x W the map.

Notable: `cpp/` is compiled by the machine's own compiler when it is first wanted, in about ten seconds, and kept where torch keeps what
it compiles (`$TORCH_EXTENSIONS_DIR`), under a name that is a hash of the source, the compiler and the processor. Where that cannot be
done, torch computes the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_vlm.roi import Padding, crop_level
from sparse_vlm.utils import files

FOLDER = Path(__file__).with_name("cpp")
# no -ffast-math: linked into a library, it would make the whole process round its smallest numbers to zero
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-strict-aliasing", "-fno-math-errno",
         "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros", "-freciprocal-math")  # fmt: skip
TIMEOUT_S = 180  # of the compiler, on a busy machine
PADDING = 16  # as in vectors.h
PANEL = 32  # as in linear.h
FEW_TOKENS = 128  # that attention is faster for than torch's
MOST_TOKENS = 1025  # the same, with AVX-512 (in bfloat16 with pairs); more were not measured
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# what the functions take: addresses, longs, ints and floats; the threads come last
ARGUMENTS = {
    "linear": "aaafaaafiiiiaa",
    "attend": "aaiiiiia",
    "attention": "aaafaaaaaiiiiiaa",
    "feed": "aaafaaiaafiiiaa",
    "convolve": "aaafiiiia",
    "points": "alaaafiiiia",
    "positions": "aaaaflial",
    "adjust": "alaaiiia",
    "mix": "aaiaiaaiiiiiiiial",
    "cut": "aaaiiiiiia",
    "average": "aaiiiia",
    "predict": "aaafiiiiiiiia",
    "place": "aafiiiiia",
}
_KINDS = {"a": ctypes.c_void_p, "l": ctypes.c_long, "i": ctypes.c_int, "f": ctypes.c_float}


def usable(dtype: torch.dtype, channels: int) -> bool:
    """Whether the functions below take tokens of this dtype and a map of so many channels; compiles them when first asked."""
    return dtype in TYPES and channels % PADDING == 0 and _library() is not None


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether `Linear` is for this processor and dtype: for AVX-512, and in bfloat16 where that multiplies it and no AMX does."""
    return dtype in TYPES and _library() is not None and bool(getattr(_library(), f"multiplies_{TYPES[dtype]}")())


def attends(qkv: Tensor, heads: int) -> bool:
    """Whether `attend` takes queries, keys and values (B, N, 3 d), and is faster than torch."""
    return _attends(qkv.dtype, qkv.shape[1], qkv.shape[2] // 3 // heads)


def _attends(dtype: torch.dtype, tokens: int, size: int) -> bool:
    return tokens <= (MOST_TOKENS if multiplies(dtype) else FEW_TOKENS) and size % PADDING == 0


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled source; None where there is no compiler that takes it, or what it makes cannot be kept or loaded."""
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None or platform.system() != "Linux":
        return None
    # torch's own OpenMP first, so that both share one set of threads instead of waiting for each other's
    runtime = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    command = [compiler, *FLAGS, *map(str, [*sorted(FOLDER.glob("*.cpp")), *runtime])]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=TIMEOUT_S).stdout
        made_of = b"\0".join([*(path.read_bytes() for path in sorted(FOLDER.iterdir())), version, " ".join(command).encode(), _processor()])
        path = _folder() / f"towers-{hashlib.sha256(made_of).hexdigest()[:16]}.so"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.atomic_path(path) as part:
                subprocess.run([*command, "-o", str(part)], capture_output=True, check=True, timeout=TIMEOUT_S)
        return _declared(ctypes.CDLL(str(path)))
    return None


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, letters in ARGUMENTS.items():
        for kind in TYPES.values():
            function = getattr(library, f"{name}_{kind}", None)
            if function is None:  # for other CPUs
                continue
            function.argtypes, function.restype = [*(_KINDS[letter] for letter in letters), ctypes.c_int], None
    return library


def _folder() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions").expanduser() / "sparse_vlm"


def _processor() -> bytes:
    """What tells one processor's instructions from another's: machines may share a home."""
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    return b"\n".join(sorted({line for line in lines if line.startswith((b"model name", b"flags", b"Features", b"CPU part"))}))


class Convolution:
    """An early convolution, pooling, ReLU and norm.

    Args:
        plain: 7 x 7, stride 2, of 3 to C channels.
        eps: of the norm over C.
    """

    def __init__(self, plain: nn.Conv2d, eps: float) -> None:
        # a line of the window as numbers that lie beside each other, and one more, so that they are pairs
        weight = plain.weight.detach().permute(2, 3, 1, 0).flatten(1, 2)  # (7, 21, C)
        self.weight, self.bias, self.eps = F.pad(weight, (0, 0, 0, 1)).contiguous(), _numbers(plain.bias), eps

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, 3, h, w) to the map (B, C, ceil(ceil(h / 2) / 2), ceil(ceil(w / 2) / 2)), which lies channels last in memory.

        Raises:
            RuntimeError: another dtype than the weight's.
        """
        _same(pixels.dtype, self.weight.dtype)
        batch, _, height, width = pixels.shape
        channels = self.weight.shape[2]
        out = torch.empty(batch, -(-height // 4), -(-width // 4), channels, dtype=pixels.dtype)
        given = pixels.contiguous(), self.weight, self.bias, self.eps
        _call("convolve", pixels.dtype, *given, batch, height, width, channels, out)
        return out.permute(0, 3, 1, 2)


class Focus:
    """Where tokens begin, of `plain.stem` to `plain.head` as `sparse_vlm.tower.focus.Focus` has them, and the cells.

    Args:
        plain: its channels are multiples of 16 (see `takes`).
    """

    def __init__(self, plain: nn.Module) -> None:
        layers = [*plain.stem, *plain.body, plain.coarse]
        self.size, self.eps, self.channels = plain.config.size, plain.norm.eps, plain.config.channels
        # each line of a window as numbers that lie beside each other
        self.weight = torch.cat([_numbers(layer.weight.permute(2, 3, 1, 0)).flatten() for layer in layers])
        parts = [
            *(layer.bias for layer in plain.stem), plain.norm.weight, plain.norm.bias, *(layer.bias for layer in plain.body),
            plain.context.bias, plain.context.weight.mT, plain.coarse.bias, plain.head.weight, plain.head.bias,
        ]  # fmt: skip
        self.numbers, self.scales = torch.cat([_numbers(part).flatten() for part in parts]), len(plain.head.bias)

    @staticmethod
    def takes(plain: nn.Module) -> bool:
        """Whether its shapes are those of the functions."""
        return all(channels % PADDING == 0 for channels in plain.config.channels)

    def predict(self, pixels: Tensor, boxes: Tensor, extent: Tensor | None, side: int) -> Tensor:
        """Images (B, 3, H, W), and boxes (B, 1, 4) in them, to maps (B, S, side, side) float32."""
        thumbnails = cut(pixels, boxes, self.size, extent).float()
        out = torch.empty(len(pixels), self.scales, side, side)
        given = thumbnails, self.weight, self.numbers, self.eps
        _call("predict", torch.float32, *given, len(pixels), self.size, *self.channels, side, self.scales, out)
        return out


def place(maps: Tensor, aspects: Tensor, num_tokens: int, coarse: int, evenness: float) -> Tensor:
    """As `Focus.place`: maps (B, S, M, M) and aspects (B,) to (B, n, 4), of a grid of `coarse` cells that is split."""
    batch, scales, side = maps.shape[:3]
    out = torch.empty(batch, num_tokens, 4)
    _call("place", torch.float32, _numbers(maps), _numbers(aspects), evenness, batch, num_tokens, coarse, side, scales, out)
    return out


class Linear:
    """A linear layer, best at few rows.

    Args:
        weight, bias: (outer, inner) and (outer), which are left as they are; inner is even.
        activation: a key of `ACTIVATIONS`.
        norm: of the input, if it is to be normalised before.
    """

    ACTIVATIONS: ClassVar[dict[str | None, int]] = {None: 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str | None = None, norm: nn.LayerNorm | None = None) -> None:
        self.dtype, self.outer, self.inner = weight.dtype, *weight.shape
        panels = -(-self.outer // PANEL)
        padded = F.pad(weight.detach(), (0, 0, 0, panels * PANEL - self.outer))
        together = 2 if weight.dtype == torch.bfloat16 else 1  # numbers that are multiplied at once
        self.weight = padded.view(panels, PANEL, self.inner // together, together).transpose(1, 2).contiguous()
        self.bias = torch.zeros(panels * PANEL)
        if bias is not None:
            self.bias[: self.outer] = bias.detach().float()
        self.activation = self.ACTIVATIONS[activation]
        self.norm = (None, None, 0.0) if norm is None else _affine(norm)

    def __call__(self, x: Tensor, onto: Tensor | None = None, factor: float = 1.0) -> Tensor:
        """(..., inner) to (..., outer), times `factor` and added onto that where it is given.

        Raises:
            RuntimeError: another dtype than the weight's.
        """
        _same(x.dtype, self.dtype)
        out = torch.empty(*x.shape[:-1], self.outer, dtype=x.dtype)
        x, rows = x.contiguous(), x.numel() // self.inner
        if onto is not None:
            _same(onto.dtype, self.dtype)
            onto = onto.expand_as(out).contiguous()
        room = None if self.norm[0] is None else torch.empty_like(x)
        layer = self.weight, self.bias, onto, factor, self.activation
        _call("linear", x.dtype, x, *self.norm, *layer, rows, self.inner, self.outer, room, out)
        return out


class Points:
    """Where tokens look, as `Unit.points`.

    Args:
        norm: of tokens (d); its affine part is folded into the layer.
        weight, bias: (2 P, d) and (2 P,).
    """

    def __init__(self, norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> None:
        self.count, self.eps = len(bias) // 2, norm.eps
        rows = -(-len(bias) // PADDING) * PADDING
        self.weight = torch.zeros(weight.shape[1], rows)
        self.bias = torch.zeros(rows)
        self.weight[:, : len(bias)] = (weight.float() * norm.weight.float()).T
        self.bias[: len(bias)] = bias.float() + weight.float() @ norm.bias.float()

    def __call__(self, latents: Tensor, rois: Tensor) -> Tensor:
        """Latents (B, n, d) and RoIs (B or 1, n, 4) to points (B, n, P, 2)."""
        batch, n, width = latents.shape
        out = torch.empty(batch, n, self.count, 2)
        latents, picture = _rows(latents)
        rois = _numbers(rois.expand(batch, n, 4))
        _call("points", latents.dtype, latents, picture, rois, self.weight, self.bias, self.eps, batch, n, width, self.count, out)
        return out


class Positions:
    """What RoIs say of themselves, normalised.

    Args:
        norm: of positions (d).
        frequencies: (d / 4), as `encode_rois` has them.
    """

    def __init__(self, norm: nn.LayerNorm, frequencies: Tensor) -> None:
        self.gain, self.shift, self.eps, self.frequencies = _numbers(norm.weight), _numbers(norm.bias), norm.eps, frequencies

    def __call__(self, rois: Tensor, out: Tensor) -> None:
        """(B, n, 4) into the last d numbers of each row of `out` (B, n, at least d), which lies whole in memory."""
        batch, n, apart = out.shape
        width = len(self.gain)
        given = _numbers(rois.expand(batch, n, 4)), self.frequencies, self.gain, self.shift, self.eps, batch * n, width
        _call("positions", out.dtype, *given, out[..., -width:], apart)


class _Half:
    """Half of a transformer's block: tokens (B, N, d), and what becomes of their norm, as one call.

    Args:
        norm: of tokens, of any dtype.
        first, last: linear layers, the last one's output as wide as the first one's input.

    Raises:
        RuntimeError: when called with another dtype than the layers'.
    """

    def __init__(self, norm: nn.LayerNorm, first: Linear, last: Linear) -> None:
        self.norm, self.first, self.last = _affine(norm), first, last

    def _compute(self, name: str, x: Tensor, room: int, *given: Tensor | float) -> Tensor:
        """A function of x (B, N, d), into a new one; `room` numbers a token are needed on the way."""
        _same(x.dtype, self.first.dtype)
        x = x.contiguous()
        out, between = torch.empty_like(x), torch.empty(x.numel() // x.shape[-1] * room, dtype=x.dtype)
        _call(name, x.dtype, x, *self.norm, *given, between, out)
        return out


class Attention(_Half):
    """Attention, its norm, and what it adds onto, of a layer that makes queries, which are scaled, keys and values, and another.

    Args:
        heads: each a multiple of 16 wide.
    """

    def __init__(self, norm: nn.LayerNorm, qkv: Linear, proj: Linear, heads: int) -> None:
        super().__init__(norm, qkv, proj)
        self.heads, self.size = heads, proj.inner // heads

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Tokens (B, N, d) to the same, with what they attend to; `bias` (B, n) is added to the scores of the last n keys."""
        layers = self.first.weight, self.first.bias, self.last.weight, self.last.bias
        return self._compute("attention", x, 4 * x.shape[2], *layers, *_of_keys(bias), *x.shape[:2], self.heads, self.size)

    def takes(self, tokens: int) -> bool:
        """Whether it is faster than torch for so many."""
        return _attends(self.first.dtype, tokens, self.size)


class Feed(_Half):
    """An MLP, its norm, and what it adds onto.

    Args:
        factor: what its output is multiplied with.
    """

    def __init__(self, norm: nn.LayerNorm, fc1: Linear, fc2: Linear, factor: float) -> None:
        super().__init__(norm, fc1, fc2)
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        """Tokens (B, N, d) to the same, with what the MLP makes of them."""
        first, last = self.first, self.last
        layers = first.weight, first.bias, first.activation, last.weight, last.bias
        return self._compute("feed", x, x.shape[2] + first.outer, *layers, self.factor, x.shape[0] * x.shape[1], first.inner, first.outer)


def cut(pixels: Tensor, rois: Tensor, size: int, extent: Tensor | None = None) -> Tensor:
    """As `crop_rois`, of images of three colours: (B, 3, H, W) and RoIs (B, n, 4) to (B, n, 3, size, size)."""
    (batch, _, height, width), n = pixels.shape, rois.shape[1]
    out = torch.empty(batch, n, 3, size, size, dtype=pixels.dtype)
    whole = torch.tensor([[width, height]], dtype=torch.float32)
    whole = (whole.expand(batch, 2) if extent is None else (whole * extent).round()).contiguous()
    levels = crop_level(height, width, size)
    _call("cut", pixels.dtype, pixels.contiguous(), _numbers(rois), whole, batch, n, height, width, size, levels, out)
    return out


def average(rois: Tensor, positions: Tensor, samples: int, dtype: torch.dtype) -> Tensor:
    """The mean of positions (G * G, d), float32, in RoIs (B, n, 4), as `roi_average_weights` weighs them: (B, n, d)."""
    (count, width), n = positions.shape, rois.shape[:-1].numel()
    out = torch.empty(*rois.shape[:-1], width, dtype=dtype)
    _call("average", dtype, _numbers(rois), positions, n, math.isqrt(count), samples, width, out)
    return out


def attend(qkv: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Queries, which are scaled, keys and values (B, N, 3 d) to what each token attends to (B, N, d).

    Args:
        heads: each a multiple of 16 wide.
        bias: (B, n), added to the scores of the last n keys.
    """
    batch, n, width = qkv.shape
    out = torch.empty(batch, n, width // 3, dtype=qkv.dtype)
    _call("attend", qkv.dtype, qkv.contiguous(), *_of_keys(bias), batch, n, heads, width // 3 // heads, out)
    return out


def adjust(hidden: Tensor, weight: Tensor, rois: Tensor) -> Tensor:
    """RoIs (B or 1, n, 4) moved and scaled by what a layer `weight` (4, d), float32, says of hidden tokens (B, n, d), as `adjust_rois`."""
    batch, n, width = hidden.shape
    out = torch.empty(batch, n, 4)
    hidden, picture = _rows(hidden)
    _call("adjust", hidden.dtype, hidden, picture, weight, _numbers(rois.expand(batch, n, 4)), batch, n, width, out)
    return out


def mix(
    feature_map: Tensor,
    points: Tensor,
    generated: Tensor,
    m_beta: Tensor | None,
    s_beta: Tensor | None,
    out_points: int,
    padding: Padding,
    beside: int = 0,
) -> Tensor:
    """Sample a map, and mix what was sampled.

    Args:
        feature_map: (B, C, H, W), read as it is where it lies channels last.
        points: (B, n, P, 2), or (1, n, P, 2) for all images.
        generated: (B, n, C * C + O * P), or (1, n, ...) for all images.
        m_beta, s_beta: (C,) and (O,), or None both.
        beside: how many numbers each row has room for besides, which are not set.

    Returns:
        (B, n, O * C + beside) in the dtype of `generated`, after the last GELU.
    """
    batch, channels, height, width = feature_map.shape
    n, count = points.shape[1:3]
    apart = out_points * channels + beside
    out = torch.empty(batch, n, apart, dtype=generated.dtype)
    cells = feature_map.permute(0, 2, 3, 1).to(generated.dtype).contiguous()
    betas = (None if beta is None else _numbers(beta) for beta in (m_beta, s_beta))
    _call(
        "mix", generated.dtype, cells, _numbers(points), len(points) == 1, generated.contiguous(), len(generated) == 1, *betas,
        batch, n, count, channels, out_points, height, width, padding == "border", out, apart,
    )  # fmt: skip
    return out


def _same(given: torch.dtype, expected: torch.dtype) -> None:
    if given != expected:
        raise RuntimeError(f"expected {expected}, not {given}")


def _numbers(given: Tensor) -> Tensor:
    return given.detach().float().contiguous()


def _of_keys(bias: Tensor | None) -> tuple[Tensor | None, int]:
    return (None, 0) if bias is None else (_numbers(bias), bias.shape[1])


def _affine(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return _numbers(norm.weight), _numbers(norm.bias), norm.eps


def _rows(tokens: Tensor) -> tuple[Tensor, int]:
    """Tokens that are whole in memory, one behind the other in each image, and how far apart those of two images lie."""
    if tokens.stride()[1:] != (tokens.shape[2], 1):
        tokens = tokens.contiguous()
    return tokens, tokens.stride(0)


def _call(name: str, dtype: torch.dtype, *given: Tensor | float | None) -> None:
    function = getattr(_library(), f"{name}_{TYPES[dtype]}")
    # `given` holds the tensors until the call is over
    function(*(each.data_ptr() if isinstance(each, Tensor) else each for each in given), torch.get_num_threads())
