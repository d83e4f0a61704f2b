"""`python tools/check_kernels.py`: the kernels verified against float64, and on a GPU timed against torch alone.

Shape legend: B images, n tokens, P sampling points, C channels, O points after mixing, g width of the hidden vector, H x W the map.

Notable: on a GPU it verifies the shapes of the published families, in float32 and bfloat16, then times one sampling and mixing and the
whole SparseFormer-B. Times are medians of interleaved rounds. Where there is no GPU nothing is timed: --interpret verifies small
shapes through Triton's interpreter, --compile asks the compiler for registers and memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_vlm import kernels
from sparse_vlm.roi import Padding, sample_bilinear
from sparse_vlm.tower import RoIPatchConfig, SparseFormer, SparseFormerConfig, UnitConfig
from sparse_vlm.tower.cost import count_macs

# largest relative error of a result or gradient, by its norm
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


class Shape(NamedTuple):
    """One sampling and mixing."""

    batch: int
    n: int
    points: int
    channels: int
    out_points: int
    hidden: int
    side: int
    betas: bool
    padding: Padding


PUBLISHED = {
    "bootstrapped": Shape(2, 48, 16, 64, 32, 128, 56, False, "border"),
    "v1 tiny": Shape(2, 49, 36, 96, 36, 64, 56, True, "zeros"),
    "v1 base, last unit": Shape(2, 81, 36, 96, 36, 192, 56, True, "zeros"),
}
SMALL = {
    "bootstrapped": Shape(1, 4, 5, 12, 6, 20, 5, False, "border"),
    "v1": Shape(1, 3, 6, 10, 6, 18, 4, True, "zeros"),
}


def make(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> list[Tensor | None]:
    """Arguments of sampling and mixing, some points beyond the map, the same numbers on each call."""
    chance = torch.Generator().manual_seed(0)
    parameters = shape.channels**2 + shape.points * shape.out_points
    feature_map = torch.randn(shape.batch, shape.channels, shape.side, shape.side, generator=chance)
    points = torch.rand(shape.batch, shape.n, shape.points, 2, generator=chance) * 1.2 - 0.1
    others = [
        torch.randn(shape.batch, shape.n, shape.hidden, generator=chance),
        torch.randn(parameters, shape.hidden, generator=chance) * (0.3 / shape.hidden**0.5),
        torch.randn(parameters, generator=chance) * 0.1,
        *([torch.randn(size, generator=chance) for size in (shape.channels, shape.out_points)] if shape.betas else [None, None]),
    ]
    given = [feature_map.to(dtype).contiguous(memory_format=torch.channels_last), points]
    given += [None if each is None else each.to(dtype) for each in others]
    return [None if each is None else each.to(device) for each in given]


def plain_mixing(given: Sequence[Tensor | None], shape: Shape) -> Tensor:
    """Sampling and mixing by torch alone, sampled in float32 or float64 as the tower does."""
    feature_map, points, hidden, weight, bias, m_beta, s_beta = given
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    sampled = F.grid_sample(feature_map.to(exact), points.to(exact) * 2 - 1, padding_mode=shape.padding, align_corners=False)
    made = F.linear(hidden, weight, bias)
    over_channels, over_points = made.split([shape.channels**2, shape.points * shape.out_points], dim=-1)
    x = sampled.permute(0, 2, 3, 1).to(hidden.dtype) @ over_channels.unflatten(-1, (shape.channels, shape.channels))
    x = x if m_beta is None else F.gelu(x + m_beta)
    x = over_points.unflatten(-1, (shape.out_points, shape.points)) @ x
    return F.gelu(x if s_beta is None else x + s_beta.unsqueeze(-1)).flatten(-2)


def kernel_mixing(given: Sequence[Tensor | None], shape: Shape) -> Tensor:
    """Sampling and mixing by the kernels."""
    return kernels.sample_and_mix(*given, shape.out_points, shape.padding)


def gradients(sample: Callable[..., Tensor], given: Sequence[Tensor], shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """Samples, and the gradients of the map and of the points."""
    leaves = [each.detach().requires_grad_() for each in given]
    out = sample(*leaves, shape.padding, dtype)
    grad = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape).bfloat16().to(out.dtype)
    return {"out": out.detach(), **dict(zip(("map", "points"), torch.autograd.grad(out, leaves, grad), strict=True))}


def judged(name: str, dtype: torch.dtype, errors: dict[str, float], bound: float, same: bool) -> dict[str, Any]:
    """A row of what was verified; it passed where every error is within the bound and a second run was the same."""
    passed = same and all(error <= bound for error in errors.values())
    return {"shape": name, "dtype": str(dtype)[6:], "errors": errors, "bound": bound, "repeats": same, "passed": passed}


def compared(
    name: str, dtype: torch.dtype, exact: dict[str, Tensor], found: dict[str, Tensor], again: dict[str, Tensor], bound: float
) -> dict[str, Any]:
    """A row of what was found, and found again, beside float64."""
    errors = {key: ((found[key].cpu().double() - value).norm() / value.norm()).item() for key, value in exact.items()}
    return judged(name, dtype, errors, bound, all(torch.equal(found[key], again[key]) for key in found))


@torch.no_grad()
def verify(shapes: dict[str, Shape], device: str) -> list[dict[str, Any]]:
    """Errors against float64 on the CPU, and whether a second run is equal to the last bit, of each shape and dtype."""
    rows = []
    for name, shape in shapes.items():
        for dtype, bound in BOUNDS.items():
            exact = plain_mixing([None if x is None else x.double() for x in make(shape, dtype)], shape)
            given = make(shape, dtype, device)
            first, second = ({"out": kernel_mixing(given, shape)} for _ in range(2))
            rows.append(compared(name, dtype, {"out": exact}, first, second, bound))
    return rows


def by_kernel(feature_map: Tensor, points: Tensor, padding: Padding, dtype: torch.dtype) -> Tensor:
    """Sampling by itself, by the kernel."""
    with kernels.using("kernels"):
        return kernels.sample(feature_map, points, padding, dtype)


def verify_sampling(shapes: dict[str, Shape], device: str) -> list[dict[str, Any]]:
    """Sampling by itself, and its gradients, against float64 on the CPU; rows as of `verify`."""

    def exactly(feature_map: Tensor, points: Tensor, padding: Padding, dtype: torch.dtype) -> Tensor:
        return F.grid_sample(feature_map, points * 2 - 1, padding_mode=padding, align_corners=False).permute(0, 2, 3, 1)

    rows = []
    for name, shape in shapes.items():
        for dtype, bound in BOUNDS.items():
            given = make(shape, dtype)[:2]
            exact = gradients(exactly, [each.double() for each in given], shape, torch.float64)
            there = [each.to(device) for each in given]
            found, again = (gradients(by_kernel, there, shape, dtype) for _ in range(2))
            rows.append(compared(f"sampling, {name}", dtype, exact, found, again, bound))
    return rows


def verify_convolution(device: str, batch: int = 2, side: int = 224, channels: int = 64) -> list[dict[str, Any]]:
    """The early convolution against float64 on the CPU; a row as of `verify`."""
    chance, dtype = torch.Generator().manual_seed(0), torch.bfloat16
    sizes = (batch, 3, side, side), (channels, 3, 7, 7), (channels,)
    given = [torch.randn(size, generator=chance).to(dtype) for size in sizes]
    exact = F.conv2d(*(each.double() for each in given), stride=2, padding=3)
    with torch.no_grad(), kernels.using("kernels"):
        found, again = (kernels.convolve(*(each.to(device) for each in given)) for _ in range(2))
    error, same = ((found.cpu().double() - exact).norm() / exact.norm()).item(), torch.equal(found, again)
    return [judged("early convolution", dtype, {"out": error}, BOUNDS[dtype], same)]


def captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """A step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def time_interleaved(ways: dict[str, Callable[[], Any]], rounds: int = 11, window: float = 0.02) -> dict[str, float]:
    """Median milliseconds of each way, in rounds of `window` seconds each in turn, after a warm-up."""

    def timed(way: Callable[[], Any], count: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            way()
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / count * 1e3

    counts = {name: max(1, round(window * 1e3 / max(1e-3, min(timed(way, 3) for _ in range(3))))) for name, way in ways.items()}
    seen: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seen[name].append(timed(way, counts[name]))
    return {name: statistics.median(values) for name, values in seen.items()}


def row(what: str, batch: int, times: dict[str, float], **more: Any) -> dict[str, Any]:
    """Times of several ways, and those by the kernels relative to those by torch alone."""
    return {"what": what, "batch": batch, "ms": times, "ratio": times["kernels"] / times["plain"], **more}


@torch.no_grad()
def time_mixing() -> list[dict[str, Any]]:
    """One sampling and mixing of each family in bfloat16, forward."""
    rows = []
    for name, batch in itertools.product(("bootstrapped", "v1 tiny"), (1, 32, 256)):
        torch._dynamo.reset()  # the number of times that one function is compiled is limited
        compiled = torch.compile(plain_mixing, dynamic=False)
        shape = PUBLISHED[name]._replace(batch=batch)
        given = make(shape, torch.bfloat16, "cuda")
        ways = {"plain": lambda g=given, s=shape, mix=compiled: mix(g, s), "kernels": lambda g=given, s=shape: kernel_mixing(g, s)}
        rows.append(row(f"sampling and mixing, {name}", batch, time_interleaved({key: captured(way) for key, way in ways.items()})))
    return rows


def time_sampling() -> list[dict[str, Any]]:
    """Sampling by itself with its gradients, of a map in float32 as it is under autocast, to bfloat16."""

    def plainly(feature_map: Tensor, points: Tensor, padding: Padding, dtype: torch.dtype) -> Tensor:
        return sample_bilinear(feature_map, points, padding).to(dtype)

    rows = []
    for name, batch in itertools.product(("bootstrapped", "v1 tiny"), (32, 256, 1024)):
        shape = PUBLISHED[name]._replace(batch=batch)
        given = make(shape, torch.float32, "cuda")[:2]
        ways = {
            key: lambda way=way, given=given, shape=shape: gradients(way, given, shape, torch.bfloat16)
            for key, way in {"plain": plainly, "kernels": by_kernel}.items()
        }
        rows.append(row(f"sampling, {name}, with gradients", batch, time_interleaved(ways)))
    return rows


def time_convolutions() -> list[dict[str, Any]]:
    """The early convolution of 64 channels in bfloat16, captured, by torch for pixels channels first and channels last."""
    rows, sizes = [], ((64, 3, 7, 7), (64,))
    weight, bias = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in sizes)
    for batch in (1, 256):
        pixels = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
        last = pixels.contiguous(memory_format=torch.channels_last)
        ways = {
            "plain": lambda pixels=last: F.conv2d(pixels, weight, bias, stride=2, padding=3),
            "channels first": lambda pixels=pixels: F.conv2d(pixels, weight, bias, stride=2, padding=3),
            "kernels": lambda pixels=pixels: kernels.convolve(pixels, weight, bias),
        }
        with torch.no_grad(), kernels.using("kernels"):
            rows.append(row("early convolution", batch, time_interleaved({name: captured(way) for name, way in ways.items()})))
    return rows


def time_towers() -> list[dict[str, Any]]:
    """SparseFormer-B in bfloat16, compiled, and the blocks of a ViT-B/32 in turn with it; each also as a captured graph.

    The share of the peak is that of the captured graphs.
    """
    base = SparseFormerConfig.named("sparseformer_btsp_openai_clip_base")
    blocks = SparseFormerConfig(
        units=(UnitConfig(768, ("ATTN", "MLP"), activation="quick_gelu"),) * 12, num_latent_tokens=49, embed_dim=512,
        image_mean=base.image_mean, image_std=base.image_std, cls_before_unit=0, token_init="glance", glance=RoIPatchConfig(32, 7),
    )  # fmt: skip
    sparse, vit = (SparseFormer(config).eval().to("cuda", torch.bfloat16) for config in (base, blocks))
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    peak = 2 * 8192**3 / time_interleaved({"peak": lambda: square @ square})["peak"] * 1e3
    # each way compiles once and for its path: what `using` says is fixed in what is compiled
    models = {"plain": sparse, "kernels": sparse, "ViT-B/32": vit}
    compiled = {
        name: torch.compile(lambda pixels, model=model: model(pixels).image_embeds, dynamic=False) for name, model in models.items()
    }

    def run(name: str, pixels: Tensor) -> Tensor:
        with torch.no_grad(), kernels.using("kernels" if name == "kernels" else "plain"):
            return compiled[name](pixels)

    rows = []
    for batch in (1, 256):
        pixels = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
        ways = {name: lambda name=name, pixels=pixels: run(name, pixels) for name in models}
        times = time_interleaved({**ways, **{f"{name}, captured": captured(way) for name, way in ways.items()}})
        share = {
            name: 2 * count_macs(model.config).total * batch / times[f"{name}, captured"] * 1e3 / peak for name, model in models.items()
        }
        rows.append(
            row("SparseFormer-B", batch, times, images_per_second={k: batch / t * 1e3 for k, t in times.items()}, share_of_peak=share)
        )
    return rows


# what is verified, and timed where all of it passed
PARTS: dict[str, tuple[Callable[[], list[dict[str, Any]]], Callable[[], list[dict[str, Any]]]]] = {
    "mixing": (lambda: verify(PUBLISHED, "cuda"), time_mixing),
    "sampling": (lambda: verify_sampling(PUBLISHED, "cuda"), time_sampling),
    "convolution": (lambda: verify_convolution("cuda"), time_convolutions),
    "towers": (list, time_towers),
}


def report(found: dict[str, Any]) -> None:
    """Print tables."""
    for each in found.get("verified", []):
        worst = max(each["errors"], key=each["errors"].get)
        print(
            f"{each['shape']:20} {each['dtype']:9} {'passed' if each['passed'] else 'FAILED'}  largest error {each['errors'][worst]:.1e}",
            end="",
        )
        print(f" ({worst}), bound {each['bound']:.0e}; a second run is {'equal' if each['repeats'] else 'NOT equal'}")
    for each in found.get("compiled", []):
        took = f"{each['registers']:3} registers, {each['spilled_bytes']:5} bytes spilled, {each['shared_bytes']:6} of shared memory"
        print(f"{each['shape']:20} {each['dtype']:9} {each['kernel']:22} {took}")
    for each in found.get("times", []):
        ways = ", ".join(f"{name} {value:.3f} ms" for name, value in each["ms"].items())
        print(f"{each['what']:34} batch {each['batch']:3}: {ways}; kernels by plain {each['ratio']:.2f}", end="")
        print("".join(f"; {key} {each[key]}" for key in ("images_per_second", "share_of_peak") if key in each))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 where all that was verified passed, 1 where not, 2 where there is nothing to run on."""
    parser = argparse.ArgumentParser(prog="python tools/check_kernels.py", description="Verify the kernels, and time them on a GPU.")
    parser.add_argument("--interpret", action="store_true", help="verify small shapes on the CPU, through Triton's interpreter")
    parser.add_argument("--compile", metavar="CAPABILITY", type=int, help="only compile, for compute capability 80 or 90; needs no GPU")
    parser.add_argument("--only", choices=PARTS, help="one part of what a GPU verifies and times; all take some five minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    chosen = parser.parse_args(arguments)
    if chosen.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    elif chosen.compile is None and not torch.cuda.is_available():
        print("There is no CUDA GPU here, so there is nothing to time. --interpret verifies small shapes on the CPU.", file=sys.stderr)
        return 2
    found: dict[str, Any] = {"torch": torch.__version__, "triton": metadata.version("triton")}
    if chosen.interpret:
        found |= {
            "machine": f"{platform.machine()}, Triton's interpreter",
            "verified": verify(SMALL, "cpu") + verify_sampling(SMALL, "cpu") + verify_convolution("cpu", side=23, channels=12),
        }
    elif chosen.compile is not None:
        from sparse_vlm.kernels.triton.resources import compile_kernels

        found["capability"], found["compiled"] = chosen.compile, []
        for name, shape in PUBLISHED.items():
            for dtype in BOUNDS:
                made = compile_kernels(shape.channels, shape.points, shape.out_points, shape.betas, dtype, chosen.compile)
                found["compiled"] += [{"shape": name, "dtype": str(dtype)[6:], **each} for each in made]
    else:
        parts = [PARTS[chosen.only]] if chosen.only else list(PARTS.values())
        found |= {"machine": torch.cuda.get_device_name(), "verified": [each for verified, _ in parts for each in verified()]}
        if all(each["passed"] for each in found["verified"]):
            found["times"] = [each for _, timed in parts for each in timed()]
    if chosen.json:
        print(json.dumps(found, indent=1))
    else:
        report(found)
    return 0 if all(each["passed"] for each in found.get("verified", [])) else 1


if __name__ == "__main__":
    sys.exit(main())
