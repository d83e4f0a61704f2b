"""What must hold inside the real LLaVA code base. A program, because LLaVA's world (transformers 4.37) is not the tests' own:

    pip install torch==2.1.2 "numpy<2" pillow safetensors transformers==4.37.2 accelerate==0.25.0
    pip install --no-deps llava-torch==1.2.2.post1
    PYTHONPATH=. python tests/llava_checks.py FOLDER

It makes small models in FOLDER, runs every check below and prints json: the name of each, and null or how it failed.
`tests/unit/integrations/test_llava.py` runs it with these packages shadowing its own.
"""

from __future__ import annotations

import functools
import json
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = ("transformers==4.37.2", "tokenizers==0.15.2", "huggingface_hub==0.20.3", "accelerate==0.25.0", "llava-torch==1.2.2.post1")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SIDE, TOKENS, WIDTH = 32, 9, 64
FOLDER = Path()


def names() -> list[str]:
    """Of the checks."""
    return [name.removeprefix("check_") for name in globals() if name.startswith("check_")]


def save_tower(folder: Path) -> str:
    """A tower of 4 to 16 tokens, with CLS first. The name by which LLaVA takes it."""
    import torch

    from sparse_vlm.tower import RoIPatchConfig, SparseFormer, SparseFormerConfig, UnitConfig

    torch.manual_seed(1)
    look = UnitConfig(WIDTH, ("SAMPLING_M", "PE_INJECT", "ATTN", "MLP", "ROI_ADJ"))
    config = SparseFormerConfig(
        units=(look, UnitConfig(WIDTH, ("SAMPLING_M", "ATTN", "MLP"))),
        num_latent_tokens=TOKENS,
        embed_dim=16,
        image_mean=(0.4, 0.5, 0.6),
        image_std=(0.2, 0.3, 0.25),
        image_size=SIDE,
        conv_dim=8,
        num_points=4,
        generator_dim=8,
        cls_before_unit=0,
        token_init="glance",
        glance=RoIPatchConfig(patch_size=8, grid=4, kind="crop"),
        budgets=(4, 16),
    )
    SparseFormer(config).save_pretrained(folder)
    return f"sparse-vlm:{folder}"


def save_talks(folder: Path) -> None:
    """What LLaVA's train.py starts from: `llm`, a LLaMA with SentencePiece's tokenizer, `talks.json` about two examples, and `tower`."""
    import sentencepiece
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

    said = {"chelsea": "a cat on a chair", "coffee": "a cup of coffee on a table"}
    # as LLaVA asks; a character that the tokenizer has not seen would be counted as padding, and LLaVA gives such a conversation no loss
    system = "A chat between a curious user and an artificial intelligence assistant."
    system += " The assistant gives helpful, detailed, and polite answers to the user's questions."
    (folder / "words.txt").write_text("\n".join([f"{system} USER: What is this? ASSISTANT: {text}." for text in said.values()] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "words.txt"), model_prefix=str(folder / "words"), vocab_size=120, hard_vocab_limit=False, minloglevel=2
    )
    tokenizer = LlamaTokenizer(str(folder / "words.model"))
    tokenizer.save_pretrained(folder / "llm")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder / "llm")
    save_tower(folder / "tower")
    asked = {"from": "human", "value": "<image>\nWhat is this?"}
    talks = [
        {"id": str(i), "image": f"{name}.jpg", "conversations": [asked, {"from": "gpt", "value": text}]}
        for i, (name, text) in enumerate([*said.items()] * 2)
    ]
    (folder / "talks.json").write_text(json.dumps(talks))


def settings(tower: str, **changes: Any) -> Any:
    """What LLaVA's ModelArguments hold."""
    return types.SimpleNamespace(
        **{
            "vision_tower": tower,
            "mm_vision_select_layer": -1,
            "mm_vision_select_feature": "patch",
            "pretrain_mm_mlp_adapter": None,
            "mm_patch_merge_type": "flat",
            "mm_projector_type": "mlp2x_gelu",
            **changes,
        }
    )


def new_model(tower: str | None = None, **changes: Any) -> Any:
    """LLaVA's own model on a LLaMA of two layers, as its train.py makes it."""
    import torch
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlavaLlamaForCausalLM(LlavaConfig(vocab_size=300, max_position_embeddings=512, **sizes))
    if tower is not None:
        model.get_model().initialize_vision_modules(settings(tower, **changes))
    return model


def photos(model: Any, *files: str) -> Any:
    """As LLaVA's evaluation prepares them."""
    from llava.mm_utils import process_images
    from PIL import Image

    opened = [Image.open(EXAMPLES / file).convert("RGB") for file in files]
    return process_images(opened, model.get_vision_tower().image_processor, model.config)


def answer(model: Any, images: Any, **more: Any) -> Any:
    """One text an image: four tokens and a photo."""
    import torch
    from llava.constants import IMAGE_TOKEN_INDEX

    ids = torch.tensor([[1, 5, IMAGE_TOKEN_INDEX, 7, 8]]).expand(len(images), -1)
    return model(input_ids=ids, labels=ids.clamp_min(0), attention_mask=torch.ones_like(ids), images=images, **more)


@functools.cache
def clip() -> str:
    """A CLIP tower small enough, in a folder that LLaVA loads itself."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(image_size=SIDE, patch_size=8, **sizes)).save_pretrained(FOLDER / "clip")
    square = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square).save_pretrained(FOLDER / "clip")
    return str(FOLDER / "clip")


def refused(call: Callable[[], Any]) -> str:
    """The message of the UserError that a call ends with."""
    from sparse_vlm.errors import UserError

    try:
        call()
    except UserError as error:
        return str(error)
    raise AssertionError("went through")


# ---- checks


def check_every_module_that_bound_the_builder_has_ours(tower: str) -> None:
    import early  # made by main before installing
    from llava.model import llava_arch
    from llava.model.multimodal_encoder import builder

    from sparse_vlm.llava import SparseFormerVisionTower, install

    ours = builder.build_vision_tower
    install()
    assert builder.build_vision_tower is ours is llava_arch.build_vision_tower is early.build
    assert type(early.build(settings(tower), delay_load=True)) is SparseFormerVisionTower
    method = llava_arch.LlavaMetaModel.initialize_vision_modules
    assert not hasattr(method.sparse_vlm_replaces, "sparse_vlm_replaces"), "wrapped once"


def check_other_names_go_to_the_host(tower: str) -> None:
    from llava.model.multimodal_encoder.builder import build_vision_tower
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

    assert type(build_vision_tower(settings(clip(), mm_vision_select_layer=-2))) is CLIPVisionTower
    try:
        build_vision_tower(settings("nobody/knows-it"))
    except ValueError as error:
        assert str(error) == "Unknown vision tower: nobody/knows-it"
    else:
        raise AssertionError("went through")


def check_face_is_that_of_the_hosts_own_tower(tower: str) -> None:
    import torch
    from llava.model.multimodal_encoder.builder import build_vision_tower

    theirs = build_vision_tower(settings(clip()))
    ours = build_vision_tower(settings(tower))
    names = {name for name in (*vars(type(theirs)), *vars(theirs)) if not name.startswith("_")}
    # how CLIP picks its layer and the class under the hood; nothing outside reads them
    missing = {name for name in names - {"feature_select", "select_layer", "cfg_only"} if not hasattr(ours, name)}
    assert not missing, missing
    batch = torch.randn(2, 3, SIDE, SIDE, dtype=torch.bfloat16)
    for tower_, tokens in ((theirs, 16), (ours, TOKENS)):
        out, listed = tower_(batch), tower_(list(batch))
        assert out.shape == (2, tokens, tower_.hidden_size) and out.dtype == torch.bfloat16 and not out.requires_grad
        assert [tuple(one.shape) for one in listed] == [(1, tokens, tower_.hidden_size)] * 2
        assert tower_.dummy_feature.shape == (1, tower_.hidden_size)
        assert (tower_.num_patches, tower_.num_patches_per_side**2) == (tokens, tokens)
        assert tower_.config.hidden_size == tower_.hidden_size and tower_.config.image_size == SIDE
        assert (tower_.dtype, tower_.device) == (torch.float32, torch.device("cpu"))
        assert tower_.image_processor.crop_size == {"height": SIDE, "width": SIDE}
        assert tower_.image_processor.size == {"shortest_edge": SIDE}


def check_pictures_are_prepared_as_the_tower_was_trained(tower: str) -> None:
    import torch
    from llava.mm_utils import expand2square
    from PIL import Image

    from sparse_vlm.images.preprocess import preprocess

    model = new_model(tower)
    config = model.get_vision_tower().config.tower
    photo = Image.open(EXAMPLES / "chelsea.jpg").convert("RGB")
    wanted = functools.partial(preprocess, size=SIDE, mean=config.image_mean, std=config.image_std)
    assert torch.equal(photos(model, "chelsea.jpg", "coffee.jpg")[0], wanted(photo)[0])
    model.config.image_aspect_ratio = "pad"
    square = expand2square(photo, tuple(int(value * 255) for value in config.image_mean))
    assert torch.equal(photos(model, "chelsea.jpg")[0], wanted(square)[0])


def check_a_frozen_tower_feeds_the_projector(tower: str) -> None:
    for name, changes, tokens in (
        (tower, {}, TOKENS),
        (f"{tower}?tokens=4", {}, 4),
        (tower, {"mm_vision_select_feature": "cls_patch"}, TOKENS + 1),
    ):
        model = new_model(name, **changes)
        assert model.config.mm_vision_tower == name and model.config.mm_hidden_size == WIDTH
        assert not getattr(model.config, "unfreeze_mm_vision_tower", False)
        pixels = photos(model, "chelsea.jpg", "coffee.jpg")
        out = answer(model, pixels)
        assert out.logits.shape[:2] == (2, 4 + tokens)
        assert not (out.logits[0] == out.logits[1]).all(), "the images are not told apart"
        listed = answer(model, list(pixels))
        assert (listed.logits - out.logits).abs().max() < 1e-5
        out.loss.backward()
        assert all(parameter.grad is not None for parameter in model.get_model().mm_projector.parameters())
        assert all(parameter.grad is None for parameter in model.get_vision_tower().parameters())


def check_tiles_of_a_large_picture_merge(tower: str) -> None:
    model = new_model(tower, mm_patch_merge_type="spatial")
    model.config.image_aspect_ratio = "anyres"
    model.config.image_grid_pinpoints = [(SIDE, 2 * SIDE), (2 * SIDE, SIDE)]
    pixels = photos(model, "coffee.jpg")
    assert pixels.shape == (1, 3, 3, SIDE, SIDE)
    out = answer(model, pixels, image_sizes=[(600, 400)])
    assert out.logits.shape[1] == 4 + 3 * TOKENS
    said = refused(lambda: new_model(f"{tower}?tokens=5", mm_patch_merge_type="spatial_unpad"))
    assert "are not a square grid" in said and "--mm_patch_merge_type flat" in said


def tuned(tower: str, folder: Path) -> Any:
    """A model whose tower has been changed, saved in `folder`."""
    import torch

    model = new_model(f"{tower}?unfreeze=true")
    answer(model, photos(model, "chelsea.jpg")).loss.backward()
    parameters = dict(model.get_vision_tower().named_parameters())
    learns = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert {name for name, parameter in parameters.items() if parameter.grad is not None} == learns
    assert {name.split(".")[1] for name in set(parameters) - learns} == {"initial_roi", "proj"}
    with torch.no_grad():
        for name in learns:
            parameters[name].add_(torch.randn_like(parameters[name]), alpha=0.02)
    model.save_pretrained(folder)
    return model.eval()


def check_a_tuned_tower_comes_back_whichever_way_it_is_loaded(tower: str) -> None:
    import torch
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    model = tuned(tower, FOLDER / "tuned")
    wanted = model.get_vision_tower().state_dict()
    for options in (
        {},
        {"low_cpu_mem_usage": True},
        {"torch_dtype": torch.bfloat16},
        {"torch_dtype": torch.float16, "low_cpu_mem_usage": True},  # as LLaVA's load_pretrained_model
    ):
        again = LlavaLlamaForCausalLM.from_pretrained(FOLDER / "tuned", **options).eval()
        state = again.get_vision_tower().state_dict()
        assert state.keys() == wanted.keys()
        half = options.get("torch_dtype", torch.float32)
        for name, tensor in wanted.items():
            exact = torch.equal(state[name], tensor)
            if name == "vision_tower.initial_roi.weight":
                assert exact and state[name].dtype == torch.float32, options
            assert exact or torch.equal(state[name].to(half), tensor.to(half)), (name, options)
        if not options:
            pixels = photos(model, "chelsea.jpg")
            assert torch.equal(answer(again, pixels).logits, answer(model, pixels).logits)


def check_weights_that_a_checkpoint_lacks_are_the_towers_own(tower: str) -> None:
    """transformers fills what it misses with random numbers, also where it was loaded from elsewhere."""
    import torch
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    new_model().save_pretrained(FOLDER / "base")
    config = LlavaConfig.from_pretrained(FOLDER / "base")
    for name, value in vars(settings(f"{tower}?unfreeze=true", use_mm_proj=True, mm_hidden_size=WIDTH)).items():
        setattr(config, "mm_vision_tower" if name == "vision_tower" else name, value)
    wanted = new_model(tower).get_vision_tower().state_dict()
    for model in (
        LlavaLlamaForCausalLM(config),
        LlavaLlamaForCausalLM.from_pretrained(FOLDER / "base", config=config),
        LlavaLlamaForCausalLM.from_pretrained(FOLDER / "base", config=config, low_cpu_mem_usage=True),
    ):
        state = model.get_vision_tower().state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())


def check_a_frozen_model_loads_its_tower_late(tower: str) -> None:
    import torch
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    model = new_model(f"{tower}?tokens=4").eval()
    model.save_pretrained(FOLDER / "frozen")
    again = LlavaLlamaForCausalLM.from_pretrained(FOLDER / "frozen").eval()
    eyes = again.get_vision_tower()
    assert not eyes.is_loaded and (eyes.hidden_size, eyes.num_patches) == (WIDTH, 4) and not list(eyes.parameters())
    eyes.load_model(device_map="auto")
    pixels = photos(model, "chelsea.jpg")
    assert torch.equal(answer(again, pixels).logits, answer(model, pixels).logits)


def check_a_further_training_keeps_the_tower_or_says_why_not(tower: str) -> None:
    model = new_model(tower)
    begin = model.get_model().initialize_vision_modules
    assert "give that name" in refused(lambda: begin(settings(f"{tower}?tokens=4")))
    assert "give that name" in refused(lambda: begin(settings(clip())))
    begin(settings(tower, unfreeze_mm_vision_tower=True))
    assert model.config.unfreeze_mm_vision_tower and any(p.requires_grad for p in model.get_vision_tower().parameters())
    other = new_model(clip())
    assert "has another tower" in refused(lambda: other.get_model().initialize_vision_modules(settings(tower)))
    fully = new_model()
    said = refused(lambda: fully.get_model().initialize_vision_modules(settings(f"{tower}?unfreeze=true"), fsdp=["full_shard"]))
    assert said.startswith("--fsdp")


def main(folder: str) -> None:
    """Run the checks."""
    global FOLDER
    FOLDER = Path(folder).resolve()
    import torch

    import sparse_vlm.llava

    torch.set_num_threads(1)
    # bound by name before the plug-in is there
    import llava.model.multimodal_encoder.builder as builder

    early = types.ModuleType("early")
    early.build = builder.build_vision_tower  # type: ignore[attr-defined]
    sys.modules["early"] = early
    sparse_vlm.llava.install()
    tower = save_tower(FOLDER / "tower")
    found = {}
    for name in names():
        try:
            globals()[f"check_{name}"](tower)
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
