"""The tower in the original LLaVA code base: in its own world where the packages install, and what needs no LLaVA here.

`llava_checks.py` holds what is checked inside LLaVA's own modules, and is run once, in a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import llava_checks
import pytest
import torch
from commands import free_port
from interpreters import BLOCK, IMPORT_NAMES, python
from PIL import Image
from safetensors.torch import load_file

from sparse_vlm import SparseFormer, SparseFormerConfig, UserError
from sparse_vlm.images.preprocess import preprocess
from sparse_vlm.integrations.llava_tower import LlavaImageProcessor, SparseFormerVisionTower, TowerName
from sparse_vlm.llava import install

ROOT = Path(__file__).resolve().parents[3]
PLAIN = types.SimpleNamespace(mm_vision_select_layer=-1)


# ---- in LLaVA's own world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of LLaVA's packages."""
    folder = tmp_path_factory.mktemp("llava") / "world"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--only-binary=:all:"]
    done = subprocess.run([*pip, "--target", str(folder), *llava_checks.PACKAGES], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"LLaVA 1.2.2 and transformers 4.37 do not install here: {done.stderr.strip().splitlines()[-1:]}")
    return folder


@pytest.fixture(scope="session")
def outcome(world: Path) -> dict[str, str | None]:
    """Name of each check to None, or to how it failed."""
    line = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "llava_checks.py"), str(world.parent / "models")]
    paths = os.pathsep.join([str(world), str(ROOT)])
    done = subprocess.run(line, capture_output=True, text=True, timeout=400, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", llava_checks.names())
def test_in_llava(name: str, outcome: dict[str, str | None]) -> None:
    assert outcome[name] is None, outcome[name]


@pytest.fixture(scope="session")
def alone(world: Path) -> dict[str, str]:
    """The environment of a process, to be started with -S, that has LLaVA's packages and of ours only what LLaVA has too."""
    beside = world.parent / "beside"
    beside.mkdir()
    absent = {"datasets", "peft", "open_clip", "open_clip_torch", "timm", "torchvision", "bitsandbytes", "sparse_vlm", "tensorboard"}
    absent |= {package.split("==")[0] for package in llava_checks.PACKAGES}
    for entry in Path(torch.__file__).parents[1].iterdir():
        if re.split(r"[-.]", entry.name)[0] not in absent and entry.suffix != ".pth":
            (beside / entry.name).symlink_to(entry)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (world, beside, ROOT, ROOT / "tests"))), "PYTHONWARNINGS": "ignore"}


def test_the_launcher_trains_in_two_stages(world: Path, alone: dict[str, str], tmp_path: Path) -> None:
    """What docs/plug-in.md says, by LLaVA's own train.py: a projector, then all of it, tower included."""
    for package in ("deepspeed", "sentencepiece"):
        pytest.importorskip(package)
    (launcher,) = re.findall(
        r"```python\n(import sparse_vlm\.llava\n.*?)```", (ROOT / "docs" / "plug-in.md").read_text(encoding="utf-8"), re.DOTALL
    )
    (tmp_path / "train_sparse.py").write_text(launcher)

    def run(*line: str) -> str:
        done = subprocess.run([sys.executable, "-S", *line], capture_output=True, text=True, timeout=300, env=alone, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    given = {
        "model_name_or_path": "llm", "data_path": "talks.json", "image_folder": ROOT / "examples", "lazy_preprocess": True,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -1, "bf16": True, "use_cpu": True, "num_train_epochs": 1,
        "per_device_train_batch_size": 2, "learning_rate": 0.01, "logging_steps": 1, "save_strategy": "no", "model_max_length": 512,
    }  # fmt: skip

    def train(**changes: object) -> list[float]:
        """The loss of each step."""
        options = [str(each) for name, value in {**given, **changes}.items() for each in (f"--{name}", value)]
        return [float(loss) for loss in re.findall(r"'loss': ([\d.]+)", run("train_sparse.py", *options, "--report_to", "none"))]

    run("-c", "import llava_checks, pathlib; llava_checks.save_talks(pathlib.Path())")
    tower = "sparse-vlm:tower"
    losses = train(vision_tower=tower, version="plain", tune_mm_mlp_adapter=True, output_dir="llava-align")
    assert len(losses) == 2 and min(losses) > 1
    projector = torch.load(tmp_path / "llava-align" / "mm_projector.bin", weights_only=True)
    assert {tuple(weight.shape) for weight in projector.values()} == {(32, 64), (32,), (32, 32)}
    tuned_tower, adapter = f"{tower}?tokens=4&unfreeze=true", "llava-align/mm_projector.bin"
    losses = train(vision_tower=tuned_tower, version="v1", pretrain_mm_mlp_adapter=adapter, output_dir="llava-tuned")
    assert len(losses) == 2 and min(losses) > 1
    assert json.loads((tmp_path / "llava-tuned" / "config.json").read_text())["mm_vision_tower"] == tuned_tower
    tuned = load_file(tmp_path / "llava-tuned" / "model.safetensors")
    for name, weight in projector.items():
        assert tuned[name].shape == weight.shape and not torch.equal(tuned[name], weight)
    before = load_file(tmp_path / "tower" / "model.safetensors")
    after = {name.split("vision_tower.vision_tower.")[1]: weight for name, weight in tuned.items() if "vision_tower" in name}
    assert after.keys() <= before.keys() and not torch.equal(after["layers.0.mlp.fc1.weight"].float(), before["layers.0.mlp.fc1.weight"])


# ---- what needs no LLaVA


@pytest.fixture
def name(tmp_path: Path) -> str:
    return llava_checks.save_tower(tmp_path / "tower")


def test_nothing_but_torch_numpy_pillow_and_safetensors_is_needed() -> None:
    """A person's LLaVA environment has none of the rest, or another version of it."""
    declared = {re.match(r"[\w.-]+", line)[0] for line in importlib.metadata.requires("sparse-vlm") or ()}
    absent = {IMPORT_NAMES.get(each, each.replace("-", "_")) for each in declared} - {"torch", "numpy", "PIL", "safetensors", "sparse_vlm"}
    assert {"transformers", "huggingface_hub", "typer", "rich", "peft", "accelerate", "open_clip"} <= absent
    code = """
import types
from PIL import Image
from sparse_vlm.llava import SparseFormerVisionTower
tower = SparseFormerVisionTower("sparse-vlm:tiny?tokens=25", types.SimpleNamespace(mm_vision_select_layer=-1))
pixels = tower.image_processor(Image.open("examples/chelsea.jpg"))["pixel_values"]
print(*tower(pixels)[0, :, 0].tolist())
"""
    seen = [float(number) for number in python(BLOCK.format(absent=sorted(absent)) + code).split()]
    tower = SparseFormer.from_pretrained("tiny", num_tokens=25)
    config = tower.config
    pixels = preprocess(Image.open(ROOT / "examples" / "chelsea.jpg"), config.image_size, config.image_mean, config.image_std)
    with torch.no_grad():
        wanted = tower.visual_tokens(pixels)[0, :, 0]
    torch.testing.assert_close(torch.tensor(seen), wanted, rtol=1e-4, atol=1e-4)


def test_where_there_is_no_llava_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not (Path(entry) / "llava").is_dir()])
    with pytest.raises(UserError, match="LLaVA is not installed"):
        install()


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("?tokens=many", "tokens=many: expected a number"),
        ("?tokens=0", "tokens=0: expected a number"),
        ("?unfreeze=1", "unfreeze=1: expected true or false"),
        ("?layer=3", "'layer'"),
        ("?tokens", "not of the form tokens=25&unfreeze=true"),
        ("?tokens=99", "4 to 16 tokens"),
    ],
)
def test_a_name_that_says_nothing_sensible_is_refused(name: str, query: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        SparseFormerVisionTower(name + query, PLAIN, delay_load=True)


def test_names_are_read() -> None:
    assert TowerName.parse("sparse-vlm:tiny") == TowerName("tiny", None, False)
    assert TowerName.parse("sparse-vlm:a/b?tokens=25&unfreeze=true") == TowerName("a/b", 25, True)
    with pytest.raises(UserError, match="name a folder or a tower of the zoo"):
        TowerName.parse("sparse-vlm:")
    with pytest.raises(UserError, match="is projector and adapters of a vision-language model, not a SparseFormer"):
        SparseFormerVisionTower("sparse-vlm:tiny-chat", PLAIN)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mm_vision_select_layer": -2}, "set --mm_vision_select_layer -1, not -2"),
        ({"mm_vision_select_feature": "cls"}, "is patch or cls_patch, not cls"),
        ({"s2": True}, "does not support S2"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": "[(336, 672)]"}, "multiples of 32 pixels"),
        ({"image_aspect_ratio": "anyres"}, "not None"),
        ({"mm_patch_merge_type": "spatial", "mm_vision_select_feature": "cls_patch"}, "its 10 tokens are not a square grid"),
    ],
)
def test_settings_that_would_need_something_else_are_refused(name: str, changes: dict, said: str) -> None:
    args = types.SimpleNamespace(**{**vars(PLAIN), **changes})
    with pytest.raises(UserError, match=re.escape(said)):
        SparseFormerVisionTower(name, args, delay_load=True)


def test_pinpoints_of_whole_tiles_are_taken(name: str) -> None:
    args = types.SimpleNamespace(mm_vision_select_layer=-1, image_aspect_ratio="anyres", image_grid_pinpoints="[(32, 64), (64, 64)]")
    assert SparseFormerVisionTower(name, args, delay_load=True).num_patches_per_side == 3


def test_a_tower_without_cls_gives_none(tmp_path: Path) -> None:
    config = SparseFormerConfig.named("sparseformer_v1_tiny")
    assert config.cls_before_unit is None
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    args = types.SimpleNamespace(mm_vision_select_layer=-1, mm_vision_select_feature="cls_patch")
    with pytest.raises(UserError, match="has no CLS token; set --mm_vision_select_feature patch"):
        SparseFormerVisionTower(f"sparse-vlm:{tmp_path}", args, delay_load=True)
    later = SparseFormerVisionTower(f"sparse-vlm:{tmp_path}", PLAIN, delay_load=True)
    assert (later.num_patches, later.hidden_size) == (49, 512)  # known where there are no weights at all
    with pytest.raises(RuntimeError, match=r"is not loaded; call load_model\(\) first"):
        later(torch.zeros(1, 3, 32, 32))
    with pytest.raises(UserError, match="its 49 tokens are not a square grid"):  # they begin as the published models' do
        _ = later.num_patches_per_side
    with pytest.raises(UserError, match=r"model\.safetensors"):
        later.load_model()


def test_published_towers_give_48_patches_or_49_with_cls(tmp_path: Path) -> None:
    config = SparseFormerConfig.named("sparseformer_btsp_openai_clip_base")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    for feature, tokens in (("patch", 48), ("cls_patch", 49)):
        args = types.SimpleNamespace(mm_vision_select_layer=-1, mm_vision_select_feature=feature)
        assert SparseFormerVisionTower(f"sparse-vlm:{tmp_path}", args, delay_load=True).num_patches == tokens


def test_loading_twice_changes_nothing_and_goes_where_it_is_told(name: str) -> None:
    tower = SparseFormerVisionTower(name, PLAIN, delay_load=True)
    with pytest.raises(UserError, match="cannot be split"):
        tower.load_model({"a": "cpu", "b": "meta"})
    tower.load_model({"": "cpu"})
    first = tower.vision_tower
    tower.load_model("meta")
    assert tower.vision_tower is first and tower.device == torch.device("cpu")
    elsewhere = SparseFormerVisionTower(name, PLAIN, delay_load=True)
    elsewhere.load_model("meta")
    assert elsewhere.device == torch.device("meta")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_rois_are_exact_and_the_images_keep_their_dtype(name: str, dtype: torch.dtype) -> None:
    tower = SparseFormerVisionTower(name, PLAIN)
    pixels = torch.rand(2, 3, 32, 32)
    wanted = tower(pixels)
    rois = tower.vision_tower.initial_roi.weight.clone()
    half = torch.nn.ModuleList([tower]).to(device="cpu", dtype=dtype)[0]
    assert half.dtype == dtype == half.dummy_feature.dtype
    assert torch.equal(half.state_dict()["vision_tower.initial_roi.weight"], rois)
    out = half(pixels)
    assert out.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(out, wanted, dim=-1).min() > 0.999
    # a host that puts rounded tensors in place of a module's own
    half.vision_tower.initial_roi.weight = torch.nn.Parameter(rois.to(dtype), requires_grad=False)
    assert torch.equal(half(pixels), out)
    assert torch.equal(half.state_dict()["vision_tower.initial_roi.weight"], rois)


def test_gradients_flow_where_the_tower_is_tuned(name: str) -> None:
    pixels = torch.rand(1, 3, 32, 32, requires_grad=True)
    assert not SparseFormerVisionTower(name, PLAIN)(pixels).requires_grad
    args = types.SimpleNamespace(mm_vision_select_layer=-1, unfreeze_mm_vision_tower=True)
    tower = SparseFormerVisionTower(name, args, delay_load=True)
    assert tower.is_loaded, "a checkpoint has weights for it"
    tower([pixels[0]])[0].sum().backward()
    assert tower.vision_tower.layers[0].attn.qkv.weight.grad is not None
    with torch.no_grad():
        assert not tower(pixels).requires_grad


def test_a_tower_made_where_nothing_is_to_be_made_is_whole(name: str) -> None:
    wanted = SparseFormerVisionTower(name, PLAIN).state_dict()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert torch.nn.Linear(1, 1).weight.is_meta
            state = SparseFormerVisionTower(name, PLAIN).state_dict()
            assert torch.nn.Linear(1, 1).weight.dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(tensor, state[key]) and tensor.dtype == state[key].dtype for key, tensor in wanted.items())


def test_the_image_processor_takes_pictures_alone() -> None:
    processor = LlavaImageProcessor(SparseFormerConfig.named("sparseformer_v1_tiny"))
    picture = Image.new("L", (300, 40), 200)
    assert processor(picture)["pixel_values"].shape == (1, 3, 224, 224)
    assert processor.preprocess([picture] * 2, return_tensors="pt")["pixel_values"].shape == (2, 3, 224, 224)
    with pytest.raises(UserError, match="takes PIL images, not Tensor"):
        processor(torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match="return_tensors='pt'"):
        processor(picture, return_tensors="np")


ZERO3 = """
import deepspeed, sys, torch, types
from sparse_vlm.integrations.llava_tower import SparseFormerVisionTower
deepspeed.init_distributed("gloo")
args = types.SimpleNamespace(mm_vision_select_layer=-1)
config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0, "zero_allow_untested_optimizer": True}
config["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 0}

class Model(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.vision_tower = SparseFormerVisionTower(name, args, delay_load=True)
        self.mm_projector = torch.nn.Linear(self.vision_tower.hidden_size, 8)
    def forward(self, images):
        return self.mm_projector(self.vision_tower(images))

def optimizer(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)

for name in (sys.argv[1], sys.argv[1] + "?unfreeze=true"):
    plain = Model(name)
    plain.vision_tower.load_model()
    with deepspeed.zero.Init(config_dict_or_path=config):  # a dtype of one's own is lost on processors without float16
        model = Model(name)
        assert hasattr(model.mm_projector.weight, "ds_id"), "DeepSpeed has taken what was made here"
    model.vision_tower.load_model()
    with deepspeed.zero.GatheredParameters(list(model.mm_projector.parameters()), modifier_rank=0):
        model.mm_projector.load_state_dict(plain.mm_projector.state_dict())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer(model), config=config)
    assert model.vision_tower.vision_tower.norm.weight.numel() == 0, "and the tower too, by now"
    images, step = torch.rand(2, 3, 32, 32), optimizer(plain)
    for _ in range(3):
        wanted, loss = plain(images).square().mean(), engine(images).square().mean()
        wanted.backward(); step.step(); step.zero_grad()
        engine.backward(loss); engine.step()
        torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-6)
    print("learnt", wanted.item())
"""


def test_zero3_learns_what_one_process_does(name: str, tmp_path: Path) -> None:
    """LLaVA makes its model inside of zero.Init, where a tensor is taken as soon as it is made; the tower is loaded outside."""
    pytest.importorskip("deepspeed", reason="ZeRO-3 needs DeepSpeed")
    (tmp_path / "zero3.py").write_text(ZERO3)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    line = [sys.executable, "-W", "ignore", str(tmp_path / "zero3.py"), name]
    done = subprocess.run(line, capture_output=True, text=True, timeout=500, env={**os.environ, **alone})
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("learnt") == 2
