"""`sparse-vlm chat --image photo.jpg`: talk about images; `--question "..."` answers once.

Notable: images and the question are checked before anything heavy is imported, so a mistake costs a fraction of a second. In a terminal
answers stream below a prompt with line editing; without one every line of stdin is a question or a command and stdout holds the
answers alone. At a terminal Ctrl-C raises no exception while an answer is made: it sets a flag that is read between tokens, so the
model and the conversation are never left halfway.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import unquote, urlsplit

import typer
from rich.console import Console
from rich.text import Text

from sparse_vlm.errors import UserError
from sparse_vlm.hub.store import entries, locate
from sparse_vlm.images.photos import STDIN, photo_of

if TYPE_CHECKING:
    from sparse_vlm.vlm.chat import Answer, ChatImage, Conversation

HISTORY = 1000  # lines
URLS = ("http://", "https://")
LONGEST_WORD = 24  # characters held back until a word is whole; scripts without spaces must flow, too
HELP = """\
/image PATH  show one more image with the next question; or drop files here
/tokens N    encode images with N tokens from now on
/reset       forget the conversation, keep the images given with --image
/save FILE   write the conversation to FILE, .json or .md
/quit        end (as Ctrl-D does)
/help        this list
Ctrl-C stops an answer. Everything else is a question."""


def chat(
    image: Annotated[list[str] | None, typer.Option(help="An image to talk about, or - for stdin; repeat it for several.")] = None,
    question: Annotated[str | None, typer.Option(help="Answer this one question and exit.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --question: print one JSON object with the answer and its cost.")] = False,
    model: Annotated[str, typer.Option(help="A VLM: a folder or a name of the model zoo.")] = "tiny-chat",
    tokens: Annotated[int | None, typer.Option(help="Tokens an image, for a model that serves several budgets.", min=1)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 128,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores unless given.")] = None,
) -> None:
    """Talk about images."""
    if question is not None and not question.strip():
        raise UserError("--question is empty; ask something about the image")
    if as_json and question is None:
        raise UserError('--json needs --question "..."')
    for option, number in (("--max-new-tokens", max_new_tokens), ("--threads", threads)):
        if number is not None and number < 1:
            raise UserError(f"{option} is {number}; it must be at least 1")
    paths = [_path(text) for text in image or ()]
    if Path(STDIN) in paths and (question is None or paths.count(Path(STDIN)) > 1):
        raise UserError('--image - reads one image from stdin; ask with --question "..."')
    for path in paths:  # before the model is loaded
        if path != Path(STDIN):
            photo_of(path).draft(1)
    locate(model, kind="vlm")

    screen = Screen()
    with screen.busy(f"loading {model}"):
        conversation = _load(model, paths, tokens, max_new_tokens, threads)
    if question is None:
        raise typer.Exit(Session(conversation, screen).run())
    if as_json:
        answer = conversation.ask(question)
        shown = [str(image.path) for image in conversation.images]
        print(json.dumps({"model": model, "images": shown, **asdict(answer)}, ensure_ascii=False))
    else:
        answer = screen.answer(conversation, question)
        screen.cost(answer)


def _load(model: str, images: Sequence[Path], tokens: int | None, max_new_tokens: int, threads: int | None) -> Conversation:
    _silence_libraries()
    import torch

    from sparse_vlm.images.preprocess import Preprocessor
    from sparse_vlm.vlm import VLM
    from sparse_vlm.vlm.chat import ChatImage, Conversation

    if threads:
        torch.set_num_threads(threads)
    vlm = VLM.from_pretrained(model, num_tokens=tokens)
    prepare = Preprocessor.of(vlm.tower.config)
    return Conversation(vlm, model, [ChatImage.read(path, prepare) for path in images], max_new_tokens)


def _silence_libraries() -> None:
    """Keep warnings, progress bars and log lines of the libraries below us off the screen of a person who came to talk."""
    warnings.simplefilter("ignore")
    os.environ.update(
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        HF_HUB_VERBOSITY="error",
        TRANSFORMERS_VERBOSITY="error",
        TOKENIZERS_PARALLELISM="false",
        TORCH_CPP_LOG_LEVEL="ERROR",
    )
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


class Screen:
    """Output of a session. `interactive`: stdin and stdout are terminals; otherwise stdout holds answers alone."""

    def __init__(self) -> None:
        self.interactive = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
        self._out = Console(highlight=False, soft_wrap=True)
        self._err = Console(stderr=True, highlight=False, soft_wrap=True)
        for stream in (sys.stdin, sys.stdout):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")

    def note(self, text: str) -> None:
        """A line of the program's own, for a person at a terminal."""
        if self.interactive:
            self._out.print(Text(text, style="dim"))

    def error(self, text: str) -> None:
        """One line on stderr."""
        self._err.print(Text(text, style="red"))

    @contextlib.contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """A spinner while something takes time; nothing without a terminal."""
        if self.interactive:
            with self._out.status(Text(text, style="dim")):
                yield
        else:
            yield

    def answer(self, conversation: Conversation, question: str, stop: Callable[[], bool] = lambda: False) -> Answer:
        """Ask, and write the answer as it is generated, until it ends or `stop` returns true."""

        text = Flow(shutil.get_terminal_size().columns if self.interactive else None)
        try:
            answer = conversation.ask(question, show=text.add, stop=stop)
            text.end()
            return answer
        except BaseException:
            if text.begun:
                text.end()
            raise

    def cost(self, answer: Answer) -> None:
        """What the answer took, below it."""
        self.note(
            f"{'stopped; ' if answer.stopped else ''}{answer.image_tokens} image tokens, {answer.answer_tokens} answer tokens, "
            f"first after {answer.ms.first_token / 1000:.2f} s, {answer.tokens_per_second:.1f} tokens/s"
        )


class Flow:
    """Write streamed text to stdout without control characters; with `width`, wrapped between words."""

    def __init__(self, width: int | None) -> None:
        self.begun = False
        self._width = width
        self._column = 0
        self._space = self._word = ""

    def add(self, piece: str) -> None:
        """Write what can be written by now."""
        self.begun = True
        piece = "".join(c for c in piece if c.isprintable() or c in "\n\t")
        if self._width is None:
            sys.stdout.write(piece)
        else:
            for character in piece:
                if character.isspace():
                    self._place(character)
                else:
                    self._word += character
                    if len(self._word) == LONGEST_WORD:
                        self._place("")
        sys.stdout.flush()

    def end(self) -> None:
        """Write the rest and end the line."""
        self._place("\n")
        sys.stdout.flush()

    def _place(self, after: str) -> None:
        """Write the waiting word, on a new line where this one is full; `after` is the space or line end that follows it."""
        if self._column and self._column + len(self._space + self._word) > (self._width or 0):
            sys.stdout.write("\n")
            self._column, self._space = 0, ""
        sys.stdout.write(self._space + self._word)
        self._column += len(self._space + self._word)
        self._space, self._word = after, ""
        if after == "\n":
            sys.stdout.write(after)
            self._column, self._space = 0, ""


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """While it is open, the first Ctrl-C makes the yielded function return true; a second one interrupts as usual."""
    pressed: list[bool] = []

    def press(number: int, frame: Any) -> None:
        if pressed:
            signal.default_int_handler(number, frame)
        pressed.append(True)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


class Session:
    """The loop of questions and commands of a session."""

    def __init__(self, conversation: Conversation, screen: Screen) -> None:
        self.conversation = conversation
        self.screen = screen
        self.failed = False
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/tokens": self._tokens,
            "/reset": self._reset,
            "/save": self._save,
            "/help": self._help,
        }

    def run(self) -> int:
        """Talk until the end; the exit code: 2 when a line of a piped session failed, else 0."""
        if self.screen.interactive:
            _keep_history()
            self.screen.note(f"{_introduction(self.conversation.model_name)}. /help lists the commands, Ctrl-D ends.")
            self._describe_images(self.conversation.images)
        while (line := self._read()) is not None and line != "/quit":
            try:
                self._do(line)
            except UserError as error:
                self.screen.error(str(error))
                self.failed = True
            except KeyboardInterrupt:  # a second Ctrl-C, or one between answers, keeps the conversation
                if not self.screen.interactive:
                    raise
                self.screen.note("stopped")
        return 2 if self.failed and not self.screen.interactive else 0

    def _read(self) -> str | None:
        """The next line, or None at the end."""
        while True:
            try:
                if self.screen.interactive:
                    print()
                return input("> " if self.screen.interactive else "").strip()
            except EOFError:
                if self.screen.interactive:
                    print()
                return None
            except KeyboardInterrupt:
                if not self.screen.interactive:
                    raise
                self.screen.note("\nCtrl-D or /quit ends")

    def _do(self, line: str) -> None:
        if not line:
            return
        if dropped := dropped_paths(line):
            for path in dropped:
                self._show(path)
            return
        if not line.startswith("/"):
            with stop_on_interrupt() if self.screen.interactive else contextlib.nullcontext(lambda: False) as stop:
                answer = self.screen.answer(self.conversation, line, stop)
            self.screen.cost(answer)
            return
        command, _, rest = line.partition(" ")
        if command not in self.commands:
            raise UserError(f"{command}: no such command; /help lists them")
        self.commands[command](rest.strip())

    def _image(self, rest: str) -> None:
        if not rest:
            raise UserError("/image needs a path: /image photo.jpg")
        self._show(_path(rest))

    def _show(self, path: Path) -> None:
        from sparse_vlm.images.preprocess import Preprocessor
        from sparse_vlm.vlm.chat import ChatImage

        image = ChatImage.read(path, Preprocessor.of(self.conversation.vlm.tower.config))
        self.conversation.add_image(image)
        self._describe_images([image])

    def _tokens(self, rest: str) -> None:
        from sparse_vlm.vlm import VLM

        if not rest.isdecimal() or int(rest) < 1:
            raise UserError("/tokens needs a number: /tokens 25")
        self.conversation.vlm = VLM.from_pretrained(self.conversation.model_name, num_tokens=int(rest))
        self.screen.note(f"{self.conversation.vlm.tokens_per_image} tokens an image")

    def _reset(self, rest: str) -> None:
        self.conversation.reset()
        self.screen.note("a new conversation")
        self._describe_images(self.conversation.images)

    def _save(self, rest: str) -> None:
        if not rest:
            raise UserError("/save needs a file: /save talk.md or /save talk.json")
        path = _path(rest)
        self.conversation.save(path)
        self.screen.note(f"saved to {path}")

    def _help(self, rest: str) -> None:
        print(HELP)

    def _describe_images(self, images: list[ChatImage]) -> None:
        for image in images:
            width, height = image.size or image.image.size
            self.screen.note(f"{image.path.name}: {width} x {height}, {self.conversation.vlm.tokens_per_image} tokens")
        if not self.conversation.images:
            self.screen.note("no image yet; /image PATH shows one")


def _introduction(model: str) -> str:
    """The model's name, and what it is if it is in the zoo."""
    return f"{model}: {entries()[model].summary}" if model in entries() else model


def _keep_history() -> None:
    """Line editing for `input`, with the questions of earlier sessions."""
    try:
        import readline
    except ImportError:
        return
    folder = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "sparse-vlm"
    with contextlib.suppress(OSError):  # a home that cannot be written to has no history
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "chat-history"
        if file.exists():
            readline.read_history_file(file)
        readline.set_history_length(HISTORY)
        atexit.register(_write_history, file)


def _write_history(file: Path) -> None:
    import readline

    with contextlib.suppress(OSError):
        readline.write_history_file(file)


def dropped_paths(line: str) -> list[Path]:
    """The files that a line consists of, as a terminal writes files that are dropped on it; empty if it is anything else."""
    with contextlib.suppress(UserError):
        if _is_file(path := _path(line)):
            return [path]
    try:
        words = shlex.split(line)
    except ValueError:  # an apostrophe
        return []
    if any(word.startswith(URLS) for word in words) and len(words) == 1:
        return [_path(words[0])]
    paths = [_path(word) for word in words if not word.startswith(URLS)]
    return paths if len(paths) == len(words) and all(map(_is_file, paths)) else []


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a question is too long for a name
        return False


def _path(text: str) -> Path:
    """A path as a person types, drops or pastes it: spaces as they are, quoted or escaped as in a shell, or a file:// URL.

    Raises:
        UserError: a URL of another kind, which is not fetched.
    """
    if text.startswith(URLS):
        raise UserError(
            f"{text}: chat fetches nothing from the network; download it first, or: curl -sL URL | sparse-vlm chat --image - ..."
        )
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    path = Path(os.path.expanduser(text))
    with contextlib.suppress(OSError, ValueError):
        if not path.exists() and len(words := shlex.split(text)) == 1:
            return Path(os.path.expanduser(words[0]))
    return path
