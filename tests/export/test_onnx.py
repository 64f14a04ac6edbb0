from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from textok_fast import InputError, TexTok
from textok_fast.config import TexTokConfig, from_mapping

REASON = "ONNX export needs the extra 'export' (onnx, onnxscript, onnxruntime)"
onnx = pytest.importorskip("onnx", reason=REASON)
onnxruntime = pytest.importorskip("onnxruntime", reason=REASON)
pytest.importorskip("onnxscript", reason=REASON)

from textok_fast.export import Source, export_onnx  # noqa: E402

Make = Callable[..., TexTok]


def run(path: Path, inputs: dict[str, torch.Tensor]) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert {entry.name for entry in session.get_inputs()} == set(inputs)
    out, *_ = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return out  # type: ignore[no-any-return]


def captions(batch: int, length: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, length // 2 :] = False  # at length 1 the null caption
    return {"text": torch.randn(batch, length, 8), "text_mask": mask}


@pytest.mark.parametrize(("text", "bottleneck"), [("both", "none"), ("none", "none"), ("both", "fsq")])
def test_both_halves_match_pytorch_at_other_sizes_than_they_were_traced_at(
    make_tokenizer: Make, tmp_path: Path, text: str, bottleneck: str
) -> None:
    depth = 2 if bottleneck == "none" and text == "both" else 1
    tokenizer = make_tokenizer(text=text, bottleneck=bottleneck, encoder_depth=depth, decoder_depth=depth)
    tokenizer.set_latent_statistics(torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([0.5, 1.0, 2.0, 1.5]))
    exported = export_onnx(Source(tokenizer), tmp_path / "out", pictures=1)
    assert all(row.passed and row.tolerance in (1e-4, 0.01) for row in exported.parity)
    assert {"decoder.onnx", "encoder.onnx"} <= {path.name for path in (tmp_path / "out").iterdir()}
    # The file says what it holds, and needs nothing but standard operators.
    model = onnx.load(str(tmp_path / "out" / "decoder.onnx"))
    (entry,) = [entry for entry in model.metadata_props if entry.key == "textok_config"]
    assert from_mapping(TexTokConfig, json.loads(entry.value)) == tokenizer.config
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    for batch in (1, 3):
        for length in (1, 7):
            given = captions(batch, length) if text == "both" else {}
            pair = (given["text"], given["text_mask"]) if given else None
            images = torch.rand(batch, 3, 16, 16) * 2 - 1
            tokens = tokenizer.encode(images, pair)
            got = run(tmp_path / "out" / "encoder.onnx", {"pixels": images, **given})
            np.testing.assert_allclose(got, tokens.mode().numpy(), atol=1e-4)
            plain = tokens.mode().clone()
            pixels = run(tmp_path / "out" / "decoder.onnx", {"tokens": plain, **given})
            np.testing.assert_allclose(pixels, tokenizer.decode(plain, pair).numpy(), atol=1e-4)


def test_without_the_extra_it_says_what_to_install(
    make_tokenizer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"pip install 'textok-fast\[export\]'"):
        export_onnx(Source(make_tokenizer(text="none")), tmp_path / "out")


def test_a_tokenizer_in_another_precision_is_exported_in_float32(make_tokenizer: Make, tmp_path: Path) -> None:
    for name, tokenizer in (
        ("plain", make_tokenizer(text="none", decoder_depth=1)),
        ("half", make_tokenizer(text="none", decoder_depth=1).bfloat16()),
    ):
        (row,) = export_onnx(Source(tokenizer), tmp_path / name, "decoder", pictures=1).parity
        assert row.max_abs is not None and row.max_abs <= 1e-4
    tokens = torch.randn(2, 3, 4)
    a, b = (run(tmp_path / name / "decoder.onnx", {"tokens": tokens}) for name in ("plain", "half"))
    assert a.dtype == b.dtype == np.float32
    np.testing.assert_allclose(a, b, atol=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_tokenizer_on_a_gpu(make_tokenizer: Make, tmp_path: Path) -> None:
    tokenizer = make_tokenizer().to("cuda")
    assert all(row.passed for row in export_onnx(Source(tokenizer), tmp_path / "out", pictures=1).parity)
    assert tokenizer.device.type == "cuda"
