"""`sparse-vlm bench`: what is counted against counts by hand, what is timed in turn, and a whole run of small models against its schema."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_vlm import save_llm, save_tower
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparse_vlm.bench import BenchConfig, llms, machine, measure, run
from sparse_vlm.bench.llms import SHAPES, Language, Shape, plan_llm
from sparse_vlm.bench.machine import higher, peak_bytes
from sparse_vlm.bench.pruner import ClsPruner, cls_attention
from sparse_vlm.bench.summary import saturation
from sparse_vlm.bench.timing import WARM_UP, TimedCall, time_interleaved
from sparse_vlm.bench.vision import BASELINES, BOX, REDUCTIONS, Baseline, count_weights, load_visions, projector_work
from sparse_vlm.cli.bench import bench
from sparse_vlm.distill.recipes import get_recipe
from sparse_vlm.errors import UserError
from sparse_vlm.report.tables import as_markdown, as_tables, save
from sparse_vlm.teachers import TeacherSpec
from sparse_vlm.tower import SparseFormer
from sparse_vlm.tower.cost import Work, attention, count_work, linear, vit_macs, vit_work
from sparse_vlm.utils.files import LOCK

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
VIT = TeacherSpec("vit", 64, 3, 1, 16, 8, 32, (0.5,) * 3, (0.5,) * 3, "gelu", 1e-5, norm_pre=True)  # 16 patches and CLS
SHAPE = Shape("a shape", 100, 32, 64, 4, 2, 1, False)
QUICK: dict[str, Any] = {"dtypes": ("float32",), "rounds": 3, "copied_bytes": 1 << 20, "prompt_tokens": 3}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A baseline and a shape that take no time, and peaks that take little."""
    monkeypatch.setitem(BASELINES, "vit", Baseline("a small ViT", get_recipe("vit").config(VIT), VIT))
    monkeypatch.setitem(SHAPES, "shape", SHAPE)
    monkeypatch.setattr(machine, "MATRIX_SIDES", {"cpu": (128,)})


def settings(**changes: Any) -> BenchConfig:
    return BenchConfig(**{"models": ("vit",), "llms": ("shape",), "batches": (1,), **QUICK, **changes})


def document_of(**changes: Any) -> dict[str, Any]:
    return measure(settings(**changes))


# ---- counts


def test_a_tower_moves_each_of_its_matrices_once_and_what_they_read_and_write() -> None:
    config = BASELINES["vit"].config
    tower = SparseFormer(config)
    matrices = [m.weight.numel() for m in tower.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert sum(work.weights for work in count_work(config).values()) == sum(matrices)
    assert vit_work(VIT).weights == sum(matrices) - tower.proj.weight.numel()
    assert linear(3, 5, 7) == Work(105, 35, 36) and attention(2, 3, 8, key_width=4) == Work(96, 0, 2 * 2 * 8 + 2 * 3 * 4)
    assert (linear(3, 5, 7) * 2).bytes(batch=4, itemsize=2) == 2 * (70 + 4 * 72)


@pytest.mark.parametrize("name", ["vit", "sparseformer-b", "adaptive-s"])
def test_macs_are_those_that_torch_counts(name: str) -> None:
    config = BASELINES[name].config
    with torch.device("meta"):
        tower = SparseFormer(config).requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(torch.empty(1, 3, config.image_size, config.image_size, device="meta"))
    # sampling and RoIs' averages, which are no part of the papers' counts
    assert sum(work.macs for work in count_work(config).values()) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


@pytest.mark.parametrize("name", ["clip-b32", "clip-b16", "clip-l14", "clip-l14-336", "siglip-b16"])
def test_baselines_are_as_large_as_in_their_own_library(name: str) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

    spec, config = BASELINES[name].vit, BASELINES[name].config
    sizes = {
        **{"hidden_size": spec.width, "intermediate_size": 4 * spec.width, "num_hidden_layers": spec.num_blocks},
        **{"num_attention_heads": spec.num_heads, "patch_size": spec.patch_size, "image_size": spec.image_size},
    }
    with torch.device("meta"):
        tower = SparseFormer(config)
        theirs = SiglipVisionModel(SiglipVisionConfig(**sizes)) if "siglip" in name else CLIPVisionModel(CLIPVisionConfig(**sizes))
    ours = sum(p.numel() for n, p in tower.named_parameters() if not n.startswith(("proj.", "initial_roi")))
    # ours has folded the CLS token's position (CLIP), or the patch embedding's bias (SigLIP), into what it is added to
    assert ours == sum(p.numel() for p in theirs.parameters()) - spec.width
    if name == "clip-l14-336":
        assert vit_macs(spec) / 1e9 == pytest.approx(191, abs=1)  # as published: 382 GFLOPs


def test_a_projector_is_counted_by_hand() -> None:
    (plain,) = load_visions(["vit"])
    assert projector_work(plain.projector(32), 16, 64) == linear(16, 64, 32) + linear(16, 32, 32) + Work(0, 64, 0)  # and its biases
    (pooled,) = load_visions(["vit+pool"], [4])
    assert projector_work(pooled.projector(32), 16, 64).macs == 4 * 64 * 32 + 4 * 32 * 32


def test_an_llm_is_counted_by_hand() -> None:
    language = Language(plan_llm("shape"), torch.float32, CPU)
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64  # q, k and v of one head of two, output; gate, up, down
    head = 32 * 100
    assert language.parameters == sum(p.numel() for p in language.model.parameters())
    assert language.work(1).macs == 4 * (layer + 2 * 32) + head
    assert language.work(3).macs == 4 * (3 * layer + 2 * (1 + 2 + 3) * 32) + head, "causal: one, two and three pairs"
    assert language.work(1, past=9).macs == 4 * (layer + 2 * 10 * 32) + head
    assert language.work(5).weights == language.work(1).weights == 4 * layer + head
    assert language.kv_bytes_per_token == 4 * 2 * 16 * 4
    cache = language.filled_cache(2, 7)
    assert (
        cache.get_seq_length() == 7
        and sum(part.keys.nbytes + part.values.nbytes for part in cache.layers) == 14 * language.kv_bytes_per_token
    )


def test_an_llm_that_does_not_fit_stands_in_blocks_and_counts_as_whole() -> None:
    whole = Language(plan_llm("shape"), torch.float32, CPU)
    blocks = Language(plan_llm("shape"), torch.float32, CPU, memory=whole.parameters * 4)  # half of it may be weights
    assert (whole.built, blocks.built, blocks.scale) == (4, 2, 2.0)
    assert blocks.work(5, 3) == whole.work(5, 3)
    assert (blocks.parameters, blocks.kv_bytes_per_token) == (whole.parameters, whole.kv_bytes_per_token)
    assert blocks.missing_bytes(10) == 5 * whole.kv_bytes_per_token
    assert whole.missing_bytes(10) == 0
    beside = Language(plan_llm("shape"), torch.float32, CPU, taken=1, memory=whole.parameters * 8)
    assert beside.built == 2, "what towers hold counts"
    huge = machine.memory_bytes(CPU)
    assert llms.layers_that_fit(plan_llm("shape"), torch.float32, CPU, taken=huge, memory=10 * huge) == 2, (
        "a machine has no more than it has"
    )


# ---- pruning


def test_a_pruner_keeps_what_the_cls_token_attends_to_most_in_the_second_to_last_block() -> None:
    (seen,), (pruned,) = load_visions(["vit"]), load_visions(["vit+prune"], [5])
    pruner = pruned.encoder
    assert isinstance(pruner, ClsPruner)
    pruner.tower.load_state_dict({k: v + 0.1 * torch.randn_like(v) for k, v in pruner.tower.state_dict().items()})
    seen.module.load_state_dict(pruner.tower.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    before = next(x for x, _ in pruner.tower.run_units(pixels))  # of three blocks, what enters the second
    unit = pruner.tower.units()[1]
    q, k, _ = unit.attn.qkv(unit.norm1(before)).unflatten(-1, (3, 1, 64)).permute(2, 0, 3, 1, 4)
    whole = torch.softmax(q @ k.mT / 8, dim=-1).mean(1)
    assert torch.allclose(cls_attention(unit, before), whole[:, 0, 1:], atol=1e-6)
    kept = whole[:, 0, 1:].topk(5).indices.sort().values
    every = seen.encode(pixels)
    assert torch.allclose(pruned.encode(pixels), torch.stack([every[i, kept[i]] for i in range(2)]), atol=1e-5)
    assert pruned.tokens == 5 and pruned.work.macs > seen.work.macs


# ---- models


def test_a_model_is_measured_at_each_number_of_tokens_it_can_serve() -> None:
    visions = load_visions(["vit", "vit+pool", "vit+prune", "vit+shuffle"], [4])
    assert [(v.name, v.tower, v.tokens_in, v.tokens) for v in visions] == [
        ("vit", "vit", 16, 16),
        ("vit+pool, 4 tokens", "vit", 16, 4),
        ("vit+prune, 4 tokens", "vit+prune, 4 tokens", 16, 4),
        ("vit+shuffle, 4 tokens", "vit", 16, 4),
    ]
    assert count_weights(seen.module for seen in visions) == count_weights([visions[0].module]), "one tower serves them all"
    for seen in visions:
        assert seen.projector(8)(seen.encode(torch.zeros(1, 3, 32, 32))).shape == (1, seen.tokens, 8)


def test_the_box_holds_what_there_is() -> None:
    assert {name.partition("+")[0] for name in BOX} == {"tiny", *BASELINES} - {"vit", "adaptive-s", "uniform-s"}
    assert {name.partition("+")[2] for name in BOX} == {"", *REDUCTIONS}


def test_towers_of_the_zoo_and_teachers_are_models_too(tmp_path: Path) -> None:
    import timm

    timm_name = "timm:vit_tiny_patch16_224"
    weights = tmp_path / "vit.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), weights)
    own, teacher, elastic = load_visions([save_tower(tmp_path / "tower"), f"{timm_name}@{weights}", "tiny"], [9])
    assert (own.weights, own.tokens) == ("trained", 5)
    assert (teacher.weights, teacher.encode(torch.zeros(1, 3, 224, 224)).shape) == ("trained", (1, 196, 192))
    assert (elastic.name, elastic.tokens, elastic.encode(torch.zeros(1, 3, 224, 224)).shape) == ("tiny, 9 tokens", 9, (1, 9, 384))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ("tinny",)}, "--model tinny: no such folder and no such model; .* baselines are clip-b32"),
        ({"models": ("tiny-chat",)}, "--model tiny-chat: is projector and adapters of a vision-language model"),
        ({"models": ("vit+pooled",)}, "pooled does not make tokens fewer; known are pool, stride"),
        ({"models": ("vit+pool",), "tokens": (5,)}, "from 16 tokens to 5: both must be squares"),
        ({"models": ("vit+prune",), "tokens": (17,)}, "pruning to 17 tokens: the tower has 16"),
        ({"models": ("siglip-b16+prune",)}, "needs a ViT with a CLS token"),
        ({"models": ("tiny",), "tokens": (100,)}, "tiny: .*9 to 64 tokens, not 100"),
        ({"llms": ("14b",)}, "--llm 14b: no such folder and no such model; .*shapes of random weights are 135m"),
        ({"dtypes": ("float16",)}, "--dtype float16: known are float32, bfloat16"),
        ({"device": "mps"}, "--device mps: known are cpu and cuda"),
        ({"rounds": 2}, "--rounds is 2; a median needs 3"),
        ({"images": ("no.jpg",)}, "no.jpg: no such file"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_measured(changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "time_interleaved", lambda *arguments: pytest.fail("measured"))
    with pytest.raises(UserError, match=message):
        measure(settings(**changes), on_document=lambda document: pytest.fail("saved"))


# ---- timing


def test_pieces_time_interleaved_and_factors_count() -> None:
    order: list[str] = []

    def step(name: str, seconds: float) -> Any:
        def call(state: Any) -> str:
            order.append(name)
            time.sleep(seconds)
            return f"{state}{name}"

        return call

    def prepare() -> str:
        time.sleep(0.02)
        return "ready, "

    told: list[TimedCall] = []
    one = TimedCall("one", [(step("a", 0.002), 10.0), (step("b", 0.001), 1.0)], prepare=prepare)
    two = TimedCall("two", [(step("c", 0.03), 1.0)])
    time_interleaved([one, two], CPU, rounds=6, limit_s=0.05, on_call=told.append)
    assert order[:6] == ["a", "b", "c"] * 2
    assert (len(one.seconds), len(two.seconds)) == (3, 3), "each has taken its time, and is spared what it need not do"
    assert len(told) == 2 * (WARM_UP + 6), "progress goes on all the same"
    assert min(one.seconds) >= 0.021 and min(two.seconds) >= 0.03, "what is prepared is out of the time, and a factor in it"
    quartiles = one.quartiles()
    assert 21 <= quartiles["low"] <= quartiles["median"] <= quartiles["high"]


def test_memory_is_what_is_held_at_once() -> None:
    def call() -> None:
        first = torch.zeros(1 << 18)
        second = first + 1
        del first
        torch.zeros(1 << 17)
        del second

    assert peak_bytes(call, CPU) == pytest.approx(2 << 20, abs=200)


def test_the_higher_peak_counts() -> None:
    one, other = ({"dtype": "float32", "macs_per_second": a, "bytes_per_second": b} for a, b in ((1, 5), (2, 3)))
    assert higher(one, other) == {"dtype": "float32", "macs_per_second": 2, "bytes_per_second": 5}


# ---- a run


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of everything, small."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BASELINES, "vit", Baseline("a small ViT", get_recipe("vit").config(VIT), VIT))
        patch.setitem(SHAPES, "shape", SHAPE)
        patch.setattr(machine, "MATRIX_SIDES", {"cpu": (128,)})
        patch.setattr(torch, "compile", lambda call, **options: call)
        patch.setattr(run, "peak_bytes", lambda call, device: 1000)  # a test of its own; here it would take half of the time
        models = ("vit", *(f"vit+{kind}" for kind in REDUCTIONS), save_tower(folder / "tower"))
        held = 4 * count_weights(seen.module for seen in load_visions(models, [4]))
        asked = settings(
            models=models,
            llms=(save_llm(folder / "llm"), "shape"),
            tokens=(4,),
            batches=(1, 2),
            dtypes=("float32", "bfloat16"),
            images=(str(ROOT / "examples" / "coffee.jpg"),),
            compile=True,
            answers=(8, 100),
            memory_bytes=2 * (held + 130_000),  # in float32 enough for the LLM of two layers, and not for the shape of four
        )
        saved: list[str] = []
        done: list[int] = []
        found = measure(asked, done.append, lambda document: saved.append(json.dumps(document)))
        assert sum(done) == 1000 and len(saved) > 20 and json.loads(saved[-1]) == json.loads(json.dumps(found))
        return json.loads(saved[-1]) | {"half": json.loads(saved[len(saved) // 2])}


def test_a_document_is_as_its_schema_says_at_any_time(document: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="reads the schema")
    schema = json.loads((ROOT / "docs" / "bench-schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    whole = {key: value for key, value in document.items() if key != "half"}
    for each in (whole, document["half"]):
        jsonschema.validate(each, schema, cls=jsonschema.Draft202012Validator)
    assert (whole["state"], document["half"]["state"]) == ("finished", "running")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(whole | {"more": 1}, schema)


def test_everything_asked_for_was_measured(document: dict[str, Any]) -> None:
    models = {model["name"]: model for model in document["models"]}
    assert len(models) == 1 + len(REDUCTIONS) + 1
    for dtype in ("float32", "bfloat16"):
        for batch in (1, 2):
            rows = [m for m in document["measurements"] if (m["dtype"], m["batch"]) == (dtype, batch)]
            towers = [(m["model"], m["compiled"]) for m in rows if m["stage"] == "tower"]
            assert sorted(towers) == sorted((tower, c) for tower in {m["tower"] for m in models.values()} for c in (False, True))
            for llm in document["settings"]["llms"]:
                assert {m["model"] for m in rows if (m["stage"], m["llm"]) == ("projector", llm)} == set(models)
                assert [m["tokens"] for m in rows if (m["stage"], m["llm"]) == ("decode", llm)] == [4, 5, 16]
                first = {m["model"] for m in rows if (m["stage"], m["llm"]) == ("ttft", llm)}
                assert first == (set(models) if batch == 1 else set())
    sizes = {m["model"] for m in document["measurements"] if m["stage"] == "preprocess"}
    assert sizes == {"32"} and len(document["requests"]) == 2 * 2 * 2 * 2 * len(models)


def test_times_stand_beside_what_the_machine_can_do(document: dict[str, Any]) -> None:
    peaks = {peak["dtype"]: peak for peak in document["peaks"]}
    for row in document["measurements"]:
        if row["dtype"] is None:
            assert row["stage"] in ("decode_image", "preprocess") and row["of_peak"] is None
            continue
        peak, seconds = peaks[row["dtype"]], row["ms"]["median"] / 1000
        assert row["of_peak"]["compute"] == pytest.approx(row["macs"] / seconds / peak["macs_per_second"], rel=0.02, abs=1e-3)
        assert row["of_peak"]["memory"] == pytest.approx(row["bytes"] / seconds / peak["bytes_per_second"], rel=0.02, abs=1e-3)
        assert (row["bound"] == "neither") == (max(row["of_peak"].values()) < 1 / 3)
    two, one = (next(m for m in document["measurements"] if (m["stage"], m["batch"]) == ("prefill", b)) for b in (2, 1))
    assert two["macs"] == 2 * one["macs"] and one["bytes"] < two["bytes"] < 2 * one["bytes"], "weights are read once a batch"


def test_requests_are_put_together_from_pieces(document: dict[str, Any]) -> None:
    blocks = {(llm["name"], llm["dtype"]): llm for llm in document["llms"]}
    assert [llm["weights"] for llm in document["llms"]] == ["trained", "random"] * 2
    for row in document["requests"]:
        llm, ms = blocks[row["llm"], row["dtype"]], row["ms"]
        assert row["whole_llm"] == (llm["measured_layers"] == llm["layers"])
        assert row["kv_bytes_per_image"] == row["tokens"] * llm["kv_bytes_per_token"]
        seeing = row["batch"] * (ms["decode_image"] + ms["preprocess"]) + ms["tower"] + ms["projector"]
        assert row["images_per_second"] == pytest.approx(1000 * row["batch"] / seeing, rel=0.01)
        assert row["ttft_from"] == ("measured" if row["batch"] == 1 and not row["compiled"] else "pieces")
        if row["ttft_from"] == "pieces":
            assert ms["ttft"] == pytest.approx(seeing + ms["prefill"], rel=0.01)
        assert row["peak_bytes"] > row["weight_bytes"] > llm["weight_bytes"]
    assert {row["whole_llm"] for row in document["requests"] if row["llm"] == "shape" and row["dtype"] == "float32"} == {False}


def test_saturation_is_where_a_larger_batch_does_no_more() -> None:
    """Ten images a second, 19, 19.8 and 19.9: two at once are enough. Answers: the largest batch still writes a tenth more."""
    about = {"model": "m", "llm": "l", "dtype": "float32", "compiled": False, "tokens": 49}
    rates = {8: (19.9, 110.0), 1: (10.0, 50.0), 4: (19.8, 100.0), 2: (19.0, 90.0)}
    rows = [about | {"batch": batch, "images_per_second": i, "answer_tokens_per_second": a} for batch, (i, a) in rates.items()]
    found = {"images_per_second": 19.9, "images": 2, "answer_tokens_per_second": 110.0, "requests": None}
    assert saturation(rows) == [about | found]
    # two batches do not tell, and another form is another row
    assert saturation([*rows[:2], *(row | {"compiled": True} for row in rows)]) == [about | {"compiled": True} | found]
    # what does less the more there is at once is at its end with one
    falling = [about | {"batch": b, "images_per_second": 10.0 / b, "answer_tokens_per_second": 10.0} for b in (1, 2, 4)]
    assert [(row["images"], row["requests"]) for row in saturation(falling)] == [(1, 1)]


def test_the_tables_say_what_one_must_know(document: dict[str, Any], tmp_path: Path) -> None:
    text = as_markdown(document)
    assert "shape (a shape, 0 M parameters, random weights; measured block by block: 2 of 4 layers), float32, batch of 1" in text
    assert "random weights, which take the same time: vit, vit+pool, 4 tokens" in text
    assert "Where fewer tokens do not help:" in text and "this run is not whole" not in text
    assert len(as_tables(document)) == 2 * 2 * 2 + 2
    assert document["saturation"] == [] and "at saturation" not in text, "two batches do not tell"
    more = {"model": "vit", "llm": "shape", "dtype": "float32", "compiled": True, "tokens": 4}
    more |= {"images_per_second": 19.9, "images": 2, "answer_tokens_per_second": 110.0, "requests": None}
    assert "| shape | float32 | vit, compiled | 4 | 19.9 | 2 | 110 | not reached |" in as_markdown(document | {"saturation": [more]})
    half = as_markdown(document["half"] | {"state": "failed", "problem": "no luck"})
    assert "this run is not whole: failed: no luck" in half
    fewer = [r for r in document["requests"] if (r["llm"], r["batch"]) == ("shape", 2)]
    save(document | {"requests": fewer}, tmp_path)
    plots = sorted(path.name for path in tmp_path.glob("*.png"))
    assert plots == ["cost.shape.bfloat16.2.png", "cost.shape.float32.2.png"]
    assert Image.open(tmp_path / plots[0]).size == (1210, 726)


def test_what_ends_a_run_leaves_what_was_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[dict[str, Any]] = []
    calls = 0

    def interrupted(self: Language, *arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 7:  # one to know the cache, five turns and one for the memory of a prefill: the first token of an answer
            raise error
        return decode(self, *arguments)

    decode = llms.Language.decode
    monkeypatch.setattr(llms.Language, "decode", interrupted)
    for error, state, raised in (  # noqa: B007
        (KeyboardInterrupt(), "interrupted", KeyboardInterrupt),
        (UserError("no more"), "failed", UserError),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "failed", UserError),
        (RuntimeError("a bug"), "failed", RuntimeError),
    ):
        calls = 0
        with pytest.raises(raised):
            measure(settings(), on_document=lambda document: saved.append(json.loads(json.dumps(document))))
        assert saved[-1]["state"] == state
        assert [m["stage"] for m in saved[-1]["measurements"]] == ["decode_image", "preprocess", "tower", "projector", "prefill"]
        assert saved[-1]["requests"] == []


def test_towers_are_measured_optimized(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    optimize, given = SparseFormer.optimize_for_inference, {"models": ("vit", "vit+pool"), "tokens": (4,), "optimized": True}
    monkeypatch.setattr(SparseFormer, "optimize_for_inference", lambda tower: asked.append("once") or optimize(tower))
    assert document_of(**given)["settings"]["optimized"] and asked == ["once"], "both share one tower"
    two, pruned = {"dtypes": ("float32", "bfloat16")}, {"models": ("vit+prune",)}
    refused = {"and --compile": {"compile": True}, "one --dtype": two, "not for cuda": {"device": "cuda"}, r"vit\+prune prunes": pruned}
    for said, changes in refused.items():
        with pytest.raises(UserError, match=said):
            document_of(**given | changes)


def test_a_tower_that_cannot_be_compiled_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import Unsupported

    asked: dict[str, Any] = {}

    def compile(call: Any, **options: Any) -> Any:
        asked.update(options)

        def fail(pixels: torch.Tensor) -> None:
            raise Unsupported("a branch on values\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(UserError, match="--compile: torch could not compile vit \\(.*a branch on values"):
        document_of(compile=True)
    assert asked["fullgraph"], "half compiled is not compiled"


# ---- the command


def test_the_command_leaves_document_tables_and_plots(command: Any, tmp_path: Path) -> None:
    tower, llm = save_tower(tmp_path / "tower"), save_llm(tmp_path / "llm")
    options = ["--batch", "1", "--rounds", "3", "--dtype", "float32", "--threads", "1", "--serving", "--out", str(tmp_path / "out")]
    done = command("bench", "--model", tower, "--llm", llm, "--image", "examples/coffee.jpg", *options)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert written["state"] == "finished" and written["machine"]["threads"] == 1 and written["pictures"][0]["pixels"] == [600, 400]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"bench.json", "cost.llm.float32.1.png", "table.md", LOCK}
    assert "every measurement" in done.stdout and "bound by" in done.stdout and "serving, estimated" in done.stdout
    assert "1000/1000" in done.stderr and "Kineto" not in done.stderr


def test_a_broken_picture_is_one_line_and_an_earlier_document_stays(tmp_path: Path) -> None:
    broken, earlier = tmp_path / "broken.jpg", tmp_path / "bench.json"
    broken.write_bytes((ROOT / "examples" / "coffee.jpg").read_bytes()[:5000])
    earlier.write_text("earlier")
    with pytest.raises(UserError, match=r"^\S*broken.jpg: truncated or damaged image"):
        bench(model=["vit"], llm=["shape"], image=[broken], dtype=["float32"], json_file=str(earlier), prompt_tokens=3, rounds=3, seconds=1)
    assert earlier.read_text() == "earlier"
    with pytest.raises(UserError, match="nothing to measure; name a --model"):
        bench()


def test_ctrl_c_leaves_the_document_and_shows_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "Language", interrupt)
    monkeypatch.setattr(BenchConfig, "copied_bytes", 1 << 20)
    file = tmp_path / "deeper" / "bench.json"
    with pytest.raises(KeyboardInterrupt):
        bench(model=["vit"], llm=["shape"], batch=[1], dtype=["float32"], json_file=str(file), prompt_tokens=3, rounds=3, seconds=1)
    assert json.loads(file.read_text())["state"] == "interrupted"
    assert [path.name for path in file.parent.iterdir()] == ["bench.json"], "nothing half-written"
    shown = capsys.readouterr().out
    assert "tower" in shown and "this run is not whole: interrupted" in shown


def test_a_gpu_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: torch sees no GPU here"):
        measure(dataclasses.replace(settings(), device="cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_is_measured_as_a_cpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MATRIX_SIDES", {"cuda": (1024,)})
    found = document_of(device="cuda", dtypes=("bfloat16",))
    assert found["state"] == "finished" and found["machine"]["accelerator"]["memory_bytes"] > 0
    assert all(row["peak_bytes"] > 0 for row in found["measurements"] if row["stage"] in ("tower", "prefill", "decode"))
