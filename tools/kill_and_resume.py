"""`python tools/kill_and_resume.py --rounds 10 --seed 0`: kill runs at any moment, give the same command again, and compare.

A round is one run from nothing: its process gets SIGKILL at a random moment, one to three times, each time the same command is given again,
and at last it is left alone. What it made must then be, bit for bit, what a run made that nobody disturbed, and no file may lie there that
does not lie there after that one. A difference is named: file, tensor, first index.

Notable: processes are forked from this one, when everything has been imported, so that a round takes seconds. They share its hash seed, as
the runs of a user do not; `--anew` starts each of them as a user does, which takes ten seconds more a start.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", MPLBACKEND="Agg")
os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", PIP_NO_INDEX="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(__file__).resolve().parents[1] / "build" / "extensions"))

import torch
from fixtures import COLOURS, ROOT, save_llm, save_teacher, save_tower, write_noise, write_photos
from safetensors.torch import load_file

LIMIT_S = 300.0
# what the Trainer says of the process that ended a run: times, and the mean loss of that process's own steps
OF_A_PROCESS = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")
MEMOS = ("complete", "verified.json")  # checksums of what is compared itself; what was checked when
WARM = (
    "open_clip",
    "peft",
    "matplotlib.pyplot",
    "sparse_vlm.train.distillation",
    "sparse_vlm.train.vlm",
    "sparse_vlm.cli.train",
    "sparse_vlm.cli.zoo",
)


@dataclass(frozen=True)
class Scenario:
    """A command that can be killed.

    Attributes:
        make: writes what the command needs into a folder.
        arguments: of `sparse-vlm`, given the folder of what it needs and that of the round.
        made: folders of the round that are compared.
        processes: that share the run, as torchrun starts them.
    """

    make: Callable[[Path], None]
    arguments: Callable[[Path, Path], list[Any]]
    made: tuple[str, ...]
    processes: int = 1


@dataclass
class Tally:
    """What became of a scenario's rounds; `seconds` of the run that nobody disturbed."""

    rounds: int = 0
    kills: int = 0
    seconds: float = 0.0
    differences: list[str] = field(default_factory=list)


# ---- what is killed


def _boot(count: int, views: int, per_photo: int, *more: str) -> Scenario:
    def make(folder: Path) -> None:
        save_teacher(folder)
        write_noise(folder / "photos", count)

    def arguments(folder: Path, own: Path) -> list[Any]:
        sizes = [f"batch_size={min(16, views // 2)}", f"views_per_photo={per_photo}", "dropped=1"]
        changes = [part for size in sizes for part in ("--set", size)]
        given = ["--teacher", f"local-dir:{folder / 'teacher'}", "--data", folder / "photos", "--views", views, "--threads", 1]
        return ["bootstrap", "--recipe", "tiny", *given, *changes, "--cache", own / "cache", "--out", own / "run", *more]

    return Scenario(make, arguments, ("cache", "run"), 2 if more else 1)


def _train(stage: str, count: int, *more: Any) -> Scenario:
    def make(folder: Path) -> None:
        save_tower(folder)
        save_llm(folder)
        write_photos(folder / "photos.tar", count)
        rows = []
        for i in range(24):
            said = [{"from": "human", "value": f"What is {i}?"}, {"from": "gpt", "value": f"A {list(COLOURS)[i % 4]} wall."}]
            rows.append({"id": f"s{i}", "conversations": said})
        (folder / "examples.json").write_text(json.dumps(rows))

    def arguments(folder: Path, own: Path) -> list[Any]:
        parts = ["--tower", folder / "tower", "--llm", folder / "llm", "--data", folder / "photos.tar", "--threads", 1]
        parts += ["--data", folder / "examples.json"] if stage == "instruct" else []
        return ["train", "--stage", stage, *parts, "--rank", 2, *more, "--cache", own / "cache", "--out", own / "run"]

    return Scenario(make, arguments, ("cache", "run"), 2 if "--deepspeed" in more else 1)


def _make_zoo(folder: Path) -> None:
    """A zoo of one model that lies in a wheel, and the wheel."""
    import hashlib
    import zipfile

    content = {"config.json": b"{}", "model.safetensors": random.Random(0).randbytes(30_000_000)}
    wheel = folder / "wheels" / "kept-1.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    about = "Metadata-Version: 2.1\nName: kept\nVersion: 1.0\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in content.items():
            archive.writestr(f"kept/{name}", data)
        archive.writestr("kept-1.0.dist-info/METADATA", about)
        archive.writestr("kept-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("kept-1.0.dist-info/RECORD", "")
    source = {
        "type": "wheel",
        "package": "kept",
        "version": "1.0",
        "wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "folder": "kept",
    }
    files = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in content.items()}
    entry = {"kind": "llm", "summary": "a model", "license": "none", "files": files, "sources": [source], "needs": []}
    (folder / "zoo").mkdir()
    (folder / "zoo" / "index.json").write_text(json.dumps({"format": "sparse-vlm/zoo/1", "models": {"kept": entry}}))


SCENARIOS: dict[str, Scenario] = {
    "bootstrap": _boot(48, 192, 2),
    "teacher cache": _boot(700, 32, 2),
    "align": _train("align", 32, "--batch-size", 4),
    "instruct": _train("instruct", 32, "--batch-size", 4),
    "token cache": _train("align", 400, "--batch-size", 4, "--max-steps", 1),
    "zoo": Scenario(_make_zoo, lambda folder, own: ["zoo", "pull", "kept"], ("home",)),
    "deepspeed zero2": _boot(48, 192, 2, "--deepspeed", "zero2"),
    "deepspeed zero3": _boot(48, 192, 2, "--deepspeed", "zero3"),
    "deepspeed instruct": _train("instruct", 32, "--batch-size", 4, "--deepspeed", "zero2"),
}
OPTIONAL = tuple(name for name in SCENARIOS if name.startswith("deepspeed"))  # take longer, and need the package


# ---- running and killing


def _run(folder: Path, own: Path, arguments: list[str]) -> None:
    """In a process of its own: what the command does; ends the process."""
    from sparse_vlm.cli import main
    from sparse_vlm.hub import store

    (own / "tmp").mkdir(parents=True, exist_ok=True)
    os.environ.update(SPARSE_VLM_HOME=str(own / "home"), TMPDIR=str(own / "tmp"), PIP_FIND_LINKS=str(folder / "wheels"))
    if (folder / "zoo").exists():
        store.zoo_folder = lambda: folder / "zoo"
    sys.argv = ["sparse-vlm", *arguments]
    main()


class Run:
    """The processes of a command that is running.

    Args:
        anew: start an interpreter for each, as a user does.
    """

    def __init__(self, scenario: Scenario, folder: Path, own: Path, anew: bool) -> None:
        self.began, self.log = time.monotonic(), own / "log"
        own.mkdir(parents=True, exist_ok=True)
        arguments = [str(part) for part in scenario.arguments(folder, own)]
        port = _free_port() if scenario.processes > 1 else ""
        self._processes: list[int] = []
        for rank in range(scenario.processes):
            more = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(scenario.processes)} if port else {}
            more |= {"LOCAL_WORLD_SIZE": str(scenario.processes), "RANK": str(rank), "LOCAL_RANK": str(rank)} if port else {}
            with open(self.log, "a") as log:
                if anew:
                    line = [sys.executable, __file__, "--as", json.dumps([str(folder), str(own), arguments])]
                    started = subprocess.Popen(line, env={**os.environ, **more}, stdout=log, stderr=log, start_new_session=True)
                    self._processes.append(started.pid)
                    continue
                sys.stdout.flush()
                process = os.fork()
                if process:
                    self._processes.append(process)
                    continue
                code = 1
                try:
                    os.setsid()
                    os.environ.update(more)
                    for stream in (1, 2):
                        os.dup2(log.fileno(), stream)
                    _run(folder, own, arguments)
                except SystemExit as ended:
                    code = ended.code if isinstance(ended.code, int) else 0
                except BaseException:
                    import traceback

                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)

    def ended(self, until: float) -> int | None:
        """The first exit code that is not 0, or 0; None where a process still runs at that moment."""
        codes: dict[int, int] = {}
        while True:
            for process in [process for process in self._processes if process not in codes]:
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    codes[process] = os.waitstatus_to_exitcode(status)
            if len(codes) == len(self._processes):
                self._processes = []
                return next(filter(None, codes.values()), 0)
            if time.monotonic() >= until:
                self._processes = [process for process in self._processes if process not in codes]
                return None
            time.sleep(0.002)

    def kill(self, rng: random.Random) -> None:
        """SIGKILL to one process after the other; to what they have started as well, or not, as when one is killed for its memory."""
        rng.shuffle(self._processes)
        for process in self._processes:
            if rng.random() < 0.5:
                os.killpg(process, signal.SIGKILL)
            else:
                os.kill(process, signal.SIGKILL)
        for process in self._processes:
            os.waitpid(process, 0)


def _free_port() -> str:
    from commands import free_port

    return free_port()


def complete(scenario: Scenario, folder: Path, own: Path, anew: bool) -> float:
    """Run a command to its end; the seconds that it took.

    Raises:
        RuntimeError: it ended with an exit code, or not at all.
    """
    run = Run(scenario, folder, own, anew)
    code = run.ended(run.began + LIMIT_S)
    if code is None:
        run.kill(random.Random(0))
    if code != 0:
        last = [line for line in run.log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        raise RuntimeError(f"{'no end' if code is None else f'exit code {code}'}: {''.join(last)[:300]} ({run.log})")
    return time.monotonic() - run.began


def disturbed(scenario: Scenario, folder: Path, own: Path, usual_s: float, rng: random.Random, anew: bool) -> int:
    """One round; how often the command was killed.

    Raises:
        RuntimeError: at last it did not run to its end.
    """
    kills = 0
    for _ in range(rng.choice((1, 2, 3))):
        run = Run(scenario, folder, own, anew)
        if run.ended(run.began + rng.uniform(0.02, 1.0) * usual_s) is not None:
            continue  # it was done before; the command that follows finds a finished run
        run.kill(rng)
        kills += 1
    complete(scenario, folder, own, anew)
    return kills


# ---- comparing


def compare(scenario: Scenario, folder: Path, own: Path) -> list[str]:
    """What is different in a round from the run that nobody disturbed, a line each."""
    return [f"{part}/{line}" for part in scenario.made for line in differences(folder / "undisturbed" / part, own / part)]


def differences(wanted: Path, found: Path) -> list[str]:
    """What is different in two folders, a line each."""
    files = [{path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} for root in (wanted, found)]
    said = [f"{name}: is missing" for name in sorted(files[0] - files[1])]
    said += [f"{name}: does not lie there after an undisturbed run" for name in sorted(files[1] - files[0])]
    for name in sorted(files[0] & files[1]):
        said += [f"{name}: {what}" for what in _different(wanted / name, found / name)]
    return said


def _different(wanted: Path, found: Path) -> list[str]:
    if wanted.read_bytes() == found.read_bytes() or wanted.suffix in (".png", ".lock") or wanted.name in MEMOS:
        return []
    if wanted.suffix == ".safetensors":
        return _tensors(load_file(wanted), load_file(found))
    if wanted.suffix in (".pt", ".pth", ".bin"):
        return _pickled(wanted, found)
    if wanted.suffix == ".json":
        return _document(json.loads(wanted.read_text()), json.loads(found.read_text()))
    one, other = wanted.read_bytes(), found.read_bytes()
    first = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return [f"byte {first} of {len(one)} and {len(other)}"]


def _tensors(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    said = [f"tensor {name} is there once" for name in sorted(wanted.keys() ^ found.keys())]
    for name in sorted(wanted.keys() & found.keys()):
        one, other = wanted[name], found[name]
        if one.shape != other.shape or one.dtype != other.dtype:
            said.append(f"tensor {name}: {one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)}")
        elif not torch.equal(one.nan_to_num(), other.nan_to_num()):
            index = (one.double() != other.double()).nonzero()[0].tolist()
            said.append(f"tensor {name}: first at {index}: {one[tuple(index)].item()!r} and {other[tuple(index)].item()!r}")
    return said


def _pickled(wanted: Path, found: Path) -> list[str]:
    """Optimizers' and schedulers' states; those of processes and settings may hold times and paths and are not compared."""
    shared = wanted.name.endswith("optim_states.pt")  # DeepSpeed's, of one process; its loss scale is an object of its own
    if not shared and not wanted.name.startswith(("optimizer", "scheduler")):
        return []
    one, other = (_flat(torch.load(path, weights_only=not shared)) for path in (wanted, found))
    if shared:
        one, other = ({name: value for name, value in flat.items() if isinstance(value, torch.Tensor)} for flat in (one, other))
    numbers = [{name: value for name, value in flat.items() if isinstance(value, torch.Tensor)} for flat in (one, other)]
    return _tensors(*numbers) + [f"{name} is different" for name in one if name not in numbers[0] and one[name] != other.get(name)]


def _flat(state: Any, name: str = "") -> dict[str, Any]:
    if isinstance(state, (dict, list, tuple)) and len(state):
        pairs = state.items() if isinstance(state, dict) else enumerate(state)
        return {key: value for at, inner in pairs for key, value in _flat(inner, f"{name}.{at}".lstrip(".")).items()}
    return {name: state}


def _document(wanted: Any, found: Any, where: str = "") -> list[str]:
    if type(wanted) is not type(found):
        return [f"{where}: {wanted!r:.60} and {found!r:.60}"]
    if isinstance(wanted, dict):
        said = [f"{where}/{key} is there once" for key in sorted(wanted.keys() ^ found.keys()) if key not in OF_A_PROCESS]
        return said + [
            line for key in wanted.keys() & found.keys() - {*OF_A_PROCESS} for line in _document(wanted[key], found[key], f"{where}/{key}")
        ]
    if isinstance(wanted, list):
        said = [f"{where}: {len(wanted)} and {len(found)} entries"] if len(wanted) != len(found) else []
        return said + [line for i, pair in enumerate(zip(wanted, found, strict=False)) for line in _document(*pair, f"{where}/{i}")]
    same = wanted == found or _is_path(wanted)
    return [] if same else [f"{where}: {wanted!r:.60} and {found!r:.60}"]


def _is_path(value: Any) -> bool:
    """Folders of two rounds have two names."""
    return isinstance(value, str) and os.sep in value


# ---- the campaign


def campaign(
    rounds: int,
    seed: int,
    names: Sequence[str],
    out: Path,
    anew: bool,
    tell: Callable[[str], None],
    scenarios: dict[str, Scenario] = SCENARIOS,
) -> dict[str, Tally]:
    """So many rounds of each scenario; what is different is kept in `out`, the rest is removed."""
    tallies = {name: Tally() for name in names}
    for name, tally in tallies.items():
        scenario, folder = scenarios[name], out / name.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        made = folder / "given"
        made.mkdir(parents=True)
        scenario.make(made)
        complete(scenario, made, folder / "undisturbed", anew)
        tally.seconds = complete(scenario, made, folder / "again", anew)  # the first one may have compiled something
        tally.differences += [f"undisturbed twice: {line}" for line in compare(scenario, folder, folder / "again")]
    began, todo = time.monotonic(), rounds * len(tallies)
    for number in range(todo):
        name = list(tallies)[number % len(tallies)]
        scenario, tally, folder = scenarios[name], tallies[name], out / name.replace(" ", "-")
        own = folder / f"round-{number // len(tallies)}"
        found: list[str] = []
        try:
            tally.kills += disturbed(scenario, folder / "given", own, tally.seconds, random.Random(f"{seed}/{name}/{own.name}"), anew)
        except RuntimeError as error:
            found = [str(error)]
        else:
            found = compare(scenario, folder, own)
        tally.rounds += 1
        tally.differences += [f"{own.name}: {line}" for line in found]
        if not found:
            shutil.rmtree(own)
        rate = (number + 1) / (time.monotonic() - began)
        kills, bad = sum(each.kills for each in tallies.values()), sum(bool(each.differences) for each in tallies.values())
        tell(f"{number + 1}/{todo} rounds, {kills} kills, {60 * rate:.1f} a minute, {(todo - number - 1) / rate:.0f} s left, {bad} differ")
    return tallies


def main() -> int:
    """The command; exit code 1 where a round made something else."""
    if sys.argv[1:2] == ["--as"]:
        folder, own, arguments = json.loads(sys.argv[2])
        _run(Path(folder), Path(own), arguments)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="of each scenario; two kills each on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", action="append", choices=list(SCENARIOS), help=f"a scenario; repeat it; all but {', '.join(OPTIONAL)} unless given"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "kills", help="a folder to work in; what differs stays there")
    parser.add_argument("--anew", action="store_true", help="start each process as a user does")
    given = parser.parse_args()
    from importlib import import_module

    torch.set_num_threads(1)
    for name in () if given.anew else WARM:
        import_module(name)
    names = given.only or [name for name in SCENARIOS if name not in OPTIONAL]
    tell = lambda line: print(line, file=sys.stderr, end="\r" if sys.stderr.isatty() else "\n", flush=True)  # noqa: E731
    tallies = campaign(given.rounds, given.seed, names, given.out.resolve(), given.anew, tell)
    print("| command | rounds | kills | rounds that differ | seconds undisturbed |\n|---|---:|---:|---:|---:|")
    for name, tally in tallies.items():
        differ = len({line.partition(":")[0] for line in tally.differences})
        print(f"| {name} | {tally.rounds} | {tally.kills} | {differ} | {tally.seconds:.1f} |")
    for name, tally in tallies.items():
        for line in tally.differences[:10]:
            print(f"{name}, {line}")
    return int(any(tally.differences for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
