"""Our models under code that was written for diffusers' own, and held to it where it gives the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from textok_fast import DiT, DiTConfig, InputError, TexTok, interop
from textok_fast.diffusion import build_process
from textok_fast.inference import ClassToImagePipeline, Plan, SamplingOptions, TextToImagePipeline, load_pipeline
from textok_fast.modeling.text_encoders import TextFeatures

diffusers = pytest.importorskip("diffusers")
from textok_fast.interop.diffusers import (  # noqa: E402
    AutoencoderTexTok,
    TexTokPipeline,
    TexTokTransformer,
    TokenDistribution,
)

Make = Callable[..., TexTok]
CAPTIONS = ["a b", "c d e"]


def images(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, 16, 16) * 2 - 1


def autoencoder(make_tokenizer: Make, **sizes: Any) -> AutoencoderTexTok:
    return AutoencoderTexTok.from_textok(make_tokenizer(**sizes))


def pipeline(make_tokenizer: Make, by_class: bool = False, flow: bool = False, plan: Plan | None = None) -> TexTokPipeline:
    tokenizer = make_tokenizer()
    sizes: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "learn_sigma": not flow, "text_dim": 0 if by_class else 8}
    sizes |= {"num_classes": 5 if by_class else 0, "time_scale": 1000.0 if flow else 1.0}
    dit = DiT(DiTConfig(num_tokens=tokenizer.config.num_tokens, in_channels=tokenizer.config.latent_dim, **sizes))
    with torch.no_grad():  # adaLN-Zero would make conditions no matter
        for parameter in dit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    objective: Any = "flow" if flow else "gaussian"
    if by_class:
        inner: Any = ClassToImagePipeline(dit, tokenizer, objective, ["cow", "hen"], {0: ["a cow"]}, plan=plan)
    else:
        inner = TextToImagePipeline(dit, tokenizer, objective, plan=plan)
    pipe = TexTokPipeline.from_textok(inner)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- the autoencoder -----------------------------------------------------------------------------------------------------------


def test_the_distribution_is_diffusers() -> None:
    """(B, N, d) here is (B, d, N, 1) there."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments = [torch.randn(2, 2, 3, 4) for _ in range(2)]  # of two distributions, mean and logvar
    ours = [TokenDistribution(mean, logvar) for mean, logvar in moments]
    theirs = [DiagonalGaussianDistribution(torch.cat([*each], dim=-1).transpose(1, 2).unsqueeze(-1)) for each in moments]

    def back(x: torch.Tensor) -> torch.Tensor:
        return x.squeeze(-1).transpose(1, 2)

    for name in ("mean", "logvar", "std", "var"):
        torch.testing.assert_close(getattr(ours[0], name), back(getattr(theirs[0], name)))
    torch.testing.assert_close(ours[0].kl(), theirs[0].kl())
    torch.testing.assert_close(ours[0].kl(ours[1]), theirs[0].kl(theirs[1]))
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(ours[0].nll(x), theirs[0].nll(x.transpose(1, 2).unsqueeze(-1)))
    noise = torch.randn(2, 3, 4, generator=seeded())
    torch.testing.assert_close(ours[0].sample(seeded()), ours[0].mean + ours[0].std * noise)
    one, other = ours[0].sample([seeded(1), seeded(2)]), ours[0].sample([seeded(1), seeded(3)])
    assert torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])  # a generator for each, as in diffusers
    plain, reference = TokenDistribution(x, None), DiagonalGaussianDistribution(torch.zeros(2, 8, 3, 1), deterministic=True)
    assert torch.equal(plain.sample(), x) and torch.equal(plain.mode(), x) and plain.deterministic
    assert torch.equal(plain.kl(), reference.kl()) and torch.equal(plain.nll(x), reference.nll(torch.zeros(2, 4, 3, 1)))


def test_the_posterior_is_normalised_as_tokens_are(make_tokenizer: Make) -> None:
    model = make_tokenizer(bottleneck="kl")
    model.set_latent_statistics(torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([0.5, 2.0, 1.0, 3.0]))
    vae, x = AutoencoderTexTok.from_textok(model), images()
    found, wanted = vae.encode(x).latent_dist, model.encode(x)
    torch.testing.assert_close(found.mode(), wanted.mode())
    torch.testing.assert_close(found.sample(seeded(1)), wanted.sample(seeded(1)))
    # KL to N(0, 1) of an affine image by hand.
    raw = model.bottleneck(model.encoder(x, None))
    mean, var = (raw.mean - model.latent_mean) / model.latent_std, raw.logvar.exp() / model.latent_std.square()
    torch.testing.assert_close(found.kl(), 0.5 * (mean.square() + var - 1 - var.log()).sum((1, 2)))


def test_the_configuration_says_what_pipelines_read(make_tokenizer: Make) -> None:
    vae = autoencoder(make_tokenizer)
    config = vae.config
    assert (config.latent_channels, config.sample_size, config.force_upcast) == (4, 16, False)
    assert (config.scaling_factor, config.shift_factor) == (1.0, 0.0)
    assert 2 ** (len(config.block_out_channels) - 1) == 8  # the patch size, as a vae_scale_factor
    assert set(config) & set(diffusers.AutoencoderKL().config) >= {"in_channels", "out_channels", "block_out_channels"}
    assert vae.encoder is vae.tokenizer.encoder and vae.decoder is vae.tokenizer.decoder


@pytest.mark.parametrize("bottleneck", ["none", "kl", "fsq"])
def test_slicing_is_one_picture_at_a_time(make_tokenizer: Make, bottleneck: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, x = autoencoder(make_tokenizer, bottleneck=bottleneck), images(3)
    captions = [*CAPTIONS, ""]
    wanted = vae.encode(x, captions).latent_dist.mode()
    pixels = vae.decode(wanted, captions).sample
    sizes: list[int] = []
    for network in (vae.encoder, vae.decoder):
        monkeypatch.setattr(network, "forward", lambda x, text, run=network.forward: (sizes.append(len(x)), run(x, text))[1])
    vae.enable_tiling()  # which changes nothing: a picture is one tile
    vae.enable_slicing()
    torch.testing.assert_close(vae.encode(x, captions).latent_dist.mode(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae.decode(wanted, captions).sample, pixels, atol=1e-5, rtol=1e-5)
    assert sizes == [1] * 6
    vae.disable_slicing()
    vae.disable_tiling()
    vae.decode(wanted)
    assert sizes[6:] == [3]


def test_losses_reach_pictures_outside_the_range(make_tokenizer: Make) -> None:
    """AutoencoderKL does not clamp, and neither is a gradient lost here."""
    vae = autoencoder(make_tokenizer, bottleneck="kl")
    with torch.no_grad():
        vae.decoder.to_pixels.bias.fill_(3.0)
    x = images().requires_grad_()
    posterior = vae.encode(x).latent_dist
    (vae.decode(posterior.sample()).sample.square().mean() + 1e-3 * posterior.kl().mean()).backward()
    assert vae.decoder.to_pixels.bias.grad.abs().min() > 0
    assert x.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(make_tokenizer: Make, dtype: torch.dtype) -> None:
    vae, x = autoencoder(make_tokenizer, bottleneck="kl"), images()
    wanted = vae.encode(x, CAPTIONS).latent_dist.mode()
    pixels = vae.decode(wanted, CAPTIONS).sample
    half = vae.half() if dtype == torch.float16 else vae.to(dtype)
    assert half is vae and vae.dtype == dtype
    posterior = vae.encode(x.to(dtype), CAPTIONS).latent_dist
    assert posterior.sample(seeded()).dtype == posterior.kl().dtype == dtype
    again = vae.decode(wanted.to(dtype), CAPTIONS).sample
    assert again.dtype == dtype and (again.float() - pixels).abs().mean() < 0.02 and pixels.abs().mean() > 0.1


def test_one_format_for_both_classes(make_tokenizer: Make, tmp_path: Path) -> None:
    """What either wrote the other reads, and so does ``interop.load``."""
    vae = autoencoder(make_tokenizer, bottleneck="kl")
    z = vae.encode(images()).latent_dist.mode()
    vae.save_pretrained(tmp_path / "all" / "vae", safe_serialization=True, max_shard_size="5GB")
    for read in (
        TexTok.from_pretrained(tmp_path / "all", subfolder="vae"),
        interop.load(None, tmp_path / "all" / "vae"),
        AutoencoderTexTok.from_pretrained(tmp_path / "all", subfolder="vae", low_cpu_mem_usage=True, device_map=None).tokenizer,
    ):
        assert isinstance(read, TexTok) and read.config == vae.tokenizer.config
        assert torch.equal(read.decoder(z, None), vae.decode(z).sample)
    half = AutoencoderTexTok.from_pretrained(tmp_path / "all" / "vae", torch_dtype=torch.float16, device_map="cpu")
    assert half.dtype == torch.float16 and half.config.latent_channels == 4
    for options, message in (
        ({"variant": "fp16"}, "no variants such as 'fp16'"),
        ({"colour": 1}, "unknown options colour"),
        ({"device_map": {"encoder": "cpu", "decoder": "cuda"}}, "run on one device"),
        ({"device_map": "auto"}, "run on one device.*got 'auto'"),
        ({"torch_dtype": "auto"}, "is one torch.dtype, got 'auto'"),
        ({"subfolder": "unet"}, "unet has no config.json"),
    ):
        with pytest.raises(InputError, match=message):
            AutoencoderTexTok.from_pretrained(tmp_path / "all", **options)
    with pytest.raises(InputError, match="saved as one model.safetensors"):
        vae.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(InputError, match="goes around a TexTok, got DiT"):
        AutoencoderTexTok.from_textok(DiT(DiTConfig(num_tokens=3, width=32, depth=1, heads=2)))


@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_configs_make_models_and_averages(make_tokenizer: Make, tmp_path: Path, part: str) -> None:
    """``from_config`` of a config and of a saved one, and diffusers' EMAModel, which goes through both."""
    from diffusers.training_utils import EMAModel

    model: Any = getattr(pipeline(make_tokenizer), part)
    model.save_pretrained(tmp_path / "saved")
    for config in (model.config, model.load_config(tmp_path / "saved"), tmp_path / "saved"):
        made, unused = type(model).from_config(config, return_unused_kwargs=True)
        assert made.config.textok == model.config.textok and unused == {}
        assert {name: value.shape for name, value in made.state_dict().items()} == {
            name: value.shape for name, value in model.state_dict().items()
        }
    average = EMAModel(model.parameters(), decay=0.5, use_ema_warmup=True, model_cls=type(model), model_config=model.config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    average.step(model.parameters())
    average.step(model.parameters())
    average.save_pretrained(tmp_path / "ema")
    again = EMAModel.from_pretrained(tmp_path / "ema", type(model))
    assert (again.optimization_step, again.decay, again.use_ema_warmup) == (2, 0.5, True)
    for one, other in zip(again.shadow_params, average.shadow_params, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(InputError, match="wanted the config of a"):
        type(model).from_config({"model_type": "another", "width": 8})


class Hub:
    """The Hub's downloads, from a folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, []

    def snapshot_download(self, name: str, allow_patterns: list[str], **options: Any) -> str:
        self.calls.append((name, options))
        files = [file for pattern in allow_patterns for file in (self.root / name).glob(pattern)]
        assert files, f"nothing in {name} is like {allow_patterns}"
        return str(self.root / name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.snapshot_download", made.snapshot_download)
    return made


def test_ids_of_the_hub(make_tokenizer: Make, hub: Hub, loads_fake_text: Any) -> None:
    model = make_tokenizer()
    model.save_pretrained(hub.root / "me" / "tok")
    vae = AutoencoderTexTok.from_pretrained("me/tok", revision="v1", token="secret", torch_dtype=torch.bfloat16)
    assert hub.calls == [("me/tok", {"revision": "v1", "token": "secret"})] and vae.dtype == torch.bfloat16
    loaded = interop.load(None, "me/tok")
    assert isinstance(loaded, TexTok) and torch.equal(loaded.decoder.queries, model.decoder.queries)
    pipe = pipeline(make_tokenizer)
    pipe.save_pretrained(hub.root / "me" / "pipe")
    again = TexTokPipeline.from_pretrained("me/pipe", local_files_only=True)
    assert hub.calls[-1] == ("me/pipe", {"local_files_only": True})
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    assert torch.equal(again("a b", generator=seeded(), **options).images, pipe("a b", generator=seeded(), **options).images)
    assert AutoencoderTexTok.from_pretrained("me/pipe", subfolder="vae").config.latent_channels == 4


def test_the_cards_of_wrapped_models(make_tokenizer: Make) -> None:
    about = {"name": "me/x", "licence": "mit", "data": "-"}
    assert "TexTok image tokenizer" in interop.model_card(autoencoder(make_tokenizer), **about)
    assert "A diffusion transformer" in interop.model_card(pipeline(make_tokenizer).transformer, **about)
    for other in (3, pipeline(make_tokenizer).pipeline):  # the latter has a tokenizer, which alone is not it
        with pytest.raises(InputError, match=f"got {type(other).__name__}"):
            interop.model_card(other, **about)


def test_pushing_as_diffusers_does(make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, set[str]] = {}

    def upload(folder: str, repository: str, **options: Any) -> str:
        kept[repository] = {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}
        return repository

    class Card:
        def save(self, path: str) -> None:
            Path(path).write_text("card")

    monkeypatch.setattr("diffusers.utils.hub_utils.create_repo", lambda name, **options: type("Repo", (), {"repo_id": name}))
    monkeypatch.setattr("diffusers.utils.hub_utils.load_or_create_model_card", lambda *args, **options: Card())
    monkeypatch.setattr("diffusers.utils.hub_utils.populate_model_card", lambda card: card)
    pipe = pipeline(make_tokenizer)
    for each in (pipe, pipe.vae):
        monkeypatch.setattr(each, "_upload_folder", upload, raising=True)
    pipe.vae.push_to_hub("me/vae")
    assert kept["me/vae"] == {"README.md", "config.json", "model.safetensors"}
    pipe.push_to_hub("me/pipe")
    models = {f"{part}/{file}" for part in ("vae", "transformer") for file in ("config.json", "model.safetensors")}
    others = {"README.md", "model_index.json", "pipeline.json", "pipeline.py", "scheduler/scheduler_config.json"}
    assert kept["me/pipe"] == models | others


# -- the transformer -----------------------------------------------------------------------------------------------------------


def test_the_transformer_under_a_loop_of_ones_own(make_tokenizer: Make) -> None:
    """The denoising loop of DiTPipeline over the pipeline's parts, DDIM by diffusers' scheduler, is the pipeline's ddim."""
    pipe = pipeline(make_tokenizer, by_class=True)
    scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    labels, null = torch.tensor([1, 4]), torch.full((2,), pipe.transformer.config.num_embeds_ada_norm)
    noise = torch.randn(2, 3, pipe.transformer.config.in_channels)
    x = noise
    scheduler.set_timesteps(5)
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = pipe.transformer(torch.cat([x, x]), timestep=t, class_labels=torch.cat([labels, null])).sample
            conditional, unconditional = out[..., : x.shape[-1]].chunk(2)
            guided = unconditional + 3.0 * (conditional - unconditional)
            x = scheduler.step(guided, t, x).prev_sample
    options: Any = SamplingOptions("ddim", steps="ddim5", guidance_scale=3.0)  # type: ignore[arg-type]
    assert scheduler.timesteps.tolist() == [800, 600, 400, 200, 0]
    torch.testing.assert_close(pipe.pipeline(labels.tolist(), noise=noise, options=options).tokens, x, atol=1e-4, rtol=1e-4)


def test_the_transformers_conditions(make_tokenizer: Make, tmp_path: Path) -> None:
    pipe = pipeline(make_tokenizer, flow=True)
    x, features = torch.randn(2, 3, 4), torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    out = pipe.transformer(x, 0.5, encoder_hidden_states=features, encoder_attention_mask=mask, return_dict=False)[0]
    torch.testing.assert_close(out, pipe.transformer.dit(x, torch.full((2,), 0.5), text=TextFeatures(features, mask.bool())))
    pipe.transformer.save_pretrained(tmp_path)
    again = TexTokTransformer.from_pretrained(tmp_path)
    assert again.config.num_layers == 2 and torch.equal(again(x, torch.tensor(0.5)).sample, pipe.transformer(x, 0.5).sample)
    assert isinstance(interop.load(None, tmp_path), DiT)
    with pytest.raises(InputError, match="has no classes"):
        pipe.transformer(x, 0.5, class_labels=torch.tensor([1, 2]))


# -- the pipeline --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_class", [False, True])
def test_components_make_another_pipeline(make_tokenizer: Make, by_class: bool) -> None:
    pipe = pipeline(make_tokenizer, by_class=by_class, flow=True)
    assert set(pipe.components) == {"transformer", "vae", "scheduler"}
    again = TexTokPipeline(**pipe.components, **pipe.parameters)
    assert again.pipeline.objective == "flow" and again.labels == ({"cow": 0, "hen": 1} if by_class else {})
    if by_class:
        assert again.get_label_ids(["hen", "cow"]) == [1, 0] and again.pipeline.captions == {0: ["a cow"]}
    given: dict[str, Any] = {"class_labels": [1, 0]} if by_class else {"prompt": CAPTIONS}
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    one, other = (each(**given, generator=seeded(), **options).images for each in (pipe, again))
    assert torch.equal(one, other)
    if by_class:  # where DiTPipeline has its labels
        assert torch.equal(pipe([1, 0], generator=seeded(), **options).images, one)
        with pytest.raises(InputError, match="no class 'dog'"):
            pipe.get_label_ids("dog")


@pytest.mark.parametrize("by_class", [False, True])
def test_diffusers_own_from_pretrained(make_tokenizer: Make, tmp_path: Path, by_class: bool, loads_fake_text: Any) -> None:
    """The directory is one of diffusers' with a module of its own, one of ours, and the command's."""
    pipe = pipeline(make_tokenizer, by_class=by_class, flow=not by_class)
    pipe.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "model_index.json",
        "transformer",
        "vae",
        "scheduler",
        "pipeline.json",
    }
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    ours, own = TexTokPipeline.from_pretrained(tmp_path), load_pipeline(tmp_path)
    assert type(theirs) is TexTokPipeline and type(own) is type(pipe.pipeline)
    given: dict[str, Any] = {"class_labels": [1, "cow"]} if by_class else {"prompt": CAPTIONS}
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 2.0}
    wanted = pipe(**given, generator=seeded(), **options).images
    for each in (theirs, ours, TexTokPipeline.from_textok(own)):
        assert each.pipeline.objective == pipe.pipeline.objective and each.labels == pipe.labels
        assert torch.equal(each(**given, generator=seeded(), **options).images, wanted)
    half = diffusers.DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True, torch_dtype=torch.bfloat16)
    assert half.dtype == half.vae.dtype == half.transformer.dtype == torch.bfloat16


def test_precision_and_device(make_tokenizer: Make, tmp_path: Path, loads_fake_text: Any) -> None:
    pipeline(make_tokenizer).save_pretrained(tmp_path)
    pipe = TexTokPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, device="cpu")
    assert pipe.dtype == torch.bfloat16 and len(pipe(CAPTIONS, num_inference_steps=2).images) == 2
    assert pipe.to("cpu", torch.float32).dtype == torch.float32 and pipe.device.type == "cpu"
    assert pipe.to(torch_device="cpu", dtype=torch.float16).vae.dtype == torch.float16
    with pytest.raises(InputError, match="leave torch_dtype out"):
        TexTokPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, plan=Plan())
    with pytest.raises(InputError, match="not offloaded"):
        pipe.enable_model_cpu_offload()
    vae = AutoencoderTexTok.from_pretrained(tmp_path, subfolder="vae")
    assert TexTokPipeline.from_pretrained(tmp_path, vae=vae).pipeline.tokenizer is vae.tokenizer


@pytest.mark.parametrize("plan", [None, Plan()])
def test_parts_can_be_replaced(make_tokenizer: Make, plan: Plan | None) -> None:
    pipe = pipeline(make_tokenizer, plan=plan)
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}
    before = pipe("a b", generator=seeded(), **options).images
    vae = autoencoder(make_tokenizer, seed=5)
    pipe.vae = vae
    assert pipe.components["vae"] is vae and pipe.pipeline.plan == plan
    assert abs(pipe("a b", generator=seeded(), **options).images - before).max() > 0.01
    with pytest.raises(InputError, match="wanted a TexTokTransformer, got Linear"):
        pipe.transformer = torch.nn.Linear(2, 2)


def test_schedulers_pick_the_sampler(make_tokenizer: Make) -> None:
    pipe = pipeline(make_tokenizer, by_class=True)
    options: dict[str, Any] = {"class_labels": 1, "num_inference_steps": 4, "output_type": "latent"}
    for name, sampler in (
        ("DDPMScheduler", "ddpm"),
        ("DDIMScheduler", "ddim"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("UniPCMultistepScheduler", "unipc"),
    ):
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        found = pipe(generator=seeded(), **options).images
        assert torch.equal(found, pipe(generator=seeded(), sampler=sampler, **options).images)
        assert torch.equal(found, pipe(generator=seeded(), sampler="ddpm", **options).images) is (sampler == "ddpm")
    for scheduler, message in (
        (diffusers.FlowMatchEulerDiscreteScheduler(), "trained as gaussian epsilon linear, the scheduler is for flow"),
        (diffusers.DDPMScheduler(prediction_type="v_prediction", clip_sample=False), "the scheduler is for gaussian v linear"),
        (diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False), "from 0.00085 to 0.012"),
        (diffusers.EulerDiscreteScheduler(), "no sampler here is EulerDiscreteScheduler's"),
    ):
        with pytest.raises(InputError, match=message):
            pipe.scheduler = scheduler
    assert type(pipe.scheduler).__name__ == "UniPCMultistepScheduler"


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        *(("DDIMScheduler", option, True) for option in ("rescale_betas_zero_snr", "thresholding", "clip_sample")),
        ("DDIMScheduler", "trained_betas", [0.1] * 1000),
        ("DDIMScheduler", "set_alpha_to_one", False),
        ("DDIMScheduler", "num_train_timesteps", 500),
        ("DPMSolverMultistepScheduler", "solver_order", 3),
        ("DPMSolverMultistepScheduler", "algorithm_type", "sde-dpmsolver++"),
        ("DPMSolverMultistepScheduler", "solver_type", "heun"),
        *(("DPMSolverMultistepScheduler", f"use_{sigmas}", True) for sigmas in ("karras_sigmas", "lu_lambdas", "beta_sigmas")),
        ("UniPCMultistepScheduler", "solver_order", 3),
        ("UniPCMultistepScheduler", "solver_type", "bh1"),
        ("UniPCMultistepScheduler", "disable_corrector", [0]),
        ("UniPCMultistepScheduler", "predict_x0", False),
        ("UniPCMultistepScheduler", "use_flow_sigmas", True),
        ("UniPCMultistepScheduler", "prediction_type", "flow_prediction"),
        ("FlowMatchEulerDiscreteScheduler", "shift", 3.0),
        ("FlowMatchEulerDiscreteScheduler", "stochastic_sampling", True),
        ("FlowMatchHeunDiscreteScheduler", "shift", 3.0),
    ],
)
def test_schedulers_that_no_sampler_here_is(make_tokenizer: Make, name: str, option: str, value: Any) -> None:
    """What would be ignored is refused, where a pipeline is made and where its scheduler is replaced; spacing is not that."""
    pipe = pipeline(make_tokenizer, flow=name.startswith("Flow"))
    cls, old = getattr(diffusers, name), pipe.scheduler.config
    spaced = {} if name.startswith("Flow") else {"timestep_spacing": "trailing", "steps_offset": 1}
    pipe.scheduler = usual = cls.from_config(old, **spaced)
    scheduler = cls.from_config(usual.config, **{option: value})
    for given in (lambda: setattr(pipe, "scheduler", scheduler), lambda: TexTokPipeline(pipe.transformer, pipe.vae, scheduler)):
        with pytest.raises(InputError, match="is a flow's" if value == "flow_prediction" else option):
            given()
    assert pipe.scheduler is usual


def test_the_variance_of_ddpm(make_tokenizer: Make) -> None:
    """A learned one is what a loop of diffusers' leaves out; without, the sampler here has the larger one."""
    learned = pipeline(make_tokenizer)
    inner = learned.pipeline
    dit = DiT(dataclasses.replace(inner.generator.config, learn_sigma=False))
    plain = TexTokPipeline.from_textok(TextToImagePipeline(dit, inner.tokenizer))
    for pipe, known, other in ((learned, "learned_range", "fixed_large"), (plain, "fixed_large", "fixed_small")):
        config = pipe.scheduler.config
        pipe.scheduler = diffusers.DDPMScheduler.from_config(config, variance_type=known)
        with pytest.raises(InputError, match=f"has variance_type '{known}', got '{other}'"):
            pipe.scheduler = diffusers.DDPMScheduler.from_config(config, variance_type=other)


def test_clipping_is_left_to_pixels(make_tokenizer: Make) -> None:
    """diffusers' own default clamps data to [-1, 1], which latents are not within: that is said, not left out."""
    pipe = pipeline(make_tokenizer)
    with pytest.raises(InputError, match=r"DDIMScheduler.from_config\(pipe.scheduler.config\)"):
        pipe.scheduler = diffusers.DDIMScheduler()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    assert not pipe.scheduler.config.clip_sample


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_schedulers_noise_is_the_models(make_tokenizer: Make, schedule: str) -> None:
    inner = pipeline(make_tokenizer).pipeline
    pipe = TexTokPipeline.from_textok(TextToImagePipeline(inner.generator, inner.tokenizer, schedule=schedule, prediction="v"))
    assert (pipe.pipeline.schedule, pipe.scheduler.config.prediction_type) == (schedule, "v_prediction")
    assert TexTokPipeline(**pipe.components).pipeline.schedule == schedule
    x, noise, t = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([10, 900])
    process: Any = build_process("gaussian", True, schedule=schedule)
    torch.testing.assert_close(pipe.scheduler.add_noise(x, noise, t), process.add_noise(x, noise, t), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        pipe.scheduler.get_velocity(x, noise, t),
        build_process("gaussian", True, "v", schedule).target(x, noise, t),
        atol=1e-5,
        rtol=1e-4,
    )
    flow = pipeline(make_tokenizer, flow=True)
    assert isinstance(flow.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)


@pytest.mark.parametrize("plan", [None, Plan()])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m", "unipc"])
def test_callbacks_see_and_change_latents(make_tokenizer: Make, plan: Plan | None, sampler: str) -> None:
    pipe = pipeline(make_tokenizer, plan=plan)
    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 2.0, "sampler": sampler, "output_type": "latent"}
    wanted = pipe(CAPTIONS, generator=seeded(), **options).images
    seen: list[tuple[int, int, torch.Tensor]] = []

    def look(given: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        assert given is pipe
        seen.append((step, int(t), values["latents"]))
        return values

    found = pipe(CAPTIONS, generator=seeded(), callback_on_step_end=look, **options).images
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
    assert [step for step, *_ in seen] == [0, 1, 2, 3] and seen[0][1] == 999 and seen[-1][1] >= 0
    assert [t for _, t, _ in seen] == sorted((t for _, t, _ in seen), reverse=True)
    torch.testing.assert_close(seen[-1][2], found)
    assert not torch.equal(seen[0][2], seen[1][2])

    def change(given: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"] + 1.0} if step == 3 else {}

    moved = pipe(CAPTIONS, generator=seeded(), callback_on_step_end=change, **options).images
    torch.testing.assert_close(moved, found + 1.0)

    def early(given: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": torch.zeros_like(values["latents"])} if step == 1 else {}

    assert (pipe(CAPTIONS, generator=seeded(), callback_on_step_end=early, **options).images - found).abs().max() > 1e-3

    def stop(given: Any, step: int, t: Any, values: dict[str, Any]) -> None:
        given._interrupt = step == 1

    halfway = pipe(CAPTIONS, generator=seeded(), callback_on_step_end=stop, **options).images
    torch.testing.assert_close(halfway, seen[1][2], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(pipe(CAPTIONS, generator=seeded(), **options).images, wanted)  # what stopped left nothing behind
    blind: list[dict[str, Any]] = []
    pipe(
        "a b",
        callback_on_step_end=lambda p, i, t, values: blind.append(values),
        callback_on_step_end_tensor_inputs=[],
        **options,
    )
    assert blind == [{}] * 4
    with pytest.raises(InputError, match="what on_step returned has shape" if plan is None else "latents must be"):
        pipe("a b", callback_on_step_end=lambda *a: {"latents": torch.zeros(1)}, **options)
    with pytest.raises(InputError, match="shown latents, not prompt_embeds"):
        pipe("a b", callback_on_step_end=look, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"], **options)


@pytest.mark.parametrize("plan", [None, Plan()])
@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_callbacks_of_a_flow(make_tokenizer: Make, plan: Plan | None, sampler: str) -> None:
    pipe = pipeline(make_tokenizer, flow=True, plan=plan)
    options: dict[str, Any] = {"num_inference_steps": 4, "sampler": sampler, "output_type": "latent"}
    wanted = pipe("a b", generator=seeded(), **options).images
    times: list[float] = []
    found = pipe("a b", generator=seeded(), callback_on_step_end=lambda p, i, t, v: times.append(float(t)), **options).images
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
    if sampler == "euler":
        assert times == pytest.approx([1000.0, 750.0, 500.0, 250.0])
    assert len(times) == (7 if sampler == "heun" else 4)


def test_callbacks_of_a_batch_in_parts(make_tokenizer: Make) -> None:
    """Latents are never all there when memory splits a batch: an error, where part of them would be a surprise."""
    pipe = pipeline(make_tokenizer, plan=Plan())
    engine = pipe.pipeline._engines[0]
    need = engine.memory(1, 2).total
    split = pipeline(make_tokenizer, plan=Plan(split=True, memory_limit=need + need // 4))
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 2.0}
    prompts = ["a b"] * 64
    run = split.pipeline._engines[0].start(split.pipeline.process, seeds=range(64), steps=2, guidance_scale=2.0)
    assert run.total > 2, "the batch was to run in parts"
    with pytest.raises(InputError, match="use a smaller batch"):
        split(prompts, callback_on_step_end=lambda *a: None, **options)


@pytest.mark.parametrize("plan", [None, Plan()])
def test_a_callback_that_guides_by_gradients(make_tokenizer: Make, plan: Plan | None) -> None:
    """Latents that hang on a graph are taken as numbers, under the caller's inference mode too."""
    pipe = pipeline(make_tokenizer, plan=plan)

    def pull(given: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode(False), torch.enable_grad():
            x = values["latents"].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(x.square().sum() / 2, x)
            return {"latents": x - gradient * (step == 2)}

    options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "callback_on_step_end": pull}
    for mode in (False, True):
        with torch.inference_mode(mode):
            found = pipe("a b", **options).images
        assert not found.any() and not found.requires_grad


@pytest.mark.parametrize("plan", [None, Plan()])
def test_latents_as_input(make_tokenizer: Make, plan: Plan | None) -> None:
    pipe = pipeline(make_tokenizer, flow=True, plan=plan)
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    noise = torch.randn(2, 3, 4)
    one = pipe(CAPTIONS, latents=noise, **options).images
    assert torch.equal(one, pipe(CAPTIONS, latents=noise, generator=seeded(3), **options).images)
    assert not torch.equal(one, pipe(CAPTIONS, latents=noise + 1, **options).images)
    with pytest.raises(InputError, match="noise must be"):
        pipe("a b", latents=noise, **options)


@pytest.mark.parametrize("plan", [None, Plan()])
def test_negative_prompts(make_tokenizer: Make, plan: Plan | None) -> None:
    """u of u + s (c - u) is the model under the negative prompt, whichever of the two captions is longer."""
    pipe = pipeline(make_tokenizer, flow=True, plan=plan)
    noise = torch.randn(2, 3, 4)
    options: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 3.0, "latents": noise, "output_type": "latent"}
    for negative in ("x", "x y z w v"):
        found = pipe(CAPTIONS, negative_prompt=negative, **options).images
        dit, tokenizer = pipe.transformer.dit, pipe.vae.tokenizer
        with torch.no_grad():
            c, u = (dit(noise, torch.ones(2), text=tokenizer.text_features(texts, 2)) for texts in (CAPTIONS, [negative] * 2))
        torch.testing.assert_close(found, noise - (u + 3.0 * (c - u)), atol=2e-5, rtol=2e-5)
        assert torch.equal(found, pipe(CAPTIONS, negative_prompt=[negative] * 2, **options).images)
    plain = pipe(CAPTIONS, **options).images
    torch.testing.assert_close(pipe(CAPTIONS, negative_prompt="", **options).images, plain)
    several = pipe(
        CAPTIONS, negative_prompt=["x", "y"], num_images_per_prompt=2, **{**options, "latents": noise.repeat(2, 1, 1)}
    )
    assert several.images.shape == (4, 3, 4)
    options["guidance_scale"] = 1.0
    assert torch.equal(pipe(CAPTIONS, negative_prompt="x", **options).images, pipe(CAPTIONS, **options).images)
    with pytest.raises(InputError, match="got 3 negative prompts for 2"):
        pipe(CAPTIONS, negative_prompt=["x"] * 3, **options)
    with pytest.raises(InputError, match="reads no text"):
        pipeline(make_tokenizer, by_class=True)(class_labels=1, negative_prompt="x")


def test_calls_as_people_write_them(make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(make_tokenizer)
    assert pipe("a b", 16, 16, num_inference_steps=1).images[0].size == (16, 16)
    with pytest.raises(InputError, match="pictures are 16 x 16, asked for 512 x 16"):
        pipe("a b", height=512)
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    for scale in (0.0, 0.7):  # no guidance, as in diffusers
        off = pipe("a b", guidance_scale=scale, generator=seeded(), **options).images
        assert torch.equal(off, pipe("a b", generator=seeded(), **options).images)
    sizes: list[int] = []
    decode = pipe.vae.tokenizer.decode
    monkeypatch.setattr(
        pipe.vae.tokenizer, "decode", lambda tokens, *a, **kw: (sizes.append(len(tokens)), decode(tokens, *a, **kw))[1]
    )
    pipe.enable_vae_slicing()
    pipe(CAPTIONS, num_inference_steps=1)
    pipe.disable_vae_slicing()
    pipe(CAPTIONS, num_inference_steps=1)
    assert sizes == [1, 1, 2]


@torch.no_grad()
def test_where_a_dit_pipeline_is_called(tmp_path: Path) -> None:
    """The arguments by position, the default guidance, the names of classes and the pictures are DiTPipeline's."""
    sizes: dict[str, Any] = {"input_size": 4, "patch_size": 2, "in_channels": 4, "width": 32, "depth": 2, "heads": 2}
    dit = DiT(DiTConfig(**sizes, frequency_shift=1, mlp_norm_eps=1e-5)).eval()
    for parameter in dit.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=8, **blocks
    ).eval()
    names = {0: "tench, Tinca tinca", 1: "hen", 2: "crane", 3: "crane"}
    scheduler = diffusers.DPMSolverMultistepScheduler()
    theirs = diffusers.DiTPipeline(interop.to_diffusers_dit(dit), vae, scheduler, id2label=names)
    ours = TexTokPipeline(TexTokTransformer.from_textok(dit), vae, scheduler, label_names=[*names.values()])
    for each in (theirs, ours):
        each.set_progress_bar_config(disable=True)
    assert ours.labels == theirs.labels and list(ours.labels) == list(theirs.labels)
    words = ["hen", "Tinca tinca", "crane"]
    labels = theirs.get_label_ids(words)
    assert ours.get_label_ids(words) == labels == [1, 0, 3]
    noise = torch.randn(3, 4, 4, 4, generator=seeded())  # what DiTPipeline draws
    for arguments in ((), (1.5,), (6.0, seeded(), 10, "np", False)):
        named: dict[str, Any] = {} if len(arguments) > 1 else {"num_inference_steps": 10, "output_type": "np"}
        wanted = theirs(labels, *arguments, **({} if len(arguments) > 1 else {"generator": seeded()}), **named)
        found = ours(labels, *arguments, latents=noise, **named)
        one, other = (given[0] if isinstance(given, tuple) else given.images for given in (found, wanted))
        assert isinstance(found, tuple) is isinstance(wanted, tuple)
        assert abs(one - other).max() < 0.51 / 255 + 1e-3 and other.std() > 0.01
    assert ours.guidance_scale == 6.0
    for bad, named in (((4.0,), {"guidance_scale": 3.0}), ((4.0, None, 2, "np", True, 1), {})):
        with pytest.raises(InputError, match="by position go guidance_scale, generator"):
            ours(labels, *bad, **named)
    with pytest.raises(InputError, match="no class 'dog'"):
        ours.get_label_ids(["hen", "dog"])


def test_callback_classes_of_diffusers(make_tokenizer: Make) -> None:
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

    class Count(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012
        steps = 0

        def callback_fn(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
            Count.steps += len(callback_kwargs["latents"])
            return callback_kwargs

    pipe = pipeline(make_tokenizer)
    callback = MultiPipelineCallbacks([Count(cutoff_step_ratio=1.0)])
    pipe(CAPTIONS, num_inference_steps=3, callback_on_step_end=callback)
    assert Count.steps == 6
