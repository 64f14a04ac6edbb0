"""Our models behind the calls of diffusers, transformers, torch.hub and the Hub."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from textok_fast import DiT, DiTConfig, InputError, TexTok, interop
from textok_fast.inference import ClassToImagePipeline, Engine, Plan, SamplingOptions, TextToImagePipeline, load_pipeline
from textok_fast.interop import TexTokImageProcessor, model_card, push_to_hub

Make = Callable[..., TexTok]


def images(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, 16, 16) * 2 - 1


# -- diffusers: the autoencoder ------------------------------------------------------------------------------------------------


@pytest.fixture
def diffusers_interface() -> Any:
    pytest.importorskip("diffusers")
    from textok_fast.interop import diffusers

    return diffusers


@pytest.mark.parametrize("bottleneck", ["none", "kl", "vq"])
def test_the_autoencoder_is_the_tokenizer(
    diffusers_interface: Any, make_tokenizer: Make, bottleneck: str, tmp_path: Path
) -> None:
    model = make_tokenizer(bottleneck=bottleneck)
    vae = diffusers_interface.AutoencoderTexTok.from_textok(model)
    x, captions = images(), ["a b", "c"]
    wanted = model.encode(x, captions)
    posterior = vae.encode(x, captions).latent_dist
    torch.testing.assert_close(posterior.mode(), wanted.mode())
    one, other = (posterior.sample(torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert torch.equal(one, other) is (bottleneck != "kl")
    if bottleneck == "kl":
        torch.testing.assert_close(one, wanted.sample(torch.Generator().manual_seed(1)))
    torch.testing.assert_close(vae.decode(wanted.mode(), captions).sample.clamp(-1, 1), model.decode(wanted.mode(), captions))
    torch.testing.assert_close(vae(x, captions).sample, vae.decode(posterior.mode(), captions, return_dict=False)[0])
    assert vae.config.scaling_factor == 1.0 and vae.dtype == torch.float32 and vae.device.type == "cpu"

    vae.save_pretrained(tmp_path / "diffusers")
    again = diffusers_interface.AutoencoderTexTok.from_pretrained(tmp_path / "diffusers")
    assert again.tokenizer.config == model.config and isinstance(again, diffusers_interface.AutoencoderTexTok)
    again.tokenizer._text_encoder = model._text_encoder
    assert torch.equal(again.encode(x, captions).latent_dist.mode(), posterior.mode())
    own = diffusers_interface.AutoencoderTexTok.from_pretrained(
        model.save_pretrained(tmp_path / "own"), torch_dtype=torch.bfloat16
    )
    assert own.dtype == torch.bfloat16 and own.decode(wanted.mode()).sample.dtype == torch.bfloat16


def test_a_training_step_as_scripts_write_it(diffusers_interface: Any, make_tokenizer: Make) -> None:
    """Tokens, noise by a scheduler of diffusers, a loss; and the tokenizer itself under training."""
    from diffusers import DDPMScheduler

    vae = diffusers_interface.AutoencoderTexTok.from_textok(make_tokenizer(bottleneck="kl"))
    latents = vae.encode(images()).latent_dist.sample() * vae.config.scaling_factor
    noise, steps = torch.randn_like(latents), torch.tensor([3, 500])
    noisy = DDPMScheduler().add_noise(latents, noise, steps)
    assert noisy.shape == latents.shape
    vae.decode(noisy).sample.square().mean().backward()
    gradients = [parameter.grad for name, parameter in vae.named_parameters() if "encoder.blocks" in name]
    assert gradients and all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    assert vae.train().tokenizer.training and not vae.eval().tokenizer.training


def test_without_diffusers_the_message_is_clear() -> None:
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from textok_fast import interop\n"
        "interop.TiTok\n"
        "try:\n    from textok_fast.interop import AutoencoderTexTok\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert "needs diffusers" in done.stdout and "pip install 'textok-fast[bench]'" in done.stdout, done.stderr


# -- diffusers: the pipeline ---------------------------------------------------------------------------------------------------


def by_class(make_tokenizer: Make) -> ClassToImagePipeline:
    tokenizer = make_tokenizer()
    tokenizer.text_encoder = make_tokenizer()._text_encoder[0]
    config = tokenizer.config
    dit = DiT(DiTConfig(num_tokens=config.num_tokens, in_channels=config.latent_dim, width=32, depth=1, heads=2, num_classes=5))
    return ClassToImagePipeline(dit, tokenizer, "gaussian", ["cow", "hen"], {0: ["a cow"]})


def by_caption(make_tokenizer: Make, plan: Plan | None = None) -> TextToImagePipeline:
    tokenizer = make_tokenizer()
    config = tokenizer.config
    sizes: dict[str, Any] = {
        "num_tokens": config.num_tokens,
        "in_channels": config.latent_dim,
        "width": 32,
        "depth": 1,
        "heads": 2,
    }
    dit = DiT(DiTConfig(**sizes, num_classes=0, text_dim=config.text_dim, learn_sigma=False, time_scale=1000.0))
    return TextToImagePipeline(dit, tokenizer, "flow", plan=plan)


@pytest.mark.parametrize("plan", [None, Plan()])
def test_the_pipeline_from_captions(diffusers_interface: Any, make_tokenizer: Make, plan: Plan | None) -> None:
    inner = by_caption(make_tokenizer, plan)
    pipe = diffusers_interface.TexTokPipeline.from_textok(inner)
    pipe.set_progress_bar_config(disable=True)
    seen: list[tuple[int, float]] = []

    def look(given: Any, step: int, timestep: torch.Tensor, values: dict[str, Any]) -> dict[str, Any]:
        assert given is pipe and given.num_timesteps == 3 and given.guidance_scale == 2.0
        seen.append((step, round(float(timestep), 3)))
        return values

    options: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 2.0}
    made = pipe(["a b", "c"], generator=torch.Generator().manual_seed(0), callback_on_step_end=look, **options).images
    assert (
        [type(image) for image in made] == [Image.Image] * 2
        and made[0].size == (16, 16)
        and seen == [(0, 1000.0), (1, 666.667), (2, 333.333)]
    )
    again = pipe(["a b", "c"], generator=torch.Generator().manual_seed(0), output_type="np", **options).images
    assert np.array_equal((again * 255).round().astype(np.uint8), np.stack([np.asarray(image) for image in made]))
    pictures = pipe("a b", num_images_per_prompt=3, output_type="pt", return_dict=False, **options)[0]
    assert pictures.shape == (3, 3, 16, 16) and pictures.min() >= 0 and pictures.max() <= 1
    latents = pipe("a b", output_type="latent", sampler="heun", **options).images
    assert latents.shape == (1, inner.tokenizer.config.num_tokens, inner.tokenizer.config.latent_dim)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 0)]
    same = pipe(["a b", "a b"], generator=generators, output_type="latent", **options).images
    torch.testing.assert_close(same[0], same[1])
    for arguments, message in (
        ({}, "give a prompt"),
        ({"prompt": "a", "class_labels": 3}, "generates from captions"),
        ({"prompt": "a", "output_type": "jpg"}, "output_type must be"),
        ({"prompt": "a", "colour": 1}, "unknown options colour"),
        ({"prompt": "a", "generator": generators}, "2 generators for 1 pictures"),
    ):
        with pytest.raises(InputError, match=message):
            pipe(**arguments)


def test_the_pipeline_by_class_and_its_directory(diffusers_interface: Any, make_tokenizer: Make, tmp_path: Path) -> None:
    inner = by_class(make_tokenizer)
    pipe = diffusers_interface.TexTokPipeline.from_textok(inner)
    pipe.save_pretrained(tmp_path / "pipe")
    again = diffusers_interface.TexTokPipeline.from_pretrained(tmp_path / "pipe", plan=Plan())
    for each in (pipe, again):
        each.set_progress_bar_config(disable=True)
    again.pipeline.tokenizer._text_encoder = inner.tokenizer._text_encoder
    again.pipeline._engines[1].model._text_encoder = inner.tokenizer._text_encoder
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    one, other = (
        each(class_labels=["cow", 1], generator=torch.Generator().manual_seed(4), **options).images for each in (pipe, again)
    )
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    loaded = load_pipeline(tmp_path / "pipe")
    assert (
        isinstance(loaded, ClassToImagePipeline) and loaded.label_names == ["cow", "hen"] and loaded.captions == {0: ["a cow"]}
    )
    assert len(pipe(class_labels=1, prompt="a hen", num_images_per_prompt=2, num_inference_steps=1).images) == 2
    with pytest.raises(InputError, match="give class_labels"):
        pipe("a cow")
    with pytest.raises(InputError, match="got 1 prompts for 2 class_labels"):
        pipe("a cow", class_labels=[0, 1])
    assert pipe.to("cpu") is pipe and pipe.device.type == "cpu"
    with pytest.raises(InputError, match="this pipeline's plan runs it on cpu"):
        again.to("meta")
    with pytest.raises(InputError, match="its plan's"):
        again.to(torch.bfloat16)
    assert again.to("cpu") is again
    assert SamplingOptions().steps == 50


# -- transformers --------------------------------------------------------------------------------------------------------------


def test_the_image_processor(make_tokenizer: Make, tmp_path: Path) -> None:
    model = make_tokenizer()
    processor = TexTokImageProcessor.of(model)
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    values = processor.preprocess([wide, wide.convert("L")])["pixel_values"]
    assert values.shape == (2, 3, 16, 16) and values.min() >= -1 and values.max() <= 1
    square = wide.crop((10, 0, 50, 40))
    assert (processor(square)["pixel_values"][0] - values[0]).abs().mean() < 0.02  # but for what the filter sees at the edges
    small = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for to_range in ("signed", "bytes"):
        own = TexTokImageProcessor(16, to_range)
        given = own.preprocess(np.asarray(small), return_tensors="np")["pixel_values"]
        assert isinstance(given, np.ndarray)
        assert np.array_equal(np.asarray(own.post_process(torch.from_numpy(given))[0]), np.asarray(small))
    tokens = model.encode(processor.preprocess(small)["pixel_values"])
    assert torch.equal(tokens, model.encode([small]))
    pictures = processor.post_process(model.decode(tokens))
    assert pictures[0].size == (16, 16)
    processor.save_pretrained(tmp_path)
    assert TexTokImageProcessor.from_pretrained(tmp_path).size == {"height": 16, "width": 16}
    assert TexTokImageProcessor.of(model.save_pretrained(tmp_path / "model")).size == {"height": 16, "width": 16}
    (tmp_path / "note.png").write_text("no picture")
    for bad, message in (
        ([], "got no pictures"),
        (np.zeros((4, 4, 3)), "float64"),
        ([3], "a picture is a PIL image"),
        (3, "one or several, got int"),
        (None, "got NoneType"),
        (str(tmp_path / "nothing.png"), "cannot read .*nothing.png as a picture: .*No such file"),
        ([tmp_path / "note.png"], "cannot read .*note.png as a picture: cannot identify"),
    ):
        with pytest.raises(InputError, match=message):
            processor.preprocess(bad)
    for size in (0, -3, True, "big", 16.5, {"height": 16, "width": 8}, {"depth": 16}, {}):
        with pytest.raises(InputError, match="size must be S or"):
            TexTokImageProcessor(size)
    decoded = model.decode(tokens)
    for one in (decoded[0], decoded, decoded[0].numpy(), model.decode(tokens, output="uint8")[0]):  # without its batch, too
        (picture,) = processor.post_process(one)
        assert np.array_equal(np.asarray(picture), np.asarray(pictures[0]))
    for other in (torch.zeros(16, 16), torch.zeros(1, 4, 16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.int64), [1]):
        with pytest.raises(InputError, match=r"pictures are float \(B, 3, H, W\)|wanted a tensor or an array"):
            processor.post_process(other)
    with pytest.raises(InputError, match="wanted a tokenizer or its directory, got Linear"):
        TexTokImageProcessor.of(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("to_range", ["signed", "bytes"])
def test_the_image_processor_as_transformers_code_uses_one(to_range: str, tmp_path: Path) -> None:
    """AutoImageProcessor finds it; its attributes say what it does, so that others can do the same; options are not ignored."""
    from transformers import AutoImageProcessor

    TexTokImageProcessor(16, to_range).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, TexTokImageProcessor) and processor.to_range == to_range
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    values = processor(images=picture, return_tensors="pt", do_resize=True).pixel_values
    if to_range == "signed":
        by_hand = (torch.from_numpy(picture) * processor.rescale_factor - processor.image_mean[0]) / processor.image_std[0]
        torch.testing.assert_close(values[0], by_hand.permute(2, 0, 1).float())
    else:
        assert not processor.do_rescale and not processor.do_normalize and torch.equal(values[0], torch.from_numpy(picture))
    channels_first = torch.from_numpy(picture).permute(2, 0, 1)
    assert torch.equal(processor([channels_first, picture]).pixel_values, values.expand(2, -1, -1, -1))
    assert processor(picture, size={"height": 8, "width": 8}).pixel_values.numel() == 3 * 8 * 8
    for options, message in (
        ({"do_center_crop": False}, "do_center_crop = True, asked for False"),
        ({"image_mean": [0.4, 0.4, 0.4]}, "image_mean"),
        ({"size": {"height": 8, "width": 9}}, "size must be S"),
        ({"colour": 1}, "unknown options colour"),
        ({"data_format": "channels_last"}, "leave data_format out"),
    ):
        with pytest.raises(InputError, match=message):
            processor(picture, **options)


# -- tokenizers behind their peers' calls --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["titok", "continuous"])
@torch.no_grad()
def test_engines_and_processors_of_peers(make_tokenizer: Make, golden: Callable[[str], Any], kind: str, tmp_path: Path) -> None:
    """An engine of one has its calls and gives what it gives; the processor's pictures have the range that it takes."""
    if kind == "titok":
        peer: Any = interop.load("titok", golden("titok_vq")[0], heads=4)
    else:
        peer = interop.ContinuousTokenizer(make_tokenizer(text="none", latent_mean=(0.5,) * 4, latent_std=(2.0,) * 4))
    size = peer.tokenizer.config.image_size
    processor = TexTokImageProcessor.of(peer)
    assert processor.size == {"height": size, "width": size}
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))
    values = processor(picture, return_tensors="pt").pixel_values
    assert values.max() <= 1 and (0 if kind == "titok" else -1) <= values.min() < (0.1 if kind == "titok" else -0.9)
    assert np.array_equal(np.asarray(processor.post_process(values)[0]), np.asarray(picture))
    processor.save_pretrained(tmp_path)
    again = TexTokImageProcessor.from_pretrained(tmp_path)
    assert again.to_range == processor.to_range and torch.equal(again(picture)["pixel_values"], values)
    engine = Engine(peer, Plan())
    assert type(engine) is type(peer) and type(engine.tokenizer).__name__ == "TokenizerEngine"
    assert isinstance(peer.tokenizer, TexTok)  # which stays as it was
    assert TexTokImageProcessor.of(engine).to_range == processor.to_range
    z, wanted = peer.encode(values)[0], peer(values)[0]
    torch.testing.assert_close(engine.encode(values)[0], z, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(engine.decode(z), wanted, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(engine(values)[0], wanted, atol=5e-5, rtol=1e-4)
    with pytest.raises(InputError, match=f"this {type(peer).__name__} runs by an engine already"):
        Engine(engine, Plan())


# -- torch.hub and the Hub -----------------------------------------------------------------------------------------------------


def test_torch_hub(make_tokenizer: Make, tmp_path: Path, golden: Callable[[str], Any]) -> None:
    root = str(Path(__file__).resolve().parents[2])
    directory = make_tokenizer().save_pretrained(tmp_path / "tok")
    assert isinstance(torch.hub.load(root, "tokenizer", directory, source="local"), TexTok)
    assert isinstance(torch.hub.load(root, "foreign", "titok", golden("titok_vq")[0], source="local", heads=4), interop.TiTok)
    inner = by_class(make_tokenizer)
    inner.save_pretrained(tmp_path / "pipe")
    dit = torch.hub.load(root, "dit", tmp_path / "pipe", source="local", subfolder="generator", dtype=torch.bfloat16)
    assert isinstance(dit, DiT) and dit.pos_embed.dtype == torch.bfloat16
    pipe = torch.hub.load(root, "pipeline", tmp_path / "pipe", source="local", plan=Plan())
    pipe._engines[1].model._text_encoder = inner.tokenizer._text_encoder
    assert pipe(1, options=SamplingOptions(steps=1)).images.shape == (1, 16, 16, 3)


def test_the_card_and_the_upload(make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[str, Any]] = []
    kept: dict[str, str] = {}

    class Api:
        def create_repo(self, repository: str, **options: Any) -> None:
            calls.append((repository, options))

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> str:
            kept.update({path.name: path.read_text(errors="replace") for path in Path(folder_path).iterdir()})
            shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)
            return f"https://hub/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    model = make_tokenizer()
    about: dict[str, Any] = {
        "licence": "apache-2.0",
        "data": "Emoji (OFL).",
        "metrics": {"PSNR (dB)": 20.8},
        "limits": "Clip-art only.",
    }
    assert push_to_hub(model, "me/textok-mini", private=True, **about) == "https://hub/me/textok-mini"
    assert calls == [("me/textok-mini", {"private": True, "exist_ok": True})]
    assert set(kept) == {"README.md", "config.json", "model.safetensors"}
    card = kept["README.md"]
    for part in (
        'license: "apache-2.0"',
        "Emoji (OFL).",
        "| PSNR (dB) | 20.8 |",
        "Clip-art only.",
        'from_pretrained("me/textok-mini")',
    ):
        assert part in card
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card
    dit = DiT(DiTConfig(num_tokens=4, width=32, depth=1, heads=2))
    assert "over 4 tokens of 8 channels" in model_card(dit, name="me/dit", licence="mit", data="-")

    for around in (interop.TiTok(model), interop.ContinuousTokenizer(model)):
        push_to_hub(around, "me/around", **about)
        assert set(kept) == {"README.md", "config.json", "model.safetensors"}
        assert f'interop.load(None, "me/around")  # {type(around).__name__}' in kept["README.md"]
        assert isinstance(interop.load(None, tmp_path / "me/around"), type(around))
        assert TexTok.from_pretrained(tmp_path / "me/around").config == model.config
    noted = {"PSNR (dB)": 20.812345, "note": "held-out scenes"}
    assert "| PSNR (dB) | 20.8123 |\n| note | held-out scenes |" in model_card(
        model, name="me/x", licence="mit", data="-", metrics=noted
    )
    with pytest.raises(InputError, match="got TiTok; of an engine"):
        push_to_hub(interop.TiTok(Engine(model, Plan())), "me/around", **about)

    def refuse(self: Any, *args: Any, **options: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(Api, "create_repo", refuse)
    with pytest.raises(InputError, match="cannot push to me/textok-mini: no network"):
        push_to_hub(model, "me/textok-mini", **about)
