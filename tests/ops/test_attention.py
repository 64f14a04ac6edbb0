"""Attention's reference, torch's and the choice between backends. The kernel: test_triton_attention."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn import functional as F

from textok_fast import ops
from textok_fast.errors import InputError
from textok_fast.ops import dispatch
from textok_fast.ops.attention import attention_reference, short_attention

module = sys.modules["textok_fast.ops.attention"]  # and not the function of that name


def reference_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    batch, n, heads, dim = q.shape
    out = np.zeros((batch, n, heads * dim))
    for b in range(batch):
        keep = np.arange(k.shape[1]) if mask is None else np.flatnonzero(mask[b])
        for h in range(heads):
            scores = q[b, :, h] @ k[b, keep, h].T / np.sqrt(dim)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[b, :, h * dim : (h + 1) * dim] = weights / weights.sum(axis=1, keepdims=True) @ v[b, keep, h]
    return out


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


backends = pytest.mark.parametrize("backend", ["reference", "sdpa"])

# -- numbers -----------------------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize(("queries", "keys", "heads", "dim"), [(5, 5, 2, 4), (3, 7, 1, 6), (1, 9, 3, 5)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention(backend: str, queries: int, keys: int, heads: int, dim: int, masked: bool, dtype: torch.dtype) -> None:
    q, k, v = double(2, queries, heads, dim), double(2, keys, heads, dim), double(2, keys, heads, dim)
    mask = None
    if masked:
        mask = torch.ones(2, keys, dtype=torch.bool)
        mask[0, keys // 2 :] = False
        mask[1, 0] = False
    with ops.use_backend(attention=backend):
        out = ops.attention(q.to(dtype), k.to(dtype), v.to(dtype), mask)
    wanted = reference_attention(q.numpy(), k.numpy(), v.numpy(), None if mask is None else mask.numpy())
    assert out.dtype == dtype
    np.testing.assert_allclose(out.numpy(), wanted, atol=1e-12 if dtype == torch.float64 else 1e-5)


@backends
def test_attention_reads_strided_views_of_a_packed_projection(backend: str) -> None:
    packed = double(2, 6, 3, 2, 4)
    q, k, v = packed.unbind(2)  # none of them contiguous
    assert not q.is_contiguous()
    wanted = reference_attention(*(part.numpy() for part in (q, k, v)), None)
    with ops.use_backend(attention=backend):
        np.testing.assert_allclose(ops.attention(q, k, v).numpy(), wanted, atol=1e-12)


@backends
def test_attention_never_reads_a_masked_value(backend: str) -> None:
    q, k, v = double(1, 3, 2, 4), double(1, 5, 2, 4), double(1, 5, 2, 4)
    mask = torch.tensor([[True, True, False, True, False]])
    with ops.use_backend(attention=backend):
        before = ops.attention(q, k, v, mask)
        k[:, ~mask[0]], v[:, ~mask[0]] = 1e6, -1e6
        assert torch.equal(ops.attention(q, k, v, mask), before)


@backends
def test_a_sample_without_keys_gets_zeros_and_no_gradient(backend: str) -> None:
    q, k, v = (double(2, 3, 1, 4).requires_grad_() for _ in range(3))
    mask = torch.tensor([[False, False, False], [True, False, True]])
    with ops.use_backend(attention=backend):
        out = ops.attention(q, k, v, mask)
        gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert torch.equal(out[0], torch.zeros_like(out[0])) and out[1].abs().min() > 0
    assert all(torch.equal(gradient[0], torch.zeros_like(gradient[0])) for gradient in gradients)
    assert all(gradient[1].abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_the_reference_rounds_once(dtype: torch.dtype, digits: int) -> None:
    q, k, v = (torch.randn(2, 9, 2, 8).to(dtype) for _ in range(3))
    wanted = reference_attention(*(part.double().numpy() for part in (q, k, v)), None)
    out = attention_reference(q, k, v)
    assert out.dtype == dtype
    error = np.abs(out.double().numpy() - wanted) / np.abs(wanted)
    assert error.max() < 1.01 * 2.0**-digits  # half a unit in the last of so many binary digits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_in_float32_under_autocast_too(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 9, 2, 8).to(dtype) for _ in range(3))
    wanted = attention_reference(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_reference(q, k, v), wanted)


@backends
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(backend: str, masked: bool) -> None:
    mask = torch.tensor([[True, False, True, True]]) if masked else None
    q, k, v = (double(1, n, 2, 2).requires_grad_() for n in (3, 4, 4))
    with ops.use_backend(attention=backend):
        assert torch.autograd.gradcheck(lambda q, k, v: ops.attention(q, k, v, mask), (q, k, v))


# -- packed ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [None, slice(2, 5), slice(-1, None), slice(None, None, 2)])
@pytest.mark.parametrize("flat", [False, True])
def test_short_attention_is_attention_of_the_parts(rows: slice | None, flat: bool) -> None:
    qkv = double(2, 6, 3, 2, 4)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    wanted = reference_attention(*(part.numpy() for part in qkv.unbind(2)), mask.numpy())
    out = short_attention(qkv.flatten(2) if flat else qkv, 2, mask, rows)
    np.testing.assert_allclose(out.numpy(), wanted[:, rows if rows is not None else slice(None)], atol=1e-12)


def test_short_attention_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(module, "_sdpa", lambda q, k, v, mask: seen.extend((q, k, v)) or q.flatten(2))
    qkv = torch.randn(2, 6, 24)
    with ops.use_backend(attention="sdpa"):
        short_attention(qkv, 2, rows=slice(1, 3))
    assert [part.untyped_storage().data_ptr() for part in seen] == [qkv.untyped_storage().data_ptr()] * 3
    assert [part.storage_offset() for part in seen] == [24, 8, 16]


@pytest.mark.parametrize("shape", [(2, 6, 25), (2, 6, 2, 2, 4), (2, 6, 3, 4, 4), (6, 24), (2, 6, 3, 8)])
def test_what_is_not_packed_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"qkv must be \(B, N, 3, 2, D\) or \(B, N, 3 \* 2 \* D\), got \("):
        short_attention(torch.zeros(shape), 2)


def test_what_does_not_belong_together_is_refused() -> None:
    q, mask = torch.zeros(2, 5, 3, 4), torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(InputError, match=r"q must be \(B, N_q, H, D\), got \(2, 5, 12\)"):
        ops.attention(q.flatten(2), q, q)
    for k, v in ((q[:1], q[:1]), (q[:, :, :1], q[:, :, :1]), (q[..., :2], q[..., :2]), (q, q[:, 1:]), (q, q[..., 1:])):
        with pytest.raises(InputError, match=r"k and v must be \(2, N_k, 3, 4\) like q"):
            ops.attention(q, k, v)
    for k, v in ((q.half(), q), (q, q.double())):
        with pytest.raises(InputError, match="of one float dtype"):
            ops.attention(q, k, v)
    for wrong in (mask.float(), mask[:, 1:], mask[:1], mask[:, None]):
        with pytest.raises(InputError, match=r"mask must be bool \(2, 5\)"):
            ops.attention(q, q, q, wrong)


# -- choice ------------------------------------------------------------------------------------------------------------------


def choose(q: Tensor, keys: int | None = None, masked: bool = False) -> str:
    k = q if keys is None else torch.empty((q.shape[0], keys, *q.shape[2:]), dtype=q.dtype, device=q.device)
    mask = torch.ones(k.shape[:2], dtype=torch.bool, device=q.device) if masked else None
    return dispatch.choose("attention", q, k, k, mask)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Tensor]]:
    """Makes tensors that think they lie on a GPU, where Triton runs and no flash-attn is installed."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9, minor=0))
    for state, value in (("triton", ""), ("flash", "none")):
        monkeypatch.setitem(dispatch._state, state, value)
    monkeypatch.setattr(dispatch, "_forced", {})
    with FakeTensorMode():
        yield lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="cuda:0")


def test_what_the_native_kernel_does_not_take_gets_sdpa_on_a_cpu() -> None:
    x = torch.zeros(1, 4, 2, 8, dtype=torch.float64)
    assert choose(x) == choose(x, masked=True) == choose(x.half()) == "sdpa"


def test_short_sequences_get_triton(gpu: Callable[..., Tensor]) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert choose(gpu(1, 32, 16, 72, dtype=dtype)) == choose(gpu(1, 1024, 16, 72, dtype=dtype), keys=256) == "triton"
        assert choose(gpu(1, 256, 1, 128, dtype=dtype), masked=True) == "triton"
    for dtype in (torch.float32, torch.float64):  # without tensor cores, and not at all
        assert choose(gpu(1, 32, 16, 72, dtype=dtype)) == choose(gpu(1, 1, 1, 16, dtype=dtype)) == "sdpa"
    with ops.use_backend(attention="triton"):
        assert choose(gpu(1, 32, 16, 72, dtype=torch.float32)) == "triton"
    assert choose(gpu(1, 257, 16, 72)) == choose(gpu(1, 32, 16, 136)) == choose(gpu(1, 32, 16, 72), keys=257) == "sdpa"


def test_training_does_not_get_triton(gpu: Callable[..., Tensor]) -> None:
    q = gpu(1, 32, 16, 72).requires_grad_()
    assert choose(q) == "sdpa"
    with torch.no_grad():
        assert choose(q) == "triton"


def test_the_table_decides(gpu: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.TRITON_UP_TO, torch.bfloat16, 64)
    assert choose(gpu(1, 65, 2, 64)) == "sdpa" and choose(gpu(1, 64, 2, 64)) == "triton"


class Export(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        return ops.attention(q, k, k, mask)


@pytest.mark.parametrize(
    ("forced", "fused"), [({}, True), ({"vq_nearest": "reference"}, True), ({"attention": "reference"}, False)]
)
def test_an_exporter_gets_sdpa_unless_the_reference_is_forced(forced: dict[str, str], fused: bool) -> None:
    inputs = torch.randn(2, 3, 2, 4), torch.randn(2, 5, 2, 4), torch.rand(2, 5) > 0.2
    with ops.use_backend(**forced):
        graph = torch.export.export(Export(), inputs)
    assert any("scaled_dot_product_attention" in str(node.target) for node in graph.graph.nodes) == fused
    torch.testing.assert_close(graph.module()(*inputs), attention_reference(inputs[0], inputs[1], inputs[1], inputs[2]))


def test_pytorchs_own_runs_where_all_operations_are_forced_to_their_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "attention_reference", lambda *args: pytest.fail("the formula is for definition only"))
    with ops.use_backend("reference"):
        assert ops.attention(*[torch.randn(2, 3, 2, 4)] * 3).shape == (2, 3, 8)


# -- flash-attn, of which each generation is here as far as its signature ----------------------------------------------------


def generation_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    assert dropout_p == 0 and not causal and not return_attn_probs
    return flash(q, k, v, softmax_scale)


def generation_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Tensor:
    assert not causal and qv is None and not return_attn_probs
    return flash(q, k, v, softmax_scale)


def generation_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    **others: Any,
) -> tuple[Tensor, None]:
    assert qv is None and gather_kv_indices is None and not causal and not others
    return flash(q, k, v, softmax_scale), None  # the logarithms of the sums, always returned


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """(B, N, H, D) -> the same, of half precision, as all generations."""
    assert scale is None and q.dtype in (torch.float16, torch.bfloat16) and q.stride(-1) == 1
    return F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)


FUNCTIONS: dict[int, Callable[..., Any]] = {2: generation_2, 3: generation_3, 4: generation_4}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, gpu: Callable[..., Tensor]) -> Callable[..., None]:
    """Puts generations of flash-attn into ``sys.modules`` of a machine with a GPU of that compute capability."""

    def install(*generations: int, capability: int = 9) -> None:
        monkeypatch.setattr(module, "_flash_functions", {})
        monkeypatch.setattr(module, "_flash_generations", {})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
        for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
            monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]  # not there
        if 4 in generations:
            monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))  # empty, with generation 4 alone
        for generation in generations:
            package = ModuleType(module.FLASH_MODULES[generation])
            package.flash_attn_func = FUNCTIONS[generation]  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, package.__name__, package)
        monkeypatch.delitem(dispatch._state, "flash")
        monkeypatch.setattr("importlib.util.find_spec", lambda name: sys.modules.get(name))
        dispatch.load_backend("flash")

    return install


@pytest.mark.parametrize("generation", [2, 3, 4])
def test_long_sequences_get_flash_attention(install: Callable[..., None], gpu: Callable[..., Tensor], generation: int) -> None:
    install(generation)
    q = gpu(2, 300, 4, 72)
    assert choose(q) == choose(gpu(2, 300, 4, 72, dtype=torch.float16)) == choose(gpu(2, 32, 4, 72).requires_grad_()) == "flash"
    assert choose(q, masked=True) == choose(gpu(2, 300, 4, 72, dtype=torch.float32)) == "sdpa"
    assert choose(gpu(2, 300, 4, 76)) == choose(gpu(2, 300, 4, 136)) == "sdpa"
    assert choose(gpu(2, 256, 4, 72)) == "triton"
    with ops.use_backend(attention="flash"):
        assert choose(gpu(2, 32, 4, 72)) == "flash"
        with pytest.raises(InputError, match="'flash' does not take these inputs: it takes no key mask"):
            choose(q, masked=True)


@pytest.mark.parametrize("generation", [2, 3, 4])
def test_flash_attention_is_called_as_it_wants(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, generation: int
) -> None:
    install(generation)
    assert module._import_flash(generation)
    module._flash_generations[None] = generation  # the CPU's index
    monkeypatch.setattr(module, "choose", lambda *args: "flash")
    with unset_fake_temporarily():
        q, k, v = torch.randn(2, 5, 3, 2, 8).bfloat16().unbind(2)
        torch.testing.assert_close(ops.attention(q, k, v), attention_reference(q, k, v), atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("capability", "installed", "wanted"),
    [(8, (2, 3, 4), 2), (8, (3, 4), 0), (9, (2, 3, 4), 3), (9, (2, 4), 4), (10, (2, 3, 4), 4), (12, (2, 4), 2), (7, (2,), 0)],
)
def test_each_gpu_has_its_generation(
    install: Callable[..., None], gpu: Callable[..., Tensor], capability: int, installed: tuple[int, ...], wanted: int
) -> None:
    install(*installed, capability=capability)
    assert module.flash_generation(0) == wanted
    assert choose(gpu(1, 512, 2, 64)) == ("flash" if wanted else "sdpa")


def test_one_that_fails_to_import_is_passed_over(
    install: Callable[..., None], gpu: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(2, 3)
    monkeypatch.delattr(sys.modules["flash_attn_interface"], "flash_attn_func")
    assert module.flash_generation(0) == 2


def test_a_graph_gets_what_can_be_traced(
    install: Callable[..., None], gpu: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(4)
    q = gpu(1, 512, 2, 64)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choose(q) == "sdpa"
    assert not any(module.flash_compiles(generation) for generation in (2, 3, 4))  # no kernels are registered here
    with torch.library._scoped_library("flash_attn_3", "FRAGMENT") as library:
        library.define("_flash_attn_forward(Tensor q) -> Tensor")
        install(3)
        assert module.flash_compiles(3) and choose(q) == "flash"


def test_flash_attn_is_only_looked_for_until_it_is_used(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_import_flash", lambda generation: pytest.fail(f"{generation} was imported"))
    install(2)
    assert module.load_flash() == "" and module._flash_functions == {}
    install()
    assert module.load_flash() == "flash-attn is not installed"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert module.load_flash() == "torch sees no GPU"
