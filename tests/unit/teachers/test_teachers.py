"""Every kind of teacher: nothing of it is forgotten, and what is inherited computes what the teacher computes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_teacher import write_teacher
from torch import nn

pytest.importorskip("open_clip", reason="teachers need open_clip and timm")

import open_clip
import timm
import transformers
from safetensors.torch import load_file, save_file

from sparse_vlm import SparseFormer
from sparse_vlm.distill.inherit import inherit, plan
from sparse_vlm.distill.recipes import RECIPES, Recipe
from sparse_vlm.errors import UserError
from sparse_vlm.teachers import Teacher, TeacherError, is_teacher, load_teacher, open_clip_vit, split_tag, timm_vit, transformers_vit
from sparse_vlm.teachers.load import OPEN_CLIP_READERS, stated_licence

HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def of_open_clip(name: str) -> Teacher:
    visual = open_clip.create_model(name, pretrained=None, device=torch.get_default_device()).visual
    return OPEN_CLIP_READERS[type(visual).__name__](name, visual, HALF, "")


def of_timm(name: str, **more: object) -> Teacher:
    return timm_vit.read(name, timm.create_model(name, **more), HALF)


def of_trunk(name: str) -> Teacher:
    """An open_clip model on a trunk of timm's."""
    from open_clip.timm_model import TimmModel

    return timm_vit.read_trunk(name, TimmModel(name, embed_dim=512, pool="token"), HALF)


def of_open_clip_toy(**more: object) -> Teacher:
    """Two blocks of open_clip's own class."""
    sizes = {"image_size": 64, "patch_size": 16, "width": 128, "layers": 2, "heads": 2, "mlp_ratio": 4.0, "output_dim": 32}
    return open_clip_vit.read("toy", open_clip.transformer.VisionTransformer(**sizes, **more), HALF, "")


def of_transformers(kind: str, **more: object) -> Teacher:
    config = {"clip": transformers.CLIPVisionConfig, "siglip": transformers.SiglipVisionConfig, "dinov2": transformers.Dinov2Config}[kind](
        **more
    )
    if kind == "clip":
        return transformers_vit.read_clip(kind, transformers.CLIPVisionModelWithProjection(config), HALF)
    if kind == "siglip":
        return transformers_vit.read_siglip(kind, transformers.SiglipVisionModel(config), HALF)
    return transformers_vit.read_dinov2(kind, transformers.Dinov2Model(config), HALF)


# name: (how to make it at its true size, where its blocks are, activation)
TRUE_SIZE: dict[str, tuple[Callable[[], Teacher], str, str]] = {
    "CLIP B/32 of OpenAI": (lambda: of_open_clip("ViT-B-32-quickgelu"), "transformer.resblocks", "quick_gelu"),
    "CLIP B/16 of OpenAI": (lambda: of_open_clip("ViT-B-16-quickgelu"), "transformer.resblocks", "quick_gelu"),
    "CLIP B/32 of LAION": (lambda: of_open_clip("ViT-B-32"), "transformer.resblocks", "gelu"),
    "CLIP B/16 of DataComp": (lambda: of_open_clip("ViT-B-16"), "transformer.resblocks", "gelu"),
    "SigLIP B/16 of open_clip": (lambda: of_open_clip("ViT-B-16-SigLIP"), "trunk.blocks", "gelu"),
    "DINOv2 S/14 under open_clip": (lambda: of_trunk("vit_small_patch14_dinov2"), "trunk.blocks", "gelu"),
    "AugReg B/16": (lambda: of_timm("vit_base_patch16_224"), "blocks", "gelu"),
    "CLIP B/32 of transformers": (
        lambda: of_transformers("clip", hidden_size=768, num_attention_heads=12, patch_size=32),
        "vision_model.encoder.layers",
        "quick_gelu",
    ),
    "SigLIP B/16 of transformers": (lambda: of_transformers("siglip"), "vision_model.encoder.layers", "gelu_tanh"),
    "DINOv2 B/14 of transformers": (lambda: of_transformers("dinov2", image_size=224, patch_size=14), "encoder.layer", "gelu"),
}
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
# name: (how to make it, its pixels, activation, the paper's recipe of its family)
LARGE: dict[str, tuple[Callable[[], Teacher], int, str, str]] = {
    "CLIP L/14 of OpenAI": (lambda: of_open_clip("ViT-L-14-quickgelu"), 224, "quick_gelu", "paper-clip-large"),
    "CLIP L/14-336 of OpenAI": (lambda: of_open_clip("ViT-L-14-336-quickgelu"), 336, "quick_gelu", "paper-clip-large"),
    "CLIP L/14 of LAION and DataComp": (lambda: of_open_clip("ViT-L-14"), 224, "gelu", "paper-clip-large"),
    "CLIP L/14 of transformers": (lambda: of_transformers("clip", **CLIP_L), 224, "quick_gelu", "paper-clip-large"),
    "CLIP L/14-336 of transformers": (lambda: of_transformers("clip", image_size=336, **CLIP_L), 336, "quick_gelu", "paper-clip-large"),
    "AugReg L/16": (lambda: of_timm("vit_large_patch16_224"), 224, "gelu", "paper-augreg-large"),
    "AugReg L/16-384": (lambda: of_timm("vit_large_patch16_384"), 384, "gelu", "paper-augreg-large"),
    "DINOv2 L/14 of transformers": (
        lambda: of_transformers("dinov2", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14),
        518,
        "gelu",
        "tiny",
    ),
}


def materialise(teacher: Teacher) -> Teacher:
    """Random weights for a model that was made on the meta device, which is faster than any library's own."""
    torch.manual_seed(0)
    model = teacher.model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and ("norm" in name or "ln_" in name) and name.endswith("weight")
        parameter.data.uniform_(*((0.75, 1.25) if norm else (-0.05, 0.05)))
    for name, buffer in model.named_buffers():
        if "position_ids" in name:
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    return teacher


def on_meta(make: Callable[[], Teacher], recipe: Recipe) -> tuple[Teacher, SparseFormer]:
    with torch.device("meta"):
        teacher = make()
        return teacher, SparseFormer(recipe.config(teacher.spec))


def check_mapping(teacher: Teacher, tower: SparseFormer, recipe: Recipe) -> None:
    rows = plan(tower, teacher, recipe)
    inventory = teacher.inventory
    assert {row.source for row in rows if row.source} == {*teacher.tensors, *inventory.left_out}
    assert sorted(row.target for row in rows if row.target) == sorted(tower.state_dict())
    assert all(row.reason for row in rows if row.fate == "left out")
    used = {source for sources in inventory.sources.values() for source in sources}
    assert used | set(inventory.left_out) == set(teacher.model.state_dict()), "every tensor of the source is used or left out"
    shapes = {name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    for row in rows:
        if row.target and row.source and not row.target.startswith(("cls_embedding", "glance.")):
            assert shapes[row.target] == tuple(teacher.tensors[row.source].shape), row


@pytest.mark.parametrize("name", TRUE_SIZE)
def test_at_true_size_nothing_is_forgotten_and_a_block_computes_what_the_teachers_does(name: str) -> None:
    make, where, activation = TRUE_SIZE[name]
    recipe = RECIPES["tiny"]
    with torch.device("meta"):
        unread = make()
    assert unread.spec.activation == activation
    # folding made copies on the meta device, so the teacher is read again once it has weights
    teacher = reread(materialise(unread))
    with torch.device("meta"):
        tower = SparseFormer(recipe.config(teacher.spec)).eval()
    check_mapping(teacher, tower, recipe)
    tower.to_empty(device="cpu")
    inherit(tower, teacher, recipe)
    number = teacher.spec.num_blocks - 2
    seen: dict[str, torch.Tensor] = {}

    def keep(module: nn.Module, args: tuple, kwargs: dict, out: object) -> None:
        seen["in"] = args[0] if args else kwargs["hidden_states"]
        seen["out"] = out[0] if isinstance(out, tuple) else out

    block = teacher.model.get_submodule(f"{where}.{number}")
    handle = block.register_forward_hook(keep, with_kwargs=True)
    torch.manual_seed(0)
    teacher(torch.randn(1, 3, teacher.spec.image_size, teacher.spec.image_size))
    handle.remove()
    unit = tower.units()[number]
    assert unit.ops == ("ATTN", "MLP")
    with torch.no_grad():
        ours, _ = unit(seen["in"], torch.zeros(1, 1, 4), None, None)
    assert (ours - seen["out"]).abs().max() <= 1e-4 * seen["out"].abs().max()
    assert (seen["out"] - seen["in"]).abs().max() > 1e-2 * seen["in"].abs().max(), "the block does something"


def reread(teacher: Teacher) -> Teacher:
    spec, model = teacher.spec, teacher.model
    if spec.name in ("clip", "siglip", "dinov2"):
        reader = {"clip": transformers_vit.read_clip, "siglip": transformers_vit.read_siglip, "dinov2": transformers_vit.read_dinov2}
        return reader[spec.name](spec.name, model, HALF)
    kind = type(model).__name__
    if kind == "TimmModel":
        return timm_vit.read_trunk(spec.name, model, HALF)
    return (timm_vit.read if "timm" in type(model).__module__ else open_clip_vit.read)(spec.name, model, HALF)


@pytest.mark.parametrize("name", LARGE)
def test_the_large_ones_are_accounted_for_on_the_meta_device(name: str) -> None:
    make, size, activation, paper = LARGE[name]
    for recipe in dict.fromkeys(("tiny", paper)):
        teacher, tower = on_meta(make, RECIPES[recipe])
        assert (teacher.spec.image_size, teacher.spec.num_blocks, teacher.spec.width) == (size, 24, 1024)
        assert teacher.spec.activation == tower.config.units[-1].activation == activation
        assert tower.config.num_tokens == (64 if "clip" in recipe else 50 if recipe == "tiny" else 49)
        check_mapping(teacher, tower, RECIPES[recipe])


@pytest.mark.parametrize(
    ("recipe", "make", "kept"),
    [
        ("paper-clip-base", lambda: of_open_clip("ViT-B-16-quickgelu"), "quick_gelu"),
        ("paper-augreg-base", lambda: of_timm("vit_base_patch16_224"), "gelu"),
    ],
)
def test_the_papers_recipes_drop_tune_and_freeze_a_third_each(recipe: str, make: Callable[[], Teacher], kept: str) -> None:
    teacher, tower = on_meta(make, RECIPES[recipe])
    rows = plan(tower, teacher, RECIPES[recipe])
    fates = {int(row.source.split(".")[1]): row.fate for row in rows if row.source.startswith("blocks.")}
    assert fates == {i: ("left out", "tuned", "frozen")[i // 4] for i in range(12)}
    assert {unit.activation for unit in tower.config.units[2:]} == {kept}
    assert tower.config.units[0].activation == "gelu", "the focusing unit is the paper's own"


TOYS: dict[str, Callable[[], Teacher]] = {
    "open_clip, LayerScale": lambda: of_open_clip_toy(ls_init_value=0.1),
    "open_clip, QuickGELU": lambda: of_open_clip_toy(act_layer=open_clip.transformer.QuickGELU),
    "timm, CLS token": lambda: of_timm("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=10),
    "timm, LayerScale": lambda: of_timm("vit_small_patch14_dinov2", img_size=56, depth=2),
    "timm, positions without CLS": lambda: of_timm("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=0, no_embed_class=True),
    "timm, attention pool": lambda: of_timm("vit_base_patch16_siglip_224", img_size=64, depth=2, embed_dim=128, num_heads=2),
    "transformers CLIP": lambda: of_transformers(
        "clip", hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16
    ),
    "transformers SigLIP": lambda: of_transformers(
        "siglip", hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16
    ),
    "transformers DINOv2": lambda: of_transformers(
        "dinov2", hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    ),
}


@pytest.mark.parametrize("name", TOYS)
def test_with_one_cell_a_patch_the_student_begins_as_the_teacher(name: str) -> None:
    """Head, norms, LayerScale, activation, positions and biases: whatever is lost on the way would show here."""
    with torch.device("meta"):
        unread = TOYS[name]()
    teacher = reread(materialise(unread))
    recipe = RECIPES["tiny-pool"]
    config = recipe.config(teacher.spec)
    config = dataclasses.replace(config, num_latent_tokens=16, glance=dataclasses.replace(config.glance, points_per_side=1))
    tower = SparseFormer(config).eval()
    inherit(tower, teacher, recipe)
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, teacher.spec.image_size, teacher.spec.image_size)
    with torch.no_grad():
        ours, theirs = tower(pixels), teacher(pixels)
    assert (ours.image_embeds - theirs.embeds).abs().max() <= 1e-4 * theirs.embeds.abs().max()
    assert (ours.last_hidden_state[:, -16:] - theirs.patches).abs().max() <= 1e-4 * theirs.patches.abs().max()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: of_timm("vit_base_patch14_reg4_dinov2"), "register tokens"),
        (lambda: of_timm("vit_base_patch16_224", qkv_bias=False), "no biases"),
        (lambda: of_timm("vit_base_patch16_224", global_pool="avg"), "head"),
        (lambda: of_timm("vit_base_patch16_224", act_layer="relu"), "activation ReLU"),
        (lambda: of_trunk("eva02_tiny_patch14_224"), "Eva"),
        (lambda: of_transformers("dinov2", use_swiglu_ffn=True), "SwiGLU"),
        (lambda: of_transformers("clip", hidden_act="relu"), "activation relu"),
    ],
)
def test_what_cannot_be_inherited_from_is_refused_with_a_reason(make: Callable[[], Teacher], message: str) -> None:
    with torch.device("meta"), pytest.raises(TeacherError, match=message):
        make()


def test_a_recipe_that_does_not_fit_the_teacher_is_refused() -> None:
    with pytest.raises(UserError, match="siglip has no CLS token"):
        on_meta(lambda: of_transformers("siglip"), RECIPES["paper-clip-base"])
    with pytest.raises(UserError, match="heads of size 96, this recipe's student of 64"):
        on_meta(lambda: of_transformers("dinov2", num_attention_heads=8), RECIPES["tiny-focus"])
    teacher, tower = on_meta(lambda: of_open_clip("ViT-L-14-quickgelu"), RECIPES["paper-clip-large"])
    with pytest.raises(TeacherError, match="the recipe maps 26 units, and its student has 18"):
        plan(tower, teacher, dataclasses.replace(RECIPES["paper-clip-large"], dropped=0))
    teacher, tower = on_meta(lambda: of_timm("vit_base_patch16_224"), RECIPES["tiny"])
    with torch.device("meta"):
        headless = SparseFormer(dataclasses.replace(tower.config, head_bias=False))
    with pytest.raises(TeacherError, match=r"the recipe's student has no proj\.bias"):
        plan(headless, teacher, RECIPES["tiny"])


def write_transformers_teacher(folder: Path, kind: str = "clip") -> str:
    """A model of two blocks with random weights."""
    sides = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}
    text, vision = {**sides, "vocab_size": 64}, {**sides, "image_size": 64, "patch_size": 16}
    if kind == "clip":
        model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
    elif kind == "siglip":
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**vision))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}))
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\n# A model\n")
    return f"transformers:{folder}"


@pytest.mark.parametrize("side", ["text_config", "vision_config"])
def test_layers_of_either_side_are_counted_before_they_are_made(tmp_path: Path, side: str) -> None:
    name = write_transformers_teacher(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    described[side]["num_hidden_layers"] = 10**7
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(TeacherError, match="num_hidden_layers 10000000; no model has more than 1024"):
        load_teacher(name)


@pytest.mark.parametrize(
    ("kind", "activation", "embed_dim", "norm_pre"),
    [("clip", "quick_gelu", 32, True), ("siglip", "gelu_tanh", 64, False), ("dinov2", "gelu", 64, False)],
)
def test_a_teacher_is_loaded_from_a_folder_of_transformers(
    kind: str, activation: str, embed_dim: int, norm_pre: bool, tmp_path: Path
) -> None:
    teacher = load_teacher(write_transformers_teacher(tmp_path / kind, kind))
    spec = teacher.spec
    assert (spec.image_mean, spec.image_std, spec.licence) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7), "mit")
    assert (spec.activation, spec.width, spec.num_blocks, spec.embed_dim, spec.norm_pre) == (activation, 64, 2, embed_dim, norm_pre)
    written = load_file(tmp_path / kind / "model.safetensors")
    assert any(torch.equal(teacher.tensors["blocks.1.mlp.fc1.weight"], tensor) for tensor in written.values())


def test_missing_weights_are_not_passed_over(tmp_path: Path) -> None:
    name = write_transformers_teacher(tmp_path / "clip")
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    weights.pop("vision_model.encoder.layers.1.mlp.fc1.weight")
    save_file(weights, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherError, match=r"lack 1 tensor, .*layers\.1\.mlp\.fc1\.weight"):
        load_teacher(name)


def test_a_teacher_of_timm_is_loaded_from_a_file(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224")
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    teacher = load_teacher(f"timm:vit_tiny_patch16_224@{tmp_path / 'vit.pth'}")
    assert torch.equal(teacher.tensors["blocks.3.mlp.fc1.weight"], model.blocks[3].mlp.fc1.weight)
    assert (teacher.spec.embed_dim, teacher.spec.head_bias, teacher.spec.image_mean) == (1000, True, (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("local-dir:nowhere", "no open_clip_config.json"),
        ("ViT-B-16-quickgelu", "NAME@TAG"),
        ("NoSuchModel", "knows no such model"),
        ("ViT-B-16@openai", "give ViT-B-16-quickgelu@openai"),
        ("timm:vit_tiny_patch16_225", "similar are vit_tiny"),
        ("timm:vit_tiny_patch16_224@nowhere.pth", "nowhere.pth: no such file"),
        ("transformers:./nowhere", "nowhere: no such folder"),
    ],
)
def test_a_teacher_that_cannot_be_loaded_is_one_line(name: str, message: str) -> None:
    with pytest.raises(TeacherError, match=message) as caught:
        load_teacher(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "split", "teacher"),
    [
        ("local-dir:a@b", ("local-dir:a@b", None), True),
        ("ViT-B-16@openai", ("ViT-B-16", "openai"), True),
        ("timm:vit_tiny_patch16_224", ("timm:vit_tiny_patch16_224", None), True),
        ("transformers:openai/clip-vit-base-patch16@main", ("transformers:openai/clip-vit-base-patch16", "main"), True),
        ("build/tiny", ("build/tiny", None), False),
    ],
)
def test_names_of_teachers(name: str, split: tuple[str, str | None], teacher: bool) -> None:
    assert (split_tag(name), is_teacher(name)) == (split, teacher)


def test_a_licence_is_read_from_the_card(tmp_path: Path) -> None:
    assert stated_licence(None) == stated_licence(tmp_path) == ""
    (tmp_path / "README.md").write_text("# No front matter\nlicense: none\n")
    assert stated_licence(tmp_path) == ""
    (tmp_path / "README.md").write_text("---\nlibrary_name: x\nlicense: apache-2.0\n---\ntext")
    assert stated_licence(tmp_path) == "apache-2.0"


def test_size_of_a_model_with_a_text_tower_of_transformers_is_checked_by_its_image_side(tmp_path):
    from sparse_vlm.teachers.sizes import check_size

    folder = tmp_path / "teacher"
    write_teacher(folder)
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"] = {"hf_model_name": "nowhere/to-be-found", "hf_proj_type": "linear"}
    path.write_text(json.dumps(config))
    check_size(folder)  # the text tower is neither fetched nor made
    config["model_cfg"]["vision_cfg"]["width"] = 1024
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="parameters"):
        check_size(folder)
