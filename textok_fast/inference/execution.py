"""How a function is run: compiled by torch.compile, captured once as a CUDA graph and replayed.

A captured function takes and returns nothing: it reads and writes tensors that keep their address. :class:`Captured` keeps the
rules at https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graph-semantics, and says which one a function breaks.
"""

from __future__ import annotations

import gc
import os
import shutil
import types
from collections.abc import Callable, Sequence
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
SHAPES = 64  # compiled forms of one function; torch runs what comes after them uncompiled
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

    Each shape of the arguments is compiled on its first call and kept, up to 64 of them. ``function`` must be one graph: what
    breaks it is an error of the first call, not a slow run.

    Raises: InputError for an unknown mode, and where no compiler is installed.
    """
    if plan.compile == "none":
        return function
    if plan.compile not in MODES:
        raise InputError(f"plan.compile must be one of none, {', '.join(MODES)}; got {plan.compile!r}")
    if reason := why_not_compiled(plan.device):
        raise InputError(f"plan.compile={plan.compile!r}: {reason}; install one, or use compile='none'")

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    # torch counts compiled forms per code object: with one of its own, two engines of one class do not use up one limit.
    own = types.FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, SHAPES)
    return torch.compile(own, mode=MODES[plan.compile], dynamic=False, fullgraph=True)  # type: ignore[return-value]


class _Pool:
    """The memory that graphs share for what they compute in between, and the stream they are captured on."""

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        # One explicit stream a pool: the default one of torch.cuda.graph belongs to the device that captured first.
        self.stream = torch.cuda.Stream()


# By device and the stream that replays. Weak: torch does not take the handle of a pool whose last graph is gone.
_pools: WeakValueDictionary[tuple[int, int], _Pool] = WeakValueDictionary()


class Captured:
    """``function()``, run as a CUDA graph from the first call on.

    The first call warms up on a side stream, captures, and replays; later calls replay. ``function`` must

    - read and write tensors at fixed addresses, give its results in place, and keep nothing else from one call to the next;
    - change no tensor outside ``state`` that it also reads;
    - not synchronize (``.item()``, ``print``, copies to the CPU), and draw nothing from torch's generators: a replay would not
      advance them as the plan's seeds demand (:func:`textok_fast.ops.seeded_normal` reads its seed from a tensor).

    Graphs that are replayed on one stream share one memory pool. That is safe in any order, because nothing in it outlives a
    replay; replay each on the stream of its first call.

    Args:
        function: what to run. It, and so the tensors it reads, live as long as this object.
        state: the tensors that ``function`` changes in place, on one CUDA device; they are as before the first call when the
            graph is replayed for the first time.
        enabled: False calls ``function`` each time, on any device.
        name: what the errors call it.

    Raises (in the first call): InputError naming what cannot be captured. ``state`` is then as it was.
    """

    def __init__(self, function: Callable[[], None], state: Sequence[Tensor], enabled: bool, name: str = "the step") -> None:
        self._function = function
        self._state = list(state)
        self._enabled = enabled
        self._name = name
        self._graph: torch.cuda.CUDAGraph | None = None
        self._pool: _Pool | None = None
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
        if self._graph is None:
            self._capture()
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
                self._graph, self._pool = self._record(pool, current), pool
            finally:
                self._restore(saved)

    def _warm_up(self, pool: _Pool, saved: list[Tensor], current: torch.cuda.Stream) -> None:
        """Runs the function outside of a capture, so that all it does once is done; each run starts from the saved state."""
        generator = torch.cuda.get_rng_state()
        pool.stream.wait_stream(current)
        try:
            with torch.cuda.stream(pool.stream):
                for _ in range(WARM_UPS):
                    self._function()
                    self._restore(saved)
        finally:
            current.wait_stream(pool.stream)
        if not torch.equal(generator, torch.cuda.get_rng_state()):
            raise self._refusal("it draws random numbers from torch's generator, which seeds do not determine in a replay")

    def _record(self, pool: _Pool, current: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        failure: Exception | None = None
        collecting = gc.isenabled()
        gc.disable()  # a collection may free another graph or an event, which a capture forbids
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
            cause = failure or error
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            raise self._refusal(" ".join(str(cause).split()) or type(cause).__name__) from cause
        finally:
            if collecting:
                gc.enable()
        return graph

    def _restore(self, saved: list[Tensor]) -> None:
        for tensor, value in zip(self._state, saved, strict=True):
            tensor.copy_(value)

    def _refusal(self, reason: str) -> InputError:
        return InputError(f"{self._name} cannot be captured as a CUDA graph: {reason}. Use capture='none' in the plan")
