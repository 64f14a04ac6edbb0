"""Where Triton kernels run in these tests: on the GPU if there is one, else interpreted."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch
from interpreter import repaired


@pytest.fixture(scope="session", autouse=True)
def _repaired_interpreter() -> Iterator[None]:
    """Interpreted kernels round and multiply bf16 and e4m3 as a GPU does."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
        with repaired():
            yield
    else:
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton kernels run: skips the test where that is nowhere."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("neither a CUDA device nor TRITON_INTERPRET=1")
    return torch.device("cuda")
