"""Files are complete or not there, and a failed write is an OSError with the file's name whichever library writes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from textok_fast.files import save_state, save_tensors, write_atomically, write_text

LIMITED = """
import resource, sys
from pathlib import Path
import torch
from PIL import Image
from textok_fast.files import save_state, save_tensors, write_atomically, write_text
folder = Path(sys.argv[1])
large, picture = torch.rand(100_000), Image.effect_noise((300, 300), 50)
writers = {
    "text": lambda path: write_text(path, "x" * 100_000),
    "tensors": lambda path: save_tensors({"x": large}, path),
    "header": lambda path: save_tensors({"x": large[:1]}, path, {"captions": "x" * 100_000}),
    "state": lambda path: save_state([{"x": large}], path),
    "numbers": lambda path: save_state(list(range(100_000)), path),
    "picture": lambda path: write_atomically(path, lambda target: picture.save(target, format="PNG")),
}
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
for name, write in writers.items():
    try:
        write(folder / name)
    except OSError as error:
        print(name, error.errno, error.filename)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of a file as Linux does")
def test_a_write_that_fails_half_way(tmp_path: Path) -> None:
    names = ("text", "tensors", "header", "state", "numbers", "picture")
    for name in names:
        (tmp_path / name).write_text("the old one")
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name} {errno.EFBIG} {tmp_path / name}" for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"the old one"}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    save_tensors({"x": torch.arange(3)}, tmp_path / "x.safetensors", {"key": "value"})
    assert load_file(tmp_path / "x.safetensors")["x"].tolist() == [0, 1, 2]
    save_state([{"step": 3, "moment": torch.ones(2)}], tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", weights_only=True)[0]["moment"].tolist() == [1, 1]
    write_text(tmp_path / "new" / "x.txt", "ä\n")
    assert (tmp_path / "new" / "x.txt").read_bytes() == "ä\n".encode()
    assert (tmp_path / "new" / "x.txt").stat().st_mode & 0o777 == 0o666 & ~_umask()


@pytest.mark.parametrize(
    ("raised", "number"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), errno.ENOSPC),
    ],
)
def test_the_cause_and_the_file_are_named(tmp_path: Path, raised: Exception, number: int) -> None:
    def write(target: Path) -> None:
        target.write_text("half")
        raise raised

    with pytest.raises(OSError, match="file") as caught:
        write_atomically(tmp_path / "file", write)
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "file"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "raised", [RuntimeError("shapes differ"), SafetensorError("invalid dtype"), FileNotFoundError(2, "no", "/elsewhere/x")]
)
def test_other_errors_pass_as_they_are(tmp_path: Path, raised: Exception) -> None:
    def write(target: Path) -> None:
        raise raised

    with pytest.raises(type(raised)) as caught:
        write_atomically(tmp_path / "file", write)
    assert caught.value is raised


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
