"""A TexTok where diffusers' code expects an AutoencoderKL, and generation behind diffusers' calls. Needs diffusers.

Latents are tokens, (B, N, d) rather than (B, C, h, w): what noise schedulers and losses do with them does not depend on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

try:
    from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.models.autoencoders.vae import DecoderOutput
    from diffusers.models.modeling_outputs import AutoencoderKLOutput
except ImportError as error:
    raise ImportError(f"textok_fast.interop.diffusers needs diffusers ({error}): pip install 'textok-fast[bench]'") from None

from textok_fast.config import TexTokConfig, from_mapping, to_dict
from textok_fast.errors import InputError
from textok_fast.modeling.saving import CONFIG_NAME, read_config
from textok_fast.modeling.tokenizer import Captions, TexTok


class TokenDistribution:
    """What ``encode`` gives: a Gaussian for a KL bottleneck, else the tokens themselves, with diffusers' calls.

    ``mean``, ``std`` and ``logvar``: (B, N, d), normalised as tokens are.
    """

    def __init__(self, mean: Tensor, std: Tensor | None) -> None:
        self.mean = mean
        self.std = torch.zeros_like(mean) if std is None else std

    @property
    def logvar(self) -> Tensor:
        return 2 * self.std.log().clamp(min=-30.0)

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """(B, N, d); noise is drawn where the generator is, else where the tokens are."""
        place = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=place, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)


class AutoencoderTexTok(ModelMixin, ConfigMixin):
    """:class:`TexTok` with the calls of diffusers' AutoencoderKL.

    ``encode(x).latent_dist.sample()`` and ``.mode()``, ``decode(z).sample``, ``.config.scaling_factor`` (1: tokens have unit
    variance already), ``from_pretrained``, ``save_pretrained``, ``.to``, ``.dtype``. Both calls also take captions, and both
    have gradients. :meth:`from_pretrained` reads directories of TexTok itself too.

    Args:
        textok: a :class:`TexTokConfig` as a dict.
    """

    config_name = CONFIG_NAME

    @register_to_config
    def __init__(self, textok: dict[str, Any], scaling_factor: float = 1.0) -> None:
        super().__init__()
        self.tokenizer = TexTok(from_mapping(TexTokConfig, textok))

    @classmethod
    def from_textok(cls, tokenizer: TexTok) -> AutoencoderTexTok:
        """Around ``tokenizer`` itself: they share their weights, and its text encoder if it has one loaded."""
        with torch.device("meta"):
            made = cls(to_dict(tokenizer.config))
        made.tokenizer = tokenizer
        return cast(AutoencoderTexTok, made.train(tokenizer.training))

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> AutoencoderTexTok:
        """What :meth:`save_pretrained` or :meth:`TexTok.save_pretrained` wrote, or a Hub id; options as in diffusers."""
        path = Path(source)
        if path.is_dir() and read_config(path).get("model_type") == TexTok.model_type:
            made = cls.from_textok(TexTok.from_pretrained(path))
            dtype = options.get("torch_dtype")
            return made if dtype is None else cast(AutoencoderTexTok, made.to(dtype))
        return cast(AutoencoderTexTok, super().from_pretrained(source, **options))

    def encode(self, x: Tensor, captions: Captions = None, return_dict: bool = True) -> Any:
        """x (B, 3, S, S) in [-1, 1] and captions as :meth:`TexTok.encode` takes them -> ``.latent_dist``, a
        :class:`TokenDistribution`."""
        tokenizer = self.tokenizer
        pixels = tokenizer._check_images(x)
        text = tokenizer.text_features(captions, len(pixels)) if tokenizer.config.text_in_encoder else None
        out = tokenizer.bottleneck(tokenizer.encoder(pixels, text))
        mean, std = out.latents, None
        if out.mean is not None and out.logvar is not None:
            mean, std = out.mean, torch.exp(0.5 * out.logvar) / tokenizer.latent_std
        found = TokenDistribution(tokenizer.normalize(mean), std)
        return AutoencoderKLOutput(latent_dist=found) if return_dict else (found,)

    def decode(
        self,
        z: Tensor,
        captions: Captions = None,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> Any:
        """z (B, N, d) -> ``.sample`` (B, 3, S, S), clamped to [-1, 1]. ``generator`` is not used, as in AutoencoderKL."""
        tokenizer = self.tokenizer
        latents = tokenizer._raw_latents(tokenizer._check_tokens(z).to(tokenizer.device))
        text = tokenizer.text_features(captions, len(latents)) if tokenizer.config.text_in_decoder else None
        pixels = tokenizer.decoder(latents, text).clamp(-1.0, 1.0)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    def forward(
        self,
        sample: Tensor,
        captions: Captions = None,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> Any:
        """:meth:`encode`, then :meth:`decode`."""
        posterior = self.encode(sample, captions).latent_dist
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, captions, return_dict)


class TexTokPipeline(DiffusionPipeline):
    """Generation behind diffusers' calls: ``pipe(prompt or class_labels, ...).images``.

    Args:
        pipeline: from :func:`textok_fast.inference.load_pipeline`, with a plan or without; :meth:`from_pretrained` loads one.
    """

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.pipeline = pipeline

    @classmethod
    def from_pretrained(cls, source: str | Path, plan: Any = None, device: str | torch.device = "cpu") -> TexTokPipeline:
        """A directory that ``textok-fast train generator`` or ``textok-fast convert --tokenizer`` wrote."""
        from textok_fast.inference.pipelines import load_pipeline

        return cls(load_pipeline(source, device, plan))

    def save_pretrained(self, directory: str | Path) -> None:
        """What :meth:`from_pretrained` reads."""
        self.pipeline.save_pretrained(directory)

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.pipeline.device)

    def to(self, *args: Any, **kwargs: Any) -> TexTokPipeline:
        """Moves the models; InputError where a plan says on which device they run."""
        parsed: Any = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype = parsed[:2]
        if dtype is not None:
            raise InputError("a pipeline's precision is its plan's: make one with Plan(precision=...)")
        if device is not None:
            self.pipeline.to(device)
        return self

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        class_labels: int | str | Sequence[int | str] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], Any] | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        """Pictures from captions, or from classes with or without captions for the decoder.

        Args:
            prompt, class_labels: one or several; a model by class decodes with ``prompt``, one for each label, if given.
            generator: one, or one for each picture, from which seeds are drawn; None draws them from torch's.
            output_type: "pil"; "np" (B, S, S, 3) float in [0, 1]; "pt" (B, 3, S, S) likewise; "latent" the tokens (B, N, d), or
                latents (B, C, h, w).
            callback_on_step_end: ``(pipe, step, evaluations in all, {})`` after each evaluation. It can look, but not change
                latents: a captured loop does not stop for it.
            options: further fields of :class:`~textok_fast.inference.SamplingOptions`, such as ``sampler``.

        Raises: InputError for conditions that the model does not take.
        """
        from textok_fast.inference.pipelines import ClassToImagePipeline, SamplingOptions

        if output_type not in ("pil", "np", "pt", "latent"):
            raise InputError(f"output_type must be pil, np, pt or latent, got {output_type!r}")
        by_class = isinstance(self.pipeline, ClassToImagePipeline)
        given = class_labels if by_class else prompt
        if given is None:
            raise InputError("this pipeline generates by class: give class_labels" if by_class else "give a prompt")
        if not by_class and class_labels is not None:
            raise InputError("this pipeline generates from captions: give prompt, not class_labels")
        many = [given] if isinstance(given, (str, int)) else list(given)
        wanted = [item for item in many for _ in range(num_images_per_prompt)]
        extra: dict[str, Any] = {}
        if by_class and prompt is not None:
            captions = [prompt] if isinstance(prompt, str) else list(prompt)
            if len(captions) != len(many):
                raise InputError(f"got {len(captions)} prompts for {len(many)} class_labels")
            extra["captions"] = [caption for caption in captions for _ in range(num_images_per_prompt)]
        fields = {field.name for field in dataclasses.fields(SamplingOptions)}
        if unknown := sorted(set(options) - fields):
            raise InputError(f"unknown options {', '.join(unknown)}; known: {', '.join(sorted(fields))}")
        how = SamplingOptions(**{**options, "steps": num_inference_steps, "guidance_scale": guidance_scale})
        with self.progress_bar(total=num_inference_steps) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)
                if callback_on_step_end is not None:
                    callback_on_step_end(self, done - 1, total, {})

            made = self.pipeline(
                wanted, seed=_seeds(generator, len(wanted)), options=how, output="uint8", progress=progress, **extra
            )
        if output_type == "latent":
            images: Any = made.tokens
        elif output_type == "pil":
            from PIL import Image

            images = [Image.fromarray(picture) for picture in made.images.cpu().numpy()]
        else:
            images = made.images.float() / 255  # (B, S, S, 3)
            images = images.permute(0, 3, 1, 2) if output_type == "pt" else images.cpu().numpy()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _seeds(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[int]:
    """A seed for each picture; the same generators in the same state give the same ones."""
    if generator is not None and not isinstance(generator, torch.Generator):
        if len(generator) != count:
            raise InputError(f"got {len(generator)} generators for {count} pictures")
        return [_seeds(each, 1)[0] for each in generator]
    place = "cpu" if generator is None else generator.device
    drawn = torch.randint(0, 2**62, (count,), generator=generator, device=place)
    return [int(seed) for seed in drawn.tolist()]
