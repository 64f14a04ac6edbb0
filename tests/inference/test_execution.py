"""textok_fast.inference.execution: torch.compile by plan, and CUDA graphs, on a made-up device that follows their rules."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from textok_fast.errors import InputError
from textok_fast.inference import execution
from textok_fast.inference.execution import WARM_UPS, Captured, compiled, why_not_captured, why_not_compiled
from textok_fast.inference.plan import Plan

# -- torch.compile ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """torch.compile traces and guards, but runs what it traced in Python. Returns the options of each call."""
    calls: list[dict[str, Any]] = []
    compile_ = torch.compile

    def traced(function: Callable[..., Any], **options: Any) -> Any:
        calls.append(options)
        kept = {name: options[name] for name in ("dynamic", "fullgraph")}
        return compile_(function, backend="eager", **kept)

    monkeypatch.setattr(torch, "compile", traced)
    return calls


class Scale:
    def __init__(self, factor: float) -> None:
        self.factor = torch.tensor(factor)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def test_none_is_the_function_itself() -> None:
    function = Scale(2.0).run
    assert compiled(function, Plan()) is function


@pytest.mark.parametrize(("mode", "wanted"), [("default", "default"), ("max-autotune", "max-autotune-no-cudagraphs")])
def test_modes_leave_graphs_to_the_plan(eager_compiler: list[dict[str, Any]], mode: Any, wanted: str) -> None:
    x = torch.randn(3)
    torch.testing.assert_close(compiled(Scale(2.0).run, Plan(compile=mode))(x), 2 * x)
    assert eager_compiler == [{"mode": wanted, "dynamic": False, "fullgraph": True}]


def test_every_shape_of_every_engine_is_compiled(eager_compiler: list[dict[str, Any]]) -> None:
    """torch's own limit is 8 forms for one piece of code, which here two engines would share."""
    torch._dynamo.utils.counters.clear()
    plan = Plan(compile="default")
    for factor in (2.0, 3.0):
        function = compiled(Scale(factor).run, plan)
        for size in range(1, 13):
            x = torch.randn(size)
            torch.testing.assert_close(function(x), factor * x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 24


def test_shapes_beyond_the_limit_run_uncompiled(eager_compiler: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "SHAPES", 1)
    with torch._dynamo.config.patch(recompile_limit=3):
        function = compiled(Scale(2.0).run, Plan(compile="default"))
        torch._dynamo.utils.counters.clear()
        for size in (1, 2, 3, 4, 5, 1, 4):
            x = torch.randn(size)
            torch.testing.assert_close(function(x), 2 * x)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


def test_a_graph_break_is_an_error(eager_compiler: list[dict[str, Any]]) -> None:
    def breaks(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(breaks, Plan(compile="default"))(torch.zeros(2))


def test_compile_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InputError, match=r"needs a compiler for cpu, and none of g\+\+.* use compile='none'"):
        compiled(Scale(1.0).run, Plan(compile="default"))
    monkeypatch.setenv("CXX", "some-compiler")
    assert why_not_compiled("cpu") == ""


# -- CUDA graphs ------------------------------------------------------------------------------------------------------------


class Device:
    """A device with streams and graphs: what runs on a stream that captures is recorded and happens at a replay."""

    def __init__(self) -> None:
        self.stream: Any = SimpleNamespace(name="own", cuda_stream=7)
        self.log: list[str] = []
        self.recording: list[Callable[[], None]] | None = None
        self.breaks_when_ending = False  # the next capture
        self.generator_captures = False
        self.generator = torch.zeros(1)
        self.streams = self.pools = 0
        self.underway: list[tuple[int, int]] = []  # pools that a capture allocates from

    def launch(self, work: Callable[[], None]) -> None:
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def make_stream(self) -> Any:
        self.streams += 1
        name = f"side{self.streams}"
        return SimpleNamespace(
            name=name,
            cuda_stream=100 + self.streams,
            wait_stream=lambda other: self.log.append(f"{name} waits for {other.name}"),
        )

    @contextmanager
    def use_stream(self, stream: Any) -> Iterator[None]:
        before, self.stream = self.stream, stream
        yield
        self.stream = before

    def make_pool(self) -> tuple[int, int]:
        self.pools += 1
        return (0, self.pools)

    @contextmanager
    def capture(self, graph: Any, *, stream: Any, capture_error_mode: str, pool: Any = None) -> Iterator[None]:
        """As torch.cuda.graph: where ending the capture fails, the stream is not set back, the generator is not told, and
        another error is raised."""
        pool = pool or self.make_pool()
        assert capture_error_mode == "thread_local" and not gc.isenabled()
        if pool in self.underway:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.underway.append(pool)
        before, self.stream, self.recording = self.stream, stream, graph.work
        graph.made_in = (pool, stream.name)
        self.log.append("capture")
        self.generator_captures = True
        try:
            yield
        finally:
            self.recording = None
            if self.breaks_when_ending:
                self.breaks_when_ending = False
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            self.stream = before
            self.underway.remove(pool)
            self.generator_captures = False

    def end_allocating(self, device: int, pool: Any) -> None:
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)
        self.log.append("end allocating")


class Graph:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.work: list[Callable[[], None]] = []

    def replay(self) -> None:
        self.device.log.append("replay")
        for work in self.work:
            work()


class Cell:
    """The tensor of one number on the made-up device."""

    def __init__(self, device: Device, value: int, place: str = "cuda:0") -> None:
        self.owner, self.value, self.device = device, value, torch.device(place)

    def clone(self) -> Cell:
        return Cell(self.owner, self.value)

    def copy_(self, other: Cell) -> None:
        self.value = other.value

    def add(self, amount: int) -> None:
        def work() -> None:
            self.value += amount

        self.owner.log.append(f"add on {self.owner.stream.name}")
        self.owner.launch(work)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    fake = Device()
    fake.stream.wait_stream = lambda other: fake.log.append(f"own waits for {other.name}")

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        yield

    parts = {
        "device": on,
        "current_device": lambda: 0,
        "current_stream": lambda device=None: fake.stream,
        "set_stream": lambda stream: setattr(fake, "stream", stream),
        "Stream": fake.make_stream,
        "stream": fake.use_stream,
        "graph_pool_handle": fake.make_pool,
        "get_rng_state": lambda: fake.generator.clone(),
        "CUDAGraph": lambda: Graph(fake),
        "graph": fake.capture,
    }
    for name, part in parts.items():
        monkeypatch.setattr(torch.cuda, name, part)
    own = {
        "_cuda_clearCublasWorkspaces": lambda: fake.log.append("clear workspaces"),
        "_cuda_endAllocateToPool": fake.end_allocating,
        "_cuda_releasePool": lambda device, pool: fake.log.append("release"),
    }
    for name, part in own.items():
        monkeypatch.setattr(torch._C, name, part, raising=False)
    execution._pools.clear()
    return fake


def test_captured_once_then_replayed_from_the_state_before(device: Device) -> None:
    cell, runs = Cell(device, 10), []

    def step() -> None:
        runs.append(cell.value)
        cell.add(1)

    captured = Captured(step, [cell], enabled=True)  # type: ignore[list-item]
    assert not captured.captured
    captured()
    assert captured.captured and cell.value == 11
    assert runs == [10] * (WARM_UPS + 1)  # each from the saved state, and once more while it is recorded
    for wanted in (12, 13):
        captured()
        assert cell.value == wanted
    assert len(runs) == WARM_UPS + 1
    warm = ["side1 waits for own", *["add on side1"] * WARM_UPS, "own waits for side1"]
    capture = ["clear workspaces", "capture", "add on side1", "clear workspaces"]  # so that it lies in the graphs' pool
    assert device.log == [*warm, *capture, "replay", "replay", "replay"]
    assert device.stream.name == "own" and gc.isenabled()


def test_a_warm_up_of_its_own(device: Device) -> None:
    cell, log = Cell(device, 10), []

    def step() -> None:
        log.append("step")
        cell.add(1)

    def warm_up() -> None:
        log.append("warm up")
        cell.add(5)

    captured = Captured(step, [cell], enabled=True, warm_up=warm_up)  # type: ignore[list-item]
    captured()
    captured()
    assert log == ["warm up"] * WARM_UPS + ["step"] and cell.value == 12


def test_a_graph_stays_on_its_stream(device: Device) -> None:
    cell = Cell(device, 0)
    captured = Captured(lambda: cell.add(1), [cell], enabled=True, name="a step")  # type: ignore[list-item]
    captured()
    own, device.stream = device.stream, SimpleNamespace(name="other", cuda_stream=8)
    with pytest.raises(InputError, match="a step is a CUDA graph of another stream"):
        captured()
    device.stream = own
    captured()
    assert cell.value == 2


def test_after_a_capture_that_cannot_end_others_are_made(device: Device) -> None:
    def make(breaks: bool) -> Captured:
        cell = Cell(device, 0)

        def step() -> None:
            cell.add(1)
            if device.recording is not None and breaks:
                raise RuntimeError("not permitted")

        captured = Captured(step, [cell], enabled=True)  # type: ignore[list-item]
        device.breaks_when_ending = breaks
        captured()
        return captured

    first = make(False)  # which keeps the pool alive
    with pytest.raises(InputError, match="not permitted"):
        make(True)
    assert device.underway == [] and not device.generator_captures
    assert device.log[-4:] == ["end allocating", "release", "capture", "clear workspaces"]
    second = make(False)
    assert first._pool is not second._pool and len(execution._pools) == 1
    first()


def test_disabled_calls_the_function_anywhere(device: Device) -> None:
    x = torch.zeros(1)
    captured = Captured(lambda: x.add_(1), [x], enabled=False)  # type: ignore[arg-type, return-value]
    for wanted in (1, 2, 3):
        captured()
        assert x.item() == wanted
    assert not captured.captured and device.log == []


def test_graphs_of_a_stream_share_a_pool_as_long_as_one_lives(device: Device) -> None:
    def make() -> Captured:
        cell = Cell(device, 0)
        captured = Captured(lambda: cell.add(1), [cell], enabled=True)  # type: ignore[list-item]
        captured()
        return captured

    first, second = make(), make()
    assert first._graph.made_in == second._graph.made_in == ((0, 1), "side1")  # type: ignore[union-attr]
    device.stream = SimpleNamespace(name="other", cuda_stream=8, wait_stream=lambda stream: None)
    assert make()._graph.made_in == ((0, 2), "side2")  # type: ignore[union-attr]
    device.stream = SimpleNamespace(name="own", cuda_stream=7, wait_stream=lambda stream: None)
    del first
    assert make()._graph.made_in == ((0, 1), "side1")  # type: ignore[union-attr]
    del second
    gc.collect()
    assert make()._graph.made_in[0] not in ((0, 1), (0, 2))  # type: ignore[union-attr]


@pytest.mark.parametrize("ending_fails", [False, True])
def test_what_cannot_be_captured_is_named_and_nothing_changes(device: Device, ending_fails: bool) -> None:
    cell = Cell(device, 5)

    def step() -> None:
        cell.add(1)
        if device.recording is not None:
            device.breaks_when_ending = ending_fails
            raise RuntimeError("CUDA error: operation not permitted\nwhen stream is capturing")

    captured = Captured(step, [cell], enabled=True, name="the sampling loop")  # type: ignore[list-item]
    with pytest.raises(InputError) as caught:
        captured()
    assert str(caught.value) == (
        "the sampling loop cannot be captured as a CUDA graph: CUDA error: operation not permitted when stream is capturing. "
        "Use capture='none' in the plan"
    )
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert cell.value == 5 and device.stream.name == "own" and gc.isenabled() and not captured.captured
    assert not device.generator_captures


def test_an_error_of_the_function_itself_is_its_own(device: Device) -> None:
    cell = Cell(device, 5)

    def step() -> None:
        cell.add(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Captured(step, [cell], enabled=True)()  # type: ignore[list-item]
    assert cell.value == 5 and "capture" not in device.log


def test_too_little_memory_is_said_as_such(device: Device) -> None:
    def step() -> None:
        if device.recording is not None:
            raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        Captured(step, [Cell(device, 0)], enabled=True)()  # type: ignore[list-item]
    assert device.stream.name == "own"


def test_torchs_generator_is_refused(device: Device) -> None:
    def step() -> None:
        device.generator += 1

    with pytest.raises(InputError, match="draws random numbers from torch's generator"):
        Captured(step, [Cell(device, 0)], enabled=True)()  # type: ignore[list-item]
    assert "capture" not in device.log


def test_state_must_be_on_one_cuda_device(device: Device) -> None:
    for cells, found in (
        ([Cell(device, 0, "cpu")], "cpu"),
        ([Cell(device, 0), Cell(device, 0, "cuda:1")], "cuda:0, cuda:1"),
        ([], "nowhere"),
    ):
        with pytest.raises(InputError, match=f"its state on one CUDA device, it is on {found}"):
            Captured(lambda: None, cells, enabled=True)  # type: ignore[arg-type]


def test_why_not_captured_names_the_device() -> None:
    assert why_not_captured("cpu") == "a CUDA graph runs on a CUDA device, not on cpu"
    assert (why_not_captured("cuda") == "") == torch.cuda.is_available()


# -- CUDA graphs on a GPU ---------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_gpu
def test_graphs_on_a_gpu_give_what_the_functions_give() -> None:
    weight = torch.randn(64, 64, device="cuda") / 8
    graphs, plain = [], []
    for size in (3, 5):
        x = torch.randn(size, 64, device="cuda")
        count = torch.zeros(1, dtype=torch.int64, device="cuda")
        want = [x.clone(), count.clone()]

        def step(x: torch.Tensor = x, count: torch.Tensor = count) -> None:
            x.copy_(torch.tanh(x @ weight) + count)
            count.add_(1)

        graphs.append((Captured(step, [x, count], enabled=True), x, count))
        plain.append(want)
    for index in (0, 1, 1, 0, 1, 0, 0):  # shared memory, any order
        graphs[index][0]()
        x, count = plain[index]
        x.copy_(torch.tanh(x @ weight) + count)
        count.add_(1)
    for (captured, x, count), want in zip(graphs, plain, strict=True):
        assert captured.captured
        torch.testing.assert_close(x, want[0])
        assert count.item() == want[1].item()
    assert graphs[0][0]._pool is graphs[1][0]._pool


@pytest.mark.gpu
@needs_gpu
def test_after_a_failed_capture_the_gpu_works_on() -> None:
    x = torch.arange(4.0, device="cuda")
    with pytest.raises(InputError, match="a step cannot be captured as a CUDA graph: .*captur"):
        Captured(lambda: x.mul_(x.sum().item()), [x], enabled=True, name="a step")()  # type: ignore[arg-type, return-value]
    assert x.tolist() == [0.0, 1.0, 2.0, 3.0]
    with pytest.raises(InputError, match="torch's generator"):
        Captured(lambda: x.add_(torch.randn_like(x)), [x], enabled=True)()  # type: ignore[arg-type, return-value]
    works = Captured(lambda: x.add_(1), [x], enabled=True)  # type: ignore[arg-type, return-value]
    works()
    works()
    assert x.tolist() == [2.0, 3.0, 4.0, 5.0]


@pytest.mark.gpu
@needs_gpu
def test_a_compiled_function_is_captured() -> None:
    x = torch.randn(8, 32, device="cuda")
    want = x.clone()
    function = compiled(lambda x: torch.nn.functional.gelu(x) * 2, Plan(device="cuda", compile="default"))
    with torch.no_grad():
        captured = Captured(lambda: x.copy_(function(x)), [x], enabled=True)  # type: ignore[arg-type, return-value]
        for _ in range(3):
            captured()
            want = torch.nn.functional.gelu(want) * 2
    torch.testing.assert_close(x, want)


@pytest.mark.gpu
@needs_gpu
def test_a_graph_outlives_others_of_its_stream() -> None:
    """Products of few rows and long sums are split over the sums, and their parts lie in cuBLAS's workspace."""
    made = []
    for rows in (16, 32):
        x, weight = torch.randn(rows, 8192, device="cuda").bfloat16(), torch.randn(64, 8192, device="cuda").bfloat16()
        out = torch.zeros(rows, 64, device="cuda", dtype=torch.bfloat16)

        def step(x: torch.Tensor = x, weight: torch.Tensor = weight, out: torch.Tensor = out) -> None:
            out.copy_(torch.nn.functional.linear(x, weight))

        made.append((Captured(step, [out], enabled=True), x, weight, out))
        made[-1][0]()
    del made[0], step, x, weight, out
    captured, *_, out = made[0]
    wanted = out.clone()
    torch.cuda.empty_cache()
    torch.full((256, 2**20), torch.nan, device="cuda")  # what was freed is something else's now
    out.zero_()
    captured()
    assert torch.equal(out, wanted)
    torch._C._cuda_clearCublasWorkspaces()  # as others do who capture
    torch.cuda.empty_cache()
    out.zero_()
    captured()
    assert torch.equal(out, wanted)


@pytest.mark.gpu
@needs_gpu
def test_a_failed_capture_leaves_the_pool_of_others_alone() -> None:
    x = torch.zeros(4, device="cuda")
    first = Captured(lambda: x.add_(1), [x], enabled=True)  # type: ignore[arg-type, return-value]
    first()
    for _ in range(2):
        with pytest.raises(InputError, match="cannot be captured"):
            Captured(lambda: x.mul_(x.sum().item()), [x], enabled=True)()  # type: ignore[arg-type, return-value]
    second = Captured(lambda: x.add_(2), [x], enabled=True)  # type: ignore[arg-type, return-value]
    second()
    first()
    assert x.tolist() == [4.0] * 4
    with torch.cuda.stream(torch.cuda.Stream()), pytest.raises(InputError, match="of another stream"):
        first()
