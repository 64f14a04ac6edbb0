"""Where the time of a step goes: a torch profiler trace, and a table of the operations or kernels that take most of it."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from textok_fast.config import GENERATOR_SIZES, TOKENIZER_SIZES, TexTokConfig
from textok_fast.errors import InputError
from textok_fast.evaluation.provenance import provenance
from textok_fast.evaluation.roofline import DTYPES, time_call, use_threads
from textok_fast.evaluation.step_times import StepTimesConfig, build_networks, step_inputs
from textok_fast.files import write_atomically, write_text
from textok_fast.inference.engine import Engine
from textok_fast.inference.plan import Plan
from textok_fast.modeling import TexTok
from textok_fast.ops.device import resolve_device
from textok_fast.ops.dispatch import use_backend

PARTS = ("step", "encode", "decode")
FORMS = ("reference", "compile", "engine")
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "fp8")
TEXT_LENGTH = 128  # tokens of a caption: the published ones have 120 to 220 words


@dataclass
class ProfileConfig:
    """What to profile: ``part`` a DiT's denoising step, or a tokenizer's encode or decode, with random weights.

    ``form``: "reference" PyTorch, "compile" (torch.compile max-autotune of it), or our "engine". ``size``: of the DiT;
    ``tokens`` transformer tokens, 1,024 and 4,096 being 2-D patches. ``tokenizer_size``, ``image_size`` in pixels: of the
    tokenizer, whose patches are 1/32 of the picture's side in the sizes but "tiny". ``steps`` are recorded after ``warmup``.
    ``out``: a directory for trace.json (chrome://tracing, perfetto) and profile.md. ``top``: rows of the table.
    """

    part: str = "step"
    form: str = "engine"
    size: str = "XL"
    tokens: int = 32
    tokenizer_size: str = "base"
    image_size: int = 256
    batch: int = 1
    precision: str = "fp32"
    threads: int | None = None
    steps: int = 3
    warmup: int = 2
    top: int = 15
    device: str = "auto"
    out: str = "profile"
    seed: int = 0

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str, ...]] = {
            "part": PARTS,
            "form": FORMS,
            "size": tuple(GENERATOR_SIZES),
            "tokenizer_size": tuple(TOKENIZER_SIZES),
            "precision": PRECISIONS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("tokens", "image_size", "batch", "steps", "warmup", "top"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.form != "engine" and self.precision not in DTYPES:
            raise InputError(f"{self.precision} is of the engine; form {self.form!r} takes {', '.join(DTYPES)}")
        if self.form == "engine" and self.precision == "fp16":
            raise InputError("the engine has no fp16: use bf16, or another form")


@dataclass(frozen=True)
class ProfileRow:
    """An operation on a CPU, or a kernel on a GPU. ``milliseconds`` are its own, a step; ``share`` is of all rows' sum."""

    name: str
    milliseconds: float
    share: float
    calls: float  # a step


@dataclass
class ProfileResult:
    """``rows``: all operations, longest first. ``seconds``: median of a step without the profiler."""

    config: ProfileConfig
    rows: list[ProfileRow]
    seconds: float
    recorded_seconds: float  # sum of the rows' own time, a step
    trace: str
    table: str
    device: str
    threads: int
    machine: dict[str, Any]
    command: str
    date: str  # ISO 8601, UTC

    def to_dict(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)} | {
            "config": dataclasses.asdict(self.config),
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    def to_markdown(self) -> str:
        """The longest rows as a table."""
        config, shown = self.config, self.rows[: self.config.top]
        what = f"DiT-{config.size} over {config.tokens} tokens, one step"
        if config.part != "step":
            what = f"TexTok-{config.tokenizer_size} at {config.image_size} px over {config.tokens} tokens, {config.part}"
        where = self.machine["cpu"] if self.device == "cpu" else self.machine["gpus"][0]["name"]
        threads = f" with {self.threads} thread{'s' * (self.threads > 1)}" if self.device == "cpu" else ""
        kind = "operation" if self.device == "cpu" else "kernel"
        left = self.rows[config.top :]
        lines = [
            f"# {what}: {config.form}, {config.precision}, batch {config.batch}",
            "",
            f"{self.date}, {where}{threads}; commit {self.machine['git_commit'] or 'unknown'}. Without the profiler "
            f"{1e3 * self.seconds:.4g} ms a step (median); the table's times are with it, {1e3 * self.recorded_seconds:.4g} ms "
            "a step in all.",
            "",
            f"`{self.command}`",
            "",
            f"| {kind} | ms a step | share | calls a step |",
            "| --- | ---: | ---: | ---: |",
            *(f"| {_cell(row.name)} | {row.milliseconds:.4g} | {row.share:.1%} | {row.calls:.4g} |" for row in shown),
        ]
        if left:
            rest = sum(row.milliseconds for row in left), sum(row.share for row in left), sum(row.calls for row in left)
            lines.append(f"| {len(left)} others | {rest[0]:.4g} | {rest[1]:.1%} | {rest[2]:.4g} |")
        return "\n".join([*lines, "", f"Trace: {self.trace}", ""])


def run_profile(config: ProfileConfig, command: str | None = None) -> ProfileResult:
    """Profiles ``config.steps`` steps and writes trace.json and profile.md into ``config.out``.

    Raises InputError for a plan this machine cannot run.
    """
    device = resolve_device(config.device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    backend: AbstractContextManager[Any] = nullcontext() if config.form == "engine" else use_backend("reference")
    out = Path(config.out)
    with use_threads(config.threads) as threads, torch.inference_mode(), backend:
        step = _build_step(config, device)
        for _ in range(config.warmup):
            step()
        seconds = statistics.median(time_call(step, device)[0] for _ in range(config.steps))
        with torch_profile(activities=activities, acc_events=True) as profiler:
            for _ in range(config.steps):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "trace.json", lambda target: profiler.export_chrome_trace(str(target)))
    rows = _rows(profiler, device, config.steps)
    result = ProfileResult(
        config=config,
        rows=rows,
        seconds=seconds,
        recorded_seconds=sum(row.milliseconds for row in rows) / 1e3,
        trace=str(out / "trace.json"),
        table=str(out / "profile.md"),
        device=str(device),
        threads=threads,
        **provenance(command),
    )
    write_text(out / "profile.md", result.to_markdown())
    return result


def _rows(profiler: torch_profile, device: torch.device, steps: int) -> list[ProfileRow]:
    """On a GPU its kernels and copies; on a CPU the operations' own time, without that of what they call."""
    on_cuda = device.type == "cuda"
    wanted = DeviceType.CUDA if on_cuda else DeviceType.CPU
    found: list[tuple[str, float, int]] = []
    for event in profiler.key_averages():
        if event.device_type == wanted and not getattr(event, "is_user_annotation", False):
            own = event.self_device_time_total if on_cuda else event.self_cpu_time_total  # microseconds
            found.append((event.key, own / 1e3 / steps, event.count))
    total = sum(milliseconds for _, milliseconds, _ in found) or 1.0
    found.sort(key=lambda entry: entry[1], reverse=True)
    return [ProfileRow(name, own, own / total, count / steps) for name, own, count in found if own > 0]


def _build_step(config: ProfileConfig, device: torch.device) -> Callable[[], Any]:
    """What is profiled, as a call without arguments."""
    plan: Plan | None = None
    if config.form == "engine":
        plan = Plan.automatic(device, precision=config.precision, batch=config.batch)  # type: ignore[arg-type]
    dtype = torch.float32 if plan is not None else DTYPES[config.precision]
    if config.part == "step":
        networks = StepTimesConfig(size=config.size, tokens=(config.tokens,), seed=config.seed)
        network = build_networks(networks, device, dtype)[config.tokens]
        torch.manual_seed(config.seed)
        inputs = step_inputs(network.config, config.batch, device, dtype)
        model: Any = network.model
        if plan is not None:
            return _engine_step(model, plan, config, inputs)
        return _call(model if config.form == "reference" else _compiled(model), *inputs)
    torch.manual_seed(config.seed)
    tokenizer = (
        TexTok(TexTokConfig.named(config.tokenizer_size, image_size=config.image_size, num_tokens=config.tokens))
        .eval()
        .requires_grad_(False)
    )
    settings = tokenizer.config
    text = torch.randn(config.batch, TEXT_LENGTH, settings.text_dim)
    mask = torch.ones(config.batch, TEXT_LENGTH, dtype=torch.bool)
    captions = (text.to(device), mask.to(device))
    pictures = torch.randint(0, 256, (config.batch, config.image_size, config.image_size, 3), dtype=torch.uint8)
    tokens = torch.randn(config.batch, settings.num_tokens, settings.latent_dim, device=device)
    runner: Any = Engine(tokenizer.to(device), plan) if plan is not None else tokenizer.to(device, dtype)
    if config.form == "compile":
        runner.encoder, runner.decoder = (_compiled(part) for part in (runner.encoder, runner.decoder))
    if config.part == "encode":
        return lambda: runner.encode(pictures, captions)
    return lambda: runner.decode(tokens, captions, output="uint8")


def _call(function: Callable[..., Tensor], *arguments: Any) -> Callable[[], Tensor]:
    return lambda: function(*arguments)


def _compiled(model: nn.Module) -> Any:
    return torch.compile(model, mode="max-autotune", dynamic=False)


def _engine_step(model: Any, plan: Plan, config: ProfileConfig, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Any]:
    """Evaluations of the engine's own loop, modulation ahead and the sampler's update included, over and over."""
    from textok_fast.diffusion import build_process

    # As the operations that it is made of, or a CPU's whole block would be one row of the table.
    plan = dataclasses.replace(plan, ops={"packed_block": "reference"} | plan.ops)
    engine = Engine(model, plan)
    process = build_process("gaussian", model.config.learn_sigma, "epsilon")
    run: Any = None

    def step() -> None:
        nonlocal run
        if run is None or run.finished:
            run = engine.start(process, labels=inputs[2], seeds=list(range(config.batch)), sampler="ddpm", steps=250)
        run.advance()

    return step


def _cell(text: str) -> str:
    """A name that fits a table: kernels' names can be hundreds of characters long."""
    text = text.replace("|", "\\|")
    return f"`{text if len(text) <= 100 else text[:97] + '...'}`"
