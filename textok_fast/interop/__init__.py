"""Other people's weights in our models, and our models behind other people's interfaces."""

from textok_fast.interop.convert import KINDS, Kind, convert, guess_kind, load
from textok_fast.interop.dit import load_diffusers_dit, load_dit, to_diffusers_dit
from textok_fast.interop.softvq import ContinuousTokenizer, convert_softvq
from textok_fast.interop.titok import TiTok, convert_titok
from textok_fast.interop.weights import Weights, read_weights

__all__ = [
    "KINDS",
    "ContinuousTokenizer",
    "Kind",
    "TiTok",
    "Weights",
    "convert",
    "convert_softvq",
    "convert_titok",
    "guess_kind",
    "load",
    "load_diffusers_dit",
    "load_dit",
    "read_weights",
    "to_diffusers_dit",
]
