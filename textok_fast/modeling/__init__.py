"""What the networks are: the TexTok tokenizer, the DiT generator and the text encoders that condition them."""

from textok_fast.modeling.autoencoder import LatentTokenizer, load_tokenizer
from textok_fast.modeling.dit import DiT
from textok_fast.modeling.text_encoders import TextEncoder, TextFeatures, load_text_encoder, pad_features
from textok_fast.modeling.tokenizer import TexTok, Tokens

__all__ = [
    "DiT",
    "LatentTokenizer",
    "TexTok",
    "TextEncoder",
    "TextFeatures",
    "Tokens",
    "load_text_encoder",
    "load_tokenizer",
    "pad_features",
]
