"""Which implementation of an operation runs: chosen from device, dtype and shape, or forced.

Every operation registers rules, best first; the first that takes the inputs runs, and ``reference`` (PyTorch) takes all.
The environment variable ``TEXTOK_OPS``, read when the process starts, and :func:`use_backend` force a choice:

- one name, ``TEXTOK_OPS=reference``: that backend wherever an operation has it and it takes the inputs, else the usual choice;
- ``TEXTOK_OPS=attention=sdpa,vq_nearest=reference``: these operations strictly; inputs the backend does not take are an error.

Everything here is plain Python over module dictionaries, so that torch.compile traces through it and guards on it: a graph is
compiled again after the choice has changed. While a model is exported or traced every operation is its reference, unless it
is forced strictly. So it is inside torch.func and forward-mode differentiation, where forcing one strictly is an error.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from textok_fast.errors import InputError

logger = logging.getLogger("textok_fast.ops")

ENVIRONMENT = "TEXTOK_OPS"
REFERENCE = "reference"

# A rule says why a backend does not take these inputs, or "" when it does. Called with the operation's own arguments.
Rule = Callable[..., str]

_rules: dict[str, dict[str, Rule]] = {}  # operation -> backend -> what it can run, in order of preference
_defaults: dict[str, dict[str, Rule]] = {}  # operation -> backend -> what it is chosen for, where that is less
_loaders: dict[str, Callable[[], str]] = {}  # backend -> makes it ready; says why it cannot, or ""
_state: dict[str, str] = {}  # backend -> the loader's answer
_forced: dict[str, str] = {}  # operation, or "*" for all -> backend


def register_backend(backend: str, loader: Callable[[], str]) -> None:
    """``loader`` imports what the backend needs, once, before its first use; it says why it is not to be had, or ""."""
    _loaders[backend] = loader


def register(operation: str, backend: str, rule: Rule, default: Rule | None = None) -> None:
    """Backends are tried in the order of their registration.

    Args:
        rule: what the backend can run.
        default: what it is chosen for without being forced, where that is less than what it can run.
    """
    _rules.setdefault(operation, {})[backend] = rule
    if default is not None:
        _defaults.setdefault(operation, {})[backend] = default


def load_backend(backend: str) -> str:
    """Makes a backend ready. Returns "" or the reason why this machine does not have it, which is logged once."""
    if backend not in _state:
        _state[backend] = _loaders[backend]() if backend in _loaders else ""
        if _state[backend]:
            logger.info("operations: no %s backend here (%s)", backend, _state[backend])
    return _state[backend]


def choose(operation: str, *args: Any) -> str:
    """The name of the backend that runs ``operation`` for these arguments.

    Raises :class:`InputError` when a backend forced for this very operation does not take them.
    """
    rules = _rules[operation]
    strict = _forced.get(operation)
    transformed = _is_transformed()
    if strict is not None:
        if strict == REFERENCE:
            return REFERENCE
        reason = "it has no rules for torch.func and forward-mode differentiation" if transformed else rules[strict](*args)
        if reason:
            raise InputError(f"{operation}: the forced backend {strict!r} does not take these inputs: {reason}")
        return strict
    # The flag and not torch.compiler.is_exporting(): to torch 2.11's compiler that is true whenever it traces.
    if transformed or torch.compiler._is_exporting_flag or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing():
        return REFERENCE
    wanted = _forced.get("*")
    if wanted is not None and (wanted == REFERENCE or (wanted in rules and not rules[wanted](*args))):
        return wanted
    defaults = _defaults.get(operation, {})
    for backend, rule in rules.items():
        if _is_ready(backend) and not rule(*args) and not (backend in defaults and defaults[backend](*args)):
            return backend
    return REFERENCE


def _is_ready(backend: str) -> bool:
    """Whether it is loaded, or is PyTorch itself and needs no loading."""
    return _state.get(backend) == "" or (backend not in _loaders and backend not in _state)


def _is_transformed() -> bool:
    """Whether torch.func (vmap, grad, jvp) or forward-mode differentiation is at work.

    Fused operations have no rules for them, and would give zero derivatives without a word.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


@contextmanager
def use_backend(backend: str | None = None, **operations: str) -> Iterator[None]:
    """Forces backends: ``use_backend("reference")``, ``use_backend(attention="sdpa")``, or both.

    It holds in the whole process, for all threads; enter it in one thread at a time. Inside another one, ``backend`` takes the
    place of all that is forced outside, ``operations`` of the same operations.

    Args:
        backend: for every operation that has it and wherever it takes the inputs.
        operations: operation -> backend, strictly: inputs it does not take raise :class:`InputError`.

    Raises :class:`InputError` for an unknown name, and for a backend that this machine does not have.
    """
    wanted = ({} if backend is None else {"*": backend}) | operations
    _check(wanted)
    before = dict(_forced)
    if backend is not None:
        _forced.clear()
    _forced.update(wanted)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def force_from_environment() -> None:
    """Reads ``TEXTOK_OPS``; called once, when every operation has registered."""
    text = os.environ.get(ENVIRONMENT, "").strip()
    if not text:
        return
    wanted = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        operation, equals, backend = part.partition("=")
        wanted.update({operation.strip(): backend.strip()} if equals else {"*": part})
    try:
        _check(wanted)
    except InputError as error:
        raise InputError(f"{ENVIRONMENT}={text}: {error}") from None
    _forced.update(wanted)


def _check(wanted: Mapping[str, str]) -> None:
    for operation, backend in wanted.items():
        if operation != "*" and operation not in _rules:
            raise InputError(f"unknown operation {operation!r}; known: {', '.join(sorted(_rules))}")
        known = {name for rules in _rules.values() for name in rules} if operation == "*" else set(_rules[operation])
        if backend not in known | {REFERENCE}:
            of = "" if operation == "*" else f" of {operation}"
            raise InputError(f"unknown backend {backend!r}{of}; known: {', '.join(sorted(known | {REFERENCE}))}")
        if backend != REFERENCE and (reason := load_backend(backend)):
            raise InputError(f"this machine has no backend {backend!r}: {reason}")


def backends(operation: str) -> dict[str, str]:
    """The backends of an operation in order of preference, each with "" or why this machine does not have it."""
    return {backend: load_backend(backend) for backend in _rules[operation]} | {REFERENCE: ""}


def operations() -> list[str]:
    """Names of all operations."""
    return list(_rules)


def forced() -> dict[str, str]:
    """What is forced now: operation, or "*" for all of them, -> backend."""
    return dict(_forced)


# -- what rules are made of ------------------------------------------------------------------------------------------------


def describe(tensor: Tensor) -> str:
    """Such as "cuda bfloat16 (2, 32, 1152)"."""
    return f"{tensor.device.type} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a result of these tensors would be recorded for a backward pass."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def one_device(*tensors: Tensor | None) -> bool:
    """Whether all tensors that are given lie on one device."""
    given = [tensor for tensor in tensors if tensor is not None]
    return all(tensor.device == given[0].device for tensor in given)


# -- for references -----------------------------------------------------------------------------------------------------------


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """For references, which compute in the dtype that they name. Nothing where autocast is off: exported graphs stay plain."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()
