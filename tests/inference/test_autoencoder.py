"""diffusers' AutoencoderKL in an engine, in a tokenizer's place, and in a pipeline over 2-D latents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from textok_fast import DiT, DiTConfig, InputError, TexTok
from textok_fast.inference import AutoencoderEngine, ClassToImagePipeline, Engine, Plan, SamplingOptions, load_pipeline
from textok_fast.inference.execution import why_not_compiled
from textok_fast.inference.folders import decode_folder, encode_folder, sample_to_folder
from textok_fast.modeling import LatentTokenizer, load_tokenizer

diffusers = pytest.importorskip("diffusers")


def autoencoder(**overrides: Any) -> Any:
    """An f4 one of 4 channels."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"block_out_channels": (8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32}
    sizes |= {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return diffusers.AutoencoderKL(**{**sizes, "latent_channels": 4, **overrides}).eval()


def generator(**overrides: Any) -> DiT:
    """Over latents (4, 8, 8)."""
    torch.manual_seed(1)
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 4, "width": 32, "depth": 2, "heads": 2, "num_classes": 5}
    model = DiT(DiTConfig(**{**sizes, **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


# -- the engine ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 0.05), ("int8", 1e-5), ("fp8", 0.05)])
@torch.no_grad()
def test_the_engine_is_the_model_with_its_calls(precision: Any, bound: float) -> None:
    vae, x, z = autoencoder(), torch.rand(2, 3, 32, 16) * 2 - 1, torch.randn(2, 4, 4, 8)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    engine = Engine(vae, Plan(precision))
    assert isinstance(engine, AutoencoderEngine) and engine.config is vae.config and engine.device == torch.device("cpu")
    assert engine.dtype == (torch.float32 if precision in ("fp32", "int8") else torch.bfloat16)
    assert relative(engine.decode(z).sample, vae.decode(z).sample) < bound
    assert torch.equal(engine.decode(z, return_dict=False)[0], engine.decode(z).sample)
    found, wanted = engine.encode(x).latent_dist, vae.encode(x).latent_dist
    assert relative(found.mode(), wanted.mode()) < bound and relative(found.std, wanted.std) < bound
    assert torch.equal(engine.encode(x, return_dict=False)[0].mean, found.mean)
    assert all(torch.equal(value, before[name]) and value.is_contiguous() for name, value in vae.state_dict().items())
    with pytest.raises(InputError, match=r"float \(B, C, H, W\), got torch.int64 \(1,\)"):
        engine.decode(torch.zeros(1, dtype=torch.int64))


def test_results_carry_no_gradient_and_no_mode_of_the_caller() -> None:
    engine, z = Engine(autoencoder(), Plan()), torch.randn(1, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = engine.decode(z.requires_grad_()).sample
    assert not found.requires_grad and found.dtype == torch.float32
    with torch.inference_mode():
        assert torch.equal(engine.decode(z).sample, found)


@torch.no_grad()
def test_convolutions_at_either_end_may_lack() -> None:
    vae, z = autoencoder(use_quant_conv=False, use_post_quant_conv=False), torch.randn(1, 4, 8, 8)
    engine = Engine(vae, Plan())
    assert relative(engine.decode(z).sample, vae.decode(z).sample) < 1e-5
    x = torch.rand(1, 3, 32, 32)
    assert relative(engine.encode(x).latent_dist.mode(), vae.encode(x).latent_dist.mode()) < 1e-5


@torch.no_grad()
def test_a_batch_runs_in_parts_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, z = autoencoder(), torch.randn(5, 4, 8, 8)
    sizes: list[int] = []
    decode = AutoencoderEngine._pixels
    monkeypatch.setattr(AutoencoderEngine, "_pixels", lambda self, z: (sizes.append(len(z)), decode(self, z))[1])
    wanted = Engine(vae, Plan()).decode(z).sample
    limit = Engine(vae, Plan()).memory(3, 32).total
    found = Engine(vae, Plan(memory_limit=limit)).decode(z).sample
    assert sizes == [5, 3, 2]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    one = Engine(vae, Plan()).memory(1, 32).total
    with pytest.raises(InputError, match="one picture of 32 x 32 does not fit, it takes"):
        Engine(vae, Plan(memory_limit=one - 1)).decode(z)
    with pytest.raises(InputError, match="the autoencoder in fp32 does not fit"):
        Engine(vae, Plan(memory_limit=1000))


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not_compiled("cpu")), reason=why_not_compiled("cpu") or "there is a compiler")
@torch.no_grad()
def test_compiled_it_is_one_graph() -> None:
    vae = autoencoder(block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",))
    z = torch.randn(1, 4, 8, 8)
    assert (
        relative(Engine(vae, Plan(compile="default")).decode(z).sample, vae.decode(z).sample) < 1e-5
    )  # fullgraph, or an error


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_captured_on_a_gpu() -> None:
    vae, z, x = autoencoder(), torch.randn(2, 4, 8, 8), torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.backends.cudnn.flags(allow_tf32=False):
        engine = Engine(vae, Plan(device="cuda", capture="loop"))
        for _ in range(3):  # eager, captured, replayed
            found, kept = engine.decode(z + 1).sample, engine.decode(z).sample
            assert relative(kept.cpu(), vae.decode(z).sample) < 1e-4 and relative(found.cpu(), vae.decode(z + 1).sample) < 1e-4
            assert relative(engine.encode(x).latent_dist.mode().cpu(), vae.encode(x).latent_dist.mode()) < 1e-4
    bf16 = Engine(vae, Plan("bf16", "cuda", compile="default"))
    assert relative(bf16.decode(z).sample.cpu(), vae.decode(z).sample) < 0.05


# -- in a tokenizer's place ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_latents_are_scaled_as_published() -> None:
    vae, pictures = autoencoder(), torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    tokenizer = LatentTokenizer(vae)
    posterior = vae.encode(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist
    tokens = tokenizer.encode(pictures, ["captions", "are not read"])
    torch.testing.assert_close(tokens.mode(), posterior.mode() * 0.18215)
    drawn = tokens.sample(torch.Generator().manual_seed(0))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn, (posterior.mean + posterior.std * noise) * 0.18215)
    pixels = vae.decode(tokens.as_subclass(Tensor) / 0.18215).sample.clamp(-1, 1)
    torch.testing.assert_close(tokenizer.decode(tokens), pixels)
    assert torch.equal(tokenizer.decode(tokens, output="uint8"), ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1))
    assert torch.equal(tokenizer.encode([Image.fromarray(each) for each in pictures.numpy()]).mode(), tokens.mode())
    shifted = LatentTokenizer(autoencoder(scaling_factor=2.0, shift_factor=0.5))
    torch.testing.assert_close(shifted.encode(pictures).mode(), (posterior.mode() - 0.5) * 2)
    torch.testing.assert_close(shifted.decode(shifted.encode(pictures)), vae.decode(posterior.mode()).sample.clamp(-1, 1))
    fast = Engine(tokenizer, Plan())
    assert isinstance(fast, LatentTokenizer) and fast.config == tokenizer.config and fast.dtype == torch.float32
    torch.testing.assert_close(fast.decode(fast.encode(pictures)), tokenizer.decode(tokens), atol=1e-5, rtol=1e-4)


def test_it_is_saved_with_its_size_and_diffusers_reads_it(tmp_path: Path) -> None:
    vae = autoencoder()
    LatentTokenizer(vae, 64).save_pretrained(tmp_path / "vae")
    assert vae.config.sample_size == 32  # the caller's stays as it was
    again = load_tokenizer(tmp_path / "vae")
    assert isinstance(again, LatentTokenizer) and again.config == LatentTokenizer(vae, 64).config
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    z = torch.randn(1, 4, 16, 16)
    assert torch.equal(again.decode(z), LatentTokenizer(theirs).decode(z))
    with pytest.raises(InputError, match="holds a model of type 'AutoencoderKL', wanted 'textok'"):
        TexTok.from_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"<html>")
    with pytest.raises(InputError, match="cannot read"):
        load_tokenizer(tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="has no diffusion_pytorch_model.safetensors"):
        load_tokenizer(tmp_path / "vae")


def test_mistakes_are_named() -> None:
    tokenizer = LatentTokenizer(autoencoder())
    bad = torch.full((1, 4, 8, 8), float("nan"))
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: tokenizer.decode(torch.zeros(1, 4, 4, 4)), r"must be float \(B, 4, 8, 8\), got torch.float32 \(1, 4, 4, 4\)"),
        (lambda: tokenizer.decode(torch.zeros(1, 4, 8, 8, dtype=torch.int64)), "got torch.int64"),
        (lambda: tokenizer.decode([1]), "got list"),  # type: ignore[arg-type]
        (lambda: tokenizer.decode(bad), "NaN"),
        (lambda: tokenizer.decode(bad, output="png"), "output must be"),  # type: ignore[arg-type]
        (lambda: tokenizer.encode(torch.zeros(1, 3, 16, 16)), r"must have the shape \(B, 3, 32, 32\)"),
        (lambda: LatentTokenizer(autoencoder(), 30), "have a multiple of 4 pixels, got image_size=30"),
        (lambda: LatentTokenizer(autoencoder(latents_mean=(0.0,) * 4)), "a mean and a deviation for each channel"),
        (lambda: ClassToImagePipeline(generator(input_size=16), tokenizer), "makes latents of 4 channels and 16 x 16, the tok"),
        (
            lambda: ClassToImagePipeline(generator(input_size=0, num_tokens=6, patch_size=1), tokenizer),
            "makes 6 tokens of 4 channels, the tokenizer decodes latents of 4 channels and 8 x 8",
        ),
        (lambda: ClassToImagePipeline(generator(text_dim=8), tokenizer), "reads the features of its tokenizer's text encoder"),
    ]  # fmt: skip
    for call, message in calls:
        with pytest.raises(InputError, match=message):
            call()


# -- pipelines and folders -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_pipeline_over_latents() -> None:
    vae = autoencoder()
    plain = ClassToImagePipeline(generator(guided_channels=3), LatentTokenizer(vae))
    fast = ClassToImagePipeline(plain.generator, plain.tokenizer, plan=Plan())
    options = SamplingOptions("ddim", steps=4, guidance_scale=3.0)
    wanted = plain([1, 4], seed=3, options=options, output="float")
    found = fast([1, 4], seed=3, options=options, output="float")
    assert found.tokens.shape == (2, 4, 8, 8) and found.images.shape == (2, 3, 32, 32)
    torch.testing.assert_close(found.tokens, wanted.tokens, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.images, wanted.images, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(wanted.images, vae.decode(wanted.tokens / 0.18215).sample.clamp(-1, 1))
    torch.testing.assert_close(plain(4, seed=4, options=options).tokens[0], wanted.tokens[1], atol=1e-4, rtol=1e-4)
    # Guidance is on the config's channels unless the options say otherwise.
    for pipeline in (plain, fast):
        by = {n: pipeline(1, options=SamplingOptions("ddim", 4, 3.0, guided_channels=n)).tokens for n in (None, 1, 3, 4)}
        assert torch.equal(by[None], by[3]) and not torch.allclose(by[None], by[4]) and not torch.allclose(by[None], by[1])


def test_folders_of_latents_and_samples(tmp_path: Path) -> None:
    pipeline = ClassToImagePipeline(generator(), LatentTokenizer(autoencoder()))
    model = pipeline.save_pretrained(tmp_path / "pipe")
    assert torch.equal(load_pipeline(model)(2).images, pipeline(2).images)
    sample: dict[str, Any] = {"count": 2, "steps": 2, "guidance": 3.0}
    report = sample_to_folder(str(model), [], ["2"], tmp_path / "s", **sample)
    assert report["new"] == 2 and np.asarray(Image.open(tmp_path / "s" / "00001.png")).shape == (32, 32, 3)
    (tmp_path / "s" / "00001.png").unlink()
    assert sample_to_folder(str(model), [], ["2"], tmp_path / "s", **sample)["new"] == 1
    with pytest.raises(InputError, match="guided_channels differ"):
        sample_to_folder(str(model), [], ["2"], tmp_path / "s", **sample, guided_channels=3)
    listing = json.loads((tmp_path / "s" / "samples.json").read_text())
    listing.pop("guided_channels")  # as earlier versions wrote it, which guided all
    (tmp_path / "s" / "samples.json").write_text(json.dumps(listing))
    assert sample_to_folder(str(model), [], ["2"], tmp_path / "s", **sample)["new"] == 0

    vae, photos = str(model / "tokenizer"), tmp_path / "s"
    for name in ("00000", "00001"):
        (photos / f"{name}.txt").write_text("a picture")
    for format in ("safetensors", "webdataset"):
        tokens, back = tmp_path / format, tmp_path / f"{format}-back"
        assert encode_folder(vae, str(photos), tokens, format)["tokens"] == [4, 8, 8]  # type: ignore[arg-type]
        assert encode_folder(vae, str(photos), tokens, format)["shards_reused"] == 1  # type: ignore[arg-type]
        assert decode_folder(vae, tokens, back)["new"] == 2
        picture = torch.from_numpy(np.array(Image.open(photos / "00000.png")))[None]
        wanted = pipeline.tokenizer.decode(pipeline.tokenizer.encode(picture), output="uint8")[0].numpy()
        found = np.asarray(Image.open(sorted(back.glob("*.png"))[0]))
        assert np.abs(found.astype(int) - wanted).max() <= 1
