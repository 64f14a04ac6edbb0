from __future__ import annotations

import pytest
import torch

from textok_fast.errors import InputError
from textok_fast.ops.device import default_device, resolve_device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """torch sees so many GPUs."""
    count: int = request.param
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: count - 1)
    return count


@pytest.mark.parametrize("gpus", [0, 2], indirect=True)
def test_auto_is_the_current_gpu_or_the_cpu(gpus: int) -> None:
    wanted = torch.device("cuda", 1) if gpus else torch.device("cpu")
    assert default_device() == resolve_device("auto") == resolve_device(None) == resolve_device() == wanted


@pytest.mark.parametrize("gpus", [2], indirect=True)
def test_devices_by_name(gpus: int) -> None:
    assert [str(resolve_device(name)) for name in ("cpu", "cuda", "cuda:0", "cuda:1")] == ["cpu", "cuda", "cuda:0", "cuda:1"]
    assert resolve_device(torch.device("cuda:1")) == torch.device("cuda:1")
    with pytest.raises(InputError, match="'cuda:2' is not there: torch sees 2 GPUs"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("gpus", [0], indirect=True)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "'cuda' is not there: torch sees no GPU; use auto or cpu"),
        ("cuda:0", "torch sees no GPU"),
        ("gpu", "unknown device 'gpu'"),
        ("", "unknown device ''"),
        ("cuda:x", "unknown device"),
        ("meta", "must be auto, cpu, cuda or cuda:N, got 'meta'"),
    ],
)
def test_devices_that_are_not_there_are_refused(gpus: int, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_device(name)
