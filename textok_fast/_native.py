"""Loads the native library, if there is one, and says why not otherwise.

setup.py builds ``libtextok_fast.so`` from csrc/ and leaves a report beside it. Everything native is optional, because each
operation has a PyTorch reference, so this module never raises.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGE_DIR = Path(__file__).resolve().parent
LIBRARY = "libtextok_fast.so"
REPORT = "_native_build.json"
OPERATIONS = (  # what csrc/cpu/ops.cpp defines
    "layer_norm_modulate",
    "layer_norm_modulate_backward",
    "gated_residual_layer_norm_modulate",
    "gated_residual_layer_norm_modulate_backward",
    "attention",
    "patchify_uint8",
    "unpatchify_uint8",
    "vq_nearest",
    "guided_step",
    "pack_linear",
    "packed_linear",
    "packed_block",
    "few_rows_linear",
    "few_rows_attention",
    "few_rows_norm",
)


@dataclass(frozen=True)
class NativeStatus:
    """``available``: the operations in ``torch.ops.textok_fast`` can be called. ``reason``: one line, why or why not.

    ``info`` is what the library says of itself: "compiler", "torch_target" (the oldest PyTorch it works with), "isa" (vector
    extensions of this processor), "kernels" (the compiled variant that runs), "products" ("vnni", "bf16", both or "none": what
    packed products use besides), "cuda" and, with CUDA code, "cuda_ptx".
    """

    available: bool
    reason: str
    info: dict[str, str] = field(default_factory=dict)


@functools.cache
def load() -> NativeStatus:
    """Loads the library on the first call; later calls return the same answer. ``TEXTOK_NATIVE=0`` leaves it out."""
    if os.environ.get("TEXTOK_NATIVE") == "0":
        return NativeStatus(False, "switched off by TEXTOK_NATIVE=0")
    return load_from(PACKAGE_DIR)


def load_from(directory: Path) -> NativeStatus:
    """The native library in ``directory``, loaded into this process."""
    report = _read_report(directory / REPORT)
    library = directory / LIBRARY
    if not library.is_file():
        unknown = "it was not built; with torch installed: pip install --no-build-isolation textok-fast (in a checkout: -e .)"
        return NativeStatus(False, str(report.get("reason") or unknown))
    try:
        import torch

        torch.ops.load_library(str(library))
        info = dict(line.split("=", 1) for line in torch.ops.textok_fast.build_info().splitlines())
        missing = [name for name in OPERATIONS if not hasattr(torch.ops.textok_fast, name)]
    except Exception as error:  # a damaged file, a missing dependency, another PyTorch: the reference operations still work
        return NativeStatus(False, f"{library.name} does not load: {' '.join(str(error).split()) or type(error).__name__}")
    reason = "loaded"
    if missing:
        reason += f", an older build: it lacks {', '.join(missing)}"
    if info.get("cuda", "no") == "no":
        reason += f", without CUDA code: {report.get('cuda') or 'reason unknown'}"
    return NativeStatus(True, reason, info)


def _read_report(file: Path) -> dict[str, Any]:
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}
