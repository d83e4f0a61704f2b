"""Load a teacher by name, with the library that has it and the reader of its class.

Notable: a library is one entry in `LIBRARIES`, a model class one entry in the table of its library; no other code depends on where a
teacher comes from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from sparse_vlm.errors import UserError, first_line
from sparse_vlm.hub.pretrained import check_report, check_size, from_pretrained, quiet, refuse_code, without_prompts
from sparse_vlm.hub.weights import check_finite, refuse_lfs_pointer, refuse_lfs_pointers
from sparse_vlm.teachers import open_clip_vit, sizes, timm_vit, transformers_vit
from sparse_vlm.teachers.base import Teacher, TeacherError
from sparse_vlm.teachers.zoo import is_zoo_teacher, load_zoo_teacher

LOCATED = ("local-dir:", "hf-hub:")  # open_clip's names of models by location
Reader = Callable[[str, nn.Module, dict[str, Any], str], Teacher]

OPEN_CLIP_READERS: dict[str, Reader] = {"VisionTransformer": open_clip_vit.read, "TimmModel": timm_vit.read_trunk}
TIMM_READERS: dict[str, Reader] = {"VisionTransformer": timm_vit.read}
TRANSFORMERS_READERS: dict[str, Reader] = {
    "CLIPModel": transformers_vit.read_clip,
    "SiglipModel": transformers_vit.read_siglip,
    "Dinov2Model": transformers_vit.read_dinov2,
}


def load_teacher(name: str) -> Teacher:
    """Load a teacher.

    Args:
        name: of the zoo, `tiny-teacher`; of open_clip `local-dir:PATH`, `hf-hub:ORG/NAME`, or a model and the tag of its weights, such as
            `ViT-B-16-quickgelu@openai`; of timm `timm:NAME`, or `timm:NAME@FILE` with your checkpoint; of transformers
            `transformers:ORG/NAME`, `transformers:ORG/NAME@REVISION` or `transformers:PATH`.

    Raises:
        UserError: a path without the library that reads it.
        TeacherError: unknown name, no or incomplete weights, or an architecture without a reader.
    """
    check_teacher(name)
    if is_zoo_teacher(name):
        return load_zoo_teacher(name)
    model, tag = split_tag(name)
    library, _, rest = model.partition(":")
    return LIBRARIES[library](name, rest, tag) if rest and library in LIBRARIES else _from_open_clip(name, model, tag)


def check_teacher(name: str) -> None:
    """Check that a teacher's name has a library, before anything is loaded.

    Raises:
        UserError: the path of a folder or file; the message says what to write.
    """
    path = Path(name).expanduser()
    if path.is_file():
        raise UserError(f"teacher {name}: is a file; write timm:NAME@{name} for a checkpoint of timm; other teachers are folders")
    if path.is_dir():
        names = {"open_clip_config.json": f"local-dir:{name}", "config.json": f"transformers:{name}"}
        fitting = [full for file, full in names.items() if (path / file).is_file()] or list(names.values())
        raise UserError(f"teacher {name}: is a folder; write {' or '.join(fitting)}, for the library that reads it")


def split_tag(name: str) -> tuple[str, str | None]:
    """Split `ViT-B-16@openai` into (model, tag); names with a location have no tag."""
    if name.startswith(LOCATED) or "@" not in name:
        return name, None
    model, _, tag = name.partition("@")
    return model, tag


def is_teacher(name: str) -> bool:
    """Whether a name is that of a teacher, not of a tower."""
    return name.startswith((*LOCATED, *(f"{library}:" for library in LIBRARIES))) or "@" in name or is_zoo_teacher(name)


def _from_open_clip(name: str, model_name: str, tag: str | None) -> Teacher:
    try:
        import open_clip
    except ImportError as error:
        raise TeacherError(f"loading a teacher needs open_clip: pip install 'sparse-vlm[train]' ({error})") from None
    located = name.startswith(LOCATED)
    folder = Path(name.removeprefix("local-dir:")) if name.startswith("local-dir:") else None
    if folder is not None and not (folder / "open_clip_config.json").is_file():
        raise TeacherError(f"teacher {name}: no open_clip_config.json in that folder")
    if not located and tag is None:
        tags = open_clip.list_pretrained_tags_by_model(model_name)
        known = f"its tags are {', '.join(tags)}" if tags else "open_clip knows no such model"
        raise TeacherError(f"teacher {name}: choose weights with NAME@TAG; {known}")
    if tag is not None:
        _refuse_lost_quick_gelu(name, model_name, tag)
    try:
        if folder is not None:
            refuse_code(folder)
            refuse_lfs_pointers(folder)
            sizes.check_size(folder)
        with without_prompts():  # open_clip may load a text side with transformers
            model, _, _preprocess = open_clip.create_model_and_transforms(model_name, pretrained=tag)
        licence = stated_licence(_hub_file(name.removeprefix("hf-hub:"), "README.md") if folder is None and located else folder)
    except Exception as error:
        raise TeacherError(f"teacher {name}: open_clip could not load it ({first_line(error)})") from error
    return read_open_clip(name, model, licence)


def read_open_clip(name: str, model: nn.Module, licence: str = "") -> Teacher:
    """The teacher that a model of open_clip is.

    Raises:
        TeacherError: its image tower is of no class that a reader knows.
    """
    import open_clip

    return _reader(name, model.visual, OPEN_CLIP_READERS)(name, model.visual, open_clip.get_model_preprocess_cfg(model), licence)


def _refuse_lost_quick_gelu(name: str, model_name: str, tag: str) -> None:
    """Refuse weights trained with QuickGELU in a model without it, which open_clip loads with only a warning."""
    import open_clip

    quick_gelu = (open_clip.get_pretrained_cfg(model_name, tag) or {}).get("quick_gelu", False)
    if quick_gelu and not (open_clip.get_model_config(model_name) or {}).get("quick_gelu", False):
        twin = f"{model_name}-quickgelu@{tag}"
        raise TeacherError(f"teacher {name}: its weights were trained with QuickGELU, which {model_name} lacks; give {twin}")


def _from_timm(name: str, rest: str, checkpoint: str | None) -> Teacher:
    try:
        import timm
    except ImportError as error:
        raise TeacherError(f"loading a teacher of timm needs it: pip install 'sparse-vlm[train]' ({error})") from None
    if not timm.is_model(rest):
        near = timm.list_models(f"*{rest.split('.')[0][:12]}*")[:5]
        raise TeacherError(f"teacher {name}: timm has no such model{'; similar are ' + ', '.join(near) if near else ''}")
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise TeacherError(f"teacher {name}: {checkpoint}: no such file")
    try:
        if checkpoint is not None:
            refuse_lfs_pointer(Path(checkpoint))
        model = timm.create_model(rest, pretrained=checkpoint is None, checkpoint_path=checkpoint or "")
    except Exception as error:
        raise TeacherError(f"teacher {name}: timm could not load it ({first_line(error)})") from error
    licence = (model.pretrained_cfg or {}).get("license") or ""
    return _reader(name, model, TIMM_READERS)(name, model, timm.data.resolve_model_data_config(model), licence)


def _from_transformers(name: str, rest: str, revision: str | None) -> Teacher:
    from transformers import AutoConfig, AutoModel
    from transformers.utils import cached_file

    if rest.startswith((".", "/", "~")) and not Path(rest).is_dir():
        raise TeacherError(f"teacher {name}: {rest}: no such folder")
    where = {"revision": revision} if revision else {}
    try:
        folder = Path(rest)
        if folder.is_dir():
            check_size(folder, from_pretrained(AutoConfig, folder), AutoModel)
        with quiet():  # mismatches are in `report`, which is checked below
            model, report = from_pretrained(AutoModel, rest, output_loading_info=True, ignore_mismatched_sizes=True, **where)
        processor = json.loads(Path(cached_file(rest, "preprocessor_config.json", **where)).read_text(encoding="utf-8"))
        preprocess = {"mean": processor["image_mean"], "std": processor["image_std"]}
    except Exception as error:
        raise TeacherError(f"teacher {name}: transformers could not load it ({first_line(error)})") from error
    try:
        check_report(f"teacher {name}", {**report, "unexpected_keys": ()})
    except UserError as error:
        raise TeacherError(str(error)) from None
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None) is not None:
        raise TeacherError(f"teacher {name}: its weights are quantized and cannot be inherited; take the model before quantization")
    readme = Path(rest) if Path(rest).is_dir() else _hub_file(rest, "README.md", **where)
    return _reader(name, model, TRANSFORMERS_READERS)(name, model, preprocess, stated_licence(readme))


LIBRARIES: dict[str, Callable[[str, str, str | None], Teacher]] = {"timm": _from_timm, "transformers": _from_transformers}


def _reader(name: str, model: nn.Module, readers: dict[str, Reader]) -> Reader:
    kind = type(model).__name__
    if kind not in readers:
        raise TeacherError(f"teacher {name}: a {kind} is not supported; known are {', '.join(readers)}")
    try:
        check_finite(f"teacher {name}", model.named_parameters())
    except UserError as error:
        raise TeacherError(str(error)) from None
    return readers[kind]


def _hub_file(repository: str, file: str, **where: str) -> Path | None:
    """A file of a repository on the hub; None if it has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(repository, file, **where))
    except EntryNotFoundError:
        return None


def stated_licence(card: Path | None) -> str:
    """The licence in the front matter of a model card, or of a folder's README.md; empty if there is none."""
    if card is not None and card.is_dir():
        card = card / "README.md"
    if card is None or not card.is_file():
        return ""
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    stated = re.search(r"^license:\s*(\S+)", front[1], re.MULTILINE) if front else None
    return stated[1] if stated else ""
