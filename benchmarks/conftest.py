"""Options of the benchmarks, and the machine in their JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from textok_fast.evaluation.provenance import machine_info
from textok_fast.ops.device import resolve_device


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("textok-fast")
    group.addoption("--rounds", type=int, default=15, help="samples of each contender (default: 15)")
    group.addoption("--smoke", action="store_true", help="tiny shapes, to see that everything runs; the times mean nothing")
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out, which takes seconds a case")
    group.addoption("--max-autotune", action="store_true", help="also torch.compile's max-autotune for matrix products, slow")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["textok_fast"] = _machine()


def _machine() -> dict[str, Any]:
    return machine_info()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return resolve_device("auto")


@pytest.fixture(scope="session")
def smoke(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--smoke"))


@pytest.fixture(scope="session")
def rounds(request: pytest.FixtureRequest, smoke: bool) -> int:
    return 2 if smoke else int(request.config.getoption("--rounds"))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
