"""Registers, spilled bytes and shared memory of the kernels, as compiled for a GPU; needs no GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparse_vlm.kernels.triton import mixing, sampling
from sparse_vlm.kernels.triton.launch import GRADIENTS, SAMPLED
from sparse_vlm.kernels.triton.tiles import choose_mixing_tiles

MANY = 10_000  # tokens, enough that tiles are as large as they get
FLOATS = {"points_ptr", "grad_at_ptr"}
INTEGERS = {"order_ptr", "starts_ptr"}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def compile_kernels(channels: int, points: int, out_points: int, betas: bool, dtype: torch.dtype, capability: int) -> list[dict[str, Any]]:
    """Compile every kernel of sampling and mixing for one shape.

    Args:
        capability: compute capability times ten: 80, 90.

    Returns:
        Name, registers of a thread, spilled bytes and bytes of shared memory of each kernel.
    """
    operand = getattr(tl, "bfloat16" if dtype == torch.bfloat16 else "float32")
    tiles = choose_mixing_tiles(MANY, points, channels, out_points, cores=1)
    sizes = {"C": channels, "P": points, "O": out_points, "BORDER": True, "BETAS": betas, "OPERAND": operand, "PRECISION": "ieee"}
    blocks = {"TILE_P": tiles.points, "TILE_I": tiles.read, "TILE_C": tiles.channels, "TILE_O": tiles.out_points}
    compiled = [_compile(mixing.sample_and_mix, {**sizes, **blocks}, dtype, tiles.warps, 1, capability)]
    sizes["TILE_C"] = min(64, triton.next_power_of_2(channels))
    for kernel, tile in (
        (sampling.sample_forward, SAMPLED),
        (sampling.map_backward, GRADIENTS),
        (sampling.coordinates_backward, GRADIENTS),
    ):
        compiled.append(_compile(kernel, {**sizes, "TILE_N": tile}, dtype, 4, 3, capability))
    return compiled


def _compile(kernel: Any, constants: dict[str, Any], dtype: torch.dtype, warps: int, stages: int, capability: int) -> dict[str, Any]:
    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name in FLOATS else "*i32" if name in INTEGERS else f"*{NAMES[dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    source = ASTSource(kernel, signature, constexprs=values, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages})
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "kernel.ptx")
        text.write_text(compiled.asm["ptx"], encoding="utf-8")
        assembler = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas")
        target = re.search(r"^\.target (\w+)", compiled.asm["ptx"], re.MULTILINE)[1]
        line = [assembler, "-v", f"--gpu-name={target}", str(text), "-o", str(Path(folder, "kernel.cubin"))]
        output = subprocess.run(line, capture_output=True, text=True, check=True).stderr
    return {
        "kernel": kernel.__name__,
        "registers": int(re.search(r"Used (\d+) registers", output)[1]),
        "spilled_bytes": int(re.search(r"(\d+) bytes spill stores", output)[1]),
        "shared_bytes": compiled.metadata.shared,
    }
