"""The contestants compute the same thing, and the comparison says what it measured. No test looks at a speed."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from textok_fast.config import DiTConfig
from textok_fast.errors import InputError
from textok_fast.evaluation import peers, roofline, step_times
from textok_fast.evaluation.peers import (
    OURS,
    PEERS,
    Job,
    OriginalDiT,
    PeerKind,
    PeersConfig,
    prepare,
    relative_error,
    run_peers,
    step_cost,
    why_not,
)
from textok_fast.interop import to_diffusers_dit
from textok_fast.modeling.dit import DiT

CPU = torch.device("cpu")
FLAT = DiTConfig(width=64, depth=2, heads=2, num_tokens=8, in_channels=4, num_classes=10)
SQUARE = DiTConfig(width=64, depth=2, heads=2, num_tokens=0, input_size=8, patch_size=2, in_channels=3, num_classes=10)


def _random_dit(config: DiTConfig) -> DiT:
    torch.manual_seed(3)
    model = DiT(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.1)
    model.pos_embed.normal_(0, 0.5)
    return model


def _inputs(config: DiTConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (3, config.num_tokens, config.in_channels) if config.num_tokens else (3, config.in_channels, 8, 8)
    return torch.randn(shape), torch.tensor([999.0, 500.0, 7.0]), torch.tensor([0, 10, 4])


@pytest.mark.parametrize("config", [FLAT, SQUARE], ids=["1-D", "2-D"])
def test_the_original_form_is_our_network(config: DiTConfig) -> None:
    model, inputs = _random_dit(config), _inputs(config)
    with torch.no_grad():
        assert relative_error(OriginalDiT(model)(*inputs), model(*inputs)) < 1e-5


def test_diffusers_with_our_values_is_our_network() -> None:
    pytest.importorskip("diffusers")
    model, inputs = _random_dit(SQUARE), _inputs(SQUARE)
    with torch.no_grad():
        out = to_diffusers_dit(model)(*inputs, return_dict=False)[0]
        assert relative_error(out, model(*inputs)) < 1e-5
    with pytest.raises(InputError, match="2-D patches"):
        to_diffusers_dit(_random_dit(FLAT))


def _small(size: str, tokens: int) -> tuple[str, DiTConfig]:
    return "small", FLAT


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights and inputs of a small network, and the graphs exported from it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_times, "network_config", _small)
        path = tmp_path_factory.mktemp("peers")
        peers._write_inputs(PeersConfig(size="tiny", tokens=(8,), batch=(2,)), 8, CPU, path)
    return path


@pytest.fixture
def folder(files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``files``, with the small network in the place of the named sizes in this process."""
    monkeypatch.setattr(peers, "network_config", _small)
    return files


def _job(folder: Path, peer: str, precision: str = "fp32", modulation: str = "given") -> Job:
    return Job(peer, "tiny", 8, precision, 2, modulation, torch.get_num_threads(), "default", "cpu", str(folder))


TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2, "int8": 6e-2}
GRAPHS = [("ONNX Runtime", "fp32"), ("ONNX Runtime", "int8"), *(("OpenVINO", precision) for precision in TOLERANCE)]


@pytest.mark.parametrize("modulation", ["inside", "given"])
@pytest.mark.parametrize(
    ("peer", "precision"),
    [(OURS, "fp32"), (OURS, "bf16"), (OURS, "int8"), ("torch eager", "fp32"), ("torch eager", "bf16"), *GRAPHS],
)
def test_outputs_agree_with_the_reference_form(folder: Path, peer: str, precision: str, modulation: str) -> None:
    from safetensors.torch import load_file

    reason = why_not(peer, precision, CPU)
    if reason:
        pytest.skip(reason)
    job = _job(folder, peer, precision, modulation)
    if PEERS[peer].graph and not peers._graph_path(job).exists():
        peers._export(job)
    wanted = load_file(folder / "inputs-2.safetensors")["out"]
    step = prepare(job)
    first = step().clone()
    assert first.shape == wanted.shape
    assert relative_error(first, wanted) < TOLERANCE[precision]
    assert torch.equal(step().float(), first.float())
    if precision == "int8":
        assert relative_error(first, wanted) > 1e-6  # it is quantized


def test_quantized_weights_are_integers(folder: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    weight = torch.tensor([[1.0, -4.0, 0.0], [0.5, 2.0, 0.0]])  # (in, out)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["out"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(weight.numpy(), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), str(tmp_path / "a.onnx"))
    peers.quantize_weights(tmp_path / "a.onnx", tmp_path / "b.onnx")
    found = onnx.load(str(tmp_path / "b.onnx"))
    assert [node.op_type for node in found.graph.node] == ["DequantizeLinear", "MatMul"]
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in found.graph.initializer}
    assert constants["w_int8"].tolist() == [[127, -127, 0], [64, 64, 0]]
    assert constants["w_scale"][:2] == pytest.approx([1 / 127, 4 / 127])
    onnx.checker.check_model(str(tmp_path / "b.onnx"))


def test_cost_of_a_step_by_arithmetic(folder: Path) -> None:
    d, n, depth, c = FLAT.width, FLAT.num_tokens, FLAT.depth, FLAT.in_channels
    batch, numbers = 2, depth * (12 * d * d + 9 * d) + (c * d + d + n * d) + (2 * c * d + 2 * c)
    flops = 2 * batch * (depth * (12 * n * d * d + 2 * n * n * d) + n * d * c * 3)
    job = _job(folder, OURS)
    assert step_cost(job) == (flops, 4 * numbers)
    assert step_cost(dataclasses.replace(job, precision="bf16")) == (flops, 2 * numbers)
    assert step_cost(dataclasses.replace(job, precision="int8")) == (flops, numbers)
    adaln, embedder = (6 * depth + 2) * (d * d + d), 256 * d + d + d * d + d
    more = 2 * batch * ((6 * depth + 2) * d * d + 256 * d + d * d)
    inside = dataclasses.replace(job, modulation="inside")
    assert step_cost(inside) == (flops + more, 4 * (numbers + adaln + embedder))


@pytest.mark.slow
def test_a_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "CPU_SHAPES", ((32, 32, 32),))
    monkeypatch.setattr(roofline, "CPU_COPY_BYTES", 2**20)
    monkeypatch.setattr(peers, "PRODUCT_SHAPES", ((32, 32, 32),))
    monkeypatch.setitem(PEERS, "absent", PeerKind(PEERS[OURS].build, {"cpu": ("fp32",)}, needs=("no_such_module",)))
    seen: list[int] = []
    config = PeersConfig(
        size="tiny",
        tokens=(8,),
        batch=(2,),
        precisions=("fp32",),
        threads=(1,),
        peers=(OURS, "original DiT form", "absent"),
        rounds=3,
        device="cpu",
    )
    result = run_peers(config, "textok-fast bench peers", progress=False, on_result=lambda found: seen.append(len(found.rows)))
    assert [(row.peer, row.modulation) for row in result.rows] == [
        (OURS, "inside"),
        ("original DiT form", "inside"),
        (OURS, "given"),
    ]
    assert seen == [2, 3, 3]
    ours, original, _ = result.rows
    assert original.times_ours == pytest.approx(original.wall.median / ours.wall.median) and ours.times_ours == 1
    for row in result.rows:
        assert row.wall.median == statistics.median(row.round_wall) and len(row.round_wall) == row.rounds == 3
        assert row.error_reference < 1e-5 and row.error_ours is not None and row.error_ours < 1e-5
        (ceiling,) = result.ceilings
        floor = max(row.flops / ceiling["products"], row.weight_bytes / ceiling["read"])
        assert row.floor == floor and row.share == pytest.approx(floor / row.wall.median)
    best = result.best_peer(ours.case)
    assert best == original and result.best_peer(result.rows[2].case) is None
    reasons = {(entry["peer"], entry["case"]): entry["reason"] for entry in result.skipped}
    assert reasons == {
        ("absent", "fp32"): "not installed: no_such_module",
        ("original DiT form", "modulation given"): "computes its modulation itself",
    }
    text = result.to_markdown()
    assert "not installed: no_such_module" in text and f"{original.times_ours:.2f}x (original DiT form)" in text
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_process_that_ends_says_so() -> None:
    with peers._Worker() as worker:
        worker.process.kill()
        with pytest.raises(peers._PeerFailure, match="ended with status -9"):
            worker.ask("turn", {"steps": 1})


def test_a_contestant_that_fails_is_a_line_and_the_others_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        """Answers in this process: one contestant cannot be prepared, one fails in its second turn, ours takes 2 s a step."""

        def __init__(self) -> None:
            self.name, self.turns = "", 0

        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *args: object) -> None:
            pass

        def ask(self, what: str, about: dict[str, Any]) -> dict[str, Any]:
            if what == "prepare":
                self.name = about["peer"]
                if self.name == "torch.compile":
                    raise peers._PeerFailure("no compiler")
                return {"output": str(Path(about["folder"], f"inputs-{about['batch']}.safetensors")), "seconds": 2.0}
            self.turns += what == "turn"
            if self.name == "torch eager" and self.turns == 2:
                raise peers._PeerFailure("out of memory")
            return {"wall": 2.0, "processor": 1.0}

    monkeypatch.setattr(peers, "_Worker", Fake)
    monkeypatch.setattr(peers, "_ceiling", lambda *args: {"products": 1e9, "read": 1e9})
    monkeypatch.setattr(step_times, "network_config", _small)
    names = (OURS, "torch eager", "torch.compile")
    found = run_peers(
        PeersConfig(
            size="tiny",
            tokens=(8,),
            batch=(1,),
            precisions=("bf16",),
            modulation=("given",),
            threads=(1,),
            peers=names,
            rounds=3,
            device="cpu",
        ),
        progress=False,
    )
    assert [row.peer for row in found.rows] == [OURS]
    assert found.rows[0].wall.median == 2.0 and found.rows[0].processor.median == 1.0 and found.rows[0].rounds == 3
    assert [(entry["peer"], entry["reason"]) for entry in found.skipped] == [
        ("torch.compile", "no compiler"),
        ("torch eager", "out of memory"),
    ]
    assert "out of memory" in found.to_markdown()


def test_who_can_run_where() -> None:
    cuda = torch.device("cuda", 0)
    assert why_not(OURS, "fp32", CPU) == ""
    assert "cuda only" in why_not("TensorRT", "fp32", CPU)
    assert "cpu only" in why_not("OpenVINO", "fp32", cuda)
    assert "bf16" in why_not("ONNX Runtime", "bf16", CPU)
    assert "fp32, bf16 only" in why_not("torch eager", "int8", CPU)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": "XS"}, "size: unknown 'XS'"),
        ({"precisions": ("fp64",)}, "precisions: unknown"),
        ({"modulation": ()}, "modulation must name"),
        ({"peers": ("nobody",)}, "peers: unknown 'nobody'"),
        ({"batch": (0,)}, "batch must be"),
        ({"rounds": 0}, "rounds must be"),
    ],
)
def test_wrong_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PeersConfig(**fields)
