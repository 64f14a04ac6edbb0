"""Inceptions with weights that anyone can make again."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from textok_fast.evaluation.inception import FIDInception


def seeded_state(narrow: int, seed: int = 0) -> dict[str, Tensor]:
    """A state dict out of numpy's stream, by sorted name, that keeps activations of a moderate size."""
    rng = np.random.default_rng(seed)
    state: dict[str, Tensor] = {}
    for key, value in sorted(FIDInception(narrow).state_dict().items()):
        shape = tuple(value.shape)
        if key.endswith("num_batches_tracked"):
            continue  # the published file has none
        if key.endswith("conv.weight"):
            made = rng.standard_normal(shape, dtype=np.float32) * np.float32((2 / np.prod(shape[1:])) ** 0.5)
        elif key.endswith(("running_var", "bn.weight")):
            made = rng.random(shape, dtype=np.float32) + np.float32(0.5)
        else:
            made = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02 if key == "fc.weight" else 0.1)
        state[key] = torch.from_numpy(made)
    return state


def save_inception(path: Path, narrow: int = 16, seed: int = 0) -> str:
    """Writes such weights; returns the file's sha256."""
    torch.save(seeded_state(narrow, seed), path)
    return hashlib.sha256(path.read_bytes()).hexdigest()
