"""Text-conditioned image tokenization and generation over few tokens, fast.

``TexTok`` turns an image and its caption into 32 to 256 tokens and back; ``DiT`` generates such tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from textok_fast.config import DiTConfig, TexTokConfig
from textok_fast.errors import InputError

if TYPE_CHECKING:
    from textok_fast.modeling import DiT, TexTok

__version__ = "0.1.0"
__all__ = ["DiT", "DiTConfig", "InputError", "TexTok", "TexTokConfig", "__version__"]


def __getattr__(name: str) -> Any:
    # torch is imported on first use, so that `textok-fast --help` answers at once.
    if name in ("DiT", "TexTok"):
        from textok_fast import modeling

        return getattr(modeling, name)
    if name in ("data", "diffusion", "evaluation", "export", "inference", "interop", "modeling", "ops", "training"):
        import importlib

        return importlib.import_module(f"textok_fast.{name}")
    raise AttributeError(f"module 'textok_fast' has no attribute {name!r}")
