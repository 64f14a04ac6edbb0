"""How an engine runs a model: one object that is printed, compared and saved beside results."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from textok_fast.errors import InputError
from textok_fast.files import write_text
from textok_fast.inference.memory import format_bytes
from textok_fast.inference.precision import Precision, Products
from textok_fast.ops.device import resolve_device
from textok_fast.ops.dispatch import use_backend

Compile = Literal["none", "default", "max-autotune"]
Capture = Literal["none", "step", "loop"]
ModulationMode = Literal["auto", "ahead", "inside"]


@dataclass(frozen=True)
class StepCache:
    """Leaves out the middle of the network on some evaluations; it changes the result, so it is off unless asked for.

    On evaluations whose number is not a multiple of ``interval``, blocks [start, stop) do not run: what they added to the
    residual stream the last time they ran is added again (the residual reuse of arXiv 2312.00858 and 2406.01125). None: the
    first and the last quarter of the blocks always run.
    """

    interval: int = 2
    start: int | None = None
    stop: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.interval, int) or self.interval < 2:
            raise InputError(
                f"a step cache's interval is how many evaluations share one full run, at least 2, got {self.interval}"
            )
        for name, value in (("start", self.start), ("stop", self.stop)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise InputError(f"a step cache's {name} is the number of a block, or None, got {value!r}")

    def blocks(self, depth: int) -> tuple[int, int]:
        """``start`` and ``stop`` in a network of ``depth`` blocks; InputError when they are not in it."""
        start = depth // 4 if self.start is None else self.start
        stop = depth - depth // 4 if self.stop is None else self.stop
        if not 0 <= start < stop <= depth:
            raise InputError(f"a step cache's blocks must be 0 <= start < stop <= {depth}, got start {start}, stop {stop}")
        return start, stop

    def full_evaluations(self, guided: tuple[bool, ...]) -> list[bool]:
        """For each evaluation whether all blocks run. A guidance pair cannot reuse what a lone conditional half left."""
        full, with_pair = [], False
        for index, pair in enumerate(guided):
            full.append(index % self.interval == 0 or (pair and not with_pair))
            with_pair = pair if full[-1] else with_pair
        return full


@dataclass(frozen=True)
class Plan:
    """What an :class:`Engine` is to use. Nothing but ``precision`` and ``step_cache`` changes results by more than rounding.

    Attributes:
        precision: "fp32"; "bf16"; "int8" (CPU: weights by channel, activations by row); "fp8" (e4m3 for weights and
            activations, by channel and row; embeddings and the final layer bf16; on a GPU from compute capability 8.9 on,
            elsewhere only emulated). It is that of the products and what lies between them: the residual stream and the
            embedding of time and class are float32 in all of them.
        device: "cpu", "cuda" or "cuda:N".
        compile: mode of torch.compile for the network.
        capture: CUDA graphs of one evaluation, or of all evaluations that share a chunk of modulation. Of a tokenizer, either
            is a graph of its encoder and one of its decoder for each shape that comes again.
        modulation: all evaluations' adaLN outputs from one product before the loop, or each inside its evaluation; "auto"
            takes what moves fewer bytes for the batch at hand.
        modulation_budget: bytes that adaLN outputs computed ahead may take.
        products: what runs packed matrix products on a CPU.
        ops: operation, or "*" for all, -> backend, as ``textok_fast.ops.use_backend`` takes them.
        step_cache: None, or which blocks some evaluations leave out.
        split: run a batch that does not fit in parts, one after the other, instead of refusing it.
        memory_limit: bytes that a run may take in all, where that is less than the device has.
    """

    precision: Precision = "fp32"
    device: str = "cpu"
    compile: Compile = "none"
    capture: Capture = "none"
    modulation: ModulationMode = "auto"
    modulation_budget: int = 512 * 2**20
    products: Products = "auto"
    ops: dict[str, str] = field(default_factory=dict, hash=False)
    step_cache: StepCache | None = None
    split: bool = False
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        choices = {"precision": Precision, "compile": Compile, "capture": Capture}
        for name, known in (choices | {"modulation": ModulationMode, "products": Products}).items():
            if getattr(self, name) not in get_args(known):
                raise InputError(f"a plan's {name} must be one of {', '.join(get_args(known))}; got {getattr(self, name)!r}")
        try:
            kind = torch.device(self.device).type
        except (RuntimeError, TypeError):
            kind = ""
        if kind not in ("cpu", "cuda"):
            raise InputError(f"a plan's device must be cpu, cuda or cuda:N, got {self.device!r}; Plan.automatic() finds one")
        if kind == "cpu" and self.capture != "none":
            raise InputError(f"capture={self.capture!r} needs CUDA graphs, and the plan's device is cpu: use capture='none'")
        if kind == "cuda" and self.precision == "int8":
            raise InputError("int8 runs on a CPU only: use precision='fp8' or 'bf16' on CUDA, or device='cpu'")
        if kind == "cuda" and self.products != "auto":
            raise InputError(f"products={self.products!r} chooses between a CPU's packed products: use 'auto' on {self.device}")
        if not isinstance(self.ops, dict) or not all(isinstance(each, str) for pair in self.ops.items() for each in pair):
            raise InputError(f"a plan's ops are a dict from operation, or '*', to backend, got {self.ops!r}")
        if not isinstance(self.split, bool):
            raise InputError(f"a plan's split is True or False, got {self.split!r}")
        if self.step_cache is not None and not isinstance(self.step_cache, StepCache):
            raise InputError(f"a plan's step_cache is a StepCache or None, got {self.step_cache!r}")
        for name in ("modulation_budget", "memory_limit"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InputError(f"a plan's {name} is a number of bytes, at least 1, got {value!r}")

    @classmethod
    def automatic(
        cls, device: str | torch.device = "auto", precision: Precision | None = None, batch: int | None = None, **fields: Any
    ) -> Plan:
        """The best for this hardware, with any other field given.

        Args:
            device: "auto" for the GPU where there is one.
            precision: None for bf16 where the processor computes with it, else fp32.
            batch: how many samples a run will have. Up to 4, or None, a GPU spends its time between kernels, and the whole
                loop becomes one graph; above, one graph an evaluation is enough.
        """
        place = resolve_device(device)
        if precision is None:
            precision = "bf16" if _computes_bf16(place) else "fp32"
        chosen: dict[str, Any] = {"precision": precision, "device": str(place)}
        if place.type == "cuda":
            chosen["capture"] = "loop" if batch is None or batch <= 4 else "step"
        return cls(**{**chosen, **fields})

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def backends(self) -> tuple[str | None, dict[str, str]]:
        """``ops`` as the arguments of ``use_backend``: the one for all operations, and those of single ones."""
        return self.ops.get("*"), {name: backend for name, backend in self.ops.items() if name != "*"}

    def require_machine(self) -> Plan:
        """Returns itself; InputError for what this machine cannot do: a GPU that is not there, fp8 on one that has none, a
        backend that is not installed."""
        device = resolve_device(self.device)
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            if self.precision == "fp8" and capability < (8, 9):
                raise InputError(
                    f"fp8 needs a GPU of compute capability 8.9 or later, {torch.cuda.get_device_name(device)} has "
                    f"{capability[0]}.{capability[1]}: use precision='bf16'"
                )
        with use_backend(self.backends[0], **self.backends[1]):  # which checks the names
            return self

    def describe(self) -> str:
        """All of it for a reader, one line a decision."""
        cache = "off"
        if self.step_cache is not None:
            start, stop = self.step_cache.start, self.step_cache.stop
            left_out = (
                f"{'a quarter of them' if start is None else start} to before {'the last quarter' if stop is None else stop}"
            )
            cache = f"all blocks once in {self.step_cache.interval} evaluations, else without those from {left_out}"
        ahead = f", at most {format_bytes(self.modulation_budget)} ahead" if self.modulation != "inside" else ""
        operations = ", ".join(f"{name}={backend}" for name, backend in self.ops.items())
        lines = [
            f"precision   {self.precision} on {self.device}",
            f"products    {self.products}",
            f"compile     {self.compile}",
            f"capture     {self.capture}",
            f"modulation  {self.modulation}{ahead}",
            f"operations  {operations or 'as the dispatcher chooses'}",
            f"step cache  {cache}",
            f"memory      {'what is free' if self.memory_limit is None else f'at most {format_bytes(self.memory_limit)}'}, "
            f"a batch that does not fit is {'split' if self.split else 'refused'}",
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """What :meth:`to_dict` made; InputError for fields and values that a plan does not have."""
        if not isinstance(values, dict):
            raise InputError(f"a plan is a mapping of its fields, got {type(values).__name__}")
        known = [each.name for each in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise InputError(f"a plan has no {', '.join(unknown)}; its fields: {', '.join(known)}")
        values = dict(values)
        cache = values.get("step_cache")
        try:
            if isinstance(cache, dict):
                values["step_cache"] = StepCache(**cache)
            if "ops" in values:
                values["ops"] = dict(values["ops"])
            return cls(**values)
        except (TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"not a plan: {error}") from None

    def save(self, path: str | Path) -> Path:
        """Writes JSON; an old file is replaced only when the new one is complete."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=2) + "\n")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads what :meth:`save` wrote, on whatever machine; InputError when it holds no plan."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"no plan at {path}") from None
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read the plan {path}: {error}") from None
        return cls.from_dict(cast(dict[str, Any], values))


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
