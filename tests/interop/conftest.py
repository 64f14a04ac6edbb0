"""The peers' recorded inputs and outputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

Golden = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]
FILES = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """Weights, inputs with outputs, and the peer's constructor arguments."""

    def read(name: str) -> Golden:
        with safe_open(FILES / f"{name}.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            config = json.loads(file.metadata()["config"])
        weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
        return weights, {key.removeprefix("io."): value for key, value in tensors.items() if key.startswith("io.")}, config

    return read
