"""Checkpoints: a directory a step, complete or absent.

checkpoint-000500/ holds model.safetensors, ema.safetensors, optimizer.pt (read with ``weights_only=True``) and state.json, and
critic.safetensors and critic_optimizer.pt of a run that trains a critic beside its model. It is written under a temporary name
and renamed when everything is on the disk, so a killed run leaves no half checkpoint. Random numbers need no saving: those of
step k are drawn from a generator seeded by the run's seed and k.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from textok_fast.errors import InputError
from textok_fast.files import save_state, save_tensors, write_text
from textok_fast.modeling.saving import load_state
from textok_fast.training.optim import ExponentialMovingAverage

Trained = tuple[nn.Module, Sequence[torch.optim.Optimizer]]  # a network and its optimizers
_NAME = re.compile(r"checkpoint-(\d{6,})")


def save_checkpoint(
    run: Path,
    step: int,
    model: nn.Module,
    ema: ExponentialMovingAverage,
    optimizers: Sequence[torch.optim.Optimizer],
    state: dict[str, Any],
    keep: int,
    critic: Trained | None = None,
) -> Path:
    """Writes the checkpoint of ``step`` finished steps and removes all but the newest ``keep``."""
    final = run / f"checkpoint-{step:06d}"
    with complete_directory(final) as directory:
        save_tensors(_weights(model), directory / "model.safetensors")
        save_tensors({key: value.contiguous() for key, value in ema.state_dict().items()}, directory / "ema.safetensors")
        save_state([optimizer.state_dict() for optimizer in optimizers], directory / "optimizer.pt")
        if critic is not None:
            save_tensors(_weights(critic[0]), directory / "critic.safetensors")
            save_state([optimizer.state_dict() for optimizer in critic[1]], directory / "critic_optimizer.pt")
        write_text(directory / "state.json", json.dumps({"step": step, **state}))
    for old in list_checkpoints(run)[:-keep]:
        _remove(old)
    return final


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().contiguous() for key, value in model.state_dict().items()}


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


def load_checkpoint(
    path: Path,
    model: nn.Module,
    ema: ExponentialMovingAverage,
    optimizers: Sequence[torch.optim.Optimizer],
    expected: dict[str, Any],
    critic: Trained | None = None,
) -> int:
    """Restores everything and returns the number of finished steps.

    Raises: InputError when the checkpoint cannot be read, does not fit the model, or was made with other settings than
        ``expected``.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        weights = load_file(path / "model.safetensors")
        averages: dict[str, Tensor] = load_file(path / "ema.safetensors")
        moments = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        if critic is not None:
            critic_weights = load_file(path / "critic.safetensors")
            moments += torch.load(path / "critic_optimizer.pt", map_location="cpu", weights_only=True)
    except (OSError, ValueError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(
            f"cannot read the checkpoint {path}: {(str(error) or type(error).__name__).splitlines()[0]}; "
            "remove it to use the one before"
        ) from None
    for key, value in expected.items():
        if state.get(key) != value:
            raise InputError(
                f"{path} was made with {key}={state.get(key)!r}, this run has {value!r}; resume with the same settings"
            )
    load_state(model, weights, str(path))
    ema.load_state_dict(averages)
    if critic is not None:
        load_state(critic[0], critic_weights, str(path / "critic.safetensors"))
        optimizers = [*optimizers, *critic[1]]
    for optimizer, state_dict in zip(optimizers, moments, strict=True):
        optimizer.load_state_dict(state_dict)
    return int(state["step"])
