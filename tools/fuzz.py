"""`python tools/fuzz.py --files 2000 --seed 0`: damage every file format that we read, and see what becomes of it.

Each damaged file is read in a process of its own, forked from this one when everything has been imported, with 3 GB of memory beyond what
this one has and 20 s of a CPU (three times as long by the clock, for machines that do other things as well). What must come of it:
the file is read and every number is finite; or it is refused by a `UserError` of one line that names it. Anything else is a fault: another
exception, a crash, no end, too much memory, numbers that are not finite, a control character in what is said, something written or removed
outside the example's folder, another program or foreign code run.

Notable: the same seed gives the same files, format by format. Faults are counted by where they come from, not by file. Faulty examples are
kept in `--keep FOLDER`, and `--replay FOLDER/NAME` reads one again and shows the traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import itertools
import json
import math
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", MPLBACKEND="Agg")
os.environ.update(CUDA_VISIBLE_DEVICES="", COLUMNS="200", NO_COLOR="1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(__file__).resolve().parents[1] / "build" / "extensions"))

from fixtures import ROOT
from formats import FORMATS, Format, Refused, finite
from mutate import mutate

MORE_BYTES = 3 << 30
LIMIT_S, WALL = 20.0, 3  # of a CPU, and times as much by the clock
READ, REFUSED, FAULT = "read", "refused", "FAULT"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
OURS = tuple(str(ROOT / folder) + os.sep for folder in ("sparse_vlm", "train", "eval"))
WARM = (
    *("open_clip", "timm", "peft", "gguf", "rich.console", "matplotlib.pyplot", "transformers.modeling_gguf_pytorch_utils"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "bert", "clip", "llava")),
    *(f"sparse_vlm.{name}" for name in ("cli.eval", "train.distillation", "train.vlm", "eval.run", "vlm", "cli.checking")),
)


@dataclass(frozen=True)
class Verdict:
    """What came of reading a file.

    Attributes:
        root: of a fault: where it comes from, and what it is.
        said: the message, or the traceback of a fault.
    """

    kind: str
    root: str = ""
    said: str = ""


# ---- in the process that reads


def _root(trace: TracebackType | None) -> str:
    """The innermost of our own functions in a traceback."""
    frames = [frame for frame in traceback.extract_tb(trace) if frame.filename.startswith(OURS)]
    return f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].name}" if frames else "outside"


def _judge(folder: Path, named: Sequence[str], read: Callable[[Path], Any], printed: Path) -> Verdict:
    from sparse_vlm.errors import UserError

    said, root = "", ""
    try:
        found = read(folder)
        if not all(finite(found)):
            return Verdict(FAULT, "a number is not finite", "numbers that are not finite")
    except UserError as error:
        said, root = str(error), _root(error.__traceback__)
        if "\n" in said.strip():
            return Verdict(FAULT, f"{root}: a message of several lines", said)
    except Refused:
        lines = printed.read_text(errors="replace").rstrip("\n").splitlines()
        said, root = (lines[-1] if lines else ""), "command"
        if not said.startswith("sparse-vlm"):
            return Verdict(FAULT, "command: the last line is not ours", said)
    except RecursionError as error:
        return Verdict(FAULT, f"{_root(error.__traceback__)} RecursionError", "".join(traceback.format_exception(error)[-12:]))
    except BaseException as error:
        return Verdict(FAULT, f"{_root(error.__traceback__)} {type(error).__name__}", "".join(traceback.format_exception(error)[-30:]))
    sys.stdout.flush()
    if (match := CONTROL.search(said + printed.read_text(errors="replace").replace("\r\n", "\n"))) is not None:
        return Verdict(FAULT, f"{root}: the control character {match[0]!r} in a message", said)
    if said and not any(name in said for name in named):
        return Verdict(FAULT, f"{root}: a message that names no file", said)
    return Verdict(REFUSED, "", said) if said else Verdict(READ)


def _guard(folder: Path, report: Callable[[str], None]) -> None:
    """Tell of what is written or removed outside a folder, and of other programs and pickles that are run."""
    around = [str(folder.parent / name) for name in ("tmp", "home")]
    allowed = (str(folder), *around, "/dev/", "/proc/", str(ROOT / "build" / "extensions"))
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    changing = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")
    running = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.spawn", "socket.connect")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not (isinstance(flags, int) and flags & writing) or not isinstance(path, (str, bytes)):
                return None
            paths: tuple[Any, ...] = (path,)
        elif event in changing:
            paths = arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]
        elif event in running:
            return report(f"{event} {str(arguments)[:200]}")
        else:
            return None
        for path in paths:
            if isinstance(path, (str, bytes)) and not os.path.realpath(os.fsdecode(path)).startswith(allowed):
                report(f"{event} {os.fsdecode(path)}")
        return None

    sys.addaudithook(hook)


def _child(folder: Path, named: Sequence[str], read: Callable[[Path], Any], printed: Path, end: int, limit_s: float) -> None:
    """Never returns."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm") as stream:
        own = int(stream.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (own + MORE_BYTES, own + MORE_BYTES))
    asked = folder.parent / "yes"
    asked.write_text("y\n" * 20)  # a loader that asks whether it may run a model's code is told so
    outside = open(printed, "w")  # noqa: SIM115 (lives as long as the process)
    for number, target in ((0, os.open(asked, os.O_RDONLY)), (1, outside.fileno()), (2, outside.fileno())):
        os.dup2(target, number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False, errors="backslashreplace") for number in (1, 2))  # noqa: SIM115
    crash = open(folder.parent / "crash", "w")  # noqa: SIM115
    faulthandler.enable(crash)
    faulthandler.register(signal.SIGXCPU, crash, chain=True)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit_s), math.ceil(limit_s) + 1))
    faulthandler.dump_traceback_later(WALL * limit_s - 0.5, file=crash)
    os.environ.update(SPARSE_VLM_HOME=str(folder.parent / "home"), TMPDIR=str(folder.parent / "tmp"))
    (folder.parent / "tmp").mkdir(exist_ok=True)
    tempfile.tempdir = None
    os.chdir(folder)
    strange: list[str] = []
    _guard(folder, strange.append)
    verdict = _judge(folder, named, read, printed)
    if strange:
        verdict = Verdict(FAULT, f"outside: {strange[0].split()[0]}", strange[0])
    elif any(folder.rglob("CANARY")):
        verdict = Verdict(FAULT, "foreign code was run", "evil.py was imported")
    os.write(end, json.dumps([verdict.kind, verdict.root, verdict.said[-20_000:]]).encode())
    os._exit(0)


# ---- in the process that watches


def attempt(folder: Path, named: Sequence[str], read: Callable[[Path], Any], limit_s: float = LIMIT_S) -> Verdict:
    """Read an example in a process of its own.

    Args:
        folder: of the example; the process works in it.
        named: what a message may call the damaged file.
    """
    begin, end = os.pipe()
    printed = folder.parent / "printed"
    process = os.fork()
    if process == 0:
        try:
            os.close(begin)
            _child(folder, named, read, printed, end, limit_s)
        finally:
            os._exit(99)
    os.close(end)
    said, until = b"", time.monotonic() + WALL * limit_s
    while (left := until - time.monotonic()) > 0 and select.select([begin], [], [], left)[0]:
        block = os.read(begin, 1 << 16)
        if not block:
            break
        said += block
    late = time.monotonic() >= until  # else it has ended by itself, maybe by SIGXCPU
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    os.close(begin)
    if said:
        return Verdict(*json.loads(said))
    trace = (folder.parent / "crash").read_text(errors="replace")
    ours = [(file, name) for file, name in re.findall(r'File "([^"]+)", line \d+ in (\w+)', trace) if file.startswith(OURS)]
    root = f"{Path(ours[0][0]).relative_to(ROOT)}:{ours[0][1]}" if ours else "outside"
    late = late or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU)
    what = f"not done after {limit_s:.0f} s" if late else f"the process ended by {_ended(status)}"
    return Verdict(FAULT, f"{root} {what}", trace)


def _ended(status: int) -> str:
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"code {os.WEXITSTATUS(status)}"


class Examples:
    """Whole examples of formats, made once, and the folder in which one at a time is damaged and read.

    An example is always read where it was made, so that paths in its files are right.
    """

    def __init__(self, work: Path) -> None:
        self.case, self._kept = work / "case" / "example", work / "whole"
        self._kept.mkdir(parents=True)

    def lay_out(self, name: str, form: Format) -> Path:
        """A whole example of a format; what lay there before is gone."""
        shutil.rmtree(self.case.parent, ignore_errors=True)
        whole = self._kept / name
        if not whole.exists():
            self.case.mkdir(parents=True)
            verdict = attempt(self.case, (), lambda folder: form.make(folder), limit_s=300)
            if verdict.kind != READ:
                raise RuntimeError(f"{name}: its example could not be made: {verdict.said}")
            shutil.copytree(self.case, whole, symlinks=True)
            return self.case
        self.case.parent.mkdir(parents=True)
        shutil.copytree(whole, self.case, symlinks=True)
        return self.case


def damage(folder: Path, form: Format, rng: random.Random) -> tuple[Path, str]:
    """Damage one file of an example; which one, and what was done."""
    found = [path for pattern in form.damaged for path in sorted(folder.glob(pattern)) if path.is_file()]
    path = rng.choice(found)
    data = new = path.read_bytes()
    while new == data:
        new, said = mutate(data, path.name, rng)
    path.write_bytes(new)
    return path, f"{path.relative_to(folder)}: {said}"


def names_of(path: Path, folder: Path) -> list[str]:
    """What a message may call a damaged file: by its name, or by the folder of the model that it is a part of."""
    return [path.name, *(str(above) for above in path.parents if folder in above.parents)]


def campaign(
    files: int,
    seed: int,
    only: Sequence[str],
    keep: Path | None,
    work: Path,
    formats: dict[str, Format],
    tell: Callable[[str], None],
    limit_s: float = LIMIT_S,
) -> tuple[dict[str, Counter[str]], dict[str, list[str]]]:
    """Damage and read.

    Returns:
        Verdicts counted by format, and of each fault's root the examples: what was done to them.
    """
    chosen = {name: form for name, form in formats.items() if not only or name in only}
    examples = Examples(work)
    counts: dict[str, Counter[str]] = {name: Counter() for name in chosen}
    faults: dict[str, list[str]] = {}
    for name, form in chosen.items():
        verdict = attempt(examples.lay_out(name, form), (), form.read, limit_s=120)
        if verdict.kind != READ:
            raise RuntimeError(f"{name}: its whole example is not read: {verdict.root} {verdict.said}")
    began = time.monotonic()
    for number, (name, mark) in enumerate(itertools.islice(_turns(chosen), files)):
        form = chosen[name]
        folder = examples.lay_out(name, form)
        path, done = damage(folder, form, random.Random(f"{seed}/{mark}"))
        if keep is not None:
            shutil.rmtree(work / "before", ignore_errors=True)
            shutil.copytree(folder, work / "before", symlinks=True)
        verdict = attempt(folder, names_of(path, folder), form.read, limit_s)
        counts[name][verdict.kind] += 1
        if verdict.kind == FAULT:
            root = f"{name.partition('-')[0] if verdict.root.startswith(('a number', 'outside')) else ''} {verdict.root}".strip()
            faults.setdefault(root, []).append(f"{mark}: {done}")
            if keep is not None and len(faults[root]) <= 3:
                target = keep / mark
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(work / "before", target / "example", symlinks=True)
                about = f"{done}\n{root}\n\n{verdict.said}\n"
                (target / "about.txt").write_text(about.encode("utf-8", "backslashreplace").decode())
                (target / "at.json").write_text(json.dumps({"format": name, "damaged": str(path), "folder": str(folder)}))
        spent = time.monotonic() - began
        rate = (number + 1) / spent
        found = sum(map(len, faults.values()))
        tell(f"{number + 1}/{files} files, {rate:.1f}/s, {(files - number - 1) / rate:.0f} s left, {found} faults of {len(faults)} roots")
    return counts, faults


def _turns(chosen: dict[str, Format]) -> Iterator[tuple[str, str]]:
    """Formats in turn, each with the mark of its next file; those that take long come more seldom."""
    for turn in itertools.count():
        for name, form in chosen.items():
            if turn % form.every == 0:
                yield name, f"{name}-{turn:05d}"


def replay(kept: Path) -> Verdict:
    """Read a kept example again, where it was read first."""
    about = json.loads((kept / "at.json").read_text())
    folder = Path(about["folder"])
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.parent.mkdir(parents=True)
    shutil.copytree(kept / "example", folder, symlinks=True)
    return attempt(folder, names_of(Path(about["damaged"]), folder), FORMATS[about["format"]].read)


def warm() -> None:
    """Import what readers need, and let torch begin nothing that a fork would miss."""
    from importlib import import_module

    import torch

    torch.set_num_threads(1)
    for name in WARM:
        import_module(name)
    import_module("sparse_vlm.kernels.cpu.native").is_supported(torch.float32, 64)  # compiles them where that was not done yet


def table(counts: dict[str, Counter[str]]) -> Iterator[str]:
    """Verdicts by format, in Markdown."""
    yield "| format | files | read | refused in one line | faults |"
    yield "|---|---:|---:|---:|---:|"
    total: Counter[str] = Counter()
    for found in counts.values():
        total += found
    for name, found in [*counts.items(), ("all", total)]:
        yield f"| {name} | {sum(found.values()):,} | {found[READ]:,} | {found[REFUSED]:,} | {found[FAULT]:,} |"


def main() -> int:
    """The command; exit code 1 where there is a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=2000, help="how many files to damage, in all formats together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], choices=list(FORMATS), help="a format; repeat it")
    parser.add_argument("--keep", type=Path, help="a folder for the first three examples of each fault")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "fuzz", help="a folder to work in; emptied")
    parser.add_argument("--replay", type=Path, help="a kept example to read again")
    given = parser.parse_args()
    warm()
    if given.replay:
        verdict = replay(given.replay.resolve())
        print(verdict.said, verdict.root, verdict.kind, sep="\n")
        return int(verdict.kind == FAULT)
    work = given.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    last = 0.0

    def tell(line: str) -> None:
        nonlocal last
        if time.monotonic() - last > (0.2 if sys.stderr.isatty() else 10):
            last = time.monotonic()
            print(line, file=sys.stderr, end="\r" if sys.stderr.isatty() else "\n", flush=True)

    counts, faults = campaign(given.files, given.seed, given.only, given.keep, work, FORMATS, tell)
    print("\n".join(table(counts)))
    for root, cases in sorted(faults.items(), key=lambda item: -len(item[1])):
        line = f"{len(cases):4} x {root}; such as {cases[0]}"
        print(CONTROL.sub(lambda match: ascii(match[0])[1:-1], line))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
