"""Other people's weights in our models."""

from textok_fast.interop.dit import load_dit

__all__ = ["load_dit"]
