"""`sparse-vlm export`: every format says what the model says, from a process that has only what its users have, or nothing is kept."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from interpreters import BLOCK
from tiny_vlm import ask, save_llm, save_tower, stir, tower_config

from sparse_vlm import load_image
from sparse_vlm.errors import UserError
from sparse_vlm.export import hosted
from sparse_vlm.export.card import licence
from sparse_vlm.export.formats import FORMATS
from sparse_vlm.export.run import export
from sparse_vlm.export.source import find
from sparse_vlm.images.preprocess import Preprocessor, preprocess
from sparse_vlm.tower import FocusConfig, RoIPatchConfig, SparseFormer, SparseFormerConfig, UnitConfig
from sparse_vlm.vlm import VLM

ROOT = Path(__file__).resolve().parents[3]
PHOTOS = [ROOT / "examples" / f"{name}.jpg" for name in ("chelsea", "coffee", "astronaut")]
TOWERS: dict[str, SparseFormerConfig] = {
    "published": dataclasses.replace(
        tower_config(),
        units=(UnitConfig(64, ("ATTN", "ROI_ADJ", "SAMPLING_M", "MLP"), repeats=2), UnitConfig(128, ("ATTN",), activation="quick_gelu")),
        **{"head": "map", "cls_before_unit": None, "padding": "zeros", "clamp_coordinate_grad": True, "mixing_bias": True},
        **{"num_heads": 4, "generator_dim": 0.25, "transition_norm": True, "token_init": "each", "rois_init": "released"},
    ),
    "crop": dataclasses.replace(
        tower_config(),
        **{"token_init": "glance", "glance": RoIPatchConfig(8, 4, norm_pre=True, kind="crop"), "budgets": (2, 9), "cls_before_unit": 0},
    ),
    "focus": dataclasses.replace(
        tower_config(),
        **{"token_init": "glance", "glance": RoIPatchConfig(8, 4, norm_pre=True, kind="crop"), "budgets": (2, 25), "cls_before_unit": 0},
        # no image keeps its grid, and a canvas is larger than a photo's thumbnail
        **{"num_latent_tokens": 19, "fit": "whole", "image_size": 64, "focus": FocusConfig(32, (16, 16, 16, 16), evenness=0.0)},
    ),
    "pool": dataclasses.replace(
        tower_config(), **{"token_init": "glance", "glance": RoIPatchConfig(8, 4), "image_size": 48, "head": "avg", "cls_before_unit": None}
    ),
}


def save(folder: Path, config: SparseFormerConfig) -> str:
    """A tower whose every weight does something."""
    tower = SparseFormer(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if name != "initial_roi.weight":
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    tower.save_pretrained(folder)
    return str(folder)


def said(tower: SparseFormer, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    config = tower.config
    pixels = preprocess([load_image(path) for path in PHOTOS[:count]], config.image_size, config.image_mean, config.image_std)
    with torch.no_grad():
        return pixels, tower.visual_tokens(pixels), tower(pixels).image_embeds


def readme_code(folder: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text().partition("## Compared")[0], re.DOTALL)
    return code


def run_readme(folder: Path, absent: list[str], after: str = "") -> str:
    """What the python of an export's README prints, in a process of its own that lacks some packages, with a photo beside it."""
    code = BLOCK.format(absent=absent) + readme_code(folder)
    shutil.copyfile(PHOTOS[0], folder / "photo.jpg")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code + after], capture_output=True, text=True, cwd=folder, env=env, check=False)
    (folder / "photo.jpg").unlink()
    assert done.returncode == 0, done.stderr
    return done.stdout


def names_no_machine(folder: Path) -> bool:
    places = [str(place).encode() for place in (ROOT, Path(torch.__file__).parents[1], folder.parent, Path.home() / ".cache")]
    return not any(place in path.read_bytes() for path in folder.rglob("*") if path.is_file() for place in places)


# ---- graphs


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Callable[..., tuple[str, Path, dict]]:
    """(tower, export, what it says of itself), each made once."""

    @functools.cache
    def make(shape: str, name: str, dtype: str = "float32", tokens: int | None = None) -> tuple[str, Path, dict]:
        for package in FORMATS[name].needs:
            pytest.importorskip(package, reason="needs sparse-vlm[export]")
        folder = tmp_path_factory.mktemp(shape)
        model = save(folder / "tower", TOWERS[shape])
        return model, folder / "out", export(model, name, folder / "out", dtype, tokens, PHOTOS)

    return make


@pytest.mark.parametrize(("shape", "tokens"), [("published", None), ("crop", 9), ("pool", None)])
def test_onnx_says_what_the_tower_says_for_any_number_of_photos(shape, tokens, exported):
    model, out, described = exported(shape, "onnx", tokens=tokens)
    import onnxruntime

    assert max(one["difference"] for one in described["compared"]) < 1e-4
    assert {(one["what"], one["pictures"]) for one in described["compared"]} == {
        (name, count) for name in ("visual_tokens", "image_embeds") for count in (1, 3)
    }
    session = onnxruntime.InferenceSession(out / "model.onnx")
    assert session.get_inputs()[0].shape == ["batch", 3, *[TOWERS[shape].image_size] * 2]
    tower = SparseFormer.from_pretrained(model, num_tokens=tokens)
    assert described["tokens"] == tower.config.visual_tokens
    for count in (1, 2, 3):
        pixels, *expected = said(tower, count)
        for one, other in zip(expected, session.run(["visual_tokens", "image_embeds"], {"pixel_values": pixels.numpy()}), strict=True):
            torch.testing.assert_close(torch.from_numpy(other), one, atol=1e-4, rtol=0)
    assert names_no_machine(out)


def test_torch_export_says_what_the_tower_says(exported):
    model, out, _ = exported("crop", "torch-export", "bfloat16")
    run = torch.export.load(out / "model.pt2").module()
    tower = SparseFormer.from_pretrained(model, torch.bfloat16)
    for count in (1, 2, 3):
        pixels, *expected = said(tower, count)
        for one, other in zip(expected, run(pixels), strict=True):
            assert other.dtype == torch.bfloat16
            torch.testing.assert_close(other, one, atol=1e-4, rtol=0)
    assert names_no_machine(out)


@pytest.mark.parametrize("name", ["onnx", "torch-export"])
def test_a_graph_places_cells_on_images_of_any_shape(name, exported):
    """Whole images lie at the top left of a canvas, and their sizes are the second input; what is beyond them is not read."""
    model, out, described = exported("focus", name)
    assert max(one["difference"] for one in described["compared"]) < 1e-4
    tower = SparseFormer.from_pretrained(model)
    inputs = Preprocessor.of(tower.config)(
        [load_image(path).crop((0, 0, *box)) for path, box in zip(PHOTOS, BOXES, strict=True)], square=True
    )
    places = tower.first_cells(*inputs)
    assert len({tuple(areas.round(decimals=5).tolist()) for areas in (places[..., 2:] - places[..., :2]).prod(-1)}) > 1
    for pixels, image_sizes in ((part[:count] for part in inputs) for count in (1, 3)):
        with torch.no_grad():
            wanted = tower.visual_tokens(pixels, image_sizes), tower(pixels, image_sizes=image_sizes).image_embeds
        noisy = pixels.clone()
        for canvas, (height, width) in zip(noisy, image_sizes.tolist(), strict=True):
            canvas[:, height:], canvas[:, :, width:] = 3.0, 3.0
        for given in (pixels, noisy):
            for one, other in zip(wanted, run_graph(out, name)(given, image_sizes), strict=True):
                torch.testing.assert_close(other, one, atol=1e-4, rtol=0)


BOXES = [(300, 300), (300, 60), (40, 300)]


def run_graph(folder: Path, name: str) -> Callable[..., list[torch.Tensor]]:
    if name == "torch-export":
        return torch.export.load(folder / "model.pt2").module()
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert [given.name for given in session.get_inputs()] == ["pixel_values", "image_sizes"]
    return lambda pixels, image_sizes: [
        torch.from_numpy(out) for out in session.run(None, {"pixel_values": pixels.numpy(), "image_sizes": image_sizes.numpy()})
    ]


def test_number_of_tokens_that_the_tower_was_not_made_for_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="2 to 9 tokens, not 10"):
        export(save(tmp_path / "tower", TOWERS["crop"]), "torch-export", tmp_path / "none", tokens=10)
    assert [path.name for path in tmp_path.iterdir()] == ["tower"]


def test_readme_of_onnx_of_whole_images_runs_without_torch_and_without_us(exported):
    model, out, _ = exported("focus", "onnx")
    printed = run_readme(out, ["torch", "sparse_vlm", "transformers"], "\nprint(visual_tokens.tolist())")
    shapes, values = printed.splitlines()
    tower = SparseFormer.from_pretrained(model)
    with torch.no_grad():
        expected = tower.visual_tokens(*Preprocessor.of(tower.config)(load_image(PHOTOS[0]), square=True))
    assert shapes == "(1, 19, 64) (1, 16)"
    torch.testing.assert_close(torch.tensor(json.loads(values)), expected, atol=1e-3, rtol=0)


def test_readme_of_onnx_runs_without_torch_and_without_us(exported):
    model, out, _ = exported("crop", "onnx", tokens=9)
    printed = run_readme(out, ["torch", "sparse_vlm", "transformers"], "\nprint(visual_tokens.tolist())")
    shapes, values = printed.splitlines()
    assert shapes == "(1, 9, 64) (1, 16)"
    _, expected, _ = said(SparseFormer.from_pretrained(model, num_tokens=9), 1)
    torch.testing.assert_close(torch.tensor(json.loads(values)), expected, atol=1e-4, rtol=0)


def test_readme_of_torch_export_runs(exported, monkeypatch, capsys):
    _, out, _ = exported("crop", "torch-export", "bfloat16")
    exec(readme_code(out).replace("model.pt2", str(out / "model.pt2")).replace("photo.jpg", str(PHOTOS[0])), {})
    assert capsys.readouterr().out == "torch.Size([1, 4, 64]) torch.Size([1, 16])\n"


# ---- transformers


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("looks", [True, False])
def test_transformers_folder_of_a_tower_keeps_every_bit(looks, dtype, tmp_path):
    from transformers import AutoImageProcessor, AutoModel

    config = tower_config() if looks else dataclasses.replace(tower_config(), units=tower_config().units[1:], cls_before_unit=0)
    model, out = save(tmp_path / "tower", config), tmp_path / "out"
    described = export(model, "transformers", out, dtype=dtype, images=PHOTOS)
    # weights and pixels to the last bit; transformers reads weights where they lie in the file, and products of memory that is aligned
    # otherwise may be rounded otherwise
    assert {one["difference"] for one in described["compared"] if one["tolerance"] == 0} == {0.0}
    assert max(one["difference"] for one in described["compared"]) <= 1e-6
    loaded = AutoModel.from_pretrained(out)
    tower = SparseFormer.from_pretrained(model, getattr(torch, dtype))
    for name, tensor in tower.state_dict().items():
        assert torch.equal(tensor, loaded.tower.state_dict()[name])
        assert loaded.tower.state_dict()[name].dtype == tensor.dtype
    pixels, expected, _ = said(tower, 2)
    again = AutoImageProcessor.from_pretrained(out)([load_image(path) for path in PHOTOS[:2]], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, again)
    torch.testing.assert_close(loaded.eval()(again).hidden_states[-1], expected, rtol=0, atol=1e-6 if dtype == "float32" else 0)


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> Path:
    """A VLM with adapters that change what it says."""
    folder = tmp_path_factory.mktemp("talker")
    vlm = VLM.build(save_tower(folder / "tower"), save_llm(folder / "llm"), dtype=torch.float32)
    vlm.add_adapters(rank=2)
    stir(vlm, 0.2)
    vlm.save_pretrained(folder / "chat")
    return folder / "chat"


def test_transformers_folder_of_a_vlm_answers_as_it_does_without_peft(talker, tmp_path):
    out = tmp_path / "out"
    described = export(str(talker), "transformers", out, dtype="float32", images=PHOTOS)
    assert all(one["agrees"] for one in described["compared"])
    assert not [path.name for path in out.iterdir() if "adapter" in path.name]
    vlm = VLM.from_pretrained(talker, dtype=torch.float32)
    photo = load_image(PHOTOS[0])
    expected = vlm.generate([ask(hosted.QUESTION, photo)], 64)
    assert expected != VLM.build(vlm.tower_name, vlm.llm_name, dtype=torch.float32).generate([ask(hosted.QUESTION, photo)], 64)
    assert run_readme(out, ["peft"]) == expected[0] + "\n"
    assert names_no_machine(out)


def test_an_exported_vlm_in_few_bits_keeps_tower_and_projector_whole(talker, tmp_path):
    """The lines of docs/export.md."""
    pytest.importorskip("bitsandbytes", reason="weights of 4 bits need bitsandbytes")
    export(str(talker), "transformers", tmp_path / "out", dtype="float32", images=PHOTOS[:1])
    page = (ROOT / "docs" / "export.md").read_text()
    lines = page[page.index("```python\n") :].split("```")[1].removeprefix("python\n")
    assert "build/tiny-chat-hf" in lines
    made = {}
    exec(lines.replace("build/tiny-chat-hf", str(tmp_path / "out")), made)
    model, whole = made["model"], made["AutoModelForImageTextToText"].from_pretrained(tmp_path / "out")
    few = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.uint8}
    assert few and not [name for name in few if ".language_model." not in name]
    pixels = torch.rand(1, 3, *[whole.config.vision_config.image_size] * 2)
    with torch.no_grad():
        ours, theirs = (each.model.get_image_features(pixels).pooler_output for each in (model, whole))
    torch.testing.assert_close(torch.stack(list(ours)), torch.stack(list(theirs)))


def test_untrained_projector_is_not_exported(talker, tmp_path):
    shutil.copytree(talker, tmp_path / "blank")
    described = json.loads((talker / "vlm.json").read_text())
    (tmp_path / "blank" / "vlm.json").write_text(json.dumps({**described, "new_projector": True}))
    with pytest.raises(UserError, match="its projector is untrained"):
        export(str(tmp_path / "blank"), "transformers", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- what is not right is not kept


def test_an_export_that_says_something_else_is_not_kept(tmp_path, monkeypatch):
    model, out = save_tower(tmp_path / "tower"), tmp_path / "out"
    export(model, "transformers", out)
    before = (out / "export.json").read_text()
    other = dataclasses.replace(tower_config(), image_mean=(0.5, 0.5, 0.5))
    processor = hosted.SparseFormerImageProcessor.of(other)
    monkeypatch.setattr(hosted.SparseFormerImageProcessor, "of", lambda config: processor)
    with pytest.raises(UserError, match="pixel_values differ by up to 0.5 .*nothing was kept"):
        export(model, "transformers", out, replace=True)
    assert (out / "export.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tower"]


def test_a_folder_that_lacks_a_tensor_is_not_kept(tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    whole = hosted.HostedTower.write

    def lose_one(self, folder):
        whole(self, folder)
        state = load_file(folder / "model.safetensors")
        del state["tower.norm.weight"]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(hosted.HostedTower, "write", lose_one)
    with pytest.raises(UserError, match="tower.norm.weight"):
        export(save_tower(tmp_path / "tower"), "transformers", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tower"]


def test_out_is_replaced_only_when_it_is_an_export_and_that_is_asked_for(tmp_path):
    model, out = save_tower(tmp_path / "tower"), tmp_path / "out"
    out.mkdir()
    export(model, "transformers", out)
    with pytest.raises(UserError, match="holds an export of tower already; add --replace"):
        export(model, "transformers", out)
    assert json.loads((out / "export.json").read_text())["dtype"] == "bfloat16"
    export(model, "transformers", out, "float32", replace=True)
    assert json.loads((out / "export.json").read_text())["dtype"] == "float32"
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds notes.txt, which no export wrote"):
        export(model, "transformers", out, replace=True)
    with pytest.raises(UserError, match="no export of sparse-vlm"):
        export(model, "transformers", tmp_path / "tower", replace=True)
    with pytest.raises(UserError, match="is a file; name a folder"):
        export(model, "transformers", out / "notes.txt", replace=True)
    assert (out / "notes.txt").read_text() == "mine"


# ---- mistakes


@pytest.mark.parametrize(
    ("model", "name", "options", "line"),
    [
        ("tinny", "onnx", {}, "tinny: no such folder and no such model; .*did you mean tiny"),
        (
            "tiny-text",
            "onnx",
            {},
            "tiny-text: is the text side .*; what can be exported is a tower or a VLM, as tiny or ",
        ),
        ("tiny", "onyx", {}, "--format onyx: no such format; there are transformers, onnx, torch-export; did you mean onnx"),
        (
            "tiny-chat",
            "onnx",
            {},
            r"tiny-chat: .*supports a tower only; export its tower \(--model tiny-adaptive\), or all of it with --format transformers",
        ),
        ("tiny", "onnx", {"dtype": "bfloat16"}, "--dtype bfloat16: --format onnx supports float32"),
        ("tiny", "torch-export", {"images": [Path("nowhere.jpg")]}, "nowhere.jpg: no such file"),
    ],
)
def test_mistake_is_found_before_anything_is_loaded(model, name, options, line, tmp_path, monkeypatch):
    for format_ in FORMATS.values():
        assert all(
            target.partition(":")[0] in ("sparse_vlm.export.graphs", "sparse_vlm.export.hosted") for target in format_.writers.values()
        )
    monkeypatch.setattr(SparseFormer, "from_pretrained", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=line):
        export(model, name, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_missing_package_is_one_line_that_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("sparse_vlm.export.formats.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--format onnx needs onnxscript and onnxruntime: pip install 'sparse-vlm\[export\]'"):
        export("tiny", "onnx", tmp_path / "out")


def test_folder_of_something_else_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="neither a tower nor a VLM"):
        export(str(tmp_path), "onnx", tmp_path / "out")


# ---- what an export says of itself


def test_card_and_licences_of_the_zoo_travel_with_the_export(tmp_path, command, monkeypatch, capsys):
    out = tmp_path / "tiny"
    done = command("export", "--model", "tiny", "--format", "transformers", "--out", str(out), "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    described = json.loads(done.stdout)
    assert (described["out"], described["model"], described["tokens"], described["dtype"]) == (str(out), "tiny", 49, "bfloat16")
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict() == {
        "license": "other",
        "license_name": "research-and-demonstration-only",
        "license_link": "LICENSE.md",
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["sparse-vlm", "sparseformer"],
    }
    assert "### Provenance" in card.content
    assert "photos that teacher and student were trained on are research-use" in (out / "LICENSE.md").read_text()
    assert {path.name for path in out.iterdir()} == {*described["files"], "export.json"}
    monkeypatch.chdir(out)
    exec(readme_code(out).replace("photo.jpg", str(PHOTOS[0])), {})
    assert capsys.readouterr().out == "torch.Size([1, 49, 384]) torch.Size([1, 512])\n"
    # the push that docs/export.md shows, as far as it goes without a hub
    line = re.search(r"^(hf upload .*)$", (ROOT / "docs" / "export.md").read_text(), re.MULTILINE)[1].split()
    line[line.index("build/tiny-chat-hf")] = str(out)
    hf = "from importlib.metadata import entry_points; entry_points(group='console_scripts', name='hf')['hf'].load()()"
    done = subprocess.run(
        [sys.executable, "-c", hf, *line[1:]], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    assert "api/repos/create" in done.stderr
    assert "offline mode is enabled" in done.stderr


def test_licence_of_a_vlm_is_that_of_all_its_parts(talker):
    text = licence(find("tiny-chat"))
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["tiny-chat", "tiny-adaptive", "smollm2-135m-instruct"]
    assert "by HuggingFaceTB" in text
    own = licence(find(str(talker)))
    assert re.findall(r"^## (.*)$", own, re.MULTILINE) == ["chat", "tower", "llm"]
    assert own.count("Not stated; add it before you publish this") == 3
    assert str(talker.parent) not in own


def test_help_names_every_format(command):
    done = command("export", "--help", env={**os.environ, "COLUMNS": "200"})
    for name in FORMATS:
        assert name in done.stdout
