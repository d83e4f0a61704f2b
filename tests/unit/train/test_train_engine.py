"""How a VLM is trained: a tower that learns, quantised LLMs, steps that are not finite, what is told of a run; in one process."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
import torch
from tiny_vlm import ask, picture, save_llm, save_tower
from transformers import TrainerState

from sparse_vlm.cli.train import train as train_command
from sparse_vlm.data.conversations import Example
from sparse_vlm.data.dataset import ConversationDataset
from sparse_vlm.data.samples import FeatureCache, arrange, build_samples
from sparse_vlm.errors import UserError
from sparse_vlm.hub.zoo import describe_folder
from sparse_vlm.images.photos import Photo
from sparse_vlm.train.cost import token_cost
from sparse_vlm.train.finite import FiniteSteps, NotFinite
from sparse_vlm.train.loss_module import Collator, LiveImages, LossModule, VLMTrainer
from sparse_vlm.train.parts import choose_attention, prepare, save_memory
from sparse_vlm.train.run import check_reporters
from sparse_vlm.train.vlm import STAGES, Engine, Stage, train
from sparse_vlm.vlm import VLM
from sparse_vlm.vlm.prompts import assistant, user
from sparse_vlm.vlm.quantize import quantization
from sparse_vlm.vlm.tree import collate, is_chain, merge, target_log_probs

COLOURS = ("red", "blue", "green", "yellow")
LEARNS = Stage(lr_projector=1e-2, lr_lora=1e-2, lr_full=1e-2, lr_tower_lora=1e-2, lr_tower_full=1e-3, batch_size=4)
TOWERS = {"tuned": {"tune_tower": True}, "adapters": {"tower_rank": 2}}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[str, str]:
    """(tower, LLM) folders."""
    folder = tmp_path_factory.mktemp("parts")
    return save_tower(folder / "tower"), save_llm(folder / "llm")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Photo]:
    folder = tmp_path_factory.mktemp("photos")
    for colour in COLOURS:
        picture(colour).save(folder / f"{colour}.png")
    return [Photo(f"{colour}.png", folder / f"{colour}.png", 0, (folder / f"{colour}.png").stat().st_size, {}) for colour in COLOURS]


def talks_about(photos, visits: int) -> ConversationDataset:
    """A question about each photo, and one about none."""
    examples = []
    for visit in range(visits):
        for photo in photos:
            colour = photo.key.removesuffix(".png")
            examples.append(Example(f"{colour} {visit}", (photo,), ((user("What color is it?", 1), assistant(f"It is {colour}.")),)))
    return ConversationDataset.of(examples)


def learn(parts, photos, out, stage=LEARNS, rank=2, visits=8, init=None, engine=None, **tower) -> tuple[VLM, bool]:
    """A short run as the command makes it."""
    vlm = VLM.from_pretrained(init, dtype=torch.float32, fold=False) if init else VLM.build(*parts, dtype=torch.float32)
    samples = arrange(build_samples(talks_about(photos, visits), vlm.renderer), stage.batch_size)
    groups = prepare(vlm, stage, rank, **tower)
    if tower:
        features_cache = LiveImages(vlm.tower.config, samples.examples.photos)
    else:
        features_cache = FeatureCache(out.parent / "cache", vlm.tower, samples.examples.photos)
        features_cache.fill(range(len(samples.examples.photos)))
    return vlm, train(vlm, groups, stage, samples.with_images(features_cache), out, {"stage": "test"}, engine=engine or Engine())


def losses(folder) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "training.json").read_text())["history"] if "loss" in entry]


# ---- a tower that learns


@pytest.mark.parametrize("held", TOWERS)
def test_a_tower_learns_and_its_folder_holds_it(parts, photos, tmp_path, held):
    before = VLM.build(*parts, dtype=torch.float32).tower.state_dict()
    vlm, complete = learn(parts, photos, tmp_path / "run", **TOWERS[held])
    assert complete and losses(tmp_path / "run")[-1] < 0.9 * losses(tmp_path / "run")[0]
    changed = {name for name, tensor in vlm.tower.state_dict().items() if name in before and not torch.equal(tensor, before[name])}
    if held == "tuned":
        # not the head, which no LLM reads, nor where tokens would look after the last unit
        assert {"feat_extractor.conv1.weight", "initial_roi.weight", "layers.0.attn.qkv.weight", "norm.weight"} <= changed
        assert not {name for name in changed if name.startswith("proj.")}
    else:
        assert not changed, "adapters lie beside the tower's weights"
    described = json.loads((tmp_path / "run" / "vlm.json").read_text())
    assert described["holds"] == {"tower": held, "projector": "trained", "llm": "adapters"}
    shown = describe_folder(tmp_path / "run")
    assert {part: about["how"] for part, about in shown.items()} == described["holds"]
    assert shown["tower"]["parameters"] == sum(
        parameter.numel() for name, parameter in vlm.tower.named_parameters() if held == "tuned" or "lora_" in name
    )

    conversation = ask("What color is it?", picture("red"))
    said = vlm.score([conversation], [["It is red."]])[0][0].total
    plain = VLM.build(*parts, dtype=torch.float32)
    for fold in (True, False):
        loaded = VLM.from_pretrained(tmp_path / "run", dtype=torch.float32, fold=fold)
        assert loaded.score([conversation], [["It is red."]])[0][0].total == pytest.approx(said, abs=1e-3)
        pixels = loaded.processor.image_processor([picture("red")])["pixel_values"]
        with torch.no_grad():
            assert not torch.allclose(loaded.tower.visual_tokens(pixels), plain.tower.visual_tokens(pixels), atol=1e-3)
        loaded.save_pretrained(tmp_path / "again")
        for path in (tmp_path / "again").rglob("*.*"):
            assert path.read_bytes() == (tmp_path / "run" / path.relative_to(tmp_path / "again")).read_bytes(), path


def test_a_live_tower_at_no_rate_is_a_cached_one(parts, photos, tmp_path):
    """Pixels through the tower give the losses that its cached tokens give, which are bfloat16."""
    still = Stage(lr_projector=1e-2, lr_lora=None, lr_full=None, lr_tower_full=0.0, batch_size=4)
    learn(parts, photos, tmp_path / "live", still, tune_tower=True, visits=2)
    learn(parts, photos, tmp_path / "cached", still, visits=2)
    assert losses(tmp_path / "live") == pytest.approx(losses(tmp_path / "cached"), rel=2e-3)


def test_an_interrupted_run_with_a_tuned_tower_goes_on_exactly(parts, photos, tmp_path, monkeypatch):
    import os
    import signal

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    straight, _ = learn(parts, photos, tmp_path / "a" / "run", rank=None, tune_tower=True)
    steps, original = [], VLMTrainer.compute_loss

    def interrupting(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(VLMTrainer, "compute_loss", interrupting)
    _, complete = learn(parts, photos, tmp_path / "b" / "run", rank=None, tune_tower=True)
    assert not complete and len(steps) == 3
    resumed, complete = learn(parts, photos, tmp_path / "b" / "run", rank=None, tune_tower=True)
    assert complete and len(steps) == 8
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    # all of it was trained, and all of it is in the folder
    loaded = VLM.from_pretrained(tmp_path / "b" / "run", dtype=torch.float32)
    assert (loaded.llm_changed, loaded.tower_changed) == (True, True)
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_a_folder_without_what_it_says_it_holds_is_one_line(parts, photos, tmp_path):
    learn(parts, photos, tmp_path / "run", visits=1, tower_rank=2)
    (tmp_path / "run" / "tower_adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"tower_adapter.adapter_model\.safetensors: cannot be read"):
        VLM.from_pretrained(tmp_path / "run")


def test_adapters_and_full_training_of_one_tower_exclude_each_other(parts):
    vlm = VLM.build(*parts, dtype=torch.float32)
    prepare(vlm, LEARNS, 2, tower_rank=2)
    with pytest.raises(UserError, match="--tune-tower: .* go on with --tower-lora"):
        prepare(vlm, LEARNS, 2, tune_tower=True)
    vlm = VLM.build(*parts, dtype=torch.float32)
    prepare(vlm, LEARNS, 2, tune_tower=True)
    with pytest.raises(UserError, match="--tower-lora: .* go on with --tune-tower"):
        prepare(vlm, LEARNS, 2, tower_rank=2)


@pytest.mark.parametrize("held", [None, *TOWERS])
def test_groups_cover_every_parameter_once(parts, held):
    vlm = VLM.build(*parts, dtype=torch.float32)
    groups = prepare(vlm, STAGES["instruct"], None, **TOWERS.get(held, {}))
    listed = [id(parameter) for group in groups for parameter in group.parameters]
    assert sorted(listed) == sorted({id(parameter) for parameter in vlm.model.parameters()})
    rates = {group.name: group.lr for group in groups if group.lr is not None}
    tower = {"tuned": {"tower": 2e-5}, "adapters": {"tower adapters": 2e-4}}.get(held, {})
    assert rates == {**tower, "projector": 5e-4, "LLM": 5e-5}


# ---- memory, attention


def gradients(vlm, batch) -> dict[str, torch.Tensor]:
    vlm.model.train()
    LossModule(vlm)(**{name: value for name, value in batch.items() if name != "names"})["loss"].backward()
    found = {name: parameter.grad for name, parameter in vlm.model.named_parameters() if parameter.grad is not None}
    vlm.model.zero_grad(set_to_none=True)
    return found


def test_activations_computed_again_give_the_same_gradients(parts, photos):
    vlm = VLM.build(*parts, dtype=torch.float32)
    samples = build_samples(talks_about(photos, 1), vlm.renderer)
    prepare(vlm, LEARNS, 2, tune_tower=True)
    images = samples.with_images(LiveImages(vlm.tower.config, samples.examples.photos))
    batch = Collator(vlm)([images[i] for i in range(4)])
    kept = gradients(vlm, batch)
    assert {name.split(".")[1] for name in kept} == {"vision_tower", "multi_modal_projector", "language_model"}
    save_memory(vlm)
    passes = []
    units = [vlm.tower.layers[0], vlm.model.model.language_model.layers[0].mlp]
    for unit in units:
        unit.register_forward_pre_hook(lambda *_: passes.append(1))
    again = gradients(vlm, batch)
    assert len(passes) == 4, "each ran twice"
    assert kept.keys() == again.keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(again[name], gradient, msg=name)


@torch.no_grad()
def test_single_conversations_need_no_mask_of_their_own(parts):
    """What SDPA's flash kernel and flash-attention are given, which take the LLM's own causal mask alone."""
    vlm = VLM.build(*parts, dtype=torch.float32)
    rendered = [vlm.renderer.render([user("Why?"), assistant(answer)]) for answer in ("No.", "Yes, it is.")]
    chains = [merge([one]) for one in rendered]
    assert all(map(is_chain, chains)) and not is_chain(merge(rendered))
    batch = collate(chains, vlm.tokenizer.pad_token_id)
    whole = target_log_probs(vlm.model, batch, None)
    torch.testing.assert_close(target_log_probs(vlm.model, batch, None, plain_causal=True), whole)


def test_which_attention_runs_is_said(parts, monkeypatch):
    from sparse_vlm.train import parts as training_parts

    vlm = VLM.build(*parts, dtype=torch.bfloat16)
    assert choose_attention(vlm).startswith("plain") and not LossModule(vlm)._attend(chains=True)
    monkeypatch.setattr(type(vlm.model), "device", torch.device("cuda"))
    assert choose_attention(vlm).startswith("SDPA")
    assert LossModule(vlm)._attend(chains=True) and not LossModule(vlm)._attend(chains=False)
    monkeypatch.setattr(training_parts, "is_flash_attn_2_available", lambda: True)
    language = vlm.model.model.language_model
    monkeypatch.setattr(type(language), "set_attn_implementation", lambda self, name: setattr(self.config, "_attn_implementation", name))
    assert choose_attention(vlm).startswith("flash-attention 2 for single conversations, packed without padding; SDPA")
    learner = LossModule(vlm)
    assert learner._attend(chains=True) and language.config._attn_implementation == "flash_attention_2"
    assert not learner._attend(chains=False) and language.config._attn_implementation == "sdpa"
    assert learner._attend(chains=True)


# ---- a batch in parts


def talkative(photos) -> ConversationDataset:
    """Samples of one to four questions, and one without a photo in each four."""
    said = lambda colour: (user("And?"), assistant(f"It is {colour}."))  # noqa: E731
    examples = []
    for number in range(16):
        photo = photos[number % 4]
        colour = photo.key.removesuffix(".png")
        shown = (photo,) if number % 4 else ()
        turns = (user("What color is it?", len(shown)), assistant(f"It is {colour}."), *said(colour) * (number % 4))
        examples.append(Example(f"{colour} {number}", shown, (turns,)))
    return ConversationDataset.of(examples)


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_batch_in_parts_teaches_what_the_whole_does(parts, photos, tmp_path, monkeypatch, at_once):
    """Each target counts the same, in whichever part it is, also where parts have several times as many as others."""
    sizes, gradients, original = [], [], LossModule.forward

    def forward(self, trees, *args, **kwargs):
        sizes.append(len(trees.input_ids))
        return original(self, trees, *args, **kwargs)

    def before_update(self, args, state, control, optimizer, **kwargs):
        gradients.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    monkeypatch.setattr(LossModule, "forward", forward)
    monkeypatch.setattr(FiniteSteps, "on_pre_optimizer_step", before_update)
    for part in (4, at_once):
        vlm = VLM.build(*parts, dtype=torch.float32)
        samples = build_samples(talkative(photos), vlm.renderer)
        features_cache = FeatureCache(tmp_path / "cache", vlm.tower, samples.examples.photos)
        features_cache.fill(range(len(samples.examples.photos)))
        groups = prepare(vlm, LEARNS, 2)
        out = tmp_path / f"run {part}"
        assert train(vlm, groups, LEARNS, samples.with_images(features_cache), out, {"stage": "test"}, engine=Engine(at_once=part))
    assert sizes == [4] * 4 + [at_once] * (16 // at_once)
    assert losses(tmp_path / f"run {at_once}") == pytest.approx(losses(tmp_path / "run 4"), rel=1e-3)
    assert len(gradients) == 8, "one update a step"
    for whole, in_parts in zip(gradients[0], gradients[4], strict=True):
        torch.testing.assert_close(in_parts, whole, atol=1e-6, rtol=1e-4)


def test_parts_of_a_batch(parts, photos, tmp_path):
    """Four photos at once at most on a CPU, all on a GPU and under DeepSpeed; what was asked for if it divides the batch."""
    assert [Engine().part(size, "cpu") for size in (16, 6, 7, 3, 2, 1)] == [4, 3, 1, 3, 2, 1]
    assert Engine().part(16, "cuda") is None and Engine(deepspeed={}).part(16, "cpu") is None
    assert Engine(at_once=8).part(16, "cpu") == Engine(at_once=8).part(16, "cuda") == 8
    with pytest.raises(UserError, match="4 of a batch in each process cannot be computed 3 at once; take a number that divides 4"):
        learn(parts, photos, tmp_path / "run", engine=Engine(at_once=3))


# ---- steps that are not finite


def spoil(monkeypatch, bad: set[int], gradient: bool = False) -> None:
    """Make the loss of some steps, by their numbers from 1, not a number; or their gradient alone."""
    count, original = [], LossModule.forward

    def forward(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        count.append(1)
        if len(count) in bad and gradient:
            out["loss"].register_hook(lambda grad: grad * torch.nan)
        elif len(count) in bad:
            out["loss"] = out["loss"] * torch.nan
        return out

    monkeypatch.setattr(LossModule, "forward", forward)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_step_that_is_not_finite_teaches_nothing_and_is_counted(parts, photos, tmp_path, monkeypatch, capsys, gradient):
    spoil(monkeypatch, {2, 3, 5}, gradient)
    vlm, complete = learn(parts, photos, tmp_path / "run")
    assert complete and all(torch.isfinite(parameter).all() for parameter in vlm.model.parameters())
    history = json.loads((tmp_path / "run" / "training.json").read_text())["history"]
    bad = [entry for entry in history if "not_finite" in entry]
    assert [entry["step"] for entry in bad] == [2, 3, 5] and all(len(entry["samples"]) == 4 for entry in bad)
    assert "3 of 8 steps were not finite and taught nothing" in capsys.readouterr().err


def test_a_part_that_is_not_finite_leaves_out_its_whole_step(parts, photos, tmp_path, monkeypatch):
    vlm = VLM.build(*parts, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in vlm.projector.state_dict().items()}
    spoil(monkeypatch, {1, 4})  # the first part of the first step of two, and the last one of the second
    vlm, complete = learn(parts, photos, tmp_path / "run", visits=2, engine=Engine(at_once=2))
    assert complete
    history = json.loads((tmp_path / "run" / "training.json").read_text())["history"]
    bad = [entry for entry in history if "not_finite" in entry]
    assert [entry["step"] for entry in bad] == [1, 2] and all(len(entry["samples"]) == 4 for entry in bad)
    for name, tensor in vlm.projector.state_dict().items():
        assert torch.equal(tensor, before[name]), name


class Engines:
    """What accelerate puts around DeepSpeed's optimizer."""

    step_was_skipped = False


def test_what_deepspeed_leaves_out_is_counted_and_named(capsys):
    """Its engine has updated, or not, when a step ends; with gradients of other parts at hand, a loss goes through it as it is."""
    finite, optimizer, state = FiniteSteps(3, engine=True, in_parts=True), Engines(), TrainerState(global_step=7)
    for loss, skipped in ((1.0, False), (1.0, True), (torch.nan, True)):
        finite.check(torch.tensor(1.0), ["a"])
        finite.check(torch.tensor(loss), ["b"])
        optimizer.step_was_skipped = skipped
        finite.on_step_end(None, state, None, optimizer=optimizer)
    assert [entry["not_finite"] for entry in state.log_history] == ["gradient is not finite", "loss is not finite"]
    assert all(entry["samples"] == ["a", "b"] for entry in state.log_history)
    assert "step 7: the loss is not finite, no update (a, b)" in capsys.readouterr().err
    finite.check(torch.tensor(torch.nan), ["c"])
    optimizer.step_was_skipped = False
    with pytest.raises(UserError, match="DeepSpeed did not leave out the step: the weights are spoilt"):
        finite.on_step_end(None, state, None, optimizer=optimizer)


def test_a_loss_that_is_not_finite_stays_out_of_the_engine_where_it_is_the_whole_step():
    finite = FiniteSteps(3, engine=True)
    with pytest.raises(NotFinite):
        finite.check(torch.tensor(torch.nan), ["a"])
    optimizer = Engines()
    finite.on_step_end(None, state := TrainerState(global_step=1), None, optimizer=optimizer)
    assert [entry["not_finite"] for entry in state.log_history] == ["loss is not finite"]


def test_several_in_a_row_end_the_run_and_leave_its_checkpoint(parts, photos, tmp_path, monkeypatch):
    spoil(monkeypatch, {5, 6, 7})
    with pytest.raises(UserError, match="3 steps in a row were not finite") as raised:
        learn(parts, photos, tmp_path / "run")
    names = re.findall(r"(?:red|blue|green|yellow) \d", str(raised.value))
    assert len(names) == 12 and "step 5: " in str(raised.value)
    monkeypatch.undo()
    _, complete = learn(parts, photos, tmp_path / "run")
    assert complete, "it goes on from its last checkpoint"


# ---- quantised


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_adapters_are_trained_on_a_quantised_llm(parts, photos, tmp_path, bits):
    pytest.importorskip("bitsandbytes", reason="weights of 4 and 8 bits need bitsandbytes")
    vlm = VLM.build(*parts, dtype=torch.float32, quantize=bits)
    layer = vlm.model.model.language_model.layers[0].mlp.up_proj
    assert layer.weight.dtype == {"4bit": torch.uint8, "8bit": torch.int8}[bits]
    samples = arrange(build_samples(talks_about(photos, 8), vlm.renderer), 4)
    with pytest.raises(UserError, match=f"an LLM in {bits} cannot be trained itself"):
        prepare(vlm, LEARNS, None)
    groups = prepare(vlm, LEARNS, 2)
    features_cache = FeatureCache(tmp_path / "cache", vlm.tower, samples.examples.photos)
    features_cache.fill(range(4))
    zero3 = Engine(deepspeed={"zero_optimization": {"stage": 3}})
    with pytest.raises(UserError, match=f"ZeRO-3 cannot share weights in {bits}"):
        train(vlm, groups, LEARNS, samples.with_images(features_cache), tmp_path / "run", {"stage": "test"}, engine=zero3)
    assert train(vlm, groups, LEARNS, samples.with_images(features_cache), tmp_path / "run", {"stage": "test"})
    assert losses(tmp_path / "run")[-1] < 0.9 * losses(tmp_path / "run")[0]
    # one folder, for the LLM as it is and for any format
    conversation = ask("What color is it?", picture("red"))
    scores = [
        VLM.from_pretrained(tmp_path / "run", dtype=torch.float32, quantize=quantize).score([conversation], [["It is red."]])[0][0].mean
        for quantize in (bits, None)
    ]
    assert scores[0] == pytest.approx(vlm.score([conversation], [["It is red."]])[0][0].mean, abs=1e-2)
    assert scores[1] == pytest.approx(scores[0], abs=0.5)


def test_what_cannot_be_quantised_is_one_line(parts, photos, tmp_path, monkeypatch):
    learn(parts, photos, tmp_path / "run", rank=None, visits=1)
    with pytest.raises(UserError, match="its LLM was fully fine-tuned"):
        VLM.from_pretrained(tmp_path / "run", quantize="4bit")
    with pytest.raises(UserError, match="quantize 2bit: no such format; known are 4bit, 8bit"):
        quantization("2bit", torch.bfloat16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'sparse-vlm\[quantize\]'"):
        quantization("4bit", torch.bfloat16)


# ---- what is told


def test_tensorboard_is_told(parts, photos, tmp_path):
    pytest.importorskip("tensorboard", reason="a curve in TensorBoard needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    learn(parts, photos, tmp_path / "run", visits=2, engine=Engine(report_to=("tensorboard",)))
    told = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.value for event in told.Scalars("train/loss")] == pytest.approx(losses(tmp_path / "run"), rel=1e-4)


def test_weights_and_biases_is_told(parts, photos, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="a curve at Weights & Biases needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    learn(parts, photos, tmp_path / "run", visits=2, engine=Engine(report_to=("wandb",)))
    wandb.finish()
    (log,) = [path for path in tmp_path.rglob("*.wandb") if not path.parent.is_symlink()]
    told = log.read_bytes()
    assert told.count(b"train/loss") >= len(losses(tmp_path / "run")) and b"sparse-vlm" in told


def test_who_cannot_be_told_is_one_line(monkeypatch):
    with pytest.raises(UserError, match="--report-to paper: unknown; known are tensorboard, wandb"):
        check_reporters(["paper"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--report-to wandb: wandb is not installed; pip install wandb"):
        check_reporters(["wandb"])


def test_what_data_costs_in_tokens(parts, photos):
    vlm = VLM.build(*parts, dtype=torch.float32)
    examples = [*talks_about(photos, 1), Example("text", (), ((user("Say yes."), assistant("Yes.")),))]
    examples.append(Example("two", tuple(photos[:2]), ((user("Compare them.", 2), assistant("They differ.")),)))
    samples = build_samples(ConversationDataset.of(examples), vlm.renderer)
    cost = token_cost(samples, samples.lengths, 3, vlm.tokens_per_image)
    assert (cost.samples, cost.image) == (6, (pytest.approx(5 * (4 + 2) / 6), 10))
    whole = [len(sample.tree) for sample in samples]
    assert cost.image[0] + cost.text[0] == pytest.approx(sum(whole) / 6)
    places = 3 * max(whole[:3]) + 3 * max(whole[3:])
    assert cost.padding == pytest.approx(1 - sum(whole) / places)
    assert cost.targets[1] == len("It is yellow.") + 1, "every byte is a token, and one ends the answer"
    assert f"images are {cost.image_share:.0%} of the tokens" in cost.lines()[1]


def test_the_command_refuses_what_contradicts_itself(tmp_path):
    def run(**options):
        train_command(data=["x"], out=tmp_path / "out", **options)

    with pytest.raises(UserError, match="--tune-tower and --tower-lora: .* not both"):
        run(stage="instruct", tune_tower=True, tower_lora=4)
    with pytest.raises(UserError, match="--tune-tower.* stage read"):
        run(stage="read", tune_tower=True)
    with pytest.raises(UserError, match="--lr-tower: the tower is frozen"):
        run(stage="instruct", lr_tower=1e-4)
