"""Any family of language models: its chat template and tokenizer give the right label mask, its embeddings the image token, and the stock
LLaVA model on it says, saves and loads what it should."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from tiny_llms import FAMILIES, save_family, save_family_tokenizer
from tiny_vlm import ask, picture, save_tower
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from sparse_vlm.errors import UserError
from sparse_vlm.vlm import VLM
from sparse_vlm.vlm.llm import load_llm
from sparse_vlm.vlm.prompts import Rendered, Renderer, add_image_token, assistant, extend_template, user
from sparse_vlm.vlm.tree import collate, merge, target_log_probs

pytest.importorskip("sentencepiece", reason="a SentencePiece model is trained for some families")

TALK = [user("What is it?", 1), assistant("A cat."), user("Sure?"), assistant("Yes")]
# Those whose own text refuses a first message of the system's.
WITHOUT_SYSTEM = {"gemma2": "System role not supported", "mistral": "Conversation roles must alternate"}


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> str:
    return save_tower(tmp_path_factory.mktemp("parts") / "tower")


@pytest.fixture
def renderer(request, tmp_path) -> Renderer:
    family = FAMILIES[request.param]
    save_family_tokenizer(family, tmp_path / "llm")
    (tmp_path / "llm" / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    assert tokenizer.is_fast == (family.kind != "slow")
    add_image_token(tokenizer)
    return Renderer(tokenizer, extend_template(tokenizer.chat_template, None), 3)


def every_family(function):
    return pytest.mark.parametrize("renderer", FAMILIES, indirect=True)(function)


def runs(renderer: Renderer, rendered: Rendered) -> list[list[str]]:
    """The tokens of each run that carries loss."""
    found: list[list[str]] = []
    for i, carries in enumerate(rendered.supervised):
        if carries and not (i and rendered.supervised[i - 1]):
            found.append([])
        if carries:
            found[-1].append(renderer.tokenizer.convert_ids_to_tokens(rendered.ids[i]))
    return found


def words(tokens: list[str]) -> str:
    """Tokens as text, without the blank that stands before a first word."""
    return "".join(tokens).replace("▁", " ").replace("Ġ", " ").strip()


@every_family
def test_exactly_what_the_assistant_says_carries_loss(renderer):
    end = renderer.tokenizer.convert_ids_to_tokens(renderer.end_id())
    seen = []
    for rendered in renderer.renderings(TALK):
        assert list(rendered.ids) == renderer.tokens(renderer.text(TALK[: 2 * len(seen) + 2] if not renderer.keeps_history else TALK))
        said = runs(renderer, rendered)
        seen += said
        # a model is trained to say it after the very tokens that it is asked with
        asked = renderer.tokens(renderer.text(TALK[: 2 * len(seen) - 1], answer_next=True))
        start = len(rendered.ids) - rendered.supervised[::-1].index(True) - len(said[-1])
        assert list(rendered.ids[:start]) == asked
    assert [words(tokens).replace(f" {end}", end) for tokens in seen] == [f"A cat.{end}", f"Yes{end}"]
    assert [tokens.count(end) for tokens in seen] == [1, 1]


@every_family
def test_the_prompt_brings_no_thought_and_no_second_picture(renderer):
    text = renderer.text(TALK[:3], answer_next=True)
    assert text.count("<image>") == 1
    assert renderer.tokens(text).count(renderer.image_id) == 3
    assert "/think" not in text.replace("</think>", "")
    assert renderer.render(TALK[:2]).supervised.count(True) < 12


@every_family
def test_words_that_spell_control_tokens_are_words(renderer, request):
    """They begin and end no turn, change no token around them, and are refused where they would be learnt."""
    tokenizer = renderer.tokenizer
    name = request.node.callspec.params["renderer"]
    marks = [*FAMILIES[name].special, "<image>"]
    control = tokenizer.convert_tokens_to_ids(marks)

    def asked(text: str) -> list[int]:
        example = [user("What is it?", 1), assistant(text), {"role": "user", "content": [{"type": "text", "text": text}]}]
        return renderer.tokens(renderer.text(example, answer_next=True))

    plain = asked("a b")
    for mark in [*marks, "".join(marks), marks[0] * 3]:
        ids = asked(f"a {mark} b")
        assert [token for token in ids if token in control] == [token for token in plain if token in control], mark
        # SentencePiece itself shows bytes as such, and puts a blank after whatever stands apart
        shown = re.sub(r"<0x(\w\w)>", lambda byte: chr(int(byte[1], 16)), tokenizer.decode(ids)).replace("  b", " b")
        assert shown.count(f"a {mark} b") == 2, mark
        assert renderer.render([user(f"a {mark} b"), assistant(f"b {mark}")], to_learn=False).supervised.count(True) > 1
        with pytest.raises(UserError, match="photo 7: (a user message|the assistant's turn 1) contains the text '"):
            renderer.render([user("What?"), assistant(f"a {mark} b")], "photo 7")
        with pytest.raises(UserError, match="photo 7: a user message contains the text '.*; leave it out"):
            renderer.renderings([user(f"a {mark} b"), assistant("Yes")], "photo 7")
    # nor where two texts spell one together, and where somebody spells what we make of them
    first, rest = marks[0][:2], marks[0][2:]
    example = [{"role": "user", "content": [{"type": "text", "text": first}, {"type": "text", "text": rest}]}]
    forged = [user(f"{marks[0][0]}\ue000{marks[0][1:]}")]
    empty = renderer.tokens(renderer.text([user("a")], answer_next=True)).count(control[0])
    for one in (example, forged):
        assert renderer.tokens(renderer.text(one, answer_next=True)).count(control[0]) == empty


@every_family
def test_system_messages(renderer, request):
    example = [{"role": "system", "content": "Be brief."}, *TALK[:2]]
    name = request.node.callspec.params["renderer"]
    if name in WITHOUT_SYSTEM:
        with pytest.raises(UserError, match=f"refuses a conversation of system, user.*{WITHOUT_SYSTEM[name]}"):
            renderer.render(example)
    else:
        [said] = runs(renderer, renderer.render(example))
        assert words(said).startswith("A cat.")
        assert "Be brief." in renderer.text(example)


@pytest.mark.parametrize("renderer", ["qwen3"], indirect=True)
def test_a_history_without_thoughts_is_learnt_turn_by_turn(renderer):
    """Qwen3 opens an answer with an empty thought and leaves it out of later turns' history, so no one text holds every turn's prompt."""
    assert not renderer.keeps_history
    with pytest.raises(UserError, match="changes the text before the assistant's turn 1, whose prompt ends with .*</think>"):
        renderer.render(TALK)
    first, second = renderer.renderings(TALK)
    assert renderer.tokenizer.decode(first.ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nA cat.<|im_end|>\n")
    assert renderer.tokenizer.decode(second.ids).endswith(
        "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nYes<|im_end|>\n"
    )


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gemma2"])
def test_stock_llava_on_every_family(name, tower, tmp_path):
    family = FAMILIES[name]
    llm = save_family(family, tmp_path / "llm")
    before = AutoModelForCausalLM.from_pretrained(llm)
    vlm = VLM.build(tower, llm, dtype=torch.float32)
    assert type(vlm.model) is LlavaForConditionalGeneration

    # embeddings: old rows as they were, the image token's the mean of those that tokens have, in the output layer too
    old, new = before.get_input_embeddings().weight, vlm.model.get_input_embeddings().weight
    image_id, rows = vlm.renderer.image_id, len(old)
    assert (len(new) == rows) == (family.spare > 0)
    assert new is vlm.model.lm_head.weight if family.tied else new is not vlm.model.lm_head.weight
    for was, is_now in ((old, new), (before.get_output_embeddings().weight, vlm.model.lm_head.weight)):
        kept = torch.arange(rows) != image_id
        assert torch.equal(is_now[:rows][kept], was[kept])
        torch.testing.assert_close(is_now[image_id], was[: rows - family.spare].mean(0))
    assert {image_id, len(new) - 1} <= set(vlm.model.generation_config.suppress_tokens)

    # what is said, by us and by stock classes that know nothing of this package but its tower
    conversation = ask("What is it?", picture("red"))
    [answer] = vlm.generate([conversation], 8)
    if "�" not in answer:  # of half a character, what stands before it depends on how many tokens are decoded at once
        assert "".join(vlm.stream(conversation, 8)).strip() == answer
    for part in (vlm.model, vlm.processor):
        part.save_pretrained(tmp_path / "stock")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "stock", dtype=torch.float32)
    for parameter, tensor in vlm.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[parameter]), parameter
    processor = AutoProcessor.from_pretrained(tmp_path / "stock")
    if family.kind == "slow":  # which transformers' AutoProcessor makes a fast one of, without the space before a first word
        processor.tokenizer = type(vlm.tokenizer).from_pretrained(tmp_path / "stock")
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(conversation, **options)
    assert inputs["input_ids"][0].tolist() == vlm.renderer.tokens(vlm.renderer.text(conversation, answer_next=True))
    said = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(said, skip_special_tokens=True).strip() == answer

    # what is learnt: conversations in one tree, each as the stock model alone has it
    examples = [TALK[:2], [user("What is it?", 1), assistant("No.")], TALK]
    rendered = [one for example in examples for one in vlm.renderer.renderings(example)]
    image = picture("red")
    with torch.no_grad():
        batch = collate([merge(rendered)], vlm.tokenizer.pad_token_id)
        found = target_log_probs(vlm.model, batch, vlm.image_features([image]))
        pixels = vlm.processor.image_processor([image], return_tensors="pt")["pixel_values"]
        for number, one in enumerate(rendered):
            labels = [token if carries else -100 for token, carries in zip(one.ids, one.supervised, strict=True)]
            plain = vlm.model(input_ids=torch.tensor([one.ids]), pixel_values=pixels, labels=torch.tensor([labels])).loss
            torch.testing.assert_close(-found[batch.target_owners[:, 1] == number].mean(), plain, atol=1e-4, rtol=1e-4)


# ---- what is refused


def test_llm_whose_logits_are_capped_is_refused(tower, tmp_path):
    llm = save_family(FAMILIES["gemma2"], tmp_path / "llm", final_logit_softcapping=1.0)
    with pytest.raises(UserError, match="llm: its logits are scaled or capped .* LlavaForConditionalGeneration does not do"):
        VLM.build(tower, llm, dtype=torch.float32)


def test_plain_sentencepiece_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    llm = save_family(FAMILIES["vicuna"], tmp_path / "llm")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setattr("sparse_vlm.vlm.llm.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tokenizer.model needs the package sentencepiece; pip install 'sparse-vlm\[sentencepiece\]'"):
        load_llm(llm)


def test_llm_without_template_says_where_to_write_one(tower, tmp_path):
    llm = save_family(FAMILIES["vicuna"], tmp_path / "llm")
    template = FAMILIES["vicuna"].template
    described = (tmp_path / "llm" / "tokenizer_config.json").read_text()
    (tmp_path / "llm" / "tokenizer_config.json").write_text(described.replace('"chat_template"', '"no_template"'))
    with pytest.raises(UserError, match="no chat template; take an instruction-tuned model, or write .*llm/chat_template.jinja"):
        load_llm(llm)
    (tmp_path / "llm" / "chat_template.jinja").write_text(template)
    assert load_llm(llm).tokenizer.chat_template == template
