"""What is said of a bootstrapping step's speed, and that freed memory is kept."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import bootstrap_speed as speed
import pytest

from sparse_vlm.errors import UserError

FAULTS = """
import resource, sys, torch
from sparse_vlm.utils.devices import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
seen = []
for turn in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 20, dtype=torch.uint8)
    seen.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(seen[8:]))  # a system may take memory away that nobody has used for a while
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told to keep memory")
def test_kept_memory_is_not_cleared_again() -> None:
    faults = [
        int(subprocess.run([sys.executable, "-c", FAULTS, kind], capture_output=True, text=True, check=True).stdout)
        for kind in ("kept", "returned")
    ]
    assert faults[0] < 16  # pages of a turn
    assert faults[1] >= 32  # a page may be a large one, of 2 MiB


RESIDENT = """
import os, torch
from sparse_vlm.utils.devices import trim_memory_if_scarce, keep_freed_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
keep_freed_memory()
large, above = torch.ones(256 << 20, dtype=torch.uint8), torch.ones(1 << 20, dtype=torch.uint8)
full = resident()
del large
kept = resident()
assert not trim_memory_if_scarce(0.0)  # plenty is left
assert kept == resident() and trim_memory_if_scarce(1.1)
print(full - kept, kept - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told to keep memory")
def test_kept_memory_is_given_back_where_it_is_scarce() -> None:
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)
    at_once, later = map(int, done.stdout.split())
    assert at_once < 16 and later > 200, "MB, of 256"


def test_a_step_is_measured_in_its_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("open_clip", reason="the teacher is open_clip's")
    from tiny_teacher import write_teacher

    teacher = write_teacher(tmp_path / "vit")
    examples = str(Path(__file__).resolve().parents[3] / "examples" / "*.jpg")
    speed.main(teacher, [examples], recipe="tiny", change=["lr=1e-4"], batch=2, rounds=2, threads=1, as_json=True)
    document = json.loads(capsys.readouterr().out)
    ms, rates = document["ms"], document["views_per_second"]
    assert ms.keys() == {*speed.PARTS, "in_a_row"}
    assert min(ms.values()) > 0
    assert rates["in_a_row"] == pytest.approx(1000 / ms.pop("in_a_row"))
    assert rates["live"] == pytest.approx(1000 / sum(ms.values()))
    assert rates["cached"] == pytest.approx(1000 / (sum(ms.values()) - ms["teacher"]))
    assert 0 < document["share_of_peak"]["student"] < 1  # toy numbers, but a share of what the machine can do
    assert f"| backward | student | {ms['backward']:.3g} |" in speed.table(document)


def test_time_needs_no_weights() -> None:
    pytest.importorskip("open_clip", reason="the teacher is open_clip's")
    assert speed.teacher_of("random:ViT-B-32-quickgelu").spec.activation == "quick_gelu"
    with pytest.raises(UserError, match="no model called ViT-Z"):
        speed.teacher_of("random:ViT-Z")


def test_a_recipe_that_trains_nothing_has_no_speed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vit: trains nothing"):
        speed.Step("vit", [], "local-dir:nowhere", ["nothing"], None)
