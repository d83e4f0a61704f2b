"""What a GPU's compiler makes of the kernels, which can be asked without one: registers, what spills out of them, shared memory."""

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

from sparse_vlm.kernels.triton import backward, forward, spread
from sparse_vlm.kernels.triton.launch import SAMPLED
from sparse_vlm.kernels.triton.tiles import choose_mixing_tiles, choose_tiles

MANY = 10_000  # tokens, enough that tiles are as large as they get
FLOATS = {"points_ptr", "grad_at_ptr", "grad_weight_ptr", "grad_bias_ptr"}
INTEGERS = {"order_ptr", "starts_ptr"}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def compile_kernels(
    channels: int, points: int, out_points: int, hidden: int, betas: bool, dtype: torch.dtype, capability: int
) -> list[dict[str, Any]]:
    """Compile every kernel for a look of one shape.

    Args:
        capability: compute capability times ten: 80, 90.

    Returns:
        Of each kernel its name, registers of a thread, bytes that spill, and bytes of shared memory.
    """
    tiles = choose_tiles(MANY, points, channels, out_points, hidden, dtype, cores=1)
    constants = {
        "C": channels, "P": points, "O": out_points, "G": hidden, "TILE_T": tiles.tokens, "TILE_P": tiles.points,
        "TILE_C": tiles.channels, "TILE_O": tiles.out_points, "TILE_G": tiles.hidden, "BORDER": True, "BETAS": betas,
        "OPERAND": getattr(tl, "bfloat16" if dtype == torch.bfloat16 else "float32"), "PRECISION": "ieee",
    }  # fmt: skip
    fused = [forward.look_forward, backward.points_backward, backward.sampled_backward, backward.hidden_backward]
    made = [_compile(kernel, constants, dtype, tiles.warps, tiles.stages, capability) for kernel in fused]
    for of_points in (False, True):
        rows = {**constants, "POINTS": of_points, "TILE_T": max(16, tiles.tokens)}
        made.append(_compile(backward.weight_backward, rows, dtype, tiles.warps, tiles.stages, capability))
    sampling = {**constants, "TILE_N": tiles.cells, "TILE_C": min(64, triton.next_power_of_2(channels))}
    made += [_compile(kernel, sampling, dtype, 4, 3, capability) for kernel in (spread.map_backward, spread.coordinates_backward)]
    made.append(_compile(spread.sample_forward, {**sampling, "TILE_N": SAMPLED}, dtype, 4, 3, capability))
    mixing = choose_mixing_tiles(MANY, points, channels, out_points, cores=1)
    one = {**constants, "TILE_P": mixing.points, "TILE_I": mixing.read, "TILE_C": mixing.channels, "TILE_O": mixing.out_points}
    made.append(_compile(forward.mix_forward, one, dtype, mixing.warps, 1, capability))
    return made


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
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages})
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "kernel.ptx")
        text.write_text(made.asm["ptx"], encoding="utf-8")
        assembler = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas")
        target = re.search(r"^\.target (\w+)", made.asm["ptx"], re.MULTILINE)[1]
        line = [assembler, "-v", f"--gpu-name={target}", str(text), "-o", str(Path(folder, "kernel.cubin"))]
        said = subprocess.run(line, capture_output=True, text=True, check=True).stderr
    return {
        "kernel": kernel.__name__ + ("_points" if constants.get("POINTS") else ""),
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spilled_bytes": int(re.search(r"(\d+) bytes spill stores", said)[1]),
        "shared_bytes": made.metadata.shared,
    }
