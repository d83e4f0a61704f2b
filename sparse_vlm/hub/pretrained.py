"""Load models with transformers: without remote code, without prompts, and with errors of one line.

Notable: a model that asks for remote code (`auto_map`) is refused even if transformers has its architecture built in, because other code
than its authors named would be a silent substitute.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sparse_vlm.errors import UserError, first_line
from sparse_vlm.hub.host_format import CODE
from sparse_vlm.hub.weights import check_finite, refuse_lfs_pointers

LAYERS = 1024  # more than any published model has
CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "adapter_config.json")
WEIGHTS = (".safetensors", ".bin", ".gguf")


@contextlib.contextmanager
def model_errors(name: str | Path, what: str = "a language model that transformers can load") -> Iterator[None]:
    """Raise any error of transformers, tokenizers, safetensors, gguf and jinja as a `UserError` of one line.

    Raises:
        UserError: naming the model.
    """
    try:
        with without_prompts():
            yield
    except UserError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UserError(f"{name}: does not fit into memory ({first_line(error)})") from error
    except BaseException as error:
        # a panic of a Rust library is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{name}: not {what} ({first_line(error)})") from error


def from_pretrained(auto: Any, source: str | Path, **options: Any) -> Any:
    """`from_pretrained` of an Auto class, without remote code.

    Args:
        auto: an Auto class of transformers.
        source: a folder, or a name on the hub.

    Raises:
        UserError: a folder that asks for remote code, or whose files are git-lfs pointers.
    """
    folder = Path(source)
    if folder.is_dir():
        refuse_code(folder)
        refuse_lfs_pointers(folder)
    return auto.from_pretrained(source, trust_remote_code=False, **options)


def load_complete(auto: Any, source: str | Path, **options: Any) -> Any:
    """Load a model whose weights match its configuration exactly and are finite.

    Args:
        auto, source: as of `from_pretrained`.

    Raises:
        UserError: the configuration does not match the weights' size, or tensors are missing, unexpected, of another shape or not finite.
    """
    folder = Path(source)
    if folder.is_dir():
        from transformers import AutoConfig

        packed = {key: options[key] for key in ("gguf_file",) if key in options}
        check_size(folder, from_pretrained(AutoConfig, folder, **packed), auto)
    model, report = from_pretrained(auto, source, output_loading_info=True, **options)
    check_report(str(source), report)
    check_finite(str(source), model.named_parameters())
    return model


def check_report(where: str, report: Mapping[str, Any]) -> None:
    """Check that a model was loaded completely; transformers itself initializes missing tensors at random and goes on.

    Args:
        report: transformers' `output_loading_info`.

    Raises:
        UserError: names the first tensor.
    """
    mismatched = [entry if isinstance(entry, str) else entry[0] for entry in report.get("mismatched_keys", ())]
    for names, why in (
        (report.get("missing_keys", ()), "lack {count}, {name} for one; fetch the model again, or take the one that they are of"),
        (mismatched, "hold {count} of another shape than its configuration says, {name} for one"),
        (report.get("unexpected_keys", ()), "hold {count} that its configuration has no place for, {name} for one"),
    ):
        if names := sorted(map(str, names)):
            count = f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
            raise UserError(f"{where}: its weights {why.format(count=count, name=names[0])}")
    if report.get("error_msgs"):
        raise UserError(f"{where}: its weights do not fit ({str(report['error_msgs'][0]).strip().splitlines()[0]})")


def check_size(folder: Path, config: Any, auto: Any) -> None:
    """Check that a configuration matches the size of the weights beside it, before memory of its size is allocated.

    Raises:
        UserError: more layers than any model has, or more parameters than the weights have bits.
    """
    sides = [("", config), ("", config.get_text_config()), *((f"{name}.", getattr(config, name, None)) for name in config.sub_configs)]
    for where, side in sides:
        layers = getattr(side, "num_hidden_layers", None) or 0
        if not isinstance(layers, int) or layers > LAYERS:
            raise UserError(f"{folder}: its configuration says {where}num_hidden_layers {layers!r}; no model has more than {LAYERS}")
    held = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in WEIGHTS and path.is_file())
    with torch.device("meta"):
        ghost = auto.from_config(config, trust_remote_code=False)
    parameters = sum(tensor.numel() for tensor in (*ghost.parameters(), *ghost.buffers()))
    if held and parameters > 8 * held:
        raise UserError(
            f"{folder}: its configuration says {parameters:,} parameters, its weights are {held:,} bytes; they are of two models"
        )


def refuse_code(folder: Path) -> None:
    """Check that a model's folder asks for no remote code.

    Raises:
        UserError: names the file that does.
    """
    for name in CONFIGS:
        try:
            key = _asks_for_code(json.loads((folder / name).read_text(encoding="utf-8")))
        except (OSError, ValueError):  # transformers reports a file that is not JSON
            continue
        except RecursionError:
            raise UserError(f"{folder / name}: nested too deep for a configuration") from None
        if key:
            raise UserError(
                f"{folder / name}: asks for remote code ({key}), which is never run; take a model that transformers has built in, "
                f"or delete {key} there if this is one"
            )


def _asks_for_code(document: Any) -> str | None:
    """The key of a (nested) configuration that asks for remote code."""
    if not isinstance(document, dict):
        return None
    for key, value in document.items():
        named = isinstance(value, str) and key.endswith("attn_implementation") and "/" in value  # a kernel from the hub
        if key == "auto_map" and isinstance(value, dict) and all(str(one).startswith(f"{CODE}.") for one in value.values()):
            continue  # of our own exports; the classes are registered already, and the file is not run
        if value and (key in ("auto_map", "megatron_config") or named):
            return key
        if found := _asks_for_code(value):
            return found
    return None


@contextlib.contextmanager
def without_prompts() -> Iterator[None]:
    """Let transformers refuse remote code instead of asking on standard input, when other libraries call it."""
    from transformers import dynamic_module_utils

    before, dynamic_module_utils.TIME_OUT_REMOTE_CODE = dynamic_module_utils.TIME_OUT_REMOTE_CODE, 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' progress bars and warnings, not its errors."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # the progress bar of reading GGUF files has no switch
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
