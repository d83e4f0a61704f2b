"""`sparse-vlm chat` as people meet it: in a pseudo-terminal, through a pipe, once with --question, and every way to get it wrong."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import string
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from sparse_vlm.cli import main
from sparse_vlm.cli.chat import Flow, _path, dropped_paths, stop_on_interrupt

COMMAND = [sys.executable, "-c", "from sparse_vlm.cli import main; main()", "chat"]
WAIT_S = 120  # far more than needed, for busy machines
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A VLM folder with random weights: 9 tokens an image, an LLM that writes letters and never ends by itself."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from sparse_vlm.tower import SparseFormer, SparseFormerConfig, UnitConfig
    from sparse_vlm.vlm import VLM

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tower = SparseFormerConfig(
        units=(UnitConfig(64, ("SAMPLING_M", "ATTN", "MLP")),),
        num_latent_tokens=9,
        embed_dim=16,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        image_size=64,
        conv_dim=8,
        num_points=4,
        head="avg",
        token_init="each",
    )
    SparseFormer(tower).save_pretrained(folder / "tower")
    letters = [*string.ascii_letters, *string.digits, *"?!.,:/-_'", "Ġ", "Ċ"]  # byte-level names of space and newline
    vocabulary = {token: i for i, token in enumerate(["<|im_start|>", "<|im_end|>", *letters])}
    plain = Tokenizer(models.BPE(vocabulary, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=CHATML)
    tokenizer.save_pretrained(folder / "llm")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=4096,
        eos_token_id=1,
        bos_token_id=0,
    )
    llm = LlamaForCausalLM(config)
    with torch.no_grad():
        llm.lm_head.weight[:2] = 0  # below the best of the others
    llm.save_pretrained(folder / "llm")
    vlm = VLM.build(folder / "tower", folder / "llm")
    vlm.new_projector = False  # what it says is no matter here
    vlm.save_pretrained(folder / "vlm")
    return str(folder / "vlm")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("photos") / "a photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(path)
    return str(path)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the real command line, in this process."""
    monkeypatch.setattr("sys.argv", ["sparse-vlm", "chat", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


# ---- once


def test_question_as_json_is_one_object(model, photo, monkeypatch, capfd):
    arguments = ("--model", model, "--image", photo, "--image", photo, "--question", "What is it?", "--json", "--max-new-tokens", "5")
    assert run(monkeypatch, *arguments) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    report = json.loads(captured.out)
    assert report.keys() == {"model", "images", "answer", "image_tokens", "answer_tokens", "ms", "tokens_per_second", "stopped"}
    assert (report["image_tokens"], report["answer_tokens"], report["images"]) == (18, 5, [photo, photo])
    assert 0 < len(report["answer"]) <= 5
    assert report["ms"].keys() == {"decode", "tower", "prefill", "first_token"}
    assert all(value > 0 for value in report["ms"].values())
    assert report["ms"]["first_token"] >= report["ms"]["decode"] + report["ms"]["tower"] + report["ms"]["prefill"]


# ---- through a pipe


def test_piped_session_prints_answers_alone(model, photo, tmp_path):
    lines = ["What?", "", "/image nowhere.png", f'/image "{photo}"', "/frobnicate", "And this one?", f"/save {tmp_path / 'talk.json'}"]
    done = subprocess.run(
        [*COMMAND, "--model", model, "--image", photo, "--max-new-tokens", "6"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert done.stderr.splitlines() == ["nowhere.png: no such file", "/frobnicate: no such command; /help lists them"]
    assert done.returncode == 2  # a script should notice
    assert "\x1b" not in done.stdout
    saved = json.loads((tmp_path / "talk.json").read_text())
    answers = [message["content"][0]["text"] for message in saved["messages"] if message["role"] == "assistant"]
    assert len(answers) == 2 and done.stdout.split() == " ".join(answers).split()
    pictures = [sum(part["type"] == "image" for part in message["content"]) for message in saved["messages"]]
    assert pictures == [1, 0, 1, 0]


# ---- in a terminal


class Terminal:
    """The command in a pseudo-terminal of 100 columns."""

    def __init__(self, *arguments: str) -> None:
        self.process, self.end = pty.fork()
        if self.process == 0:
            os.environ.update(TERM="xterm-256color", COLUMNS="100")
            os.execv(COMMAND[0], [*COMMAND, *arguments])
        self.screen = ""

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def interrupt_line(self, text: str) -> None:
        """Type part of a line, then Ctrl-C; once more when nothing comes of it, as a person would.

        readline looks at signals only when its wait for keys is interrupted, so one that arrives just before the wait is seen at the
        next key; on a busy machine that happens.
        """
        self.type(text)
        self.until(re.escape(text))
        for _ in range(3):
            self.type("\x03")
            if select.select([self.end], [], [], WAIT_S / 6)[0]:
                return

    def until(self, pattern: str) -> str:
        """Wait for a pattern; what came since the last wait, without escape sequences."""
        give_up = time.monotonic() + WAIT_S
        while not (found := re.search(pattern, self.screen)):
            ready, _, _ = select.select([self.end], [], [], max(0, give_up - time.monotonic()))
            assert ready, f"no {pattern!r} in {self.screen!r}"
            self._read()
        seen, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return seen

    def _read(self) -> bool:
        try:
            data = os.read(self.end, 65536)
        except OSError:  # how Linux says that the other side is gone
            data = b""
        self.screen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.screen + data.decode(errors="replace"))
        return bool(data)

    def exit_code(self) -> int:
        while self._read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])

    def close(self) -> None:
        try:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self.end)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def test_conversation_in_a_terminal(model, photo, terminal, tmp_path):
    person = terminal("--model", model, "--image", photo, "--max-new-tokens", "3000")
    greeting = person.until(r"> $")
    assert "a photo.png: 90 x 60, 9 tokens" in greeting

    person.type("What is it?\n")
    person.until(r"What is it\?\r\n\S+")  # some of the answer is there
    person.type("\x03")
    assert "stopped; 9 image tokens" in person.until(r"tokens/s\s+> $")

    for mistake in (
        "/image nowhere.png",
        f"/image {tmp_path}",
        "/image",
        "/image " + "x" * 300,
        "/save talk.txt",
        "/frobnicate",
        "/tokens",
        "/tokens 16",
        "https://example.com/cat.jpg",
    ):
        person.type(mistake + "\n")
        complaint = person.until(r"> $").replace(mistake, "", 1).strip("\r\n> ")
        assert complaint and "\n" not in complaint and "Traceback" not in complaint

    for dropped in (photo, f"'{photo}'", photo.replace(" ", "\\ "), "file://" + photo.replace(" ", "%20"), f"'{photo}' '{photo}'"):
        person.type(dropped + "\n")
        assert "a photo.png: 90 x 60, 9 tokens" in person.until(r"tokens\s+> $")
    person.type("/reset\n")
    person.until(r"> $")
    person.type("What is it?\n")
    person.until(r"What is it\?\r\n\S+")
    person.type("\x03")
    person.until(r"tokens/s\s+> $")
    person.type(f"/image {photo}\n")
    assert "a photo.png: 90 x 60, 9 tokens" in person.until(r"> $")
    person.interrupt_line("half a line")
    assert "Ctrl-D or /quit ends" in person.until(r"> $")
    person.type("And now?\n")
    person.until(r"And now\?\r\n\S+")
    person.type("\x03")
    assert "stopped; 18 image tokens" in person.until(r"tokens/s\s+> $")
    person.type(f"/save {tmp_path / 'talk.md'}\n")
    person.until(r"saved to .*\s+> $")
    assert (tmp_path / "talk.md").read_text().count("*(stopped)*") == 2

    person.type("/reset\n")
    assert "a new conversation" in person.until(r"> $")
    person.type(f"/save {tmp_path / 'again.md'}\n")
    assert "nothing to save yet" in person.until(r"> $")
    person.type("/help\n")
    assert "/reset" in person.until(r"> $")
    person.type("\x04")
    assert person.exit_code() == 0


def test_first_interrupt_stops_and_second_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with stop_on_interrupt() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_image_is_read_from_a_pipe(model, photo):
    command = [*COMMAND, "--model", model, "--image", "-", "--question", "What is it?", "--json", "--max-new-tokens", "2", "--threads", "1"]
    done = subprocess.run(command, input=Path(photo).read_bytes(), capture_output=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["images"] == ["-"] and answer["image_tokens"] == 9


@pytest.mark.parametrize("line", ["What's in the picture?", "a photo.png", "photo", "https://a.b is what?", "x" * 5000, "/help"])
def test_questions_are_no_files(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert dropped_paths(line) == []


def test_history_is_kept_between_sessions(model, photo, terminal, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    first = terminal("--model", model, "--max-new-tokens", "1")
    first.until(r"> $")
    first.type("Is it red?\n")
    first.until(r"tokens/s\s+> $")
    first.type("/quit\n")
    assert first.exit_code() == 0
    assert (tmp_path / "sparse-vlm" / "chat-history").read_text().splitlines() == ["Is it red?", "/quit"]
    second = terminal("--model", model)
    second.until(r"> $")
    second.type("\x1b[A\x1b[A")
    assert "Is it red?" in second.until(r"red\?$")


@pytest.mark.parametrize("typed", ["{}", "'{}'", '"{}"', "  {}", "{escaped}"])
def test_paths_as_people_type_them(typed, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a photo.png").touch()
    whole = str(tmp_path / "a photo.png")
    assert _path(typed.format(whole, escaped=whole.replace(" ", "\\ ")).strip()) == Path(whole)
    assert _path("~/a photo.png") == Path(whole)


def test_lines_break_between_words(capsys):
    """However the answer is cut into pieces, and never inside a word that fits."""
    said = "A cup of coffee on a red saucer.\nBeside it: a spoon, and " + "x" * 60
    for size in (1, 3, 200):
        text = Flow(width=20)
        for start in range(0, len(said), size):
            text.add(said[start : start + size] + "\x1b")
        text.end()
        lines = capsys.readouterr().out.split("\n")
        assert lines[:4] == ["A cup of coffee on a", "red saucer.", "Beside it: a spoon,", "and"]
        assert "".join(lines[4:]) == "x" * 60


def test_pieces_are_shown_before_the_answer_ends(capsys):
    text = Flow(width=80)
    text.add("A cup of cof")
    assert capsys.readouterr().out == "A cup of"
    text.add("字" * 24)
    assert capsys.readouterr().out != ""


# ---- mistakes


def _bomb() -> bytes:
    """A png of a few bytes that says it is 12,000 x 10,000 pixels."""
    stream = io.BytesIO()
    PngImagePlugin.putchunk(stream, b"IHDR", struct.pack(">IIBBBBB", 12_000, 10_000, 8, 2, 0, 0, 0))
    PngImagePlugin.putchunk(stream, b"IDAT", b"")
    return b"\x89PNG\r\n\x1a\n" + stream.getvalue()


@pytest.fixture
def bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photo: str) -> None:
    monkeypatch.chdir(tmp_path)
    whole = Path(photo).read_bytes()
    for name, data in {
        "good.png": whole,
        "cut.png": whole[: len(whole) // 2],
        "notes.jpg": b"milk, eggs",
        "phone.heic": b"\0\0\0\x18ftypheic" + bytes(99),
        "bomb.png": _bomb(),
    }.items():
        Path(name).write_bytes(data)
    Path("folder").mkdir()


MISTAKES = {
    "not an image": (["--image", "notes.jpg"], "notes.jpg: not an image"),
    "truncated": (["--image", "good.png", "--image", "cut.png"], "cut.png: truncated or damaged image"),
    "missing": (["--image", "missing.jpg"], "missing.jpg: no such file"),
    "bomb": (["--image", "bomb.png"], "bomb.png: 12000 x 10000 pixels is more than 89 megapixels"),
    "unknown model": (["--image", "good.png", "--model", "no-such-model"], "no-such-model: no such folder and no such model"),
    "empty question": (["--image", "good.png", "--question", " "], "--question is empty"),
    "json without question": (["--image", "good.png", "--json"], "--json needs --question"),
    "no tokens": (["--image", "good.png", "--max-new-tokens", "0"], "--max-new-tokens is 0; it must be at least 1"),
    "stdin without a question": (["--image", "-"], "--image - reads one image from stdin"),
    "a URL": (["--image", "https://example.com/cat.jpg"], "https://example.com/cat.jpg: chat fetches nothing from the network"),
    "HEIC": (["--image", "phone.heic"], "phone.heic: a HEIC image; pip install 'sparse-vlm[heif]'"),
    "not a number": (["--threads", "many"], "invalid value for '--threads'"),
}


@pytest.mark.parametrize("arguments, message", MISTAKES.values(), ids=MISTAKES)
@pytest.mark.usefixtures("bad_files")
def test_mistake_is_one_line_and_exit_code_2(arguments, message, monkeypatch, capfd):
    if arguments != ["--image", "-"] and "--question" not in arguments and "--json" not in arguments:
        arguments = [*arguments, "--question", "What is it?"]
    assert run(monkeypatch, *arguments) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1 and message in captured.err


@pytest.mark.usefixtures("bad_files")
def test_folder_that_is_no_model_is_one_line(monkeypatch, capfd):
    assert run(monkeypatch, "--image", "good.png", "--model", "folder", "--question", "What?") == 2
    captured = capfd.readouterr()
    assert len(captured.err.splitlines()) == 1 and "folder: not a VLM folder" in captured.err


@pytest.mark.usefixtures("bad_files")
def test_mistakes_are_found_before_anything_heavy_is_imported():
    script = f"""
import sys
from sparse_vlm.cli import main
from sparse_vlm.cli.chat import Flow, _path, dropped_paths, stop_on_interrupt
for arguments in {[arguments for arguments, _ in MISTAKES.values()]!r}:
    sys.argv[1:] = ["chat", *arguments]
    try:
        main()
    except SystemExit as ended:
        assert ended.code == 2, (arguments, ended.code)
print({{"torch", "transformers"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=WAIT_S)
    assert done.stdout == "set()\n", done.stderr
    assert len(done.stderr.splitlines()) == len(MISTAKES)
