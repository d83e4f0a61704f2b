"""What a run is estimated to cost."""

from __future__ import annotations

import dataclasses

import pytest
import scaling
from typer.testing import CliRunner

from sparse_vlm.distill.recipes import get_recipe


def test_macs_are_those_of_the_papers() -> None:
    base, large = (scaling.view_cost(get_recipe(run.recipe), run.teacher) for run in scaling.RUNS[:2])
    # ViT-B/16 and ViT-L/14 at 224: 17.6 and 81 GMACs
    assert base.teacher / 1e9 == pytest.approx(17.6, rel=0.01) and large.teacher / 1e9 == pytest.approx(81, rel=0.01)


def test_frozen_blocks_have_no_gradients_of_their_own() -> None:
    run = scaling.RUNS[0]
    recipe = get_recipe(run.recipe)
    thawed = scaling.view_cost(dataclasses.replace(recipe, frozen=0), run.teacher).student
    block = 49 * 12 * 768**2 + 2 * 49**2 * 768
    assert thawed - scaling.view_cost(recipe, run.teacher).student == recipe.frozen * block


def test_the_table_halves_with_twice_the_devices() -> None:
    import typer

    app = typer.Typer()
    app.command()(scaling.main)

    def table(*options: str) -> list[list[str]]:
        done = CliRunner().invoke(app, ["--share", "1", "--devices", "1", "--devices", "2", *options])
        assert done.exit_code == 0, done.output
        return [line.strip("| ").split(" | ") for line in done.output.splitlines()[2:]]

    rows = table("--rate", "1")
    assert len(rows) == len(scaling.RUNS)
    for row in rows:
        one, two = (float(hours.replace(",", "")) for hours in row[-2:])
        assert two == pytest.approx(one / 2, rel=0.05)
    cost = scaling.view_cost(get_recipe(scaling.RUNS[0].recipe), scaling.RUNS[0].teacher)
    assert float(rows[0][4].replace(",", "")) == pytest.approx(1e12 / (cost.teacher + cost.student), abs=1)
    bound = table("--rate", "100", "--photos", "200")
    assert [row[4] for row in bound] == ["200"] * len(bound), "no device is faster than its photos come"
