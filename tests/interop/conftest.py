"""The peers' recorded inputs and outputs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from textok_fast import InputError, interop

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


def other_shapes(value: torch.Tensor) -> Iterator[tuple[int | None, torch.Tensor]]:
    """The tensor with another number of dimensions (None), and with each dimension one shorter and one longer."""
    yield None, value.unsqueeze(0)
    if value.ndim > 1:
        yield None, value.flatten(0, 1)
    for dim, size in enumerate(value.shape):
        if size > 1:
            yield dim, value.narrow(dim, 0, size - 1)
        yield dim, torch.cat([value, value.narrow(dim, 0, 1)], dim)


@pytest.fixture(scope="session")
def names_each_key() -> Callable[..., None]:
    """Drops, adds and misshapes each tensor of weights in turn, and asserts that the error names it.

    ``told_alone``: by key the dimensions of which no other tensor tells anything, so that another size is another good model.
    ``optional``: keys without which they are another good model.
    """

    def check(
        kind: str,
        weights: dict[str, torch.Tensor],
        told_alone: dict[str, tuple[int, ...]] | None = None,
        optional: tuple[str, ...] = (),
        config: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        told_alone = told_alone or {}

        def build(state: dict[str, torch.Tensor]) -> None:
            interop.KINDS[kind].build(interop.Weights(state, config or {}, "test"), **options)

        def error_of(state: dict[str, torch.Tensor], key: str, what: str) -> str:
            try:
                build(state)
            except InputError as error:
                message = str(error)
            else:
                pytest.fail(f"{what} {key}: no error")
            assert key in re.split(r"[\s,;:()]+", message), f"{what} {key}: {message}"
            return message

        assert not (told_alone.keys() | set(optional)) - weights.keys()
        build(weights)
        for key, value in weights.items():
            without = {other: each for other, each in weights.items() if other != key}
            if key in optional:
                build(without)
            else:
                error_of(without, key, "without")
            for stray in (f"{key}.more", key.replace(".0.", ".x.") if ".0." in key else f"x.{key}"):
                error_of({**weights, stray: value}, stray, "with")
            for dim, changed in other_shapes(value):
                if dim in told_alone.get(key, ()):
                    continue
                shape = str(tuple(changed.shape))
                message = error_of({**weights, key: changed}, key, f"{shape} for {tuple(value.shape)}")
                assert shape in message and "wanted" in message, message

    return check
