"""The kernels against float64, through Triton's interpreter: as torch operators and in whole towers.

Run by `test_kernels.py` in a process of its own, because the interpreter has to be chosen before triton is imported.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from sparse_vlm import SparseFormer, SparseFormerConfig, kernels
from sparse_vlm.tower import UnitConfig
from sparse_vlm.tower.layers import AdaptiveMixing

# B, n, P, C, O, g, H, W, betas, padding: more than one block of channels, of out points and of tokens; nothing a power of two
BOOTSTRAPPED = (2, 9, 5, 36, 34, 20, 5, 7, False, "border")
V1 = (1, 3, 18, 20, 18, 40, 6, 5, True, "zeros")
NAMES = ("map", "points", "hidden", "weight", "bias", "m_beta", "s_beta")


def inputs(batch, n, points, channels, out_points, inner, height, width, betas, padding, dtype=torch.float32) -> dict[str, Tensor | None]:
    """Arguments of `kernels.sample_and_mix` that the dtype represents exactly, with some points beyond the map."""
    torch.manual_seed(0)
    generated = channels**2 + points * out_points
    made = [
        torch.randn(batch, channels, height, width),
        torch.rand(batch, n, points, 2) * 1.4 - 0.2,
        torch.randn(batch, n, inner),
        torch.randn(generated, inner) * (0.3 / inner**0.5),
        torch.randn(generated) * 0.1,
        *((torch.randn(channels), torch.randn(out_points)) if betas else (None, None)),
    ]
    return {
        name: None if value is None else value.to(torch.float32 if name == "points" else dtype)
        for name, value in zip(NAMES, made, strict=True)
    }


def reference(given: dict[str, Tensor | None], out_points: int, padding: str) -> Tensor:
    """Sampling and mixing in the dtype of the inputs, as the tower computes it without kernels."""
    feature_map, points, hidden, weight, bias, m_beta, s_beta = given.values()
    sampled = F.grid_sample(feature_map, points * 2 - 1, padding_mode=padding, align_corners=False).permute(0, 2, 3, 1)
    generated = F.linear(hidden, weight, bias)
    channels, count = feature_map.shape[1], points.shape[2]
    x = sampled @ generated[..., : channels**2].unflatten(-1, (channels, channels))
    x = x if m_beta is None else F.gelu(x + m_beta)
    x = generated[..., channels**2 :].unflatten(-1, (out_points, count)) @ x
    return F.gelu(x if s_beta is None else x + s_beta[:, None]).flatten(-2)


@pytest.mark.parametrize(
    ("shape", "dtype", "bound"),
    [(BOOTSTRAPPED, torch.float32, 2e-6), (V1, torch.float32, 2e-6), (BOOTSTRAPPED, torch.bfloat16, 3e-2), (V1, torch.bfloat16, 3e-2)],
    ids=["bootstrapped", "v1", "bootstrapped-bfloat16", "v1-bfloat16"],
)
def test_sampling_and_mixing_are_those_of_float64(shape, dtype, bound):
    """In bfloat16 within what the interpreter's rounding towards zero leaves of three products in a row; a GPU rounds to the nearest."""
    given = inputs(*shape, dtype=dtype)
    exact = reference({name: None if x is None else x.double() for name, x in given.items()}, shape[4], shape[9])
    mixed = kernels.sample_and_mix(*given.values(), shape[4], shape[9])
    assert mixed.dtype == dtype
    assert (mixed.double() - exact).norm() <= bound * exact.norm()


@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_sampling_by_itself_and_its_gradients_are_those_of_float64(padding, dtype, bound):
    given = inputs(2, 5, 7, 70, 4, 8, 5, 6, False, padding)
    wanted = given["map"].double().requires_grad_(), given["points"].double().requires_grad_()
    found = given["map"].clone().requires_grad_(), given["points"].clone().requires_grad_()
    exact = F.grid_sample(wanted[0], wanted[1] * 2 - 1, padding_mode=padding, align_corners=False).permute(0, 2, 3, 1)
    with kernels.using("kernels"):
        made = kernels.sample(*found, padding, dtype)
    assert made.shape == exact.shape and made.dtype == dtype
    grad = torch.randn(made.shape).bfloat16()
    pairs = [
        (made, exact),
        *zip(torch.autograd.grad(made, found, grad.to(dtype)), torch.autograd.grad(exact, wanted, grad.double()), strict=True),
    ]
    for ours, theirs in pairs:
        assert (ours.double() - theirs).norm() <= bound * theirs.norm()
    assert kernels.sample(*found, padding, dtype) is None, "not asked for"


def test_sampling_alone_keeps_torchs_rules():
    given = inputs(1, 2, 3, 4, 3, 5, 3, 4, False, "border")
    with kernels.using("kernels"):
        kernels.sample(given["map"], given["points"], "border", torch.float32)  # registers the operators
    cells = given["map"].permute(0, 2, 3, 1).contiguous()
    opcheck(torch.ops.sparse_vlm.sample.default, (cells.requires_grad_(), given["points"].requires_grad_(), True, torch.float32))


@pytest.mark.parametrize(("height", "width", "channels"), [(24, 24, 12), (19, 30, 40)])
def test_the_early_convolution_is_that_of_float64(height, width, channels):
    torch.manual_seed(0)
    pixels, weight, bias = (torch.randn(size).bfloat16() for size in ((2, 3, height, width), (channels, 3, 7, 7), (channels,)))
    wanted = F.conv2d(pixels.double(), weight.double(), bias.double(), stride=2, padding=3)
    with kernels.using("kernels"):
        found = kernels.convolve(pixels, weight, bias)
        assert found.shape == wanted.shape and found.is_contiguous(memory_format=torch.channels_last)
        assert (found.double() - wanted).norm() <= 1e-2 * wanted.norm()
        opcheck(torch.ops.sparse_vlm.early_convolution, (pixels, weight, bias))
        learning = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        grad = torch.randn(found.shape).bfloat16()
        made = torch.autograd.grad(kernels.convolve(pixels, *learning), learning, grad)
        exact = weight.double().requires_grad_(), bias.double().requires_grad_()
        theirs = torch.autograd.grad(F.conv2d(pixels.double(), *exact, stride=2, padding=3), exact, grad.double())
        assert all((one - other).norm() <= 1e-2 * other.norm() for one, other in zip(made, theirs, strict=True))
        opcheck(torch.ops.sparse_vlm.early_convolution, (pixels, *learning))
        assert kernels.convolve(pixels.clone().requires_grad_(), weight, bias) is None, "pixels have no gradients"
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(kernels.convolve(pixels.float(), weight.float(), bias.float()), found)
        assert kernels.convolve(pixels.float(), weight.float(), bias.float()) is None, "it is for bfloat16"
    assert kernels.convolve(pixels, weight, bias) is None, "not asked for"


def test_a_tower_in_bfloat16_runs_it_where_nothing_learns():
    model, pixels = tower().bfloat16(), torch.randn(2, 3, 24, 24).bfloat16()
    with torch.no_grad():
        plain = model(pixels).image_embeds.float()
        with kernels.using("kernels"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.feat_extractor.conv1, "forward", None)  # would not be callable
            found = model(pixels).image_embeds.float()
    assert F.cosine_similarity(found, plain).min() > 0.99


def sampled_with_gradients(given: dict[str, Tensor | None], padding: str) -> list[Tensor]:
    """Samples, and the gradients of the map and of the points."""
    leaves = given["map"].clone().requires_grad_(), given["points"].clone().requires_grad_()
    with kernels.using("kernels"):
        samples = kernels.sample(*leaves, padding, torch.float32)
    return [samples.detach(), *torch.autograd.grad(samples, leaves, torch.linspace(-1, 1, samples.numel()).reshape(samples.shape))]


def test_gradients_of_sampling_are_equal_to_the_last_bit_on_each_run():
    """Most points in one cell, so that its gradient is a sum of many."""
    given = inputs(2, 4, 5, 12, 6, 10, 4, 3, False, "border")
    given["points"] = 0.5 + given["points"] * 0.05
    for first, second in zip(sampled_with_gradients(given, "border"), sampled_with_gradients(given, "border"), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_points_that_are_no_numbers_or_far_away_read_nothing_out_of_bounds(padding):
    given = inputs(1, 2, 4, 8, 8, 8, 3, 3, False, padding)
    given["points"] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30]).expand(1, 2, 2, 4).mT.contiguous()
    mixed, (samples, of_map, of_points) = kernels.sample_and_mix(*given.values(), 8, padding), sampled_with_gradients(given, padding)
    assert all(each.isfinite().all() for each in (mixed, samples, of_map, of_points))
    assert not of_points.any()
    assert bool(of_map.any()) == (padding == "border")


def test_the_operators_keep_torchs_rules():
    given = inputs(1, 2, 3, 4, 3, 5, 3, 4, True, "border")
    assert kernels.sample_and_mix(*given.values(), 3, "border").shape == (1, 2, 12)  # registers the operators
    cells = given.pop("map").permute(0, 2, 3, 1).contiguous()
    arguments, ops = [cells, *given.values()], torch.ops.sparse_vlm
    opcheck(ops.sample_and_mix.default, (*arguments, 3, True), test_utils=("test_schema", "test_faketensor"))
    grad = torch.randn(1, 2, 3, 4)
    for needed in (False, True):
        opcheck(ops.sampling_backward.default, (grad, *arguments[:2], True, needed, True), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("trained", ["parameter_generator.1.weight", "parameter_generator.2.bias"])
def test_parameters_of_mixing_that_are_trained_alone_get_their_gradients(trained):
    """The kernel has none: map, points and tokens need no gradient here, and torch must mix all the same."""
    model = tower(units=(UnitConfig(32, ("SAMPLING_M", "ATTN")),)).requires_grad_(False)
    model.layers[0].adaptive_mixing.get_parameter(trained).requires_grad_()
    plain, mixed = passed(model, "plain"), passed(model, "kernels")
    assert plain[1].any() and (mixed[1] - plain[1]).norm() <= 1e-4 * plain[1].norm()


def tower(**changes: object) -> SparseFormer:
    values = {
        "units": (UnitConfig(32, ("SAMPLING_M", "ATTN", "ROI_ADJ"), repeats=2),), "num_latent_tokens": 4, "embed_dim": 8,
        "image_size": 24, "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3, "conv_dim": 12, "num_points": 5, "num_heads": 2,
        "cls_before_unit": 0, "generator_dim": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    made = SparseFormer(SparseFormerConfig(**{**values, **changes}))
    with torch.no_grad():
        for parameter in made.parameters():  # what begins at zero would hide gradients
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return made


def passed(model: SparseFormer, path: str, image_sizes: Tensor | None = None) -> list[Tensor]:
    """Embeddings and all gradients of a model."""
    torch.manual_seed(1)
    with kernels.using(path):
        embeds = model(torch.randn(2, 3, 24, 24), image_sizes=image_sizes).image_embeds
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        grads = torch.autograd.grad(embeds.float().square().sum(), trained, allow_unused=True, materialize_grads=True)
    return [embeds.detach(), *grads]


FAMILIES = {
    # as `tiny`: looks at the width of the blocks, from the first on, and a CLS token throughout
    "tiny": {},
    # as SparseFormer-B: a focusing unit of several looks, then a wider one, and the CLS token only after them
    "btsp": {
        "units": (UnitConfig(32, ("SAMPLING_M", "PE_INJECT", "ATTN", "ROI_ADJ"), repeats=2), UnitConfig(64, ("SAMPLING_M", "ATTN"))),
        "cls_before_unit": 1,
        "rois_init": "released",
    },
    "v1": {
        "num_points": 36, "mixing_bias": True, "padding": "zeros", "cls_before_unit": None, "head": "avg", "stage_embedding": False,
        "adjust_hidden": False, "generator_dim": 0.25, "clamp_coordinate_grad": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_that_is_trained_is_the_same_where_sampling_is_a_kernels(family, monkeypatch):
    model, calls, sample = tower(**FAMILIES[family]), [], kernels.sample
    plain = passed(model, "plain")
    monkeypatch.setattr("sparse_vlm.kernels.sample", lambda *given: calls.append(sample(*given)) or calls[-1])
    for value, found in zip(plain, passed(model, "kernels"), strict=True):
        assert (found - value).norm() <= 1e-4 * value.norm() + 1e-7
    assert len(calls) >= 2 and all(each is not None for each in calls)


@pytest.mark.parametrize("family", FAMILIES)
def test_inference_of_a_tower_is_the_same_by_the_kernels(family):
    model, pixels = tower(**FAMILIES[family]), torch.randn(2, 3, 24, 24)
    sizes = torch.tensor([[24, 9], [13, 20]])
    for image_sizes in (None, sizes):
        with torch.no_grad():
            plain = model(pixels, image_sizes=image_sizes).image_embeds
            with kernels.using("kernels"):
                mixed = model(pixels, image_sizes=image_sizes).image_embeds
        assert (mixed - plain).norm() <= 1e-4 * plain.norm()


@pytest.mark.parametrize("family", ["tiny", "v1"])
def test_a_tower_is_the_same_on_images_that_fill_a_part_of_their_canvas(family):
    model, sizes = tower(**FAMILIES[family]), torch.tensor([[24, 9], [13, 20]])
    filled, plain = passed(model, "plain"), passed(model, "plain", sizes)
    assert (filled[0] - plain[0]).norm() > 1e-3 * plain[0].norm()
    for one, found in zip(plain, passed(model, "kernels", sizes), strict=True):
        assert (found - one).norm() <= 1e-4 * one.norm() + 1e-7


def test_the_kernels_are_what_a_tower_runs(monkeypatch):
    def refuse(*_: object) -> Tensor:
        raise AssertionError("computed without kernels")

    monkeypatch.setattr(AdaptiveMixing, "forward", refuse)
    with torch.no_grad(), kernels.using("kernels"):
        tower()(torch.zeros(1, 3, 24, 24))
    with pytest.raises(AssertionError, match="without kernels"):
        tower()(torch.zeros(1, 3, 24, 24))


def test_checkpointing_and_compiling_change_nothing():
    model = tower(units=(UnitConfig(32, ("SAMPLING_M", "ATTN")),))
    wanted = passed(model, "kernels")
    model.set_grad_checkpointing()
    for value, again in zip(wanted, passed(model, "kernels"), strict=True):
        assert torch.equal(value, again)
    model.set_grad_checkpointing(False)
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad(), kernels.using("kernels"):
        embeds = model(pixels).image_embeds
        model.compile(fullgraph=True, backend="aot_eager")
        assert torch.allclose(model(pixels).image_embeds, embeds, atol=1e-6)
    for value, again in zip(wanted, passed(model, "kernels"), strict=True):
        assert torch.allclose(value, again, atol=1e-6)


def test_under_autocast_mixing_is_bfloat16_and_gradients_have_the_dtype_of_the_parameters():
    model = tower(units=(UnitConfig(32, ("SAMPLING_M", "ATTN")),))
    seen: list[torch.dtype] = []
    model.layers[0].adaptive_mixing.out_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    exact = passed(model, "plain")
    with torch.autocast("cpu", torch.bfloat16):
        rounded = passed(model, "kernels")
    assert seen == [torch.float32, torch.bfloat16]
    for value, found in zip(exact[1:], rounded[1:], strict=True):
        assert found.dtype == value.dtype
        assert (found - value).norm() <= 0.1 * value.norm() + 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float16}, "float16"),
        ({"points": 65}, "65"),
        ({"tokens": 0}, "points"),
    ],
)
def test_unsupported_inputs_are_left_to_torch_or_an_error(change, message):
    points = torch.zeros(1, change.get("tokens", 2), change.get("points", 3), 2)
    tensors = torch.zeros(1, 4, 3, 3), points, torch.zeros(1, 2, 8, dtype=change.get("dtype"))
    assert not kernels.is_supported(*tensors)
    with kernels.using("kernels"), pytest.raises(RuntimeError, match=message):
        kernels.is_supported(*tensors)
