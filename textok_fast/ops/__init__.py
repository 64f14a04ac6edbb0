"""The operations the models are made of, each one function with its definition in its docstring.

What is here is the PyTorch reference of every operation; the models call these names and nothing below them.
"""

from textok_fast.ops.attention import attention
from textok_fast.ops.norm import gated_residual_layer_norm_modulate, layer_norm_modulate
from textok_fast.ops.patches import patchify, unpatchify
from textok_fast.ops.quantize import vq_nearest

__all__ = ["attention", "gated_residual_layer_norm_modulate", "layer_norm_modulate", "patchify", "unpatchify", "vq_nearest"]
