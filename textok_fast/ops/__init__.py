"""The operations the models are made of: each one function, with its definition in its docstring and a PyTorch reference.

Which implementation runs is chosen by :mod:`textok_fast.ops.dispatch`; :func:`use_backend` and the environment variable
``TEXTOK_OPS`` force it, and ``textok-fast info`` shows it.
"""

from textok_fast.ops import dispatch
from textok_fast.ops.attention import attention
from textok_fast.ops.dispatch import use_backend
from textok_fast.ops.fp8 import RowScaled
from textok_fast.ops.norm import gated_residual_layer_norm_modulate, layer_norm_modulate, residual_layer_norm
from textok_fast.ops.patches import patchify, unpatchify
from textok_fast.ops.quantize import vq_nearest

__all__ = [
    "RowScaled",
    "attention",
    "gated_residual_layer_norm_modulate",
    "layer_norm_modulate",
    "patchify",
    "residual_layer_norm",
    "unpatchify",
    "use_backend",
    "vq_nearest",
]

# Here, and not at a first call, which torch.compile could be tracing.
for _backend in ("native", "triton"):
    dispatch.load_backend(_backend)
dispatch.force_from_environment()
