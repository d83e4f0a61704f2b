"""`sparse-vlm report`: files read and held against each other, fronts and changes by hand, and what is said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from report_files import CHATS, GB, PAIRS, SCENARIO, TWO, bench_of, comparison_of, eval_of, records_of, right, write

from sparse_vlm.errors import UserError
from sparse_vlm.report.comparison import Comparison, change, costs, differences, lengths, short
from sparse_vlm.report.frontier import AXES, BEHIND, MAYBE, ON, draw, named, points
from sparse_vlm.report.notes import notes
from sparse_vlm.report.page import render
from sparse_vlm.report.quality import read_quality
from sparse_vlm.report.records import Scenario, choose_scenario, find_record, no_help, read_bench, shorten

ROOT = Path(__file__).resolve().parents[3]


def test_the_benchmark_of_these_tests_is_one_by_its_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(bench_of(TWO), json.loads((ROOT / "docs" / "bench-schema.json").read_text()))


# ---- reading


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{", "not JSON"),
        ("[]", "does not say its format, not sparse-vlm/bench/1; name a file that sparse-vlm bench wrote"),
        (json.dumps({"format": "sparse-vlm/eval/1"}), "is sparse-vlm/eval/1, not sparse-vlm/bench/1"),
        (json.dumps({"format": "sparse-vlm/bench/1", "state": "finished"}), "holds no machine, versions, "),
        (json.dumps(bench_of(TWO) | {"requests": [], "state": "interrupted"}), "no model was measured to its end (the run is interrupted)"),
    ],
)
def test_a_file_that_is_no_benchmark_is_refused_by_its_name(tmp_path: Path, text: str, line: str) -> None:
    path = write(tmp_path, "bench.json", text)
    with pytest.raises(UserError, match=re.escape(line)) as raised:
        read_bench(path)
    assert str(raised.value).startswith(f"{path}: ")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing.json: No such file or directory; name a file that sparse-vlm eval wrote"):
        read_quality([tmp_path / "nothing.json"])


@pytest.mark.parametrize(
    ("second", "line"),
    [
        (eval_of({"tiny-chat": (49, right(0.7))}), "report1.json: pope of tiny-chat is in .*report0.json as well"),
        (eval_of({"tiny-chat": (25, right(0.7))}, task="gqa"), "report1.json: tiny-chat has 25 tokens here and 49 in the file before it"),
        (eval_of({"other": (49, right(0.7, 50))}), "pope accuracy is of 50 photos here and of 100 in the file before it"),
    ],
)
def test_reports_that_do_not_go_together_are_refused(tmp_path: Path, second: dict[str, Any], line: str) -> None:
    first = write(tmp_path, "report0.json", eval_of(CHATS))
    with pytest.raises(UserError, match=line):
        read_quality([first, write(tmp_path, "report1.json", second)])


def test_reports_in_other_units_or_by_other_rules_are_refused(tmp_path: Path) -> None:
    first, other = write(tmp_path, "report0.json", eval_of(CHATS)), eval_of({"other": (49, right(0.7))})
    ruled = json.loads(json.dumps(other))
    ruled["tasks"]["pope"]["protocol"] = "yes or no by words"
    with pytest.raises(UserError, match="report1.json: pope was measured in another way than in the file before it"):
        read_quality([first, write(tmp_path, "report1.json", ruled)])
    other["results"][0]["metrics"]["accuracy"]["unit"] = "x100"
    with pytest.raises(UserError, match="report1.json: pope accuracy is in x100, in the file before it in %"):
        read_quality([first, write(tmp_path, "report1.json", other)])


def test_controls_are_no_models_of_their_own(tmp_path: Path) -> None:
    report = eval_of(CHATS)
    blind = json.loads(json.dumps(report["results"][1]))
    blind["control"] = "no-image"
    blind["metrics"]["accuracy"]["value"] = 0.1
    report["results"].append(blind)
    quality = read_quality([write(tmp_path, "report.json", report)])
    assert quality.score(quality.chosen([])[0], "tiny-chat").value == 0.7
    report["results"] = [blind]
    with pytest.raises(UserError, match="blind.json: no model was measured with the photo itself; run sparse-vlm eval with --control none"):
        read_quality([write(tmp_path, "blind.json", report)])


# ---- which models belong together


def test_models_of_one_name_belong_together_and_others_by_pair(tmp_path: Path) -> None:
    document = bench_of({"vit+pool": (49, 80.0, 6.0), "tiny, 25 tokens": (25, 20.0, 0.9), "tiny, 49 tokens": (49, 30.0, 1.6)})
    for model in document["models"][1:]:
        model["model"] = "tiny"
    report = eval_of({"tiny": (49, right(0.7)), "tiny, 25 tokens": (25, right(0.6)), "lonely": (49, right(0.5))}, kind="tower")
    records, _ = records_of(tmp_path, document, [report], [])
    assert [e.name for e in records] == ["vit+pool", "tiny, 25 tokens", "tiny, 49 tokens"]
    assert [e.quality_name for e in records] == [None, "tiny, 25 tokens", "tiny"]
    assert [e.series for e in records] == ["vit+pool", "tiny", "tiny"]
    records, quality = records_of(tmp_path, document, [report], ["lonely=vit+pool"])
    assert records[0].quality_name == "lonely" and records[0].name == "vit+pool"  # of a tower that of its cost
    assert quality.models["lonely"]["dtype"] == "bfloat16"


def test_a_vlm_goes_by_its_own_name_and_several_can_cost_the_same(tmp_path: Path) -> None:
    seeds = {f"build/seed{i}/chat": (49, right(0.5 + i / 10)) for i in range(2)}
    records, _ = records_of(tmp_path, bench_of(TWO), [eval_of(seeds)], [f"{name}=tiny" for name in seeds])
    assert [(e.name, e.cost_name) for e in records] == [("vit+pool", "vit+pool"), ("seed0/chat", "tiny"), ("seed1/chat", "tiny")]
    with pytest.raises(UserError, match="--baseline tiny: stands for build/seed0/chat, build/seed1/chat; name one of them"):
        find_record(records, "--baseline", "tiny")
    with pytest.raises(UserError, match="--candidate huge: not in the benchmark; there are vit.pool, build/seed0/chat, build/seed1/chat"):
        find_record(records, "--candidate", "huge")
    assert find_record(records, "--baseline", "build/seed1/chat").name == "seed1/chat"


@pytest.mark.parametrize(
    ("pairs", "line"),
    [
        ([], "no model is in both files: quality of build/pool-chat, tiny-chat; cost of vit+pool, tiny; say which belong together"),
        (["tiny-chat"], "--pair tiny-chat: write QUALITY=COST"),
        (["huge=tiny"], "--pair huge=tiny: no quality of huge; there are build/pool-chat, tiny-chat"),
        (["tiny-chat=huge"], "--pair tiny-chat=huge: no cost of huge in this scenario; there are vit+pool, tiny"),
        (["tiny-chat=tiny", "tiny-chat=vit+pool"], "--pair tiny-chat=vit+pool: tiny-chat has a pair already, tiny"),
    ],
)
def test_pairs_that_are_none_are_refused(tmp_path: Path, pairs: list[str], line: str) -> None:
    with pytest.raises(UserError, match=re.escape(line)):
        records_of(tmp_path, bench_of(TWO), [eval_of(CHATS)], pairs)


def test_a_vlm_does_not_stand_beside_the_cost_of_other_tokens(tmp_path: Path) -> None:
    document = bench_of({"vit": (256, 80.0, 6.0), "tiny": (49, 30.0, 1.6)})
    with pytest.raises(UserError, match="tiny-chat was measured with 49 tokens an image, vit has 256"):
        records_of(tmp_path, document, [eval_of(CHATS)], ["tiny-chat=vit"])


def test_a_tower_stands_for_its_fewer_tokens_and_that_is_said(tmp_path: Path) -> None:
    document = bench_of(TWO)
    document["models"][0] |= {"tower_tokens": 256, "reduction": "pool"}
    report = eval_of({"local-dir:build/teacher": (257, right(0.7)), "tiny": (49, right(0.6))}, kind="teacher")
    comparison = comparison_of(tmp_path, document, [report], ["local-dir:build/teacher=vit+pool"])
    said = "What vit+pool loses by giving the LLM 49 tokens: its quality here is that of teacher with 257 tokens."
    unmeasured = notes(comparison, "unmeasured")
    assert said in unmeasured
    assert "The quality of a VLM on these towers: their tasks are those of a tower alone, before any projector." in unmeasured


def test_names_lose_the_folders_that_they_can_do_without() -> None:
    names = ["build/a/chat", "build/b/chat", "local-dir:build/teacher+pool", "tiny, 9 tokens"]
    assert shorten(names) == ["a/chat", "b/chat", "teacher+pool", "tiny, 9 tokens"]
    assert shorten(["tiny", "x/tiny"]) == ["tiny", "x/tiny"]


def test_a_case_is_the_first_that_was_measured_or_one_that_was(tmp_path: Path) -> None:
    document = bench_of(TWO)
    assert choose_scenario(document, None, None, None, 64) == Scenario("135m", "bfloat16", 1, 64)
    assert choose_scenario(document, "135m", None, 8, 16).answers == [16, 128, 512]
    with pytest.raises(UserError, match="--llm 7b: not measured; there is 135m; run sparse-vlm bench with it"):
        choose_scenario(document, "7b", None, None, 64)
    with pytest.raises(UserError, match="--batch 3: not measured, llm 135m, dtype bfloat16; there is 1, 8"):
        choose_scenario(document, None, None, 3, 64)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("gqa", "--task gqa: not measured, or without a better and a worse; there are pope/accuracy"),
        ("pope/F1", "--task pope/F1: not measured"),
        ("pope/yes-ratio", "--task pope/yes-ratio: neither more nor less of yes-ratio is better, so it has no front"),
    ],
)
def test_a_task_that_has_no_front_is_refused(tmp_path: Path, name: str, line: str) -> None:
    quality = read_quality([write(tmp_path, "report.json", eval_of(CHATS))])
    with pytest.raises(UserError, match=line):
        quality.chosen([name])


# ---- the front


def front_of(tmp_path: Path, costs: dict[str, float], scores: dict[str, list[float]], apart: bool = False) -> dict[str, str]:
    """Where models stand whose towers cost so many GMACs. `apart`: each was measured in a run of its own, so that nothing is paired."""
    document = bench_of({name: (49, 10.0, gmacs) for name, gmacs in costs.items()})
    evals = [eval_of({name: (49, own)}, kind="tower") for name, own in scores.items()]
    if not apart:
        evals = [eval_of({name: (49, own) for name, own in scores.items()}, kind="tower")]
    records, quality = records_of(tmp_path, document, evals, [])
    return {p.record.name: p.standing for p in points(records, quality, quality.chosen([])[0], AXES["MACs"])}


def test_the_front_is_what_no_other_beats(tmp_path: Path) -> None:
    costs = {"dear": 4.0, "cheap": 1.0, "middling": 2.0, "worse": 3.0}
    scores = {"cheap": right(0.4), "middling": right(0.6), "worse": right(0.3), "dear": right(0.61)}
    standings = front_of(tmp_path, costs, scores)
    assert standings == {"cheap": ON, "middling": ON, "worse": BEHIND, "dear": ON}
    assert list(standings) == ["cheap", "middling", "worse", "dear"]  # in the order of their cost


def test_models_of_one_series_are_named_together(tmp_path: Path) -> None:
    document = bench_of({"tiny, 9 tokens": (9, 10.0, 0.4), "tiny, 49 tokens": (49, 30.0, 1.6), "vit": (256, 80.0, 6.0)})
    for model in document["models"][:2]:
        model["model"] = "tiny"
    scores = {"tiny, 9 tokens": (9, right(0.4)), "tiny, 49 tokens": (49, right(0.6)), "vit": (256, right(0.7))}
    records, quality = records_of(tmp_path, document, [eval_of(scores, kind="tower")], [])
    found = points(records, quality, quality.chosen([])[0], AXES["tokens"])
    assert named(found, ON) == "tiny of 9, 49 tokens; vit"
    assert named(found, BEHIND) == ""


def test_models_alike_in_both_are_both_on_the_front(tmp_path: Path) -> None:
    assert front_of(tmp_path, {"one": 1.0, "other": 1.0}, {"one": right(0.5), "other": right(0.5)}) == {"one": ON, "other": ON}


def test_a_paired_interval_tells_apart_what_two_intervals_do_not(tmp_path: Path) -> None:
    """The same 60 photos and 8 more: always better, though each alone is uncertain by 10 points."""
    costs, scores = {"cheap": 1.0, "dear": 2.0}, {"cheap": right(0.68), "dear": right(0.6)}
    assert front_of(tmp_path, costs, scores)["dear"] == BEHIND
    assert front_of(tmp_path, costs, scores, apart=True)["dear"] == MAYBE


def test_a_model_without_a_score_is_no_point(tmp_path: Path) -> None:
    assert front_of(tmp_path, {"known": 1.0, "unknown": 2.0}, {"known": right(0.5)}) == {"known": ON}


def test_costs_are_those_of_the_benchmark(tmp_path: Path) -> None:
    (pool, tiny), _ = records_of(tmp_path, bench_of(TWO), [], [])
    found = {name: (cost.of(pool), cost.of(tiny)) for name, cost in AXES.items()}
    # GMACs: of the tower, and one each of projector and prompt
    assert found == {"tokens": (49, 49), "MACs": (8.0, 3.6), "milliseconds": (135.0, 85.0), "KV bytes": (1.12896, 1.12896)}
    assert AXES["milliseconds"].spread(tiny) == (76.5, 93.5)


def test_a_picture_of_the_front_is_drawn(tmp_path: Path) -> None:
    comparison = comparison_of(tmp_path, bench_of(TWO), [eval_of(CHATS)], PAIRS)
    path = tmp_path / "front.png"
    draw(comparison.records, comparison.quality, comparison.measures[0], "a title", path)
    assert path.read_bytes().startswith(b"\x89PNG") and [p.name for p in tmp_path.glob("front*")] == ["front.png"]


# ---- two models beside each other


def test_what_changes_is_worked_out_by_hand(tmp_path: Path) -> None:
    rows = {row["label"]: row for row in costs(comparison_of(tmp_path, bench_of(TWO), [], []))}
    first = rows["to the first token, ms"]
    assert (first["now"], first["then"], first["change"]) == ("135 [122, 148]", "85 [76.5, 93.5]", "−37 %")
    assert rows["tower, GMACs an image"]["change"] == "−73 %"
    assert rows["reading the prompt, ms"]["change"] == "the same"
    # image, tower and projector, prompt, and 128 tokens of 10 ms: 5 + 31 + 49 + 1280 and 50 ms more of the other tower
    end = rows["to the end of the answer, s, estimated"]
    assert (end["now"], end["then"]) == ("1.42", "1.37")
    assert rows["requests a second, estimated"]["then"] == "0.733"


def test_a_change_within_the_spread_is_called_so(tmp_path: Path) -> None:
    comparison = comparison_of(tmp_path, bench_of({"one": (49, 33.0, 1.6), "other": (49, 30.0, 1.6)}), [], [])
    rows = {row["label"]: row["change"] for row in costs(comparison)}
    assert rows["to the first token, ms"] == "−3.4 %, within the spread"
    assert notes(comparison, "verdicts")[0] == "First token after 85 ms instead of 88 ms (−3.4 %, within the spread of the times)."


def test_quartiles_of_a_sum_of_pieces_are_added(tmp_path: Path) -> None:
    """In batches of 8 the first token was not measured in one go: 8 images of 5 ms, towers, projector and prompt."""
    comparison = comparison_of(tmp_path, bench_of(TWO), [], [], Scenario("135m", "bfloat16", 8, 128))
    records = comparison.records
    assert records[1].request["ms"]["ttft"] == 8 * (5.0 + 30.0 + 1.0 + 49.0)
    assert notes(comparison, "verdicts")[0] == "First tokens of 8 requests after 680 ms instead of 1,080 ms (−37 %)."
    assert records[1].first_token_spread() == pytest.approx((0.9 * 680, 1.1 * 680))


def test_quality_beside_cost_has_the_paired_interval(tmp_path: Path) -> None:
    report = eval_of(CHATS)
    comparison = comparison_of(tmp_path, bench_of(TWO), [report], PAIRS)
    (row,), (paired,) = differences(comparison), [p for p in report["paired"] if p["metric"] == "accuracy"]
    assert (paired["model"], paired["over"]) == ("tiny-chat", "build/pool-chat")
    assert row["change"] == f"+10.0 [+{100 * paired['low']:.1f}, +{100 * paired['high']:.1f}]"
    assert notes(comparison, "verdicts")[-1].endswith("better by more than chance.")
    turned = Comparison(**{**vars(comparison), "now": comparison.then, "then": comparison.now})
    assert differences(turned)[0]["change"] == f"−10.0 [−{100 * paired['high']:.1f}, −{100 * paired['low']:.1f}]"
    assert notes(turned, "verdicts")[-1].endswith("worse by more than chance.")


def test_a_difference_of_nothing_has_no_sign(tmp_path: Path) -> None:
    alike = {name: (49, right(0.6)) for name in CHATS}
    comparison = comparison_of(tmp_path, bench_of(TWO), [eval_of(alike)], PAIRS)
    turned = Comparison(**{**vars(comparison), "now": comparison.then, "then": comparison.now})
    assert differences(comparison)[0]["change"] == differences(turned)[0]["change"] == "0.0 [0.0, 0.0]"


def test_models_of_two_runs_have_no_paired_interval(tmp_path: Path) -> None:
    evals = [eval_of({name: own}) for name, own in CHATS.items()]
    comparison = comparison_of(tmp_path, bench_of(TWO), evals, PAIRS)
    assert differences(comparison)[0]["change"] == "+10.0, not paired"
    assert notes(comparison, "verdicts")[-1] == "pope accuracy: 70.0 instead of 60.0 (+10.0), not told apart."


def test_without_an_evaluation_quality_is_said_to_be_unknown(tmp_path: Path) -> None:
    comparison = comparison_of(tmp_path, bench_of(TWO), [], [])
    assert differences(comparison) == [] and comparison.drawn == []
    assert notes(comparison, "verdicts")[-1] == "Whether quality changes is not known from these files: no task was measured of both."
    assert "The quality of vit+pool, tiny." in notes(comparison, "unmeasured")


def test_a_long_answer_hides_the_tower(tmp_path: Path) -> None:
    comparison = comparison_of(tmp_path, bench_of(TWO), [], [])
    rows = lengths(comparison)
    assert [(row["answer"], row["verdict"]) for row in rows] == [("16", "helps"), ("128", "hardly matters"), ("512", "hardly matters")]
    assert rows[2]["takes"] == "writing the answer takes 98% of the time"
    assert "hardly a difference, because writing the answer takes 94% of the time." in notes(comparison, "verdicts")[1]


def test_where_fewer_tokens_do_not_help_is_said(tmp_path: Path) -> None:
    assert notes(comparison_of(tmp_path, bench_of(TWO), [], []), "where_not") == [
        "All models here give the LLM 49 tokens an image: what differs is the time of the tower alone."
    ]
    fewer = comparison_of(tmp_path, bench_of({"vit": (256, 80.0, 6.0), "tiny": (49, 30.0, 1.6)}), [], [])
    (line,) = notes(fewer, "where_not")
    assert line.startswith("tiny (49 tokens) against vit (256 tokens), requests a second: +5% at answers of 512 tokens")
    assert [f"{said}." for said in no_help(fewer.document, SCENARIO, fewer.records)] == [f"135m, bfloat16: {line}"]


# ---- what to beware of, and what is not known


def test_a_quiet_whole_run_has_nothing_to_beware_of(tmp_path: Path) -> None:
    assert notes(comparison_of(tmp_path, bench_of(TWO), [eval_of(CHATS)], PAIRS), "warnings") == []


def test_what_makes_numbers_less_than_they_seem_is_said_first(tmp_path: Path) -> None:
    document = bench_of(TWO)
    document |= {"state": "failed", "problem": "out of memory", "machine": document["machine"] | {"load_average": 4.0}}
    document["llms"][0] |= {"measured_layers": 2}
    document["settings"]["memory_bytes"] = 1000
    whole, busy, blocks, memory = notes(comparison_of(tmp_path, document, [], []), "warnings")
    assert whole.startswith("The benchmark is not whole (failed: out of memory)")
    assert busy.startswith("The machine did other work when the benchmark began (a load of 4.0 on 2 cores)")
    assert blocks == "135m did not fit this machine: 2 of its 30 layers stand for all."
    assert memory.startswith("What a request takes in memory does not fit this machine")


def test_what_differs_between_the_files_is_said(tmp_path: Path) -> None:
    versions = {"sparse_vlm": "0.0.9", "torch": "2.9.0+cpu", "python": "3.11.7"}
    report = eval_of({**CHATS, "lonely": (9, right(0.5))}, dtype="float32", versions=versions)
    said = notes(comparison_of(tmp_path, bench_of({**TWO, "other": (49, 9.0, 1.0)}), [report], PAIRS), "unmeasured")
    assert "The quality of other." in said and "The cost of lonely in this scenario." in said
    assert "Quality in bfloat16: it was measured in float32." in said
    assert "Quality with the versions that costs were measured with: report0.json is of sparse_vlm 0.0.9, not 0.1.0." in said
    assert any(line.startswith("Quality with 135m, unless the models answered with it") for line in said)


def test_machine_versions_and_protocols_are_told(tmp_path: Path) -> None:
    said = " ".join(notes(comparison_of(tmp_path, bench_of(TWO), [eval_of(CHATS)], PAIRS), "method"))
    for part in (
        "a processor, 1 of 2 threads, 16 GB",
        "load when it began: 0.1",
        "torch 2.9.0",
        "coffee.jpg (640 x 480)",
        "32 tokens of text",
    ):
        assert part in said
    assert "photos/" not in said and said.endswith("pope: 100 photos; yes or no by likelihood.")


def test_a_gpu_is_named(tmp_path: Path) -> None:
    document = bench_of(TWO)
    document["machine"] |= {"device": "cuda", "accelerator": {"name": "a GPU", "memory_bytes": 80 * GB}}
    comparison = comparison_of(tmp_path, document, [], [])
    assert notes(comparison, "method")[0].startswith("Machine: a GPU, a processor") and "a GPU</p>" in render(comparison)


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1,234"), (0.01094, "0.0109"), (49, "49"), (2.0, "2"), (99.96, "100")])
def test_numbers_keep_three_digits(value: float, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize(
    ("pair", "text"), [((10, 10.001), "the same"), ((10, 9.5), "−5.0 %"), ((10, 30), "+200 %"), ((190, 0.9), "−99.5 %")]
)
def test_changes_are_shares(pair: tuple[float, float], text: str) -> None:
    assert change(*pair) == text
