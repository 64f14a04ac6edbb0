"""Long evaluations in parts: each part's results are a file that is complete or not there, whichever process computes it.

So a run that is killed goes on where it was, on another number of processes if need be, and one process reads what all of them
found: the files are how the processes of ``torchrun`` or ``accelerate launch`` tell each other. Part k is process k's, modulo
their number, and what is computed of it does not depend on who does.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from textok_fast.data.token_cache import claim_index, is_complete, shard_ranges
from textok_fast.errors import InputError
from textok_fast.files import save_tensors
from textok_fast.ops.device import default_device

PATIENCE = timedelta(days=7)  # that processes wait for the slowest of them

Progress = Callable[[int, int], None]  # this process's pictures that are done, and in all; first those that were there
Values = Mapping[str, Tensor | list[str]]  # of n pictures: tensors (n, ...), or n strings
P = TypeVar("P")


@dataclass(frozen=True)
class Processes:
    """This process among those of its launch."""

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def join(cls) -> Processes:
        """Of ``torchrun`` or ``accelerate launch``, where there are several: picks this one's GPU. Needs accelerate then."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        try:
            from accelerate import PartialState
        except ImportError:
            raise InputError("several processes need accelerate: pip install 'textok-fast[eval]'") from None
        state = PartialState(cpu=default_device().type == "cpu", timeout=PATIENCE)
        return cls(state.process_index, state.num_processes)

    def wait(self) -> None:
        """For all of them."""
        if self.world > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


@dataclass(frozen=True)
class Stage(Generic[P]):
    """Something that is computed of every part.

    Attributes:
        name: of its directory.
        identity: what its values are made of, JSON-ready; values of something else are refused.
        compute: a part -> values.
    """

    name: str
    identity: dict[str, Any]
    compute: Callable[[P], Values]


@dataclass(frozen=True)
class Job(Generic[P]):
    """``stages`` over ``count`` pictures. ``part``: reads or makes those of [first, last), where a stage lacks them."""

    count: int
    part: Callable[[int, int], P]
    stages: list[Stage[P]] = dataclasses.field(default_factory=list)


class Parts:
    """The directory of all stages' parts, ``size`` pictures each."""

    def __init__(self, directory: Path, size: int, processes: Processes) -> None:
        if size < 1:
            raise InputError(f"part-size must be at least 1, got {size}")
        self.directory, self.size, self.processes = directory, size, processes

    def run(self, jobs: list[Job[Any]], progress: Progress | None = None) -> None:
        """Computes this process's share of what is not there yet, then waits for the others. ``progress`` is called before
        the first part too.

        InputError when a stage's directory holds values of another identity, and, in the main process, when the others wrote
        elsewhere.
        """
        for job in jobs:
            for stage in job.stages:
                self.claim(stage.name, {**stage.identity, "count": job.count})
        mine = [(job, *part) for job in jobs for part in shard_ranges(job.count, self.size) if self._is_mine(part[0])]
        lacking = [
            [stage for stage in job.stages if not is_complete(self._file(stage.name, number))] for job, number, _, _ in mine
        ]
        sizes = [last - first for _, _, first, last in mine]
        total, done = sum(sizes), sum(size for size, stages in zip(sizes, lacking, strict=True) if not stages)
        if progress is not None:
            progress(done, total)
        for (job, number, first, last), stages in zip(mine, lacking, strict=True):
            if not stages:
                continue
            part = job.part(first, last)
            for stage in stages:
                self.save(stage.name, number, stage.compute(part))
            done += last - first
            if progress is not None:
                progress(done, total)
        self.processes.wait()
        if self.processes.is_main:
            for job in jobs:
                for stage in job.stages:
                    self._require_complete(stage.name, job.count)

    def claim(self, name: str, identity: dict[str, Any]) -> None:
        """Makes a stage's directory ours, or InputError."""
        (self.directory / name).mkdir(parents=True, exist_ok=True)
        values = json.loads(json.dumps({**identity, "part_size": self.size}))  # tuples become lists, as they are read
        claim_index(self.directory / name, values, "results")

    def save(self, name: str, number: int, values: Values) -> None:
        """One part's values, atomically."""
        tensors = {key: value.contiguous() for key, value in values.items() if isinstance(value, Tensor)}
        texts = {key: json.dumps(value) for key, value in values.items() if not isinstance(value, Tensor)}
        save_tensors(tensors, self._file(name, number), texts)

    def load(self, name: str, number: int) -> dict[str, Any] | None:
        """One part's values; None where it is not there, or broken."""
        try:
            with safe_open(self._file(name, number), "pt") as file:
                texts = {key: json.loads(text) for key, text in (file.metadata() or {}).items()}
                return {**{key: file.get_tensor(key) for key in file.keys()}, **texts}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None

    def gather(self, name: str, count: int) -> dict[str, Tensor]:
        """All parts' tensors, in order."""
        found = [self.load(name, number) for number, _, _ in shard_ranges(count, self.size)]
        parts = [part for part in found if part is not None]
        if len(parts) != len(found):
            raise InputError(f"{self.directory / name} has changed while it was read: run the same command again")
        tensors = [key for key, value in parts[0].items() if isinstance(value, Tensor)]
        return {key: torch.cat([part[key] for part in parts]) for key in tensors}

    def _is_mine(self, number: int) -> bool:
        return number % self.processes.world == self.processes.rank

    def _file(self, name: str, number: int) -> Path:
        return self.directory / name / f"{number:06d}.safetensors"

    def _require_complete(self, name: str, count: int) -> None:
        lacking = [number for number, _, _ in shard_ranges(count, self.size) if not is_complete(self._file(name, number))]
        if lacking:
            raise InputError(
                f"{self.directory / name} lacks {len(lacking)} parts of other processes: --out must be a directory that all of "
                "them share"
            )
