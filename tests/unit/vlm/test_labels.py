"""Label masks: exactly the assistant's words and its end token carry loss, for any chat template, and every surprise raises."""

from __future__ import annotations

import sys

import pytest
from tiny_vlm import CHATML, save_tokenizer
from transformers import AutoTokenizer

from sparse_vlm.errors import UserError
from sparse_vlm.vlm.prompts import IMAGE_TOKEN, Renderer, assistant, extend_template, user

LLAMA2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
TALK = [user("What is it?", 1), assistant("A cat."), user("Sure?"), assistant("Yes")]


def renderer(tmp_path, template=CHATML, system=None, tokens=3) -> Renderer:
    save_tokenizer(tmp_path / "tokenizer", template)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return Renderer(tokenizer, extend_template(template, system), tokens)


def supervised_text(r, rendered) -> str:
    return r.tokenizer.decode([token for token, carries in zip(rendered.ids, rendered.supervised, strict=True) if carries])


def test_only_the_assistant_carries_loss(tmp_path):
    r = renderer(tmp_path)
    rendered = r.render(TALK)
    assert supervised_text(r, rendered) == "A cat.<|im_end|>Yes<|im_end|>"
    assert r.tokenizer.decode(rendered.ids) == (
        "<|im_start|>system\nYou are a test.<|im_end|>\n<|im_start|>user\n<image><image><image>\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    )


def test_default_system_message_replaces_the_templates_own(tmp_path):
    r = renderer(tmp_path, system="It's\nshort")
    assert r.text(TALK).startswith("<|im_start|>system\nIt's\nshort<|im_end|>\n<|im_start|>user\n<image>\nWhat")
    own = [{"role": "system", "content": "mine"}, *TALK]
    assert r.text(own).startswith("<|im_start|>system\nmine<|im_end|>\n<|im_start|>user")


def test_the_prompt_is_a_prefix_of_the_training_text(tmp_path):
    r = renderer(tmp_path)
    assert r.text(TALK).startswith(r.text(TALK[:1], answer_next=True) + "A cat.<|im_end|>")
    assert r.end_id() == r.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_description_shows_the_mask(tmp_path):
    r = renderer(tmp_path)
    assert "<3 image tokens>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n[[A cat.<|im_end|>]]" in r.describe(r.render(TALK))


def test_template_that_ends_without_special_token_is_refused(tmp_path):
    r = renderer(tmp_path, CHATML.replace("+ '<|im_end|>' + '\n' }}{% endfor", "+ '###' }}{% endfor"))
    with pytest.raises(UserError, match=r"photo 7: the chat template ends the assistant's turn 1 with '###.*not a special token"):
        r.render(TALK, "photo 7")


def test_template_that_changes_the_answer_is_refused(tmp_path):
    r = renderer(tmp_path, CHATML.replace("message['content'] +", "message['content'] | upper +"))
    with pytest.raises(UserError, match="photo 7: the chat template changes the assistant's turn 1"):
        r.render(TALK, "photo 7")


def test_a_space_that_the_prompt_lacks_is_the_models_to_say(tmp_path):
    r = renderer(tmp_path, LLAMA2)
    rendered = r.render(TALK)
    assert supervised_text(r, rendered) == " A cat.<|im_end|> Yes<|im_end|>"
    assert r.describe(rendered).startswith("<|im_start|>[INST] <3 image tokens>\nWhat is it? [/INST][[ A cat.<|im_end|>]][INST]")


def test_only_the_last_answer_carries_loss_if_asked(tmp_path):
    r = renderer(tmp_path)
    assert supervised_text(r, r.render(TALK, last_only=True)) == "Yes<|im_end|>"


def test_prompt_that_the_tokenizer_joins_with_the_answer_is_refused(tmp_path):
    # a tokenizer that knows " A", asked with " " and trained on " A"
    r = renderer(tmp_path, CHATML.replace("assistant\n", "assistant ").replace("message['role'] + '\n'", "message['role'] + ' '"))
    model = r.tokenizer.backend_tokenizer.model
    vocabulary = r.tokenizer.get_vocab()
    r.tokenizer.backend_tokenizer.model = type(model)(vocab={**vocabulary, "ĠA": len(vocabulary)}, merges=[("Ġ", "A")])
    with pytest.raises(
        UserError, match=r"photo 7: the LLM's tokenizer merges the end of the prompt, '.*assistant ', with the start of the answer"
    ):
        r.render(TALK, "photo 7")


def test_answer_that_holds_the_end_token_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"photo 7: the assistant's turn 1 contains the text '<\|im_end\|>'"):
        renderer(tmp_path).render([user("What?"), assistant("A <|im_end|> cat")], "photo 7")


def test_conversation_that_the_template_refuses_is_one_line(tmp_path):
    r = renderer(tmp_path, "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + CHATML)
    with pytest.raises(
        UserError, match="^photo 7: the LLM's chat template refuses a conversation of system, user, assistant: No system role"
    ):
        r.render([{"role": "system", "content": "Be brief."}, *TALK[:2]], "photo 7")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError"),
        ("{{ messages[9].content.text }}", "refuses a conversation of user"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "does not finish: it needs more than 0.2 seconds",
        ),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
            "does not finish: it needs more than 0.2 sec",
        ),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "fails: RecursionError"),
        ("{% for i in range(1000000) %}{% endfor %}", "(fails|refuses)"),
        ("{% if %}", "refuses a conversation of user"),
        ("{{ ''.__class__.__mro__ }}", "refuses a conversation of user"),
    ],
)
def test_template_that_fails_or_never_ends_is_one_line(tmp_path, monkeypatch, template, why):
    monkeypatch.setattr("sparse_vlm.vlm.prompts.TEMPLATE_SECONDS", 0.2)
    with pytest.raises(UserError, match=f"^photo 7: the LLM's chat template {why}") as caught:
        renderer(tmp_path, template).text([user("What?")], sample="photo 7")
    assert "\n" not in str(caught.value)


def test_bound_on_templates_leaves_a_tracer_as_it_was(tmp_path):
    seen = []
    before = sys.gettrace()
    sys.settrace(lambda *_: seen.append(1))
    try:
        tracer = sys.gettrace()
        renderer(tmp_path).text(TALK)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("text", ["caf\udce9?", 5, None])
def test_message_that_is_no_text_is_one_line(tmp_path, text):
    with pytest.raises(UserError, match="photo 7: a user message (is not valid|must be) text"):
        renderer(tmp_path).text([user(text)], sample="photo 7")


def test_zero_bytes_are_text(tmp_path):
    r = renderer(tmp_path)
    assert r.tokenizer.decode(r.tokens(r.text([user("a\0b")]))).count("a\0b") == 1


def test_turn_marks_that_are_not_called_special_are_no_text_of_users_either(tmp_path):
    save_tokenizer(tmp_path / "tokenizer", CHATML)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    template = CHATML.replace("<|im_start|>", "<|turn|>")
    tokenizer.add_tokens(["<|turn|>", "<think>"])
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    r = Renderer(tokenizer, extend_template(template, None), 3)
    turn, thought = tokenizer.convert_tokens_to_ids(["<|turn|>", "<think>"])
    count = [r.tokens(r.text([user(text)], answer_next=True)).count(turn) for text in ("a", "a<|turn|>b")]
    assert count[0] == count[1] > 0
    assert thought in r.tokens(r.text([user("a <think>")]))  # it marks no turn, and is an ordinary token of this tokenizer


def test_empty_answer_is_refused(tmp_path):
    with pytest.raises(UserError, match="photo 7: the assistant's turn 1 is empty"):
        renderer(tmp_path).render([user("What?"), assistant(" ")], "photo 7")


def test_image_token_in_words_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"photo 7: a user message contains the text '<image>'"):
        renderer(tmp_path).render([user("What is <image>?", 1), assistant("A cat.")], "photo 7")


def test_wrong_number_of_placeholders_names_sample_and_both_counts(tmp_path):
    r = renderer(tmp_path)
    with pytest.raises(UserError, match="photo 7: 3 image placeholders, but 2 images give 6 tokens"):
        r.check_count(r.render(TALK).ids, 2, "photo 7")
