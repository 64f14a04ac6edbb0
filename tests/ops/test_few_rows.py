"""The kernels of csrc/cuda/few_rows.h: run on the host by emulate_cuda.cpp, and a whole block on a GPU where there is one.

References are written here, in float64, from the formulas.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from textok_fast import ops
from textok_fast.errors import InputError
from textok_fast.inference.precision import FewRowsDiTBlock
from textok_fast.modeling.dit import DiTBlock
from textok_fast.ops.block import MAX_ROWS, PackedBlock
from textok_fast.ops.dispatch import REFERENCE, choose, use_backend
from textok_fast.ops.library import has_native, has_native_cuda

EPS = 1e-6
ACTIVATIONS = ("none", "gelu", "gelu_tanh")


class View(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("begin", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
    ]

    @classmethod
    def of(cls, tensor: Tensor | None) -> View:
        if tensor is None:
            return cls(None, 0, 0, None, None)
        storage = tensor.untyped_storage()
        return cls(tensor.data_ptr(), tensor.stride(0), 0, storage.data_ptr(), storage.data_ptr() + storage.nbytes())


class Emulator:
    def __init__(self, file: Path) -> None:
        self.library = ctypes.CDLL(str(file))

    def __call__(
        self, name: str, first: tuple[int, ...], tensors: list[Tensor | None], sizes: tuple[int, ...], *eps: float
    ) -> None:
        views, numbers = (View * len(tensors))(*map(View.of, tensors)), (ctypes.c_int64 * len(sizes))(*sizes)
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        failure = function(*first, views, numbers, *map(ctypes.c_float, eps))
        assert failure is None, failure.decode()

    def plan(
        self,
        rows: int,
        inputs: int,
        outputs: int,
        partial: bool,
        groups: bool = False,
        given: tuple[int, int, int] = (0, 0, 0),
    ) -> list[int]:
        """Columns, cluster and splits, for the 132 processors of an H100 or H200."""
        result = (ctypes.c_int64 * 3)(*given)
        sizes = [ctypes.c_int64(size) for size in (rows, inputs, outputs)]
        self.library.plan_rows(*sizes, int(partial), int(groups), 132, result)
        return list(result)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = Path(__file__).with_name("emulate_cuda.cpp")
    file = tmp_path_factory.mktemp("emulator") / "emulator.so"
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-shared", "-fPIC"]
    done = subprocess.run([*command, "-o", str(file), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Emulator(file)


def bf16(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (scale * torch.randn(*shape, generator=generator)).bfloat16()


def activated(x: Tensor, activation: str) -> Tensor:
    return (
        x if activation == "none" else torch.nn.functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    )


def close(found: Tensor, wanted: Tensor) -> None:
    """To a unit in the last place of bfloat16."""
    torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=2e-4)


# -- products ------------------------------------------------------------------------------------------------------------------

# (M, K, N, columns, cluster, splits): every tile; rows and columns that leave a part of the last one empty; shares of K that
# differ, that are empty, and that take more stages than there are.
PRODUCTS = [
    (64, 128, 144, 144, 2, 1),
    (50, 416, 296, 144, 1, 2),
    (64, 96, 128, 128, 4, 1),
    (70, 224, 136, 128, 1, 1),
    (64, 288, 112, 112, 1, 1),
    (33, 320, 120, 112, 2, 2),
    (64, 352, 72, 72, 1, 1),
    (64, 1152, 80, 72, 8, 1),
    (16, 160, 64, 64, 8, 1),
    (130, 576, 72, 64, 2, 2),
    (1, 32, 8, 32, 1, 1),
    (64, 384, 40, 32, 4, 1),
]


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(("rows", "inputs", "outputs", "columns", "cluster", "splits"), PRODUCTS)
def test_emulated_product(
    emulator: Emulator, rows: int, inputs: int, outputs: int, columns: int, cluster: int, splits: int, order: int, groups: bool
) -> None:
    x, weight, bias = bf16(rows, inputs), bf16(outputs, inputs, scale=inputs**-0.5), bf16(outputs)
    product = x.double() @ weight.double().T  # (M, N)
    activation = (columns // 8 + order) % 3
    partial = torch.full((splits, rows, outputs), torch.nan)
    sizes = (rows, inputs, outputs, columns, cluster, splits, activation, int(groups))
    emulator("emulate_rows_product", (order,), [x, weight, None, None, partial], sizes)
    torch.testing.assert_close(partial.double().sum(0), product, rtol=1e-5, atol=1e-5)
    if splits > 1:
        return
    out = torch.full((rows, outputs), torch.nan, dtype=torch.bfloat16)
    emulator("emulate_rows_product", (order,), [x, weight, bias, out, None], sizes)
    close(out, activated(product + bias.double(), ACTIVATIONS[activation]))


def test_emulator_notices_a_short_weight(emulator: Emulator) -> None:
    x, weight, out = bf16(64, 64), bf16(31, 64), torch.empty(64, 32, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="outside of the tensors"):
        emulator("emulate_rows_product", (0,), [x, weight, None, out, None], (64, 64, 32, 32, 1, 1, 0, 0))


# (D, hidden) of the sizes S, B, L, XL
WIDTHS = [(384, 1536), (768, 3072), (1024, 4096), (1152, 4608)]


def products(width: int, hidden: int) -> list[tuple[int, int, bool]]:
    return [(width, 3 * width, False), (width, width, True), (width, hidden, False), (hidden, width, True)]


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("rows", [32, 64, 128, 256])
@pytest.mark.parametrize(("width", "hidden"), WIDTHS)
def test_there_is_a_plan_for_every_size(emulator: Emulator, width: int, hidden: int, rows: int, groups: bool) -> None:
    for inputs, outputs, partial in products(width, hidden):
        columns, cluster, splits = emulator.plan(rows, inputs, outputs, partial, groups)
        assert columns and cluster in (1, 2, 4, 8) and splits in (1, 2)
        assert partial or splits == 1


def test_the_plan_for_dit_xl(emulator: Emulator) -> None:
    """One block on nearly every multiprocessor; what is given stays."""
    for groups in (False, True):
        found = [emulator.plan(64, *sizes, groups) for sizes in products(1152, 4608)]
        assert found == [[112, 4, 1], [72, 4, 2], [144, 4, 1], [144, 8, 2]]
        # 18 slices of 128 columns are more than fits
        assert emulator.plan(64, 1152, 4608, False, groups, (128, 2, 0)) == [0, 0, 0]
        assert emulator.plan(64, 1152, 4608, False, groups, (64, 4, 0)) == [64, 4, 1]


@pytest.mark.slow
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("index", range(4))
def test_emulated_products_of_dit_xl(emulator: Emulator, index: int, groups: bool) -> None:
    inputs, outputs, is_partial = products(1152, 4608)[index]
    columns, cluster, splits = emulator.plan(64, inputs, outputs, is_partial, groups)
    outputs = columns + 8  # two tiles show all there is
    x, weight = bf16(64, inputs), bf16(outputs, inputs, scale=inputs**-0.5)
    partial = torch.full((splits, 64, outputs), torch.nan)
    sizes = (64, inputs, outputs, columns, cluster, splits, 0, int(groups))
    emulator("emulate_rows_product", (int(groups),), [x, weight, None, None, partial], sizes)
    torch.testing.assert_close(partial.double().sum(0), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


# -- attention -----------------------------------------------------------------------------------------------------------------


def attention(qkv: Tensor, heads: int) -> Tensor:
    """(B, N, 3 D) -> (B, N, D) in float64."""
    q, k, v = qkv.double().unflatten(-1, (3, heads, -1)).unbind(2)  # each (B, N, H, d)
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "width"),
    [(2, 32, 2, 72), (1, 16, 3, 64), (1, 64, 1, 72), (2, 33, 1, 64), (1, 1, 1, 8), (1, 50, 2, 96), (1, 7, 1, 40)],
)
def test_emulated_attention(emulator: Emulator, batch: int, tokens: int, heads: int, width: int, order: int) -> None:
    qkv = bf16(batch, tokens, 3 * heads * width, scale=2.0)
    out = torch.full((batch, tokens, heads * width), torch.nan, dtype=torch.bfloat16)
    emulator("emulate_rows_attention", (order,), [qkv, out], (batch, tokens, heads, width))
    # weights are rounded to bfloat16 before they are multiplied
    torch.testing.assert_close(out.double(), attention(qkv, heads), rtol=2**-7, atol=1e-2)


# -- gated residual and LayerNorm ----------------------------------------------------------------------------------------------


def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D); shift, scale (B, D)."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + EPS) * (1 + scale[:, None]) + shift[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "tokens", "width", "splits"), [(2, 3, 1152, 2), (1, 5, 384, 1), (3, 1, 8, 2), (1, 2, 2048, 1)]
)
def test_emulated_norm(emulator: Emulator, batch: int, tokens: int, width: int, splits: int, dtype: torch.dtype) -> None:
    x = bf16(batch, tokens, width, scale=3.0).to(dtype) + 20
    partial, bias = torch.randn(splits, batch, tokens, width), bf16(width)
    gate, shift, scale = bf16(batch, 3 * width + 8)[:, : 3 * width].chunk(3, dim=1)
    y = torch.full(x.shape, torch.nan, dtype=dtype)
    hidden = torch.full(x.shape, torch.nan, dtype=torch.bfloat16)
    kind = int(dtype == torch.bfloat16)
    emulator(
        "emulate_rows_norm",
        (kind, kind),
        [x, partial, bias, gate, shift, scale, y, hidden],
        (batch, tokens, width, splits),
        EPS,
    )
    wanted = x.double() + gate.double()[:, None] * (partial.double().sum(0) + bias.double())
    torch.testing.assert_close(y.double(), wanted, rtol=2**-8 if kind else 1e-6, atol=1e-5)
    close(hidden, norm(y.double(), shift.double(), scale.double()))


# -- the operations' choice ----------------------------------------------------------------------------------------------------


def pack(block: DiTBlock) -> PackedBlock:
    layers = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    return PackedBlock(
        *(ops.pack_linear(each.weight, each.bias, "bf16", REFERENCE) for each in layers), block.attn.heads, "gelu_tanh"
    )


def make_block(width: int, heads: int, device: str = "cpu", seed: int = 0) -> DiTBlock:
    torch.manual_seed(seed)
    block = DiTBlock(width, heads, 4.0)
    for parameter in block.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.1)
        else:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return block.to(device, torch.bfloat16).requires_grad_(False)


def make_inputs(batch: int, tokens: int, width: int, stream: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    """x, hidden, modulation, shift, scale, the last three views of one table."""
    table = (0.5 * torch.randn(batch, 8 * width)).to(device, torch.bfloat16)
    parts = table.split([6 * width, width, width], dim=1)
    x, hidden = torch.randn(batch, tokens, width), torch.randn(batch, tokens, width)
    return x.to(device, stream), hidden.to(device, torch.bfloat16), *parts


def test_elsewhere_a_block_stays_what_it_is() -> None:
    """On a CPU nothing is chosen for weights as they are, and the block in its place computes what it did."""
    block = make_block(64, 1)
    inputs = make_inputs(2, 4, 64, torch.float32)
    inside = FewRowsDiTBlock.of(block)
    assert inside is not None and choose("packed_block", inside.packed, *inputs) == REFERENCE
    assert inside.packed.fc1.weight.data_ptr() == block.mlp.fc1.weight.data_ptr()  # not one more copy of the weights
    assert inside.state_dict().keys() == block.state_dict().keys()
    x, hidden, modulation, *following = inputs
    for mine, wanted in zip(inside(x, hidden, modulation, following), block(x, hidden, modulation, following), strict=True):
        assert torch.equal(mine, wanted)
    block.attn.proj.register_forward_hook(lambda *_: None)
    assert FewRowsDiTBlock.of(block) is None
    assert FewRowsDiTBlock.of(DiTBlock(64, 1, 4.0, qk_norm=True)) is None
    assert FewRowsDiTBlock.of(DiTBlock(64, 1, 4.0, cross=True)) is None


# -- a GPU ---------------------------------------------------------------------------------------------------------------------


# By warpgroups too where there are some: the same kernels with other products inside of them.
WARPGROUPS = [False, True]


def skip_unless_hopper(groups: bool) -> None:
    if groups and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only GPUs of compute capability 9.0 multiply by warpgroups")


def _has_clusters() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


on_gpu = pytest.mark.skipif(
    not _has_clusters() or not has_native_cuda() or not has_native("few_rows_linear"),
    reason="no GPU of compute capability 9.0, or the native library is without its code",
)
SIZES = {"S": (384, 6), "B": (768, 12), "L": (1024, 16), "XL": (1152, 16)}


def block_in_float64(block: PackedBlock, x: Tensor, hidden: Tensor, modulation: Tensor, shift: Tensor, scale: Tensor) -> Any:
    x, hidden, modulation, shift, scale = (tensor.double() for tensor in (x, hidden, modulation, shift, scale))

    def linear(x: Tensor, packed: ops.PackedWeight) -> Tensor:
        assert packed.bias is not None
        return x @ packed.weight.double().T + packed.bias.double()

    _, _, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
    x = x + gate1[:, None] * linear(attention(linear(hidden, block.qkv), block.heads), block.proj)
    branch = linear(activated(linear(norm(x, shift2, scale2), block.fc1), "gelu_tanh"), block.fc2)
    x = x + gate2[:, None] * branch
    return x, norm(x, shift, scale)


def poison(*shape: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Leaves NaN where the next tensor of that size is likely to lie."""
    torch.full(shape, torch.nan, dtype=dtype, device="cuda")


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("groups", WARPGROUPS)
@pytest.mark.parametrize("rows", [16, 64, 130])
@pytest.mark.parametrize("size", SIZES)
def test_products_on_gpu(size: str, rows: int, groups: bool) -> None:
    skip_unless_hopper(groups)
    width, _ = SIZES[size]
    linear = torch.ops.textok_fast.few_rows_linear
    for inputs, outputs, _ in products(width, 4 * width):
        x, weight, bias = bf16(rows, inputs).cuda(), bf16(outputs, inputs, scale=inputs**-0.5).cuda(), bf16(outputs).cuda()
        wanted = x.double() @ weight.double().T
        for overlap in (False, True):
            poison(rows, outputs)
            close(
                linear(x, weight, bias, "gelu_tanh", False, 0, 0, 0, groups, overlap),
                activated(wanted + bias.double(), "gelu_tanh"),
            )
            poison(2, rows, outputs, dtype=torch.float32)
            found = linear(x, weight, None, "none", True, 0, 0, 0, groups, overlap)
            torch.testing.assert_close(found.double().sum(0), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("groups", WARPGROUPS)
@pytest.mark.parametrize("columns", [144, 128, 112, 72, 64, 32])
def test_every_tile_on_gpu(columns: int, groups: bool) -> None:
    skip_unless_hopper(groups)
    x, weight = bf16(64, 1152).cuda(), bf16(296, 1152, scale=0.03).cuda()
    wanted = x.double() @ weight.double().T
    ran = 0
    for cluster in (1, 2, 4, 8):
        for splits in (1, 2):
            if columns * 64 * 36 // (cluster * splits) > 70_000:  # the weights of a block, beside which x must fit
                continue
            found = torch.ops.textok_fast.few_rows_linear(x, weight, None, "none", True, columns, cluster, splits, groups, True)
            assert found.shape == (splits, 64, 296)
            torch.testing.assert_close(found.double().sum(0), wanted, rtol=1e-4, atol=1e-4)
            ran += 1
    assert ran >= 3


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("tokens", [1, 16, 32, 50, 64])
@pytest.mark.parametrize("width", [64, 72])
def test_attention_on_gpu(width: int, tokens: int) -> None:
    qkv = bf16(3, tokens, 3 * 4 * width, scale=2.0).cuda()
    poison(3, tokens, 4 * width)
    found = torch.ops.textok_fast.few_rows_attention(qkv, 4, True)
    torch.testing.assert_close(found.double(), attention(qkv, 4), rtol=2**-7, atol=1e-2)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [2, 4])
@pytest.mark.parametrize("tokens", [16, 32, 50, 64])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("groups", WARPGROUPS)
def test_block_on_gpu(
    monkeypatch: pytest.MonkeyPatch, size: str, tokens: int, batch: int, stream: torch.dtype, groups: bool
) -> None:
    skip_unless_hopper(groups)
    monkeypatch.setenv("TEXTOK_WARPGROUPS", str(int(groups)))
    width, heads = SIZES[size]
    block = pack(make_block(width, heads, "cuda"))
    inputs = make_inputs(batch, tokens, width, stream, "cuda")
    wanted = block_in_float64(block, *inputs)
    with use_backend(packed_block="native"):
        found = ops.packed_block(block, *inputs)
    assert [tensor.dtype for tensor in found] == [stream, torch.bfloat16]
    assert error(found[0], wanted[0]) < (5e-3 if stream == torch.bfloat16 else 2e-3)
    assert error(found[1], wanted[1]) < 8e-3


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("groups", WARPGROUPS)
@pytest.mark.parametrize(("size", "batch", "tokens"), [("XL", 2, 32), ("XL", 4, 64), ("S", 2, 16), ("L", 2, 50)])
def test_blocks_in_a_cuda_graph(monkeypatch: pytest.MonkeyPatch, size: str, batch: int, tokens: int, groups: bool) -> None:
    """Overlapping launches change no bit, in a hundred replays over poisoned results: no kernel runs ahead of its inputs."""
    skip_unless_hopper(groups)
    monkeypatch.setenv("TEXTOK_WARPGROUPS", str(int(groups)))
    width, heads = SIZES[size]
    blocks = [pack(make_block(width, heads, "cuda", seed)) for seed in range(6)]
    x, hidden, modulation, shift, scale = make_inputs(batch, tokens, width, torch.float32, "cuda")

    def run() -> tuple[Tensor, Tensor]:
        stream, normed = x, hidden
        for block in blocks:
            stream, normed = ops.packed_block(block, stream, normed, modulation, shift, scale)
        return stream, normed

    with use_backend(packed_block="native"):
        monkeypatch.setenv("TEXTOK_OVERLAP", "0")
        wanted = [tensor.clone() for tensor in run()]
        monkeypatch.setenv("TEXTOK_OVERLAP", "1")
        for mine, other in zip(run(), wanted, strict=True):
            assert torch.equal(mine, other)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x.mul_(1)  # a kernel of PyTorch's ahead, as in a step
            captured = run()
    for _ in range(100):
        for tensor in captured:
            tensor.fill_(torch.nan)
        graph.replay()
        for mine, other in zip(captured, wanted, strict=True):
            assert torch.equal(mine, other)


@pytest.mark.gpu
@on_gpu
def test_choice_on_gpu() -> None:
    """Not by default; forced strictly, it says what it does not take, and the block in its place runs otherwise."""
    block = make_block(384, 6, "cuda")
    inside = FewRowsDiTBlock.of(block)
    assert inside is not None
    inputs = make_inputs(2, 32, 384, torch.float32, "cuda")
    x, hidden, modulation, *following = inputs
    assert choose("packed_block", inside.packed, *inputs) == REFERENCE
    assert torch.equal(inside(x, hidden, modulation, following)[0], block(x, hidden, modulation, following)[0])
    with use_backend(packed_block="native"):
        assert choose("packed_block", inside.packed, *inputs) == "native"
        assert error(inside(x, hidden, modulation, following)[0], block(x, hidden, modulation, following)[0].double()) < 5e-3
        many = make_inputs(MAX_ROWS // 32 + 1, 32, 384, torch.float32, "cuda")
        with pytest.raises(InputError, match=f"above {MAX_ROWS} rows"):
            ops.packed_block(inside.packed, *many)
        with pytest.raises(InputError, match="1 to 64 tokens"):
            ops.packed_block(inside.packed, *make_inputs(1, 65, 384, torch.float32, "cuda"))
