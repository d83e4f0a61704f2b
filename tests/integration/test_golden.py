"""What users hold, pinned: options, JSON documents, folders, imports, names of tensors and of what can be chosen.

`fixtures/golden.json` holds what is right; `PYTHONPATH=tests python tests/integration/test_golden.py --record` writes it anew.
Short runs of the command make the documents and folders. Imports and recipe numbers that were recorded are tried again even where no page
and no field names them any more, so that old spellings are known to work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import re
import runpy
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

import commands
import eval_fakes
import numpy as np
import pytest
import tiny_teacher
import tiny_vlm

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).resolve().parents[1] / "fixtures" / "golden.json"
BENCH_SCHEMA = ROOT / "docs" / "bench-schema.json"
READ_BY_USERS = ("README.md", "pyproject.toml", "docs/*.md", "examples/*.md", "examples/**/*.py", "examples/**/*.sh", "examples/**/*.md")
PACKAGES = ("sparse_vlm", "sparse_vlm.tower", "sparse_vlm.vlm", "sparse_vlm.teachers", "sparse_vlm.kernels", "sparse_vlm.llava")
# Everything internal that is asked here, and the one place to change where it moves.
APP = "sparse_vlm.cli:app"
GET_RECIPE, CHANGED, RECIPE = (
    "sparse_vlm.distill.recipes:get_recipe",
    "sparse_vlm.distill.recipes:changed",
    "sparse_vlm.distill.recipes:Recipe",
)
PUBLISHED_TOWERS = "sparse_vlm.tower.released:PUBLISHED"
TABLES = {  # what can be chosen by name, and what of each entry is pinned beside the name
    "recipe": ("sparse_vlm.distill.recipes:RECIPES", lambda recipe: numbers_of(recipe)),
    "eval task": ("sparse_vlm.eval.tasks:TASKS", lambda task: " ".join(task.files)),
    "eval control of VLMs": ("sparse_vlm.eval.task:CONTROLS", None),
    "eval control of towers": ("sparse_vlm.eval.task:TOWER_CONTROLS", None),
    "projector": ("sparse_vlm.vlm.projectors:PROJECTORS", None),
    "default projector": ("sparse_vlm.vlm.projectors:MLP", None),
    "export format": ("sparse_vlm.export.formats:FORMATS", lambda one: " ".join((*sorted(one.writers), *one.dtypes))),
    "bench baseline": ("sparse_vlm.bench.vision:BASELINES", None),
    "bench model of --rivals": ("sparse_vlm.bench.vision:BOX", None),
    "bench reduction": ("sparse_vlm.bench.vision:REDUCTIONS", None),
    "bench llm": ("sparse_vlm.bench.llms:SHAPES", None),
    "teacher prefix of open_clip": ("sparse_vlm.teachers.load:LOCATED", None),
    "teacher library": ("sparse_vlm.teachers.load:LIBRARIES", None),
    "train stage": ("sparse_vlm.train.vlm:STAGES", None),
    "train reporter": ("sparse_vlm.train.run:REPORTERS", None),
    "train quantize": ("sparse_vlm.vlm.quantize:FORMATS", None),
    "train on bad image": ("sparse_vlm.data.bad_images:ON_BAD_IMAGE", None),
    "train data mix": ("sparse_vlm.data.conversations:MIXTURES", None),
    "deepspeed": ("sparse_vlm.train.zero:CONFIGS", None),
    "chat save suffix": ("sparse_vlm.vlm.chat:WRITERS", None),
    "zoo kind": ("sparse_vlm.hub.store:KINDS", None),
    "zoo source": ("sparse_vlm.hub.store:SOURCES", None),
    "published tower": (PUBLISHED_TOWERS, None),
}
# Written by torch, transformers or peft in a form of theirs: pinned by name alone.
NOT_OURS = {"trainer_state.json", "adapter_config.json", "preprocessor_config.json"}
# Null where a machine or an answer allows no measurement: pinned by name alone.
MEASURED = {"value", "low", "high", "bound", "peak_bytes", "tokens_per_second"}
Entries = dict[str, str]


def named(where: str) -> Any:
    """What `module:name` names."""
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)


# ---- one entry for each thing


def shape_of(value: Any, root: str, at: str = "") -> Entries:
    """Each way into a JSON document, and the types that stand there; of `format` the value."""
    if isinstance(value, dict) and value:
        parts = [shape_of(each, root, f"{at}.{key.replace(root, 'ROOT')}".lstrip(".")) for key, each in value.items()]
    elif isinstance(value, list) and value:
        parts = [shape_of(each, root, f"{at}[]") for each in value]
    elif at.endswith("format"):
        return {at: value}
    elif at.rpartition(".")[2] in MEASURED:
        return {at: "measured"}
    else:
        return {at: "null" if value is None else type(value).__name__}
    found: dict[str, set[str]] = {}
    for part in parts:
        for key, types in part.items():
            found.setdefault(key, set()).update(types.split("|"))
    return {key: "|".join(sorted(types)) for key, types in found.items()}


def tensors_of(tensors: dict[str, tuple[str, tuple[int, ...]]], at: str) -> Entries:
    """Names of tensors, those of blocks as one, with dtype and number of axes; and a digest of all names, dtypes and shapes."""
    found = {f"{at}: {re.sub(r'(?<=[.])[0-9]+(?=[.])', '*', name)}": f"{dtype} {len(shape)}d" for name, (dtype, shape) in tensors.items()}
    digest = hashlib.sha256(json.dumps(sorted(tensors.items())).encode()).hexdigest()[:16]
    return {**found, f"{at}: all": f"{len(tensors)} tensors, {digest}"}


def tensors_in(path: Path, at: str) -> Entries:
    """The same of a safetensors file, by its header."""
    with open(path, "rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return tensors_of({name: (info["dtype"], tuple(info["shape"])) for name, info in header.items() if name != "__metadata__"}, at)


def folder(path: Path, root: Path) -> Entries:
    """Every file below a folder, and what it holds."""
    found: Entries = {}
    for file in sorted(path.rglob("*")):
        name = re.sub(r"[0-9a-f]{16}", "DIGEST", file.relative_to(path).as_posix())
        if not file.is_file() or file.name.startswith("."):
            continue
        found[name] = "file"
        if file.suffix == ".json" and file.name not in NOT_OURS:
            found |= {f"{name}: {at}": types for at, types in shape_of(json.loads(file.read_text()), str(root)).items()}
        elif file.suffix == ".safetensors":
            found |= tensors_in(file, name)
        elif file.suffix == ".jsonl":
            found |= {f"{name}: {at}": types for at, types in shape_of([*map(json.loads, file.open())], str(root)).items()}
        elif file.suffix == ".npy":
            array = np.load(file, mmap_mode="r")
            found[name] = f"{array.dtype} {len(array.shape)}d"
        elif file.suffix in (".bf16", ".u8"):
            found[name] = f"{file.stat().st_size} bytes"
    return found


def state_of(module: Any, at: str) -> Entries:
    return tensors_of({name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in module.state_dict().items()}, at)


def numbers_of(recipe: Any) -> str:
    numbers = {field.name: field for field in dataclasses.fields(recipe) if field.type in ("int", "float")}
    return " ".join(f"{name}={getattr(recipe, name):g}" for name, field in numbers.items() if getattr(recipe, name) != field.default)


# ---- sections


def command_line() -> Entries:
    """Each verb, its options and arguments with all their spellings, and whether its help holds an example."""
    import typer
    from typer.testing import CliRunner

    app = named(APP)
    top = typer.main.get_command(app)
    context = top.context_class(top, info_name="sparse-vlm")
    found: Entries = {}

    def describe(command: Any, *words: str) -> None:
        verb = " ".join(words)
        hints = get_type_hints(inspect.unwrap(command.callback), include_extras=True) if command.callback else {}
        for parameter in command.params:
            if (hint := hints.get(parameter.name)) is not None:  # what typer keeps of a type differs between its releases
                info, taken = hint.__metadata__[0], hint.__origin__
                spelt = taken.__name__ if isinstance(taken, type) else re.sub(r"pathlib[\w.]*\.", "", str(taken))
                about = [parameter.param_type_name, spelt]
                about += [f"{name} {value}" for name in ("min", "max") if (value := getattr(info, name)) is not None]
                about += ["required"] if parameter.required else [f"default {parameter.default}"]
                found[" ".join([*words, "/".join((*parameter.opts, *parameter.secondary_opts))])] = ", ".join(about)
        if isinstance(command, typer.core.TyperGroup):
            for name in command.list_commands(context):
                describe(command.resolve_command(context, [name])[1], *words, name)
        shown = CliRunner().invoke(app, [*words, "--help"]).output
        found[f"{verb} --help".strip()] = "with an example" if f"Example: sparse-vlm {verb}".strip() in shown else "no example"

    describe(top)
    return found


def imports(recorded: Entries) -> Entries:
    """What `README.md`, docs, examples and entry points import or start, and what they did when it was recorded."""
    asked = set(recorded)
    for pattern in READ_BY_USERS:
        for path in ROOT.glob(pattern):
            text = path.read_text(encoding="utf-8")
            for module, names in re.findall(r"from (sparse_vlm[\w.]*) import ([\w, ]+)", text):
                asked |= {f"{module}:{name.split(' as ')[0].strip()}" for name in names.split(",")}
            asked |= set(re.findall(r"import (sparse_vlm[\w.]*\w)", text)) | set(re.findall(r"-m sparse_vlm[\w.]*\w", text))
            asked |= set(re.findall(r"[\"`](sparse_vlm\.[\w.]*\w(?::\w+)?)[\"`(]", text))
    return {name: "works" for name in sorted(asked) if name.count("__") < 2 and works(name)} | public_names()


def works(name: str) -> bool:
    """Whether a module can be started (`-m a.b`), imported (`a.b`), or holds a name (`a.b:c`, or `a.b.c` in prose)."""
    try:
        if name.startswith("-m "):
            module = name.removeprefix("-m ")
            spec = find_spec(module)
            return spec is not None and (
                find_spec(f"{module}.__main__") is not None
                if spec.submodule_search_locations
                else "__main__" in Path(spec.origin).read_text(encoding="utf-8")
            )
        if ":" in name:
            return named(name) is not None
        return find_spec(name) is not None and import_module(name) is not None
    except ModuleNotFoundError:
        return ":" not in name and not name.startswith("-m ") and name.count(".") > 1 and works(":".join(name.rsplit(".", 1)))
    except (ImportError, AttributeError):
        return False


def public_names() -> Entries:
    return {f"{package}:{name}": "works" for package in PACKAGES for name in import_module(package).__all__ if works(f"{package}:{name}")}


def names(recorded: Entries) -> Entries:
    """What users choose by name."""
    found = {}
    for kind, (where, describe) in TABLES.items():
        table = named(where)
        for name in [table] if isinstance(table, str) else table:
            found[f"{kind}: {name}"] = describe(table[name]) if describe else "known"
    get_recipe, changed = named(GET_RECIPE), named(CHANGED)
    fields = {f"--set {field.name}" for field in dataclasses.fields(named(RECIPE)) if field.type in ("int", "float")}
    for name in fields | {name for name in recorded if name.startswith("--set ")}:
        with contextlib.suppress(Exception):
            changed(get_recipe("tiny"), [f"{name.removeprefix('--set ')}=1"])
            found[name] = "known"
    return found


def tensors(root: Path) -> Entries:
    """Towers made anew of the zoo's and of published configurations, a VLM, the zoo's index and its files."""
    import torch

    from sparse_vlm import VLM, SparseFormer, SparseFormerConfig

    zoo = ROOT / "model_zoo"
    configs = {name: SparseFormerConfig.named(name) for name in ("sparseformer_v1_tiny", "sparseformer_btsp_openai_clip_base")}
    for name in ("tiny", "tiny-adaptive"):
        configs[name] = SparseFormerConfig.from_dict(json.loads((zoo / name / "config.json").read_text()))
    found = {f"index.json: {at}": types for at, types in shape_of(json.loads((zoo / "index.json").read_text()), str(root)).items()}
    for name, config in configs.items():
        with torch.device("meta"):
            found |= state_of(SparseFormer(config), name)
    for path in sorted(zoo.glob("*/*.safetensors")):
        found |= {at: entry for at, entry in tensors_in(path, f"model_zoo/{path.parent.name}/{path.name}").items() if at.endswith(": all")}
    return found | state_of(VLM.build(str(root / "tower"), str(root / "llm"), dtype=torch.float32).model, "VLM")


def runs(root: Path) -> dict[str, Entries]:
    """Sections of the documents and folders that short runs of each verb make."""
    from typer.testing import CliRunner

    app = named(APP)

    def run(*arguments: object, code: int = 0, says: str = "") -> str:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments], input=says)
        assert done.exit_code == code, f"{arguments}: {done.output} {done.exception!r}"
        return done.stdout

    def printed(*arguments: object, **more: Any) -> Entries:
        text = run(*arguments, **more)
        document = json.loads(text[re.search(r"^[{\[]", text, re.MULTILINE).start() :])
        if arguments[0] == "bench":
            jsonschema = pytest.importorskip("jsonschema")
            jsonschema.validate(document, json.loads(BENCH_SCHEMA.read_text()))
        return shape_of(document, str(root))

    teacher = tiny_teacher.write_teacher(root / "teacher")
    tower, whole = tiny_vlm.save_tower(root / "tower"), tiny_vlm.save_whole_tower(root / "whole")
    llm, photo = tiny_vlm.save_llm(root / "llm"), root / "photos" / "0.png"
    photo.parent.mkdir()
    for number in range(40):
        tiny_vlm.photo(48, 40, number).save(photo.with_name(f"{number}.png"))
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A wall."}]
    samples = [{"id": str(number), "image": f"{number}.png", "conversations": turns} for number in range(8)]
    (root / "data.json").write_text(json.dumps(samples))
    (root / "faulty.json").write_text(json.dumps([*samples, {"id": "0", "image": "absent.png", "conversations": turns}]))
    for file in ("eval/flickr8k_retrieval.tar", "eval/imagenet1k_one_per_class.tar"):
        eval_fakes.write_tar(root / file, eval_fakes.photos_of(5))
    asked = [(key, colour, {**info, **eval_fakes.asked(i)}) for i, (key, colour, info) in enumerate(eval_fakes.photos_of(6))]
    eval_fakes.write_tar(root / "eval/coco_vqa.tar", asked)

    run("bootstrap", "--recipe", "tiny", "--teacher", teacher, "--data", photo.parent, "--views", "32", "--threads", "1",
        "--out", root / "student", "--cache", root / "teacher-cache")  # fmt: skip
    parts = ("--images", photo.parent, "--llm", llm)
    train = ("train", "--data", root / "data.json", *parts, "--batch-size", "8", "--threads", "1")
    run(*train, "--stage", "instruct", "--tower", tower, "--out", root / "adapters", "--rank", "2", "--tower-lora", "2")
    run(*train, "--stage", "instruct", "--tower", whole, "--tokens", "4", "--out", root / "full", "--full", "--cache", root / "token-cache")
    run(*train, "--stage", "align", "--tower", root / "student", "--projector", "pool", "--tokens", "4", "--out", root / "pooled")
    chat = ("chat", "--image", photo, "--max-new-tokens", "2", "--model")
    run(*chat, root / "full", says=f"What?\n/save {root / 'example.json'}\n")
    with argv("shards", str(photo.parent), "--out", str(root / "shards")):
        runpy.run_module("sparse_vlm.images.shards", run_name="__main__")
    bench = ("--llm", llm, "--image", photo, "--batch", "1", "--rounds", "3", "--dtype", "float32", "--threads", "1", "--device", "cpu")
    evals = ("--data", root, "--threads", "1", "--limit", "4", "--json", "-", "--out", root / "report")
    found = {
        "document chat": printed(*chat, root / "adapters", "--json", "--question", "What?"),
        "document chat saved": shape_of(json.loads((root / "example.json").read_text()), str(root)),
        "document look": printed("look", photo, "--model", whole, "--json"),
        "document zoo list": printed("zoo", "list", "--json"),
        "document zoo show": printed("zoo", "show", "tiny", "--json"),
        "document zoo show folder": printed("zoo", "show", root / "adapters", "--json"),
        "document zoo pull": printed("zoo", "pull", "tiny", "--json"),
        "document check": printed("train", "--check", "--json", "--data", root / "faulty.json", *parts, "--tower", tower, code=1),
        "document export": printed("export", "--model", tower, "--format", "transformers", "--out", root / "exported", "--json"),
        "document bench": printed("bench", "--model", tower, *bench, "--serving", "--json", "-"),
        "document eval of towers": printed("eval", *evals, "--model", "student", "--teacher", teacher, "--tasks", "cosine"),
        "document eval of VLMs": printed("eval", *evals, "--model", "adapters", "--tasks", "pope"),
    }
    folders = ("student", "adapters", "full", "pooled", "whole", "exported", "teacher-cache", "token-cache", "shards", "report")
    found |= {f"folder {name}": folder(root / name, root) for name in folders}
    cache = next((root / "teacher-cache").glob("*/meta.json"))
    of_meta = hashlib.sha256(json.dumps(json.loads(cache.read_text())).encode()).hexdigest()[:16]
    found["folder teacher-cache"]["DIGEST"] = "of meta.json" if cache.parent.name == of_meta else "of something else"
    return found


@contextlib.contextmanager
def argv(*arguments: str) -> Iterator[None]:
    before, sys.argv = sys.argv, list(arguments)
    try:
        with contextlib.suppress(SystemExit):
            yield
    finally:
        sys.argv = before


def collect(out: str) -> None:
    """Write all sections as they are now; changes settings of the process, and so has one of its own."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    recorded = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary).resolve()
        os.environ["SPARSE_VLM_HOME"] = str(root / "home")
        os.chdir(root)  # reports name their files after what a model was called
        found = {"command line": command_line(), "imports": imports(recorded.get("imports", {})), **runs(root)}
        found |= {"names": names(recorded.get("names", {})), "tensors": tensors(root)}
        os.chdir(ROOT)
    Path(out).write_text(json.dumps(found, indent=0, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


SECTIONS = sorted(json.loads(GOLDEN.read_text())) if GOLDEN.exists() else []


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Entries]:
    pytest.importorskip("open_clip")
    out = tmp_path_factory.mktemp("golden") / "found.json"
    commands.run_apart(collect, str(out))
    return json.loads(out.read_text())


@pytest.mark.parametrize("section", SECTIONS)
def test_what_users_hold(found: dict[str, Entries], section: str) -> None:
    right, now = json.loads(GOLDEN.read_text())[section], found.get(section, {})
    wrong = [f"missing: {name} ({right[name]})" for name in right if name not in now]
    wrong += [f"changed: {name}: {right[name]} -> {now[name]}" for name in right if now.get(name, right[name]) != right[name]]
    wrong += [f"added, not recorded: {name} ({now[name]})" for name in now if name not in right]
    assert not wrong, "\n".join([section, *wrong])


def test_every_section_is_recorded(found: dict[str, Entries]) -> None:
    assert sorted(found) == SECTIONS


if __name__ == "__main__" and sys.argv[1:] == ["--record"]:
    collect(str(GOLDEN))
