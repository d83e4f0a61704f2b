"""What the project is as a whole: light to import, whole when installed, and nothing in it that does not belong."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from interpreters import BLOCK, IMPORT_NAMES, python
from modules import MODULES

import sparse_vlm

ROOT = Path(__file__).resolve().parents[2]
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".json", ".yml", ".cfg", ".sh", ""}


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=False, cwd=ROOT)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def test_import_alone_loads_nothing_heavy():
    assert (
        python("import sys, sparse_vlm; print('torch' in sys.modules, 'PIL' in sys.modules, 'transformers' in sys.modules)")
        == "False False False\n"
    )


def test_every_export_is_there():
    for name in sparse_vlm.__all__:
        assert getattr(sparse_vlm, name).__name__ == name
        assert name in dir(sparse_vlm)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = sparse_vlm.Nothing


def test_tower_needs_torch_alone():
    absent = ["transformers", "open_clip", "PIL", "numpy", "typer", "peft", "rich", "matplotlib", "huggingface_hub", "triton"]
    code = """
import warnings; warnings.simplefilter("ignore")
import torch
from sparse_vlm import SparseFormer, SparseFormerConfig
tower = SparseFormer(SparseFormerConfig.named("sparseformer_v1_tiny")).eval()
with torch.no_grad():
    print(tuple(tower(torch.zeros(1, 3, 224, 224)).image_embeds.shape)[0])
"""
    assert python(BLOCK.format(absent=absent) + code) == "1\n"


def test_tower_is_imported_soon_after_torch():
    """The best of three, so that a busy machine does not fail it."""
    code = "import time, torch; began = time.perf_counter(); import sparse_vlm.tower; print(time.perf_counter() - began)"
    assert min(float(python(code)) for _ in range(3)) < 0.3


def test_core_imports_without_what_only_extras_install():
    absent = [
        "flash_attn",
        "deepspeed",
        "open_clip",
        "timm",
        "torchvision",
        "pycocoevalcap",
        "sklearn",
        "skimage",
        "datasets",
        "webdataset",
        "onnxscript",
        "onnxruntime",
        "triton",
        "starlette",
        "uvicorn",
        "prometheus_client",
    ]
    of_extras = (["train"], ["eval"], ["serve"])
    core = [name for name, path in MODULES.items() if name.split(".")[1:2] not in of_extras and not is_kernel(path)]
    python(BLOCK.format(absent=absent) + "\n".join(f"import {name}" for name in core))


def is_kernel(path: Path) -> bool:
    """Whether a module holds kernels, which nothing imports before they run: they are written in triton."""
    return path.parent.name == "triton" and "\nimport triton\n" in path.read_text(encoding="utf-8")


def required(extra: str | None) -> set[str]:
    """Import names of the distributions that an extra (None: the core) asks for."""
    found = set()
    for line in importlib.metadata.requires("sparse-vlm") or ():
        marker = re.search(r"extra == ['\"](\w+)['\"]", line)
        if (marker and marker[1]) == extra:
            name = re.match(r"[\w.-]+", line)[0]
            found.add(IMPORT_NAMES.get(name, name))
    return found


def test_everything_imported_is_declared():
    core, extras = required(None), required("train") | required("eval")
    asked_for = extras | required("hub") | required("deepspeed") | required("export") | required("lmms") | required("heif")
    undeclared = set()
    for name, path in MODULES.items():
        allowed = core | extras if name.split(".")[1:2] in (["train"], ["eval"]) else core
        allowed = allowed | required("serve") if name.split(".")[1:2] == ["serve"] else allowed
        allowed = allowed | {"triton"} if is_kernel(path) else allowed
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for module in imported:
                top = module.split(".")[0]
                # Inside a function an import may be of an extra: whoever calls it is told what to install.
                fine = allowed | asked_for if node.col_offset else allowed
                if top not in sys.stdlib_module_names | {"sparse_vlm"} | fine:
                    undeclared.add(f"{path.relative_to(ROOT)}:{node.lineno} {top}")
    assert not undeclared


def test_every_declared_distribution_is_imported():
    imported = set()
    for path in MODULES.values():
        imported |= set(re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    # transformers imports gguf itself, and only when it is there.
    assert required(None) | required("train") | required("eval") <= imported | {"gguf"}


def test_every_package_is_installed_with_its_whole_name():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read toml")
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert set(setuptools["packages"]) == packages | {"sparse_vlm.model_zoo"}
    assert {folder: name for name, folder in setuptools["package-dir"].items()} == {
        "train": "sparse_vlm.train",
        "eval": "sparse_vlm.eval",
        "model_zoo": "sparse_vlm.model_zoo",
    }


def test_no_file_is_long():
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in tracked() if path.suffix == ".py"
    }
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def test_weights_are_safetensors():
    assert [path.name for path in tracked() if path.suffix in {".pt", ".pth", ".bin", ".pkl", ".ckpt", ".npz", ".npy", ".gguf"}] == []


@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        ("a folder of one machine", r"(?<![\w.~/-])/(?:home|Users|root|work|tmp|mnt|scratch)/\w"),
        ("a key", r"\b(?:sk-[A-Za-z0-9]{20,}|hf_[A-Za-z0-9]{30,}|ghp_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16})\b|-----BEGIN [A-Z ]*PRIVATE KEY"),
        ("work left undone", r"\b(?:TODO|FIXME|XXX)\b"),
    ],
)
def test_no_file_holds(what, pattern):
    found = []
    for path in tracked():
        if path.suffix in TEXT_SUFFIXES and path != Path(__file__):
            text = path.read_text(encoding="utf-8")
            found += [
                f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}" for match in re.finditer(pattern, text)
            ]
    assert not found, what


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_lead_somewhere():
    broken = []
    for page in (path for path in tracked() if path.suffix == ".md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            there = page.parent / path if path else page
            if "://" not in target and not (there.exists() and (not anchor or anchor in anchors(there))):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken
