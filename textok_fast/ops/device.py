"""Which device to compute on: the one place, besides the operations themselves, that asks torch about hardware."""

from __future__ import annotations

import torch

from textok_fast.errors import InputError


def default_device() -> torch.device:
    """The current CUDA device where torch sees one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def resolve_device(name: str | torch.device | None = "auto") -> torch.device:
    """The device that a caller named: "auto" (or None) for :func:`default_device`, "cpu", "cuda" or "cuda:N".

    Raises :class:`InputError` for another name, and for a GPU that torch does not see.
    """
    if name is None or str(name) == "auto":
        return default_device()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {str(name)!r}; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, got {str(name)!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            seen = f"{count} GPU{'s' if count > 1 else ''}" if count else "no GPU"
            raise InputError(f"device {str(name)!r} is not there: torch sees {seen}; use auto or cpu")
    return device
