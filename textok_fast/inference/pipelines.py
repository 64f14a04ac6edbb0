"""From a class or a caption to tokens to pictures."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from textok_fast import ops
from textok_fast.diffusion import NoiseSource, Objective, OnStep, build_process, guided, sample
from textok_fast.errors import InputError
from textok_fast.files import write_text
from textok_fast.inference.engine import Engine
from textok_fast.inference.generator import GeneratorEngine, sample_shape
from textok_fast.inference.plan import Plan
from textok_fast.inference.tokenizer import TokenizerEngine
from textok_fast.modeling.autoencoder import LatentTokenizer, latent_tokenizer, load_tokenizer, token_shape
from textok_fast.modeling.dit import DiT
from textok_fast.modeling.shipped import find_model
from textok_fast.modeling.text_encoders import TextFeatures, same_length
from textok_fast.modeling.tokenizer import Images, TexTok, check_images

PIPELINE_NAME = "pipeline.json"
FOLDERS = {"generator": "transformer", "tokenizer": "vae"}  # by our names and diffusers'


class Condition(NamedTuple):
    """What a DiT is conditioned on, for B samples; entries that the model has no use for are None."""

    labels: Tensor | None  # (B,) int64
    features: Tensor | None  # (B, N_t, D_t)
    mask: Tensor | None  # (B, N_t) bool
    image_tokens: Tensor | None  # (B, M, image_token_dim), the same in both halves of a guidance pair


@dataclass
class GenerationOutput:
    """Pictures, the tokens they were decoded from, the caption each was decoded with and the seed it was drawn from."""

    images: Tensor  # uint8 (B, S, S, 3), or float (B, 3, S, S) in [-1, 1]
    tokens: Tensor  # (B, N, d), or latents (B, C, h, w)
    captions: list[str]
    seeds: list[int]


@dataclass
class SamplingOptions:
    """How a sample is drawn. ``guidance_interval`` is in the model's t: training steps, or [0, 1] for a flow.
    ``guided_channels``: how many of a sample's first channels guidance changes; None is what the generator's config says."""

    sampler: str = ""  # of diffusion.SAMPLERS; empty: ddpm for Gaussian diffusion, euler for a flow
    steps: int = 50
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    eta: float = 0.0  # ddim
    guided_channels: int | None = None


class RunOptions(TypedDict, total=False):
    """What a pipeline's call takes besides, all of it optional.

    noise: initial noise (B, N, d), in place of what the seeds give.
    negative_prompts: one a sample; what guidance leads away from in place of the null caption, for a generator that reads text.
    progress: called after each evaluation that has been handed to the device.
    on_step: sees and may change the tokens after each evaluation, see :data:`textok_fast.diffusion.OnStep`.
    """

    noise: Tensor | None
    negative_prompts: Sequence[str] | None
    progress: Callable[[int, int], None] | None
    on_step: OnStep | None


class GenerationPipeline:
    """A DiT and the tokenizer that decodes what it makes. Use a subclass, or :func:`load_pipeline`, which picks one.

    The tokenizer is a TexTok for 1-D tokens, a :class:`LatentTokenizer` for a DiT over an autoencoder's 2-D latents.

    With a ``plan`` both run through engines (:func:`textok_fast.inference.Engine`), on the plan's device; without one as the
    modules they are.
    """

    def __init__(
        self,
        generator: DiT,
        tokenizer: TexTok | LatentTokenizer,
        objective: Objective = "gaussian",
        prediction: str = "epsilon",
        plan: Plan | None = None,
        schedule: str = "linear",
    ) -> None:
        if sample_shape(generator) != token_shape(tokenizer):
            raise InputError(
                f"the generator makes {_in_words(sample_shape(generator))}, the tokenizer decodes "
                f"{_in_words(token_shape(tokenizer))}: they were not trained together"
            )
        if generator.config.image_token_dim and not isinstance(self, SuperResolutionPipeline):
            raise InputError(
                "this generator reads pictures: it runs in a SuperResolutionPipeline, which load_pipeline makes of it"
            )
        if generator.config.text_dim and isinstance(tokenizer, LatentTokenizer):
            raise InputError("a generator from captions reads the features of its tokenizer's text encoder; this one has none")
        self.generator, self.tokenizer = generator.eval(), tokenizer.eval()
        self.process = build_process(objective, generator.config.learn_sigma, prediction, schedule)
        self.objective, self.prediction, self.schedule = objective, prediction, schedule
        self.plan = plan
        self.decode_batch: int | None = None  # how many pictures are decoded at once; None: all
        self._engines: tuple[Any, Any] | None = None if plan is None else (Engine(generator, plan), Engine(tokenizer, plan))

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> GenerationPipeline:
        """Moves the models; InputError for what a plan says otherwise: where they run, and in which precision."""
        if self.plan is not None:
            if dtype is not None:
                raise InputError(f"this pipeline's precision is its plan's, {self.plan.precision}: make one with another plan")
            if device is not None and not _same_device(torch.device(device), self.device):
                raise InputError(f"this pipeline's plan runs it on {self.plan.device}: make one with a plan for {device}")
            return self
        self.generator.to(device=device, dtype=dtype)
        self.tokenizer.to(device=device, dtype=dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Where tokens and pictures are made."""
        found: torch.device = self.tokenizer.device if self._engines is None else self._engines[0].device
        return found

    def save_pretrained(self, directory: str | Path) -> Path:
        """Writes what :func:`load_pipeline` reads, without the plan; returns the directory."""
        directory = Path(directory)
        self.generator.save_pretrained(directory / "generator")
        self.tokenizer.save_pretrained(directory / "tokenizer")
        self.save_about(directory)
        return directory

    def save_about(self, directory: Path) -> None:
        """pipeline.json: all of it but the models."""
        about = {"objective": self.objective, "prediction": self.prediction, "schedule": self.schedule, **self._about()}
        write_text(directory / PIPELINE_NAME, json.dumps(about, indent=1, ensure_ascii=False) + "\n")

    def _about(self) -> dict[str, Any]:
        return {"label_names": [], "captions": {}}

    def text_features(self, captions: list[str]) -> TextFeatures | None:
        """What the generator reads of captions, one a sample; None for one that reads none."""
        if not self.generator.config.text_dim or isinstance(self.tokenizer, LatentTokenizer):
            return None
        return self.tokenizer.text_features(captions, len(captions))

    def generate_tokens(
        self,
        labels: Tensor | None,
        text: TextFeatures | None,
        seeds: Sequence[int],
        options: SamplingOptions,
        image_tokens: Tensor | None = None,
        **run: Unpack[RunOptions],
    ) -> Tensor:
        """Tokens (B, N, d), or latents (B, C, h, w), for B labels and captions, and ``image_tokens`` (B, M, image_token_dim)
        for a generator that reads them. Sample i depends on seed i and its condition alone, not on its batch."""
        config, device = self.generator.config, self.tokenizer.device
        source = seeded_noise(seeds, device)
        noise, negative = run.get("noise"), self._negative_text(run.get("negative_prompts"), len(seeds))
        seen: dict[str, Any] = {"progress": run.get("progress"), "on_step": run.get("on_step")}
        if self._engines is not None:
            given: dict[str, Any] = {"labels": labels, "text": text, "negative_text": negative, "image_tokens": image_tokens}
            given |= {"seeds": seeds, "noise": noise}
            made: Tensor = self._engines[0].sample(self.process, **given, **dataclasses.asdict(options), **seen)
            return made
        if negative is not None:
            text = TextFeatures(negative.features, torch.zeros_like(negative.mask)) if text is None else text
            text, negative = same_length(text, negative)
        condition = Condition(
            None if labels is None else labels.to(device),
            None if text is None else text.features,
            None if text is None else text.mask,
            None if image_tokens is None else image_tokens.to(device, self.tokenizer.dtype),
        )
        null = Condition(
            None if labels is None else torch.full_like(condition.labels, config.num_classes),  # type: ignore[arg-type]
            condition.features if negative is None else negative.features,
            None if condition.mask is None else torch.zeros_like(condition.mask) if negative is None else negative.mask,
            condition.image_tokens,
        )

        def model(x: Tensor, t: Tensor, c: Condition) -> Tensor:
            given = None if c.features is None or c.mask is None else TextFeatures(c.features, c.mask)
            return self.generator(x, t, c.labels, given, c.image_tokens)

        shape = (len(seeds), *sample_shape(self.generator))
        if noise is not None and tuple(noise.shape) != shape:
            raise InputError(f"noise must be {shape}, got {tuple(noise.shape)}")
        noise = (source(0, shape) if noise is None else noise).to(device, self.tokenizer.dtype)  # (B, N, d) or (B, C, h, w)
        channels = options.guided_channels or config.guided_channels or None
        sampler = options.sampler or ("euler" if self.objective == "flow" else "ddpm")
        extra: dict[str, Any] = {"eta": options.eta} if sampler == "ddim" else {}
        return sample(
            sampler,
            guided(model, condition, null, options.guidance_scale, options.guidance_interval, channels),
            noise,
            options.steps,
            self.process,
            generator=source,
            **seen,
            **extra,
        )

    def _negative_text(self, prompts: Sequence[str] | None, count: int) -> TextFeatures | None:
        if prompts is None:
            return None
        if not self.generator.config.text_dim:
            raise InputError("this generator reads no text: there is no negative prompt to lead it away from")
        if len(prompts) != count:
            raise InputError(f"got {len(prompts)} negative prompts for {count} samples")
        return self.text_features(list(prompts))

    def _finish(
        self,
        labels: Tensor | None,
        text: TextFeatures | None,
        captions: list[str],
        seeds: list[int],
        options: SamplingOptions,
        output: Literal["float", "uint8"],
        run: RunOptions,
        image_tokens: Tensor | None = None,
    ) -> GenerationOutput:
        with torch.no_grad():
            tokens = self.generate_tokens(labels, text, seeds, options, image_tokens, **run)
            decoder: Any = self.tokenizer if self._engines is None else self._engines[1]
            size = self.decode_batch or len(seeds)
            parts = [slice(start, start + size) for start in range(0, len(seeds), size)]
            images = torch.cat([decoder.decode(tokens[part], captions[part], output=output) for part in parts])
            return GenerationOutput(images, tokens, captions, seeds)


class TextToImagePipeline(GenerationPipeline):
    """Captions to pictures: the prompt goes to the generator and to the detokenizer alike."""

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        options: SamplingOptions | None = None,
        output: Literal["float", "uint8"] = "uint8",
        **run: Unpack[RunOptions],
    ) -> GenerationOutput:
        """One picture a prompt.

        ``seed``: a number, from which sample i takes seed + i, or one for each prompt. ``run``: :class:`RunOptions`.
        Raises InputError for no prompt, an empty one, or another number of seeds.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
            raise InputError("give at least one prompt, each a non-empty string")
        text = self.text_features(prompts)
        return self._finish(None, text, prompts, seeds_for(seed, len(prompts)), options or SamplingOptions(), output, run)


class ClassToImagePipeline(GenerationPipeline):
    """Class labels to pictures. The decoder's caption is drawn from the class's captions that training did not use."""

    def __init__(
        self,
        generator: DiT,
        tokenizer: TexTok | LatentTokenizer,
        objective: Objective = "gaussian",
        label_names: Sequence[str] = (),
        captions: dict[int, list[str]] | None = None,
        prediction: str = "epsilon",
        plan: Plan | None = None,
        schedule: str = "linear",
    ) -> None:
        super().__init__(generator, tokenizer, objective, prediction, plan, schedule)
        self.label_names, self.captions = list(label_names), captions or {}

    def __call__(
        self,
        labels: int | str | Sequence[int | str],
        *,
        captions: Sequence[str] | None = None,
        seed: int | Sequence[int] = 0,
        options: SamplingOptions | None = None,
        output: Literal["float", "uint8"] = "uint8",
        **run: Unpack[RunOptions],
    ) -> GenerationOutput:
        """One picture a label, given as an index, a name, or an index written out.

        ``captions`` for the decoder, one a label; None draws each from its class's held-out captions by the sample's seed (the
        null caption for a class that has none). ``seed`` and ``run`` as in :class:`TextToImagePipeline`.
        """
        given = [labels] if isinstance(labels, (int, str)) else list(labels)
        indices = [self.label_index(label) for label in given]
        if not indices:
            raise InputError("give at least one label")
        seeds = seeds_for(seed, len(indices))
        if captions is None:
            chosen = [self._held_out_caption(index, own) for index, own in zip(indices, seeds, strict=True)]
        else:
            chosen = list(captions)
            if len(chosen) != len(indices):
                raise InputError(f"got {len(chosen)} captions for {len(indices)} labels")
        text = self.text_features(chosen)
        return self._finish(torch.tensor(indices), text, chosen, seeds, options or SamplingOptions(), output, run)

    def _about(self) -> dict[str, Any]:
        return {"label_names": self.label_names, "captions": {str(label): texts for label, texts in self.captions.items()}}

    def label_index(self, label: int | str) -> int:
        """The index of a class; InputError for one that does not exist. A string is a name if a class has it, also as one of
        several with commas between them ("tench, Tinca tinca"), else an index."""
        count = self.generator.config.num_classes
        if isinstance(label, str):
            if label in self.label_names:
                return self.label_names.index(label)
            found = [i for i, names in enumerate(self.label_names) if label in map(str.strip, names.split(","))]
            if len(found) > 1:
                raise InputError(f"the classes {', '.join(map(str, found))} are called {label!r}: give an index")
            if found:
                return found[0]
            if not re.fullmatch(r"-?[0-9]+", label):
                raise InputError(f"no class {label!r}; known: {', '.join(self.label_names[:8]) or 'none by name'}, ...")
            label = int(label)
        if not 0 <= label < count:
            raise InputError(f"class {label} is outside [0, {count})")
        return label

    def _held_out_caption(self, label: int, seed: int) -> str:
        choices = self.captions.get(label)
        if not choices:
            return ""
        generator = torch.Generator().manual_seed(seed)
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]


class SuperResolutionPipeline(GenerationPipeline):
    """Small pictures, and captions of them, to large ones. Guidance is by the caption: the picture is in both halves of the
    pair.

    ``size``: the side of the small pictures; ``patch_size``: how they are cut into the tokens that the generator reads;
    ``strength``: of the degradations that it was trained on (:func:`textok_fast.data.degradation.degrade`), which
    ``textok-fast evaluate`` repeats.
    """

    def __init__(
        self,
        generator: DiT,
        tokenizer: TexTok | LatentTokenizer,
        objective: Objective = "gaussian",
        prediction: str = "epsilon",
        plan: Plan | None = None,
        schedule: str = "linear",
        *,
        size: int,
        patch_size: int,
        strength: float = 1.0,
    ) -> None:
        sizes = (generator.config.num_image_tokens, generator.config.image_token_dim)
        if sizes != ((size // patch_size) ** 2, 3 * patch_size**2) or size % patch_size:
            raise InputError(
                f"pictures of {size} px in patches of {patch_size} px are {(size // patch_size) ** 2} tokens of "
                f"{3 * patch_size**2} numbers; the generator reads {sizes[0]} of {sizes[1]}"
            )
        if generator.config.num_classes:
            raise InputError("super-resolution is conditioned on a picture and a caption; this generator has classes")
        super().__init__(generator, tokenizer, objective, prediction, plan, schedule)
        self.size, self.patch_size, self.strength = size, patch_size, strength

    def __call__(
        self,
        images: Images,
        captions: Sequence[str] | None = None,
        *,
        seed: int | Sequence[int] = 0,
        options: SamplingOptions | None = None,
        output: Literal["float", "uint8"] = "uint8",
        **run: Unpack[RunOptions],
    ) -> GenerationOutput:
        """One large picture a small one.

        Args:
            images: PIL images, uint8 (B, s, s, 3), or float (B, 3, s, s) in [-1, 1], of the side ``self.size``.
            captions: one a picture, for generator and decoder; None, or "" for one of them, is the null caption.
            seed, run: as in :class:`TextToImagePipeline`.

        Raises: InputError for pictures of another form or size, and another number of captions or seeds.
        """
        small = check_images(images, self.size, self.tokenizer.device, torch.float32)
        chosen = [""] * len(small) if captions is None else list(captions)
        if len(chosen) != len(small):
            raise InputError(f"got {len(chosen)} captions for {len(small)} pictures")
        in_bytes = small.dtype == torch.uint8
        tokens = (ops.patchify_uint8 if in_bytes else ops.patchify)(small, self.patch_size)  # (B, M, 3 p p)
        seeds, options = seeds_for(seed, len(small)), options or SamplingOptions()
        return self._finish(None, self.text_features(chosen), chosen, seeds, options, output, run, tokens)

    def _about(self) -> dict[str, Any]:
        sizes = {"size": self.size, "patch_size": self.patch_size, "strength": self.strength}
        return {**super()._about(), "low_resolution": sizes}


AnyPipeline = TextToImagePipeline | ClassToImagePipeline | SuperResolutionPipeline


def _same_device(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (one.index is None or one.index == other.index)


def _in_words(shape: tuple[int, ...]) -> str:
    """Of one sample: (N, d), or (C, h, w)."""
    if len(shape) == 2:
        return f"{shape[0]} tokens of {shape[1]} channels"
    return f"latents of {shape[0]} channels and {shape[1]} x {shape[2]}"


def seeds_for(seed: int | Sequence[int], count: int) -> list[int]:
    """``count`` seeds: seed, seed + 1, ... from a number, or the given ones if their number is right."""
    if isinstance(seed, int):
        return [seed + i for i in range(count)]
    if len(seed) != count:
        raise InputError(f"got {len(seed)} seeds for {count} samples")
    return list(seed)


def seeded_noise(seeds: Sequence[int], device: str | torch.device) -> NoiseSource:
    """Noise for samplers from :func:`textok_fast.ops.seeded_normal`, drawn on ``device``: sample i's from seed i alone.

    Raises InputError for a seed that is not an integer from 0 to 2**63 - 1.
    """
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise InputError(f"a seed is an integer from 0 to 2**63 - 1, got {seed!r}")
    keys = torch.tensor(list(seeds), dtype=torch.int64, device=device)  # (B,)

    def source(draw: int, shape: Sequence[int]) -> Tensor:
        # Filled on the device: a copy from the host would wait for it.
        return ops.seeded_normal(keys, torch.full((1,), draw, dtype=torch.int64, device=device), shape[1:])

    return source


def load_pipeline(directory: str | Path, device: str | torch.device = "cpu", plan: Plan | None = None) -> AnyPipeline:
    """The pipeline that ``textok-fast train generator``, ``textok-fast convert`` or ``interop.TexTokPipeline`` wrote: by class
    when the generator has classes, by small pictures when it reads them, else by caption. ``directory`` may also be the name
    of weights that come with the package ("textok-mini").

    With a ``plan`` it runs through engines on the plan's device; on ``device`` are the weights that they are made from, and
    the text encoder.
    """
    directory = find_model(directory)
    try:
        about = json.loads((directory / PIPELINE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"no pipeline at {directory}: it has no {PIPELINE_NAME}; `textok-fast train generator` writes one, and "
            "`textok-fast convert --tokenizer`"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {directory / PIPELINE_NAME}: {error!r}") from None
    _described(about, str(directory / PIPELINE_NAME))  # a mistake in it is told before models are read
    # Where diffusers' pipelines have them, else where ours do.
    folders = [theirs if (directory / theirs).is_dir() else ours for ours, theirs in FOLDERS.items()]
    generator = DiT.from_pretrained(directory / folders[0], device=device)
    tokenizer = load_tokenizer(directory / folders[1], device)
    if isinstance(tokenizer, LatentTokenizer):
        tokenizer = latent_tokenizer(tokenizer.vae, generator)
    return build_pipeline(generator, tokenizer, about, str(directory / PIPELINE_NAME), plan)


def build_pipeline(
    generator: DiT,
    tokenizer: TexTok | LatentTokenizer,
    about: Mapping[str, Any],
    source: str,
    plan: Plan | None = None,
    engines: tuple[GeneratorEngine, TokenizerEngine] | None = None,
) -> AnyPipeline:
    """The pipeline that ``about``, the contents of pipeline.json, describes.

    ``source``: where it was read, for errors. ``engines``: what runs it in place of the models, which then give their
    configurations and checks alone.
    """
    objective, prediction, schedule, names, captions = _described(about, source)
    pipeline: AnyPipeline
    if generator.config.image_token_dim:
        try:
            low = about["low_resolution"]
            sizes = {name: int(low[name]) for name in ("size", "patch_size")}
            strength = float(low.get("strength", 1.0))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{source} does not say which pictures the generator reads (low_resolution): {error!r}") from None
        pipeline = SuperResolutionPipeline(
            generator, tokenizer, objective, prediction, plan, schedule, **sizes, strength=strength
        )
    elif generator.config.num_classes:
        pipeline = ClassToImagePipeline(generator, tokenizer, objective, names, captions, prediction, plan, schedule)
    else:
        pipeline = TextToImagePipeline(generator, tokenizer, objective, prediction, plan, schedule)
    if engines is not None:
        pipeline.plan, pipeline._engines = engines[0].plan, engines
    return pipeline


def _described(about: Mapping[str, Any], source: str) -> tuple[Objective, str, str, list[str], dict[int, list[str]]]:
    """Objective, prediction, schedule, names of labels and captions by label; InputError where one is lacking or of no use."""
    try:
        objective, names = about["objective"], about["label_names"]
        captions = {int(label): texts for label, texts in about["captions"].items()}
        return objective, about.get("prediction", "epsilon"), about.get("schedule", "linear"), names, captions
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"cannot read {source}: {error!r}") from None
