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

from textok_fast.export import export_decoder, export_encoder  # noqa: E402

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
    checks = [
        export_decoder(tokenizer, tmp_path / "decoder.onnx"),
        export_encoder(tokenizer, tmp_path / "sub" / "encoder.onnx"),
    ]
    assert [Path(check.path).name for check in checks] == ["decoder.onnx", "encoder.onnx"]
    assert all(check.max_abs_error <= check.tolerance == 1e-4 for check in checks)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["decoder.onnx", "encoder.onnx"]
    # The file says what it holds, and needs nothing but standard operators.
    model = onnx.load(str(tmp_path / "decoder.onnx"))
    (entry,) = [entry for entry in model.metadata_props if entry.key == "textok_config"]
    assert from_mapping(TexTokConfig, json.loads(entry.value)) == tokenizer.config
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    for batch in (1, 3):
        for length in (1, 7):
            given = captions(batch, length) if text == "both" else {}
            pair = (given["text"], given["text_mask"]) if given else None
            images = torch.rand(batch, 3, 16, 16) * 2 - 1
            tokens = tokenizer.encode(images, pair)
            got = run(tmp_path / "sub" / "encoder.onnx", {"pixels": images, **given})
            np.testing.assert_allclose(got, tokens.mode().numpy(), atol=1e-4)
            plain = tokens.mode().clone()
            pixels = run(tmp_path / "decoder.onnx", {"tokens": plain, **given})
            np.testing.assert_allclose(pixels, tokenizer.decode(plain, pair).numpy(), atol=1e-4)


def test_a_file_that_differs_from_pytorch_is_not_left_behind(make_tokenizer: Make, tmp_path: Path) -> None:
    (tmp_path / "decoder.onnx").write_bytes(b"an earlier one")
    with pytest.raises(InputError, match="was not written: ONNX Runtime differs"):
        export_decoder(make_tokenizer(text="none", decoder_depth=1), tmp_path / "decoder.onnx", tolerance=-1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["decoder.onnx"]
    assert (tmp_path / "decoder.onnx").read_bytes() == b"an earlier one"


def test_without_the_extra_it_says_what_to_install(
    make_tokenizer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"pip install 'textok-fast\[export\]'"):
        export_decoder(make_tokenizer(text="none"), tmp_path / "decoder.onnx")


def test_a_tokenizer_in_another_precision_is_exported_in_float32(make_tokenizer: Make, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(text="none", decoder_depth=1)
    plain = export_decoder(tokenizer, tmp_path / "plain.onnx")
    half = export_decoder(make_tokenizer(text="none", decoder_depth=1).bfloat16(), tmp_path / "half.onnx")
    assert max(plain.max_abs_error, half.max_abs_error) <= 1e-4
    tokens = torch.randn(2, 3, 4)
    a, b = run(tmp_path / "plain.onnx", {"tokens": tokens}), run(tmp_path / "half.onnx", {"tokens": tokens})
    assert a.dtype == b.dtype == np.float32
    np.testing.assert_allclose(a, b, atol=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_tokenizer_on_a_gpu(make_tokenizer: Make, tmp_path: Path) -> None:
    tokenizer = make_tokenizer().to("cuda")
    for export in (export_decoder, export_encoder):
        assert export(tokenizer, tmp_path / "x.onnx").max_abs_error <= 1e-4
    assert tokenizer.device.type == "cuda"
