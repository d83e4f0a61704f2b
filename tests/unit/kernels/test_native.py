"""Looks as compiled functions: what torch computes, within rounding; and no look by them where they cannot be compiled."""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_vlm import SparseFormer, SparseFormerConfig, kernels
from sparse_vlm.kernels.cpu import library, native
from sparse_vlm.roi import (
    adjust_rois,
    encode_rois,
    encoding_frequencies,
    points_in_rois,
    sample_bilinear,
    standardize_offsets,
)
from sparse_vlm.tower import UnitConfig
from sparse_vlm.tower.compiled import CompiledEarlyConvolution, CompiledUnit
from sparse_vlm.tower.layers import EarlyConvolution

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # what a result may be off by, relative to the largest number of it
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture
def compiled() -> None:
    if not native.is_supported(torch.float32, 64):
        pytest.skip("no C++ compiler that takes our sources here")


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What is compiled is looked for anew, here and afterwards."""
    forget()
    yield
    forget()


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def skip_unless_ours(dtype: torch.dtype) -> None:
    if not native.linear_is_supported(dtype):
        pytest.skip("this processor's products are left to libraries")


def forget() -> None:
    library.load.cache_clear()
    native.linear_is_supported.cache_clear()


def norm(width: int, dtype: torch.dtype) -> nn.LayerNorm:
    layer = nn.LayerNorm(width, eps=1e-6)
    nn.init.normal_(layer.weight, mean=1.0, std=0.2)
    nn.init.normal_(layer.bias)
    return layer.to(dtype).requires_grad_(False)


def normalised(x: Tensor, by: nn.LayerNorm) -> Tensor:
    """In float64."""
    return F.layer_norm(x.double(), by.normalized_shape, by.weight.double(), by.bias.double(), by.eps)


def boxes(batch: int, n: int) -> Tensor:
    """Some of them partly outside of the image."""
    corners = torch.rand(batch, n, 2) * 1.2 - 0.2
    return torch.cat([corners, corners + torch.rand(batch, n, 2)], dim=-1)


def linear(outer: int, inner: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (torch.randn(outer, inner) / inner**0.5).to(dtype), torch.randn(outer).to(dtype)


def off_by(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return ((found.double() - wanted).abs().max() / wanted.abs().max()).item()


@dtypes
@pytest.mark.parametrize(("batch", "n", "points"), [(1, 1, 36), (3, 50, 16), (2, 6, 9)])
def test_points(compiled: None, dtype: torch.dtype, batch: int, n: int, points: int) -> None:
    torch.manual_seed(0)
    latents = torch.randn(batch, n + 1, 96).to(dtype)[:, 1:]  # behind the CLS token
    before, weight, bias, rois = norm(96, dtype), torch.randn(2 * points, 96), torch.randn(2 * points), boxes(1, n)
    offsets = normalised(latents, before) @ weight.double().T + bias.double()
    wanted = points_in_rois(rois.double().expand(batch, -1, -1), standardize_offsets(offsets.unflatten(-1, (-1, 2))))
    assert off_by(native.Points(before, weight, bias)(latents, rois), wanted) < 1e-5


def key_biases(batch: int, n: int) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """Biases of keys, as `attend` takes them, and as a mask: none, of all keys, and of all but the first."""
    yield None, None
    for count in {n, max(1, n - 1)}:
        bias = 3 * torch.randn(batch, count)
        yield bias, F.pad(bias, (n - count, 0))[:, None, None].double()


@dtypes
@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize(
    ("batch", "n", "points", "channels", "out_points", "betas"),
    [(2, 7, 16, 64, 32, False), (1, 49, 36, 96, 36, True), (3, 5, 9, 16, 5, True)],
)
@pytest.mark.parametrize("shared", [False, True])
def test_mixing(
    compiled: None,
    dtype: torch.dtype,
    padding: str,
    batch: int,
    n: int,
    points: int,
    channels: int,
    out_points: int,
    betas: bool,
    shared: bool,
) -> None:
    torch.manual_seed(0)
    each = 1 if shared else batch
    feature_map = torch.randn(batch, 13, 17, channels).to(dtype).permute(0, 3, 1, 2)
    where = torch.rand(each, n, points, 2) * 1.6 - 0.3
    where[0, 0, :2] = torch.tensor([[-1e30, 0.5], [0.5, 1e30]])
    generated = torch.randn(each, n, channels**2 + out_points * points).to(dtype)
    m_beta, s_beta = (torch.randn(channels).to(dtype), torch.randn(out_points).to(dtype)) if betas else (None, None)
    sampled = sample_bilinear(feature_map.float(), where.expand(batch, -1, -1, -1), padding).double()
    over_channels, over_points = generated.double().split([channels**2, out_points * points], dim=-1)
    mixed = sampled @ over_channels.unflatten(-1, (channels, channels))
    if betas:
        mixed = F.gelu(mixed + m_beta.double())
    mixed = over_points.unflatten(-1, (out_points, points)) @ mixed
    wanted = F.gelu(mixed + s_beta.double().unsqueeze(-1) if betas else mixed).flatten(-2)
    found = native.sample_and_mix(feature_map, where, generated, m_beta, s_beta, out_points, padding, padding_columns=3)
    assert found.dtype == dtype and off_by(found[..., :-3], wanted) < DTYPES[dtype]


def test_when_it_attends_by_them(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "linear_is_supported", lambda dtype: True)
    few, many, too_many = (torch.zeros(1, n, 96) for n in (128, 1025, 1026))
    assert native.attention_is_supported(few, 2) and not native.attention_is_supported(few, 4)
    assert native.attention_is_supported(many, 2) and not native.attention_is_supported(too_many, 2)
    monkeypatch.setattr(native, "linear_is_supported", lambda dtype: False)
    assert native.attention_is_supported(few, 2) and not native.attention_is_supported(many, 2)


@dtypes
def test_positions(compiled: None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    after, rois = norm(96, dtype), boxes(2, 11)
    out = torch.full((2, 11, 100), 7.0, dtype=dtype)
    native.Positions(after, encoding_frequencies(96))(rois, out)
    wanted = normalised(encode_rois(rois, 96), after)
    # sines of up to 128 turns of float32 numbers are known to four digits
    assert off_by(out[..., 4:], wanted) < max(DTYPES[dtype], 1e-4) and (out[..., :4] == 7).all()


ACTIVATED = {None: lambda x: x, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}


@dtypes
@pytest.mark.parametrize("activation", ACTIVATED)
@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 64, 32), (49, 384, 100), (73, 66, 1152)])
@pytest.mark.parametrize("threads", [1, 3])
def test_layers(compiled: None, dtype: torch.dtype, activation: str | None, rows: int, inner: int, outer: int, threads: int) -> None:
    skip_unless_ours(dtype)
    torch.manual_seed(0)
    weight, bias = torch.randn(outer, inner).to(dtype), torch.randn(outer).to(dtype)
    x, onto = torch.randn(2, rows + 1, inner).to(dtype)[:, 1:], torch.randn(2, rows, outer).to(dtype)
    x[0, 0] *= 30  # where activations are flat
    layer = native.Linear(weight, bias, activation)
    with using_threads(threads):
        found, added = layer(x), layer(x, onto, 0.5)
    wanted = ACTIVATED[activation](F.linear(x.double(), weight.double(), bias.double()))
    assert off_by(found, wanted) < DTYPES[dtype] and off_by(added, onto.double() + wanted / 2) < DTYPES[dtype]
    without = native.Linear(weight, None)(x)
    assert off_by(without, F.linear(x.double(), weight.double())) < DTYPES[dtype]


@dtypes
def test_a_layer_of_what_is_normalised(compiled: None, dtype: torch.dtype) -> None:
    skip_unless_ours(dtype)
    torch.manual_seed(0)
    x, before = torch.randn(2, 20, 66).to(dtype)[:, 1:], norm(66, dtype)
    weight, bias = linear(40, 66, dtype)
    normal = normalised(x, before)
    wanted = F.gelu(F.linear(normal, weight.double(), bias.double()))
    assert off_by(native.Linear(weight, bias, "gelu", before)(x), wanted) < DTYPES[dtype]


def test_layers_take_their_own_dtype_alone(compiled: None) -> None:
    skip_unless_ours(torch.float32)
    layer, x = native.Linear(torch.randn(16, 16), None), torch.randn(1, 1, 16)
    before = norm(16, torch.float32)
    for function in (layer, native.Attention(before, layer, layer, 1), native.Mlp(before, layer, layer, 1.0)):
        with pytest.raises(RuntimeError, match=r"expected torch.float32, not torch.bfloat16"):
            function(x.bfloat16())
    with pytest.raises(RuntimeError, match=r"expected torch.float32, not torch.bfloat16"):
        layer(x, x.bfloat16())


@dtypes
@pytest.mark.parametrize(("n", "heads", "size"), [(1, 2, 16), (49, 6, 64), (64, 3, 32), (130, 2, 80)])
def test_attention(compiled: None, dtype: torch.dtype, n: int, heads: int, size: int) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(3, n, 3 * heads * size).to(dtype)
    qkv[1, :, :4] *= 20  # one token gets nearly all of the weight
    q, k, v = qkv.double().unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    for bias, mask in key_biases(3, n):
        wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0).transpose(1, 2).flatten(-2)
        assert off_by(native.attention(qkv, heads, bias), wanted) < 5 * DTYPES[dtype]  # large scores have large roundings
    qkv[0, 0, 0] = torch.nan
    found = native.attention(qkv, heads)
    assert found[0, 0, 0].isnan() and not found[1:].isnan().any()


@dtypes
@pytest.mark.parametrize(("batch", "n", "heads", "size"), [(1, 1, 2, 16), (3, 49, 2, 64), (1, 130, 3, 32)])
def test_attention_with_its_norm(compiled: None, dtype: torch.dtype, batch: int, n: int, heads: int, size: int) -> None:
    skip_unless_ours(dtype)
    torch.manual_seed(0)
    width = heads * size
    x, before = torch.randn(batch, n + 1, width).to(dtype)[:, 1:], norm(width, torch.float32)
    qkv, proj = linear(3 * width, width, dtype), linear(width, width, dtype)
    normal = normalised(x, before)
    made = F.linear(normal, *(part.double() for part in qkv)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    attention = native.Attention(before, native.Linear(*qkv), native.Linear(*proj), heads)
    for bias, mask in key_biases(batch, n):
        attended = F.scaled_dot_product_attention(*made, attn_mask=mask, scale=1.0).transpose(1, 2).flatten(-2)
        wanted = x.double() + F.linear(attended, *(part.double() for part in proj))
        found = attention(x, bias)
        assert found.dtype == dtype and off_by(found, wanted) < 5 * DTYPES[dtype]


@dtypes
@pytest.mark.parametrize(("batch", "n", "width", "hidden"), [(1, 1, 16, 64), (3, 49, 96, 130), (2, 7, 1536, 32)])
def test_mlp_with_its_norm(compiled: None, dtype: torch.dtype, batch: int, n: int, width: int, hidden: int) -> None:
    skip_unless_ours(dtype)
    torch.manual_seed(0)
    x, before = torch.randn(batch, n + 1, width).to(dtype)[:, 1:], norm(width, dtype)
    fc1, fc2 = linear(hidden, width, dtype), linear(width, hidden, dtype)
    normal = normalised(x, before)
    wanted = x.double() + F.linear(F.silu(F.linear(normal, *(part.double() for part in fc1))), *(part.double() for part in fc2)) / 2
    found = native.Mlp(before, native.Linear(*fc1, activation="silu"), native.Linear(*fc2), 0.5)(x)
    assert found.dtype == dtype and off_by(found, wanted) < DTYPES[dtype]


@dtypes
def test_adjusting(compiled: None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight, rois = torch.randn(2, 12, 96).to(dtype)[:, 1:], torch.randn(4, 96) / 20, boxes(1, 11)
    assert off_by(native.adjust_rois(hidden, weight, rois), adjust_rois(rois.double(), hidden.double() @ weight.double().T)) < 1e-5


@dtypes
@pytest.mark.parametrize(("batch", "channels", "size"), [(2, 32, (56, 56)), (1, 48, (33, 50)), (5, 16, (1, 2)), (1, 64, (75, 9))])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_map(compiled: None, dtype: torch.dtype, batch: int, channels: int, size: tuple[int, int], threads: int) -> None:
    torch.manual_seed(0)
    plain = EarlyConvolution(channels).requires_grad_(False).to(dtype)
    exact = EarlyConvolution(channels).double().requires_grad_(False)
    exact.load_state_dict(plain.state_dict())
    ours, pixels = CompiledEarlyConvolution(plain), torch.randn(batch, 3, *size).to(dtype)
    wanted = exact(pixels.double())
    with using_threads(threads):
        found = ours(pixels)
        pixels[0, 0, -1, -1] = torch.nan
        spoilt = ours(pixels)
    assert found.dtype == dtype and off_by(found, wanted) < DTYPES[dtype]
    assert torch.equal(spoilt.isnan(), plain(pixels).isnan()) and spoilt.isnan()[0, :, -1, -1].all()
    with pytest.raises(RuntimeError, match=r"expected torch\.\w+, not torch.float16"):
        ours(pixels.half())


def tower(dtype: torch.dtype = torch.float32, channels: int = 16) -> SparseFormer:
    unit = UnitConfig(64, ("SAMPLING_M", "PE_INJECT", "ATTN", "MLP", "ROI_ADJ"))
    return SparseFormer(SparseFormerConfig((unit,), 9, 32, (0.5,) * 3, (0.5,) * 3, head="avg", conv_dim=channels)).to(dtype)


def looks_compiled(made: SparseFormer) -> bool:
    return isinstance(made.optimize_for_inference().units()[0], CompiledUnit)


def test_when_a_tower_looks_by_them(compiled: None) -> None:
    assert looks_compiled(tower()) and looks_compiled(tower(torch.bfloat16))
    assert not looks_compiled(tower(torch.float16)) and not looks_compiled(tower(channels=24))
    with kernels.using("plain"):
        assert not looks_compiled(tower())


def test_it_is_compiled_once(compiled: None, forgotten: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert native.is_supported(torch.float32, 64)
    (made,) = (tmp_path / "sparse_vlm").iterdir()
    first = made.stat().st_mtime_ns
    forget()
    assert native.is_supported(torch.float32, 64) and made.stat().st_mtime_ns == first
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-DOTHER"))
    forget()
    assert native.is_supported(torch.float32, 64) and len(list(made.parent.iterdir())) == 2


@pytest.mark.parametrize("fault", ["no compiler", "a compiler that fails", "a compiler that makes no library", "nowhere to keep it"])
def test_without_a_compiler_torch_looks(fault: str, forgotten: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "kept"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(kept))
    script = tmp_path / "c++"
    last = {"a compiler that fails": "exit 1", "a compiler that makes no library": 'echo nothing > "${@: -1}"'}.get(fault, "exit 0")
    script.write_text(f'#!/bin/bash\n[ "$1" = --version ] && echo c++ 1.0 && exit 0\n{last}\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    if fault == "nowhere to keep it":
        kept.write_text("a file")
        monkeypatch.delenv("CXX", raising=False)
    else:
        monkeypatch.setenv("CXX", str(tmp_path / "missing" if fault == "no compiler" else script))
    assert not native.is_supported(torch.float32, 64)
    assert not looks_compiled(tower())
    if kept.is_dir():
        assert not list(kept.rglob("*.tmp"))


def test_small_numbers_stay_as_it_is_loaded(compiled: None) -> None:
    """Flags for faster arithmetic can make a whole process round its smallest numbers to zero."""
    small = "(torch.tensor(1e-40) * 1).item() > 0"
    code = f"import torch; from sparse_vlm.kernels.cpu.native import is_supported; print(is_supported(torch.float32, 64), {small})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["True", "True"]
