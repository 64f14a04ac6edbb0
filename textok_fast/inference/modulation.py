"""adaLN ahead of the loop: shift, scale and gate of every block depend on time and class only, not on the sample.

In DiT-XL these products hold a third of the weights, read once an evaluation whatever the number of tokens. Here they are one
matrix product over all blocks, and one call of it serves many evaluations: a row for each pair of a time and a label that
occurs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from textok_fast import ops
from textok_fast.inference.plan import Plan
from textok_fast.inference.precision import weight_bytes
from textok_fast.modeling.dit import DiT
from textok_fast.modeling.layers import is_plain


class StackedModulation(nn.Module):
    """The adaLN products of all blocks and the final layer of a DiT as one: (R, D) -> (R, L), L = (6 depth + 2) D.

    Takes the layers out of ``model``, which is to be an engine's own copy: nothing is held twice. Where somebody has replaced
    one, or hung a hook on it, all of them are called one after the other instead. Beside int8 blocks (``int8``) the packed
    product is of bfloat16: a third of the weights, which must not be four times as long as the others.
    """

    weight: Tensor | None
    bias: Tensor | None
    layers: nn.ModuleList | None

    def __init__(self, model: DiT, products: str = "auto", int8: bool = False) -> None:
        super().__init__()
        self.depth, self.width = len(model.blocks), model.config.width
        self.columns = (6 * self.depth + 2) * self.width
        self.dtype = model.pos_embed.dtype
        owners = [*model.blocks, model.final_layer]
        layers = [owner.adaLN_modulation[1] for owner in owners]
        for owner in owners:
            owner.adaLN_modulation = None
        self.packed: ops.PackedWeight | None = None
        self.register_buffer("weight", None)
        self.register_buffer("bias", None)
        self.layers = None
        if not all(is_plain(layer, nn.Linear) for layer in layers):
            self.layers = nn.ModuleList(layers)
            self.bytes = weight_bytes(self.layers)
            return
        with torch.no_grad():
            weight = torch.cat([layer.weight for layer in layers])  # (L, D)
            bias = torch.cat([layer.bias for layer in layers])  # (L,)
        del layers
        if weight.is_cpu and products != "reference":
            backend = None if products == "auto" else products
            halves = int8 or weight.dtype == torch.bfloat16
            self.packed = ops.pack_linear(weight, bias, "bf16" if halves else "fp32", backend)
            self.bytes = self.packed.nbytes
        else:
            self.weight, self.bias = weight, bias
            self.bytes = weight.nbytes + bias.nbytes

    @torch.no_grad()
    def forward(self, c: Tensor, out: Tensor | None = None) -> Tensor:
        """c = ``DiT.condition`` (R, D), its dtype or float32 -> (R, L) in its dtype, into ``out`` if given."""
        activated = F.silu(c).to(self.dtype)  # (R, D)
        if self.layers is not None:
            rows = torch.cat([layer(activated) for layer in self.layers], dim=1)  # (R, L)
            return rows if out is None else out.copy_(rows)
        if self.packed is None:
            assert self.weight is not None and self.bias is not None
            if out is not None:
                return torch.addmm(self.bias, activated, self.weight.t(), out=out)
            return F.linear(activated, self.weight, self.bias)  # (R, L)
        kind = torch.bfloat16 if self.packed.precision == "bf16" else torch.float32
        rows = ops.packed_linear(activated.to(kind), self.packed)  # (R, L)
        return rows.to(self.dtype) if out is None else out.copy_(rows)

    def split(self, rows: Tensor) -> list[Tensor]:
        """(R, L), any row stride -> what ``DiT.modulation`` returns: each block's (R, 6 D), and last (R, 2 D). Views."""
        return list(rows.split([6 * self.width] * self.depth + [2 * self.width], dim=1))


class Layout(NamedTuple):
    """Which rows of modulation a run has, and how many evaluations' worth of them are computed at once."""

    rows: int  # distinct labels, the null label included: rows of one evaluation
    chunk: int  # evaluations; 0: each computes its own rows inside, one for each sample of its batch


def layout(plan: Plan, columns: int, width: int, element: int, evaluations: int, batch: int, rows: int) -> Layout:
    """How a run of ``batch`` rows an evaluation (a guidance pair counts twice), ``rows`` of them distinct, gets its modulation.

    "auto" compares the bytes an evaluation moves. Counted in rows of L numbers, the weights are D rows, and a chunk is c
    evaluations:

        inside: D weights + B written and read again
        ahead:  D / c weights + U written, min(U, B) read and B written by the gather, which are read again

    Args:
        columns, width, element: L, D and the bytes of a number.
    """
    if plan.modulation == "inside":
        return Layout(rows, 0)
    chunk = max(min(evaluations, plan.modulation_budget // (rows * columns * element)), 1)
    inside = width + 2 * batch
    ahead = width / chunk + rows + min(rows, batch) + 2 * batch
    return Layout(rows, 0 if plan.modulation == "auto" and ahead >= inside else chunk)


def unique_labels(labels: Tensor | None, null: int, batch: int, pair: bool) -> tuple[Tensor | None, Tensor]:
    """The labels that need a row, and the row of each sample, of the guidance pair last.

    The number of rows is rounded up to a power of two, at most one a sample and one more, so that batches of the same size
    but other labels mostly have tensors, and so graphs, of the same shapes.

    Args:
        labels: (B,) int64, or None for a model that has no classes.
        null: the null class.

    Returns: labels (U,) int64 or None, and rows (B,) or with ``pair`` (2 B,) int64, all on the CPU.
    """
    if labels is None:
        return None, torch.zeros(2 * batch if pair else batch, dtype=torch.int64)
    both = torch.cat([labels.cpu(), torch.full((batch,), null)]) if pair else labels.cpu()
    unique, rows = torch.unique(both, return_inverse=True)  # (U',), (2 B,)
    most = batch + 1 if pair else batch
    count = min(max(most, len(unique)), 1 << (len(unique) - 1).bit_length())
    return torch.cat([unique, unique[-1:].expand(count - len(unique))]), rows
