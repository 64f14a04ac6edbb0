"""Checkpoints: a directory a step, complete or absent.

checkpoint-000500/ holds model.safetensors, ema.safetensors (and ema-0.9999.safetensors of a further average), optimizer.pt,
read with ``weights_only=True``, and state.json; and critic.safetensors and critic_optimizer.pt where a critic is trained beside
the model. It is written under a temporary name and renamed when everything is on the disk, so a killed run leaves no half
checkpoint. Tensors are whole, gathered by the main process where weights lie in parts, so any number of processes reads it.
Random numbers need no saving: those of step k are drawn from a generator seeded by the run's seed and k.
"""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from textok_fast.errors import InputError
from textok_fast.files import save_state, save_tensors, write_text
from textok_fast.modeling.saving import load_state
from textok_fast.training.optim import ExponentialMovingAverage
from textok_fast.training.parallel import gathered, gathered_optimizer, load_optimizer, part_like

_NAME = re.compile(r"checkpoint-(\d{6,})")
# What a run had before batch_size was the whole step's.
_BEFORE = ("processes", "run.gradient_accumulation")


@dataclass
class Trained:
    """What a run changes as it goes on, by the names that files have. All processes hold the same, whole or in parts."""

    networks: dict[str, nn.Module]
    averages: dict[str, ExponentialMovingAverage]
    optimizers: dict[str, Sequence[torch.optim.Optimizer]]


def save_checkpoint(run: Path, step: int, trained: Trained, state: dict[str, Any], keep: int, is_main: bool = True) -> None:
    """Writes the checkpoint of ``step`` finished steps and removes all but the newest ``keep``.

    Every process calls this: each gives its parts, and the main one writes.
    """
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(complete_directory(run / f"checkpoint-{step:06d}")) if is_main else None
        states = {name: network.state_dict() for name, network in trained.networks.items()}
        states |= {name: average.state_dict() for name, average in trained.averages.items()}
        for name, tensors in states.items():
            found = gathered(tensors, is_main)
            if directory is not None:
                save_tensors(found, directory / f"{name}.safetensors")
        for name, optimizers in trained.optimizers.items():
            moments = [gathered_optimizer(optimizer, is_main) for optimizer in optimizers]
            if directory is not None:
                save_state(moments, directory / f"{name}.pt")
        if directory is not None:
            write_text(directory / "state.json", json.dumps({"step": step, **state}))
    for old in list_checkpoints(run)[:-keep] if is_main else []:
        _remove(old)


@contextlib.contextmanager
def complete_directory(final: Path) -> Iterator[Path]:
    """A new directory to write into; at the end of the block it becomes ``final``, whose earlier contents are removed."""
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if final.exists():
            _remove(final)
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove(directory: Path) -> None:
    """Renames first, so that nobody finds half of it under its name."""
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    directory.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def list_checkpoints(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    found = [(int(match.group(1)), path) for path in run.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def load_checkpoint(path: Path, trained: Trained, expected: dict[str, Any], defaults: Mapping[str, Any]) -> int:
    """Restores everything and returns the number of finished steps.

    ``defaults``: of settings that a checkpoint does not name because they are newer than it.

    Raises: InputError when the checkpoint cannot be read, does not fit the model, or was made with other settings than
        ``expected``.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        found = {name: load_file(path / f"{name}.safetensors") for name in (*trained.networks, *trained.averages)}
        moments = {name: torch.load(path / f"{name}.pt", map_location="cpu", weights_only=True) for name in trained.optimizers}
    except (OSError, ValueError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(
            f"cannot read the checkpoint {path}: {(str(error) or type(error).__name__).splitlines()[0]}; "
            "remove it to use the one before"
        ) from None
    if "processes" in state:
        state["run.batch_size"] *= math.prod(state[key] for key in _BEFORE)
    for key, value in expected.items():
        had = state.get(key, defaults.get(key))
        if had != value:
            raise InputError(f"{path} was made with {key}={had!r}, this run has {value!r}; resume with the same settings")
    for name, network in trained.networks.items():
        own = network.state_dict()
        parts = {key: part_like(value, own[key]) if key in own else value for key, value in found[name].items()}
        load_state(network, parts, str(path / f"{name}.safetensors"))
    for name, average in trained.averages.items():
        average.load_state_dict(found[name])
    for name, optimizers in trained.optimizers.items():
        for optimizer, saved in zip(optimizers, moments[name], strict=True):
            load_optimizer(optimizer, saved)
    return int(state["step"])
