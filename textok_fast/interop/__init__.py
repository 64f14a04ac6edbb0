"""Other people's weights in our models, and our models behind other people's interfaces.

``AutoencoderTexTok``, ``TexTokTransformer`` and ``TexTokPipeline`` need diffusers: without it their import fails, and says so.
"""

from typing import TYPE_CHECKING, Any

from textok_fast.interop.convert import KINDS, Kind, convert, guess_kind, load
from textok_fast.interop.dit import load_diffusers_dit, load_dit, to_diffusers_dit
from textok_fast.interop.hub import model_card, push_to_hub
from textok_fast.interop.softvq import ContinuousTokenizer, convert_softvq
from textok_fast.interop.titok import TiTok, convert_titok
from textok_fast.interop.weights import Weights, read_weights

__all__ = [
    "KINDS",
    "AutoencoderTexTok",
    "ContinuousTokenizer",
    "Kind",
    "TexTokImageProcessor",
    "TexTokPipeline",
    "TexTokTransformer",
    "TiTok",
    "Weights",
    "convert",
    "convert_softvq",
    "convert_titok",
    "guess_kind",
    "load",
    "load_diffusers_dit",
    "load_dit",
    "model_card",
    "push_to_hub",
    "read_weights",
    "to_diffusers_dit",
]


if TYPE_CHECKING:
    from textok_fast.interop.diffusers import AutoencoderTexTok, TexTokPipeline, TexTokTransformer
    from textok_fast.interop.transformers import TexTokImageProcessor


def __getattr__(name: str) -> Any:
    """Those that need another library are imported when they are asked for."""
    if name in ("AutoencoderTexTok", "TexTokPipeline", "TexTokTransformer"):
        from textok_fast.interop import diffusers

        return getattr(diffusers, name)
    if name == "TexTokImageProcessor":
        from textok_fast.interop import transformers

        return transformers.TexTokImageProcessor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
