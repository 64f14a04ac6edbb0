"""TexTok: image + caption -> a few tokens -> image (Zha et al., arXiv 2412.05796)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from textok_fast import ops
from textok_fast.config import TexTokConfig
from textok_fast.errors import InputError
from textok_fast.modeling.bottlenecks import BottleneckOutput, build_bottleneck
from textok_fast.modeling.layers import RotaryPositions, RowModulation, TextProjection, TextTokens, ViTBlock, run_blocks
from textok_fast.modeling.saving import PretrainedMixin
from textok_fast.modeling.text_encoders import TextEncoder, TextFeatures, load_text_encoder

Images = Image.Image | Sequence[Image.Image] | np.ndarray | Tensor
Captions = Sequence[str | None] | str | TextFeatures | tuple[Tensor, Tensor] | Tensor | None


class Encoder(nn.Module):
    """ViT over [patches, latents, text] with full self-attention; the latents' outputs are projected to d channels.

    Registers stand behind the latents, in one parameter with them.
    """

    def __init__(self, config: TexTokConfig, out_dim: int) -> None:
        super().__init__()
        width = config.width
        self.patch_size = config.patch_size
        self.latent_rows = slice(config.num_patches, config.num_patches + config.num_tokens)
        self.patch_embed = nn.Linear(3 * config.patch_size**2, width)
        self.patch_positions = nn.Parameter(torch.empty(config.num_patches, width))
        self.latents = nn.Parameter(torch.empty(config.num_tokens + config.registers, width))
        positions = config.max_text_tokens if config.text_positions else 0
        self.text = TextProjection(config.text_dim, width, positions) if config.text_in_encoder else None
        self.pre_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.pre_norm else None
        self.rope = (
            RotaryPositions(config.encoder_depth, config.heads, width // config.heads, config.grid) if config.rope else None
        )
        self.blocks = nn.ModuleList(
            ViTBlock(width, config.heads, config.mlp_ratio, config.norm_eps) for _ in range(config.encoder_depth)
        )
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.to_latents = nn.Linear(width, out_dim)

    def forward(self, pixels: Tensor, text: TextFeatures | None) -> Tensor:
        """pixels (B, 3, S, S) in [-1, 1], or uint8 (B, S, S, 3) -> (B, N, out_dim)."""
        if pixels.dtype == torch.uint8:
            patches = ops.patchify_uint8(pixels, self.patch_size, self.patch_embed.weight.dtype)  # (B, hw, 3 p p)
        else:
            patches = ops.patchify(pixels, self.patch_size)  # (B, hw, 3 p p)
        patches = self.patch_embed(patches) + self.patch_positions  # (B, hw, D)
        latents = self.latents.expand(pixels.shape[0], -1, -1)  # (B, N + R, D)
        tokens = None if self.text is None else self.text(text, pixels.shape[0])
        x, mask = join_text(torch.cat([patches, latents], dim=1), tokens)  # (B, hw + N + R + N_t, D)
        x, rotaries = x if self.pre_norm is None else self.pre_norm(x), None if self.rope is None else self.rope(0)
        return self.to_latents(run_blocks(self.blocks, self.norm, x, mask, self.latent_rows, rotaries))  # (B, N, out_dim)


class Decoder(nn.Module):
    """ViT over [patch queries, latents, text]; the queries' outputs are projected to pixels.

    Registers stand behind the patch queries, in one parameter with them.
    """

    def __init__(self, config: TexTokConfig) -> None:
        super().__init__()
        width, heads = config.decoder_sizes
        self.patch_size = config.patch_size
        self.patch_rows = slice(0, config.num_patches)
        self.queries = nn.Parameter(torch.empty(config.num_patches + config.decoder_registers, width))
        self.from_latents = nn.Linear(config.latent_dim, width)
        self.latent_positions = nn.Parameter(torch.empty(config.num_tokens, width))
        positions = config.max_text_tokens if config.text_positions else 0
        self.text = TextProjection(config.text_dim, width, positions) if config.text_in_decoder else None
        self.pre_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.pre_norm else None
        self.rope = RotaryPositions(config.decoder_depth, heads, width // heads, config.grid) if config.rope else None
        self.blocks = nn.ModuleList(
            ViTBlock(width, heads, config.mlp_ratio, config.norm_eps) for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.to_pixels = nn.Linear(width, 3 * config.patch_size**2)
        self.conv_out = nn.Conv2d(3, 3, 3, padding=1) if config.pixel_conv else None
        self.modulation = (
            nn.ModuleList(nn.Linear(config.latent_dim, 4 * width) for _ in range(config.decoder_depth))
            if config.modulated_decoder
            else None
        )

    def forward(self, latents: Tensor, text: TextFeatures | None) -> Tensor:
        """latents (B, N, d) -> pixels (B, 3, S, S), not clamped."""
        pixels = ops.unpatchify(self.patches(latents, text), self.patch_size)  # (B, 3, S, S)
        return pixels if self.conv_out is None else self.conv_out(pixels)

    def uint8(self, latents: Tensor, text: TextFeatures | None) -> Tensor:
        """latents (B, N, d) -> bytes (B, S, S, 3), rounded to nearest."""
        if self.conv_out is None:
            return ops.unpatchify_uint8(self.patches(latents, text), self.patch_size)
        return to_uint8(self(latents, text))

    def patches(self, latents: Tensor, text: TextFeatures | None) -> Tensor:
        """latents (B, N, d) -> flat patches (B, hw, 3 p p), not clamped, before the convolution of a model that has one."""
        queries = self.queries.expand(latents.shape[0], -1, -1)  # (B, hw + R, D)
        embedded = self.from_latents(latents) + self.latent_positions  # (B, N, D)
        tokens = None if self.text is None else self.text(text, latents.shape[0])
        x, mask = join_text(torch.cat([queries, embedded], dim=1), tokens)  # (B, hw + R + N + N_t, D)
        x, rotaries = x if self.pre_norm is None else self.pre_norm(x), None if self.rope is None else self.rope(0)
        modulations = self.modulations(latents)
        hidden = run_blocks(self.blocks, self.norm, x, mask, self.patch_rows, rotaries, modulations)  # (B, hw, D)
        return self.to_pixels(hidden)  # (B, hw, 3 p p)

    def modulations(self, latents: Tensor) -> list[RowModulation] | None:
        """latents (B, N, d) -> for each block how it modulates their rows; None for a model that does not."""
        if self.modulation is None:
            return None
        activated, start = F.silu(latents), len(self.queries)  # (B, N, d)
        return [RowModulation.of(linear(activated), start) for linear in self.modulation]


def join_text(x: Tensor, text: TextTokens | None) -> tuple[Tensor, Tensor | None]:
    """Appends text tokens to a sequence; the mask lets everything attend to everything but text padding."""
    if text is None:
        return x, None
    own = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)  # (B, N)
    return torch.cat([x, text.tokens], dim=1), torch.cat([own, text.mask], dim=1)


class Tokens(Tensor):
    """What :meth:`TexTok.encode` returns: a (B, N, d) tensor that also carries what its bottleneck knows.

    ``indices`` (B, N) int64 for VQ and FSQ, else None. ``to``, ``cpu``, ``cuda`` and copies keep all of it; arithmetic and
    indexing give plain values (``indices`` None), and so does ``torch.save``.
    """

    indices: Tensor | None = None  # type: ignore[assignment]
    _posterior: tuple[Tensor, Tensor] | None = None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def wrap(values: Tensor, indices: Tensor | None = None, posterior: tuple[Tensor, Tensor] | None = None) -> Tokens:
        """``posterior``: mean and standard deviation (B, N, d), in the same normalised units as ``values``."""
        tokens = values.detach().as_subclass(Tokens)
        tokens.indices, tokens._posterior = indices, posterior
        return tokens

    def to(self, *args: Any, **kwargs: Any) -> Tokens:
        """As ``Tensor.to``; the indices follow to the device and stay int64."""
        values = self.as_subclass(Tensor).to(*args, **kwargs)
        posterior = self._posterior and (self._posterior[0].to(*args, **kwargs), self._posterior[1].to(*args, **kwargs))
        return Tokens.wrap(values, None if self.indices is None else self.indices.to(values.device), posterior)

    def cpu(self, *args: Any, **kwargs: Any) -> Tokens:
        return self.to("cpu")

    def cuda(self, device: Any = "cuda", *args: Any, **kwargs: Any) -> Tokens:
        return self.to(device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tokens:
        return Tokens.wrap(self.as_subclass(Tensor).clone(), copy.deepcopy(self.indices), copy.deepcopy(self._posterior))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def mode(self) -> Tensor:  # type: ignore[override]
        """The most likely tokens (B, N, d): the posterior's mean for KL, the tokens themselves otherwise."""
        return self.as_subclass(Tensor) if self._posterior is None else self._posterior[0]

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Tokens (B, N, d) drawn from the KL posterior; without one, the tokens themselves."""
        if self._posterior is None:
            return self.as_subclass(Tensor)
        mean, std = self._posterior
        source = mean.device if generator is None else generator.device
        return mean + std * torch.randn(mean.shape, generator=generator, device=source, dtype=mean.dtype).to(mean.device)


class TexTokOutput(NamedTuple):
    """A training pass: the unclamped reconstruction and the bottleneck's latents and loss terms."""

    reconstruction: Tensor  # (B, 3, S, S)
    bottleneck: BottleneckOutput


class TexTok(PretrainedMixin, nn.Module):
    """The tokenizer. ``encode`` and ``decode`` are its interface; calling the module is a training pass.

    The frozen text encoder is not a part of it: it is loaded when the first caption comes as a string, and never saved.
    """

    config_class = TexTokConfig
    model_type = "textok"
    folder = "tokenizer"
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: TexTokConfig) -> None:
        super().__init__()
        self.config = config = dataclasses.replace(config)  # a copy: the statistics stored in it are this model's
        self.bottleneck = build_bottleneck(config)
        self.encoder = Encoder(config, self.bottleneck.in_dim)
        self.decoder = Decoder(config)
        # Kept in config.json, not in the weights, so that a reader of the configuration knows them.
        self.register_buffer("latent_mean", torch.tensor(config.latent_mean or (0.0,) * config.latent_dim), persistent=False)
        self.register_buffer("latent_std", torch.tensor(config.latent_std or (1.0,) * config.latent_dim), persistent=False)
        self._text_encoder: list[TextEncoder] = []  # in a list, so that nn.Module does not see it
        self.apply(_init_weights)
        for parameter in (
            self.encoder.patch_positions,
            self.encoder.latents,
            self.decoder.queries,
            self.decoder.latent_positions,
        ):
            nn.init.trunc_normal_(parameter, std=0.02)

    # -- training ---------------------------------------------------------------------------------------------------

    def forward(self, pixels: Tensor, text: TextFeatures | None = None, noise: Tensor | None = None) -> TexTokOutput:
        """pixels (B, 3, S, S) in [-1, 1] and text features -> reconstruction (B, 3, S, S) and the bottleneck's output.

        ``noise`` (B, N, d), standard normal, is what the KL bottleneck samples with; None draws it.
        """
        bottleneck = self.bottleneck(self.encoder(pixels, text), noise)
        return TexTokOutput(self.decoder(bottleneck.latents, text), bottleneck)

    @property
    def last_layer(self) -> Tensor:
        """The matrix behind the pixels, (3 p p, D), or that of the convolution over them."""
        layer = self.decoder.to_pixels if self.decoder.conv_out is None else self.decoder.conv_out
        return layer.weight

    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Stores the measured mean and standard deviation (d,) of the raw latents in the module and its configuration."""
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)
        self.config.latent_mean = tuple(float(value) for value in mean)
        self.config.latent_std = tuple(float(value) for value in std)

    # -- the interface ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, images: Images, captions: Captions = None) -> Tokens:
        """Pictures and captions -> tokens (B, N, d) of zero mean and unit variance (once statistics are stored).

        Args:
            images: PIL images (one or a list), uint8 (B, S, S, 3), or float (B, 3, S, S) in [-1, 1].
            captions: a list of B strings (None or "" for no caption), text features (B, N_t, D_t) with a bool mask
                (B, N_t), or None for the null caption. Ignored by a tokenizer without text in its encoder.

        Returns: :class:`Tokens`, float, on the model's device: the posterior's mean for KL (``.sample()`` draws from it);
            ``.indices`` (B, N) int64 for VQ and FSQ.
        Raises: InputError (a ValueError) for a wrong shape, size, dtype, range or NaN.
        """
        pixels = self._check_images(images)  # uint8 stays uint8: the encoder's first operation reads it
        return self.encode_pixels(pixels, self.text_features(captions, len(pixels)) if self.config.text_in_encoder else None)

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor, text: TextFeatures | None) -> Tokens:
        """What :meth:`encode` does after its checks: pixels and text features as the encoder takes them -> tokens."""
        out = self.bottleneck(self.encoder(pixels, text))
        posterior = None
        if out.mean is not None and out.logvar is not None:
            posterior = (self.normalize(out.mean), torch.exp(0.5 * out.logvar) / self.latent_std)
        return Tokens.wrap(self.normalize(out.latents if out.mean is None else out.mean), out.indices, posterior)

    @torch.no_grad()
    def decode(self, tokens: Tensor, captions: Captions = None, output: Literal["float", "uint8"] = "float") -> Tensor:
        """Tokens and captions -> pictures.

        Args:
            tokens: (B, N, d) float as :meth:`encode` returns them, or (B, N) int64 indices for VQ and FSQ.
            captions: as for :meth:`encode`. Ignored by a tokenizer without text in its decoder.
            output: "float" for (B, 3, S, S) in [-1, 1], "uint8" for (B, S, S, 3).

        Raises: InputError for a wrong shape, dtype, index or NaN.
        """
        if output not in ("float", "uint8"):
            raise InputError(f"output must be 'float' or 'uint8', got {output!r}")
        latents = self._raw_latents(self._check_tokens(tokens).to(self.device))
        text = self.text_features(captions, len(latents)) if self.config.text_in_decoder else None
        if output == "uint8":
            return self.decoder.uint8(latents, text)
        return self.decoder(latents, text).clamp(-1.0, 1.0)

    def normalize(self, latents: Tensor) -> Tensor:
        """Raw latents (B, N, d) -> tokens: (latents - mean) / std of each channel."""
        return (latents - self.latent_mean) / self.latent_std

    def denormalize(self, tokens: Tensor) -> Tensor:
        """The inverse of :meth:`normalize`."""
        return tokens * self.latent_std + self.latent_mean

    def preprocess(self, images: Images) -> Tensor:
        """Any accepted form of pictures -> float (B, 3, S, S) in [-1, 1] on the model's device and in its dtype."""
        pixels = self._check_images(images)
        return from_uint8(pixels).to(self.dtype) if pixels.dtype == torch.uint8 else pixels

    def _check_images(self, images: Images) -> Tensor:
        return check_images(images, self.config.image_size, self.device, self.dtype)

    def text_features(self, captions: Captions, batch: int) -> TextFeatures | None:
        """Any accepted form of captions -> features (B, N_t, D_t) with mask, or None for the null caption."""
        if captions is None:
            return None
        if isinstance(captions, Tensor):
            captions = (captions, torch.ones(captions.shape[:2], dtype=torch.bool))
        if isinstance(captions, tuple) and len(captions) == 2 and isinstance(captions[0], Tensor):
            features, mask = captions
            if features.ndim != 3 or features.shape[0] != batch or features.shape[2] != self.config.text_dim:
                raise InputError(f"text features must be ({batch}, N_t, {self.config.text_dim}), got {tuple(features.shape)}")
            if not isinstance(mask, Tensor) or mask.shape != features.shape[:2] or mask.dtype != torch.bool:
                raise InputError(f"the text mask must be bool of shape {tuple(features.shape[:2])}, True for a real token")
            if self.config.text_positions and features.shape[1] > self.config.max_text_tokens:
                raise InputError(
                    f"text features have {features.shape[1]} tokens, this tokenizer has positions for "
                    f"{self.config.max_text_tokens} (max_text_tokens)"
                )
            if not features.shape[1]:
                return None
            if not features.is_floating_point() or not bool(torch.isfinite(features[mask.to(features.device)]).all()):
                raise InputError(f"text features must be float, without NaN or infinity at real tokens; got {features.dtype}")
            return TextFeatures(features.to(self.device, self.dtype), mask.to(self.device))
        captions = [captions] if isinstance(captions, str) else list(captions)
        if len(captions) != batch:
            raise InputError(f"got {len(captions)} captions for {batch} images; give one a picture, or None")
        for caption in captions:
            if not (caption is None or isinstance(caption, str)):
                raise InputError(f"captions must be strings or None, got {type(caption).__name__}")
        if not any(captions):
            return None  # without loading an encoder
        features, mask = self.text_encoder([caption or "" for caption in captions])
        return TextFeatures(features.to(self.device, self.dtype), mask.to(self.device))

    @property
    def text_encoder(self) -> TextEncoder:
        """The frozen encoder of ``config.text_encoder``, loaded on first use, to the device that this model is on then.
        Assign to replace it."""
        if not self._text_encoder:
            self.text_encoder = load_text_encoder(
                self.config.text_encoder,
                max_tokens=self.config.max_text_tokens,
                split=self.config.text_split,
                window=self.config.text_window,
                device=self.device,
            )
        return self._text_encoder[0]

    @text_encoder.setter
    def text_encoder(self, encoder: TextEncoder) -> None:
        if encoder.dim != self.config.text_dim:
            raise InputError(
                f"the text encoder {encoder.name} gives features of width {encoder.dim}, this tokenizer was built for "
                f"text_dim={self.config.text_dim} ({self.config.text_encoder})"
            )
        self._text_encoder[:] = [encoder]

    @property
    def device(self) -> torch.device:
        return self.decoder.queries.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.queries.dtype

    def _raw_latents(self, tokens: Tensor) -> Tensor:
        """Checked tokens (B, N, d) or indices (B, N) on the model's device -> raw latents (B, N, d)."""
        if tokens.dtype == torch.int64:
            return self.bottleneck.latents_from_indices(tokens).to(self.dtype)
        return self.denormalize(tokens.to(self.dtype))

    def _check_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens or indices as a plain tensor, checked where they are."""
        if not isinstance(tokens, Tensor):
            raise InputError(f"tokens must be a tensor, got {type(tokens).__name__}")
        tokens = tokens.as_subclass(Tensor)
        n, d = self.config.num_tokens, self.config.latent_dim
        if tokens.dtype == torch.int64 and self.bottleneck.codebook_size:
            if tokens.ndim != 2 or tokens.shape[1] != n:
                raise InputError(f"token indices must be (B, {n}) int64, got {tuple(tokens.shape)}")
            size = self.bottleneck.codebook_size
            if len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) >= size):
                raise InputError(f"token indices must be in [0, {size}), got {int(tokens.min())} to {int(tokens.max())}")
            return tokens
        if not tokens.is_floating_point() or tokens.ndim != 3 or tuple(tokens.shape[1:]) != (n, d):
            also = f" or int64 indices (B, {n})" if self.bottleneck.codebook_size else ""
            raise InputError(f"tokens must be float (B, {n}, {d}){also}, got {tokens.dtype} {tuple(tokens.shape)}")
        if not bool(torch.isfinite(tokens).all()):
            raise InputError("tokens contain NaN or infinity")
        return tokens


def as_image_tensor(images: Images) -> Tensor:
    """PIL images, arrays or tensors as one tensor, unchecked: uint8 (B, H, W, 3) from PIL."""
    if isinstance(images, Tensor):
        return images
    if isinstance(images, np.ndarray):
        if images.dtype.kind not in "biuf":
            raise InputError(f"images must be uint8 or float, got an array of {images.dtype}")
        return torch.from_numpy(np.ascontiguousarray(images))
    if not isinstance(images, (Image.Image, Sequence)):
        raise InputError(f"images must be PIL images, an array or a tensor, got {type(images).__name__}")
    pictures = [images] if isinstance(images, Image.Image) else list(images)
    if not pictures:
        raise InputError("got an empty list of images")
    for index, picture in enumerate(pictures):
        if not isinstance(picture, Image.Image):
            raise InputError(f"images must be PIL images, an array or a tensor; item {index} is {type(picture).__name__}")
        if picture.size != pictures[0].size:
            raise InputError(
                f"images of one batch must have one size; item {index} is {picture.size}, the first is {pictures[0].size}"
            )
    return torch.from_numpy(np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]))  # (B, H, W, 3)


def check_images(images: Images, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Pictures on a model's ``device``: uint8 (B, S, S, 3), or float (B, 3, S, S) in [-1, 1] in its ``dtype``."""
    batch = as_image_tensor(images)
    if batch.dtype == torch.uint8:
        if batch.ndim != 4 or batch.shape[-1] != 3 or batch.shape[1:3] != (size, size):
            raise InputError(
                f"uint8 images must have the shape (B, {size}, {size}, 3), got {tuple(batch.shape)}; "
                "resize or crop them to the model's image_size first"
            )
        pixels = batch.to(device)
    elif batch.is_floating_point():
        if batch.ndim != 4 or tuple(batch.shape[1:]) != (3, size, size):
            raise InputError(f"float images must have the shape (B, 3, {size}, {size}), got {tuple(batch.shape)}")
        pixels = batch.to(device)
        if len(pixels):
            low, high = (float(value) for value in torch.aminmax(pixels.detach()))
            if not (low >= -1.001 and high <= 1.001):  # NaN fails both
                raise InputError(f"float images must lie in [-1, 1] without NaN, got values from {low:.4g} to {high:.4g}")
        pixels = pixels.to(dtype)
    else:
        raise InputError(f"images must be uint8 or float, got {batch.dtype}")
    if not len(pixels):
        raise InputError("got an empty batch of images")
    return pixels


def from_uint8(images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]: x / 127.5 - 1."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_uint8(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) float in [-1, 1] -> (B, H, W, 3) uint8, rounded to nearest."""
    return ((pixels.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
