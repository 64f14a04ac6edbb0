"""Encoding a data set by several processes and by Ray: whoever dies, the files are those of one undisturbed process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from textok_fast import TexTok
from textok_fast.config import DataConfig
from textok_fast.data import files as data_files
from textok_fast.data import load_dataset, write_shards
from textok_fast.data.token_cache import TokenDataset
from textok_fast.errors import InputError
from textok_fast.inference import encode_job
from textok_fast.inference.folders import decode_folder, encode_folder

Make = Callable[..., TexTok]
PICTURES, SHARD = 40, 4


@pytest.fixture(scope="module")
def model(make_tokenizer: Make, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tokenizer(text="none").save_pretrained(tmp_path_factory.mktemp("model") / "model"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for k in range(PICTURES):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{k:03d}.png")
        (folder / f"{k:03d}.txt").write_text(f"caption {k}\nanother")
    return folder


@pytest.fixture(scope="module")
def whole(model: str, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of one process that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole")
    encode_folder(model, str(pictures), out, batch_size=3, shard_size=SHARD)
    return shards(out)


def shards(out: Path) -> dict[str, bytes]:
    assert not [path.name for path in out.glob(".tokens-*")]
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.name != "plan.json"}


def command(model: str, pictures: Path, out: Path, *options: str) -> list[str]:
    """`textok-fast encode` whose workers take their time with each shard, so that there is one to be killed."""
    slow = (
        "import sys, time\n"
        "from textok_fast.inference import encode_job\n"
        "usual = encode_job.ShardWriter.write\n"
        "def write(self, number, advance=None):\n"
        "    time.sleep(0.15)\n"
        "    usual(self, number, advance)\n"
        "encode_job.ShardWriter.write = write\n"
        "if __name__ == '__main__':\n"
        "    from textok_fast.cli import main\n"
        "    sys.exit(main(sys.argv[1:]))\n"
    )
    program = out.parent / "slow_encode.py"
    program.write_text(slow)
    given = ["--model", model, "--images", str(pictures), "--out", str(out), "--batch-size", "3", "--shard-size", str(SHARD)]
    return [sys.executable, str(program), "encode", *given, "--device", "cpu", "--json", *options]


def start(arguments: list[str], tmp_path: Path) -> subprocess.Popen[str]:
    root = str(Path(encode_job.__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    output = (tmp_path / "output.txt").open("a")
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=output, text=True, start_new_session=True
    )


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], tmp_path: Path) -> Any:
    deadline = time.monotonic() + 300
    while not (found := condition()):
        assert process.poll() is None, (tmp_path / "output.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


def children(pid: int) -> list[int]:
    """The running processes that ``pid`` started."""
    found = [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]
    return [child for child in found if is_running(child)]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def pool_workers(pid: int) -> list[int]:
    """The worker processes of a driver, without multiprocessing's tracker."""
    return [child for child in children(pid) if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_killed_worker_and_killed_driver(model: str, pictures: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = command(model, pictures, out, "--workers", "2")

    def count() -> int:
        return len(list(out.glob("tokens-*.safetensors")))

    process = start(arguments, tmp_path)
    wait_for(lambda: count() >= 1, process, tmp_path)
    assert len(pool_workers(process.pid)) == 2
    os.kill(pool_workers(process.pid)[0], signal.SIGKILL)
    before = count()
    wait_for(lambda: count() >= before + 2, process, tmp_path)  # others took its place
    workers = pool_workers(process.pid)
    assert workers
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while any(map(is_running, workers)):  # nobody is left behind
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert count() < PICTURES // SHARD
    (out / ".tokens-00009.safetensors.half").write_bytes(b"what a kill left")
    kept = {path: path.stat().st_mtime_ns for path in out.glob("tokens-*")}
    report = encode_folder(model, str(pictures), out, batch_size=3, shard_size=SHARD)
    assert report["shards_reused"] == len(kept)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert shards(out) == whole
    tokens = TokenDataset(out)
    assert (len(tokens), tokens.captions) == (PICTURES, [f"caption {k}" for k in range(PICTURES)])


def test_workers_that_always_die_are_named(model: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(job: Any, left: list[int], *rest: Any) -> None:
        attempts.append(len(left))
        if len(attempts) == 2:
            left.remove(left[0])
        raise encode_job.BrokenProcessPool("killed")

    attempts: list[int] = []
    monkeypatch.setattr(encode_job, "_run_pool", die)
    with pytest.raises(InputError, match=r"fewer --workers .* 1 shards were written"):
        encode_folder(model, str(pictures), tmp_path, shard_size=SHARD, workers=2)
    assert attempts == [10, 10, 9, 9, 9]


def test_an_error_in_a_worker_is_told(model: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And Ctrl-C ends the workers."""
    with pytest.raises(InputError, match="workers must be at least 1"):
        encode_folder(model, str(pictures), tmp_path, workers=0)
    with FileLock(tmp_path / ".lock"), pytest.raises(InputError, match="written to by another process"):
        encode_folder(model, str(pictures), tmp_path)


@pytest.mark.parametrize("format", ["safetensors", "webdataset"])
def test_a_corrupt_picture_is_left_out_and_no_other_is_in_twice(
    model: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: Any
) -> None:
    dataset = load_dataset(DataConfig(source="folder", path=str(pictures), image_size=16), "all")
    write_shards(dataset, tmp_path / "shards", shard_size=100)
    (shard,) = (tmp_path / "shards").glob("*.tar")
    data = bytearray(shard.read_bytes())
    for key in (b"005.png", b"006.png", b"030.png"):
        at = data.index(key) + 512
        data[at : at + 200] = bytes(200)
    shard.write_bytes(data)
    monkeypatch.setattr(data_files, "VERIFY_AT_MOST", 0)  # as of many pictures, they are not looked at first
    out = tmp_path / "out"
    report = encode_folder(model, str(shard), out, format, batch_size=3, shard_size=SHARD)
    assert (report["pictures"], report["skipped"]) == (PICTURES - 3, {"corrupt image": 3})
    assert encode_folder(model, str(shard), out, format, batch_size=3, shard_size=SHARD) == {**report, "shards_reused": 10}
    lists = sorted(path.name for path in out.glob("*.skipped.json"))
    assert [int(name.split("-")[1].split(".")[0]) for name in lists] == [1, 7]
    assert json.loads((out / lists[0]).read_text()) == ["shard-000000_005", "shard-000000_006"]
    assert decode_folder(model, out, tmp_path / "back")["pictures"] == PICTURES - 3


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_ray_writes_the_same_files_though_a_worker_is_killed(
    model: str, pictures: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    out = tmp_path / "out"
    process = start(command(model, pictures, out, "--ray", "local", "--workers", "2"), tmp_path)

    def actors() -> list[int]:
        daemons = [daemon for daemon in children(process.pid) if b"raylet" in Path(f"/proc/{daemon}/cmdline").read_bytes()]
        below = [child for daemon in daemons for child in children(daemon)]
        return [child for child in below if b"ray::MapWorker" in Path(f"/proc/{child}/cmdline").read_bytes()]

    wait_for(lambda: len(list(out.glob("tokens-*.safetensors"))) >= 1, process, tmp_path)
    os.kill(actors()[0], signal.SIGKILL)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, (tmp_path / "output.txt").read_text()
    report = json.loads(text)
    assert (report["pictures"], report["shards_reused"]) == (PICTURES, 0)
    assert shards(out) == whole
