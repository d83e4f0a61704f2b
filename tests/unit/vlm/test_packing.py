"""Batches without padding, or without a mask: losses and gradients are those of padded batches with one."""

from __future__ import annotations

import functools

import pytest
import torch
from tiny_llms import FAMILIES, save_family
from tiny_vlm import picture, save_llm, save_tower, stir
from transformers import modeling_flash_attention_utils as flash_utils

from sparse_vlm.data.samples import Sample
from sparse_vlm.train import parts as training_parts
from sparse_vlm.train.loss_module import Collator, LossModule
from sparse_vlm.train.parts import FLASH, choose_attention, packable, prepare
from sparse_vlm.train.vlm import STAGES
from sparse_vlm.vlm import VLM
from sparse_vlm.vlm.prompts import assistant, user
from sparse_vlm.vlm.tree import collate, is_chain, merge, pack, target_log_probs

TREE = [
    [user("What is it?", 1), assistant("A cat.")],
    [user("What is it?", 1), assistant("A cab"), user("Sure?"), assistant("No.")],
    [user("Why?", 1), assistant("I do not know.")],
]
CHAINS = {
    "a photo": [user("What is it?", 1), assistant("A dog."), user("Where?"), assistant("On the lawn.")],
    "two photos": [user("Compare.", 2), assistant("The first is red, the second blue.")],
    "text": [user("Say yes."), assistant("Yes.")],
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[str, str]:
    """(tower, LLM) folders."""
    folder = tmp_path_factory.mktemp("parts")
    return save_tower(folder / "tower"), save_llm(folder / "llm")


def learning(parts: tuple[str, str]) -> VLM:
    """A VLM whose projector and adapters do something, and learn."""
    vlm = VLM.build(*parts, dtype=torch.float32)
    prepare(vlm, STAGES["instruct"], 2)
    stir(vlm, 0.1)
    vlm.model.train()
    return vlm


def items(vlm: VLM, trees: bool = True) -> list[Sample]:
    """Samples of every kind with their images' tokens; without the tree, plain conversations alone."""
    conversations = {"a tree": TREE} if trees else {}
    conversations |= {name: [example] for name, example in CHAINS.items()}
    pictures = torch.stack([vlm.tower.visual_tokens(pixels(vlm, colour))[0] for colour in ("red", "blue")])
    made = []
    for name, examples in conversations.items():
        shown = 2 if name == "two photos" else 0 if name == "text" else 1
        tree = merge([vlm.renderer.render(example) for example in examples])
        made.append(Sample(name, tuple(range(shown)), tree, tuple(pictures[:shown].detach())))
    return made


def pixels(vlm: VLM, colour: str) -> torch.Tensor:
    return vlm.processor.image_processor([picture(colour)])["pixel_values"]


def step(vlm: VLM, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A batch's loss and gradients."""
    vlm.model.zero_grad(set_to_none=True)
    loss = LossModule(vlm)(batch["trees"], batch["images"], batch["chains"])["loss"]
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in vlm.model.named_parameters() if p.grad is not None}


def assert_same(found: tuple, wanted: tuple) -> None:
    torch.testing.assert_close(found[0], wanted[0])
    assert found[1].keys() == wanted[1].keys() and {name.split(".")[1] for name in found[1]} == {"multi_modal_projector", "language_model"}
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_conversations_need_no_mask_under_sdpa(parts):
    """Padding stands last, where the causal mask that SDPA's flash kernel has hides it."""
    vlm = learning(parts)
    vlm.model.model.language_model.set_attn_implementation("sdpa")
    batch = Collator(vlm)(items(vlm, trees=False))
    assert batch["chains"] and batch["trees"].lengths == ()
    seen = []
    hook = vlm.model.model.language_model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, options: seen.append(options["attention_mask"]), with_kwargs=True
    )
    found = step(vlm, batch)
    hook.remove()
    assert seen == [None]
    assert_same(found, step(vlm, {**batch, "chains": False}))


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False):
    """What `flash_attn_varlen_func` of flash-attn computes: (S, H, d), each sequence alone."""
    assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
    lengths = cu_seqlens_q.diff().tolist()
    assert sum(lengths) == len(q) and max(lengths) == max_seqlen_q == max_seqlen_k
    sides = zip(*(side.transpose(0, 1)[None].split(lengths, dim=2) for side in (q, k, v)), strict=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    return torch.cat([attend(*side, is_causal=True, scale=softmax_scale, enable_gqa=True)[0] for side in sides], 1).transpose(0, 1)


def test_flash_attention_is_given_conversations_without_padding(parts, monkeypatch):
    """Its kernel is not here; a function that computes the same stands in its place, behind transformers' own code."""
    vlm = learning(parts)
    language = vlm.model.model.language_model
    language.set_attn_implementation("eager")
    wanted = step(vlm, Collator(vlm)(items(vlm, trees=False)))
    calls = []

    @functools.wraps(varlen)  # transformers asks it which arguments it takes
    def counted(*args, **options):
        calls.append(len(args[0]))
        return varlen(*args, **options)

    rest = 3 if hasattr(flash_utils, "_flash_with_kvcache_fn") else 2  # the first releases of transformers 5 know one function less
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *args, **options: (None, counted, *[None] * rest))
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    language.config._attn_implementation = FLASH
    batch = Collator(vlm)(items(vlm, trees=False))
    tokens = sum(batch["trees"].lengths)
    assert_same(step(vlm, batch), wanted)
    assert calls == [tokens] * 2, "once a layer, and no padding"
    mixed = Collator(vlm)(items(vlm))
    assert mixed["trees"].lengths == (), "trees have a mask of their own"
    step(vlm, mixed)
    assert len(calls) == 2 and language.config._attn_implementation == "sdpa"


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama-2", "qwen3", "phi3", "gemma3", "smollm3"])
def test_no_family_needs_a_mask_under_sdpa(parts, tmp_path, family):
    vlm = VLM.build(parts[0], save_family(FAMILIES[family], tmp_path / "llm"), dtype=torch.float32)
    language = vlm.model.model.language_model
    assert packable(language)
    language.set_attn_implementation("sdpa")
    trees = [merge(vlm.renderer.renderings(example)) for example in (CHAINS["a photo"], CHAINS["text"])]
    if not all(map(is_chain, trees)):
        pytest.skip("its template forgets what was said before, so that a conversation is a tree")
    batch, features = collate(trees, vlm.tokenizer.pad_token_id), vlm.image_features([picture("red")])
    plain = target_log_probs(vlm.model, batch, features, plain_causal=True)
    torch.testing.assert_close(plain, target_log_probs(vlm.model, batch, features))


def test_a_tree_is_not_packed(parts):
    vlm = learning(parts)
    with pytest.raises(ValueError, match="only single conversations"):
        pack([sample.tree for sample in items(vlm)])


def test_models_with_a_memory_of_their_own_are_padded(parts, monkeypatch):
    """As nothing keeps a recurrence from going on into the next conversation of a row."""
    vlm = learning(parts)
    language = vlm.model.model.language_model
    monkeypatch.setattr(type(vlm.model), "device", torch.device("cuda"))
    monkeypatch.setattr(training_parts, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(training_parts, "computes_in_bfloat16", lambda vlm: True)
    monkeypatch.setattr(type(language), "set_attn_implementation", lambda self, name: setattr(self.config, "_attn_implementation", name))

    def chosen() -> str:
        choose_attention(vlm)
        return language.config._attn_implementation

    assert chosen() == FLASH
    monkeypatch.setattr(language.config, "layer_types", ["full_attention", "linear_attention"], raising=False)
    assert chosen() == "sdpa"
    monkeypatch.setattr(language.config, "layer_types", ["full_attention", "sliding_attention"])
    assert chosen() == FLASH
    monkeypatch.setattr(type(language), "_is_stateful", True)
    assert chosen() == "sdpa"
