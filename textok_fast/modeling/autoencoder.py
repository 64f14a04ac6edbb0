"""Stable Diffusion's autoencoder in a tokenizer's place: diffusers' AutoencoderKL, with the calls of :class:`TexTok`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from textok_fast.errors import InputError
from textok_fast.files import write_text
from textok_fast.modeling.dit import DiT
from textok_fast.modeling.saving import CONFIG_NAME, load_state, read_config
from textok_fast.modeling.shipped import find_model
from textok_fast.modeling.tokenizer import Captions, Images, TexTok, Tokens, check_images, from_uint8, to_uint8

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"  # diffusers'
SD_VAE: dict[str, Any] = {  # of Stable Diffusion 1 and of DiT: f8, 4 channels
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 256,
}


def build_autoencoder(config: Mapping[str, Any] | None = None) -> nn.Module:
    """diffusers' AutoencoderKL of a config.json; None or an empty one is Stable Diffusion 1's. InputError without diffusers."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise InputError("the SD-VAE runs through diffusers: pip install 'textok-fast[bench]'") from None
    try:
        built: nn.Module = AutoencoderKL.from_config(dict(config or SD_VAE))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"this is no configuration of an AutoencoderKL: {error}") from None
    return built.eval()


def is_autoencoder(model: object) -> TypeGuard[nn.Module]:
    """Whether ``model`` is diffusers' AutoencoderKL, of which there is none before diffusers is imported."""
    diffusers = sys.modules.get("diffusers")
    return diffusers is not None and isinstance(model, diffusers.AutoencoderKL)


@dataclass(frozen=True)
class LatentConfig:
    """Pictures of ``image_size`` S and latents (channels, S / factor, S / factor), which are (raw - shift) scale."""

    image_size: int
    channels: int
    factor: int
    scale: float
    shift: float = 0.0


class LatentTokenizer(nn.Module):
    """An autoencoder with :class:`TexTok`'s ``encode`` and ``decode``; its latents (B, C, h, w) are the tokens.

    Latents are scaled as generators see them, by the autoencoder's ``scaling_factor`` (0.18215 of the SD-VAE) after its
    ``shift_factor``. Captions are taken and not read.

    Args:
        vae: diffusers' AutoencoderKL, or an engine of one.
        image_size: of the pictures; None for the autoencoder's ``sample_size``.

    Raises: InputError for a size that is no multiple of the factor, and an autoencoder that scales each channel by itself.
    """

    def __init__(self, vae: Any, image_size: int | None = None) -> None:
        super().__init__()
        self.vae, about = vae, vae.config
        size = about.sample_size if image_size is None else image_size
        size = int(size[0] if isinstance(size, (list, tuple)) else size)
        factor = 2 ** (len(about.block_out_channels) - 1)
        if size < 1 or size % factor:
            raise InputError(f"pictures of an autoencoder f{factor} have a multiple of {factor} pixels, got image_size={size}")
        if getattr(about, "latents_mean", None) or getattr(about, "latents_std", None):
            raise InputError("latents with a mean and a deviation for each channel (latents_mean, latents_std) are not taken")
        shift = getattr(about, "shift_factor", None) or 0.0
        self.config = LatentConfig(size, int(about.latent_channels), factor, float(about.scaling_factor), float(shift))

    # -- saving -------------------------------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | Path) -> Path:
        """Writes what diffusers' ``AutoencoderKL.from_pretrained`` reads too, with this image size; returns the directory."""
        directory = Path(directory)
        self.vae.save_pretrained(directory)
        about = {**read_config(directory), "sample_size": self.config.image_size}
        write_text(directory / CONFIG_NAME, json.dumps(about, indent=2) + "\n")
        return directory

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, device: str | torch.device = "cpu") -> LatentTokenizer:
        """Loads a directory that :meth:`save_pretrained` wrote, in eval mode. InputError, naming the key, for another one."""
        directory = Path(directory).expanduser()
        vae = build_autoencoder(read_config(directory, "a saved autoencoder"))
        try:
            state = load_file(directory / WEIGHTS_NAME)
        except FileNotFoundError:
            raise InputError(f"{directory} has no {WEIGHTS_NAME}") from None
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot read {directory / WEIGHTS_NAME}: {error}") from None
        load_state(vae, state, str(directory))
        return cls(vae.to(device)).eval()

    # -- the interface ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, images: Images, captions: Captions = None) -> Tokens:
        """Pictures, as :meth:`TexTok.encode` takes them -> latents (B, C, h, w): the posterior's mean, ``.sample()`` draws."""
        pixels = check_images(images, self.config.image_size, self.device, self.dtype)
        pixels = from_uint8(pixels).to(self.dtype) if pixels.dtype == torch.uint8 else pixels  # (B, 3, S, S)
        posterior = self.vae.encode(pixels, return_dict=False)[0]
        mean = (posterior.mode() - self.config.shift) * self.config.scale  # (B, C, h, w)
        return Tokens.wrap(mean, None, (mean, posterior.std * self.config.scale))

    @torch.no_grad()
    def decode(self, tokens: Tensor, captions: Captions = None, output: Literal["float", "uint8"] = "float") -> Tensor:
        """Latents (B, C, h, w) -> pictures, float (B, 3, S, S) in [-1, 1] or uint8 (B, S, S, 3).

        Raises: InputError for a wrong shape, dtype, NaN or infinity.
        """
        if output not in ("float", "uint8"):
            raise InputError(f"output must be 'float' or 'uint8', got {output!r}")
        wanted = token_shape(self)
        if not isinstance(tokens, Tensor) or not tokens.is_floating_point() or tuple(tokens.shape[1:]) != wanted:
            got = f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
            raise InputError(f"latents must be float (B, {', '.join(map(str, wanted))}), got {got}")
        if not bool(torch.isfinite(tokens).all()):
            raise InputError("latents contain NaN or infinity")
        # Scaled before it is rounded to the autoencoder's dtype.
        z = tokens.as_subclass(Tensor).to(self.device) / self.config.scale + self.config.shift
        pixels = self.vae.decode(z.to(self.dtype), return_dict=False)[0]  # (B, 3, S, S)
        return to_uint8(pixels) if output == "uint8" else pixels.clamp(-1.0, 1.0)

    @property
    def device(self) -> torch.device:
        found: torch.device = self.vae.device
        return found

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.vae.dtype
        return found


def latent_tokenizer(vae: Any, generator: DiT) -> LatentTokenizer:
    """``vae`` in a tokenizer's place for pictures of the size that ``generator`` makes latents for."""
    size = generator.config.input_size
    return LatentTokenizer(vae, size * 2 ** (len(vae.config.block_out_channels) - 1) if size else None)


def token_shape(tokenizer: TexTok | LatentTokenizer) -> tuple[int, ...]:
    """One picture's tokens: (N, d), or latents (C, h, w)."""
    config = tokenizer.config
    if isinstance(config, LatentConfig):
        side = config.image_size // config.factor
        return config.channels, side, side
    return config.num_tokens, config.latent_dim


def load_tokenizer(source: str | Path, device: str | torch.device = "cpu") -> TexTok | LatentTokenizer:
    """What a directory holds, or a pipeline's directory as its tokenizer: a :class:`TexTok` (also by its Hub id or a shipped
    name) or an AutoencoderKL that ``textok-fast convert`` wrote."""
    path = find_model(source)
    if not (path / CONFIG_NAME).is_file() and (path / TexTok.folder / CONFIG_NAME).is_file():
        source = path = path / TexTok.folder
    if (path / CONFIG_NAME).is_file() and read_config(path).get("_class_name") == "AutoencoderKL":
        return LatentTokenizer.from_pretrained(path, device=device)
    return TexTok.from_pretrained(source, device=device)
