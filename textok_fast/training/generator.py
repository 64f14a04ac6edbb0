"""Training of the DiT over cached tokens."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from textok_fast import ops
from textok_fast.config import GeneratorTrainConfig, to_dict
from textok_fast.data import CaptionedImages, load_dataset
from textok_fast.data.files import FILE_SOURCES
from textok_fast.data.token_cache import TokenDataset, collate_tokens, drawn_rows, read_skipped, write_token_shards
from textok_fast.data.token_pictures import TokensAndPictures, collate_tokens_and_pictures, small_picture
from textok_fast.diffusion import FlowMatching, GaussianDiffusion, build_process, sample
from textok_fast.errors import InputError
from textok_fast.files import write_text
from textok_fast.modeling.dit import DiT
from textok_fast.modeling.encoding import encode_function, token_identity
from textok_fast.modeling.layers import drop_captions
from textok_fast.modeling.text_encoders import trim_padding
from textok_fast.modeling.tokenizer import TexTok, from_uint8
from textok_fast.modeling.vision_encoders import AlignedDiT, VisionEncoder, alignment_loss
from textok_fast.pictures import image_grid
from textok_fast.training.loop import Critic, StepRandom, TrainResult, announce, epochs, fit
from textok_fast.training.parallel import check_run, join_processes, lost_processes

CAPTIONS_PER_CLASS = 16  # held-out captions kept for the decoder of a class-conditional generator
CACHED_SCENES = 8192  # of generated scenes, of which there is no end
PREVIEW_SAMPLES, PREVIEW_STEPS = 8, 20


class GeneratorTask:
    """Denoising of cached tokens, some of them without their label or caption so that guidance works.

    With ``low_resolution`` a small picture guides it always: guidance is by the caption alone. With ``alignment`` a frozen
    network sees the clean picture, and ``model`` is an :class:`AlignedDiT` around the generator.
    """

    critic: Critic | None = None

    def __init__(self, config: GeneratorTrainConfig, tokenizer: TexTok) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.model: nn.Module = DiT(config.model)
        self.process = build_process(config.objective, config.model.learn_sigma, config.prediction)
        if isinstance(self.process, FlowMatching):
            self.process.logit_mean, self.process.logit_std = config.logit_mean, config.logit_std
        wanted = (tokenizer.config.num_tokens, tokenizer.config.latent_dim)
        if (config.model.num_tokens, config.model.in_channels) != wanted:
            raise InputError(
                f"the tokenizer gives {wanted[0]} tokens of {wanted[1]} channels; set model.num_tokens={wanted[0]} and "
                f"model.in_channels={wanted[1]} (got {config.model.num_tokens} and {config.model.in_channels})"
            )
        if config.model.text_dim or tokenizer.config.text != "none":
            tokenizer.text_encoder  # noqa: B018 (loads it now, so that a missing one is reported before training)
        if config.model.text_dim and tokenizer.config.text_dim != config.model.text_dim:
            raise InputError(f"set model.text_dim={tokenizer.config.text_dim}, the width of {tokenizer.config.text_encoder}")
        if config.low_resolution.scale and config.data.image_size != tokenizer.config.image_size:
            raise InputError(
                f"set data.image_size={tokenizer.config.image_size}, the tokenizer's: small pictures are measured by it"
            )
        self.features: VisionEncoder | None = None
        if config.alignment.encoder:
            seen = config.alignment
            self.features = VisionEncoder.load(seen.encoder, seen.image_size, tokenizer.device)
            self.model = AlignedDiT(self.model, seen.block, seen.width, self.features.patches, self.features.dim)

    @property
    def dit(self) -> DiT:
        """The generator in ``model``, which is another when averages are shown and saved."""
        return cast(DiT, self.model.dit if isinstance(self.model, AlignedDiT) else self.model)

    @property
    def needs_pictures(self) -> bool:
        """Whether a batch must have ``images``, and ``small`` for super-resolution."""
        return bool(self.config.low_resolution.scale) or self.features is not None

    def loss(self, model: nn.Module, batch: dict[str, Any], rng: StepRandom) -> dict[str, Tensor]:
        x0 = batch["tokens"].to(rng.device)  # (B, N, d)
        drop = rng.uniform(len(x0)) < self.config.model.condition_dropout  # (B,)
        labels = text = None
        if self.config.model.num_classes:
            labels = torch.where(drop, self.config.model.num_classes, batch["labels"].to(rng.device))  # (B,)
        if self.config.model.text_dim:
            text = drop_captions(trim_padding(self.tokenizer.text_encoder(batch["captions"])).to(rng.device), drop)
        small = self.small_tokens(batch["small"].to(rng.device)) if self.config.low_resolution.scale else None
        noise = rng.normal(*x0.shape)
        t, weight = self.times(rng, len(x0))
        told: list[Tensor] = []  # what an aligned model tells of the picture

        def run(x: Tensor, time: Tensor) -> Tensor:
            output = model(x, time, labels, text) if small is None else model(x, time, labels, text, small)
            if self.features is None:
                return output.float()
            told.append(output[1])
            return output[0].float()

        terms = self.process.training_losses(run, x0, t, noise, weight=weight)
        if self.features is not None:
            terms["alignment"] = alignment_loss(told[0], self.features(from_uint8(batch["images"].to(rng.device))))  # (B,)
            terms["loss"] = terms["loss"] + self.config.alignment.weight * terms["alignment"]
        return {name: value.mean() for name, value in terms.items()}

    def times(self, rng: StepRandom, count: int) -> tuple[Tensor, Tensor | None]:
        """The times of a batch (count,), and the weights of their losses, if not 1."""
        if isinstance(self.process, GaussianDiffusion):
            steps = rng.integers(self.process.num_steps, count)
            by_snr = self.config.weighting == "min-snr"
            return steps, self.process.min_snr_weight(steps, self.config.min_snr_gamma) if by_snr else None
        if self.config.times == "logit-normal":
            return self.process.logit_normal(rng.normal(count)), None
        t = rng.uniform(count)
        return t, self.process.logit_normal_density(t) if self.config.weighting == "logit-normal" else None

    def small_tokens(self, small: Tensor) -> Tensor:
        """Small pictures (B, s, s, 3) uint8 as the generator reads them, (B, M, 3 p p)."""
        return ops.patchify_uint8(small, self.config.low_resolution.patch_size)

    @functools.cached_property
    def held_out(self) -> CaptionedImages:
        """Pictures whose captions training has not seen."""
        return load_dataset(self.config.data, held_out_split(self.config))

    def preview(self, rng: StepRandom) -> Image.Image:
        """Samples for held-out captions without guidance, from the same noise every time. For super-resolution the small
        pictures are above them, and below what the tokenizer makes of the originals, which is the most that can be reached."""
        examples = [self.held_out[index] for index in range(min(PREVIEW_SAMPLES, len(self.held_out)))]
        captions, config = [example.caption for example in examples], self.config.model
        classes = torch.tensor([example.label for example in examples], device=rng.device)  # (B,)
        labels = classes if config.num_classes else None
        text = self.tokenizer.text_features(captions, len(captions)) if config.text_dim else None
        low = self.config.low_resolution
        small = image_tokens = None
        if low.scale:
            small = torch.stack([small_picture(example.image, low, index) for index, example in enumerate(examples)])
            image_tokens = self.small_tokens(small.to(rng.device))  # (B, M, 3 p p)
        seeds = torch.arange(len(examples), device=rng.device)  # (B,)
        draw = torch.zeros(1, dtype=torch.int64, device=rng.device)  # the initial noise, as a pipeline draws it
        tokens = sample(
            "euler" if self.config.objective == "flow" else "ddim",
            lambda x, t: self.dit(x, t, labels, text, image_tokens),
            ops.seeded_normal(seeds, draw, (config.num_tokens, config.in_channels)),  # (B, N, d)
            PREVIEW_STEPS,
            self.process,
        )  # (B, N, d)
        made = self.tokenizer.decode(tokens, captions, output="uint8")  # (B, S, S, 3)
        if small is None:
            return image_grid(made, columns=4, captions=captions)
        enlarged = small.repeat_interleave(low.scale, dim=1).repeat_interleave(low.scale, dim=2)
        originals = torch.stack([torch.from_numpy(example.image) for example in examples])
        best = self.tokenizer.decode(self.tokenizer.encode(originals, captions).mode(), captions, output="uint8")
        return image_grid(torch.cat([enlarged, made.cpu(), best.cpu()]), columns=len(examples))

    def finish(self, directory: Path) -> None:
        """A directory that ``textok_fast.inference.load_pipeline`` reads: generator, tokenizer, and how they were trained."""
        self.dit.save_pretrained(directory / "generator")
        self.tokenizer.save_pretrained(directory / "tokenizer")
        by_class = bool(self.config.model.num_classes)
        captions = self.held_out.captions_by_label(CAPTIONS_PER_CLASS) if by_class else {}
        about: dict[str, Any] = {
            "objective": self.config.objective,
            "prediction": self.config.prediction,
            "label_names": self.held_out.label_names if by_class else [],
            "captions": {str(label): texts for label, texts in captions.items()},
        }
        if self.config.low_resolution.scale:
            low = self.config.low_resolution
            size = low.size(self.config.data.image_size)
            about["low_resolution"] = {"size": size, "patch_size": low.patch_size, "strength": low.strength}
        write_text(directory / "pipeline.json", json.dumps(about, indent=1, ensure_ascii=False))


def check_held_out(task: GeneratorTask, dataset: CaptionedImages) -> None:
    """Opens held-out pictures that are not a share of the training pictures' own: what is wrong with them is said before
    training. Raises InputError where they are missing, or a class-conditional generator's have other labels."""
    data = task.config.data
    if data.source not in FILE_SOURCES or (data.validation_share and not data.held_out_at):
        return
    found, wanted = task.held_out.label_names, dataset.label_names
    if task.config.model.num_classes and found != wanted:
        missing = [name for name in wanted if name not in found] or [name for name in found if name not in wanted]
        raise InputError(
            f"the held-out pictures at {data.held_out_at} have {len(found)} labels, the training pictures {len(wanted)}; "
            f"they must be the same, and only one of the two has {', '.join(missing[:3])}"
        )


def held_out_split(config: GeneratorTrainConfig) -> str:
    """The split whose captions training has not seen."""
    return "validation" if config.data.source in FILE_SOURCES else "composition"


def train_generator(
    config: GeneratorTrainConfig,
    *,
    resume: bool = False,
    progress: bool = True,
    on_cache: Callable[[int, int], None] | None = None,
) -> TrainResult:
    """Caches the tokens of the training pictures, then trains a DiT over them; ``<output_dir>/final`` is a pipeline.

    ``on_cache`` is called with (pictures encoded, in all). See :func:`textok_fast.training.loop.fit`.
    """
    processes = join_processes(config.run.timeout)
    check_run(config.run, processes.device, processes.num_processes)
    torch.manual_seed(config.run.seed)  # the initial weights
    try:
        tokenizer = TexTok.from_pretrained(config.tokenizer, device=processes.device)
    except InputError as error:
        if Path(config.tokenizer).is_dir():
            raise
        raise InputError(
            f"{error}. A generator is trained over a tokenizer, which the setting tokenizer= names: what `train tokenizer` "
            "wrote, as tokenizer=runs/tokenizer/final"
        ) from None
    task = GeneratorTask(config, tokenizer)
    dataset = load_dataset(config.data, "train")
    announce(processes, dataset.describe())
    classes = len(dataset.label_names) or 1
    if 0 < config.model.num_classes < classes:
        raise InputError(f"the data has {classes} classes; set model.num_classes={classes}, got {config.model.num_classes}")
    check_held_out(task, dataset)
    directory = Path(config.token_cache or Path(config.run.output_dir) / "tokens")
    count = config.cache_images or (len(dataset) if config.data.source in FILE_SOURCES else CACHED_SCENES)
    if count < len(dataset):
        announce(processes, f"caching the tokens of {count:,} of them, drawn by data.seed={config.data.seed} (cache_images)")
    write_token_shards(
        directory,
        dataset,
        encode_function(tokenizer),
        identity=token_identity(tokenizer, to_dict(config.data)),
        count=count,
        seed=config.data.seed,
        batch_size=64,
        captions=config.cache_captions if tokenizer.config.text_in_encoder or config.model.text_dim else 1,  # who reads them
        reads_captions=tokenizer.config.text_in_encoder,
        part=(processes.process_index, processes.num_processes),
        progress=on_cache if processes.is_main_process else None,
    )
    with lost_processes(processes.num_processes, Path(config.run.output_dir)):
        processes.wait_for_everyone()
    tokens = TokenDataset(directory)
    announce(processes, epochs(config.run, len(tokens)))
    options: dict[str, Any] = {"content": tokens.index, "resume": resume, "progress": progress}
    if not task.needs_pictures:
        return fit(task, tokens, collate_tokens, config, **options)
    rows: Sequence[int] = drawn_rows(len(dataset), min(count, len(dataset)), config.data.seed)
    if skipped := set(read_skipped(directory)):
        rows = [row for row in rows if dataset.key(row) not in skipped]
    both = TokensAndPictures(tokens, dataset, rows, config.low_resolution if config.low_resolution.scale else None)
    return fit(task, both, collate_tokens_and_pictures, config, **options)
