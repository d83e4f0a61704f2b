"""The guard of ratios: what falls back, what is measured again, what is kept, and what is said on a machine that nothing is known of."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import guard_ratios as guarding
import pytest
import torch
import typer
from guard_ratios import MARGIN, RUNS, bound, fallen, guard, keep, kind_of_machine, read, title
from speed_ratios import Comparison, Ratio, ratios

from sparse_vlm.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
ONE = Ratio(
    "sparseformer-b", "clip-b32", 1.0, form="optimized", dtype="bfloat16", batch=1, threads=2,
    model_ms=30.0, rival_ms=33.0, ratio=0.90, low=0.88, high=0.93, rounds=10,
)  # fmt: skip
OTHER = dataclasses.replace(ONE, rival="clip-b16", target=0.25, ratio=0.30, low=0.28, high=0.31)


def at(ratio: Ratio, value: float) -> Ratio:
    """The ratio as if it had been measured so."""
    return dataclasses.replace(ratio, ratio=value, low=value - 0.01, high=value + 0.01)


def run_of(*found: Ratio) -> dict[str, list[float]]:
    return {title(ratio): [ratio.low, ratio.ratio, ratio.high] for ratio in found}


def test_a_ratio_may_rise_within_the_spread_and_no_further():
    runs = [run_of(ONE)]
    assert bound(runs, title(ONE)) == pytest.approx(0.90 * (1 + MARGIN)), "quartiles that are closer than runs are to each other"
    assert fallen([at(ONE, 0.944)], runs) == []
    [worse] = fallen([at(ONE, 0.946), OTHER], runs)
    assert worse.line() == "sparseformer-b by clip-b32, bfloat16, batch 1: the ratio is 0.946, its bound 0.945"
    runs += [run_of(dataclasses.replace(ONE, high=1.5)), run_of(dataclasses.replace(ONE, high=0.99))]
    assert bound(runs, title(ONE)) == pytest.approx(0.99), "the middle one of three spreads; a disturbed run loosens nothing"
    runs.append(run_of(dataclasses.replace(ONE, ratio=1.1, low=1.0, high=1.11)))
    assert bound(runs, title(ONE)) == 1.1, "what was measured once is no falling back"
    assert bound(runs, title(OTHER)) is None and fallen([OTHER], runs) == []


def test_only_what_the_machine_multiplies_in_is_measured(monkeypatch):
    asked = []
    monkeypatch.setattr(
        guarding, "ratios", lambda comparisons, dtypes, batches, rounds, limit_s: asked.append((len(comparisons), dtypes, batches))
    )
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(guarding, "native_dtype", lambda dtype=dtype: dtype)
        guarding.measured()
    assert asked == [(4, ["float32"], (1, 8)), (4, ["float32", "bfloat16"], (1, 8))]


def test_what_fell_back_is_measured_again():
    asked = []

    def measure(second: float):
        def measured(*which):
            asked.append(which)
            return [at(ONE, second)] if which else [at(ONE, 2.0), OTHER]

        return measured

    runs = [run_of(ONE, OTHER)]
    found, worse = guard(runs, measure(0.9))
    assert [ratio.ratio for ratio in found] == [2.0, 0.30] and worse == []
    assert asked == [(), ([Comparison("sparseformer-b", "clip-b32", 1.0)], ["bfloat16"], [1])]
    _, worse = guard(runs, measure(1.5))
    assert [one.ratio.ratio for one in worse] == [1.5]


def test_runs_are_kept_replaced_and_added(tmp_path):
    path = tmp_path / "ratios.json"
    assert keep(path, [ONE], add=False) == 1
    assert [keep(path, [at(ONE, i / 10)], add=True) for i in range(1, RUNS + 2)] == [2, 3, 4, 5, 5, 5]
    machine = read(path)["machines"][kind_of_machine()]
    assert [run[title(ONE)][1] for run in machine["runs"]] == [0.2, 0.3, 0.4, 0.5, 0.6] and machine["versions"]["torch"]
    assert keep(path, [OTHER], add=False) == 1
    kept = read(path)
    assert kept["machines"][kind_of_machine()]["runs"] == [run_of(OTHER)]
    kept["machines"]["another"] = {"runs": []}
    path.write_text(json.dumps(kept))
    keep(path, [ONE], add=False)
    assert "another" in read(path)["machines"], "one kind of machine leaves those of others alone"


def kept_of(numbers: object) -> str:
    return json.dumps({"format": "sparse-vlm/ratios-baseline/1", "machines": {"one": {"runs": [{"a by b": numbers}]}}})


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("not json", "not JSON"),
        ("[]", "must be an object"),
        ('{"format": "another", "machines": {}}', "format 'another'"),
        ('{"format": "sparse-vlm/ratios-baseline/1"}', "holds no machines"),
        (kept_of([0.9, 1.0]), "a by b has 2 numbers"),
        (kept_of([0.9, 0, 1.0]), r"must be a number above 0"),
        (kept_of([0.9, 10**400, 1.0]), r"must be a number above 0"),
        (kept_of("x").replace('"x"', "[" * 100_000), "nested too deep"),
    ],
)
def test_another_file_is_one_line(tmp_path, text, what):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=f"x.json: .*{what}"):
        read(tmp_path / "x.json")


def test_the_command_fails_by_name_and_number(tmp_path, monkeypatch, capsys):
    path = tmp_path / "ratios.json"
    measured = [ONE]
    monkeypatch.setattr(guarding, "ratios", lambda *which: list(measured))
    guarding.main(path)
    said = capsys.readouterr().out
    assert f"holds no ratios of this kind of machine ({kind_of_machine()}), so none can fall back" in said and not path.exists()
    guarding.main(path, renew=True)
    assert "1 of at most 5 runs" in capsys.readouterr().out
    measured[:] = [at(ONE, 1.5)]
    with pytest.raises(typer.Exit) as left:
        guarding.main(path)
    assert left.value.exit_code == 1
    assert capsys.readouterr().err == "fell back: sparseformer-b by clip-b32, bfloat16, batch 1: the ratio is 1.500, its bound 0.945\n"
    measured[:] = [ONE, OTHER]
    guarding.main(path)
    said = capsys.readouterr().out
    assert "none of 2 ratios fell back" in said and "sparseformer-b by clip-b16, bfloat16, batch 1: not kept yet" in said
    with pytest.raises(UserError, match="--renew and --add"):
        guarding.main(path, renew=True, add=True)


def test_a_real_measurement_is_judged():
    """Small: `tiny` beside itself, whose ratio is 1 whatever the machine does."""
    [one] = ratios([Comparison("tiny", "tiny", 1.0)], ["float32"], [1], rounds=3)
    assert one.ratio == 1 and one.model_ms > 0
    assert fallen([one], [run_of(one)]) == []
    assert len(fallen([one], [run_of(at(one, one.ratio / 2))])) == 1


def test_make_bench_is_no_part_of_the_tests():
    def recipe(target: str) -> str:
        done = subprocess.run(
            ["make", "--dry-run", target], capture_output=True, text=True, check=False, cwd=Path(__file__).resolve().parents[3]
        )
        if done.returncode != 0:
            pytest.skip("no make, or not in a checkout")
        return done.stdout

    assert "tools/guard_ratios.py" in recipe("bench") and "tools/" not in recipe("test")
