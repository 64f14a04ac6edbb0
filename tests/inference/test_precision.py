"""Copies of models in other precisions: how far from float64, what is shared, what is left alone, which products run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from textok_fast import ops
from textok_fast.config import DiTConfig
from textok_fast.errors import InputError
from textok_fast.inference import precision
from textok_fast.inference.precision import (
    Fp8Block,
    Fp8Linear,
    PackedLinear,
    PackedMlp,
    SplitAttention,
    describe,
    pack_linears,
    prepare,
    weight_bytes,
)
from textok_fast.modeling.dit import DiT
from textok_fast.modeling.layers import Mlp, TextTokens
from textok_fast.modeling.text_encoders import TextFeatures
from textok_fast.modeling.tokenizer import TexTok
from textok_fast.ops import RowScaled
from textok_fast.ops.packed import _RULES
from textok_fast.ops.packed import PRECISIONS as PACKED_PRECISIONS

# Relative to float64. What e4m3 keeps, 4 bits of each number, costs a product of random numbers 4 %; a DiT's residual stream
# and gates hold that down, and in a tokenizer nearly all of a row comes out of the products.
TOLERANCE = {"fp32": 1e-5, "bf16": 1.5e-2, "int8": 1e-2, "fp8": 4e-2}
TOKENIZER_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "int8": 5e-2, "fp8": 0.15}
FORMS = [(name, products) for name in PACKED_PRECISIONS for products in ("auto", "native", "onednn", "reference")]
FORMS = [
    (name, products)
    for name, products in FORMS
    if products not in _RULES or not _RULES[products](torch.empty(1), PACKED_PRECISIONS.index(name), 64)
] + [("fp8", "auto")]


def make_dit(**overrides: Any) -> DiT:
    sizes = {"num_tokens": 6, "in_channels": 4, "num_classes": 5, "width": 48, "depth": 3, "heads": 4, **overrides}
    torch.manual_seed(0)
    dit = DiT(DiTConfig(**sizes))
    with torch.no_grad():
        for parameter in dit.parameters():
            if not parameter.abs().max():  # adaLN-Zero starts as the identity
                parameter.normal_(0, 0.1)
    return dit.eval()


def run_dit(dit: DiT, dtype: torch.dtype, place: str = "cpu") -> Tensor:
    config, generator = dit.config, torch.Generator().manual_seed(1)
    x = torch.randn(3, config.num_tokens, config.in_channels, generator=generator).to(dtype)
    text = image = None
    if config.text_dim:
        mask = torch.arange(5) < torch.tensor([[5], [2], [0]])
        text = TextFeatures(torch.randn(3, 5, config.text_dim, generator=generator).to(place, dtype), mask.to(place))
    if config.image_token_dim:
        image = torch.randn(3, config.num_image_tokens, config.image_token_dim, generator=generator).to(place, dtype)
    t, y = torch.tensor([1.0, 400.0, 999.0]), torch.tensor([0, 3, 5])
    return dit(x.to(place), t.to(place, torch.float64 if dtype == torch.float64 else None), y.to(place), text, image)


def sides(tokenizer: TexTok, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the encoder and the decoder give."""
    config, generator = tokenizer.config, torch.Generator().manual_seed(1)
    pixels = (torch.rand(2, 3, config.image_size, config.image_size, generator=generator) * 2 - 1).to(dtype)
    text = TextFeatures(torch.randn(2, 4, config.text_dim, generator=generator).to(dtype), torch.ones(2, 4, dtype=torch.bool))
    latents = torch.randn(2, config.num_tokens, config.latent_dim, generator=generator).to(dtype)
    return tokenizer.encoder(pixels, text), tokenizer.decoder(latents, text)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.fixture
def tokenizer(make_tokenizer: Callable[..., TexTok]) -> TexTok:
    # As it is initialized: larger weights make it a network in which every error grows.
    model = make_tokenizer(width=48, heads=4, bottleneck="kl")
    torch.manual_seed(0)
    fresh = TexTok(model.config).eval()
    fresh.text_encoder = model.text_encoder
    return fresh


# -- accuracy ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "products"), FORMS)
@pytest.mark.parametrize("kind", [{}, {"text_dim": 7}, {"image_token_dim": 3, "num_image_tokens": 2}])
@torch.no_grad()
def test_a_dit_is_the_same_model(kind: dict[str, int], name: Any, products: Any) -> None:
    dit = make_dit(**kind)
    wanted = run_dit(copy.deepcopy(dit).double(), torch.float64)
    prepared = prepare(dit, name, products=products)
    out = run_dit(prepared, precision.DTYPES[name])
    assert out.dtype == precision.DTYPES[name] and error(out, wanted) < TOLERANCE[name]
    if name != "fp32":
        assert error(out, wanted) > 1e-4  # it does round


@pytest.mark.parametrize(("name", "products"), FORMS)
@torch.no_grad()
def test_a_tokenizer_is_the_same_model(tokenizer: TexTok, name: Any, products: Any) -> None:
    wanted = sides(copy.deepcopy(tokenizer).double(), torch.float64)
    prepared = prepare(tokenizer, name, products=products)
    assert prepared.dtype == precision.DTYPES[name] and prepared.text_encoder is tokenizer.text_encoder
    for found, exact in zip(sides(prepared, prepared.dtype), wanted, strict=True):
        assert error(found, exact) < TOKENIZER_TOLERANCE[name]
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    assert prepared.encode(images, ["a red square", ""]).shape == (2, 3, 4)


class Emulated(nn.Module):
    """A product of e4m3 numbers, summed in float64 and rounded once."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = ops.quantize_channels(linear.weight).dequantize(torch.float64)
        self.bias = linear.bias.detach().bfloat16().double()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(ops.quantize_rows(x).dequantize(torch.float64), self.weight, self.bias).to(self.dtype)


def emulated(block: nn.Module, *paths: str) -> nn.Module:
    made = copy.deepcopy(block).bfloat16()
    for path in paths:
        owner, _, name = path.rpartition(".")
        # The first product of an MLP is rounded after the GELU, to e4m3.
        dtype = torch.float32 if path == "mlp.fc1" else torch.bfloat16
        setattr(made.get_submodule(owner), name, Emulated(block.get_submodule(path), dtype))  # type: ignore[arg-type]
    return made


SELF, MLP, CROSS = ("attn.qkv", "attn.proj"), ("mlp.fc1", "mlp.fc2"), ("cross_attn.q", "cross_attn.kv", "cross_attn.proj")


def changes(block: nn.Module, x: Tensor, hidden: Tensor, *rest: Any) -> Tensor:
    """What a block adds to the residual stream, in float64."""
    after = block(x, hidden, *rest)[0].double()
    return after - x[:, : after.shape[1]].double()


@pytest.mark.parametrize("text_dim", [0, 7])
@torch.no_grad()
def test_the_products_of_an_fp8_dit_block_are_those_of_e4m3_numbers(text_dim: int) -> None:
    dit = make_dit(text_dim=text_dim)
    x, hidden, context = (torch.randn(2, rows, 48).bfloat16() for rows in (6, 6, 5))
    modulation, *following = (torch.randn(2, width).bfloat16() for width in (288, 48, 48))

    def arguments(dtype: torch.dtype) -> list[Any]:
        text = TextTokens(context.to(dtype), torch.ones(2, 5, dtype=torch.bool)) if text_dim else None
        return [x.to(dtype), hidden.to(dtype), modulation.to(dtype), tuple(part.to(dtype) for part in following), text]

    paths = (*SELF, *MLP, *(CROSS if text_dim else ()))
    with ops.use_backend("reference"):  # rounds as much as the emulation; what is rounded otherwise jumps to other e4m3 numbers
        found = changes(prepare(dit, "fp8").blocks[0], *arguments(torch.bfloat16))
        wanted = changes(emulated(dit.blocks[0], *paths), *arguments(torch.bfloat16))
    assert error(found, wanted) < 2e-3 < error(found, changes(dit.double().blocks[0], *arguments(torch.float64)))


@pytest.mark.parametrize("rows", [None, slice(0, 4)])
@torch.no_grad()
def test_the_products_of_an_fp8_vit_block_are_those_of_e4m3_numbers(tokenizer: TexTok, rows: slice | None) -> None:
    x, hidden = torch.randn(2, 9, 48).bfloat16(), torch.randn(2, 9, 48).bfloat16()
    mask, block, norm = torch.arange(9) < torch.tensor([[9], [7]]), tokenizer.decoder.blocks[-1], tokenizer.decoder.norm
    made = prepare(tokenizer, "fp8").decoder
    with ops.use_backend("reference"):
        found = changes(made.blocks[-1], x, hidden, made.norm, mask, rows)
        wanted = changes(emulated(block, *SELF, *MLP), x, hidden, made.norm, mask, rows)
    double = x.double(), hidden.double(), copy.deepcopy(norm).double(), mask, rows
    assert error(found, wanted) < 2e-3 < error(found, changes(copy.deepcopy(block).double(), *double))


# -- what runs ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_fp8_hands_quantized_rows_from_block_to_block() -> None:
    prepared = prepare(make_dit(), "fp8")
    kinds: list[tuple[type, type]] = []
    for block in prepared.blocks:
        assert isinstance(block, Fp8Block)
        block.register_forward_hook(lambda module, given, out: kinds.append((type(given[1]), type(out[1]))))
    run_dit(prepared, torch.bfloat16)
    assert kinds == [(Tensor, RowScaled), (RowScaled, RowScaled), (RowScaled, Tensor)]
    # A run that stops early and goes on gives the same.
    x, c = torch.randn(2, 6, 4).bfloat16(), torch.randn(2, 48).bfloat16()
    modulations = prepared.modulation(c)
    h, hidden = prepared.run_blocks(prepared.embed(x), modulations, stop=2)
    assert isinstance(hidden, RowScaled)
    out = prepared.project(prepared.run_blocks(h, modulations, start=2)[1])
    assert error(out, prepared.step(x, modulations).double()) < 2e-2


@pytest.mark.parametrize(("name", "linear"), [("fp32", PackedLinear), ("fp8", Fp8Linear)])
@torch.no_grad()
def test_the_last_block_computes_only_the_rows_that_are_read(tokenizer: TexTok, name: Any, linear: type[nn.Module]) -> None:
    prepared = prepare(tokenizer, name)
    last = prepared.decoder.blocks[-1]
    assert isinstance(last.attn, SplitAttention)
    rows: dict[str, int] = {}
    for path, module in last.named_modules():
        if isinstance(module, linear) and not path.startswith("mlp.fc1"):  # whose result stays quantized: no forward
            module.register_forward_hook(lambda module, given, out, path=path: rows.update({path: out.shape[1]}))
    sides(prepared, prepared.dtype)
    patches, sequence = 4, 4 + 3 + 4
    assert rows == {"attn.q": patches, "attn.kv": sequence, "attn.proj": patches, "mlp.fc2": patches}
    # For those who call the packed projection themselves.
    hidden, attention = torch.randn(2, 5, 48).to(prepared.dtype), prepare(tokenizer, name).decoder.blocks[-1].attn
    q, k, v = attention.qkv(hidden).unflatten(-1, (3, 4, 12)).unbind(2)  # type: ignore[operator, union-attr]
    out = attention.proj(ops.attention(q, k, v))  # type: ignore[operator, union-attr]
    assert torch.equal(out, attention(hidden))  # type: ignore[operator]


@torch.no_grad()
def test_what_is_swapped_and_what_is_cast() -> None:
    dit = make_dit(text_dim=7)
    prepared = prepare(dit, "int8", products="reference")
    block = prepared.blocks[0]
    assert isinstance(block.mlp, PackedMlp) and isinstance(block.attn.qkv, PackedLinear)
    assert isinstance(block.cross_attn.kv, PackedLinear)  # type: ignore[union-attr]
    assert type(block.adaLN_modulation[1]) is nn.Linear and type(prepared.x_embedder) is nn.Linear  # type: ignore[index]
    lines = describe(prepared)
    assert "6 x 48 -> 192: int8, reference" not in lines and "3 x 48 -> 192: int8, reference" in lines
    assert "3 x 48 -> 288: float32, torch" in lines
    assert "3 x 48 -> 192: fp8" in describe(prepare(dit, "fp8"))
    plain = prepare(dit, "bf16", products="reference")
    assert type(plain.blocks[0].mlp) is Mlp and plain.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_the_original_stays_and_shares_what_is_the_same() -> None:
    dit = make_dit().train()
    before = copy.deepcopy(dit.state_dict())
    prepared = prepare(dit, "fp32")
    assert dit.training and not prepared.training
    assert all(parameter.requires_grad for parameter in dit.parameters())
    assert not any(parameter.requires_grad for parameter in prepared.parameters())
    shared = {
        name
        for name, parameter in dit.named_parameters()
        if parameter.data_ptr() in map(Tensor.data_ptr, prepared.parameters())
    }
    packed = {name for name, _ in dit.named_parameters() if ".attn." in name or (".mlp." in name and "blocks" in name)}
    assert shared == before.keys() - packed
    for name in ("bf16", "int8", "fp8"):
        keys = set(prepare(dit, name).state_dict())  # type: ignore[arg-type]
        assert keys == before.keys() - packed  # packed weights are no one's to store
    assert all(torch.equal(value, before[name]) for name, value in dit.state_dict().items())
    assert all(parameter.dtype == torch.float32 for parameter in dit.parameters())


def test_weight_bytes_counts_what_is_shared_once() -> None:
    dit = make_dit()
    assert weight_bytes(dit) == 4 * sum(parameter.numel() for parameter in dit.parameters())
    assert weight_bytes(prepare(dit, "fp32", products="reference")) == weight_bytes(dit)
    blocks = sum(
        p.numel() for block in dit.blocks for part in (block.attn, block.mlp) for p in part.parameters() if p.ndim == 2
    )
    biases = sum(
        p.numel() for block in dit.blocks for part in (block.attn, block.mlp) for p in part.parameters() if p.ndim == 1
    )
    int8 = weight_bytes(prepare(dit, "int8", products="reference"))
    assert int8 == weight_bytes(dit) - 3 * blocks + 4 * biases  # a byte a weight, a scale a channel
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert weight_bytes(tied) == 4 * (9 + 3 + 3)
    assert weight_bytes(nn.ModuleList([tied, tied])) == weight_bytes(tied)


class Adapter(nn.Linear):
    """What a LoRA library puts in the place of a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8", "fp8"])
@torch.no_grad()
def test_replaced_and_hooked_layers_stay(name: Any) -> None:
    dit = make_dit()
    old = dit.blocks[1].attn.proj
    dit.blocks[1].attn.proj = Adapter(48, 48)
    dit.blocks[1].attn.proj.load_state_dict(old.state_dict())
    calls: list[int] = []
    dit.blocks[2].mlp.fc2.register_forward_hook(lambda *given: calls.append(1))
    dit.blocks[0].mlp.register_forward_hook(lambda *given: calls.append(2))
    wanted = run_dit(copy.deepcopy(dit).double(), torch.float64)
    calls.clear()
    prepared = prepare(dit, name)
    assert error(run_dit(prepared, precision.DTYPES[name]), wanted) < TOLERANCE[name]
    assert type(prepared.blocks[1].attn.proj) is Adapter and calls == [2, 1]
    if name != "fp8":  # whose blocks are swapped whole
        assert isinstance(prepared.blocks[1].attn.qkv, PackedLinear)


@torch.no_grad()
def test_an_fp8_block_before_a_changed_one_hands_it_bf16() -> None:
    dit = make_dit()
    dit.blocks[1].attn.proj = Adapter(48, 48)
    wanted = run_dit(copy.deepcopy(dit).double(), torch.float64)
    prepared = prepare(dit, "fp8")
    assert [isinstance(block, Fp8Block) and block.hands_on for block in prepared.blocks] == [False, False, False]
    assert [isinstance(block, Fp8Block) for block in prepared.blocks] == [True, False, True]
    assert error(run_dit(prepared, torch.bfloat16), wanted) < 4e-2


@torch.no_grad()
def test_any_module_has_its_linear_layers_packed() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Sequential(nn.Linear(16, 8, bias=False), nn.LayerNorm(8)))
    x = torch.randn(3, 8)
    wanted = model(x)
    prepared = prepare(model, "fp32")
    assert isinstance(prepared[0], PackedLinear) and isinstance(prepared[2][0], PackedLinear)
    torch.testing.assert_close(prepared(x), wanted)
    assert prepared[0].weight.dtype == torch.float32  # which transformers' T5 asks for
    packed = copy.deepcopy(copy.deepcopy(prepared))  # which oneDNN's own tensors do not allow
    assert torch.equal(packed(x), prepared(x))
    pack_linears(model, "int8")
    assert isinstance(model[0], PackedLinear) and 1e-4 < error(model(x), wanted.double()) < 3e-2
    tied = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    tied["head"].weight = tied["embedding"].weight  # type: ignore[assignment]
    half = prepare(tied, "bf16")
    assert half["embedding"].weight.dtype == torch.bfloat16 and tied["embedding"].weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["bf16", "int8", "fp8"])
@torch.no_grad()
def test_prepared_models_compile_into_one_graph(name: Any) -> None:
    if name == "fp8" and torch.__version__ < "2.12":
        pytest.skip("the references, which emulate FP8 here, ask for autocast, which torch 2.11 does not trace")
    torch._dynamo.reset()
    prepared = prepare(make_dit(depth=2), name)
    dtype = precision.DTYPES[name]
    x, modulations = torch.randn(2, 6, 4).to(dtype), prepared.modulation(torch.randn(2, 48).to(dtype))
    compiled = torch.compile(prepared.step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, modulations), prepared.step(x, modulations))


def test_bad_arguments_are_named() -> None:
    dit = make_dit(depth=1)
    with pytest.raises(InputError, match="precision must be one of fp32, bf16, int8, fp8, got 'fp16'"):
        prepare(dit, "fp16")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="products must be one of .*, got 'mkl'"):
        prepare(dit, "fp32", products="mkl")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="int8 runs on a CPU only: use 'fp8' or 'bf16' on cuda"):
        prepare(dit, "int8", device="cuda")
    with pytest.raises(InputError, match="fp8 is for a DiT and a TexTok, got a Linear"):
        prepare(nn.Linear(3, 3), "fp8")


# -- on a GPU ----------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("kind", [{}, {"text_dim": 16}])
@torch.no_grad()
def test_on_a_gpu(kind: dict[str, int], name: Any) -> None:
    if name == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        with pytest.raises(InputError, match="use precision 'bf16'"):
            prepare(make_dit(), "fp8", device="cuda")
        return
    dit = make_dit(width=64, **kind)
    wanted = run_dit(copy.deepcopy(dit).double(), torch.float64)
    prepared = prepare(dit, name, device="cuda")
    tensors = [*prepared.parameters(), *prepared.buffers()]
    assert all(tensor.is_cuda for tensor in tensors) and not any(parameter.is_cuda for parameter in dit.parameters())
    assert error(run_dit(prepared, precision.DTYPES[name], "cuda").cpu(), wanted) < max(TOLERANCE[name], 2e-3)
