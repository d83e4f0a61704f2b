"""The Triton kernels where there is no GPU: through Triton's interpreter, and not at all.

The interpreter has to be chosen before triton is imported, so `kernel_checks.py` runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_vlm import kernels
from sparse_vlm.kernels import dispatch

CHECKS = Path(__file__).resolve().parents[2] / "kernel_checks.py"

pytest.importorskip("triton", reason="triton is not installed")


def test_under_the_interpreter():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(CHECKS),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout + done.stderr


def test_on_a_cpu_torch_samples_and_mixes_unless_triton_interprets():
    tensors = torch.zeros(1, 4, 3, 3), torch.zeros(1, 2, 3, 2), torch.zeros(1, 2, 8)
    assert not kernels.is_supported(*tensors)
    with kernels.using("kernels"), pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        kernels.is_supported(*tensors)
    assert not kernels.is_supported(*tensors), "what `using` chose ends with it"


@pytest.mark.parametrize(("chosen", "path"), [(None, "auto"), ("plain", "plain")])
def test_the_kernels_can_be_turned_off_for_a_process(chosen, path):
    environment = {name: value for name, value in os.environ.items() if name != "SPARSE_VLM_KERNELS"}
    program = "from sparse_vlm.kernels import dispatch; print(dispatch._path)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=environment | ({"SPARSE_VLM_KERNELS": chosen} if chosen else {}),
    )
    assert done.stdout.strip() == path


def test_by_themselves_they_run_where_they_are_faster(monkeypatch):
    """A GPU that is not there, with many images, or few of a tower that is captured; not on a CPU, nor in training."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    frozen, trained = torch.zeros(1), torch.zeros(1, requires_grad=True)
    assert dispatch._is_chosen("cuda", 64, (frozen,)) and not dispatch._is_chosen("cuda", 63, (frozen,))
    assert not dispatch._is_chosen("cpu", 64, (frozen,))
    assert not dispatch._is_chosen("cuda", 64, (frozen, trained))
    with torch.no_grad():
        assert dispatch._is_chosen("cuda", 64, (frozen, trained))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert dispatch._is_chosen("cuda", 1, (frozen,))


def test_sampling_is_a_kernel_in_training_with_many_points():
    few, many = torch.zeros(64, 49, 16, 2), torch.zeros(256, 49, 16, 2)
    faster = dispatch._sampling_is_faster
    assert faster("cuda", many, needs_grad=True) and not faster("cuda", few, needs_grad=True)
    assert not faster("cpu", many, needs_grad=True) and not faster("cuda", many, needs_grad=False)


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(Path(__file__).resolve().parents[3] / "tools" / "check_kernels.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_without_a_gpu_the_check_says_so():
    done = check()
    assert (done.returncode, done.stdout) == (2, "")
    assert "no CUDA GPU" in done.stderr


def test_the_check_verifies_through_the_interpreter():
    done = check("--interpret", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert [(each["shape"], each["dtype"], each["passed"]) for each in found["verified"]] == [
        *((shape, dtype, True) for shape in ("bootstrapped", "v1") for dtype in ("float32", "bfloat16")),
        *((f"sampling, {shape}", dtype, True) for shape in ("bootstrapped", "v1") for dtype in ("float32", "bfloat16")),
        ("early convolution", "bfloat16", True),
    ]
    assert "times" not in found


def test_on_a_gpu_what_is_verified_is_timed_in_parts_or_whole(monkeypatch, capsys):
    """A GPU that is not there, and parts that answer at once."""
    import check_kernels as program

    passed = {"mixing": True, "towers": True}

    def part(name: str):
        times = [program.row(name, 1, {"plain": 2.0, "kernels": 1.0})]
        return lambda: [program.judged(name, torch.float32, {"out": 0.0}, 1.0, passed[name])], lambda: times

    monkeypatch.setattr(program, "PARTS", {name: part(name) for name in passed})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")

    def run(*arguments: str) -> tuple[int, dict]:
        code = program.main(["--json", *arguments])
        return code, json.loads(capsys.readouterr().out)

    code, found = run("--only", "towers")
    assert (code, [each["what"] for each in found["times"]]) == (0, ["towers"])
    code, found = run()
    assert (code, [each["shape"] for each in found["verified"]], len(found["times"])) == (0, ["mixing", "towers"], 2)
    passed["mixing"] = False
    code, found = run()
    assert code == 1 and "times" not in found
