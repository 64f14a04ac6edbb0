"""Training of the tokenizer and of the generator: losses, the loop, checkpoints."""

from textok_fast.training.generator import train_generator
from textok_fast.training.tokenizer import train_tokenizer

__all__ = ["train_generator", "train_tokenizer"]
