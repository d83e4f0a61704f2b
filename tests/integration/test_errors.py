"""What others raise becomes a line that names the file; a mistake of ours stays what it is."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import UnidentifiedImageError
from safetensors.torch import load_file, save_file

from sparse_vlm.errors import UserError, about, as_user_error, printable


def raised(by: object) -> BaseException:
    with pytest.raises(BaseException) as told:
        by()
    return told.value


def test_errors_from_outside_are_one_line_that_names_the_file(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_text("neither\nof these")
    outside = [
        lambda: load_file(bad),
        lambda: save_file({"a": torch.zeros(1)}, tmp_path / "none" / "a.safetensors"),
        lambda: tarfile.TarFile(bad),
        lambda: zipfile.ZipFile(bad),
        lambda: json.loads(bad.read_text()),
        lambda: tmp_path.read_bytes(),
        lambda: bytearray(1 << 62),
        lambda: torch.empty(1 << 60),
        lambda: (_ for _ in ()).throw(UnidentifiedImageError("cannot identify image file")),
        lambda: (_ for _ in ()).throw(RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file")),
    ]
    for by in outside:
        found = as_user_error(raised(by), bad)
        assert found is not None and str(tmp_path) in str(found) and "\n" not in str(found)
    with pytest.raises(UserError, match=r"bad: not enough memory$"), about(bad):
        torch.empty(1 << 60)


@pytest.mark.parametrize("error", [KeyError("a"), ValueError("a"), RuntimeError("shapes differ"), TypeError("a"), AssertionError()])
def test_what_may_be_a_mistake_of_ours_goes_through(error: Exception) -> None:
    assert as_user_error(error, "a") is None
    with pytest.raises(type(error)), about("a"):
        raise error
    with pytest.raises(UserError, match="^--deepspeed a: "), about("--deepspeed a", type(error)):
        raise error


def test_names_do_not_reach_a_terminal_as_commands() -> None:
    assert printable("a\x1b[31m\nb\x07\x9b\ud800\u202e") == "a\\x1b[31m\\nb\\x07\\x9b\\ud800\\u202e"
    assert printable("Kätzchen 猫 👩‍🚀 [b]") == "Kätzchen 猫 👩‍🚀 [b]"
