"""DiT: a diffusion transformer over 1-D tokens or 2-D patches (Peebles & Xie, arXiv 2212.09748)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from textok_fast import ops
from textok_fast.config import DiTConfig
from textok_fast.errors import InputError
from textok_fast.modeling.layers import Attention, CrossAttention, Mlp, TextProjection, TextTokens, add_and_norm
from textok_fast.modeling.saving import PretrainedMixin
from textok_fast.modeling.text_encoders import TextFeatures


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of t (Vaswani et al. 2017, period up to 10,000) through a two-layer MLP."""

    def __init__(self, width: int, frequencies: int = 256, shift: int = 0) -> None:
        super().__init__()
        self.frequencies, self.shift = frequencies, shift
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """t (B,) -> (B, D)."""
        return self.mlp(timestep_features(t, self.frequencies, shift=self.shift).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """One row a class and, last, one for the null class."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        """y (B,) int64 in [0, num_classes], num_classes for no label -> (B, D)."""
        return self.embedding_table(y)


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero; with ``cross`` also attention to text tokens between self-attention and MLP.

    ``mlp_norm_eps``: of the LayerNorm before the MLP; that of the attention has 1e-6.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        cross: bool = False,
        qk_norm: bool = False,
        mlp_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.attn = Attention(width, heads, qk_norm)
        self.mlp = Mlp(width, int(width * mlp_ratio), approximate="tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.cross_norm = nn.LayerNorm(width, eps=1e-6) if cross else None
        self.cross_attn = CrossAttention(width, heads) if cross else None
        self.mlp_norm_eps = mlp_norm_eps

    def forward(
        self, x: Tensor, hidden: Tensor, modulation: Tensor, following: tuple[Tensor, Tensor], text: TextTokens | None = None
    ) -> tuple[Tensor, Tensor]:
        """One block, from one modulated LayerNorm to the next.

        Args:
            x: residual stream (B, N, D), in the dtype of all else or in float32.
            hidden: its LayerNorm, modulated with this block's first shift and scale, (B, N, D).
            modulation: (B, 6 D): shift, scale and gate of the attention, then of the MLP.
            following: shift and scale, each (B, D), of what comes next: another block or the final layer.

        Returns: x after this block, and its LayerNorm modulated with ``following``.
        """
        _, _, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)  # each (B, D)
        branch = self.attn(hidden)  # (B, N, D)
        if self.cross_attn is None or self.cross_norm is None or text is None:
            x, hidden = ops.gated_residual_layer_norm_modulate(x, branch, gate1, shift2, scale2, self.mlp_norm_eps)
        else:
            x, hidden = add_and_norm(x, branch, self.cross_norm, gate1)
            branch = self.cross_attn(hidden, text.tokens, text.mask)
            x, hidden = ops.gated_residual_layer_norm_modulate(x, branch, None, shift2, scale2, self.mlp_norm_eps)
        return ops.gated_residual_layer_norm_modulate(x, self.mlp(hidden), gate2, *following)


class FinalLayer(nn.Module):
    """The projection to p * p * C_out numbers a token; ``adaLN_modulation`` modulates the LayerNorm before it."""

    def __init__(self, width: int, out_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, hidden: Tensor) -> Tensor:
        """Modulated LayerNorm (B, N, D) -> (B, N, out_dim)."""
        return self.linear(hidden)


class DiT(PretrainedMixin, nn.Module):
    """``dit(x, t, y)`` -> noise, v or velocity for x, and with ``learn_sigma`` the variance channels after it."""

    config_class = DiTConfig
    model_type = "textok-dit"
    folder = "generator"
    pos_embed: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, p = config.width, config.patch_size
        self.x_embedder = nn.Linear(config.in_channels * p * p, width)
        if config.num_tokens:
            self.pos_embed = nn.Parameter(sincos_1d(width, torch.arange(config.num_tokens)).unsqueeze(0))  # (1, N, D), learned
        else:
            self.register_buffer("pos_embed", sincos_2d(width, config.input_size // p).unsqueeze(0))  # (1, N, D), fixed
        self.t_embedder = TimestepEmbedder(width, shift=config.frequency_shift)
        self.y_embedder = LabelEmbedder(config.num_classes, width) if config.num_classes else None
        self.text_embedder = TextProjection(config.text_dim, width) if config.text_dim else None
        self.image_embedder = nn.Linear(config.image_token_dim, width) if config.image_token_dim else None
        self.image_positions = nn.Parameter(torch.zeros(config.num_image_tokens, width)) if config.image_token_dim else None
        self.blocks = nn.ModuleList(
            DiTBlock(width, config.heads, config.mlp_ratio, bool(config.text_dim), config.qk_norm, config.mlp_norm_eps)
            for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(width, config.out_channels * p * p)
        self._init_weights()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        text: TextFeatures | None = None,
        image_tokens: Tensor | None = None,
    ) -> Tensor:
        """One denoising step's network.

        Args:
            x: (B, N, C) float for 1-D tokens, (B, C, S, S) for 2-D.
            t: (B,) int64 or float, multiplied by ``config.time_scale``: a training step in [0, 1000) for Gaussian diffusion,
                a time in [0, 1] for a flow.
            y: (B,) int64 class labels; ``num_classes``, or None for all, is the null class.
            text: caption features (B, N_t, D_t) and mask (B, N_t); an all-False row, or None for all, is the null caption.
            image_tokens: (B, M, image_token_dim) float, for a model built with them.

        Returns: (B, N, C_out) or (B, C_out, S, S), with C_out = 2 C under ``learn_sigma``.
        """
        self._check(x, t, y, text, image_tokens)
        tokens = None if self.text_embedder is None else self.text_embedder(text, x.shape[0])
        return self.step(x, self.modulation(self.condition(t, y)), tokens, image_tokens)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """The guided forward of DiT's and SiT's code: u + scale (c - u), u and c the halves of one batch.

        Args:
            x: (2 B, ...), of which the second half is not looked at. t: (2 B,). y: (2 B,), the null class in the second half.

        Returns: as :meth:`forward`, its channels up to ``config.guided_channels`` guided, in both halves alike.
        """
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        dim = 1 if self.config.input_size else 2
        guided, rest = out.tensor_split([self.config.guided_channels or self.config.in_channels], dim=dim)
        conditional, null = guided.chunk(2)
        result = null + cfg_scale * (conditional - null)
        return torch.cat([torch.cat([result, result]), rest], dim=dim)

    def step(
        self, x: Tensor, modulations: list[Tensor], text: TextTokens | None = None, image_tokens: Tensor | None = None
    ) -> Tensor:
        """:meth:`forward` with what depends on (t, y) and on the captions given: unchecked, and without the adaLN products.

        Args:
            x: as in :meth:`forward`.
            modulations: as :meth:`modulation` returns them, with rows at any stride.
            text: what ``text_embedder`` makes of the captions, for a model that has one.
        """
        h = self.embed(x, image_tokens)  # (B, N + M, D)
        _, hidden = self.run_blocks(h, modulations, text)
        return self.project(hidden)

    def embed(self, x: Tensor, image_tokens: Tensor | None = None) -> Tensor:
        """x as in :meth:`forward` -> the residual stream that enters the first block, (B, N, D), image tokens last."""
        patches = ops.patchify(x, self.config.patch_size) if self.config.input_size else x  # (B, N, C p p)
        h = self.x_embedder(patches) + self.pos_embed  # (B, N, D)
        if self.image_embedder is not None and image_tokens is not None:
            h = torch.cat([h, self.image_embedder(image_tokens) + self.image_positions], dim=1)  # (B, N + M, D)
        return h

    def run_blocks(
        self, h: Tensor, modulations: list[Tensor], text: TextTokens | None = None, start: int = 0, stop: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Blocks ``start`` to before ``stop`` (None: all the rest), over ``h`` (B, N, D): what :meth:`embed` gives, or that in
        float32 beside activations in bfloat16 or float16, which then stays float32 throughout.

        Returns: the residual stream (B, N, D) after them, and its LayerNorm, modulated for what follows: the block ``stop``, or
            the final layer.
        """
        parts = [modulation.chunk(6, dim=1) for modulation in modulations[:-1]] + [modulations[-1].chunk(2, dim=1)]
        entry = [(shift, scale) for shift, scale, *_ in parts]  # of each block and the final layer, each (B, D)
        hidden = ops.layer_norm_modulate(h, *entry[start])  # (B, N, D)
        for index in range(start, len(self.blocks) if stop is None else stop):
            h, hidden = self.blocks[index](h, hidden, modulations[index], entry[index + 1], text)
        return h, hidden

    def project(self, hidden: Tensor) -> Tensor:
        """The final layer's modulated LayerNorm (B, N, D), image tokens last -> the output as in :meth:`forward`."""
        out = self.final_layer(hidden[:, : self.pos_embed.shape[1]])  # (B, N, C_out p p)
        return ops.unpatchify(out, self.config.patch_size, self.config.out_channels) if self.config.input_size else out

    def condition(self, t: Tensor, y: Tensor | None) -> Tensor:
        """What the modulation depends on: time and class, (B, D)."""
        c = self.t_embedder(t * self.config.time_scale)
        if self.y_embedder is None:
            return c
        labels = torch.full_like(t, self.config.num_classes, dtype=torch.int64) if y is None else y
        return c + self.y_embedder(labels)

    def modulation(self, c: Tensor) -> list[Tensor]:
        """Every block's shift, scale and gate (B, 6 D), and last the final layer's shift and scale (B, 2 D)."""
        activated = F.silu(c)  # (B, D), what every adaLN_modulation begins with
        layers = [*self.blocks, self.final_layer]
        return [layer.adaLN_modulation[1](activated) for layer in layers]

    def _check(self, x: Tensor, t: Tensor, y: Tensor | None, text: TextFeatures | None, image_tokens: Tensor | None) -> None:
        config = self.config
        if config.input_size:
            wanted: tuple[int, ...] = (config.in_channels, config.input_size, config.input_size)
        else:
            wanted = (config.num_tokens, config.in_channels)
        if tuple(x.shape[1:]) != wanted:
            raise InputError(f"x must be (B, {', '.join(map(str, wanted))}), got {tuple(x.shape)}")
        if y is not None and self.y_embedder is None:
            raise InputError("this DiT has no classes (num_classes=0): leave y out")
        if text is not None and self.text_embedder is None:
            raise InputError("this DiT has no text conditioning (text_dim=0): leave text out")
        if (image_tokens is None) != (self.image_embedder is None):
            raise InputError("image_tokens must be given exactly when the DiT was built with image_token_dim")
        for name, given in (("t", t), ("y", y)):
            if given is not None and given.shape != x.shape[:1]:
                raise InputError(f"{name} must be ({len(x)},), one a sample, got {tuple(given.shape)}")
        if text is not None:
            features, mask = text
            if features.ndim != 3 or len(features) != len(x) or features.shape[2] != config.text_dim:
                raise InputError(f"text features must be ({len(x)}, N_t, {config.text_dim}), got {tuple(features.shape)}")
            if mask.shape != features.shape[:2] or mask.dtype != torch.bool:
                raise InputError(f"the text mask must be bool of shape {tuple(features.shape[:2])}, True for a real token")
        if image_tokens is not None:
            sizes = (len(x), config.num_image_tokens, config.image_token_dim)
            if tuple(image_tokens.shape) != sizes:
                raise InputError(f"image_tokens must be {sizes}, got {tuple(image_tokens.shape)}")

    def _init_weights(self) -> None:
        """DiT's initialization: Xavier-uniform linears, normal embeddings, zero modulation and output (adaLN-Zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(linear.weight, std=0.02)  # type: ignore[arg-type]
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        zeros = [self.final_layer.linear, self.final_layer.adaLN_modulation[1]]
        for block in self.blocks:
            zeros.append(block.adaLN_modulation[1])  # type: ignore[index,arg-type]
            if block.cross_attn is not None:
                zeros.append(block.cross_attn.proj)  # type: ignore[union-attr,arg-type]
        for module in zeros:
            nn.init.zeros_(module.weight)  # type: ignore[arg-type]
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def timestep_features(t: Tensor, dim: int, max_period: float = 10_000.0, shift: int = 0) -> Tensor:
    """[cos(t w_i), sin(t w_i)] with w_i = max_period^(-i / (dim / 2 - shift)): t (B,) -> (B, dim) float32."""
    half = dim // 2
    w = torch.arange(half, dtype=torch.float32, device=t.device)
    w = torch.exp(-math.log(max_period) * w / (half - shift))  # (dim / 2,)
    angles = t.float().unsqueeze(1) * w  # (B, dim / 2)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


def sincos_1d(width: int, positions: Tensor) -> Tensor:
    """[sin(p w_i), cos(p w_i)] with w_i = 10,000^(-i / (width / 2)): positions (N,) -> (N, width) float32."""
    w = 10_000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width / 2))  # (width / 2,)
    angles = positions.double().unsqueeze(1) * w  # (N, width / 2)
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1).float()


def sincos_2d(width: int, grid: int) -> Tensor:
    """Half the channels for the column, half for the row (He et al. 2022), row by row: (grid * grid, width) float32."""
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    return torch.cat([sincos_1d(width // 2, column.reshape(-1)), sincos_1d(width // 2, row.reshape(-1))], dim=1)
