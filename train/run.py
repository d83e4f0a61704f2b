"""What all training runs share: locked run settings, a clean stop, verified checkpoints."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainingArguments

from sparse_vlm.data.bad_images import DECISIONS
from sparse_vlm.errors import UserError, about, printable
from sparse_vlm.train.zero import processes_without_gpu
from sparse_vlm.utils.devices import rank, trim_memory_if_scarce, world_size
from sparse_vlm.utils.files import locked, write_text

T = TypeVar("T")
RETIRED = {"relation_weight": 0.0}  # settings of earlier versions; a run that recorded this value can be continued
SETTINGS, HISTORY = "settings.json", "training.json"  # of a run: written when it begins, and when it is complete


def arguments(
    out: Path,
    device: str,
    steps: int,
    batch_size: int,
    save_steps: int,
    deepspeed: dict[str, Any] | None = None,
    at_once: int | None = None,
    **more: Any,
) -> TrainingArguments:
    """The Trainer's arguments, as all runs share them.

    Args:
        out: the run's folder.
        device: `cpu` or `cuda`.
        batch_size: of all processes together.
        save_steps: steps between two checkpoints; the last two are kept.
        at_once: micro batch size of a process; its whole share of the batch by default.
        deepspeed: DeepSpeed's configuration, if it is used.
        more: a run's own settings.

    Raises:
        UserError: the batch cannot be shared evenly among the processes, or a share not evenly in parts.
    """
    if batch_size % world_size():
        raise UserError(f"a batch of {batch_size} cannot be shared evenly among {world_size()} processes; change one of them")
    share = batch_size // world_size()
    at_once = min(at_once or share, share)
    if share % at_once:
        raise UserError(f"{share} of a batch in each process cannot be computed {at_once} at once; take a number that divides {share}")
    if deepspeed is not None:
        more |= {"deepspeed": deepspeed, "bf16": False}  # its own configuration chooses the dtype
    elif device == "cpu":
        more |= {"use_cpu": True, "ddp_backend": "gloo" if world_size() > 1 else None}
    more |= {"ddp_find_unused_parameters": False} if world_size() > 1 else {}  # there are none
    # DeepSpeed raises these for a wrong configuration
    named = about("--deepspeed", ValueError, TypeError, KeyError) if deepspeed is not None else contextlib.nullcontext()
    with processes_without_gpu() if deepspeed is not None else contextlib.nullcontext(), named:
        return TrainingArguments(
            output_dir=str(out / "checkpoints"),
            max_steps=steps,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=share // at_once,
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
            logging_steps=max(1, min(10, steps // 20)),
            save_steps=save_steps,
            save_total_limit=2,
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
            # on a CPU the cores are the device
            dataloader_num_workers=0 if device == "cpu" else min(16, (os.cpu_count() or 1) // world_size()),
            **more,
        )


def _tensorboard(out: Path) -> TrainerCallback:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(out / "tensorboard")))


def _wandb(out: Path) -> TrainerCallback:
    from transformers.integrations import WandbCallback

    os.environ.setdefault("WANDB_PROJECT", "sparse-vlm")
    os.environ.setdefault("WANDB_NAME", out.name)
    return WandbCallback()


# name -> package it needs, and its callback
REPORTERS: dict[str, tuple[str, Callable[[Path], TrainerCallback]]] = {
    "tensorboard": ("tensorboard", _tensorboard),
    "wandb": ("wandb", _wandb),
}


def check_reporters(names: Sequence[str]) -> None:
    """Make sure that reporters are known and installed.

    Raises:
        UserError: an unknown one, or one whose package is not installed.
    """
    for name in names:
        if name not in REPORTERS:
            raise UserError(f"--report-to {name}: unknown; known are {', '.join(REPORTERS)}")
        if importlib.util.find_spec(REPORTERS[name][0]) is None:
            raise UserError(f"--report-to {name}: {REPORTERS[name][0]} is not installed; pip install {REPORTERS[name][0]}")


def reporters(names: Sequence[str], out: Path) -> list[TrainerCallback]:
    """Callbacks that log the run; none but in the first process."""
    return [REPORTERS[name][1](out) for name in names] if rank() == 0 else []


def of_all_processes(own: T) -> list[T]:
    """The objects of all processes by rank; every process must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [own]
    each = [own] * dist.get_world_size()
    dist.all_gather_object(each, own)
    return each


class StopOnSignal(TrainerCallback):
    """Ctrl-C ends the current step, saves a checkpoint and stops; a second one stops at once. Enter it around the training.

    Several processes stop after the same step, whichever of them got the signal.
    """

    def __init__(self) -> None:
        self.stopped = False

    def __enter__(self) -> StopOnSignal:
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the trainer to save and stop."""
        stopped = self.stopped
        if dist.is_available() and dist.is_initialized():
            any_stopped = torch.tensor(int(stopped), device=args.device)
            dist.all_reduce(any_stopped, dist.ReduceOp.MAX)
            stopped = bool(any_stopped)
        if stopped:
            control.should_save = control.should_training_stop = True


class _Complete(Exception):
    """A resumed run has no step left."""


class StopWhenComplete(TrainerCallback):
    """Ends a run that resumes at its last step: the Trainer would take one more, as it counts after a step."""

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Everything that the checkpoint holds has been loaded by now."""
        if state.global_step >= state.max_steps:
            raise _Complete


def run_trainer(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train to the end of the run, from a checkpoint if there is one; `StopWhenComplete` must be the trainer's first callback."""
    with contextlib.suppress(_Complete):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


class TrimMemory(TrainerCallback):
    """Returns cached memory to the system after a step if the machine is short of it, as with two runs at a time."""

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """After each step."""
        trim_memory_if_scarce()


class MarkComplete(TrainerCallback):
    """Writes size and checksum of each file into a checkpoint, once all of them are on disk."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait until every process has written its part."""
        if dist.is_available() and dist.is_initialized():
            dist.barrier()
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in files:
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
        write_text(folder / "complete", json.dumps({path.relative_to(folder).as_posix(): _fingerprint(path) for path in files}, indent=1))


def _fingerprint(path: Path) -> list[int]:
    """Size and CRC-32 of a file."""
    checksum = 0
    with open(path, "rb") as stream:
        while block := stream.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    return [path.stat().st_size, checksum]


def _damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint that was complete; empty if nothing is."""
    try:
        for name, fingerprint in json.loads((checkpoint / "complete").read_text()).items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if _fingerprint(checkpoint / name) != fingerprint:
                return f"{name} is not what was written"
    except (ValueError, AttributeError, TypeError, RecursionError, OSError) as error:
        return f"its marker cannot be read ({error})"
    return ""


def marked_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were completed, the newest first."""
    return sorted((path for path in _checkpoints(folder) if (path / "complete").exists()), key=_step, reverse=True)


def _checkpoints(folder: Path) -> list[Path]:
    """Folders named `checkpoint-STEP`, complete or not."""
    return sorted(path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]{1,18}", path.name))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def latest_checkpoint(folder: Path, steps: int | None = None) -> Path | None:
    """The newest undamaged checkpoint, or None if there never was one; a message names damaged ones.

    Args:
        steps: of the whole run, for a line that says where it resumes.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    marked = marked_checkpoints(folder)
    newest = _step(marked[0]) if marked else 0
    for cut_off in (path for path in _checkpoints(folder) if not (path / "complete").exists()):
        if _step(cut_off) > newest:
            print(f"{printable(str(cut_off))} was not written to its end and is left out", file=sys.stderr)
        if rank() == 0:  # what lies in it would be taken for a part of the next checkpoint of that step
            shutil.rmtree(cut_off, ignore_errors=True)
    for checkpoint in marked:
        damage = _damage(checkpoint)
        if not damage:
            if steps is not None and rank() == 0:
                print(f"resuming at step {_step(checkpoint)} of {steps}", file=sys.stderr)
            return checkpoint
        print(printable(f"{checkpoint} is damaged ({damage}) and left out"), file=sys.stderr)
    if marked:
        raise UserError(f"{folder}: every checkpoint is damaged; remove the folder to start over")
    return None


# ---- the folder of a run


@contextlib.contextmanager
def locked_run(out: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Lock a folder and its run settings, so that a resumed run is the same run. Enter it around the run; the first process locks.

    A run that fails before its first checkpoint leaves no settings; an incomplete checkpoint is removed.

    Raises:
        UserError: another run has the folder; it holds a run of other settings, or checkpoints of an unknown one; or what the system says
            of a folder that cannot be written.
    """
    if rank() > 0:
        with about(out):
            yield
        return
    with about(out), locked(out):
        began = (out / SETTINGS).exists()
        lock_settings(out, settings)
        try:
            yield
        except BaseException:
            for path in _checkpoints(out / "checkpoints"):
                if not (path / "complete").exists():
                    shutil.rmtree(path, ignore_errors=True)
            if not began and not marked_checkpoints(out / "checkpoints"):
                _take_back(out)
            raise


def _take_back(out: Path) -> None:
    """Remove the files of a run that failed before its first checkpoint."""
    for name in (SETTINGS, DECISIONS):
        (out / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # there is none, or it holds something
        (out / "checkpoints").rmdir()


def lock_settings(out: Path, settings: dict[str, Any]) -> None:
    """Write a run's settings into its folder, or compare them with those that are there.

    Raises:
        UserError: the folder holds a run of other settings, or checkpoints of an unknown one.
    """
    path = out / SETTINGS
    wanted = json.loads(json.dumps(settings))
    if path.exists():
        found = _without_retired(_read_object(path))
        differing = sorted(key for key in wanted.keys() | found.keys() if found.get(key) != wanted.get(key))
        if differing:
            raise UserError(f"{out} holds a run with another {', '.join(differing)}; choose another --out, or remove it to start over")
    elif marked_checkpoints(out / "checkpoints"):
        raise UserError(f"{out} holds checkpoints without {SETTINGS}, so of an unknown run; choose another --out, or remove it")
    else:
        write_text(path, json.dumps(wanted, indent=1) + "\n")


def finished(out: Path, settings: dict[str, Any]) -> bool:
    """Whether a folder holds a complete, undamaged run of these settings; if so a line is printed."""
    try:
        document = _read_object(out / HISTORY)
    except UserError:
        return False
    wanted = json.loads(json.dumps(settings))
    if _without_retired(document.get("settings")) != wanted or not document.get("files") or document["files"] != written_files(out):
        return False
    if rank() == 0:
        print(printable(f"{out}: this run is complete, and nothing is left to be done"), file=sys.stderr)
    return True


def curve_of(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The Trainer's log without its final entry, which describes the last process and not the run."""
    return [entry for entry in history if "train_runtime" not in entry]


def written_files(out: Path) -> dict[str, list[int]]:
    """Size and checksum of each model file of a run, for `training.json`."""
    folders = (out, *(path for path in out.iterdir() if path.is_dir() and path.name not in ("checkpoints", "tensorboard")))
    files = sorted(path for folder in folders for path in folder.iterdir() if path.suffix in (".safetensors", ".json") and path.is_file())
    return {path.relative_to(out).as_posix(): _fingerprint(path) for path in files if path.name not in (SETTINGS, HISTORY, DECISIONS)}


def _without_retired(settings: Any) -> Any:
    """Recorded settings without those that no longer exist."""
    return (
        {key: value for key, value in settings.items() if (key, value) not in RETIRED.items()} if isinstance(settings, dict) else settings
    )


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object of a run.

    Raises:
        UserError: it is none, or cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); choose another --out, or remove the folder to start over") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no JSON object; choose another --out, or remove the folder to start over")
    return found
