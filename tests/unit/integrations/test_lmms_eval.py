"""lmms-eval's adapter: beside a minimal stand-in of the interface, and in a run of lmms-eval itself where that is installed."""

from __future__ import annotations

import abc
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from tiny_vlm import ask, picture, save_llm, save_tower

from sparse_vlm.errors import UserError
from sparse_vlm.images.decode import load_image
from sparse_vlm.integrations import lmms_eval as host
from sparse_vlm.vlm import VLM

ROOT = Path(__file__).resolve().parents[3]


class Lmms(abc.ABC):
    """What lmms-eval 0.7 asks of a model."""

    is_simple = True

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...


class GenerationResult(NamedTuple):
    text: Any


class Manifest(NamedTuple):
    model_id: str
    chat_class_path: str
    simple_class_path: str


class Request(NamedTuple):
    args: tuple[Any, ...]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    folder = tmp_path_factory.mktemp("parts")
    made = VLM.build(save_tower(folder / "tower"), save_llm(folder / "llm"))
    made.new_projector = False
    return made


@pytest.fixture
def model(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes the adapter of a form, around the tiny VLM."""
    held = {"lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.models": {}, "lmms_eval.api.model": {"lmms": Lmms}}
    held |= {"lmms_eval.api.instance": {"GenerationResult": GenerationResult}}
    held |= {"lmms_eval.models.registry_v2": {"ModelManifest": Manifest}}
    for name, members in held.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(VLM, "from_pretrained", lambda name, device, num_tokens: vlm)
    host._class.cache_clear()

    def make(form: str, **options: Any) -> Any:
        adapter = getattr(host, form)(pretrained="tiny", **options)
        adapter.task_dict["photos"] = {"test": [{"image": picture(name), "question": f"{name}?"} for name in ("red", "blue", "green")]}
        return adapter

    yield make
    host._class.cache_clear()


def chat(number: int, settings: dict[str, Any], pictures: int = 1, part: dict[str, Any] | None = None) -> Request:
    def messages(document: dict[str, Any]) -> list[dict[str, Any]]:
        images = [{"type": "image", "url": document["image"]}] * pictures
        return [{"role": "user", "content": [part or {"type": "text", "text": document["question"]}, *images]}]

    return Request(("context", messages, settings, number, "photos", "test"))


def test_registry_finds_both_forms(model: Callable[..., Any]) -> None:
    manifest = host.manifest()
    assert manifest.model_id == "sparse_vlm"
    for path, simple in ((manifest.chat_class_path, False), (manifest.simple_class_path, True)):
        module, _, name = path.rpartition(".")
        found = getattr(sys.modules[module], name)
        assert issubclass(found, Lmms) and found.is_simple is simple
        assert getattr(sys.modules[module], name) is found
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = host.Other


def test_entry_point_is_declared() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read toml")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]["lmms_eval.models"]
    (value,) = declared.values()
    assert importlib.metadata.EntryPoint("any", value, "lmms_eval.models").load() is host.manifest


def test_chat_answers_are_those_of_the_model_in_the_order_of_the_requests(model: Callable[..., Any], vlm: VLM) -> None:
    adapter = model("SparseVLMChat", batch_size="2")
    long, short = {"max_new_tokens": 6, "until": ["\n\n"]}, {"max_new_tokens": 3, "temperature": 0, "image_aspect_ratio": "pad"}
    requests = [chat(0, long), chat(1, short, pictures=2), chat(2, long), chat(0, long, pictures=0)]
    answers = adapter.generate_until(requests)
    expected = []
    for number, pictures, tokens in ((0, 1, 6), (1, 2, 3), (2, 1, 6), (0, 0, 6)):
        document = adapter.task_dict["photos"]["test"][number]
        parts = [{"type": "text", "text": document["question"]}, *[{"type": "image", "image": document["image"]}] * pictures]
        expected += vlm.generate([[{"role": "user", "content": parts}]], max_new_tokens=tokens)
    assert answers == [text.split("\n\n")[0].strip() for text in expected]


def test_simple_form_puts_pictures_first_or_where_the_marks_are(model: Callable[..., Any]) -> None:
    adapter = model("SparseVLMSimple")

    def parts(context: str, pictures: int) -> list[str]:
        shown = lambda document: [document["image"]] * pictures  # noqa: E731
        (message,) = adapter._conversation((context, {}, shown, 0, "photos", "test"))
        return [part.get("text", "IMAGE") for part in message["content"]]

    assert parts("What?", 2) == ["IMAGE", "IMAGE", "What?"]
    assert parts("This <image> and <image>?", 2) == ["This ", "IMAGE", " and ", "IMAGE", "?"]
    assert parts("What?", 0) == ["What?"]
    with pytest.raises(UserError, match="photos, document 0: 1 marks <image> in its text, but 2 images"):
        parts("This <image>?", 2)


def test_likelihoods_are_mean_losses(model: Callable[..., Any], vlm: VLM) -> None:
    adapter = model("SparseVLMSimple")
    image = adapter.task_dict["photos"]["test"][1]["image"]
    shown = lambda document: [document["image"]]  # noqa: E731
    choices = [" red", " blue", lambda document: "dark green"]
    requests = [Request(("What?", choice, shown, 1, "photos", "test")) for choice in choices]
    losses = [result.text for result in adapter.loglikelihood([*requests, Request(("", "red"))])]
    (scores,) = vlm.score([ask("What?", image)], [["red", "blue", "dark green"]])
    assert [loss for loss, _ in losses[:3]] == pytest.approx([-score.mean for score in scores], rel=1e-3)
    assert losses[3][0] == pytest.approx(-vlm.score([ask("")], [["red"]])[0][0].mean, rel=1e-3)


def test_a_continuation_that_the_model_would_say(model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, vlm: VLM) -> None:
    adapter = model("SparseVLMSimple")
    monkeypatch.setattr(vlm, "generate", lambda conversations, max_new_tokens: ["blue"])
    requests = [Request(("What?", f" {choice}", None, 0, "photos", "test")) for choice in ("red", "blue")]
    assert [result.text[1] for result in adapter.loglikelihood(requests)] == [False, True]


def test_settings_of_a_task() -> None:
    assert host._options({"temperature": 0, "top_p": 0.9, "until": ["x"], "do_sample": False}) == {"max_new_tokens": host.MAX_NEW_TOKENS}
    assert host._options({"temperature": 0.2, "do_sample": False}) == {"max_new_tokens": host.MAX_NEW_TOKENS}
    sampled = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.2, "top_p": 0.9, "num_beams": 3}
    assert host._options({"max_new_tokens": 8, "temperature": 0.2, "top_p": 0.9, "num_beams": 3}) == sampled
    assert host._cut("A cat.\n\nUSER: no", ["USER", "\n\n"]) == "A cat."
    assert host._cut(" A cat. ", None) == "A cat."
    assert host._cut("A cat", "t") == "A ca"


def test_mistakes(model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    adapter = model("SparseVLMChat")
    with pytest.raises(UserError, match="photos, document 2: holds video; sparse_vlm supports"):
        adapter.generate_until([chat(2, {}, part={"type": "video", "url": "a.mp4"})])
    with pytest.raises(UserError, match="document 0: an image is a bytes, expected an image or a path"):
        adapter.generate_until([chat(0, {}, part={"type": "image", "url": b"png"})])
    with pytest.raises(UserError, match="nowhere.jpg: no such file"):
        adapter.generate_until([chat(0, {}, part={"type": "image", "url": str(tmp_path / "nowhere.jpg")})])
    with pytest.raises(UserError, match="add --force_simple"):
        adapter.loglikelihood([])
    with pytest.raises(UserError, match="tasks of several rounds"):
        adapter.generate_until_multi_round([])
    with pytest.raises(UserError, match="batch_size is 'auto'"):
        model("SparseVLMChat", batch_size="auto")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="in one process"):
        model("SparseVLMChat")


@pytest.mark.parametrize(("form", "task", "metric"), [([], "photos", "exact_match"), (["--force_simple"], "photos_choice", "acc")])
def test_lmms_eval_itself(form: list[str], task: str, metric: str, vlm: VLM, tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval.evaluator", reason="lmms-eval is not installed: pip install 'sparse-vlm[lmms]'")
    vlm.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "lmms_eval", "--model", "sparse_vlm", "--model_args", f"pretrained={tmp_path / 'model'}"]
    command += ["--tasks", f"sparse_vlm_{task}", "--include_path", "examples/lmms_eval", "--output_path", str(tmp_path / "out"), *form]
    done = subprocess.run(
        [*command, "--log_samples"], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "HF_HOME": str(tmp_path / "home")}
    )
    assert done.returncode == 0, done.stderr
    (report,) = (tmp_path / "out").rglob("*results.json")
    assert f"{metric},none" in json.loads(report.read_text())["results"][f"sparse_vlm_{task}"]
    (samples,) = (tmp_path / "out").rglob("*samples*.jsonl")
    assert len(samples.read_text().splitlines()) == 6


def test_photos_of_the_example_are_there() -> None:
    rows = json.loads((ROOT / "examples/lmms_eval/photos.json").read_text())
    assert all(load_image(ROOT / row["image"]) and row["answer"] in row["choices"] for row in rows)
