"""A tiny exported tokenizer and generator, and a directory of them for the tests of what is made out of ONNX files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from textok_fast import TexTok
from textok_fast.config import DiTConfig
from textok_fast.export.graphs import generator_graphs, tokenizer_graphs
from textok_fast.export.onnx import save, trace
from textok_fast.modeling.dit import DiT

NAMES = ("decoder", "encoder", "forward")


def tiny_dit(**fields: Any) -> DiT:
    """A generator of the tiny tokenizer's 3 tokens of 4 channels, for 5 classes and captions, its weights seeded."""
    torch.manual_seed(1)
    sizes = {"num_tokens": 3, "in_channels": 4, "width": 16, "depth": 1, "heads": 2, "num_classes": 5, "text_dim": 8}
    dit = DiT(DiTConfig(**{**sizes, **fields}))
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return dit.eval()


def export_once(make_tokenizer: Callable[..., TexTok], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """encoder.onnx, decoder.onnx and forward.onnx of ``tiny_dit`` and a tokenizer of one block a side, once a process."""
    directory = tmp_path_factory.getbasetemp() / "tiny_export"
    if directory.is_dir():
        return directory
    directory.mkdir()
    for graph in tokenizer_graphs(make_tokenizer(encoder_depth=1, decoder_depth=1)):
        save(trace(graph, {}), directory / f"{graph.name}.onnx")
    export_generator(tiny_dit(), directory)
    return directory


def export_generator(dit: DiT, directory: Path) -> None:
    """forward.onnx."""
    (graph,) = [graph for graph in generator_graphs(dit) if graph.name == "forward"]
    save(trace(graph, {}), directory / "forward.onnx")


def export_module(module: nn.Module, inputs: dict[str, Tensor], output: str, path: Path) -> None:
    """Inputs of captions (text, text_mask, input_ids, attention_mask) have a free second size."""
    batch, length = torch.export.Dim("batch"), torch.export.Dim("text_length")
    torch.onnx.export(
        module.eval(),
        (),
        str(path),
        kwargs=inputs,
        input_names=list(inputs),
        output_names=[output],
        dynamic_shapes={
            name: {0: batch, 1: length} if name.startswith(("text", "input_ids", "attention")) else {0: batch}
            for name in inputs
        },
        opset_version=20,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
