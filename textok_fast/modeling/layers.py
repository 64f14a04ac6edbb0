"""The layers that the tokenizer and the generator share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from textok_fast import ops
from textok_fast.modeling.text_encoders import TextFeatures


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether reading the weights of ``module`` is the same as calling it: nobody has replaced it or its ``forward`` (LoRA,
    quantization, offloading), hung a hook on it (pruning) or made its weight something else than a tensor (torchao, DTensor).
    """
    return is_untouched(module, kind) and type(module.weight) in (Tensor, nn.Parameter)


def is_untouched(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """:func:`is_plain` for a module without a weight of its own."""
    if module is None or type(module) is not kind:
        return False
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in vars(module)


class Rotary(NamedTuple):
    """By which angles one block turns queries and keys of consecutive rows of its sequence."""

    cos: Tensor  # (n, H, D / 2) float32
    sin: Tensor
    start: int  # the first of the n rows

    def turn(self, x: Tensor, first: int = 0) -> Tensor:
        """x (B, M, H, D), rows ``first`` and on of the sequence -> the same with numbers 2 i and 2 i + 1 turned as a pair."""
        begin, end = (min(max(row - first, 0), x.shape[1]) for row in (self.start, self.start + len(self.cos)))
        if begin == end:
            return x
        there = slice(begin + first - self.start, end + first - self.start)
        cos, sin = self.cos[there], self.sin[there]
        even, odd = x[:, begin:end].float().unflatten(-1, (-1, 2)).unbind(-1)  # each (B, n, H, D / 2)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)
        return torch.cat([x[:, :begin], turned, x[:, end:]], dim=1)


class RowModulation(NamedTuple):
    """How one block scales and shifts its LayerNorms' results at consecutive rows of its sequence (MoVQ, Zheng et al. 2022,
    arXiv 2209.09002, as MAETok has it: x * scale + shift)."""

    shift1: Tensor  # (B, n, D), of the attention's
    scale1: Tensor
    shift2: Tensor  # of the MLP's
    scale2: Tensor
    start: int  # the first of the n rows

    @classmethod
    def of(cls, values: Tensor, start: int) -> RowModulation:
        """values (B, n, 4 D)."""
        shift1, scale1, shift2, scale2 = values.chunk(4, dim=-1)  # each (B, n, D)
        return cls(shift1, scale1, shift2, scale2, start)

    def before_attention(self, x: Tensor) -> Tensor:
        """x (B, M, D) -> the same with n rows modulated."""
        return self._applied(x, self.shift1, self.scale1)

    def before_mlp(self, x: Tensor) -> Tensor:
        """x (B, M, D) -> the same; where the n rows have been left out already there is nothing to do."""
        return self._applied(x, self.shift2, self.scale2)

    def _applied(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        stop = self.start + shift.shape[1]
        if x.shape[1] < stop:
            return x
        return torch.cat([x[:, : self.start], x[:, self.start : stop] * scale + shift, x[:, stop:]], dim=1)


class RotaryPositions(nn.Module):
    """Learned 2-D rotary positions, the mixed ones of RoPE-ViT (Heo et al. 2024, arXiv 2403.13298).

    Pair i of a head at (column x, row y) turns by x f_x[i] + y f_y[i], with frequencies of its own in every block and head.
    """

    def __init__(self, depth: int, heads: int, head_dim: int, grid: int, theta: float = 10.0) -> None:
        super().__init__()
        self.heads, self.grid = heads, grid
        magnitude = theta ** (-torch.arange(0, head_dim, 4) / head_dim)  # (D / 4,)
        angle = 2 * math.pi * torch.rand(depth, heads, 1)
        directions = torch.cat([magnitude * torch.exp(1j * angle), magnitude * torch.exp(1j * (angle + math.pi / 2))], dim=-1)
        self.frequencies = nn.Parameter(torch.stack([directions.real, directions.imag]).flatten(2))  # (2, depth, H D / 2)

    def forward(self, start: int) -> list[Rotary]:
        """For each block, with the patches at rows ``start`` and on."""
        row, column = torch.meshgrid(*[torch.arange(self.grid, device=self.frequencies.device)] * 2, indexing="ij")
        places = torch.stack([column.flatten(), row.flatten()], dim=1).float()  # (hw, 2)
        angles = torch.einsum("np,pld->lnd", places, self.frequencies.float()).unflatten(-1, (self.heads, -1))
        return [Rotary(each.cos(), each.sin(), start) for each in angles]


class Attention(nn.Module):
    """Multi-head self-attention with one packed projection of width 3 D; ``qk_norm``: a LayerNorm over each query and key."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else None
        self.k_norm = nn.LayerNorm(width // heads) if qk_norm else None
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, rows: slice | None = None, rotary: Rotary | None = None) -> Tensor:
        """x (B, N, D), mask (B, N) bool over keys -> (B, N, D), or only the ``rows`` of it (B, N_rows, D)."""
        if rotary is not None or self.q_norm is not None or self.k_norm is not None:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # each (B, N, H, D / H)
            q = q if rows is None else q[:, rows]
            q, k = q if self.q_norm is None else self.q_norm(q), k if self.k_norm is None else self.k_norm(k)
            return self.proj(ops.attention(*turned(q, k, rows, rotary), v, mask))
        if rows is None or not is_plain(self.qkv, nn.Linear):
            return self.proj(ops.short_attention(self.qkv(x), self.heads, mask, rows))
        # Rows that nobody reads need keys and values, but no query.
        width = x.shape[-1]
        q = F.linear(x[:, rows], self.qkv.weight[:width], self.qkv.bias[:width])  # (B, N_rows, D)
        q = q.unflatten(-1, (self.heads, -1))  # (B, N_rows, H, D / H)
        kv = F.linear(x, self.qkv.weight[width:], self.qkv.bias[width:])  # (B, N, 2 D)
        k, v = kv.unflatten(-1, (2, self.heads, -1)).unbind(2)  # each (B, N, H, D / H)
        return self.proj(ops.attention(q, k, v, mask))


def turned(q: Tensor, k: Tensor, rows: slice | None, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
    """Queries (B, N_rows, H, D), of ``rows`` of the sequence, and keys (B, N, H, D), turned by ``rotary``."""
    if rotary is None:
        return q, k
    return rotary.turn(q, 0 if rows is None else rows.start), rotary.turn(k)


class CrossAttention(nn.Module):
    """Multi-head attention from a sequence to text tokens of the same width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, N, D), context (B, N_t, D), mask (B, N_t) -> (B, N, D)."""
        q = self.q(x).unflatten(-1, (self.heads, -1))  # (B, N, H, D / H)
        k, v = self.kv(context).unflatten(-1, (2, self.heads, -1)).unbind(2)  # each (B, N_t, H, D / H)
        return self.proj(ops.attention(q, k, v, mask))


class Mlp(nn.Module):
    """Linear, GELU, Linear. ``approximate``: "none" for the exact GELU, "tanh" as DiT has it."""

    def __init__(self, width: int, hidden: int, approximate: str = "none") -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.approximate = approximate
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        if is_plain(self.fc1, nn.Linear):
            return self.fc2(ops.linear_gelu(x, self.fc1.weight, self.fc1.bias, self.approximate))
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class ViTBlock(nn.Module):
    """Pre-norm transformer block (Dosovitskiy et al. 2021): x + Attention(LN(x)), then x + MLP(LN(x)).

    A residual sum and the LayerNorm after it are one operation, so a block is given its first LayerNorm's result, and ends with
    the LayerNorm that follows it. :func:`run_blocks` strings them together.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(
        self,
        x: Tensor,
        hidden: Tensor,
        following: nn.LayerNorm,
        mask: Tensor | None = None,
        rows: slice | None = None,
        rotary: Rotary | None = None,
        modulation: RowModulation | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x and norm1(x) (B, N, D) -> x and following(x), (B, N, D), or only the ``rows`` of them that are needed, which are
        those before any that ``modulation`` is of."""
        residual = x if rows is None else x[:, rows]
        hidden = hidden if modulation is None else modulation.before_attention(hidden)
        x, hidden = add_and_norm(residual, self.attn(hidden, mask, rows, rotary), self.norm2)
        hidden = hidden if modulation is None else modulation.before_mlp(hidden)
        return add_and_norm(x, self.mlp(hidden), following)


def add_and_norm(x: Tensor, branch: Tensor, norm: nn.LayerNorm, gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x + gate * branch and its LayerNorm, both (B, N, D); gate (B, D), or None for 1. x may be wider than the others."""
    if is_plain(norm, nn.LayerNorm):
        return ops.gated_residual_layer_norm(x, branch, gate, norm.weight, norm.bias, norm.eps)
    x = x + (branch if gate is None else gate.unsqueeze(1) * branch)  # (B, N, D)
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor) and torch.promote_types(weight.dtype, x.dtype) == x.dtype:  # else torch refuses a wider x
        return x, norm(x.to(weight.dtype))
    return x, norm(x)


def run_blocks(
    blocks: nn.ModuleList,
    norm: nn.LayerNorm,
    x: Tensor,
    mask: Tensor | None,
    rows: slice,
    rotaries: Sequence[Rotary] | None = None,
    modulations: Sequence[RowModulation] | None = None,
) -> Tensor:
    """A whole ViT: x (B, N, D) -> norm(last block's x), only the ``rows`` of it, (B, N_rows, D)."""
    following = [*(block.norm1 for block in blocks[1:]), norm]
    hidden = blocks[0].norm1(x)  # type: ignore[operator]
    for index, block in enumerate(blocks):
        last = index == len(blocks) - 1
        rotary = None if rotaries is None else rotaries[index]
        modulation = None if modulations is None else modulations[index]
        x, hidden = block(x, hidden, following[index], mask, rows if last else None, rotary, modulation)
    return hidden


class TextTokens(NamedTuple):
    """Text features projected to a model's width."""

    tokens: Tensor  # (B, N_t, D)
    mask: Tensor  # (B, N_t) bool, True for a real token


class TextProjection(nn.Module):
    """Text features -> tokens of the model's width, with a learned null caption.

    A sample without a caption (no features at all, or a mask that is all False) gets the null caption: one learned token.
    What stands in padded places is replaced by zeros first, so that not even a NaN there reaches a result.
    """

    def __init__(self, text_dim: int, width: int, positions: int = 0) -> None:
        super().__init__()
        self.proj = nn.Linear(text_dim, width)
        self.null = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.null, std=0.02)
        self.positions = nn.Parameter(torch.zeros(positions, width)) if positions else None

    def forward(self, text: TextFeatures | None, batch: int) -> TextTokens:
        """``text``: features (B, N_t, D_t) and mask (B, N_t), or None -> tokens (B, N_t, D) and mask (B, N_t)."""
        if text is None:
            return TextTokens(self.null.expand(batch, 1, -1), torch.ones(batch, 1, dtype=torch.bool, device=self.null.device))
        features = torch.where(text.mask.unsqueeze(-1), text.features.to(self.proj.weight.dtype), 0)
        first = torch.arange(text.mask.shape[1], device=text.mask.device) == 0  # (N_t,)
        is_null = ~text.mask.any(dim=1, keepdim=True) & first  # (B, N_t): the first place of an empty caption
        tokens = self.proj(features)  # (B, N_t, D)
        if self.positions is not None:
            tokens = tokens + self.positions[: tokens.shape[1]]
        tokens = torch.where(is_null.unsqueeze(-1), self.null, tokens)
        return TextTokens(tokens, text.mask | is_null)


def drop_captions(text: TextFeatures, drop: Tensor) -> TextFeatures:
    """Captions whose entry in ``drop`` (B,) bool is True become the null caption."""
    return TextFeatures(text.features, text.mask & ~drop.to(text.mask.device).unsqueeze(1))
