"""How a function is run: compiled by torch.compile, captured once as a CUDA graph and replayed.

A captured function takes and returns nothing: it reads and writes tensors that keep their address. :class:`Captured` keeps the
rules at https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graph-semantics, and says which one a function breaks.
"""

from __future__ import annotations

import gc
import os
import shutil
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from textok_fast.errors import InputError

if TYPE_CHECKING:
    from textok_fast.inference.plan import Plan

F = TypeVar("F", bound=Callable[..., Any])

# torch's own "max-autotune" also captures CUDA graphs; here that is the plan's `capture`, and one must not hold the other.
MODES = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}
SHAPES = 64  # compiled forms of one function; what comes after them runs uncompiled
WARM_UPS = 2  # the first compiles, tunes and loads kernels lazily; the second runs what the first chose


def why_not_compiled(device: str | torch.device) -> str:
    """Why torch.compile has nothing to build kernels for ``device`` with, or ""."""
    names = ("g++", "clang++", "c++") if torch.device(device).type == "cpu" else ("gcc", "clang", "cc")
    variable = "CXX" if torch.device(device).type == "cpu" else "CC"
    if os.environ.get(variable) or any(map(shutil.which, names)):
        return ""
    return f"torch.compile needs a compiler for {torch.device(device).type}, and none of {', '.join(names)} is on PATH"


def why_not_captured(device: str | torch.device) -> str:
    """Why there are no CUDA graphs on ``device``, or ""."""
    if torch.device(device).type != "cuda":
        return f"a CUDA graph runs on a CUDA device, not on {torch.device(device).type}"
    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def compiled(function: F, plan: Plan) -> F:
    """``function`` under torch.compile in the mode ``plan.compile``; itself for "none".

    Each shape of the arguments is compiled on its first call and kept, up to 64 of them; further ones run uncompiled.
    ``function`` must be one graph: what breaks it is an error of the first call, not a slow run.

    Raises: InputError where no compiler is installed.
    """
    if plan.compile == "none":
        return function
    if reason := why_not_compiled(plan.device):
        raise InputError(f"plan.compile={plan.compile!r}: {reason}; install one, or use compile='none'")

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    # torch counts compiled forms per code object: with one of its own, two engines of one class do not use up one limit.
    own = types.FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, SHAPES)
    compiled_own = torch.compile(own, mode=MODES[plan.compile], dynamic=False, fullgraph=True)

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled_own(*args, **kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit:  # fullgraph makes an error of it
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


@contextmanager
def own_modes(device: torch.device) -> Iterator[None]:
    """No gradients, and none of the caller's modes: what is made in inference mode cannot be written outside of it, and
    autocast's casts are not those of a plan."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))  # which turns gradients on
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.no_grad())
        yield


class _Pool:
    """The memory that graphs share for what they compute in between, and the stream they are captured on."""

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        # One explicit stream a pool: the default one of torch.cuda.graph belongs to the device that captured first.
        self.stream = torch.cuda.Stream()


# By device and the stream that replays. Weak: torch does not take the handle of a pool whose last graph is gone.
_pools: WeakValueDictionary[tuple[int, int], _Pool] = WeakValueDictionary()


def _end_generators_capture() -> None:
    """After a broken capture torch's generator still believes to be in one, and refuses to draw. One that succeeds ends it."""
    with suppress(RuntimeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an empty graph
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
            pass


class Captured:
    """``function()``, run as a CUDA graph from the first call on.

    The first call warms up on a side stream, captures, and replays; later calls replay. ``function`` must

    - read and write tensors at fixed addresses, give its results in place, and keep nothing else from one call to the next;
    - change no tensor outside ``state`` that it also reads;
    - not synchronize (``.item()``, ``print``, copies to the CPU), and draw nothing from torch's generators: a replay would not
      advance them as the plan's seeds demand (:func:`textok_fast.ops.seeded_normal` reads its seed from a tensor).

    Graphs that are replayed on one stream share one memory pool. That is safe in any order, because nothing in it outlives a
    replay; so each is replayed on the stream of its first call only.

    Args:
        function: what to run. It, and so the tensors it reads, live as long as this object.
        state: the tensors that ``function`` changes in place, on one CUDA device; they are as before the first call when the
            graph is replayed for the first time.
        enabled: False calls ``function`` each time, on any device.
        name: what the errors call it.
        warm_up: what runs before the capture, :data:`WARM_UPS` times, so that all that a first call does is done: everything
            that ``function`` runs, once each. None is ``function`` itself.

    Raises (in the first call): InputError naming what cannot be captured, and ``state`` is then as it was; (in a later one)
    InputError on another stream.
    """

    def __init__(
        self,
        function: Callable[[], None],
        state: Sequence[Tensor],
        enabled: bool,
        name: str = "the step",
        warm_up: Callable[[], None] | None = None,
    ) -> None:
        self._function, self._warm_up_function = function, warm_up or function
        self._state = list(state)
        self._enabled = enabled
        self._name = name
        self._graph: torch.cuda.CUDAGraph | None = None
        self._pool: _Pool | None = None
        self._stream = 0  # of the first call
        if not enabled:
            return
        devices = {tensor.device for tensor in self._state}
        if len(devices) != 1 or next(iter(devices)).type != "cuda":
            found = ", ".join(sorted(map(str, devices))) or "nowhere (no tensors)"
            raise InputError(f"capturing {name} needs its state on one CUDA device, it is on {found}; use capture='none'")

    @property
    def captured(self) -> bool:
        """Whether the graph exists: the next call replays it."""
        return self._graph is not None

    def __call__(self) -> None:
        if not self._enabled:
            self._function()
            return
        stream = torch.cuda.current_stream(self._state[0].device).cuda_stream
        if self._graph is None:
            self._capture()
            self._stream = stream
        elif stream != self._stream:
            raise InputError(
                f"{self._name} is a CUDA graph of another stream, with which it shares memory: run it in that of its first call"
            )
        assert self._graph is not None
        self._graph.replay()

    def _capture(self) -> None:
        device = self._state[0].device
        with torch.cuda.device(device):
            current = torch.cuda.current_stream()
            key = (torch.cuda.current_device(), current.cuda_stream)
            pool = _pools.get(key)
            if pool is None:
                pool = _pools[key] = _Pool()
            saved = [tensor.clone() for tensor in self._state]
            try:
                self._warm_up(pool, saved, current)
                self._graph, self._pool = self._record(pool, key, current), pool
            finally:
                self._restore(saved)

    def _warm_up(self, pool: _Pool, saved: list[Tensor], current: torch.cuda.Stream) -> None:
        """Runs the function outside of a capture, so that all it does once is done; each run starts from the saved state."""
        generator = torch.cuda.get_rng_state()
        pool.stream.wait_stream(current)
        try:
            with torch.cuda.stream(pool.stream):
                for _ in range(WARM_UPS):
                    self._warm_up_function()
                    self._restore(saved)
        finally:
            current.wait_stream(pool.stream)
        if not torch.equal(generator, torch.cuda.get_rng_state()):
            raise self._refusal("it draws random numbers from torch's generator, which seeds do not determine in a replay")

    def _record(self, pool: _Pool, key: tuple[int, int], current: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        failure: Exception | None = None
        collecting = gc.isenabled()
        gc.disable()  # a collection may free another graph or an event, which a capture forbids
        # cuBLAS keeps a workspace for each stream, and its address goes into the graph. It must lie in the graphs' pool: one
        # from before the capture is freed with the first graph of the stream that goes, or when somebody else captures, under
        # all others (pytorch#193402). And nobody outside may go on using the one in the pool.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # thread_local: other threads, which load pictures into pinned memory, go on meanwhile.
            with torch.cuda.graph(graph, pool=pool.handle, stream=pool.stream, capture_error_mode="thread_local"):
                try:
                    self._function()
                except Exception as error:
                    failure = error
                    raise
        except Exception as error:
            # Ending a broken capture raises an error of its own, before torch.cuda.graph has set the stream back.
            torch.cuda.set_stream(current)
            # And before the allocator has been told that the capture is over: it would ask this graph, which goes, about every
            # allocation, and refuse the pool to others. It is given up: those who have it keep it.
            with suppress(RuntimeError):  # where it was told
                torch._C._cuda_endAllocateToPool(key[0], pool.handle)
                torch._C._cuda_releasePool(key[0], pool.handle)
            _pools.pop(key, None)
            _end_generators_capture()
            cause = failure or error
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            raise self._refusal(" ".join(str(cause).split()) or type(cause).__name__) from cause
        finally:
            torch._C._cuda_clearCublasWorkspaces()
            if collecting:
                gc.enable()
        return graph

    def _restore(self, saved: list[Tensor]) -> None:
        for tensor, value in zip(self._state, saved, strict=True):
            tensor.copy_(value)

    def _refusal(self, reason: str) -> InputError:
        return InputError(f"{self._name} cannot be captured as a CUDA graph: {reason}. Use capture='none' in the plan")
