"""ONNX export of the tokenizer's two halves, each checked against PyTorch in ONNX Runtime before it counts as written."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from textok_fast.config import to_dict
from textok_fast.errors import InputError
from textok_fast.files import write_atomically
from textok_fast.modeling.text_encoders import TextFeatures
from textok_fast.modeling.tokenizer import TexTok

OPSET = 20  # the first with Gelu; 23's Attention is refused by some runtimes in float32
CHECK_BATCHES = (1, 3)  # sizes the finished file is run at; traced at 2
CHECK_TEXT_LENGTHS = (1, 7)  # traced at 5


@dataclass
class OnnxCheck:
    """An exported file and how far ONNX Runtime's outputs are from PyTorch's on the same inputs."""

    path: str
    max_abs_error: float
    tolerance: float
    opset: int
    runtime: str


class DecoderGraph(nn.Module):
    """tokens (B, N, d), text features and mask -> pixels (B, 3, S, S) in [-1, 1]: what :meth:`TexTok.decode` computes."""

    def __init__(self, tokenizer: TexTok) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, tokens: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        features = None if text is None or text_mask is None else TextFeatures(text, text_mask)
        return self.tokenizer.decoder(self.tokenizer.denormalize(tokens), features).clamp(-1.0, 1.0)


class EncoderGraph(nn.Module):
    """pixels (B, 3, S, S), text features and mask -> tokens (B, N, d): what :meth:`TexTok.encode` computes."""

    def __init__(self, tokenizer: TexTok) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, pixels: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        features = None if text is None or text_mask is None else TextFeatures(text, text_mask)
        out = self.tokenizer.bottleneck(self.tokenizer.encoder(pixels, features))
        return self.tokenizer.normalize(out.latents if out.mean is None else out.mean)


def export_decoder(tokenizer: TexTok, path: str | Path, tolerance: float = 1e-4) -> OnnxCheck:
    """Writes the decoder with dynamic batch and caption length; inputs ``tokens``, ``text``, ``text_mask``; output ``pixels``.

    A caption whose mask is all False is the null caption. The file is in float32 whatever the tokenizer's device and dtype.
    Raises InputError without onnx, onnxscript and onnxruntime, and when ONNX Runtime differs from PyTorch on the CPU by more
    than ``tolerance``; then no file is left.
    """
    config = tokenizer.config
    data = (config.num_tokens, config.latent_dim)
    tokenizer = _on_cpu(tokenizer)
    return _export(
        DecoderGraph(tokenizer).eval(), tokenizer, "tokens", data, "pixels", config.text_in_decoder, Path(path), tolerance
    )


def export_encoder(tokenizer: TexTok, path: str | Path, tolerance: float = 1e-4) -> OnnxCheck:
    """Writes the encoder; inputs ``pixels``, ``text``, ``text_mask``; output ``tokens``. Else as :func:`export_decoder`."""
    config = tokenizer.config
    data = (3, config.image_size, config.image_size)
    tokenizer = _on_cpu(tokenizer)
    return _export(
        EncoderGraph(tokenizer).eval(), tokenizer, "pixels", data, "tokens", config.text_in_encoder, Path(path), tolerance
    )


def _on_cpu(tokenizer: TexTok) -> TexTok:
    """A copy in float32 on the CPU, where ONNX Runtime's outputs are compared."""
    copy = TexTok(tokenizer.config)
    copy.load_state_dict(tokenizer.state_dict())
    return copy


def _export(
    graph: nn.Module,
    tokenizer: TexTok,
    name: str,
    shape: tuple[int, ...],
    output: str,
    with_text: bool,
    path: Path,
    tolerance: float,
) -> OnnxCheck:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise InputError(f"ONNX export needs {error.name}: pip install 'textok-fast[export]'") from None
    inputs = _inputs(tokenizer, name, shape, with_text, batch=2, length=5)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("text_length")
    dynamic: dict[str, Any] = {name: {0: batch}}
    if with_text:
        dynamic |= {"text": {0: batch, 1: length}, "text_mask": {0: batch, 1: length}}
    worst = 0.0

    def write(target: Path) -> None:
        nonlocal worst
        with _quiet_exporter():
            torch.onnx.export(
                graph,
                (),
                str(target),
                kwargs=inputs,
                input_names=list(inputs),
                output_names=[output],
                dynamic_shapes=dynamic,
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        model = onnx.load(str(target))
        entry = model.metadata_props.add()
        entry.key, entry.value = "textok_config", json.dumps(to_dict(tokenizer.config))
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, str(target))
        session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
        for size in CHECK_BATCHES:
            for text_length in CHECK_TEXT_LENGTHS:
                given = _inputs(tokenizer, name, shape, with_text, size, text_length)
                with torch.no_grad():
                    wanted = graph(**given).numpy()
                (got,) = session.run([output], {key: value.numpy() for key, value in given.items()})
                worst = max(worst, float(np.abs(got - wanted).max()))
        if not worst <= tolerance:
            raise InputError(
                f"{path} was not written: ONNX Runtime differs from PyTorch by {worst:.3g}, allowed is {tolerance:.3g}"
            )

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)
    return OnnxCheck(str(path), worst, tolerance, OPSET, f"onnxruntime {onnxruntime.__version__}")


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without torch's deprecations and its notes that torchvision is absent: nothing there a caller could act on."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _inputs(
    tokenizer: TexTok, name: str, shape: tuple[int, ...], with_text: bool, batch: int, length: int
) -> dict[str, Tensor]:
    """Seeded inputs; the last caption is one token shorter where that is possible."""
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    inputs = {name: torch.rand(batch, *shape, generator=generator) * 2 - 1}
    if with_text:
        inputs["text"] = torch.randn(batch, length, tokenizer.config.text_dim, generator=generator)  # (B, N_t, D_t)
        inputs["text_mask"] = torch.ones(batch, length, dtype=torch.bool)  # (B, N_t)
        inputs["text_mask"][-1, max(1, length - 1) :] = False
    return inputs
