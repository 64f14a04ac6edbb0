"""The operations the models are made of: each one function, with its definition in its docstring and a PyTorch reference.

Which implementation runs is chosen by :mod:`textok_fast.ops.dispatch`; :func:`use_backend` and the environment variable
``TEXTOK_OPS`` force it, and ``textok-fast info`` shows it.
"""

import torch

from textok_fast.ops import dispatch
from textok_fast.ops.attention import attention, short_attention
from textok_fast.ops.block import PackedBlock, packed_block
from textok_fast.ops.dispatch import use_backend
from textok_fast.ops.fp8 import RowScaled, quantize_channels, quantize_rows
from textok_fast.ops.guided import guided_step
from textok_fast.ops.linear import fp8_linear, linear_gelu
from textok_fast.ops.noise import seeded_normal
from textok_fast.ops.norm import gated_residual_layer_norm, gated_residual_layer_norm_modulate, layer_norm_modulate
from textok_fast.ops.packed import PackedWeight, pack_linear, packed_linear
from textok_fast.ops.patches import patchify, patchify_uint8, unpatchify, unpatchify_uint8
from textok_fast.ops.quantize import vq_nearest

__all__ = [
    "PackedBlock",
    "PackedWeight",
    "RowScaled",
    "attention",
    "fp8_linear",
    "gated_residual_layer_norm",
    "gated_residual_layer_norm_modulate",
    "guided_step",
    "layer_norm_modulate",
    "linear_gelu",
    "pack_linear",
    "packed_block",
    "packed_linear",
    "patchify",
    "patchify_uint8",
    "quantize_channels",
    "quantize_rows",
    "seeded_normal",
    "short_attention",
    "unpatchify",
    "unpatchify_uint8",
    "use_backend",
    "vq_nearest",
]

# Here, and not at a first call, which torch.compile could be tracing. Triton takes a second to import, so only where a GPU can
# run it; elsewhere it is loaded when it is forced.
dispatch.load_backend("native")
if torch.cuda.is_available():
    dispatch.load_backend("triton")
    dispatch.load_backend("flash")
dispatch.force_from_environment()
