"""Whole models on each backend: the same numbers, one compiled graph, gradients, and ONNX files of standard operators.

Forcing a backend for all operations lets those fall back that cannot take it, so each test also says which operations ran.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch.utils._python_dispatch import TorchDispatchMode

from textok_fast import ops
from textok_fast.config import DiTConfig
from textok_fast.errors import InputError
from textok_fast.modeling.dit import DiT
from textok_fast.modeling.text_encoders import TextFeatures
from textok_fast.modeling.tokenizer import TexTok
from textok_fast.ops import dispatch
from textok_fast.ops.choices import choices

BACKENDS = ["reference", "native", "triton"]
NAMESPACES = {"native": "textok_fast", "triton": "textok_fast_triton"}
NORMS = {"layer_norm_modulate", "gated_residual_layer_norm_modulate"}
PIXELS = {"patchify_uint8", "unpatchify_uint8", "vq_nearest"}
# What runs fused in a DiT, and in a TexTok with a codebook over uint8 pictures.
IN_DIT = {"native": NORMS | {"attention"}, "triton": NORMS | {"attention", "linear_gelu"}, "reference": set()}
IN_TEXTOK = {
    "native": {"gated_residual_layer_norm_modulate", "attention"} | PIXELS,
    "triton": {"gated_residual_layer_norm_modulate", "attention", "linear_gelu"} | PIXELS,
    "reference": set(),
}


class Recorder(TorchDispatchMode):
    """Names of our operations that ran, by namespace."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[str]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.setdefault(function.namespace, set()).add(function._opname)
        return function(*args, **(kwargs or {}))


@contextmanager
def on(backend: str, wanted: dict[str, set[str]], backward: bool = False) -> Iterator[None]:
    """Forces a backend, and sees that it ran ``wanted`` and nothing fused ran elsewhere."""
    with ops.use_backend(backend), Recorder() as recorder:
        yield
    expected = wanted[backend] | ({f"{name}_backward" for name in wanted[backend] & NORMS} if backward else set())
    fused = {name: seen for name, seen in recorder.seen.items() if name in NAMESPACES.values()}
    assert fused == ({NAMESPACES[backend]: expected} if expected else {})


def make_dit(**overrides: Any) -> DiT:
    sizes = {"num_tokens": 5, "in_channels": 4, "num_classes": 7, "width": 48, "depth": 2, "heads": 2}
    torch.manual_seed(0)
    dit = DiT(DiTConfig(**{**sizes, **overrides}))
    with torch.no_grad():
        for parameter in dit.parameters():  # adaLN-Zero starts as the identity
            parameter.add_(0.1 * torch.randn_like(parameter))
    return dit.eval()


def dit_inputs(dit: DiT, batch: int = 3) -> tuple[Any, ...]:
    config = dit.config
    x = torch.randn(batch, config.num_tokens, config.in_channels)
    t, y = torch.linspace(0, 900, batch), torch.arange(batch)
    if not config.text_dim:
        return x, t, y
    mask = torch.arange(6) < torch.arange(batch).unsqueeze(1) * 3  # an empty caption, three words, six words
    return x, t, y, TextFeatures(torch.randn(batch, 6, config.text_dim), mask)


class Reconstruction(nn.Module):
    """uint8 pictures -> patches, through the whole tokenizer."""

    def __init__(self, tokenizer: TexTok) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Tensor, text: TextFeatures) -> tuple[Tensor, Tensor]:
        pixels, bottleneck = self.tokenizer(images, text)
        uint8 = ops.unpatchify_uint8(self.tokenizer.decoder.patches(bottleneck.latents, text), self.tokenizer.config.patch_size)
        return pixels, uint8


def tokenizer_inputs() -> tuple[Tensor, TextFeatures]:
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    return images, TextFeatures(torch.randn(2, 4, 8), torch.tensor([[True] * 4, [True, False, False, False]]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("text_dim", [0, 8])
def test_a_dit_is_the_same_on_every_backend(backend: str, text_dim: int) -> None:
    dit = make_dit(text_dim=text_dim)
    inputs = dit_inputs(dit)
    with torch.no_grad():
        with on("reference", IN_DIT):
            wanted = dit.double()(*(cast(value) for value in inputs))
        with on(backend, IN_DIT):
            found = dit.float()(*inputs)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5)


def cast(value: Any) -> Any:
    if isinstance(value, TextFeatures):
        return TextFeatures(value.features.double(), value.mask)
    return value.double() if value.is_floating_point() else value


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_dit_has_the_same_gradients_on_every_backend(backend: str) -> None:
    dit = make_dit(text_dim=8)
    inputs = dit_inputs(dit)
    found = {}
    for name in ("reference", backend):
        dit.zero_grad()
        with on(name, IN_DIT, backward=True):
            dit(*inputs).square().sum().backward()
        found[name] = {key: value.grad for key, value in dit.named_parameters()}
    for key, wanted in found["reference"].items():
        torch.testing.assert_close(found[backend][key], wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()), msg=key)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bottleneck", ["none", "vq"])
def test_a_tokenizer_is_the_same_on_every_backend(backend: str, bottleneck: str, make_tokenizer: Callable[..., TexTok]) -> None:
    model = Reconstruction(make_tokenizer(bottleneck=bottleneck))
    images, text = tokenizer_inputs()
    with torch.no_grad():
        with on("reference", IN_TEXTOK):
            wanted = model(images, text)
        ran = IN_TEXTOK if bottleneck == "vq" else {name: names - {"vq_nearest"} for name, names in IN_TEXTOK.items()}
        with on(backend, ran):
            found = model(images, text)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-4)
    assert int((found[1].int() - wanted[1].int()).abs().max()) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "compiler"), [("reference", "inductor"), ("native", "inductor"), ("triton", "aot_eager")])
@pytest.mark.parametrize("model", ["dit", "textok"])
def test_a_whole_model_is_one_compiled_graph(
    model: str, backend: str, compiler: str, make_tokenizer: Callable[..., TexTok]
) -> None:
    torch._dynamo.reset()
    network: nn.Module
    if model == "dit":
        network = make_dit(text_dim=8, depth=1)
        inputs: tuple[Any, ...] = dit_inputs(network)
    else:
        network = Reconstruction(make_tokenizer(bottleneck="vq", encoder_depth=1, decoder_depth=1))
        inputs = tokenizer_inputs()
    graphs: list[torch.fx.GraphModule] = []

    def compile_graph(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(graph)
        return lookup_backend(compiler)(graph, example)

    with torch.no_grad(), ops.use_backend(backend):
        wanted = network(*inputs)
        found = torch.compile(network, fullgraph=True, backend=compile_graph)(*inputs)
    assert len(graphs) == 1
    names = {str(node.target) for node in graphs[0].graph.nodes if str(node.target).startswith("textok_fast")}
    expected = (IN_DIT if model == "dit" else IN_TEXTOK)[backend]
    assert {name.split(".")[1] for name in names} == expected
    assert {name.split(".")[0] for name in names} == ({NAMESPACES[backend]} if expected else set())
    for mine, eager in zip(*(([out] if isinstance(out, Tensor) else list(out)) for out in (found, wanted)), strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1 if mine.dtype == torch.uint8 else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_training_compiles_too(backend: str) -> None:
    torch._dynamo.reset()
    dit = make_dit()
    inputs = dit_inputs(dit)
    with ops.use_backend(backend):
        dit(*inputs).square().sum().backward()
        wanted = {key: value.grad for key, value in dit.named_parameters()}
        dit.zero_grad()
        torch.compile(dit, fullgraph=True, backend="aot_eager")(*inputs).square().sum().backward()
    for key, value in dit.named_parameters():
        torch.testing.assert_close(value.grad, wanted[key], rtol=1e-4, atol=1e-5, msg=key)


class UInt8Encoder(nn.Module):
    """uint8 pictures -> token indices, and tokens -> uint8 pictures: every operation that the tokenizer has."""

    def __init__(self, tokenizer: TexTok) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        out = self.tokenizer.bottleneck(self.tokenizer.encoder(images, None))
        patches = self.tokenizer.decoder.patches(out.latents, None)
        return out.indices, ops.unpatchify_uint8(patches, self.tokenizer.config.patch_size)


@pytest.mark.parametrize("model", ["dit", "textok"])
def test_onnx_files_have_standard_operators_only(model: str, tmp_path: Path, make_tokenizer: Callable[..., TexTok]) -> None:
    if model == "dit":
        network: nn.Module = make_dit()
        inputs: tuple[Any, ...] = dit_inputs(network)  # type: ignore[arg-type]
    else:
        network = UInt8Encoder(make_tokenizer(bottleneck="vq")).eval()
        inputs = (tokenizer_inputs()[0],)
    file = tmp_path / "model.onnx"
    with torch.no_grad():
        wanted = network(*inputs)
        torch.onnx.export(network, inputs, file, dynamo=True, opset_version=20, verbose=False)
    graph = onnx.load(file)
    onnx.checker.check_model(graph, full_check=True)
    assert {entry.domain for entry in graph.opset_import} <= {"", "ai.onnx"} and not graph.functions
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    found = session.run(None, dict(zip(names, (value.numpy() for value in inputs), strict=True)))
    for mine, torchs in zip(found, [wanted] if isinstance(wanted, Tensor) else wanted, strict=True):
        np.testing.assert_allclose(mine.astype(np.float64), torchs.numpy().astype(np.float64), rtol=1e-3, atol=1e-3)


def test_the_operations() -> None:
    norms = {f"{name}{kind}" for name in NORMS for kind in ("", "_fp8")}
    products = {"linear_gelu", "quantize_rows", "activate_quantize_rows", "fp8_linear", "fp8_linear_fp8"}
    packed = {"packed_linear", "packed_block"}  # for CPUs
    others = {"attention", "guided_step", "seeded_normal"}
    assert set(dispatch.operations()) == norms | products | packed | PIXELS | others
    native = {name for name in dispatch.operations() if "native" in dispatch.backends(name)}
    assert native == NORMS | PIXELS | packed | {"attention", "guided_step"}
    triton = {name for name in dispatch.operations() if "triton" in dispatch.backends(name)}
    assert triton == set(dispatch.operations()) - packed
    assert set(choices("cpu")) == set(dispatch.operations())  # what `textok-fast info` shows


def test_derivatives_that_fused_operations_lack_are_the_references_or_an_error() -> None:
    x, rows = torch.randn(2, 3, 8), torch.randn(2, 2, 8)

    def function(x: Tensor) -> Tensor:
        return ops.layer_norm_modulate(x, rows[0], rows[1])

    with ops.use_backend("reference"):
        _, wanted = torch.func.jvp(function, (x,), (torch.ones_like(x) * rows[0].unsqueeze(1),))
        per_sample = torch.stack([function(x + i) for i in range(2)])
    _, found = torch.func.jvp(function, (x,), (torch.ones_like(x) * rows[0].unsqueeze(1),))
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.func.vmap(function)(torch.stack([x, x + 1])), per_sample)
    with ops.use_backend(layer_norm_modulate="native"), pytest.raises(InputError, match="forward-mode"):
        torch.func.jvp(function, (x,), (x,))

    x.requires_grad_()
    for backend in ("native", "triton"):
        with ops.use_backend(layer_norm_modulate=backend):
            (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
            with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
                grad.square().sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dit_trains_under_autocast_on_a_gpu(backend: str, compiled: bool) -> None:
    torch._dynamo.reset()
    dit = make_dit(text_dim=8, width=64, num_tokens=33).cuda()
    inputs = [move(value) for value in dit_inputs(dit)]
    gradients = {}
    for name in ("reference", backend):
        dit.zero_grad()
        network = torch.compile(dit, fullgraph=True) if compiled and name == backend else dit
        with ops.use_backend(name), torch.autocast("cuda", torch.bfloat16):
            loss = network(*inputs).float().square().mean()
        loss.backward()
        gradients[name] = {key: value.grad.clone() for key, value in dit.named_parameters() if value.grad is not None}
    for key, wanted in gradients["reference"].items():
        error = (gradients[backend][key] - wanted).norm() / (wanted.norm() + 1e-6)
        assert error < 0.05, (key, float(error))


def move(value: Any) -> Any:
    return TextFeatures(value.features.cuda(), value.mask.cuda()) if isinstance(value, TextFeatures) else value.cuda()
