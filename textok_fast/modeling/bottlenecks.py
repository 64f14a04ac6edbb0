"""Between encoder and decoder: nothing, a Gaussian (KL), a codebook (VQ), fixed levels (FSQ) or mixtures of codes (SoftVQ)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from textok_fast import ops
from textok_fast.config import TexTokConfig


class BottleneckOutput(NamedTuple):
    """``latents`` go to the decoder; ``indices`` exist for discrete bottlenecks, ``mean`` and ``logvar`` for KL."""

    latents: Tensor  # (B, N, d)
    losses: dict[str, Tensor]  # scalars, unweighted, by name: kl, codebook, commitment
    indices: Tensor | None = None  # (B, N) int64
    mean: Tensor | None = None  # (B, N, d)
    logvar: Tensor | None = None  # (B, N, d)
    # Minus the squared distance to every code, (B, N, K) each: of the latent for VQ, of each of its d channels for FSQ.
    affinities: tuple[Tensor, ...] = ()


class Bottleneck(nn.Module):
    """Base class: ``in_dim`` numbers a token come from the encoder, ``dim`` go to the decoder.

    ``with_affinities``: a training pass of VQ and FSQ then also gives the affinities to all codes, for an entropy loss.
    """

    with_affinities = False

    def __init__(self, dim: int, in_dim: int | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.in_dim = dim if in_dim is None else in_dim

    def forward(self, z: Tensor, noise: Tensor | None = None) -> BottleneckOutput:
        """z (B, N, in_dim) -> latents (B, N, d). ``noise`` (B, N, d), standard normal, is for KL in training; None draws it."""
        raise NotImplementedError

    def latents_from_indices(self, indices: Tensor) -> Tensor:
        """indices (B, N) int64 -> latents (B, N, d); TypeError for a bottleneck without codes."""
        raise TypeError(f"{type(self).__name__} is continuous: it has no indices")

    @property
    def codebook_size(self) -> int:
        """Number of codes; 0 for a continuous bottleneck."""
        return 0


class IdentityBottleneck(Bottleneck):
    """Plain continuous latents."""

    def forward(self, z: Tensor, noise: Tensor | None = None) -> BottleneckOutput:
        return BottleneckOutput(z, {})


class KLBottleneck(Bottleneck):
    """Diagonal Gaussian posterior N(mean, exp(logvar)) held to N(0, 1) (Kingma & Welling 2014)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, in_dim=2 * dim)

    def forward(self, z: Tensor, noise: Tensor | None = None) -> BottleneckOutput:
        mean, logvar = z.chunk(2, dim=-1)  # each (B, N, d)
        logvar = logvar.clamp(-30.0, 20.0)
        # KL(N(mean, var) || N(0, 1)) = (mean^2 + var - 1 - log var) / 2, summed over a sample's latents.
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2)).mean()
        latents = mean
        if self.training:
            latents = mean + torch.exp(0.5 * logvar) * (torch.randn_like(mean) if noise is None else noise)
        return BottleneckOutput(latents, {"kl": kl}, mean=mean, logvar=logvar)


class VQBottleneck(Bottleneck):
    """Learned codebook with straight-through gradients (van den Oord et al. 2017); ``normalize`` compares by cosine."""

    def __init__(self, dim: int, codebook_size: int, normalize: bool) -> None:
        super().__init__(dim)
        self.normalize = normalize
        self.codebook = nn.Parameter(torch.empty(codebook_size, dim).uniform_(-1.0 / codebook_size, 1.0 / codebook_size))

    @property
    def codebook_size(self) -> int:
        return self.codebook.shape[0]

    def codes(self) -> Tensor:
        """The codes as the decoder sees them, (K, d)."""
        return F.normalize(self.codebook, dim=-1) if self.normalize else self.codebook

    def forward(self, z: Tensor, noise: Tensor | None = None) -> BottleneckOutput:
        if self.normalize:
            z = F.normalize(z, dim=-1)
        indices = ops.vq_nearest(z.detach(), self.codebook.detach(), self.normalize)  # (B, N)
        quantized = F.embedding(indices, self.codes())  # (B, N, d)
        losses = {
            "codebook": (quantized - z.detach()).square().mean(),
            "commitment": (z - quantized.detach()).square().mean(),
        }
        latents = z + (quantized - z).detach() if self.training else quantized
        affinities = (-_squared_distances(z, self.codes()),) if self.training and self.with_affinities else ()
        return BottleneckOutput(latents, losses, indices=indices, affinities=affinities)

    def latents_from_indices(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.codes())


def _squared_distances(z: Tensor, codes: Tensor) -> Tensor:
    """z (B, N, d), codes (K, d) -> (B, N, K) in float32."""
    z, codes = z.float(), codes.float()
    with torch.autocast(z.device.type, enabled=False):  # bfloat16 products would swallow the differences of near codes
        return z.square().sum(-1, keepdim=True) - 2 * z @ codes.T + codes.square().sum(-1)


class FSQBottleneck(Bottleneck):
    """Finite scalar quantization (Mentzer et al. 2024): channel i is rounded to ``levels[i]`` values in [-1, 1].

    The index of a code is the mixed-radix number of its levels, the first channel least significant.
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__(len(levels))
        sizes = torch.tensor(levels, dtype=torch.int64)  # (d,)
        self.register_buffer("levels", sizes, persistent=False)
        radix = torch.cat([torch.ones(1, dtype=torch.int64), torch.cumprod(sizes, 0)[:-1]])  # (d,)
        self.register_buffer("basis", radix, persistent=False)

    @property
    def codebook_size(self) -> int:
        return int(self.levels.prod())

    def forward(self, z: Tensor, noise: Tensor | None = None) -> BottleneckOutput:
        # Bounded as in the paper: an even number of levels is shifted by half a step, so that rounding gives exactly L values.
        # The paper shrinks the bound by 1e-3, which leaves 2 levels without a shift (atanh of more than 1): widened instead, by
        # less than rounding could carry over to a level that does not exist. The shift, which puts z = 0 on a level, would need
        # z < -3.8 for the lower of 2 levels, where no gradient is left: they are parted at z = 0. In float32: bfloat16 would
        # lose the widening.
        half = (self.levels - 1).float() / 2 + 5e-4  # (d,)
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)  # (d,)
        shift = torch.where(self.levels > 2, torch.atanh(offset / half), 0.0)  # (d,)
        bounded = torch.tanh(z.float() + shift) * half - offset  # (B, N, d)
        values = bounded.round()
        half_width = (self.levels // 2).float()  # (d,)
        with torch.no_grad():
            digits = (values + half_width).long()  # (B, N, d) in [0, L)
            indices = (digits * self.basis).sum(-1)  # (B, N)
        affinities: tuple[Tensor, ...] = ()
        if self.training:
            values = bounded + (values - bounded).detach()  # straight through
            if self.with_affinities:  # each channel's, in the decoder's units
                sizes, halves = self.levels.tolist(), half_width.tolist()
                steps = [(torch.arange(size, device=z.device) - half) / half for size, half in zip(sizes, halves, strict=True)]
                channels = (bounded / half_width).unsqueeze(-1).unbind(-2)  # d times (B, N, 1)
                affinities = tuple(-(channel - step).square() for channel, step in zip(channels, steps, strict=True))
        return BottleneckOutput((values / half_width).to(z.dtype), {}, indices=indices, affinities=affinities)

    def latents_from_indices(self, indices: Tensor) -> Tensor:
        digits = torch.div(indices.unsqueeze(-1), self.basis, rounding_mode="floor") % self.levels  # (B, N, d)
        half_width = self.levels // 2
        return ((digits - half_width).float() / half_width.float()).to(torch.get_default_dtype())


class SoftVQBottleneck(Bottleneck):
    """Continuous mixtures of codes (SoftVQ-VAE, Chen et al. 2024, arXiv 2412.10958): the mean of the codes c_k under
    softmax(z c_k / tau), where z and the codes have norm 1.

    Args:
        codebooks: each serves an equal, consecutive part of the tokens.
        normalize: False takes z and the codes as they are.
    """

    def __init__(self, dim: int, codebook_size: int, codebooks: int, temperature: float, normalize: bool = True) -> None:
        super().__init__(dim)
        self.temperature, self.normalize = temperature, normalize
        self.codebook = nn.Parameter(F.normalize(torch.randn(codebooks, codebook_size, dim), dim=-1))  # (C, K, d)

    def forward(self, z: Tensor, noise: Tensor | None = None) -> BottleneckOutput:
        codes = F.normalize(self.codebook, dim=-1) if self.normalize else self.codebook  # (C, K, d)
        z = F.normalize(z, dim=-1) if self.normalize else z
        parts = z.unflatten(1, (len(codes), -1))  # (B, C, N / C, d)
        shares = (parts @ codes.detach().transpose(1, 2) / self.temperature).softmax(dim=-1)  # (B, C, N / C, K)
        return BottleneckOutput((shares @ codes).flatten(1, 2), {})


def build_bottleneck(config: TexTokConfig) -> Bottleneck:
    """The bottleneck that ``config.bottleneck`` names."""
    if config.bottleneck == "kl":
        return KLBottleneck(config.latent_dim)
    if config.bottleneck == "vq":
        return VQBottleneck(config.latent_dim, config.codebook_size, config.normalize_codes)
    if config.bottleneck == "fsq":
        return FSQBottleneck(config.fsq_levels)
    if config.bottleneck == "softvq":
        sizes = (config.latent_dim, config.codebook_size, config.soft_codebooks)
        return SoftVQBottleneck(*sizes, config.soft_temperature, config.normalize_codes)
    return IdentityBottleneck(config.latent_dim)
