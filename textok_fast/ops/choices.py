"""What the dispatcher would choose on this machine, for ``textok-fast info``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from textok_fast.ops import dispatch
from textok_fast.ops.block import PackedBlock
from textok_fast.ops.packed import PRECISIONS, PackedWeight, pack_linear

# Arguments as an operation's rules see them, of typical shapes: DiT-XL over 32 tokens of 16 channels, uint8 pictures.
_EXAMPLES: dict[str, Callable[[Callable[..., Tensor], torch.device], tuple[Any, ...]]] = {
    "layer_norm_modulate": lambda new, _: (new(1, 32, 1152), new(1, 1152), new(1, 1152)),
    "layer_norm_modulate_fp8": lambda new, _: (new(1, 32, 1152), new(1, 1152), new(1, 1152)),
    "gated_residual_layer_norm_modulate": lambda new, _: (new(1, 32, 1152), new(1, 32, 1152), *[new(1, 1152)] * 3),
    "gated_residual_layer_norm_modulate_fp8": lambda new, _: (new(1, 32, 1152), new(1, 32, 1152), *[new(1, 1152)] * 3),
    "attention": lambda new, _: (*[new(1, 32, 16, 72)] * 3, None),
    "linear_gelu": lambda new, _: (new(1, 32, 1152), new(4608, 1152), new(4608), "tanh"),
    "packed_linear": lambda new, _: (new(4608, 1152), int(new(1).dtype == torch.bfloat16), 64),
    "packed_block": lambda new, _: (_packed_block(new), *[new(1, 32, 8)] * 2, new(1, 48), *[new(1, 8)] * 2),
    "quantize_rows": lambda new, _: (new(1, 32, 1152),),
    "activate_quantize_rows": lambda new, _: (new(32, 4608), "gelu_tanh"),
    "fp8_linear": lambda new, device: (*_fp8_operands(device), None, "none", torch.bfloat16),
    "fp8_linear_fp8": lambda new, device: (*_fp8_operands(device), None, "gelu_tanh"),
    "patchify_uint8": lambda new, device: (torch.empty(1, 256, 256, 3, dtype=torch.uint8, device=device), 16, new(1).dtype),
    "unpatchify_uint8": lambda new, _: (new(1, 256, 768), 16, 16),
    "vq_nearest": lambda new, _: (new(1, 32, 16), new(4096, 16), False),
    "guided_step": lambda new, device: (
        *(new(2, 32, 32), new(1, 32, 16), new(1, 32, 16)),
        *(torch.empty(50, 8, device=device), torch.zeros(1, dtype=torch.int64, device=device), 16, False),
    ),
    "seeded_normal": lambda _, device: (*torch.zeros(2, 1, dtype=torch.int64, device=device), [32, 16]),
}


def _packed_block(new: Callable[..., Tensor]) -> PackedBlock:
    example = new(1)
    precision = "bf16" if example.dtype == torch.bfloat16 else "fp32"

    def layer(outputs: int, inputs: int) -> PackedWeight:
        weight, bias = torch.zeros(outputs, inputs), torch.zeros(outputs)
        return pack_linear(weight, bias, precision)  # type: ignore[arg-type]

    return PackedBlock(layer(24, 8), layer(8, 8), layer(32, 8), layer(8, 32), 1, "gelu_tanh")


def _fp8_operands(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.empty(32, 1152, dtype=torch.float8_e4m3fn, device=device)
    weight = torch.empty(4608, 1152, dtype=torch.float8_e4m3fn, device=device)
    return x, torch.empty(32, device=device), weight, torch.empty(4608, device=device)


def choices(device: torch.device | str) -> dict[str, dict[str, str]]:
    """Operation -> dtype name -> backend chosen for it on ``device`` without gradients."""
    device = torch.device(device)
    found: dict[str, dict[str, str]] = {}
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")

            def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.empty(shape, dtype=dtype, device=device)

            for operation, arguments in _EXAMPLES.items():
                found.setdefault(operation, {})[name] = dispatch.choose(operation, *arguments(new, device))
        int8 = PRECISIONS.index("int8")  # a dtype of packed weights only
        found["packed_linear"]["int8"] = dispatch.choose("packed_linear", torch.empty(4608, 1152, device=device), int8, 64)
    return found
