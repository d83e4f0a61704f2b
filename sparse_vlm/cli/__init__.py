"""The command line: `sparse-vlm VERB`.

A verb lives in a module of its name, as a function (or a typer app) of its name; `VERBS` is where it is made known. Adding one is one
module and one line here.

Notable: a verb's module is imported when the verb is run or its help is asked for, never to list the verbs. Every mistake of
a user is one line on stderr and exit code 2; Ctrl-C ends with 130.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sparse_vlm import __version__
from sparse_vlm.errors import as_user_error, printable

VERBS: dict[str, tuple[str, str]] = {
    # verb: (summary, example)
    "chat": ("Talk about images.", "sparse-vlm chat --image examples/coffee.jpg"),
    "answer": ("Answer questions about many images.", "sparse-vlm answer --images 'photos/*.jpg' --out captions.jsonl"),
    "serve": ("Serve a vision-language model: an OpenAI-compatible API, and a page to chat.", "sparse-vlm serve tiny-chat --port 8000"),
    "look": ("Draw what the tokens look at.", "sparse-vlm look examples/coffee.jpg"),
    "bootstrap": (
        "Make a tower from a teacher and photos.",
        "sparse-vlm bootstrap --recipe tiny --teacher local-dir:teacher --data 'photos/*.tar'",
    ),
    "train": ("Train a vision-language model on a tower.", "sparse-vlm train --data 'photos/*.tar' --out build/aligned"),
    "eval": (
        "Measure a tower or a vision-language model.",
        "sparse-vlm eval --model tiny --teacher local-dir:teacher --tasks imagenet,cosine --data data",
    ),
    "bench": (
        "Measure what towers and language models cost on this machine.",
        "sparse-vlm bench --model tiny --model clip-l14+pool --llm 135m --batch 1",
    ),
    "report": (
        "Draw accuracy against cost, on one page to send.",
        "sparse-vlm report --bench build/bench/bench.json --eval build/eval/report.json --pair tiny-chat=tiny --out build/report",
    ),
    "export": (
        "Write a model in a format that others load: transformers, ONNX, torch.export.",
        "sparse-vlm export --model tiny --format onnx --out build/tiny-onnx",
    ),
    "zoo": ("List, show and fetch models.", "sparse-vlm zoo list"),
}


class VerbGroup(TyperGroup):
    """Lists the verbs from the table and imports the one that is asked for."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else _load(name), rest


def _load(verb: str) -> Any:
    target = getattr(import_module(f"sparse_vlm.cli.{verb}"), verb)
    epilog = f"Example: {VERBS[verb][1]}"
    if isinstance(target, typer.Typer):
        app = target
        app.info.epilog = epilog
    else:
        app = typer.Typer(add_completion=False)
        app.command(verb, epilog=epilog)(target)
    command = typer.main.get_command(app)
    command.name = verb
    return command


app = typer.Typer(
    cls=VerbGroup,
    help="SparseFormer towers and the vision-language models that see through them.",
    epilog="Example: sparse-vlm chat --image examples/coffee.jpg",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _listed() -> None:
    """Stands for a verb in the list of verbs; `VerbGroup` replaces it by the verb itself."""


for _verb, (_summary, _) in VERBS.items():
    app.command(_verb, help=_summary)(_listed)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sparse-vlm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the `sparse-vlm` command; ends the process."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names that the terminal cannot encode are escaped
    try:
        code = typer.main.get_command(app).main(prog_name="sparse-vlm", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        code = 1  # the reader of the pipe has ended
    except Exception as error:
        if hasattr(error, "format_message"):  # the parser's own errors: typer takes them from one package or another
            code = _complain_of_usage(error)
        elif (known := as_user_error(error)) is not None:
            nameless = isinstance(error, OSError) and error.filename is None
            where = _unwritable_stdout("\n") if nameless else None
            code = _complain(f"sparse-vlm: {where or known}", 2)
        else:
            raise
    if code == 130:
        _complain("sparse-vlm: interrupted", 130)
    if where := _unwritable_stdout():
        _leave_stdout()
        code = code or (1 if where.endswith(os.strerror(errno.EPIPE)) else _complain(f"sparse-vlm: {where}", 2))
    sys.exit(code if isinstance(code, int) else 0)


def _unwritable_stdout(more: str = "") -> str | None:
    """What is wrong with stdout, where what was printed, and what is printed now to find out, cannot be written to it."""
    try:
        sys.stdout.write(more)
        sys.stdout.flush()
    except OSError as error:
        return f"stdout: {error.strerror}"
    return None


def _leave_stdout() -> None:
    """Let stdout lead nowhere, without which the interpreter would complain once more on its way out."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(line: str, code: int) -> int:
    with contextlib.suppress(OSError, ValueError):  # a stderr that takes nothing
        print(printable(line), file=sys.stderr, flush=True)
    return code


def _complain_of_usage(error: Any) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        return 2  # the help was printed when the error was made
    path = error.ctx.command_path if getattr(error, "ctx", None) else "sparse-vlm"
    message = " ".join(error.format_message().split()).rstrip(".")
    return _complain(f"{path}: {message[:1].lower()}{message[1:]} (see {path} --help)", 2)
