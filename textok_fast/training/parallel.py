"""How a network computes while it trains: whole on every process or in parts, compiled, recomputed, in 8 bits.

Accelerate joins the processes, whoever started them (``accelerate launch``, ``torchrun``, ``srun``); DDP and FSDP2 are torch's
own. What is written and shown is whole: a checkpoint does not tell how many processes made it, or how they shared the weights.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint as recomputed

from textok_fast.config import RunConfig
from textok_fast.errors import InputError
from textok_fast.modeling.dit import DiTBlock
from textok_fast.modeling.layers import Attention, CrossAttention, Mlp, ViTBlock
from textok_fast.ops.device import default_device

T = TypeVar("T")

FP8_CAPABILITY = (8, 9)  # the first compute capability with 8-bit matrix products
FP8_MULTIPLE = 16  # of both sizes of a matrix that torch's 8-bit product takes


def join_processes(timeout: float = RunConfig.timeout) -> Any:
    """This process's ``accelerate.PartialState``: its device, its number, and the others of the same launch.

    ``timeout``: seconds that a collective waits for the others; of the first call in a process.
    """
    try:
        from accelerate import PartialState
    except ImportError:
        raise InputError("training needs accelerate: pip install 'textok-fast[train]'") from None
    given = {"timeout": timedelta(seconds=timeout)} if int(os.environ.get("WORLD_SIZE", "1")) > 1 else {}
    return PartialState(cpu=default_device().type == "cpu", **given)


def check_run(run: RunConfig, device: torch.device, world: int) -> None:
    """Raises InputError, with the reason, for settings that cannot work together or not on this device."""
    share = world * run.gradient_accumulation
    if run.batch_size % share:
        fits = [n for n in range(1, run.batch_size + 1) if run.batch_size % (n * run.gradient_accumulation) == 0]
        processes = (
            f"start {_listed(fits)} processes" if fits else f"set run.gradient_accumulation to a divisor of {run.batch_size}"
        )
        above = run.batch_size + -run.batch_size % share
        raise InputError(
            f"run.batch_size {run.batch_size} does not divide over {world} processes x run.gradient_accumulation "
            f"{run.gradient_accumulation}: {processes}, or begin a run with run.batch_size={above}"
        )
    if run.mixed_precision == "fp8":
        _check_float8(device)
    for variable, setting in (("ACCELERATE_USE_FSDP", "run.parallel=fsdp"), ("ACCELERATE_USE_DEEPSPEED", "run.parallel=fsdp")):
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise InputError(
                f"{variable} is set, but how weights are shared is a setting of the run: unset it and say {setting}"
            )
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", run.mixed_precision):
        raise InputError(
            f"accelerate was started with mixed precision {asked}, the run says run.mixed_precision={run.mixed_precision}: "
            "leave it out there; a run's precision is its own setting"
        )


def _listed(numbers: list[int]) -> str:
    shown = [str(number) for number in numbers]
    if len(shown) > 9:
        shown = [*shown[:8], "...", shown[-1]]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"


def _check_float8(device: torch.device) -> None:
    where = f"run.mixed_precision=fp8 needs a GPU of compute capability {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} or later"
    if device.type != "cuda":
        raise InputError(f"{where}, this run is on the {device.type}: use bf16")
    if (capability := torch.cuda.get_device_capability(device)) < FP8_CAPABILITY:
        raise InputError(f"{where}, {torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}: use bf16")
    try:
        import torchao.float8  # noqa: F401
    except ImportError:
        raise InputError("run.mixed_precision=fp8 needs torchao: pip install 'textok-fast[fp8]'") from None


class Network:
    """A network under training, the same on every process of the run.

    ``model`` holds the parameters, under FSDP as DTensors; ``forward`` is what a loss calls.
    """

    def __init__(self, model: nn.Module, forward: nn.Module, sharded: bool) -> None:
        self.model, self.forward, self.sharded = model, forward, sharded

    @contextlib.contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one part of a step: processes exchange gradients in the last one only."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        with contextlib.nullcontext() if last or self.sharded or self.forward is self.model else self.forward.no_sync():  # type: ignore[operator]
            yield

    def descend(self, loss: Tensor, optimizers: Sequence[torch.optim.Optimizer], clip: float, parts: int, last: bool) -> None:
        """The backward pass of one of ``parts`` of a step; after the last one the optimizers' step.

        ``clip``: the largest norm of the whole gradient; 0 leaves it as it is.
        """
        (loss / parts).backward()
        if not last:
            return
        if clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def place(model: nn.Module, run: RunConfig, device: torch.device, world: int, parallel: str = "") -> Network:
    """Readies ``model``, in place, for training as ``run`` says. ``parallel``: other than ``run.parallel``.

    FP8, recomputation and compilation are of the transformer blocks. Optimizers and averages are to be made afterwards, of the
    parameters that ``model`` then has.
    """
    model.to(device).train()
    sharded = world > 1 and (parallel or run.parallel) == "fsdp"
    if run.mixed_precision == "fp8":
        _to_float8(model)
    for module in _regions(model, sharded):
        if run.activation_checkpointing:
            module.forward = functools.partial(recomputed, module.forward, use_reentrant=False, preserve_rng_state=False)
        if run.compile:
            module.forward = torch.compile(module.forward)
    if sharded:
        _shard(model, device, world, run.mixed_precision != "no")
    return Network(model, model if world == 1 or sharded else _distributed(model, device), sharded)


def precision(run: RunConfig, device: torch.device) -> torch.autocast:
    """The context that losses are computed in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=run.mixed_precision != "no")


def is_plain(run: RunConfig, world: int) -> bool:
    """Whether :func:`place` leaves a network as it was, but for DDP around it."""
    sharded = world > 1 and run.parallel == "fsdp"
    return not (sharded or run.compile or run.activation_checkpointing or run.mixed_precision == "fp8")


def _distributed(model: nn.Module, device: torch.device) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device], gradient_as_bucket_view=True)


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (ViTBlock, DiTBlock))]


def _shards(model: nn.Module) -> list[nn.Module]:
    """What FSDP keeps in parts between uses.

    Not whole blocks: a block ends with the LayerNorm that the next begins with, and all adaLN products of a DiT come before its
    first block. The rest, norms among it, is the root's, which is whole throughout a pass.
    """
    inside = [module for module in model.modules() if isinstance(module, (Attention, CrossAttention, Mlp))]
    return [*inside, *(block.adaLN_modulation[1] for block in _blocks(model) if isinstance(block, DiTBlock))]


def _regions(model: nn.Module, sharded: bool) -> list[nn.Module]:
    """What is compiled and recomputed as one: blocks, or where these are sharded their parts, so that the hooks of FSDP, which
    gather and free weights, stay outside."""
    return [module for module in _shards(model) if not isinstance(module, nn.Linear)] if sharded else _blocks(model)


def _shard(model: nn.Module, device: torch.device, world: int, half: bool) -> None:
    """FSDP2 over all processes. ``half``: the shards' weights are gathered in bfloat16, in which autocast uses them anyway;
    gradients are summed in float32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # The residual sums after a sharded module make new tensors; nothing works in place on what it returns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (world,))
    lean = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if half else MixedPrecisionPolicy()
    for module in _shards(model):
        fully_shard(module, mesh=mesh, mp_policy=lean)
    fully_shard(model, mesh=mesh)


def _to_float8(model: nn.Module) -> None:
    """The blocks' linear layers compute in float8 (torchao, a scale a tensor); weights and their names stay as they are.

    Not adaLN's, whose products are of a row a picture and decide about every token.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def wanted(layer: nn.Module, name: str) -> bool:
        sizes: tuple[Any, ...] = (layer.in_features, layer.out_features)
        return "adaLN" not in name and not any(size % FP8_MULTIPLE for size in sizes)

    config = Float8LinearConfig(pad_inner_dim=True)  # of a weight's gradient it is the number of rows, which may be any
    for block in _blocks(model):
        convert_to_float8_training(block, config=config, module_filter_fn=wanted)


def twin(model: nn.Module) -> nn.Module:
    """A copy on the CPU, made before :func:`place`, to hold whole weights that are shown and saved. It shares the frozen text
    encoder."""
    shared = getattr(model, "_text_encoder", None)
    return copy.deepcopy(model, {} if shared is None else {id(shared): shared}).cpu()


# -- whole tensors and their parts ---------------------------------------------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor that all parts make; every process of the run calls this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(value: Tensor, like: Tensor) -> Tensor:
    """``value``, whole and the same on every process, as the part of ``like`` that this process holds, if it holds a part."""
    if not isinstance(like, DTensor):
        return value
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The whole tensors, those of parts on the CPU; nothing where ``keep`` is false. Every process calls this."""
    found = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if keep:
            found[name] = (value.cpu() if isinstance(tensor, DTensor) else value).contiguous()
    return found


def gathered_optimizer(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """``state_dict()`` with whole tensors, as :func:`gathered`."""
    state = optimizer.state_dict()
    moments = {}
    for index, values in state["state"].items():
        tensors = gathered({name: value for name, value in values.items() if isinstance(value, Tensor)}, keep)
        moments[index] = {**values, **tensors}
    return {**state, "state": moments} if keep else {}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """``load_state_dict`` of what :func:`gathered_optimizer` gave, on however many processes."""
    moments = dict(state["state"])
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        for index, parameter in zip(saved["params"], group["params"], strict=True):
            if index in moments:
                moments[index] = {
                    name: part_like(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value
                    for name, value in moments[index].items()
                }
    optimizer.load_state_dict({**state, "state": moments})


# -- words between processes ---------------------------------------------------------------------------------------------------


def mean_over(values: Mapping[str, Tensor], world: int) -> dict[str, float]:
    """Each scalar's mean over the processes, in one exchange."""
    stacked = torch.stack([value.detach().float() for value in values.values()])
    if world > 1:
        distributed.all_reduce(stacked)
    return dict(zip(values, (stacked / world).tolist(), strict=True))


def from_main(value: T, world: int) -> T:
    """What it is on the main process: others may see a shared directory as it was before, or as it is already."""
    if world == 1:
        return value
    given = [value]
    distributed.broadcast_object_list(given, src=0)
    return given[0]


class Vote:
    """Whether any process has asked for something, as all of them learn it a step later: nobody waits for the device then."""

    def __init__(self, device: torch.device, world: int) -> None:
        self.device, self.world = device, world
        self.last: Tensor | None = None

    def ask(self, asked: bool) -> bool:
        """Every process calls this once a step; the answer is the same on all, that of the step before. One process alone gets
        its own at once."""
        if self.world == 1:
            return asked
        last, self.last = self.last, torch.full((), float(asked), device=self.device)
        distributed.all_reduce(self.last, op=distributed.ReduceOp.MAX)
        return last is not None and bool(last > 0)


@contextlib.contextmanager
def lost_processes(world: int, run: Path) -> Iterator[None]:
    """What torch raises when another process has gone, or has not answered in time, becomes a ConnectionError that says so."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        gone = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out", "Socket", "NCCL", "store")
        if world == 1 or not (isinstance(error, distributed.DistError) or any(word in text for word in gone)):
            raise
        raise ConnectionError(
            f"another process of this run has ended or does not answer; {run} goes on from its last checkpoint with --resume, "
            f"on as many processes or others ({text.splitlines()[0].split('. ')[0]})"
        ) from error


def leave(status: int) -> int:
    """Gives ``status`` back; but one of several processes ends here with it, what it has said being flushed.

    For use while the error that it tells is handled. To end in order would take process groups apart whose peer is gone, and
    over that gloo's threads may abort: whoever started the process would see SIGABRT instead of its error.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
