"""The training loop that the tokenizer and the generator share, on Hugging Face Accelerate.

One process or many (``accelerate launch``, ``torchrun``): ``batch_size`` is each process's, so the global batch grows with
their number; the same global batch gives the same run however many share it, up to rounding. Batches and random numbers are
functions of (seed, step) alone, which makes a resumed run continue bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
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
from textok_fast.errors import InputError
from textok_fast.files import write_atomically, write_text
from textok_fast.ops.device import default_device
from textok_fast.training.checkpoints import complete_directory, list_checkpoints, load_checkpoint, save_checkpoint
from textok_fast.training.optim import ExponentialMovingAverage, build_optimizers, learning_rate

# Settings that a continuation may change: where things are, and what is shown and kept.
MAY_CHANGE = ("output_dir", "workers", "log_every", "sample_every", "checkpoint_every", "keep_checkpoints", "tensorboard")
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
    """The random numbers of one step, drawn on the CPU for the whole global batch and cut to this process's slice."""

    def __init__(self, seed: int, step: int, micro_step: int, rank: int, world: int, device: torch.device) -> None:
        self.generator = seeded_generator(seed, step, micro_step)
        self.step = step
        self.rank, self.world, self.device = rank, world, device

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, (B, ...) for this process's B."""
        return self._slice(torch.randn(shape[0] * self.world, *shape[1:], generator=self.generator), shape[0])

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in [0, 1)."""
        return self._slice(torch.rand(shape[0] * self.world, *shape[1:], generator=self.generator), shape[0])

    def integers(self, high: int, count: int) -> Tensor:
        """int64 in [0, high), (count,)."""
        return self._slice(torch.randint(high, (count * self.world,), generator=self.generator), count)

    def _slice(self, values: Tensor, count: int) -> Tensor:
        return values[self.rank * count : (self.rank + 1) * count].to(self.device)


class StepBatches(Sampler[list[int]]):
    """Index batches from ``start`` on: epoch after epoch of seeded permutations, this process's slice of each global batch."""

    def __init__(self, length: int, batch_size: int, seed: int, start: int, stop: int, rank: int, world: int) -> None:
        if length < batch_size * world:
            raise InputError(
                f"the data set has {length} pictures, fewer than the global batch of {batch_size * world}; lower run.batch_size"
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.stop, self.rank, self.world = start, stop, rank, world

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.length // (self.batch_size * self.world)
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        for step in range(self.start, self.stop):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = torch.randperm(self.length, generator=seeded_generator(self.seed, epoch))
            first = (step % per_epoch) * self.batch_size * self.world + self.rank * self.batch_size
            yield order[first : first + self.batch_size].tolist()


@dataclasses.dataclass
class TrainResult:
    """Where a run's products are, and its loss curve."""

    run: Path
    final: Path
    history: list[dict[str, float]]
    is_main: bool = True  # of several processes one reports


def join_processes() -> Any:
    """This process's ``accelerate.PartialState``: its device, its number, and the others of the same launch."""
    try:
        from accelerate import PartialState
    except ImportError:
        raise InputError("training needs accelerate: pip install 'textok-fast[train]'") from None
    return PartialState(cpu=default_device().type == "cpu")


def announce(processes: Any, text: str) -> None:
    """A line on stderr, from one process."""
    if processes.is_main_process:
        print(text, file=sys.stderr, flush=True)


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
    processes = join_processes()
    run = Path(config.run.output_dir)
    if not resume and (list_checkpoints(run) or (run / "final").exists()):
        raise InputError(f"{run} already holds a run; add --resume to continue it, or choose another run.output_dir")
    with _only_trainer(run) if processes.is_main_process else contextlib.nullcontext():
        return _fit(task, dataset, collate, config, content, progress)


def _fit(
    task: Task,
    dataset: Examples,
    collate: Callable[[list[Any]], dict[str, Any]],
    config: Any,
    content: Mapping[str, Any],
    progress: bool,
) -> TrainResult:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import set_seed

    run_config: RunConfig = config.run
    optim_config: OptimConfig = config.optim
    run = Path(run_config.output_dir)
    final = run / "final"
    AcceleratorState._reset_state()  # or a second run in one process could not have another precision
    accelerator = Accelerator(
        mixed_precision=run_config.mixed_precision,
        gradient_accumulation_steps=run_config.gradient_accumulation,
        cpu=default_device().type == "cpu",
    )
    set_seed(run_config.seed)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    settings = to_dict(config)
    task.model.to(device).train()
    optimizers = build_optimizers(task.model, optim_config)
    critic = task.critic
    critic_optimizers = [] if critic is None else build_optimizers(critic.model.to(device).train(), critic.optim)
    adversary = None if critic is None else (critic.model, critic_optimizers)
    ema = ExponentialMovingAverage(task.model, optim_config.ema_decay)
    # What must not change between a run and its continuation, or the two would be no one run.
    expected = _flat({**settings, "content": {**content, "length": len(dataset)}, "processes": world})
    expected = {key: value for key, value in expected.items() if key.removeprefix("run.") not in (*MAY_CHANGE, *PLACES)}
    checkpoints = list_checkpoints(run)
    done = load_checkpoint(checkpoints[-1], task.model, ema, optimizers, expected, adversary) if checkpoints else 0
    result = TrainResult(run, final, read_history(run), accelerator.is_main_process)
    if done == run_config.steps and final.exists():
        return result
    model, *prepared = accelerator.prepare(task.model, *optimizers)
    networks = [model]
    if critic is not None:
        critic_model, *critic_prepared = accelerator.prepare(critic.model, *critic_optimizers)
        networks.append(critic_model)
    if accelerator.is_main_process:
        write_text(run / "config.yaml", yaml.safe_dump(settings, sort_keys=False))

    per_step = run_config.gradient_accumulation
    batches = StepBatches(
        len(dataset),
        run_config.batch_size,
        run_config.seed,
        done * per_step,
        run_config.steps * per_step,
        rank,
        world,
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
    log = _Log(run, done, tensorboard=run_config.tensorboard) if accelerator.is_main_process else None
    bar = tqdm(
        total=run_config.steps,
        initial=done,
        desc=run.name,
        unit="step",
        disable=not (progress and accelerator.is_main_process),
        mininterval=0.5 if sys.stderr.isatty() else 20.0,
        file=sys.stderr,
    )

    def checkpoint(step: int) -> None:
        if accelerator.is_main_process:
            bare = accelerator.unwrap_model(model)
            save_checkpoint(run, step, bare, ema, optimizers, expected, run_config.keep_checkpoints, adversary)

    def stop_asked() -> bool:
        if world == 1:
            return interrupts.asked
        return bool(accelerator.reduce(torch.tensor(float(interrupts.asked), device=device), "sum") > 0)

    def descend(network: nn.Module, loss: Tensor, optimizers: list[Any], grad_clip: float) -> None:
        accelerator.backward(loss)
        if accelerator.sync_gradients and grad_clip:
            accelerator.clip_grad_norm_(network.parameters(), grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    seen, since = 0, time.perf_counter()
    interrupts = _Interrupts()
    try:
        for step in range(done, run_config.steps):
            rate = learning_rate(step, run_config.steps, optim_config)
            _set_rate(prepared, rate)
            opposed = critic is not None and step >= critic.start
            if critic is not None and opposed:  # its warm-up and cosine begin with it
                _set_rate(critic_prepared, learning_rate(step - critic.start, run_config.steps - critic.start, critic.optim))
            means: dict[str, Tensor] = {}  # of the terms over the micro-batches
            for micro in range(per_step):
                batch = next(loader)
                rng = StepRandom(run_config.seed, step, micro, rank, world, device)
                with accelerator.accumulate(*networks):
                    with accelerator.autocast():
                        terms = task.loss(model, batch, rng)
                    descend(model, terms["loss"], prepared, optim_config.grad_clip)
                    if critic is not None and opposed:
                        with accelerator.autocast():
                            critic_terms = critic.loss(critic_model, rng)
                        descend(critic_model, critic_terms["loss"], critic_prepared, critic.optim.grad_clip)
                        terms |= {f"critic_{name}": value for name, value in critic_terms.items()}
                for name, value in terms.items():
                    means[name] = means.get(name, torch.zeros((), device=device)) + value.detach() / per_step
                seen += run_config.batch_size * world
            if critic is not None and opposed:
                critic.end_step()
            ema.update(task.model, step)
            last = step + 1 == run_config.steps
            if (step + 1) % run_config.log_every == 0 or last:
                values = {name: float(accelerator.reduce(value, "mean")) for name, value in means.items()}
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
            if (step + 1) % run_config.sample_every == 0 and not last and log is not None:
                with _averaged(task.model, ema):
                    log.picture(step + 1, task.preview(StepRandom(run_config.seed, step, 0, 0, 1, device)))
            if stop_asked() and not last:
                checkpoint(step + 1)
                raise KeyboardInterrupt
        if done < run_config.steps:
            checkpoint(run_config.steps)
    finally:
        interrupts.close()
        bar.close()
        if log is not None:
            log.close()
    accelerator.wait_for_everyone()
    ema.copy_to(task.model)
    task.model.eval()
    if log is not None:
        log.picture(run_config.steps, task.preview(StepRandom(run_config.seed, run_config.steps, 0, 0, 1, device)))
        with complete_directory(final) as directory:
            task.finish(directory)
    accelerator.wait_for_everyone()
    return dataclasses.replace(result, history=read_history(run))


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


class _averaged:
    """Inside, the model holds the averaged weights and is in eval mode."""

    def __init__(self, model: nn.Module, ema: ExponentialMovingAverage) -> None:
        self.model, self.ema = model, ema

    def __enter__(self) -> None:
        self.kept = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.ema.copy_to(self.model)
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), self.kept, strict=True):
                parameter.copy_(value)
        self.model.train()


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
