"""Training on several processes and in other forms: the same run, whoever computes which part of it and how."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import training_process
from safetensors.torch import load_file

from textok_fast import DiT, InputError, TexTok
from textok_fast.cli import _parse
from textok_fast.config import (
    DiscriminatorConfig,
    DiTConfig,
    LossConfig,
    LowResolutionConfig,
    OptimConfig,
    RunConfig,
    TokenizerTrainConfig,
    to_dict,
)
from textok_fast.data.token_cache import TokenDataset
from textok_fast.training import parallel, tokenizer, train_tokenizer
from textok_fast.training.checkpoints import list_checkpoints
from textok_fast.training.loop import StepBatches, StepRandom
from textok_fast.training.optim import build_optimizers

TrainConfig = Callable[..., TokenizerTrainConfig]
CPU = torch.device("cpu")


def start(jobs: list[dict[str, Any]], world: int) -> list[subprocess.Popen[str]]:
    """Processes that nobody looks after, as of ``srun``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    path = os.pathsep.join(str(Path(__file__).parents[i]) for i in (2, 1, 0))
    processes = []
    for rank in range(world):
        given = {**common, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1, "PYTHONPATH": path}
        processes.append(
            subprocess.Popen(
                [sys.executable, training_process.__file__, json.dumps(jobs)],
                env={**os.environ, **{name: str(value) for name, value in given.items()}},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def finish(processes: list[subprocess.Popen[str]], seconds: float) -> list[str]:
    """What each wrote on stderr; a process that has not ended by then is a failure."""
    try:
        return [process.communicate(timeout=seconds)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()


def curve(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def assert_same(run: Path, wanted: Path, atol: float = 1e-5) -> None:
    """Loss curves, and every average of the weights."""
    assert curve(run) == pytest.approx(curve(wanted), rel=1e-5)
    names, found_names = (
        sorted(str(path.relative_to(of)) for path in of.glob("final*/**/model.safetensors")) for of in (wanted, run)
    )
    assert names and found_names == names
    for name in names:
        found, right = (load_file(path / name) for path in (run, wanted))
        assert found.keys() == right.keys()
        for key, value in right.items():
            if key.endswith(("qkv.bias", ".kv.bias")):  # a softmax does not see the keys' bias: its gradient is rounding, which
                continue  # Adam scales up to steps of full size
            torch.testing.assert_close(found[key], value, atol=atol, rtol=0, msg=f"{name}: {key}")


@pytest.fixture(scope="module", autouse=True)
def _small(fake_text_class: type) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        training_process.make_small(patched, fake_text_class)
        yield


@pytest.fixture(scope="module")
def settings(train_config: TrainConfig) -> Callable[..., dict[str, Any]]:
    """A run of 6 steps of 8 pictures, with two averages; "tokenizer" with a discriminator from step 1 on."""

    def make(directory: Path, **run: Any) -> dict[str, Any]:
        config = train_config(directory, {"steps": 6, "batch_size": 8, "checkpoint_every": 2, "sample_every": 3, **run})
        # Adam makes steps of the learning rate's size out of the rounding of a gradient that is almost zero.
        config.optim = OptimConfig(lr=2e-4, warmup_steps=2, ema_decay=0.9, ema_decays=(0.5,))
        config.loss = LossConfig(gan=0.5, gan_loss="non-saturating", gan_start=1, lecam=0.1, r1=1.0, r1_interval=2)
        config.discriminator = DiscriminatorConfig(channel_base=128, channel_max=8, stddev_group=4)
        return to_dict(config)

    return make


@pytest.fixture(scope="module")
def alone(settings: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs of one process, by kind."""
    runs = {kind: tmp_path_factory.mktemp("alone") / kind for kind in ("tokenizer", "denoiser")}
    for kind, run in runs.items():
        training_process.train(kind, settings(run))
    return runs


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_train_what_one_trains(
    settings: Callable[..., dict[str, Any]], alone: dict[str, Path], tmp_path: Path
) -> None:
    """Two processes: DDP and FSDP2, passes, recomputation, a critic, of the tokenizer StyleGAN's with a group on each process;
    a checkpoint of one process continued by two."""
    part = {"gradient_accumulation": 2, "activation_checkpointing": True}
    forms: dict[str, tuple[str, dict[str, Any]]] = {
        "ddp": ("tokenizer", {"parallel": "ddp"}),
        "fsdp": ("tokenizer", {"parallel": "fsdp"}),
        "ddp-parts": ("denoiser", {"parallel": "ddp", **part}),
        "fsdp-parts": ("denoiser", {"parallel": "fsdp", **part}),
    }
    jobs = [{"kind": kind, "config": settings(tmp_path / name, **run)} for name, (kind, run) in forms.items()]
    for kind, run in alone.items():
        begun = tmp_path / f"{kind}-begun"
        shutil.copytree(run, begun, ignore=shutil.ignore_patterns("final*", "checkpoint-000006"))
        jobs.append({"kind": kind, "config": settings(begun, parallel="fsdp"), "resume": True})
    errors = finish(processes := start(jobs, 2), 600)
    assert [process.returncode for process in processes] == [0, 0], errors
    for name, (kind, _) in forms.items():
        assert_same(tmp_path / name, alone[kind])
        kinds = [{path.name for path in list_checkpoints(run)[-1].iterdir()} for run in (tmp_path / name, alone[kind])]
        assert kinds[0] == kinds[1] > {"model.safetensors", "ema.safetensors", "ema-0.5.safetensors", "optimizer.pt"}
    for kind, run in alone.items():
        assert_same(tmp_path / f"{kind}-begun", run)
    for name, kind in (("ddp", "tokenizer"), ("fsdp", "tokenizer"), ("fsdp-parts", "denoiser")):
        found, wanted = (load_file(list_checkpoints(run)[-1] / "critic.safetensors") for run in (tmp_path / name, alone[kind]))
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, atol=1e-5, rtol=0, msg=f"{name}: the critic's {key}")
    assert int(wanted["steps"]) == 5
    assert (tmp_path / "fsdp" / "samples" / "000003.png").exists()
    assert TexTok.from_pretrained(tmp_path / "fsdp" / "final-ema-0.5").config.latent_std


@pytest.mark.slow
def test_processes_train_the_generator_that_one_trains(
    settings: Callable[..., dict[str, Any]], make_tokenizer: Callable[..., TexTok], tmp_path: Path
) -> None:
    """Each of two processes encodes its token shards. One's run continued by two, which lacks a shard, and two's by one.

    In bf16 the sum over two processes is rounded otherwise, but under DDP and FSDP2 alike.
    """
    of_tokenizer = make_tokenizer().save_pretrained(tmp_path / "tokenizer")

    def config(name: str, **run: Any) -> dict[str, Any]:
        shared = {key: value for key, value in settings(tmp_path / name, **run).items() if key in ("data", "optim", "run")}
        model = DiTConfig(num_tokens=3, in_channels=4, width=32, depth=2, heads=2, num_classes=0, text_dim=8)
        how = {"objective": "gaussian", "prediction": "v", "weighting": "min-snr", "cache_images": 40}
        small = to_dict(LowResolutionConfig(scale=4, patch_size=2))
        shared["optim"]["lr"] = 5e-3  # at first a DiT is zero: so in the steps here captions and small pictures count
        return {"tokenizer": str(of_tokenizer), "model": to_dict(model), "low_resolution": small, **how, **shared}

    half = {"mixed_precision": "bf16"}
    training_process.train("generator", config("one"))
    training_process.train("generator", config("one-half", **half))
    unfinished = shutil.ignore_patterns("final*", "checkpoint-000006")
    shutil.copytree(tmp_path / "one", tmp_path / "one-two", ignore=unfinished)
    (tmp_path / "one-two" / "tokens" / "tokens-00001.safetensors").unlink()
    jobs = [
        {"kind": "generator", "config": config("two")},
        {"kind": "generator", "config": config("one-two", parallel="fsdp", gradient_accumulation=2), "resume": True},
        {"kind": "generator", "config": config("two-half", **half)},
        {"kind": "generator", "config": config("two-half-fsdp", parallel="fsdp", **half)},
    ]
    errors = finish(processes := start(jobs, 2), 600)
    assert [process.returncode for process in processes] == [0, 0], errors
    shutil.copytree(tmp_path / "two", tmp_path / "two-one", ignore=unfinished)
    training_process.train("generator", config("two-one"), resume=True)
    wanted = TokenDataset(tmp_path / "one" / "tokens")
    for name in ("two", "one-two", "two-one"):
        assert_same(tmp_path / name, tmp_path / "one")
        tokens = TokenDataset(tmp_path / name / "tokens")
        assert len(list(tokens.directory.glob("*.safetensors"))) == 3
        assert (tokens.index, tokens.keys, tokens.captions) == (wanted.index, wanted.keys, wanted.captions)
        for found, right in zip(tokens, wanted, strict=True):  # type: ignore[call-overload]
            assert torch.equal(found["tokens"], right["tokens"])
    assert_same(tmp_path / "two-half-fsdp", tmp_path / "two-half")
    assert curve(tmp_path / "two-half") == pytest.approx(curve(tmp_path / "one-half"), rel=2e-3)
    assert curve(tmp_path / "one-half") != pytest.approx(curve(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
def test_of_a_killed_process_the_others_end_and_another_number_goes_on(
    settings: Callable[..., dict[str, Any]], alone: dict[str, Path], tmp_path: Path
) -> None:
    config = settings(tmp_path / "run", parallel="fsdp")
    first, killed = start([{"kind": "tokenizer", "config": config, "die_at": 4}], 2)
    killed.wait(timeout=600)
    (errors,) = finish([first], 60)  # without a launcher that would end it
    assert (killed.returncode, first.returncode) == (-signal.SIGKILL, 1), errors
    assert "another process of this run has ended" in errors and "--resume" in errors and "Traceback" not in errors
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-000002", "checkpoint-000004"]
    training_process.train("tokenizer", settings(tmp_path / "run"), resume=True)  # one process
    assert_same(tmp_path / "run", alone["tokenizer"])


def test_of_several_processes_one_that_lost_another_ends_with_its_error() -> None:
    """At once, so that nothing which aborts at the end of a process, as gloo may, takes the place of its status."""
    program = """
import atexit, os, sys
from textok_fast import cli

def gone(args):
    atexit.register(os.abort)
    print("so far", end="")
    raise ConnectionError("another process has ended")

cli.run_recipes = gone
sys.exit(cli.main(["recipes"]))
"""
    environment = {**os.environ, "WORLD_SIZE": "2", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "so far", "error: another process has ended\n")


def test_a_checkpoint_of_a_batch_a_process_is_continued(
    settings: Callable[..., dict[str, Any]], alone: dict[str, Path], tmp_path: Path
) -> None:
    """As they were written when run.batch_size was a process's: 2 processes x 2 passes x 2 pictures."""
    run = tmp_path / "run"
    shutil.copytree(alone["denoiser"], run, ignore=shutil.ignore_patterns("final*", "checkpoint-000006"))
    file = list_checkpoints(run)[-1] / "state.json"
    state = json.loads(file.read_text())
    old = {"run.batch_size": 2, "run.gradient_accumulation": 2, "processes": 2}
    file.write_text(json.dumps({key: value for key, value in {**state, **old}.items() if key != "loss.kl"}))
    with pytest.raises(InputError, match=r"run\.batch_size=8, this run has 4"):
        training_process.train("denoiser", settings(run, batch_size=4), resume=True)
    training_process.train("denoiser", settings(run), resume=True)
    assert_same(run, alone["denoiser"], atol=0)


@pytest.mark.parametrize(("world", "passes"), [(2, 1), (1, 2), (2, 2)])
def test_all_parts_of_a_step_are_its_batch(world: int, passes: int) -> None:
    parts = world * passes
    alone = list(StepBatches(21, 8, seed=1, start=1, stop=9, rank=0, world=1))  # of two steps an epoch, 5 pictures are left out
    ranks = [list(StepBatches(21, 8 // parts, 1, 1, 9, rank, world, passes)) for rank in range(world)]
    for step, wanted in enumerate(alone):
        order = [ranks[rank][step * passes + index] for index in range(passes) for rank in range(world)]
        assert list(chain(*order)) == wanted
    whole = StepRandom(1, 5, 0, 0, 1, CPU).normal(8, 3)
    assert torch.equal(torch.cat([StepRandom(1, 5, 0, part, parts, CPU).normal(8 // parts, 3) for part in range(parts)]), whole)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "world", "message"),
    [
        ({"batch_size": 12}, 5, r"12 does not divide over 5 processes.* start 1, 2, 3, 4, 6 or 12 processes, .*batch_size=15"),
        ({"batch_size": 12, "gradient_accumulation": 4}, 2, "start 1 or 3 processes"),
        ({"batch_size": 3, "gradient_accumulation": 2}, 1, r"gradient_accumulation to a divisor of 3, .*batch_size=4"),
        (
            {"mixed_precision": "fp8"},
            1,
            r"fp8 needs a GPU of compute capability 8\.9 or later, this run is on the cpu: use bf16",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(run: dict[str, Any], world: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parallel.check_run(RunConfig(**run), CPU, world)


def test_a_discriminators_groups_must_not_be_cut(train_config: TrainConfig, tmp_path: Path) -> None:
    config = train_config(tmp_path, {"batch_size": 8, "gradient_accumulation": 4})
    config.loss, config.discriminator = LossConfig(gan=0.1), DiscriminatorConfig(stddev_group=4)
    with pytest.raises(InputError, match=r"each of 1 processes passes 2 pictures at once.*stddev_group 4"):
        train_tokenizer(config, progress=False)


def test_fp8_names_the_gpu_that_lacks_it_and_the_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    run, gpu = RunConfig(mixed_precision="fp8"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(InputError, match=r"NVIDIA A100 has 8\.0: use bf16"):
        parallel.check_run(run, gpu, 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(InputError, match=r"pip install 'textok-fast\[fp8\]'"):
        parallel.check_run(run, gpu, 1)


def test_what_accelerate_was_told_beside_the_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel.check_run(RunConfig(), CPU, 1)
    with monkeypatch.context() as patched:
        patched.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(InputError, match=r"run\.parallel=fsdp"):
            parallel.check_run(RunConfig(), CPU, 1)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    parallel.check_run(RunConfig(mixed_precision="bf16"), CPU, 1)
    with pytest.raises(InputError, match="mixed precision bf16, the run says run.mixed_precision=no"):
        parallel.check_run(RunConfig(), CPU, 1)


@pytest.mark.parametrize("decays", [(0.9,), (0.5, 0.5), (1.5,)])
def test_averages_that_make_no_sense_are_refused(decays: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="ema_decays"):
        OptimConfig(ema_decay=0.9, ema_decays=decays)


# -- forms of one process ----------------------------------------------------------------------------------------------


def test_recomputed_blocks_train_the_same_bits(
    settings: Callable[..., dict[str, Any]], alone: dict[str, Path], tmp_path: Path
) -> None:
    training_process.train("denoiser", settings(tmp_path / "run", activation_checkpointing=True))
    assert_same(tmp_path / "run", alone["denoiser"], atol=0)


def test_blocks_are_compiled_and_what_is_saved_is_not(
    settings: Callable[..., dict[str, Any]], alone: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, real = [], torch.compile

    def compile_eagerly(function: Any) -> Any:  # inductor takes a minute
        compiled.append(function)
        return real(function, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    training_process.train("denoiser", settings(tmp_path / "run", compile=True, activation_checkpointing=True))
    assert len(compiled) == 2
    assert_same(tmp_path / "run", alone["denoiser"])


def test_every_average_has_a_directory(train_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "STATISTICS_PICTURES", 8)
    finals = {}
    for name, decays in (("first", (0.7, 0.9)), ("second", (0.9, 0.7))):
        config = train_config(tmp_path / name, {"steps": 30})
        config.optim.ema_decay, config.optim.ema_decays = decays[0], decays[1:]
        run = train_tokenizer(config, progress=False).run
        assert sorted(path.name for path in run.glob("final*")) == ["final", f"final-ema-{decays[1]}"]
        finals |= {(name, decays[0]): run / "final", (name, decays[1]): run / f"final-ema-{decays[1]}"}
    weights = {key: load_file(path / "model.safetensors")["encoder.latents"] for key, path in finals.items()}
    for decay in (0.7, 0.9):  # whichever is first
        assert torch.equal(weights["first", decay], weights["second", decay])
    assert not torch.equal(weights["first", 0.7], weights["first", 0.9])
    assert len(TexTok.from_pretrained(finals["first", 0.9]).config.latent_std) == 4


def test_the_twin_shares_the_frozen_text_encoder_and_nothing_else(make_tokenizer: Callable[..., TexTok]) -> None:
    tokenizer = make_tokenizer()
    other = parallel.twin(tokenizer)
    assert isinstance(other, TexTok) and other.text_encoder is tokenizer.text_encoder
    places = {tensor.data_ptr() for tensor in [*tokenizer.parameters(), *tokenizer.buffers()]}
    assert places.isdisjoint(tensor.data_ptr() for tensor in [*other.parameters(), *other.buffers()])


def test_other_errors_than_of_lost_processes_pass(tmp_path: Path) -> None:
    for world, text in ((2, "shapes differ"), (1, "Connection closed by peer")):
        with pytest.raises(RuntimeError, match=text), parallel.lost_processes(world, tmp_path):
            raise RuntimeError(text)
    with pytest.raises(ConnectionError, match="--resume"), parallel.lost_processes(2, tmp_path):
        raise torch.distributed.DistBackendError("whatever")


def run_where_torchao_is(test: str, directory: Path) -> None:
    """Runs a test of this file in a process that has torchao from beside the environment, where scripts/setup.sh puts it.

    Not in the environment: transformers imports a torchao that it finds, which warns on stderr, and other tests read that.
    """
    beside = Path(sys.prefix, "torchao")
    if not (beside / "torchao" / "__init__.py").exists():
        pytest.skip(f"torchao is neither installed nor in {beside}, where scripts/setup.sh puts it")
    path = os.pathsep.join(filter(None, (str(beside), os.environ.get("PYTHONPATH"))))
    options = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", f"--basetemp={directory}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"{__file__}::{test}"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_fp8_is_of_the_blocks_products_and_leaves_the_weights_names(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a CPU torchao computes the same roundings in float32 when asked to emulate."""
    if importlib.util.find_spec("torchao") is None:
        run_where_torchao_is(request.node.name, tmp_path / "there")
        return
    from torchao import float8

    config = float8.Float8LinearConfig
    monkeypatch.setattr(float8, "Float8LinearConfig", lambda **options: config(emulate=True, **options))
    torch.manual_seed(0)
    model = DiT(DiTConfig(width=32, depth=2, heads=2, num_tokens=3, in_channels=4, num_classes=4, learn_sigma=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    plain = parallel.twin(model)
    names = list(model.state_dict())
    network = parallel.place(model, RunConfig(mixed_precision="fp8"), CPU, 1)
    assert list(model.state_dict()) == names
    of_float8 = {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}
    assert of_float8 == {f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert {module.__class__.__name__ for module in plain.modules()}.isdisjoint({"Float8Linear"})
    x, t, y = torch.randn(8, 3, 4), torch.rand(8), torch.arange(8) % 4
    out, wanted = network.forward(x, t, y).detach(), plain(x, t, y).detach()
    error = float((out - wanted).norm() / wanted.norm())
    assert 1e-4 < error < 0.1
    optimizers = build_optimizers(model, OptimConfig(lr=1e-2))
    losses = []
    for _ in range(8):
        loss = (network.forward(x, t, y) - x).square().mean()
        losses.append(float(loss.detach()))
        network.descend(loss, optimizers, 1.0, 1, True)
    assert losses[-1] < 0.8 * losses[0]


# -- under Slurm -------------------------------------------------------------------------------------------------------

FAKES = {
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$@" > "$WORK/requeued"; fi',
    "srun": 'shift; exec "$@"',
    # It waits, or what it makes would have the time of the script's start: a file system's clock ticks every 10 ms or so.
    "torchrun": 'printf "%s\\n" "$@" > "$WORK/arguments"; sleep .1; [ -z "$MAKES" ] || mkdir -p "$WORK/$MAKES"; exit "$STATUS"',
}


@pytest.mark.parametrize(
    ("status", "makes", "again"),
    [(0, "run/final", False), (1, "run/checkpoint-000100", True), (1, "", False)],  # done; out of time; something is wrong
)
def test_the_slurm_script_starts_torchrun_and_goes_on_while_there_is_progress(
    tmp_path: Path, status: int, makes: str, again: bool
) -> None:
    script = Path(__file__).parents[2] / "scripts" / "train.slurm"
    for name, text in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "run" / "checkpoint-000050").mkdir(parents=True)
    past = script.stat().st_mtime - 10**6
    os.utime(tmp_path / "run" / "checkpoint-000050", (past, past))
    slurm = {"NNODES": 2, "GPUS_ON_NODE": 8, "CPUS_PER_TASK": 64, "JOB_ID": 71234, "JOB_NODELIST": "node[7-8]"}
    environment = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    environment |= {"WORK": str(tmp_path), "STATUS": str(status), "MAKES": makes, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    settings = ["train", "tokenizer", f"run.output_dir={tmp_path}/run", "run.parallel=fsdp"]
    done = subprocess.run(["bash", str(script), *settings], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if again else status), done.stderr
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments[arguments.index("--rdzv-endpoint") + 1] == f"node7:{20000 + 71234 % 20000}"
    assert arguments[arguments.index("-m") :] == ["-m", "textok_fast", *settings, "--resume"]
    assert callable(_parse(arguments[arguments.index("-m") + 2 :]).handler)
    assert (tmp_path / "requeued").exists() is again
    from torch.distributed.run import get_args_parser

    known = get_args_parser().parse_args(arguments)
    assert (known.nnodes, known.nproc_per_node, known.rdzv_backend) == ("2", "8", "c10d")


def test_the_launchers_lines_of_the_documentation_are_understood() -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    lines = [
        shlex.split(line, comments=True) for line in text.splitlines() if line.startswith(("torchrun ", "accelerate launch "))
    ]
    assert len(lines) >= 5
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    for line in lines:
        parser = get_args_parser() if line[0] == "torchrun" else launch_command_parser()
        parser.parse_args(line[1:] if line[0] == "torchrun" else line[2:])
        assert callable(_parse(line[line.index("textok_fast") + 1 :]).handler), line
