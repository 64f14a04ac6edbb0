"""Copies of a model that compute in another precision, made by putting other layers in the place of its own.

fp32, bf16: on a CPU the blocks' products are packed (:func:`textok_fast.ops.packed_linear`); on a GPU the weights are cast.
int8 (CPU): the blocks' products are integers, activations quantized row by row; all else is float32.
fp8: the blocks' products are e4m3 with a scale for each row and channel, and what a LayerNorm or a GELU gives a product is
quantized where it is made; all else is bfloat16. Without such a GPU PyTorch emulates it, slowly, which shows its error.

The engines keep the residual stream in float32 (``STREAM``) beside bfloat16: it is a sum over all blocks, and to round each sum
costs more accuracy than its reads and writes cost time.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from textok_fast import ops
from textok_fast.config import DiTConfig, TexTokConfig
from textok_fast.errors import InputError
from textok_fast.modeling.dit import DiTBlock
from textok_fast.modeling.layers import (
    Attention,
    CrossAttention,
    Mlp,
    Rotary,
    RowModulation,
    TextTokens,
    ViTBlock,
    add_and_norm,
    is_plain,
    is_untouched,
    turned,
)
from textok_fast.ops import PackedWeight, RowScaled
from textok_fast.ops.dispatch import REFERENCE, choose
from textok_fast.ops.fp8 import lacks_e4m3

Precision = Literal["fp32", "bf16", "int8", "fp8"]
Products = Literal["auto", "native", "onednn", "reference"]
PRECISIONS = ("fp32", "bf16", "int8", "fp8")
PRODUCTS = ("auto", "native", "onednn", "reference")
STREAM = torch.float32  # of the residual stream in the engines, whatever the precision
# What everything but the blocks' products is computed in.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32, "fp8": torch.bfloat16}

Model = TypeVar("Model", bound=nn.Module)
Make = Callable[[Tensor, Tensor | None], nn.Module]  # a layer in place of a linear one of this weight and bias


# -- public functions --------------------------------------------------------------------------------------------------------


def prepare(
    model: Model, precision: Precision, *, device: torch.device | str | None = None, products: Products = "auto"
) -> Model:
    """A copy of ``model`` for inference in ``precision``, which shares with it the tensors that stay the same.

    It is called as the model is, with float inputs of its dtype (bfloat16 for bf16 and fp8, else float32). Layers that somebody
    has replaced, or hung a hook on, stay what they are. adaLN's products are cast, not packed: the engine computes them ahead.
    A weight of the original that is changed later changes what is shared and not what was cast or packed: prepare again then.

    Args:
        model: a DiT or a TexTok, whose blocks change; another module has all its linear layers packed, and takes no fp8.
        device: where the copy is to be; None is where the model is.
        products: what runs packed products: "auto" for the fastest; "reference" leaves fp32's and bf16's ``nn.Linear`` alone.

    Raises: InputError for a precision that the device does not have.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if products not in PRODUCTS:
        raise InputError(f"products must be one of {', '.join(PRODUCTS)}, got {products!r}")
    tensors = [*model.parameters(), *model.buffers()]
    place = torch.device(device) if device is not None else tensors[0].device if tensors else torch.device("cpu")
    if precision == "int8" and place.type != "cpu":
        raise InputError(f"int8 runs on a CPU only: use 'fp8' or 'bf16' on {place}")
    if precision == "fp8":
        if not _blocks(model):
            raise InputError(f"fp8 is for a DiT and a TexTok, got a {type(model).__name__}")
        if place.type == "cuda" and (reason := lacks_e4m3(torch.empty(0, device=place))):
            raise InputError(f"{reason}: use precision 'bf16'")

    if precision == "fp8":
        parts = [block for block in _blocks(model) if _is_original(block)]
    elif precision == "int8" or (place.type == "cpu" and products != "reference"):
        parts = _blocks(model) or [model]
    else:
        parts = []
    # The copy's tensors: cast, except those that only layers hold that will be replaced: these convert the original's.
    replaced = [linear for part in parts for linear in _linears(part)]
    kept = {id(tensor) for module in set(model.modules()) - set(replaced) for tensor in module._parameters.values()}
    memo: dict[int, Any] = {
        id(tensor): tensor for linear in replaced for tensor in linear._parameters.values() if id(tensor) not in kept
    }
    prepared = cast(model, DTYPES[precision], place, memo)

    if precision == "fp8":
        _use_fp8(prepared, place)
    elif parts:
        _pack(prepared, _packer(precision, products, _rows(model)))
    elif precision == "bf16" and place.type == "cuda":
        _put_in_place(prepared, FewRowsDiTBlock.of)
    return prepared


def cast(model: Model, dtype: torch.dtype, device: torch.device | None = None, kept: dict[int, Any] | None = None) -> Model:
    """A copy for inference with its floats in ``dtype``, on ``device`` or where they are; what stays the same is shared.

    ``kept``: by id, what takes the place of a tensor in the copy.
    """
    memo = {} if kept is None else dict(kept)
    for tensor in (*model.parameters(), *model.buffers()):
        memo.setdefault(id(tensor), _converted(tensor, dtype, tensor.device if device is None else device))
    for encoder in getattr(model, "_text_encoder", ()):  # frozen, of its own precision and device
        memo[id(encoder)] = encoder
    return copy.deepcopy(model, memo).eval()


def pack_linears(module: nn.Module, precision: Literal["fp32", "bf16", "int8"], products: Products = "auto") -> None:
    """Packs the linear layers inside of any ``module``, in place; its other layers must compute in the same dtype already.

    Layers with hooks, and subclasses of ``nn.Linear``, stay what they are; ``module`` itself must not be one.
    """
    _replace(module, _packer(precision, products))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights and buffers; what several layers share counts once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    packed = {id(layer.packed): layer.packed.nbytes for layer in model.modules() if isinstance(layer, PackedLinear)}
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) + sum(packed.values())


def describe(model: nn.Module) -> list[str]:
    """What runs the matrix products: a line for each kind and size of layer, such as "28 x 1152 -> 3456: int8, native"."""
    kinds: Counter[str] = Counter()
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            form = f"{layer.packed.precision}, {layer.packed.backend}"
        elif isinstance(layer, Fp8Linear):
            form = "fp8"
        elif isinstance(layer, nn.Linear):
            form = f"{str(layer.weight.dtype).removeprefix('torch.')}, torch"
        else:
            continue
        kinds[f"{layer.in_features} -> {layer.out_features}: {form}"] += 1
    return [f"{count} x {kind}" for kind, count in kinds.items()]


# -- packed layers, on a CPU -------------------------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """A linear layer with a packed weight. That is no parameter or buffer: it is of one processor, and not for checkpoints."""

    def __init__(self, packed: PackedWeight) -> None:
        super().__init__()
        self.packed = packed
        self.in_features, self.out_features = packed.in_features, packed.out_features

    @property
    def weight(self) -> Tensor:
        """For those who ask for its dtype and device; its shape and numbers mean nothing."""
        return self.packed.weight

    @property
    def bias(self) -> Tensor | None:
        return self.packed.bias

    def forward(self, x: Tensor, activation: str = "none") -> Tensor:
        """x (..., in) -> (..., out), in its dtype."""
        return ops.packed_linear(x, self.packed, activation)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.packed.precision}, {self.packed.backend}"


class PackedMlp(nn.Module):
    """``Mlp`` with the GELU in the first product."""

    def __init__(self, mlp: Mlp, make: Make) -> None:
        super().__init__()
        self.fc1, self.fc2 = make(mlp.fc1.weight, mlp.fc1.bias), make(mlp.fc2.weight, mlp.fc2.bias)
        self.activation = _gelu(mlp)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(self.fc1(x, self.activation))


class PackedDiTBlock(nn.Module):
    """``DiTBlock`` with packed weights, run as one operation. Not for one with cross-attention, nor one of changed parts."""

    def __init__(self, block: DiTBlock, packed: ops.PackedBlock) -> None:
        super().__init__()
        self.attn, self.mlp, self.adaLN_modulation = block.attn, block.mlp, block.adaLN_modulation
        self.cross_norm, self.cross_attn = block.cross_norm, block.cross_attn
        self.packed = packed

    @classmethod
    def of(cls, block: DiTBlock) -> PackedDiTBlock | None:
        """What stands in the place of ``block``, whose layers are packed already; None where it must stay what it is."""
        attn: Any = block.attn
        mlp: Any = block.mlp
        if not is_untouched(block, DiTBlock) or block.cross_attn is not None or not is_untouched(attn, Attention):
            return None
        if attn.q_norm is not None or attn.k_norm is not None:
            return None
        layers = [attn.qkv, attn.proj, *((mlp.fc1, mlp.fc2) if isinstance(mlp, PackedMlp) else ())]
        if len(layers) < 4 or not all(isinstance(layer, PackedLinear) for layer in layers):
            return None
        qkv, proj, fc1, fc2 = (layer.packed for layer in layers)
        return cls(block, ops.PackedBlock(qkv, proj, fc1, fc2, attn.heads, mlp.activation, block.mlp_norm_eps))

    def forward(
        self, x: Tensor, hidden: Tensor, modulation: Tensor, following: tuple[Tensor, Tensor], text: TextTokens | None = None
    ) -> tuple[Tensor, Tensor]:
        """As ``DiTBlock.forward``."""
        return ops.packed_block(self.packed, x, hidden, modulation, *following)


class FewRowsDiTBlock(nn.Module):
    """``DiTBlock`` on a GPU, run as one operation where :func:`textok_fast.ops.packed_block` is chosen, else as it is."""

    def __init__(self, block: DiTBlock, packed: ops.PackedBlock) -> None:
        super().__init__()
        self.attn, self.mlp, self.adaLN_modulation = block.attn, block.mlp, block.adaLN_modulation
        self.cross_norm, self.cross_attn = block.cross_norm, block.cross_attn
        self.mlp_norm_eps, self.packed = block.mlp_norm_eps, packed

    @classmethod
    def of(cls, block: DiTBlock) -> FewRowsDiTBlock | None:
        """What stands in the place of ``block``, whose weights it shares; None where it must stay what it is."""
        attn, mlp = block.attn, block.mlp
        if not _is_original(block) or block.cross_attn is not None or attn.q_norm is not None or attn.k_norm is not None:
            return None
        layers = (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
        qkv, proj, fc1, fc2 = (ops.pack_linear(layer.weight, layer.bias, "bf16", "reference") for layer in layers)
        return cls(block, ops.PackedBlock(qkv, proj, fc1, fc2, attn.heads, _gelu(mlp), block.mlp_norm_eps))

    def forward(
        self, x: Tensor, hidden: Tensor, modulation: Tensor, following: tuple[Tensor, Tensor], text: TextTokens | None = None
    ) -> tuple[Tensor, Tensor]:
        """As ``DiTBlock.forward``."""
        if choose("packed_block", self.packed, x, hidden, modulation, *following) == REFERENCE:
            return DiTBlock.forward(self, x, hidden, modulation, following, text)  # type: ignore[arg-type]
        return ops.packed_block(self.packed, x, hidden, modulation, *following)


class SplitAttention(nn.Module):
    """``Attention`` with the queries' product apart, for a block of whose result only some rows are wanted."""

    def __init__(self, attention: Attention, make: Make) -> None:
        super().__init__()
        self.heads = attention.heads
        weight, bias = attention.qkv.weight, attention.qkv.bias
        width = weight.shape[1]
        self.q = make(weight[:width], bias[:width])
        self.kv = make(weight[width:], bias[width:])
        self.proj = make(attention.proj.weight, attention.proj.bias)

    def qkv(self, x: Tensor | RowScaled) -> Tensor:
        """x (B, N, D) -> (B, N, 3 D), as ``Attention.qkv``."""
        return torch.cat([self.q(x), self.kv(x)], dim=-1)

    def forward(
        self, x: Tensor | RowScaled, mask: Tensor | None = None, rows: slice | None = None, rotary: Rotary | None = None
    ) -> Tensor:
        """As ``Attention.forward``."""
        wanted: Tensor | RowScaled = x
        if rows is not None:
            wanted = RowScaled(x.values[:, rows], x.scales[:, rows]) if isinstance(x, RowScaled) else x[:, rows]
        q = self.q(wanted).unflatten(-1, (self.heads, -1))  # (B, N_rows, H, D / H)
        k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).unbind(2)  # each (B, N, H, D / H)
        return self.proj(ops.attention(*turned(q, k, rows, rotary), v, mask))


def _packer(precision: Literal["fp32", "bf16", "int8"], products: Products, rows: int = 64) -> Make:
    backend = None if products == "auto" else products

    def make(weight: Tensor, bias: Tensor | None) -> PackedLinear:
        bias = None if bias is None else bias.cpu()
        return PackedLinear(ops.pack_linear(weight.cpu(), bias, precision, backend, rows))

    return make


def _pack(model: nn.Module, make: Make) -> None:
    for block in _last_vit_blocks(model):
        if _untouched(block.attn, Attention) and is_plain(block.attn.qkv, nn.Linear) and is_plain(block.attn.proj, nn.Linear):
            block.attn = SplitAttention(block.attn, make)  # type: ignore[assignment]
    for part in _blocks(model) or [model]:
        _replace(part, make)
    _put_in_place(model, PackedDiTBlock.of)


def _put_in_place(model: nn.Module, make: Callable[[DiTBlock], nn.Module | None]) -> None:
    """Puts what ``make`` gives, if anything, in the place of each DiT block."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, DiTBlock) and (whole := make(child)) is not None:
                setattr(parent, name, whole)


def _replace(module: nn.Module, make: Make) -> None:
    """Puts what ``make`` gives in the place of the linear layers in ``module``, of :func:`_linears`."""
    for name, child in list(module.named_children()):
        if name == ADALN:
            continue
        if _untouched(child, Mlp) and is_plain(child.fc1, nn.Linear) and is_plain(child.fc2, nn.Linear):  # type: ignore[arg-type]
            setattr(module, name, PackedMlp(child, make))  # type: ignore[arg-type]
        elif is_plain(child, nn.Linear):
            setattr(module, name, make(child.weight, child.bias))  # type: ignore[arg-type]
        else:
            _replace(child, make)


# -- FP8 ---------------------------------------------------------------------------------------------------------------------


class Fp8Linear(nn.Module):
    """A linear layer in e4m3 with a scale for each row of x and each channel of the weight."""

    values: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, device: torch.device) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        quantized = ops.quantize_channels(weight.to(device))
        self.register_buffer("values", quantized.values, persistent=False)  # (out, in)
        self.register_buffer("scales", quantized.scales, persistent=False)  # (out,)
        # cuBLAS wants the bias in the result's dtype.
        bias = None if bias is None else bias.detach().to(device, torch.bfloat16)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor | RowScaled, activation: str = "none") -> Tensor:
        """x (..., in), quantized or not -> (..., out) bfloat16."""
        return ops.fp8_linear(x, RowScaled(self.values, self.scales), self.bias, activation)

    def quantized(self, x: Tensor | RowScaled, activation: str = "none") -> RowScaled:
        """The same with a quantized result, for the next product."""
        return ops.fp8_linear(x, RowScaled(self.values, self.scales), self.bias, activation, fp8=True)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class Fp8Mlp(nn.Module):
    """``Mlp`` with GELU and quantization in the first product."""

    def __init__(self, mlp: Mlp, device: torch.device) -> None:
        super().__init__()
        self.fc1 = Fp8Linear(mlp.fc1.weight, mlp.fc1.bias, device)
        self.fc2 = Fp8Linear(mlp.fc2.weight, mlp.fc2.bias, device)
        self.activation = _gelu(mlp)

    def forward(self, x: Tensor | RowScaled) -> Tensor:
        """(..., D) -> (..., D) bfloat16."""
        return self.fc2(self.fc1.quantized(x, self.activation))


class Fp8Block(nn.Module):
    """``DiTBlock`` whose products are e4m3; between its LayerNorms and products nothing is stored in another form.

    Args:
        hands_on: whether what follows takes ``hidden`` quantized: another such block.
    """

    def __init__(self, block: DiTBlock, device: torch.device, hands_on: bool) -> None:
        super().__init__()
        self.attn, self.cross_norm, self.cross_attn = block.attn, block.cross_norm, block.cross_attn
        self.adaLN_modulation, self.mlp_norm_eps = block.adaLN_modulation, block.mlp_norm_eps
        self.mlp = Fp8Mlp(block.mlp, device)
        for attention in filter(None, (self.attn, self.cross_attn)):
            _replace(attention, lambda weight, bias: Fp8Linear(weight, bias, device))
        self.hands_on = hands_on

    def forward(
        self,
        x: Tensor,
        hidden: Tensor | RowScaled,
        modulation: Tensor,
        following: tuple[Tensor, Tensor],
        text: TextTokens | None = None,
    ) -> tuple[Tensor, Tensor | RowScaled]:
        """As ``DiTBlock.forward``; ``hidden`` may come and go quantized."""
        _, _, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)  # each (B, D)
        branch = self.attn(hidden)  # (B, N, D)
        gate: Tensor | None = gate1
        norm = self.cross_norm
        if self.cross_attn is not None and norm is not None and text is not None:
            x, hidden = ops.gated_residual_layer_norm(x, branch, gate1, norm.weight, norm.bias, norm.eps, fp8=True)
            branch, gate = self.cross_attn(hidden, text.tokens, text.mask), None
        x, hidden = ops.gated_residual_layer_norm_modulate(x, branch, gate, shift2, scale2, self.mlp_norm_eps, fp8=True)
        branch = self.mlp(hidden)  # (B, N, D)
        if self.hands_on:
            return ops.gated_residual_layer_norm_modulate(x, branch, gate2, *following, fp8=True)
        return ops.gated_residual_layer_norm_modulate(x, branch, gate2, *following)


class Fp8ViTBlock(nn.Module):
    """``ViTBlock`` in the same way."""

    def __init__(self, block: ViTBlock, device: torch.device, hands_on: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = block.norm1, block.norm2

        def make(weight: Tensor, bias: Tensor | None) -> Fp8Linear:
            return Fp8Linear(weight, bias, device)

        self.attn: Attention | SplitAttention = block.attn
        if hands_on:
            _replace(block.attn, make)
        else:
            self.attn = SplitAttention(block.attn, make)
        self.mlp = Fp8Mlp(block.mlp, device)
        self.hands_on = hands_on

    def forward(
        self,
        x: Tensor,
        hidden: Tensor | RowScaled,
        following: nn.LayerNorm,
        mask: Tensor | None = None,
        rows: slice | None = None,
        rotary: Rotary | None = None,
        modulation: RowModulation | None = None,
    ) -> tuple[Tensor, Tensor | RowScaled]:
        """As ``ViTBlock.forward``; ``hidden`` may come and go quantized, but where the block modulates it."""
        residual, norm = x if rows is None else x[:, rows], self.norm2
        if modulation is not None and isinstance(hidden, Tensor):
            branch = self.attn(modulation.before_attention(hidden), mask, rows, rotary)  # (B, N_rows, D)
            x, hidden = add_and_norm(residual, branch, norm)
            return add_and_norm(x, self.mlp(modulation.before_mlp(hidden)), following)
        branch = self.attn(hidden, mask, rows, rotary)  # (B, N_rows, D)
        x, hidden = ops.gated_residual_layer_norm(residual, branch, None, norm.weight, norm.bias, norm.eps, fp8=True)
        branch = self.mlp(hidden)
        if not self.hands_on:
            return add_and_norm(x, branch, following)
        return ops.gated_residual_layer_norm(x, branch, None, following.weight, following.bias, following.eps, fp8=True)


def _use_fp8(model: nn.Module, device: torch.device) -> None:
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for index, (name, block) in enumerate(children):
            if not (isinstance(block, DiTBlock | ViTBlock) and _is_original(block)):
                continue
            after = children[index + 1][1] if index + 1 < len(children) else None
            hands_on = isinstance(after, type(block)) and _is_original(after)
            made = Fp8Block(block, device, hands_on) if isinstance(block, DiTBlock) else Fp8ViTBlock(block, device, hands_on)
            setattr(parent, name, made)


# -- what a model is made of -------------------------------------------------------------------------------------------------

ADALN = "adaLN_modulation"
_PARTS = (DiTBlock, ViTBlock, Attention, CrossAttention, Mlp, nn.Linear, nn.LayerNorm, nn.Sequential, nn.SiLU)


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, DiTBlock | ViTBlock)]


def _last_vit_blocks(model: nn.Module) -> list[ViTBlock]:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return [blocks[-1] for blocks in lists if isinstance(blocks[-1], ViTBlock)]


def _linears(part: nn.Module) -> Iterator[nn.Linear]:
    """The linear layers inside of ``part`` that nobody has changed, without those of adaLN."""
    for name, child in part.named_children():
        if is_plain(child, nn.Linear):
            yield child  # type: ignore[misc]
        elif name != ADALN:
            yield from _linears(child)


def _is_original(block: nn.Module) -> bool:
    """Whether nobody has changed any part of a block."""
    return all(any(_untouched(module, kind) for kind in _PARTS) for module in block.modules())


def _untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """:func:`is_plain` for modules without a weight too."""
    if getattr(module, "weight", None) is not None:
        return is_plain(module, kind)
    return is_untouched(module, kind)


def _converted(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The copy's tensor: the original's storage where nothing changes."""
    values = tensor.detach().to(device, dtype if tensor.is_floating_point() else tensor.dtype)
    return nn.Parameter(values, requires_grad=False) if isinstance(tensor, nn.Parameter) else values


def _gelu(mlp: Mlp) -> str:
    return "gelu_tanh" if mlp.approximate == "tanh" else "gelu"


def _rows(model: nn.Module) -> int:
    """How many rows a product in the blocks will have, about: a guidance pair's, or one picture's."""
    config = getattr(model, "config", None)
    if isinstance(config, DiTConfig):
        return 2 * config.sequence_length
    return config.num_patches + config.num_tokens if isinstance(config, TexTokConfig) else 64
