"""The training loop that the tokenizer and the generator share.

One process or many (``accelerate launch``, ``torchrun``, ``srun``; :mod:`.parallel`): ``batch_size`` is the whole step's, and a
run is the same, up to rounding, however many processes and passes share it. Batches and random numbers are functions of
(seed, step) alone, which makes a resumed run continue bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from textok_fast.config import AdamConfig, OptimConfig, RunConfig, to_dict
from textok_fast.data.base import Draw
from textok_fast.errors import InputError
from textok_fast.files import write_atomically, write_text
from textok_fast.training.checkpoints import Trained, complete_directory, list_checkpoints, load_checkpoint, save_checkpoint
from textok_fast.training.optim import ExponentialMovingAverage, build_optimizers, learning_rate
from textok_fast.training.parallel import (
    Vote,
    check_run,
    from_main,
    gathered,
    is_plain,
    join_processes,
    lost_processes,
    mean_over,
    place,
    precision,
    twin,
)

# Fields of RunConfig that a continuation may change: where things are, what is shown and kept.
SHOWN = ("output_dir", "workers", "log_every", "sample_every", "checkpoint_every", "keep_checkpoints", "tensorboard")
# And how the work is shared, which changes rounding only.
MAY_CHANGE = (*SHOWN, "gradient_accumulation", "parallel", "compile", "activation_checkpointing", "timeout")
# Places of frozen networks, whose weights are told by hashes in ``content``.
PLACES = ("loss.lpips_weights", "loss.lpips_heads", "discriminator.backbone")


class Examples(Protocol):
    """A map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Critic(Protocol):
    """A network trained against a task's model, on the same micro-batches: its optimizers step after the model's.

    The task's loss reads the bare network, with its parameters held fixed, and leaves here what the critic's own loss reads.
    """

    @property
    def model(self) -> nn.Module:
        """The network; what else must survive in checkpoints lies in its buffers."""
        ...

    @property
    def optim(self) -> AdamConfig: ...

    @property
    def start(self) -> int:
        """The first step that trains it."""
        ...

    def loss(self, model: nn.Module, rng: StepRandom) -> dict[str, Tensor]:
        """Scalars by name, on what the task's loss of this micro-batch left; "loss" is the one to minimise. ``model`` may be
        wrapped for distribution."""
        ...

    def end_step(self) -> None:
        """Called on every process after the optimizers' step."""
        ...


class Task(Protocol):
    """What is trained: a model, its loss, and what to show and keep of it."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def critic(self) -> Critic | None: ...

    def loss(self, model: nn.Module, batch: dict[str, Any], rng: StepRandom) -> dict[str, Tensor]:
        """Scalars by name for one batch; "loss" is the one to minimise. ``model`` may be wrapped for distribution."""
        ...

    def preview(self, rng: StepRandom) -> Image.Image | None:
        """A picture of what ``self.model``, holding the averaged weights, does now."""
        ...

    def finish(self, directory: Path) -> None:
        """Writes ``self.model``, holding the averaged weights, as something ``from_pretrained`` reads."""
        ...


def seeded_generator(*seeds: int) -> torch.Generator:
    """A CPU generator whose stream depends on all the numbers given (numpy's SeedSequence mixes them)."""
    # The count first: to numpy (1, 2) and (1, 2, 0) are the same.
    state = np.random.SeedSequence([len(seeds), *seeds]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) & (2**63 - 1))


class StepRandom:
    """The random numbers of one step, drawn on the CPU for its whole batch and cut to one of ``parts`` equal slices of it.

    ``stream``: another number, other random numbers.
    """

    def __init__(self, seed: int, step: int, stream: int, part: int, parts: int, device: torch.device) -> None:
        self.generator = seeded_generator(seed, step, stream)
        self.step = step
        self.part, self.parts, self.device = part, parts, device

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, (B, ...) for this part's B."""
        return self._slice(torch.randn(shape[0] * self.parts, *shape[1:], generator=self.generator), shape[0])

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in [0, 1)."""
        return self._slice(torch.rand(shape[0] * self.parts, *shape[1:], generator=self.generator), shape[0])

    def integers(self, high: int, count: int) -> Tensor:
        """int64 in [0, high), (count,)."""
        return self._slice(torch.randint(high, (count * self.parts,), generator=self.generator), count)

    def _slice(self, values: Tensor, count: int) -> Tensor:
        return values[self.part * count : (self.part + 1) * count].to(self.device)


class StepBatches(Sampler[list[int]]):
    """Index batches of the steps from ``start`` to before ``stop``: epoch after epoch of seeded permutations, cut into whole
    batches, and of each of these the ``passes`` parts of ``batch_size`` that are this process's: part pass * world + rank.

    ``order`` is a data set's ``epoch_order``, for those whose reads should stay together. Each index is a ``Draw``.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        rank: int,
        world: int,
        passes: int = 1,
        order: Callable[[int, int, int], np.ndarray | None] | None = None,
    ) -> None:
        self.whole = batch_size * world * passes
        if length < self.whole:
            raise InputError(
                f"the data set has {length} pictures, fewer than a step's batch of {self.whole}; lower run.batch_size"
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.stop, self.rank, self.world, self.passes = start, stop, rank, world, passes
        self.order = order

    def __len__(self) -> int:
        return (self.stop - self.start) * self.passes

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.length // self.whole
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.start, self.stop):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = self._epoch(epoch)
            for part in range(self.passes):
                first = (step % per_epoch) * self.whole + (part * self.world + self.rank) * self.batch_size
                yield [Draw(index, self.seed, epoch) for index in order[first : first + self.batch_size].tolist()]

    def _epoch(self, epoch: int) -> np.ndarray:
        given = None if self.order is None else self.order(self.seed, epoch, self.whole)
        if given is not None:
            return given
        return torch.randperm(self.length, generator=seeded_generator(self.seed, epoch)).numpy()


@dataclasses.dataclass
class TrainResult:
    """Where a run's products are, and its loss curve."""

    run: Path
    final: Path
    history: list[dict[str, float]]
    is_main: bool = True  # of several processes one reports


def announce(processes: Any, text: str) -> None:
    """A line on stderr, from one process."""
    if processes.is_main_process:
        print(text, file=sys.stderr, flush=True)


def epochs(run: RunConfig, pictures: int) -> str:
    """A run's length in words; an epoch is as many whole batches as there are in ``pictures``."""
    whole = max(1, pictures // run.batch_size)
    return f"{run.steps:,} steps of {run.batch_size:,}: {run.steps / whole:.4g} epochs of {pictures:,} pictures"


def fit(
    task: Task,
    dataset: Examples,
    collate: Callable[[list[Any]], dict[str, Any]],
    config: Any,
    *,
    content: Mapping[str, Any],
    resume: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Trains ``task`` on ``dataset`` as ``config.run`` and ``config.optim`` say.

    Leaves in ``run.output_dir``: config.yaml, log.jsonl, TensorBoard events, samples/*.png, the newest checkpoints, and final/.
    Ctrl-C and SIGTERM write a checkpoint before they pass on, and reach every process if they reach one. ``content`` says what
    the data are; a resumed run must have the same.

    Raises InputError when the directory holds a run and ``resume`` is not set, a run with other settings or other data, or one
    that another process is training.
    """
    processes = join_processes(config.run.timeout)
    check_run(config.run, processes.device, processes.num_processes)
    run = Path(config.run.output_dir)
    if not resume and (list_checkpoints(run) or (run / "final").exists()):
        raise InputError(f"{run} already holds a run; add --resume to continue it, or choose another run.output_dir")
    with (
        _only_trainer(run) if processes.is_main_process else contextlib.nullcontext(),
        lost_processes(processes.num_processes, run),
    ):
        return _fit(task, dataset, collate, config, content, progress)


def _fit(
    task: Task,
    dataset: Examples,
    collate: Callable[[list[Any]], dict[str, Any]],
    config: Any,
    content: Mapping[str, Any],
    progress: bool,
) -> TrainResult:
    from accelerate.utils import set_seed

    run_config: RunConfig = config.run
    optim_config: OptimConfig = config.optim
    run = Path(run_config.output_dir)
    final = run / "final"
    processes = join_processes(run_config.timeout)
    set_seed(run_config.seed)
    rank, world, device = processes.process_index, processes.num_processes, processes.device
    is_main, passes = processes.is_main_process, run_config.gradient_accumulation
    settings = to_dict(config)
    # Whole weights are shown and saved by a network that nothing has been done to.
    shown = None if is_plain(run_config, world) or not is_main else twin(task.model)
    network = place(task.model, run_config, device, world)
    optimizers = build_optimizers(task.model, optim_config)
    averages = {
        _average_name(decay, optim_config): ExponentialMovingAverage(task.model, decay) for decay in _decays(optim_config)
    }
    trained = Trained({"model": task.model}, averages, {"optimizer": optimizers})
    critic, opponent, critic_optimizers = task.critic, network, []
    if critic is not None:  # small beside the model, so every process holds all of it
        opponent = place(critic.model, run_config, device, world, parallel="ddp")
        critic_optimizers = build_optimizers(critic.model, critic.optim)
        trained.networks["critic"], trained.optimizers["critic_optimizer"] = critic.model, critic_optimizers
    # What must not change between a run and its continuation, or the two would be no one run.
    expected = _flat({**settings, "content": {**content, "length": len(dataset)}})
    expected = {key: value for key, value in expected.items() if key.removeprefix("run.") not in (*MAY_CHANGE, *PLACES)}
    newest, complete = from_main((next(reversed(list_checkpoints(run)), None), final.exists()), world)
    done = 0 if newest is None else load_checkpoint(newest, trained, expected, _flat(to_dict(type(config)())))
    result = TrainResult(run, final, read_history(run), is_main)
    if done == run_config.steps and complete:
        return result
    if is_main:
        write_text(run / "config.yaml", yaml.safe_dump(settings, sort_keys=False))

    batches = StepBatches(
        len(dataset),
        run_config.batch_size // (world * passes),
        run_config.seed,
        done,
        run_config.steps,
        rank,
        world,
        passes,
        getattr(dataset, "epoch_order", None),
    )
    loader = iter(
        DataLoader(
            dataset,  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=run_config.workers,
            worker_init_fn=_leave_interrupts_to_main,
        )
    )
    log = _Log(run, done, tensorboard=run_config.tensorboard) if is_main else None
    bar = tqdm(
        total=run_config.steps,
        initial=done,
        desc=run.name,
        unit="step",
        disable=not (progress and is_main),
        mininterval=0.5 if sys.stderr.isatty() else 20.0,
        file=sys.stderr,
    )

    def checkpoint(step: int) -> None:
        save_checkpoint(run, step, trained, expected, run_config.keep_checkpoints, is_main)

    def picture(step: int) -> None:
        if log is not None:
            log.picture(step, task.preview(StepRandom(run_config.seed, step, 0, 0, 1, device)))

    seen, since = 0, time.perf_counter()
    interrupts, vote = _Interrupts(), Vote(device, world)
    try:
        for step in range(done, run_config.steps):
            rate = learning_rate(step, run_config.steps, optim_config)
            _set_rate(optimizers, rate)
            opposed = critic is not None and step >= critic.start
            if critic is not None and opposed:  # its warm-up and cosine begin with it
                _set_rate(critic_optimizers, learning_rate(step - critic.start, run_config.steps - critic.start, critic.optim))
            means: dict[str, Tensor] = {}  # of the terms over the parts
            for index in range(passes):
                batch, last_part = next(loader), index == passes - 1
                rng = StepRandom(run_config.seed, step, 0, index * world + rank, world * passes, device)
                with network.part(last_part):
                    with precision(run_config, device):
                        terms = task.loss(network.forward, batch, rng)
                    network.descend(terms["loss"], optimizers, optim_config.grad_clip, passes, last_part)
                if critic is not None and opposed:
                    with opponent.part(last_part):
                        with precision(run_config, device):
                            critic_terms = critic.loss(opponent.forward, rng)
                        opponent.descend(critic_terms["loss"], critic_optimizers, critic.optim.grad_clip, passes, last_part)
                    terms |= {f"critic_{name}": value for name, value in critic_terms.items()}
                for name, value in terms.items():
                    means[name] = means.get(name, torch.zeros((), device=device)) + value.detach() / passes
            seen += run_config.batch_size
            if critic is not None and opposed:
                critic.end_step()
            for average in averages.values():
                average.update(task.model, step)
            last = step + 1 == run_config.steps
            if (step + 1) % run_config.log_every == 0 or last:
                values = mean_over(means, world)
                if not all(abs(value) < float("inf") for value in values.values()):
                    raise InputError(f"the loss is no longer finite at step {step + 1}: {values}; lower optim.lr")
                now = time.perf_counter()
                rate_seen = seen / (now - since)
                seen, since = 0, now
                bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate_seen:.0f} images/s")
                if log is not None:
                    log.write(step + 1, {**values, "lr": rate, "images_per_s": rate_seen})
            bar.update()
            if (step + 1) % run_config.checkpoint_every == 0 and not last:
                checkpoint(step + 1)
            if (step + 1) % run_config.sample_every == 0 and not last:
                with _averaged(task, averages["ema"], shown, is_main, device):
                    picture(step + 1)
            if vote.ask(interrupts.asked) and not last:
                checkpoint(step + 1)
                raise KeyboardInterrupt
        if done < run_config.steps:
            checkpoint(run_config.steps)
    finally:
        interrupts.close()
        bar.close()
        if log is not None:
            log.close()
    for name, average in reversed(averages.items()):  # final/ says that all is there
        with _averaged(task, average, shown, is_main, device):
            if name == "ema":
                picture(run_config.steps)
            if is_main:
                with complete_directory(run / f"final{name.removeprefix('ema') and f'-{name}'}") as directory:
                    task.finish(directory)
    processes.wait_for_everyone()
    return dataclasses.replace(result, history=read_history(run))


def _decays(config: OptimConfig) -> tuple[float, ...]:
    return (config.ema_decay, *config.ema_decays)


def _average_name(decay: float, config: OptimConfig) -> str:
    """Of its file in checkpoints, and behind "final-" of its directory."""
    return "ema" if decay == config.ema_decay else f"ema-{decay}"


def _set_rate(optimizers: list[Any], rate: float) -> None:
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = rate


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"width": 8}} -> {"model.width": 8}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


@contextlib.contextmanager
def _only_trainer(run: Path) -> Iterator[None]:
    """Inside, no other process trains in this directory; InputError when one does."""
    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(
            f"{run} is being trained by another process; wait for it, stop it, or choose another run.output_dir"
        ) from None
    try:
        yield
    finally:
        lock.release()


def read_history(run: Path) -> list[dict[str, float]]:
    """The lines of a run's log.jsonl; a half-written last line is left out."""
    history = []
    try:
        lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            history.append(json.loads(line))
        except ValueError:
            continue
    return history


def _leave_interrupts_to_main(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Interrupts:
    """Notes Ctrl-C and SIGTERM, so that the step in hand is finished before anything is saved; another Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self.previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def close(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _averaged(
    task: Task, average: ExponentialMovingAverage, shown: nn.Module | None, is_main: bool, device: torch.device
) -> Iterator[None]:
    """Inside, ``task.model`` of the main process holds averaged weights and is in eval mode; every process calls this.

    It is ``shown``, where there is one, and the trained model otherwise.
    """
    values = gathered(average.state_dict(), is_main)
    if not is_main:
        yield
        return
    trained = task.model
    held = trained if shown is None else shown.to(device)
    kept = {name: parameter.detach().clone() for name, parameter in held.named_parameters()} if shown is None else {}
    _overwrite(held.named_parameters(), values)
    if shown is not None:
        _overwrite(held.named_buffers(), dict(trained.named_buffers()))
    held.eval()
    setattr(task, "model", held)  # noqa: B010 (a property to readers)
    try:
        yield
    finally:
        setattr(task, "model", trained)  # noqa: B010
        _overwrite(held.named_parameters(), kept)
        held.train() if shown is None else held.cpu()


@torch.no_grad()
def _overwrite(tensors: Iterable[tuple[str, Tensor]], values: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors:
        if name in values:
            tensor.copy_(values[name])


class _Log:
    """log.jsonl, TensorBoard and sample pictures of one run. Lines after the step that is resumed from are dropped."""

    def __init__(self, run: Path, done: int, tensorboard: bool) -> None:
        self.run = run
        kept = [line for line in read_history(run) if line["step"] <= done]
        write_text(run / "log.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
        self.file = (run / "log.jsonl").open("a", encoding="utf-8")
        self.board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                print("tensorboard is not installed: no events are written (pip install textok-fast[train])", file=sys.stderr)
            else:
                self.board = SummaryWriter(str(run / "tensorboard"), purge_step=done + 1 if done else None)

    def write(self, step: int, values: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def picture(self, step: int, image: Image.Image | None) -> None:
        if image is not None:
            (self.run / "samples").mkdir(exist_ok=True)
            write_atomically(self.run / "samples" / f"{step:06d}.png", lambda path: image.save(path, format="PNG"))

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()
