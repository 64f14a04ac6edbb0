"""What ``textok_fast.export.load`` returns has the calls, results and errors of the PyTorch classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from textok_fast import DiT, DiTConfig, InputError, TexTok
from textok_fast.diffusion import build_process
from textok_fast.inference.generator import GeneratorEngine
from textok_fast.inference.pipelines import ClassToImagePipeline, SamplingOptions, TextToImagePipeline, build_pipeline
from textok_fast.inference.tokenizer import TokenizerEngine
from textok_fast.modeling.text_encoders import TextFeatures

REASON = "ONNX export needs the extra 'export' (onnx, onnxscript, onnxruntime)"
pytest.importorskip("onnx", reason=REASON)
onnxruntime = pytest.importorskip("onnxruntime", reason=REASON)
pytest.importorskip("onnxscript", reason=REASON)

from textok_fast.export import Manifest, Source, export, load, runtime  # noqa: E402

Make = Callable[..., TexTok]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
STATISTICS = (torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([0.5, 1.0, 2.0, 1.5]))


def tiny_dit(**fields: Any) -> DiT:
    torch.manual_seed(0)
    sizes = {"width": 32, "depth": 1, "heads": 2, "mlp_ratio": 2.0, "num_tokens": 3, "in_channels": 4, "num_classes": 0}
    model = DiT(DiTConfig(**{**sizes, "learn_sigma": False, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def exported(source: Source, out: Path, what: str = "all") -> Any:
    export(source, out, what=what, pictures=1)
    return load(out, "cpu")


def counted(programs: dict[str, runtime.Program]) -> list[str]:
    """The names of the programs, each time that one is called from now on."""
    calls: list[str] = []
    for name, program in programs.items():
        kind: Any = type(program)

        def call(self: Any, *given: Any, name: str = name, kind: Any = kind) -> Any:
            calls.append(name)
            return kind.__call__(self, *given)

        program.__class__ = type("Counted", (kind,), {"__call__": call})  # calls look on the class alone
    return calls


@pytest.mark.parametrize("bottleneck", ["kl", "vq", "fsq"])
def test_a_tokenizer(make_tokenizer: Make, tmp_path: Path, bottleneck: str) -> None:
    levels = {"fsq_levels": (3, 3, 3, 3)} if bottleneck == "fsq" else {}
    model = make_tokenizer(
        bottleneck=bottleneck, encoder_depth=1, decoder_depth=1, text_positions=True, max_text_tokens=16, **levels
    )
    model.set_latent_statistics(*STATISTICS)
    encoder, decoder = (exported(Source(model), tmp_path / what, what) for what in ("encoder", "decoder"))
    assert isinstance(encoder, TokenizerEngine) and isinstance(decoder, TokenizerEngine)
    with pytest.raises(InputError, match="holds no decoder: export it with --what decoder"):
        encoder.decode(torch.zeros(1, 3, 4))
    for loaded in (encoder, decoder):
        loaded.model.text_encoder = model.text_encoder
    for captions in (None, ["a red cat"], ["", "two blue cats", "a"], ["one two three"] * 8):
        batch = 2 if captions is None else len(captions)
        pictures = torch.randint(0, 256, (batch, 16, 16, 3), dtype=torch.uint8)
        tokens, wanted = encoder.encode(pictures, captions), model.encode(pictures, captions)
        torch.testing.assert_close(tokens.mode(), wanted.mode(), **CLOSE)
        if wanted.indices is not None:
            assert tokens.indices is not None and torch.equal(tokens.indices, wanted.indices)
            torch.testing.assert_close(
                decoder.decode(tokens.indices, captions), model.decode(wanted.indices, captions), **CLOSE
            )
        if bottleneck == "kl":
            draw = [each.sample(torch.Generator().manual_seed(1)) for each in (tokens, wanted)]
            torch.testing.assert_close(*draw, **CLOSE)
        torch.testing.assert_close(decoder.decode(wanted, captions), model.decode(wanted, captions), **CLOSE)
        levels8 = [each.decode(wanted, captions, "uint8").int() for each in (decoder, model)]
        assert levels8[0].shape == (batch, 16, 16, 3) and (levels8[0] - levels8[1]).abs().max() <= 1
    for call in (
        lambda each: each.decode(torch.zeros(2, 3, 4), ["one"]),
        lambda each: each.decode(torch.zeros(2, 4, 4)),
        lambda each: each.decode(torch.full((1, 3, 4), torch.nan)),
        lambda each: each.decode(torch.zeros(1, 3, 4), output="pil"),
        lambda each: each.encode(torch.zeros(1, 3, 8, 8)),
        lambda each: each.encode(torch.full((1, 3, 16, 16), 2.0)),
        lambda each: each.encode("picture.png"),
    ):
        with pytest.raises(InputError) as of_the_model:
            call(model)
        for loaded in (encoder, decoder):
            with pytest.raises(InputError) as error:
                call(loaded)
            assert str(error.value) == str(of_the_model.value)


def test_a_generator(tmp_path: Path) -> None:
    model = tiny_dit(num_classes=5, text_dim=8, learn_sigma=True)
    loaded = exported(Source(generator=model), tmp_path / "out")
    assert isinstance(loaded, GeneratorEngine) and loaded.config == model.config
    text = TextFeatures(torch.randn(3, 6, 8), torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0], [0] * 6]).bool())
    x, t, y = torch.randn(3, 3, 4), torch.randint(0, 1000, (3,)), torch.tensor([0, 5, 2])
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, t, y, text), model(x, t, y, text), **CLOSE)
        torch.testing.assert_close(loaded(x, t), model(x, t), **CLOSE)
    with pytest.raises(InputError, match=r"x must be \(B, 3, 4\)"):
        loaded(torch.zeros(1, 5, 4), torch.zeros(1))
    from textok_fast.inference import Engine, Plan

    process = build_process("gaussian", learn_sigma=True)
    assert isinstance(loaded, runtime.ExportedGenerator)
    calls = counted(loaded.exported)
    options: dict[str, Any] = {"seeds": [3, 1, 2], "steps": 3, "guidance_scale": 2.0, "labels": torch.tensor([0, 4, 5])}
    negative = TextFeatures(torch.randn(3, 2, 8), torch.ones(3, 2, dtype=torch.bool))
    engine = Engine(model, Plan(device="cpu"))
    for given, inside in (
        ({"sampler": "ddpm", "text": text}, True),
        ({"sampler": "ddim"}, True),
        ({"sampler": "ddpm", "text": text, "guidance_interval": (0.0, 600.0)}, False),
        ({"sampler": "unipc", "text": text}, False),
        ({"sampler": "ddim", "text": text, "negative_text": negative}, False),
        ({"sampler": "ddim", "text": text, "guided_channels": 3}, False),
        ({"sampler": "ddim", "text": text, "guidance_scale": 1.0}, False),
    ):
        calls.clear()
        both = [each.sample(process, **{**options, **given}) for each in (loaded, engine)]
        torch.testing.assert_close(*both, **CLOSE)
        assert calls == (["sampler"] * 3 if inside else ["modulation", *["step"] * 3]), given
    apart = load(tmp_path / "out", "cpu", sampler=False)
    assert isinstance(apart, runtime.ExportedGenerator)
    calls = counted(apart.exported)
    torch.testing.assert_close(apart.sample(process, **options), engine.sample(process, **options), **CLOSE)
    assert calls == ["modulation", *["step"] * 3]
    seen: list[float] = []
    loaded.sample(process, on_step=lambda i, t, x: seen.append(float(x.abs().mean())), **options)
    assert len(set(seen)) == 3  # the run is at hand between its evaluations


def test_a_pipeline_by_caption(make_tokenizer: Make, tmp_path: Path) -> None:
    tokenizer, generator = make_tokenizer(encoder_depth=1, decoder_depth=1), tiny_dit(text_dim=8, time_scale=1000.0)
    about = {"objective": "flow", "prediction": "velocity", "label_names": [], "captions": {}}
    reference = build_pipeline(generator, tokenizer, about, "here")
    reference.save_pretrained(tmp_path / "model")
    source = Source.load(tmp_path / "model")
    assert source.tokenizer is not None
    source.tokenizer.text_encoder = tokenizer.text_encoder
    for what in ("generator", "decoder"):  # "all" would want a real text encoder
        export(source, tmp_path / what, what=what, pictures=1)
    merged = tmp_path / "generator"
    manifest = Manifest.read(merged)
    (tmp_path / "decoder" / "decoder.onnx").rename(merged / "decoder.onnx")
    manifest.add(merged, "decoder", "decoder.onnx")
    manifest.write(merged)
    loaded = load(merged, "cpu")
    assert isinstance(loaded, TextToImagePipeline)
    loaded.tokenizer.text_encoder = tokenizer.text_encoder
    prompts, options = ["a red cat", "two blue cats now"], SamplingOptions(steps=3, guidance_scale=2.0)
    made, wanted = (each(prompts, seed=5, options=options, output="float") for each in (loaded, reference))
    torch.testing.assert_close(made.tokens, wanted.tokens, **CLOSE)
    torch.testing.assert_close(made.images, wanted.images, **CLOSE)
    with pytest.raises(InputError, match="at least one prompt"):
        loaded([])


def test_a_pipeline_by_class(make_tokenizer: Make, tmp_path: Path) -> None:
    tokenizer, generator = (
        make_tokenizer(text="none", encoder_depth=1, decoder_depth=1),
        tiny_dit(num_classes=5, learn_sigma=True),
    )
    about = {"objective": "gaussian", "prediction": "epsilon", "label_names": ["a", "b", "c", "d", "e"], "captions": {}}
    loaded = exported(Source(tokenizer, generator, about), tmp_path / "out")
    assert isinstance(loaded, ClassToImagePipeline) and loaded.label_names == about["label_names"]
    assert not (tmp_path / "out" / "text.onnx").exists()
    reference = build_pipeline(generator, tokenizer, about, "here")
    options = SamplingOptions(sampler="ddim", steps=3, guidance_scale=2.0)
    made, wanted = (each(["b", 4], seed=5, options=options, output="float") for each in (loaded, reference))
    torch.testing.assert_close(made.images, wanted.images, **CLOSE)
    with pytest.raises(InputError, match="no class 'z'"):
        loaded("z")


def test_captions_through_the_exported_text_encoder(tiny_config: Callable[..., Any], tmp_path: Path) -> None:
    from textok_fast.modeling.text_encoders import TextEncoder

    try:
        encoder = TextEncoder("minilm", max_tokens=32, split="; ", cache=False)
    except InputError as error:
        pytest.skip(str(error))
    tokenizer = TexTok(tiny_config(text="decoder", text_dim=encoder.dim, max_text_tokens=32, text_split="; ")).eval()
    tokenizer.text_encoder = encoder
    export(Source(tokenizer), tmp_path / "out", what="text", pictures=1)
    loaded = load(tmp_path / "out", "cpu")
    assert isinstance(loaded, TokenizerEngine) and isinstance(loaded.text_encoder, runtime.ExportedTextEncoder)
    captions = ["cow top left; red background", "", "a sheep"]
    got, wanted = loaded.text_encoder(captions), encoder(captions)
    assert torch.equal(got.mask, wanted.mask)
    torch.testing.assert_close(got.features, wanted.features, **CLOSE)


def test_what_cannot_be_loaded_is_named(make_tokenizer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"has no export.json: `textok-fast export` writes"):
        load(tmp_path, "cpu")
    out = tmp_path / "out"
    export(Source(make_tokenizer(text="none", decoder_depth=1)), out, what="decoder", pictures=1)
    with pytest.raises(InputError, match="provider must be one of cpu, cuda, tensorrt, got 'vulkan'"):
        load(out, "cpu", "vulkan")
    if not torch.cuda.is_available():
        for provider in ("cuda", "tensorrt"):
            with pytest.raises(InputError, match="torch sees no GPU"):
                load(out, None, provider)
    with pytest.raises(InputError, match="device must be auto, cpu, cuda"):
        load(out, "mps")
    manifest = Manifest.read(out)
    manifest.to = "coreml"
    manifest.write(out)
    with pytest.raises(InputError, match="was exported to coreml"):
        load(out, "cpu")
    manifest.to = "onnx"
    manifest.write(out)
    good = (out / "decoder.onnx").read_bytes()
    (out / "decoder.onnx").write_bytes(good[:-4000] + b"\0" * 4000)  # a part of a download that is lacking, at the same size
    with pytest.raises(InputError, match="is damaged: decoder.onnx is not what was exported, its SHA-256 differs"):
        load(out, "cpu")
    (out / "decoder.onnx").write_bytes(b"x" * len(good))
    with pytest.raises(InputError, match="ONNX Runtime cannot load"):
        load(out, "cpu", verify=False)
    (out / "decoder.onnx").unlink()
    with pytest.raises(InputError, match="decoder.onnx is missing or cut short"):
        load(out, "cpu")
    (out / "export.json").write_text("{}")
    with pytest.raises(InputError, match="not of format 1"):
        load(out, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="has no CUDAExecutionProvider"):
        runtime.place("cuda:0", "")


@pytest.mark.slow
def test_packages(make_tokenizer: Make, tmp_path: Path) -> None:
    tokenizer, generator = make_tokenizer(text="none", encoder_depth=1, decoder_depth=1), tiny_dit(num_classes=5)
    about = {"objective": "flow", "prediction": "velocity", "label_names": [], "captions": {}}
    made = export(Source(tokenizer, generator, about), tmp_path / "out", to="aoti", pictures=1)
    assert [row.graph for row in made.parity] == ["forward", "encoder", "decoder", "8 steps", "8 steps"]
    assert all(row.passed for row in made.parity)
    loaded = load(tmp_path / "out")
    assert isinstance(loaded, ClassToImagePipeline)
    options = SamplingOptions(steps=3, guidance_scale=2.0)
    wanted = build_pipeline(generator, tokenizer, about, "here")([1, 4], options=options, output="float")
    torch.testing.assert_close(loaded([1, 4], options=options, output="float").images, wanted.images, **CLOSE)
