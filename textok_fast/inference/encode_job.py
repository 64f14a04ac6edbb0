"""The shards of tokens of a whole data set, written by this process, by several of this machine, or by a Ray cluster.

A shard is a function of the job and its number, and appears under its name complete or not at all. So whoever is killed, and
however often, the job that is run again writes what is missing, and ends with the files of a run that nobody interrupted, each
picture in them once.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import logging
import multiprocessing
import os
import signal
import tarfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_end
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from textok_fast.data.base import CaptionedImages
from textok_fast.data.token_cache import (
    EncodedRows,
    encode_rows,
    is_complete,
    note_skipped,
    shard_path,
    shard_ranges,
    write_shard,
)
from textok_fast.errors import InputError
from textok_fast.files import write_atomically
from textok_fast.inference.engine import Engine
from textok_fast.inference.plan import Plan
from textok_fast.modeling.autoencoder import load_tokenizer
from textok_fast.modeling.encoding import encode_function, reads_captions

Format = Literal["safetensors", "webdataset"]
Done = Callable[[int, int], None]  # (number of a shard, pictures of it that are done)
# So often a pool of processes of which one died is started anew without a shard having been finished in between.
RESTARTS = 3


@dataclasses.dataclass(frozen=True)
class EncodeJob:
    """What a worker needs to know; it can be sent to another process or machine that sees the same files and URLs."""

    model: str  # directory or Hub id
    dataset: CaptionedImages
    out: Path
    format: Format
    batch_size: int
    shard_size: int
    plan: Plan
    captions: int = 0  # of a picture with several so many are encoded; 0: all

    def path(self, number: int) -> Path:
        return shard_path(self.out, number) if self.format == "safetensors" else self.out / f"tokens-{number:06d}.tar"

    def missing(self) -> list[int]:
        """The numbers of the shards that are not there yet."""
        return [number for number, _, _ in shard_ranges(len(self.dataset), self.shard_size) if not self.is_there(number)]

    def is_there(self, number: int) -> bool:
        """Whether the shard is there, whole."""
        return is_complete(self.path(number)) if self.format == "safetensors" else self.path(number).exists()

    def count(self, number: int) -> int:
        """Pictures of a shard, corrupt ones included."""
        return min(self.shard_size, len(self.dataset) - number * self.shard_size)


class ShardWriter:
    """A tokenizer that is loaded once, and writes shards of a job."""

    def __init__(self, job: EncodeJob, tokenizer: Any = None) -> None:
        """``tokenizer``: the job's, if it is loaded already."""
        self.job = job
        loaded = load_tokenizer(job.model, job.plan.device) if tokenizer is None else tokenizer
        self._reads_captions = reads_captions(loaded)
        self._encode = encode_function(cast(Any, Engine(cast(Any, loaded), job.plan)))

    def write(self, number: int, advance: Callable[[int], None] | None = None) -> None:
        """Encodes and writes one shard. ``advance`` is called with the number of its pictures that are done."""
        first = number * self.job.shard_size
        rows = range(first, first + self.job.count(number))
        told = (self.job.captions, self._reads_captions)
        encoded = encode_rows(self.job.dataset, self._encode, rows, self.job.batch_size, advance, *told)
        path = self.job.path(number)
        if self.job.format == "safetensors":
            write_shard(path, encoded)
        else:
            note_skipped(path, encoded.skipped)
            write_atomically(path, lambda target: _write_tar(target, encoded))


def run_here(job: EncodeJob, numbers: Sequence[int], done: Done, tokenizer: Any = None) -> None:
    """Writes the shards in this process."""
    writer = ShardWriter(job, tokenizer) if numbers else None
    for number in numbers:
        assert writer is not None
        writer.write(number, functools.partial(done, number))


# -- several processes of this machine -----------------------------------------------------------------------------------

_writer: ShardWriter  # of a worker process


def run_processes(job: EncodeJob, numbers: Sequence[int], done: Done, workers: int) -> None:
    """Writes the shards with ``workers`` processes, the k-th on the k-th GPU where there are several.

    A process that dies (the kernel kills it for memory, say) is replaced, and its shard written by another. Raises InputError
    when that happens several times without a shard being finished. Processes end with this one.
    """
    left = list(numbers)
    failures = 0
    while left:
        before = len(left)
        try:
            _run_pool(job, left, done, min(workers, len(left)))
        except BrokenProcessPool:
            failures = failures + 1 if len(left) == before else 1
            if failures > RESTARTS:
                raise InputError(
                    "the worker processes end again and again (out of memory?): use fewer --workers or a smaller --batch-size; "
                    f"{len(numbers) - len(left)} shards were written, and the same command goes on behind them"
                ) from None


def _run_pool(job: EncodeJob, left: list[int], done: Done, workers: int) -> None:
    """Removes from ``left`` what is finished."""
    context = multiprocessing.get_context("spawn")  # CUDA and the threads of torch do not survive a fork
    turn = context.Value("i", 0)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (job, turn, workers))
    try:
        running: dict[Future[int], int] = {pool.submit(_write, number): number for number in left}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number = running.pop(future)
                future.result()
                left.remove(number)
                done(number, job.count(number))
        pool.shutdown()
    except BaseException:
        # Without waiting for shards that nobody wants now: they are not there until they are complete.
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(cancel_futures=True)
        raise


def _start_worker(job: EncodeJob, turn: Any, workers: int) -> None:
    global _writer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's, which ends us
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    with turn.get_lock():
        place = turn.value
        turn.value += 1
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    if job.plan.device.split(":")[0] == "cuda":
        plan = dataclasses.replace(job.plan, device=f"cuda:{place % torch.cuda.device_count()}")
        job = dataclasses.replace(job, plan=plan)
    _writer = ShardWriter(job)


def _end_with(sentinel: Any) -> None:
    """Ends this process when the first one has ended, also if that was killed."""
    wait_for_end([sentinel])
    os._exit(1)


def _write(number: int) -> int:
    _writer.write(number)
    return number


# -- a Ray cluster -------------------------------------------------------------------------------------------------------


class _RayWriter:
    """One of Ray Data's actors: loads the tokenizer once, writes the shards that it is given."""

    def __init__(self, job: EncodeJob, threads: int) -> None:
        torch.set_num_threads(threads)
        self.writer = ShardWriter(job)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for number in batch["shard"].tolist():
            if not self.writer.job.is_there(number):  # Ray runs a task again whose worker died after it
                self.writer.write(number)
        return batch


def run_ray(job: EncodeJob, numbers: Sequence[int], done: Done, workers: int, address: str) -> None:
    """Writes the shards with ``workers`` actors of Ray Data (0: one for each GPU, or CPU, of the cluster).

    ``address``: of a running cluster, "auto" for the one this machine belongs to, or "local" for one of its own. ``out``, the
    model and local pictures must lie on a file system that all machines see under the same path. A worker that dies is
    started again by Ray and its shard written again; if the driver dies, the same call goes on.
    """
    if not numbers:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # leave CUDA_VISIBLE_DEVICES to whoever set it
    try:
        import ray
        import ray.data
    except ImportError:
        raise InputError("--ray needs Ray Data: pip install 'textok-fast[ray]'") from None
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(f"no Ray cluster at {address!r}: {' '.join(str(error).split())[:300]}") from None
    try:
        on_gpu = job.plan.device.split(":")[0] == "cuda"
        there = int(ray.cluster_resources().get("GPU" if on_gpu else "CPU", 0))
        if there < 1:
            raise InputError(f"the Ray cluster has no {'GPU' if on_gpu else 'CPU'}, and the plan is for {job.plan.device}")
        count = min(workers or there, there, len(numbers))
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        if on_gpu:  # Ray shows each actor its own GPU only
            job = dataclasses.replace(job, plan=dataclasses.replace(job.plan, device="cuda"))
        shards = ray.data.from_items([{"shard": number} for number in numbers], override_num_blocks=len(numbers))
        written = shards.map_batches(
            _RayWriter,
            batch_size=1,
            fn_constructor_args=(job, 1 if not on_gpu else (os.cpu_count() or 1)),
            compute=ray.data.ActorPoolStrategy(size=count),
            num_gpus=1 if on_gpu else 0,
            num_cpus=0 if on_gpu else 1,
        )
        for row in written.iter_rows():
            done(row["shard"], job.count(row["shard"]))
    finally:
        if started:
            ray.shutdown()


def _write_tar(path: Path, rows: EncodedRows) -> None:
    def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))

    def npy(array: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        return buffer.getvalue()

    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for key, group in itertools.groupby(range(len(rows.keys)), rows.keys.__getitem__):
            of_key = list(group)  # a row for each caption
            for number, row in enumerate(of_key):
                name = f"{key}.{number}" if number else key
                add(archive, f"{name}.npy", npy(rows.tensors["tokens"][row].numpy()))
                if "indices" in rows.tensors:
                    add(archive, f"{name}.indices.npy", npy(rows.tensors["indices"][row].numpy()))
            add(archive, f"{key}.txt", "\n".join(text for row in of_key for text in rows.captions[row]).encode())
            add(archive, f"{key}.cls", str(int(rows.tensors["labels"][of_key[0]])).encode())
