"""A tiny exported tokenizer and generator, and a directory of them for the tests of what is made out of ONNX files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from textok_fast import TexTok
from textok_fast.config import DiTConfig
from textok_fast.export import export_decoder, export_encoder
from textok_fast.modeling.dit import DiT
from textok_fast.modeling.text_encoders import TextFeatures

NAMES = ("decoder", "encoder", "forward")


def tiny_dit() -> DiT:
    """A generator of the tiny tokenizer's 3 tokens of 4 channels, for 5 classes and captions, its weights seeded."""
    torch.manual_seed(1)
    dit = DiT(DiTConfig(num_tokens=3, in_channels=4, width=16, depth=1, heads=2, num_classes=5, text_dim=8))
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return dit.eval()


class Forward(nn.Module):
    """x, t, y, text, text_mask -> output: forward.onnx."""

    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, x: Tensor, t: Tensor, y: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        assert self.dit.text_embedder is not None
        modulations = self.dit.modulation(self.dit.condition(t, y))
        tokens = self.dit.text_embedder(TextFeatures(text, text_mask), x.shape[0])
        return self.dit.step(x, modulations, tokens, None)


def export_all(tokenizer: TexTok, dit: DiT, directory: Path) -> None:
    """encoder.onnx, decoder.onnx and forward.onnx with free ``batch`` and ``text_length``."""
    export_encoder(tokenizer, directory / "encoder.onnx")
    export_decoder(tokenizer, directory / "decoder.onnx")
    graph = Forward(dit).eval()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("text_length")
    inputs = {
        "x": torch.randn(2, 3, 4),
        "t": torch.tensor([1.0, 500.0]),
        "y": torch.tensor([0, 5]),
        "text": torch.randn(2, 5, 8),
        "text_mask": torch.ones(2, 5, dtype=torch.bool),
    }
    free = {name: {0: batch, 1: length} if name.startswith("text") else {0: batch} for name in inputs}
    torch.onnx.export(
        graph,
        (),
        str(directory / "forward.onnx"),
        kwargs=inputs,
        input_names=list(inputs),
        output_names=["output"],
        dynamic_shapes=free,
        opset_version=20,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
