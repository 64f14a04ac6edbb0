"""Every model and every run as a plain dataclass, and the one table of named sizes.

A configuration is built from a recipe, then a YAML file, then ``key.sub=value`` overrides, each on top of the one before
(:func:`load_config`). Unknown keys and values of the wrong type are errors that name the key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from textok_fast.errors import InputError

# One table of sizes. ViT sizes are per side (encoder, decoder). "base" is the published TexTok; "small" and "large" have
# TiTok's widths; "tiny" trains on a CPU. The DiT sizes S to XL are those of Peebles & Xie (2023).
TOKENIZER_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 192, "depth": 4, "heads": 3, "grid": 8},
    "small": {"width": 512, "depth": 8, "heads": 8, "grid": 32},
    "base": {"width": 768, "depth": 12, "heads": 12, "grid": 32},
    "large": {"width": 1024, "depth": 24, "heads": 16, "grid": 32},
}
GENERATOR_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 256, "depth": 6, "heads": 4},
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
    "XL": {"width": 1152, "depth": 28, "heads": 16},
}
# Width of the token features of the text encoders that configurations name most often.
TEXT_DIMS: dict[str, int] = {
    "minilm": 384,
    "google/t5-v1_1-xl": 2048,
    "google/t5-v1_1-xxl": 4096,
    "google/flan-t5-xl": 2048,
    "google/flan-t5-xxl": 4096,
    "openai/clip-vit-large-patch14": 768,
    "openai/clip-vit-large-patch14-336": 768,
}
# FSQ levels for a codebook of about 2^n entries (Mentzer et al. 2024, table 1).
FSQ_LEVELS: dict[int, tuple[int, ...]] = {
    256: (8, 6, 5),
    1024: (8, 5, 5, 5),
    4096: (7, 5, 5, 5, 5),
    16384: (8, 8, 8, 6, 5),
    65536: (8, 8, 8, 5, 5, 5),
}

TextSides = Literal["both", "encoder", "decoder", "none"]
BottleneckKind = Literal["none", "kl", "vq", "fsq", "softvq"]


@dataclass
class TexTokConfig:
    """A TexTok tokenizer (arXiv 2412.05796): image and caption -> ``num_tokens`` x ``latent_dim`` -> image.

    ``image_size`` and ``patch_size`` are pixels. ``text`` says which side reads the caption; "none" is the published
    Baseline-N. ``latent_mean`` and ``latent_std`` (one number a channel) are measured after training, so that ``encode``
    returns latents of zero mean and unit variance.
    """

    image_size: int = 256
    patch_size: int = 8
    num_tokens: int = 32
    latent_dim: int = 8
    text: TextSides = "both"
    bottleneck: BottleneckKind = "none"
    width: int = 768
    encoder_depth: int = 12
    decoder_depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    text_encoder: str = "minilm"  # "minilm", or a transformers model by name or directory
    text_dim: int = 384  # D_t, width of the text encoder's token features
    max_text_tokens: int = 256  # captions are cut after this many tokens
    text_positions: bool = False  # learned positions on the text tokens, as TA-TiTok; TexTok has a linear projection only
    text_split: str = ""  # non-empty: captions are cut here and encoded clause by clause, so that clauses are cached
    text_window: bool = False  # captions are padded to max_text_tokens and all of these count, as TA-TiTok
    codebook_size: int = 4096  # vq, softvq
    normalize_codes: bool = True  # vq: nearest code by cosine, as TiTok; softvq: latents and codes of norm 1
    fsq_levels: tuple[int, ...] = ()  # fsq; empty: chosen from latent_dim
    soft_codebooks: int = 1  # softvq: each serves an equal part of the tokens
    soft_temperature: float = 0.07  # softvq: of the assignment to codes
    # What other tokenizers have and TexTok has not.
    decoder_width: int = 0  # 0: as ``width``
    decoder_heads: int = 0  # 0: as ``heads``
    registers: int = 0  # in the encoder, learned rows that are attended to and not read: a class token is one
    decoder_registers: int = 0  # the same in the decoder
    pre_norm: bool = False  # a LayerNorm before the first block
    norm_eps: float = 1e-5  # of every LayerNorm
    rope: bool = False  # learned 2-D rotary positions of the patches, beside the others
    modulated_decoder: bool = False  # its blocks scale and shift the latents' rows by the latents themselves, as MoVQ
    pixel_conv: bool = False  # a 3 x 3 convolution over the decoded picture
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        self.fsq_levels = tuple(self.fsq_levels)
        self.latent_mean, self.latent_std = tuple(self.latent_mean), tuple(self.latent_std)
        for name in (
            "image_size",
            "patch_size",
            "num_tokens",
            "latent_dim",
            "width",
            "encoder_depth",
            "decoder_depth",
            "heads",
            "mlp_ratio",
            "text_dim",
            "max_text_tokens",
            "codebook_size",
            "soft_codebooks",
            "soft_temperature",
            "norm_eps",
        ):
            _require_positive(self, name)
        for name in ("decoder_width", "decoder_heads", "registers", "decoder_registers"):
            _require_range(self, name, 0)
        if self.image_size % self.patch_size:
            raise InputError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}; choose a patch size that "
                f"divides it, such as {_near_divisor(self.image_size, self.patch_size)}"
            )
        _require_choice("text", self.text, ("both", "encoder", "decoder", "none"))
        _require_choice("bottleneck", self.bottleneck, ("none", "kl", "vq", "fsq", "softvq"))
        for width, heads, side in ((self.width, self.heads, ""), (*self.decoder_sizes, "decoder_")):
            if width % heads:
                raise InputError(f"{side}width {width} is not a multiple of {side}heads {heads}")
            if self.rope and width // heads % 4:
                raise InputError(f"rope turns pairs in two directions: a head's {width // heads} channels must divide by 4")
        if self.text_window and self.text_split:
            raise InputError("text_window pads whole captions: leave text_split empty")
        if self.bottleneck == "softvq" and self.num_tokens % self.soft_codebooks:
            raise InputError(f"num_tokens {self.num_tokens} is not a multiple of soft_codebooks {self.soft_codebooks}")
        if self.bottleneck == "fsq":
            self.fsq_levels = self.fsq_levels or _default_fsq_levels(self.latent_dim)
            if len(self.fsq_levels) != self.latent_dim:
                raise InputError(
                    f"fsq_levels {self.fsq_levels} has {len(self.fsq_levels)} entries, latent_dim is {self.latent_dim}"
                )
            if min(self.fsq_levels) < 2 or math.prod(self.fsq_levels) >= 2**63:
                raise InputError(f"fsq_levels {self.fsq_levels} must each be at least 2 and multiply to less than 2**63")
        for name in ("latent_mean", "latent_std"):
            if getattr(self, name) and len(getattr(self, name)) != self.latent_dim:
                raise InputError(f"{name} has {len(getattr(self, name))} entries, latent_dim is {self.latent_dim}")

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2

    @property
    def decoder_sizes(self) -> tuple[int, int]:
        """Width and heads of the decoder."""
        return self.decoder_width or self.width, self.decoder_heads or self.heads

    @property
    def text_in_encoder(self) -> bool:
        return self.text in ("both", "encoder")

    @property
    def text_in_decoder(self) -> bool:
        return self.text in ("both", "decoder")

    @classmethod
    def named(cls, size: str, **overrides: Any) -> TexTokConfig:
        """A size from :data:`TOKENIZER_SIZES` with any field overridden.

        Unless ``patch_size`` is given the image becomes the size's grid of patches: 32 x 32 = 1,024, and 8 x 8 for "tiny".
        ``text_dim`` follows a ``text_encoder`` listed in :data:`TEXT_DIMS`.
        """
        row = _size_row(TOKENIZER_SIZES, size)
        image_size = overrides.get("image_size", cls.image_size)
        if not isinstance(image_size, int):
            raise InputError(f"image_size must be a whole number, got {image_size!r}")
        values: dict[str, Any] = {
            "width": row["width"],
            "heads": row["heads"],
            "encoder_depth": row["depth"],
            "decoder_depth": row["depth"],
            "patch_size": max(1, image_size // row["grid"]),
        }
        if overrides.get("text_encoder") in TEXT_DIMS:
            values["text_dim"] = TEXT_DIMS[overrides["text_encoder"]]
        return _construct(cls, {**values, **overrides})


@dataclass
class DiTConfig:
    """A diffusion transformer (arXiv 2212.09748) over ``num_tokens`` 1-D tokens, or over 2-D patches of an
    ``input_size`` x ``input_size`` grid with ``in_channels`` channels (then ``num_tokens`` must stay 0).

    Conditioning: class labels when ``num_classes`` > 0; captions by cross-attention when ``text_dim`` > 0; a sequence of image
    tokens, such as a low-resolution picture's, joined to the sequence when ``image_token_dim`` > 0.
    """

    num_tokens: int = 0
    input_size: int = 0
    patch_size: int = 1
    in_channels: int = 8
    width: int = 1152
    depth: int = 28
    heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    condition_dropout: float = 0.1  # chance that a training sample loses its label and caption, for guidance
    time_scale: float = 1.0  # t is multiplied by this before its embedding; 1000 for a flow's t in [0, 1]
    learn_sigma: bool = True  # twice the output channels; the second half interpolates the log-variance
    qk_norm: bool = False  # a LayerNorm over each head's queries and one over its keys
    guided_channels: int = 0  # guidance changes the first so many channels, 3 in the published DiT; 0: all
    frequency_shift: int = 0  # of t's sinusoids: the last frequency is period^(-1 + shift / 128); 1 in diffusers' DiT
    mlp_norm_eps: float = 1e-6  # of the LayerNorm before a block's MLP; 1e-5 by default in diffusers' DiT; the others have 1e-6
    text_dim: int = 0
    image_token_dim: int = 0
    num_image_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("patch_size", "in_channels", "width", "depth", "heads", "mlp_ratio", "mlp_norm_eps"):
            _require_positive(self, name)
        for name in ("num_tokens", "input_size", "num_classes", "text_dim", "image_token_dim", "num_image_tokens"):
            _require_range(self, name, 0)
        _require_range(self, "guided_channels", 0, self.in_channels)
        _require_range(self, "frequency_shift", 0, 1)
        if bool(self.num_tokens) == bool(self.input_size):
            raise InputError(
                f"give either num_tokens (1-D tokens) or input_size (a 2-D grid), not both or neither: "
                f"num_tokens={self.num_tokens}, input_size={self.input_size}"
            )
        if self.input_size % self.patch_size:
            raise InputError(f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")
        if self.num_tokens and self.patch_size != 1:
            raise InputError(f"1-D tokens have patch_size 1, got {self.patch_size}")
        if self.width % self.heads:
            raise InputError(f"width {self.width} is not a multiple of heads {self.heads}")
        if bool(self.image_token_dim) != bool(self.num_image_tokens):
            raise InputError("image_token_dim and num_image_tokens must be given together")
        if not 0.0 <= self.condition_dropout < 1.0:
            raise InputError(f"condition_dropout must be in [0, 1), got {self.condition_dropout}")

    @property
    def sequence_length(self) -> int:
        """Transformer tokens N that carry the sample (image tokens not counted)."""
        return self.num_tokens or (self.input_size // self.patch_size) ** 2

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @classmethod
    def named(cls, size: str, **overrides: Any) -> DiTConfig:
        """A size from :data:`GENERATOR_SIZES` with any field overridden."""
        return _construct(cls, {**_size_row(GENERATOR_SIZES, size), **overrides})


@dataclass
class HuggingFaceConfig:
    """Of ``data.source=huggingface``: which part of the data set, and which of its columns."""

    subset: str = ""  # the data set's configuration, where it has several
    split: str = "train"  # of the data set; our validation split is cut from it as from files, unless the next names one
    validation_split: str = ""  # of the data set: what "validation" is, as data.validation_path of files
    revision: str = ""  # a commit or tag, so that the data cannot change between a run and its continuation
    streaming: bool = False  # read while training instead of downloading before it; docs/data.md says what that costs
    length: int = 0  # streaming: pictures in an epoch; 0: as many as the data set says that it has
    image_column: str = ""  # "": the one column of images
    caption_column: str = ""  # "": caption, captions, text, whichever is there first
    label_column: str = ""  # "": label, if it is there


@dataclass
class DataConfig:
    """Captioned pictures. ``source``: "emoji" (default), "stamps" or "shapes" compose scenes of 1 to ``scene_objects`` objects;
    "folder" and "webdataset" read ``path``, which may be a URL of shards; "huggingface" the data set of that name or directory.

    ``crop``: "center" is the center square, resized once (Lanczos); "adm" the same by ADM's steps, which published ImageNet
    numbers use; "random" a random square of a random scale in training, "adm" elsewhere.
    """

    source: Literal["emoji", "stamps", "shapes", "folder", "webdataset", "huggingface"] = "emoji"
    path: str = ""
    image_size: int = 64
    objects: int = 128  # scenes: how many distinct objects to use; 0 means all
    scene_objects: int = 4  # scenes: at most this many objects a scene
    min_scene_objects: int = 1
    held_out_objects: int = 32  # scenes: further objects that training never sees
    jitter: float = 1.0  # scenes: how much of the variation in place and size that the caption does not tell, in [0, 1]
    seed: int = 0
    crop: Literal["center", "adm", "random"] = "center"  # files: what is kept of a picture that is not square
    crop_min: float = 0.8  # crop=random: the square's side is at least this share of the short side (ADM: 0.8)
    flip: bool = False  # files: half of the training pictures mirrored, whatever their captions say of left and right
    caption_lines: bool = True  # files: each line of a .txt is a caption; False: the lines are one caption
    # Files: what training does not see, for previews and for captions of classes. A share of ``path`` (0: all of it trains), or
    # with validation_path the pictures there, of the same source: then all of ``path`` trains.
    validation_share: float = 0.05
    validation_path: str = ""
    # Shards and streams are read nearly in order: an epoch shuffles the shards and then within windows of so many pictures,
    # and each batch is composed of ``read_streams`` such windows in different places.
    shuffle_buffer: int = 4096
    read_streams: int = 16
    huggingface: HuggingFaceConfig = field(default_factory=HuggingFaceConfig)

    def __post_init__(self) -> None:
        if not 0 < self.crop_min <= 1:
            raise InputError(f"crop_min must be in (0, 1], got {self.crop_min}")
        for name in ("shuffle_buffer", "read_streams"):
            _require_positive(self, name)
        _require_range(self.huggingface, "length", 0)
        if not 0 <= self.validation_share < 1:
            raise InputError(f"validation_share must be in [0, 1), got {self.validation_share}")
        if self.validation_path and self.source == "huggingface":
            raise InputError(
                "data.validation_path is for folders and shards; with data.source=huggingface leave it empty "
                "(data.validation_path=) and name the data set's split: data.huggingface.validation_split=validation"
            )

    @property
    def held_out_at(self) -> str:
        """Where the validation pictures are: a path, or a Hugging Face data set's split; "": a share of ``path``."""
        return self.huggingface.validation_split if self.source == "huggingface" else self.validation_path


@dataclass
class AdamConfig:
    """AdamW with linear warm-up and a cosine to ``final_lr`` x lr."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup_steps: int = 50
    final_lr: float = 0.02
    grad_clip: float = 1.0  # largest norm of the gradient; 0 clips nothing

    def __post_init__(self) -> None:
        self.betas = (self.betas[0], self.betas[1])
        for name in ("lr", "weight_decay", "warmup_steps", "final_lr", "grad_clip"):
            _require_range(self, name, 0)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas must be in [0, 1), got {self.betas}")


@dataclass
class OptimConfig(AdamConfig):
    """The optimizer of what a run trains, and the moving average of its weights.

    ``name`` "muon": the blocks' matrices go to Muon (Jordan et al. 2024; torch.optim.Muon, its updates scaled to AdamW's size,
    so that ``lr`` means the same), everything else to AdamW.
    """

    name: Literal["adamw", "muon"] = "adamw"
    ema_decay: float = 0.999  # of the average in final/
    ema_decays: tuple[float, ...] = ()  # of further averages of the same run, in final-ema-DECAY/ beside it

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_range(self, "ema_decay", 0, 1)
        self.ema_decays = tuple(self.ema_decays)
        if not all(0 <= decay <= 1 for decay in self.ema_decays):
            raise InputError(f"ema_decays must be in [0, 1], got {list(self.ema_decays)}")
        if len({self.ema_decay, *self.ema_decays}) <= len(self.ema_decays):
            raise InputError(
                f"ema_decays {list(self.ema_decays)} must differ from each other and from ema_decay {self.ema_decay}"
            )


@dataclass
class LossConfig:
    """Weights of the tokenizer's loss terms, and what shapes them; a weight of 0 skips its term. docs/training.md has the
    formulas, of pixels in [-1, 1], and what weights for [0, 1] are here. ``gan`` above 0 trains a discriminator beside the
    tokenizer."""

    l2: float = 1.0
    gradient: float = 0.0  # l1 between image gradients at three scales: a cheap perceptual stand-in, nothing to download
    lpips: float = 0.0
    lpips_weights: str = ""  # VGG16's weights: a file, a directory or a place on the Hub
    lpips_heads: str = ""  # lpips' linear heads; empty: those in lpips_weights, or those that torchmetrics brings
    kl: float = 1e-6
    codebook: float = 1.0
    commitment: float = 0.25
    entropy: float = 0.0  # vq, fsq: of a latent's choice of code, minus that of all choices together
    entropy_diversity: float = 1.0  # what the second of the two counts
    entropy_temperature: float = 0.01
    gan: float = 0.0
    gan_loss: Literal["hinge", "non-saturating"] = "hinge"
    gan_start: int = 0  # the first step with a discriminator
    gan_adaptive: bool = True  # ``gan`` times the ratio of the two losses' gradients in the decoder's last layer, as VQGAN
    gan_adaptive_max: float = 1e4
    lecam: float = 0.0  # of the discriminator's loss, as r1
    lecam_decay: float = 0.99
    r1: float = 0.0
    r1_interval: int = 16  # the penalty is computed in every so manieth step and counts as often

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            if isinstance(item.default, (int, float)):
                _require_range(self, item.name, 0)
        _require_choice("gan_loss", self.gan_loss, ("hinge", "non-saturating"))
        for name in ("entropy_temperature", "r1_interval"):
            _require_positive(self, name)
        if not self.lecam_decay < 1:
            raise InputError(f"lecam_decay must be below 1, got {self.lecam_decay}")
        if not self.gan and (self.lecam or self.r1):
            raise InputError("loss.lecam and loss.r1 regularise a discriminator: set loss.gan above 0 to train one")


@dataclass
class DiscriminatorConfig:
    """The network that loss.gan trains against the tokenizer, and its optimizer."""

    # "stylegan": StyleGAN2's, the published kind; "patchgan": pix2pix's; "frozen": heads on a frozen network's features
    kind: Literal["stylegan", "patchgan", "frozen"] = "stylegan"
    channel_base: int = 16384  # stylegan: channels at S x S are channel_base / S, at most channel_max
    channel_max: int = 512
    stddev_group: int = 4  # stylegan: pictures whose standard deviation is a feature; 0: no such feature
    channels: int = 64  # patchgan: of the first layer
    layers: int = 3  # patchgan: that halve the picture
    backbone: str = ""  # frozen: a vision model of transformers, by directory or Hub id
    feature_layers: tuple[int, ...] = ()  # frozen: of its hidden states, 0 the first; empty: five, evenly
    head_kernel: int = 9  # frozen: of a head's convolution along the tokens
    # Decay, rates and momenta of MAGVIT's discriminator (its beta_1 is 0).
    optim: AdamConfig = field(
        default_factory=lambda: AdamConfig(lr=1e-4, betas=(0.0, 0.99), weight_decay=0.0, warmup_steps=0, final_lr=0.02)
    )

    def __post_init__(self) -> None:
        self.feature_layers = tuple(self.feature_layers)
        _require_choice("kind", self.kind, ("stylegan", "patchgan", "frozen"))
        for name in ("channel_base", "channel_max", "channels", "layers", "head_kernel"):
            _require_positive(self, name)
        _require_range(self, "stddev_group", 0)
        if self.head_kernel % 2 == 0:
            raise InputError(f"head_kernel must be odd, got {self.head_kernel}")


@dataclass
class RunConfig:
    """What every training run shares.

    ``batch_size`` is the whole step's: processes x ``gradient_accumulation`` must divide it, and each of these parts is one
    forward pass. So a run is the same, up to rounding, on any number of processes, and can be continued on another one.
    docs/training.md says which of these settings go together.
    """

    output_dir: str = "runs/textok"
    steps: int = 1000
    batch_size: int = 32  # pictures a step, those of all processes together
    gradient_accumulation: int = 1  # passes a step in which each process computes its share, for memory
    parallel: Literal["ddp", "fsdp"] = "ddp"  # of several processes: whole weights on each, or a part of them (FSDP2)
    mixed_precision: Literal["no", "bf16", "fp8"] = "no"  # fp8: bf16, and the blocks' products in 8 bits by torchao
    compile: bool = False  # the transformer blocks through torch.compile
    activation_checkpointing: bool = False  # blocks keep their inputs and run again in the backward pass, for memory
    timeout: float = 1800.0  # seconds that a process waits for the others before it gives up
    seed: int = 0
    workers: int = 0  # data-loader processes
    log_every: int = 20
    sample_every: int = 500
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    tensorboard: bool = True

    def __post_init__(self) -> None:
        every = ("log_every", "sample_every", "checkpoint_every", "keep_checkpoints")
        for name in ("steps", "batch_size", "gradient_accumulation", *every):
            _require_positive(self, name)
        _require_positive(self, "timeout")
        for name in ("seed", "workers"):
            _require_range(self, name, 0)


@dataclass
class TokenizerTrainConfig:
    """``textok-fast train tokenizer``."""

    model: TexTokConfig = field(default_factory=lambda: TexTokConfig.named("tiny", image_size=64))
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    run: RunConfig = field(default_factory=RunConfig)
    caption_dropout: float = 0.1  # chance that a training caption becomes the null caption

    def __post_init__(self) -> None:
        if self.data.image_size != self.model.image_size:
            raise InputError(
                f"data.image_size {self.data.image_size} and model.image_size {self.model.image_size} must be equal"
            )
        _require_range(self, "caption_dropout", 0, 1)
        if self.loss.entropy and self.model.bottleneck not in ("vq", "fsq"):
            raise InputError(f"loss.entropy is of the choice of codes: model.bottleneck={self.model.bottleneck} has none")
        if self.loss.r1 and self.discriminator.kind == "frozen":
            raise InputError(
                "loss.r1 is for a discriminator that learns all its layers; a frozen one has spectral norms instead"
            )
        group = self.discriminator.stddev_group
        if self.loss.gan and self.discriminator.kind == "stylegan" and group and self.run.batch_size % group:
            raise InputError(
                f"run.batch_size {self.run.batch_size} is not a multiple of discriminator.stddev_group {group}; change one of "
                "them (0: no such feature)"
            )


@dataclass
class LowResolutionConfig:
    """Super-resolution: the generator reads, beside the caption, the picture it is to make ``scale`` times smaller.

    The small picture is cut into patches, and these join the DiT's sequence (``DiTConfig.image_token_dim``): raw pixels, so
    that nothing of what it shows is lost before the generator sees it.
    """

    scale: int = 0  # 4: a picture of a quarter of the sides; 0: no super-resolution
    patch_size: int = 4  # pixels of the small picture a token
    strength: float = 1.0  # of the degradations, see data.degradation; 0 is bicubic resampling alone
    seed: int = 0  # of the degradations; a picture's depend on this, the epoch and its index

    def __post_init__(self) -> None:
        for name in ("scale", "seed"):
            _require_range(self, name, 0)
        _require_positive(self, "patch_size")
        _require_range(self, "strength", 0, 1)
        if self.scale == 1:
            raise InputError("low_resolution.scale must be 2 or more, or 0 for no super-resolution")

    def size(self, image_size: int) -> int:
        """The side of the small picture; InputError where it would not be whole, or not of whole patches."""
        size = image_size // self.scale
        if size * self.scale != image_size or size % self.patch_size:
            raise InputError(
                f"low_resolution: {image_size} px at scale {self.scale} and patch_size {self.patch_size} do not come out even; "
                f"{image_size} must be a multiple of {self.scale * self.patch_size}"
            )
        return size


@dataclass
class AlignmentConfig:
    """Representation alignment (REPA, arXiv 2410.06940): a block's tokens, through a projection, are to tell the features that
    a frozen network finds in the clean picture. Defaults are REPA's."""

    encoder: str = ""  # a transformers vision model, by directory or Hub id; empty: no alignment
    block: int = 8  # after how many of the blocks
    weight: float = 0.5
    width: int = 2048  # of the projection's hidden layers
    image_size: int = 0  # the side that pictures are resized to for the encoder; 0: its own

    def __post_init__(self) -> None:
        for name in ("block", "width"):
            _require_positive(self, name)
        for name in ("weight", "image_size"):
            _require_range(self, name, 0)


@dataclass
class GeneratorTrainConfig:
    """``textok-fast train generator``: a DiT over the tokens of ``tokenizer`` (a directory or Hub id).

    ``prediction`` is what a Gaussian model's output means; a flow's is its velocity. ``model.time_scale`` follows
    ``objective``: a flow's t in [0, 1] is multiplied by 1,000, a Gaussian step's number is taken as it is. The model's
    ``image_token_dim`` and ``num_image_tokens`` follow ``low_resolution``.

    ``weighting`` of the loss by time: "min-snr" (arXiv 2303.09556) of a Gaussian model's, "logit-normal" (SD3, arXiv
    2403.03206) of a flow's at uniform times; ``times`` "logit-normal" draws a flow's times so instead.
    """

    tokenizer: str = "runs/textok/final"
    model: DiTConfig = field(
        default_factory=lambda: DiTConfig.named(
            "tiny", num_tokens=32, num_classes=0, text_dim=384, learn_sigma=False, time_scale=1000.0
        )
    )
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(output_dir="runs/generator"))
    objective: Literal["gaussian", "flow"] = "flow"
    prediction: Literal["epsilon", "v", "x0"] = "epsilon"
    times: Literal["uniform", "logit-normal"] = "uniform"
    weighting: Literal["none", "min-snr", "logit-normal"] = "none"
    min_snr_gamma: float = 5.0
    logit_mean: float = 0.0  # of the normal that times or weights are the sigmoid of
    logit_std: float = 1.0
    low_resolution: LowResolutionConfig = field(default_factory=LowResolutionConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    # How many pictures' tokens are computed once and trained on; of more pictures data.seed draws them. 0: all pictures of
    # files, 8,192 generated scenes.
    cache_images: int = 0
    # Of a picture with several captions so many are encoded, of which training draws one by run.seed, epoch and key; 0: all.
    cache_captions: int = 0
    token_cache: str = ""  # directory of the cached tokens; default: inside the run

    def __post_init__(self) -> None:
        for name in ("cache_images", "cache_captions"):
            _require_range(self, name, 0)
        if self.objective == "flow" and self.prediction != "epsilon":
            raise InputError(f"prediction={self.prediction} is for objective=gaussian; a flow predicts its velocity")
        for name in ("min_snr_gamma", "logit_std"):
            _require_positive(self, name)
        if self.weighting == "min-snr" and self.objective == "flow":
            raise InputError(
                "weighting=min-snr is for objective=gaussian; a flow has times=logit-normal or weighting=logit-normal"
            )
        if self.objective == "gaussian" and "logit-normal" in (self.times, self.weighting):
            raise InputError("logit-normal times and weights are for objective=flow; Gaussian diffusion has weighting=min-snr")
        if self.times == self.weighting == "logit-normal":
            raise InputError("times=logit-normal and weighting=logit-normal are two ways to the same: choose one")
        self.model = dataclasses.replace(self.model, time_scale=1000.0 if self.objective == "flow" else 1.0)
        if self.low_resolution.scale:
            grid = self.low_resolution.size(self.data.image_size) // self.low_resolution.patch_size
            sizes = {"image_token_dim": 3 * self.low_resolution.patch_size**2, "num_image_tokens": grid**2}
            self.model = dataclasses.replace(self.model, **sizes)  # type: ignore[arg-type]
        elif self.model.image_token_dim:
            raise InputError("model.image_token_dim follows low_resolution: set low_resolution.scale, such as 4")
        if self.alignment.encoder and self.alignment.block > self.model.depth:
            raise InputError(f"alignment.block {self.alignment.block} is behind the model's {self.model.depth} blocks")


# -- recipes and loading --------------------------------------------------------------------------------------------------

# Settings by name: textok_fast/recipes/NAME.yaml, see that package. A recipe has a section for each kind of run that it is for.
RECIPES = Path(__file__).parent / "recipes"
SECTIONS: dict[type, str] = {TokenizerTrainConfig: "tokenizer", GeneratorTrainConfig: "generator"}

_SIZED = frozenset({"width", "depth", "heads", "encoder_depth", "decoder_depth"})  # the fields of the tables of sizes

C = TypeVar("C")


def load_config(cls: type[C], recipe: str | None = None, file: str | Path | None = None, overrides: Iterable[str] = ()) -> C:
    """Builds ``cls`` from a recipe (:func:`read_recipe`), a YAML file and ``key.sub=value`` strings, later ones winning.

    A nested ``size`` key (``model.size=base``) takes its row from the table of sizes. Raises :class:`InputError` for an
    unknown recipe, a missing or malformed file, an unknown key or a value of the wrong type.
    """
    values: dict[str, Any] = {} if recipe is None else read_recipe(cls, recipe)
    if file is not None:
        values = _lay_over(values, read_yaml(file))
    given: dict[str, Any] = {}
    for item in overrides:
        given = _merge(given, _parse_override(item))
    return from_mapping(cls, _lay_over(values, given))


def recipe_names(cls: type | None = None) -> list[str]:
    """The recipes that come with the library; those with a section for ``cls``, if given."""
    wanted = "|".join(SECTIONS.values()) if cls is None else SECTIONS[cls]
    has_section = re.compile(rf"^({wanted}):", re.MULTILINE)  # reading them all as YAML would slow --help down
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if has_section.search(path.read_text(encoding="utf-8")))


def recipe_path(name: str) -> Path:
    """The file of a recipe, which is a name or the path of a .yaml file; InputError for neither."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise InputError(f"unknown recipe {name!r}; known: {', '.join(recipe_names())}, or the path of a .yaml file")
    return path


def read_recipe(cls: type, name: str) -> dict[str, Any]:
    """The settings for ``cls`` that a recipe names, those of the recipe it ``extends`` beneath.

    Raises: InputError for an unknown recipe, one that is not for ``cls``, and one that is malformed.
    """
    found = _read_recipe(name, ())
    section = SECTIONS[cls]
    if section not in found["own"]:
        raise InputError(f"the recipe {name!r} is not for a {section}; known: {', '.join(recipe_names(cls))}")
    return dict(found[section])


def recipe_about(name: str) -> str:
    """What a recipe says of itself in a line."""
    return str(_read_recipe(name, ())["about"])


def recipe_sections(name: str) -> list[str]:
    """The kinds of run that a recipe is for."""
    return list(_read_recipe(name, ())["own"])


def _read_recipe(name: str, extending: tuple[str, ...]) -> dict[str, Any]:
    """A recipe's sections, with what it extends, and which are its ``own``: only these it is for."""
    path = recipe_path(name)
    if name in extending:
        raise InputError(f"recipes extend each other: {' -> '.join((*extending, name))}")
    values = read_yaml(path)
    sections = set(SECTIONS.values())
    if unknown := sorted(set(values) - sections - {"about", "extends"}):
        raise InputError(
            f"{path} has {', '.join(map(str, unknown))}; a recipe has about, extends, {', '.join(sorted(sections))}"
        )
    own = {section: {} if values[section] is None else values[section] for section in sections & set(values)}
    for section, settings in own.items():
        if not isinstance(settings, dict):
            raise InputError(f"{path}: {section} must hold a mapping of settings, found {type(settings).__name__}")
    base = _read_recipe(str(values["extends"]), (*extending, name)) if "extends" in values else {}
    layered = {section: _lay_over(base.get(section, {}), settings) for section, settings in own.items()}
    return {**base, **layered, "about": values.get("about", ""), "own": sorted(own)}


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; :class:`InputError` when there is none."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the configuration {file}: {error}") from None
    try:
        loaded = _yaml(text)
    except yaml.YAMLError as error:
        raise InputError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise InputError(f"{file} must hold a mapping of settings, found {type(loaded).__name__}")
    return loaded


def from_mapping(cls: type[C], values: Mapping[str, Any]) -> C:
    """``cls`` from plain values, fields that are left out keeping their defaults. Types are checked, strings converted."""
    complete = _fill_nested(cls, values)
    from pydantic import ValidationError

    try:
        return _adapter(cls).validate_python(complete)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, InputError):
            raise cause from None
        where = ".".join(str(part) for part in first["loc"]) or cls.__name__
        if first["type"] == "unexpected_keyword_argument":
            raise InputError(f"{cls.__name__} has no setting {where}; {_nearest_setting(cls, where)}") from None
        raise InputError(f"{cls.__name__}: {where}: {first['msg']} (got {first['input']!r})") from None


def _nearest_setting(cls: type, given: str) -> str:
    """What somebody may have meant by a setting that there is not."""
    names = list(_setting_names(cls))
    if near := difflib.get_close_matches(given, names, n=1):
        return f"did you mean {near[0]}?"
    group = given.rpartition(".")[0]
    return f"known: {', '.join(name for name in names if name.rpartition('.')[0] == group)}"


def _setting_names(cls: type, prefix: str = "") -> Iterator[str]:
    """All settings, groups among them: "data", "data.source" and so on."""
    if hasattr(cls, "named"):
        yield f"{prefix}size"
    for item in dataclasses.fields(cls):
        yield f"{prefix}{item.name}"
        default = item.default_factory() if item.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(default):
            yield from _setting_names(type(default), f"{prefix}{item.name}.")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain, JSON- and YAML-ready values of a configuration."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


@functools.cache
def _adapter(cls: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter, with_config

    def forbid_extra(kind: type, seen: set[type]) -> None:
        if kind in seen:
            return
        seen.add(kind)
        with_config(ConfigDict(extra="forbid", coerce_numbers_to_str=True))(kind)
        for item in dataclasses.fields(kind):
            default = item.default_factory() if item.default_factory is not dataclasses.MISSING else None
            if dataclasses.is_dataclass(default):
                forbid_extra(type(default), seen)

    forbid_extra(cls, set())
    return TypeAdapter(cls)


def _fill_nested(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Resolves ``size`` and lays partial nested mappings over the nested defaults."""
    values = dict(values)
    has_field = any(item.name == "size" for item in dataclasses.fields(cls))  # then a size is only what that class says
    size = None if has_field else values.pop("size", None)
    if size is not None and hasattr(cls, "named"):
        named = to_dict(cls.named(str(size), **_size_inputs(cls, values)))
        derived = {"fsq_levels"}  # depends on fields that may still change below
        values = _merge({k: v for k, v in named.items() if k not in derived}, values)
    elif size is not None:
        raise InputError(f"{cls.__name__} has no named sizes (got size={size!r})")
    for item in dataclasses.fields(cls):
        if item.name in values and item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
            given = values[item.name]
            if dataclasses.is_dataclass(default) and isinstance(given, Mapping):
                if "size" not in given:
                    given = _merge(to_dict(default), given)
                values[item.name] = _fill_nested(type(default), given)
    return values


def _size_inputs(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that ``named`` derives others from, typed, so that ``model.size=tiny model.image_size=64`` works."""
    wanted = ("image_size", "patch_size", "text_encoder") if cls is TexTokConfig else ("num_tokens", "input_size", "patch_size")
    found: dict[str, Any] = {}
    for name in wanted:
        if name in values:
            try:
                found[name] = str(values[name]) if name == "text_encoder" else int(values[name])
            except (TypeError, ValueError):
                raise InputError(f"{cls.__name__}: {name}: wanted a whole number (got {values[name]!r})") from None
    return found


def _parse_override(item: str) -> dict[str, Any]:
    key, separator, text = item.partition("=")
    if not separator or not key:
        raise InputError(f"an override is written key=value or key.sub=value, got {item!r}")
    # A plain word or number stays as it was typed: the field's type decides what it is, and no path loses what follows a "#".
    value: Any = text
    if text.lstrip().startswith(("[", "{", "'", '"')):
        with contextlib.suppress(yaml.YAMLError):
            value = _yaml(text)
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


class _Loader(yaml.SafeLoader):
    """YAML whose only booleans are true and false, as in YAML 1.2: ``mixed_precision: no`` is a word."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def _yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def _lay_over(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """``top`` over ``base``; a ``size`` in ``top`` replaces what ``base`` says about the fields that a size decides."""

    def without_sized(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in base.items() if "size" not in top or key not in _SIZED}
        for key, value in kept.items():
            if isinstance(value, Mapping) and isinstance(top.get(key), Mapping):
                kept[key] = without_sized(value, top[key])
        return kept

    return _merge(without_sized(base, top), top)


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        merged[key] = (
            _merge(merged[key], value) if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) else value
        )
    return merged


def _construct(cls: type[C], values: dict[str, Any]) -> C:
    unknown = set(values) - {item.name for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown:
        raise InputError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}")
    return cls(**values)


def _size_row(table: dict[str, dict[str, int]], size: str) -> dict[str, int]:
    if size not in table:
        raise InputError(f"unknown size {size!r}; known: {', '.join(table)}")
    return table[size]


def _require_positive(config: Any, name: str) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{name} must be a number, got {value!r}")
    counts = isinstance(value, int) and not isinstance(getattr(type(config), name, value), float)  # by the field's default
    if not (value >= 1 if counts else 0 < value < math.inf):
        raise InputError(f"{name} must be {'at least 1' if counts else 'above 0'}, got {value}")


def _require_range(config: Any, name: str, low: float, high: float = math.inf) -> None:
    if not low <= getattr(config, name) <= high:
        wanted = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
        raise InputError(f"{name} must be {wanted}, got {getattr(config, name)}")


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def _near_divisor(size: int, patch: int) -> int:
    return min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: (abs(d - patch), d))


def _default_fsq_levels(latent_dim: int) -> tuple[int, ...]:
    for levels in FSQ_LEVELS.values():
        if len(levels) == latent_dim:
            return levels
    return (4,) * latent_dim
