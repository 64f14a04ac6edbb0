from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file

from textok_fast import InputError, TexTok
from textok_fast.config import (
    DataConfig,
    DiTConfig,
    GeneratorTrainConfig,
    LossConfig,
    OptimConfig,
    TokenizerTrainConfig,
    to_dict,
)
from textok_fast.data import Example, load_dataset, write_shards
from textok_fast.data.token_cache import TokenDataset, drawn_rows, write_token_shards
from textok_fast.diffusion import GaussianDiffusion
from textok_fast.inference import ClassToImagePipeline, TextToImagePipeline, load_pipeline
from textok_fast.inference.pipelines import SamplingOptions
from textok_fast.modeling.bottlenecks import BottleneckOutput
from textok_fast.modeling.encoding import encode_function, token_identity
from textok_fast.modeling.tokenizer import TexTokOutput
from textok_fast.pictures import image_grid
from textok_fast.training import train_generator, train_tokenizer
from textok_fast.training.checkpoints import list_checkpoints
from textok_fast.training.generator import PREVIEW_SAMPLES, PREVIEW_STEPS, GeneratorTask
from textok_fast.training.loop import StepBatches, StepRandom, seeded_generator
from textok_fast.training.losses import gradient_loss, tokenizer_loss
from textok_fast.training.optim import ExponentialMovingAverage, build_optimizers, learning_rate
from textok_fast.training.tokenizer import TokenizerTask

TrainConfig = Callable[..., TokenizerTrainConfig]
LONG = {"steps": 120, "checkpoint_every": 7, "log_every": 1}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def log_without_speed(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_s"} for line in lines]


def assert_same_run(run: Path, other: Path) -> None:
    a, b = weights(run / "final"), weights(other / "final")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert json.loads((run / "final/config.json").read_text()) == json.loads((other / "final/config.json").read_text())
    assert log_without_speed(run) == log_without_speed(other)


# -- a run from beginning to end ---------------------------------------------------------------------------------------


def test_the_loss_falls_on_a_fixed_small_set(train_config: TrainConfig, loads_fake_text: Any, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(12):
        color = np.array([20 * i, 255 - 20 * i, 40 * (i % 6)], dtype=np.uint8)
        Image.fromarray(np.broadcast_to(color, (16, 16, 3)).copy()).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"colour {i}")
    run = {"steps": 40, "batch_size": 4, "sample_every": 20}
    config = train_config(tmp_path / "run", run, {"source": "folder", "path": str(folder)}, text="both")
    result = train_tokenizer(config, progress=False)
    losses = [line["loss"] for line in result.history]
    assert len(losses) == 40
    assert np.mean(losses[-8:]) < 0.5 * np.mean(losses[:4])
    tokenizer = TexTok.from_pretrained(result.final)
    assert len(tokenizer.config.latent_std) == 4
    assert yaml.safe_load((result.run / "config.yaml").read_text()) == to_dict(config)
    sheet = Image.open(result.run / "samples" / "000020.png")
    assert (result.run / "samples" / "000040.png").exists()
    assert sheet.size[0] >= 8 * 16
    assert [path.name for path in list_checkpoints(result.run)] == ["checkpoint-000039", "checkpoint-000040"]


@pytest.mark.parametrize("bottleneck", ["kl", "vq", "fsq"])
def test_every_bottleneck_trains_accumulates_and_measures_its_statistics(
    train_config: TrainConfig, tmp_path: Path, bottleneck: str
) -> None:
    run = {"steps": 3, "gradient_accumulation": 2}
    result = train_tokenizer(train_config(tmp_path, run, bottleneck=bottleneck), progress=False)
    terms = {"kl": {"kl"}, "vq": {"codebook", "commitment"}, "fsq": set()}[bottleneck]
    assert set(result.history[-1]) == {"step", "loss", "l2", "lr", "images_per_s", *terms}
    tokenizer = TexTok.from_pretrained(result.final)
    data = train_config(tmp_path).data
    dataset = load_dataset(data, "train")
    rows = drawn_rows(len(dataset), 1024, data.seed)
    assert rows[-1] > 1024  # of all pictures, not the first ones: those of a sorted folder may be of one class
    images = torch.from_numpy(np.stack([dataset[row].image for row in rows]))
    tokens = tokenizer.encode(images).mode().flatten(0, 1)
    moving = torch.tensor(tokenizer.config.latent_std) != 1
    torch.testing.assert_close(tokens.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(tokens.std(0, correction=0)[moving], torch.ones(int(moving.sum())), atol=1e-3, rtol=0)


def test_bf16_and_tensorboard(train_config: TrainConfig, tmp_path: Path) -> None:
    run = {"steps": 2, "mixed_precision": "bf16", "tensorboard": True}
    result = train_tokenizer(train_config(tmp_path, run, bottleneck="fsq"), progress=False)
    assert all(value.dtype == torch.float32 for value in weights(result.final).values())
    assert math.isfinite(result.history[-1]["loss"])
    assert list((tmp_path / "tensorboard").glob("events.*"))


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(train_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    train_tokenizer(train_config(run, LONG, bottleneck="kl"), progress=False)
    return run


def start(config: TokenizerTrainConfig, directory: Path, processes: int = 1) -> subprocess.Popen[str]:
    file = directory / "settings.yaml"
    file.write_text(yaml.safe_dump(to_dict(config)))
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launch, "-m", "textok_fast", "train", "tokenizer", "--config", str(file), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def interrupt_at_step(patched: pytest.MonkeyPatch, at: int, number: signal.Signals) -> None:
    """A signal to this process after the weights of step ``at`` changed and before their average did."""
    update = ExponentialMovingAverage.update

    def interrupted(self: ExponentialMovingAverage, model: torch.nn.Module, step: int) -> None:
        if step == at:
            os.kill(os.getpid(), number)
        update(self, model, step)

    patched.setattr(ExponentialMovingAverage, "update", interrupted)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        if time.monotonic() > deadline:
            process.terminate()  # torchrun passes it on
            raise AssertionError(process.communicate()[1])
        time.sleep(0.002)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_continues_bit_for_bit(
    train_config: TrainConfig, tmp_path: Path, uninterrupted: Path, stop: signal.Signals
) -> None:
    run = tmp_path / "run"
    config = train_config(run, LONG, bottleneck="kl")
    process = start(config, tmp_path)
    wait_for(lambda: any(path.name >= "checkpoint-000014" for path in list_checkpoints(run)), process)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert not (run / "final").exists()
    assert "Traceback" not in errors
    if stop != signal.SIGKILL:
        logged = log_without_speed(run)[-1]["step"]
        assert process.returncode == 130
        assert "--resume" in errors
        assert list_checkpoints(run)[-1].name == f"checkpoint-{logged:06d}"  # nothing finished is lost
    else:
        assert process.returncode == -signal.SIGKILL
    with pytest.raises(InputError, match="already holds a run; add --resume"):
        train_tokenizer(config, progress=False)
    result = train_tokenizer(config, resume=True, progress=False)
    assert_same_run(result.run, uninterrupted)


def test_an_interrupt_at_any_point_of_a_step_saves_a_whole_step(
    train_config: TrainConfig, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C right after the weights changed and before their average did."""
    config = train_config(tmp_path / "run", LONG, bottleneck="kl")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patched:
        interrupt_at_step(patched, 4, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            train_tokenizer(config, progress=False)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-000005"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert_same_run(train_tokenizer(config, resume=True, progress=False).run, uninterrupted)


@pytest.fixture(scope="module")
def finished(train_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    train_tokenizer(train_config(run, {"steps": 4, "checkpoint_every": 2}), progress=False)
    return run


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_second_run_in_the_same_directory_is_refused(train_config: TrainConfig, copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    with pytest.raises(InputError, match="already holds a run; add --resume"):
        train_tokenizer(train_config(copy, {"steps": 4, "checkpoint_every": 2}), progress=False)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


@pytest.mark.parametrize(
    "change",
    [
        {"run": {"steps": 9, "checkpoint_every": 2}},
        {"run": {"steps": 4, "batch_size": 5}},
        {"run": {"steps": 4, "seed": 1}},
        {"run": {"steps": 4}, "num_tokens": 5},
        {"run": {"steps": 4}, "data": {"seed": 3}},
        {"run": {"steps": 4, "mixed_precision": "bf16"}},
        {"run": {"steps": 4, "batch_size": 2, "gradient_accumulation": 2}},
    ],
)
def test_other_settings_are_refused_when_resuming(train_config: TrainConfig, copy: Path, change: dict[str, Any]) -> None:
    kept = (copy / "config.yaml").read_text()
    with pytest.raises(InputError, match="resume with the same settings"):
        train_tokenizer(train_config(copy, **change), resume=True, progress=False)
    assert (copy / "config.yaml").read_text() == kept


def test_what_only_shows_and_keeps_may_change_when_resuming(train_config: TrainConfig, copy: Path, finished: Path) -> None:
    shutil.rmtree(copy / "final")
    shutil.rmtree(list_checkpoints(copy)[-1])
    run = {"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 1, "sample_every": 1, "log_every": 1, "workers": 1}
    assert_same_run(train_tokenizer(train_config(copy, run), resume=True, progress=False).run, finished)
    assert len(list_checkpoints(copy)) == 1


def test_other_pictures_under_the_same_settings_are_refused_when_resuming(train_config: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(8):
        Image.fromarray(np.full((16, 16, 3), 30 * i, dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"gray {i}")
    config = train_config(tmp_path / "run", {"steps": 2}, {"source": "folder", "path": str(folder)})
    train_tokenizer(config, progress=False)
    for file in folder.glob("*.txt"):
        file.write_text(f"{file.read_text()}, really")
    with pytest.raises(InputError, match=r"content\.content.*resume with the same settings"):
        train_tokenizer(config, resume=True, progress=False)


def test_two_trainers_do_not_share_a_directory(train_config: TrainConfig, copy: Path) -> None:
    config = train_config(copy, {"steps": 4, "checkpoint_every": 2})
    with FileLock(copy / ".lock"), pytest.raises(InputError, match="is being trained by another process"):
        train_tokenizer(config, resume=True, progress=False)
    train_tokenizer(config, resume=True, progress=False)


def test_a_finished_run_is_left_as_it_is(train_config: TrainConfig, copy: Path) -> None:
    config = train_config(copy, {"steps": 4, "checkpoint_every": 2})
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.name != ".lock"}
    result = train_tokenizer(config, resume=True, progress=False)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.name != ".lock"} == before
    assert result.history[-1]["step"] == 4


def test_muon_continues_bit_for_bit(train_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [train_config(tmp_path / name, {"gradient_accumulation": 2}) for name in ("whole", "stopped")]
    for config in configs:
        config.optim.name = "muon"
    whole = train_tokenizer(configs[0], progress=False).run
    with monkeypatch.context() as patched:
        interrupt_at_step(patched, 4, signal.SIGTERM)  # as a job scheduler stops a run
        with pytest.raises(KeyboardInterrupt):
            train_tokenizer(configs[1], progress=False)
    assert list_checkpoints(tmp_path / "stopped")[-1].name == "checkpoint-000005"
    assert_same_run(train_tokenizer(configs[1], resume=True, progress=False).run, whole)


def test_the_logged_loss_is_the_mean_over_the_micro_batches(train_config: TrainConfig, tmp_path: Path) -> None:
    whole = train_tokenizer(train_config(tmp_path / "a", {"steps": 3, "batch_size": 8}), progress=False)
    halves = train_tokenizer(
        train_config(tmp_path / "b", {"steps": 3, "batch_size": 8, "gradient_accumulation": 2}), progress=False
    )
    losses = [[line["loss"] for line in result.history] for result in (whole, halves)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_clip_of_zero_clips_nothing(train_config: TrainConfig, tmp_path: Path) -> None:
    runs = []
    for clip in (0.0, 1e9):
        config = train_config(tmp_path / str(clip), {"steps": 2})
        config.optim.grad_clip = clip
        runs.append(weights(train_tokenizer(config, progress=False).final))
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


def test_resuming_a_finished_run_writes_the_same_again(train_config: TrainConfig, copy: Path, finished: Path) -> None:
    config = train_config(copy, {"steps": 4, "checkpoint_every": 2})
    shutil.rmtree(copy / "final")
    train_tokenizer(config, resume=True, progress=False)
    train_tokenizer(config, resume=True, progress=False)  # the caller's configuration is as it was
    assert_same_run(copy, finished)


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "ema.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("damage", ["empty", "cut", "gone"])
def test_a_corrupt_checkpoint_is_named_and_the_one_before_can_be_used(
    train_config: TrainConfig, copy: Path, finished: Path, name: str, damage: str
) -> None:
    newest = list_checkpoints(copy)[-1]
    file = newest / name
    content = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(b"" if damage == "empty" else content[: len(content) // 2])
    config = train_config(copy, {"steps": 4, "checkpoint_every": 2})
    with pytest.raises(InputError, match=f"cannot read the checkpoint .*{newest.name}.*remove it"):
        train_tokenizer(config, resume=True, progress=False)
    if name == "state.json":
        shutil.rmtree(newest)
        shutil.rmtree(copy / "final")
        assert_same_run(train_tokenizer(config, resume=True, progress=False).run, finished)


def test_a_half_written_checkpoint_is_no_checkpoint(train_config: TrainConfig, copy: Path, finished: Path) -> None:
    for path in list_checkpoints(copy)[-1:]:
        path.rename(copy / f".{path.name}.tmp")
    shutil.rmtree(copy / "final")
    with (copy / "log.jsonl").open("a") as log:
        log.write('{"step": 99, "lo')
    config = train_config(copy, {"steps": 4, "checkpoint_every": 2})
    assert_same_run(train_tokenizer(config, resume=True, progress=False).run, finished)


def test_a_loss_that_is_no_longer_finite_stops_the_run(train_config: TrainConfig, tmp_path: Path) -> None:
    config = train_config(tmp_path)
    config.optim.lr = 1e30
    with pytest.raises(InputError, match=r"no longer finite.*lower optim\.lr"):
        train_tokenizer(config, progress=False)


def test_a_missing_extra_is_named(train_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(InputError, match=r"pip install 'textok-fast\[train\]'"):
        train_tokenizer(train_config(tmp_path), progress=False)


# -- several processes, see also test_parallel.py ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
def test_an_interrupt_of_one_process_stops_all_with_one_checkpoint(train_config: TrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = train_config(run, {"steps": 5000, "checkpoint_every": 5})
    process = start(config, tmp_path, processes=2)
    wait_for(lambda: bool(list_checkpoints(run)), process)
    children = [child for file in Path(f"/proc/{process.pid}/task").glob("*/children") for child in file.read_text().split()]
    (second,) = [child for child in children if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes()]
    os.kill(int(second), signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "exitcode  : 130" in errors and "exitcode  : -9" not in errors
    assert list_checkpoints(run)[-1].name == f"checkpoint-{log_without_speed(run)[-1]['step']:06d}"


# -- formulas ----------------------------------------------------------------------------------------------------------


def test_learning_rate() -> None:
    config = OptimConfig(lr=2.0, warmup_steps=4, final_lr=0.1)
    rates = [learning_rate(step, 15, config) for step in range(15)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[-1] == pytest.approx(0.2)
    assert rates[9] == pytest.approx((2.0 + 0.2) / 2)  # half way down the cosine
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_moving_average() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    ema = ExponentialMovingAverage(model, decay=0.5)
    average = model.weight.detach().double().clone()
    for step in range(12):
        with torch.no_grad():
            model.weight.normal_()
        ema.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * model.weight.detach().double()
    torch.testing.assert_close(ema.state_dict()["weight"].double(), average, atol=1e-6, rtol=1e-6)
    ema.copy_to(model)
    assert torch.equal(model.weight, ema.averages[0])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_decay_and_muon_takes_those_of_the_blocks(make_tokenizer: Callable[..., TexTok], name: Any) -> None:
    model = make_tokenizer(bottleneck="vq")
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    optimizers = build_optimizers(model, OptimConfig(name=name))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0, 0.01][: len(groups)]
    listed = [[names[id(parameter)] for parameter in group["params"]] for group in groups]
    assert sorted(chain(*listed)) == sorted(names.values())
    matrices = {f"{key}.weight" for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(listed[1]) == set(names.values()) - matrices
    assert {"bottleneck.codebook", "encoder.latents", "decoder.queries", "encoder.norm.weight", "encoder.text.null"} <= set(
        listed[1]
    )
    in_blocks = {key for key in matrices if ".blocks." in key}
    assert len(in_blocks) == 2 * 2 * 4
    if name == "muon":
        assert isinstance(optimizers[1], torch.optim.Muon)
        assert set(listed[2]) == in_blocks
    else:
        assert len(optimizers) == 1


def test_loss_terms() -> None:
    target, output = torch.rand(2, 3, 16, 16) * 2 - 1, torch.rand(2, 3, 16, 16)
    terms = {"codebook": torch.tensor(2.0), "commitment": torch.tensor(3.0)}
    given = TexTokOutput(output, BottleneckOutput(torch.zeros(1), terms))
    found = tokenizer_loss(given, target, LossConfig(l2=2.0, gradient=0.5, codebook=0.1, commitment=0.01))
    a, b = output.double().numpy(), target.double().numpy()
    gradient = 0.0
    for _ in range(3):
        for axis in (-1, -2):
            gradient += np.abs(np.diff(a, axis=axis) - np.diff(b, axis=axis)).mean() / 6
        a, b = (x.reshape(2, 3, x.shape[2] // 2, 2, x.shape[3] // 2, 2).mean(axis=(3, 5)) for x in (a, b))
    l2 = ((output.double() - target.double()) ** 2).mean().item()
    assert found["gradient"].item() == pytest.approx(gradient, rel=1e-5)
    assert found["l2"].item() == pytest.approx(l2, rel=1e-5)
    assert found["loss"].item() == pytest.approx(2 * l2 + 0.5 * gradient + 0.2 + 0.03, rel=1e-5)
    assert gradient_loss(target, target).item() == 0
    assert "gradient" not in tokenizer_loss(given, target, LossConfig())


# -- batches and random numbers ----------------------------------------------------------------------------------------


def test_batches_cover_an_epoch_once_and_differ_between_epochs() -> None:
    batches = list(StepBatches(20, 4, seed=3, start=0, stop=10, rank=0, world=1))
    first, second = list(chain(*batches[:5])), list(chain(*batches[5:]))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert first != list(chain(*StepBatches(20, 4, seed=4, start=0, stop=5, rank=0, world=1)))


def test_batches_start_anywhere() -> None:
    everything = list(StepBatches(11, 3, seed=3, start=0, stop=12, rank=0, world=1))
    sampler = StepBatches(11, 3, seed=3, start=7, stop=12, rank=0, world=1)
    assert list(sampler) == everything[7:]
    assert len(sampler) == 5


@pytest.mark.parametrize("world", [2, 4])
def test_the_slices_of_all_ranks_are_the_global_batch(world: int) -> None:
    alone = list(StepBatches(40, 8, seed=1, start=0, stop=9, rank=0, world=1))
    ranks = [list(StepBatches(40, 8 // world, seed=1, start=0, stop=9, rank=r, world=world)) for r in range(world)]
    assert [list(chain(*(ranks[r][step] for r in range(world)))) for step in range(9)] == alone
    cpu = torch.device("cpu")
    whole = StepRandom(1, 5, 0, 0, 1, cpu)
    parts = [StepRandom(1, 5, 0, r, world, cpu) for r in range(world)]
    assert torch.equal(torch.cat([part.normal(8 // world, 3) for part in parts]), whole.normal(8, 3))
    assert torch.equal(torch.cat([part.uniform(8 // world) for part in parts]), whole.uniform(8))
    assert torch.equal(torch.cat([part.integers(1000, 8 // world) for part in parts]), whole.integers(1000, 8))


def test_every_seed_step_and_micro_step_has_its_own_numbers() -> None:
    seeds = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1), (1, 0), (0, 0), (0, 2)]
    drawn = {float(torch.rand((), generator=seeded_generator(*seed), dtype=torch.float64)) for seed in seeds}
    assert len(drawn) == len(seeds)
    assert torch.equal(torch.rand(3, generator=seeded_generator(4, 2)), torch.rand(3, generator=seeded_generator(4, 2)))


def test_a_data_set_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(InputError, match=r"3 pictures.*batch of 8.*run\.batch_size"):
        StepBatches(3, 4, seed=0, start=0, stop=1, rank=0, world=2)


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_caption_dropout_gives_the_null_caption(
    train_config: TrainConfig, loads_fake_text: Any, tmp_path: Path, dropout: float
) -> None:
    config = train_config(tmp_path, text="both")
    config.caption_dropout = dropout
    task = TokenizerTask(config)
    batch = {
        "images": torch.randint(0, 256, (64, 16, 16, 3), dtype=torch.uint8),
        "captions": ["red cow" if i % 2 else "green" for i in range(64)],
    }
    seen: list[Any] = []

    def model(pixels: torch.Tensor, text: Any, noise: torch.Tensor) -> Any:
        seen.append(text)
        return task.model(pixels, text, noise)

    loss = task.loss(model, batch, StepRandom(0, 0, 0, 0, 1, torch.device("cpu")))["loss"]  # type: ignore[arg-type]
    null = ~seen[0].mask.any(dim=1)
    share = float(null.float().mean())
    assert share == dropout if dropout in (0, 1) else 0.25 < share < 0.75
    wanted = ["" if gone else caption for caption, gone in zip(batch["captions"], null.tolist(), strict=True)]
    pixels = batch["images"].permute(0, 3, 1, 2).float() / 127.5 - 1  # type: ignore[attr-defined]
    reconstruction = task.model(pixels, task.text(wanted, torch.device("cpu"))).reconstruction
    assert loss.item() == pytest.approx((reconstruction - pixels).square().mean().item(), rel=1e-5)


# -- the generator -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_directory(make_tokenizer: Callable[..., TexTok], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer().save_pretrained(tmp_path_factory.mktemp("tokenizer"))


def generator_config(tokenizer: Path, train: TokenizerTrainConfig, **model: Any) -> GeneratorTrainConfig:
    sizes = {"num_tokens": 3, "in_channels": 4, "width": 32, "depth": 2, "heads": 2, "condition_dropout": 0.25}
    objective, prediction = model.pop("objective"), model.pop("prediction", "epsilon")
    return GeneratorTrainConfig(
        tokenizer=str(tokenizer),
        model=DiTConfig(**{**sizes, **model}),
        data=train.data,
        optim=train.optim,
        run=train.run,
        objective=objective,
        prediction=prediction,
        cache_images=40,
    )


def test_a_class_conditional_generator(
    train_config: TrainConfig, tokenizer_directory: Path, loads_fake_text: Any, tmp_path: Path
) -> None:
    config = generator_config(tokenizer_directory, train_config(tmp_path), objective="gaussian", num_classes=8)
    reported: list[tuple[int, int]] = []
    result = train_generator(config, progress=False, on_cache=lambda done, total: reported.append((done, total)))
    assert reported[-1] == (40, 40)
    assert set(result.history[-1]) >= {"loss", "mse", "vb"}
    pipeline = load_pipeline(result.final)
    assert isinstance(pipeline, ClassToImagePipeline)
    dataset = load_dataset(config.data, "train")
    assert pipeline.label_names == dataset.label_names
    # The decoder's captions are of the class, and training has not seen their compositions.
    held_out = load_dataset(config.data, "composition").captions_by_label(16)
    assert pipeline.captions == held_out
    seen = {dataset.caption(dataset.scene(i)) for i in range(200)}  # type: ignore[attr-defined]
    assert not seen & {caption for captions in pipeline.captions.values() for caption in captions}


def test_a_text_conditional_flow(
    train_config: TrainConfig, tokenizer_directory: Path, loads_fake_text: Any, tmp_path: Path
) -> None:
    options = {"objective": "flow", "num_classes": 0, "text_dim": 8, "learn_sigma": False, "time_scale": 1000.0}
    config = generator_config(tokenizer_directory, train_config(tmp_path, {"steps": 30}), **options)
    result = train_generator(config, progress=False)
    losses = [line["loss"] for line in result.history]
    assert np.mean(losses[-10:]) < np.mean(losses[:5])
    pipeline = load_pipeline(result.final)
    assert isinstance(pipeline, TextToImagePipeline)
    assert pipeline.objective == "flow"
    assert pipeline.generator.config == config.model
    # The last sheet of samples is what the pipeline makes of the same captions and seeds.
    captions = [load_dataset(config.data, "composition")[i].caption for i in range(PREVIEW_SAMPLES)]
    made = pipeline(captions, seed=0, options=SamplingOptions("euler", PREVIEW_STEPS))
    sheet = np.asarray(Image.open(result.run / "samples" / "000030.png"))
    assert np.array_equal(sheet, np.asarray(image_grid(made.images, columns=4, captions=captions)))


def test_samples_of_a_generator_under_way_leave_the_training_as_it_is(
    train_config: TrainConfig, tokenizer_directory: Path, loads_fake_text: Any, tmp_path: Path
) -> None:
    runs = {}
    for name, every in (("without", 1000), ("with", 2)):
        train = train_config(tmp_path / name, {"steps": 5, "sample_every": every})
        options = {"objective": "gaussian", "num_classes": 8, "learn_sigma": False}
        config = generator_config(tokenizer_directory, train, prediction="v", **options)
        runs[name] = train_generator(config, progress=False)
    names = [path.name for path in sorted((runs["with"].run / "samples").iterdir())]
    assert names == ["000002.png", "000004.png", "000005.png"]
    with_samples, without = (weights(runs[name].final / "generator") for name in ("with", "without"))
    assert all(torch.equal(with_samples[key], without[key]) for key in without)
    pipeline = load_pipeline(runs["with"].final)
    assert isinstance(pipeline.process, GaussianDiffusion) and pipeline.process.prediction == "v"


def test_a_part_of_the_pictures_is_drawn_by_the_datas_seed(
    train_config: TrainConfig, tokenizer_directory: Path, loads_fake_text: Any, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(60):
        color = np.full((16, 16, 3), i, dtype=np.uint8)
        Image.fromarray(color).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"gray {i}")
    (folder / "silent.png").write_bytes(b"")
    (folder / "silent.txt").write_text("no picture")

    def keys(name: str, cache_images: int, seed: int) -> list[str]:
        data = {"source": "folder", "path": str(folder), "seed": seed}
        train = train_config(tmp_path / name, {"steps": 1}, data)
        config = generator_config(tokenizer_directory, train, objective="gaussian", num_classes=1)
        config.cache_images = cache_images
        train_generator(config, progress=False)
        return TokenDataset(tmp_path / name / "tokens").keys

    some, others, every = keys("some", 20, 0), keys("others", 20, 1), keys("all", 0, 0)
    train = [
        example.key
        for example in load_dataset(train_config(tmp_path, data={"source": "folder", "path": str(folder)}).data, "train")
    ]
    assert every == train
    assert len(some) == len(set(some)) == 20
    assert set(some) <= set(train) and set(some) != set(others)
    assert max(some) > train[30]  # not the first ones
    told = capsys.readouterr().err
    assert "skipped: 1 corrupt image" in told
    assert "20 of them, drawn by data.seed=0" in told


@pytest.mark.parametrize("text", ["both", "decoder"])
@pytest.mark.parametrize("cache_captions", [0, 1])
def test_a_generator_learns_from_all_captions(
    train_config: TrainConfig,
    make_tokenizer: Callable[..., TexTok],
    loads_fake_text: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    cache_captions: int,
) -> None:
    """Each with its tokens, drawn anew in every epoch, and alike when the run is repeated."""
    (tmp_path / "pictures").mkdir()
    for i in range(9):
        color = np.full((16, 16, 3), 20 * i, dtype=np.uint8)
        Image.fromarray(color).save(tmp_path / "pictures" / f"{i}.png")
        (tmp_path / "pictures" / f"{i}.txt").write_text(f"gray {i}\nlevel {i}")
    tokenizer = make_tokenizer(text=text)
    directory = tokenizer.save_pretrained(tmp_path / "tokenizer")
    batches: list[tuple[list[str], list[str], torch.Tensor]] = []
    usual = GeneratorTask.loss

    def loss(self: GeneratorTask, model: Any, batch: dict[str, Any], rng: StepRandom) -> dict[str, torch.Tensor]:
        batches.append((batch["keys"], batch["captions"], batch["tokens"].clone()))
        return usual(self, model, batch, rng)

    monkeypatch.setattr(GeneratorTask, "loss", loss)
    seen = []
    for name in ("run", "again"):
        batches.clear()
        data = {"source": "folder", "path": str(tmp_path / "pictures")}
        train = train_config(tmp_path / name, {"steps": 8, "batch_size": 4}, data)
        config = generator_config(directory, train, objective="gaussian", num_classes=0, text_dim=8)
        config.cache_captions, config.cache_images = cache_captions, 0
        train_generator(config, progress=False)
        seen.append([(key, caption) for keys, captions, _ in batches for key, caption in zip(keys, captions, strict=True)])
    assert seen[0] == seen[1] and len(seen[0]) == 32
    words = {caption.split()[0] for _, caption in seen[0]}
    assert words == ({"gray"} if cache_captions else {"gray", "level"})
    for keys, captions, tokens in batches:
        for key, caption, found in zip(keys, captions, tokens, strict=True):
            assert caption.split()[1] == key
            picture = torch.full((1, 16, 16, 3), 20 * int(key), dtype=torch.uint8)
            wanted = tokenizer.encode(picture, [caption]).as_subclass(torch.Tensor)[0]
            torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


def test_the_label_is_dropped_to_the_null_class(
    train_config: TrainConfig, tokenizer_directory: Path, loads_fake_text: Any, tmp_path: Path
) -> None:
    config = generator_config(tokenizer_directory, train_config(tmp_path), objective="gaussian", num_classes=8)
    task = GeneratorTask(config, TexTok.from_pretrained(tokenizer_directory))
    seen: list[torch.Tensor] = []

    def model(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, text: Any) -> torch.Tensor:
        seen.append(labels)
        return task.model(x, t, labels, text)

    batch = {"tokens": torch.randn(400, 3, 4), "labels": torch.arange(400) % 8}
    task.loss(model, batch, StepRandom(0, 0, 0, 0, 1, torch.device("cpu")))  # type: ignore[arg-type]
    dropped = seen[0] == 8
    assert 0.15 < float(dropped.float().mean()) < 0.35
    assert torch.equal(seen[0][~dropped], batch["labels"][~dropped])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "flow", "num_classes": 8}, r"model\.learn_sigma=false"),
        ({"objective": "gaussian", "num_classes": 8, "num_tokens": 4}, r"model\.num_tokens=3"),
        ({"objective": "gaussian", "num_classes": 8, "in_channels": 5}, r"model\.in_channels=4"),
        ({"objective": "gaussian", "num_classes": 0, "text_dim": 9}, r"model\.text_dim=8"),
        ({"objective": "gaussian", "num_classes": 3}, r"model\.num_classes=8"),
    ],
)
def test_generators_that_do_not_fit_are_refused(
    train_config: TrainConfig, tokenizer_directory: Path, loads_fake_text: Any, tmp_path: Path, options: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train_generator(generator_config(tokenizer_directory, train_config(tmp_path), **options), progress=False)


@pytest.fixture
def labelled(tmp_path: Path) -> Callable[[str, str], Path]:
    """Sixteen pictures at ``name``, of the classes that the letters of ``labels`` are, in turn."""

    def write(name: str, labels: str) -> Path:
        pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
        kinds = sorted(set(labels))
        numbers = [kinds.index(labels[k % len(labels)]) for k in range(16)]
        examples = [Example(pixels[k], f"{name} {kinds[numbers[k]]}", numbers[k], f"{k:02d}") for k in range(16)]
        write_shards(examples, tmp_path / name, label_names=kinds)
        return tmp_path / name

    return write


def test_classes_are_told_by_captions_that_are_held_out_elsewhere(
    train_config: TrainConfig,
    tokenizer_directory: Path,
    loads_fake_text: Any,
    labelled: Callable[[str, str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train = train_config(tmp_path / "run", {"steps": 6, "batch_size": 8})
    config = generator_config(tokenizer_directory, train, objective="gaussian", num_classes=2)
    files: dict[str, Any] = {"source": "webdataset", "image_size": 16, "path": str(labelled("seen", "abb"))}
    config.cache_images = 0
    for settings, message in (
        ({"validation_share": 0.0}, r"nothing of .*seen is held out \(data\.validation_share=0\)"),
        (
            {"validation_path": str(labelled("fewer", "b"))},
            r"fewer have 1 labels, the training pictures 2; .*only one of the two has a",
        ),
    ):
        config.data = DataConfig(**files, **settings)
        with pytest.raises(InputError, match=message):
            train_generator(config, progress=False)
        assert not (tmp_path / "run" / "tokens").exists()  # before any work
    config.data = DataConfig(**files, validation_path=str(labelled("unseen", "ab")))
    result = train_generator(config, progress=False)
    assert len(TokenDataset(result.run / "tokens")) == 16
    assert "6 steps of 8: 3 epochs of 16 pictures" in capsys.readouterr().err
    pipeline = load_pipeline(result.final)
    assert isinstance(pipeline, ClassToImagePipeline)
    assert (pipeline.label_names, pipeline.captions) == (["a", "b"], {0: ["unseen a"], 1: ["unseen b"]})


def test_a_generator_without_its_tokenizer_is_told_the_setting(train_config: TrainConfig, tmp_path: Path) -> None:
    config = generator_config(tmp_path / "runs" / "final", train_config(tmp_path), objective="gaussian")
    with pytest.raises(
        InputError, match=r"no model at .*runs/final.*the setting tokenizer= names: what `train tokenizer` wrote"
    ):
        train_generator(config, progress=False)


# -- the token cache ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bottleneck", ["none", "vq"])
def test_the_token_cache_goes_on_where_it_stopped(
    train_config: TrainConfig, make_tokenizer: Callable[..., TexTok], tmp_path: Path, bottleneck: str
) -> None:
    config, tokenizer = train_config(tmp_path), make_tokenizer(bottleneck=bottleneck)
    dataset = load_dataset(config.data, "train")
    identity = token_identity(tokenizer, to_dict(config.data))
    encode, encoded = encode_function(tokenizer), 0

    def write(directory: Path, fail_after: int = 10**6) -> int:
        nonlocal encoded
        encoded = 0

        def counted(images: torch.Tensor, captions: list[str]) -> dict[str, torch.Tensor]:
            nonlocal encoded
            if encoded + len(images) > fail_after:
                raise KeyboardInterrupt
            encoded += len(images)
            return encode(images, captions)

        sizes = {"count": 21, "batch_size": 4, "shard_size": 8}
        return write_token_shards(directory, dataset, counted, identity=identity, **sizes)  # type: ignore[arg-type]

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cache", fail_after=13)
    assert [path.name for path in sorted((tmp_path / "cache").glob("*"))] == ["index.json", "tokens-00000.safetensors"]
    (tmp_path / "cache" / "tokens-00001.safetensors").write_bytes(b"torn")  # as another program might leave it
    assert write(tmp_path / "cache") == 1
    assert encoded == 13
    write(tmp_path / "whole")
    resumed, whole = TokenDataset(tmp_path / "cache"), TokenDataset(tmp_path / "whole")
    assert len(resumed) == 21
    for found, wanted in zip(resumed, whole, strict=True):
        assert torch.equal(found["tokens"], wanted["tokens"]) and found["label"] == wanted["label"]
    assert (resumed.keys, resumed.captions) == (whole.keys, whole.captions)
    example = dataset[20]
    assert (resumed[20]["caption"], resumed[20]["key"], int(resumed[20]["label"])) == example[1:2] + example[3:4] + example[2:3]
    torch.testing.assert_close(
        resumed[20]["tokens"], tokenizer.encode(example.image[None], [example.caption]).mode()[0], atol=2e-6, rtol=1e-5
    )
    assert ("indices" in resumed[0]) is (bottleneck == "vq")
    assert write(tmp_path / "cache") == 3
    assert encoded == 0


def test_tokens_of_another_tokenizer_or_other_data_are_refused(
    train_config: TrainConfig, make_tokenizer: Callable[..., TexTok], tmp_path: Path
) -> None:
    config, tokenizer = train_config(tmp_path), make_tokenizer()
    dataset = load_dataset(config.data, "train")

    def write(tokenizer: TexTok, **data: Any) -> None:
        identity = token_identity(tokenizer, {**to_dict(config.data), **data})
        write_token_shards(tmp_path / "cache", dataset, encode_function(tokenizer), identity=identity, count=4)

    write(tokenizer)
    with pytest.raises(InputError, match="tokenizer differ"):
        write(make_tokenizer(seed=1))
    with pytest.raises(InputError, match="data differ"):
        write(tokenizer, seed=5)
    options = {**to_dict(config.data)["huggingface"], "validation_split": "test"}
    write(tokenizer, validation_share=0.0, validation_path="elsewhere", huggingface=options)  # the hash of the pictures tells
    tokenizer.set_latent_statistics(torch.ones(4), torch.ones(4))
    with pytest.raises(InputError, match="tokenizer_config differ"):
        write(tokenizer)
