from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from textok_fast import DiT, DiTConfig, InputError, TexTok, __version__, info
from textok_fast._native import NativeStatus
from textok_fast.cli import COMPILE_MODES, PRECISIONS, _parse, _plan, _trained, build_parser, main
from textok_fast.config import TokenizerTrainConfig, to_dict
from textok_fast.diffusion import SAMPLERS
from textok_fast.inference import Plan, StepCache
from textok_fast.inference import plan as plans
from textok_fast.inference.execution import why_not_compiled
from textok_fast.training.loop import TrainResult

Make = Callable[..., TexTok]


class Result:
    """What a command left: its exit code and both streams."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def call(*arguments: object) -> Result:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def assert_one_line(result: Result, *parts: str) -> None:
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err
    for part in parts:
        assert part in result.err


def commands(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every parser with the words that lead to it, those that only lead on included."""
    yield path, parser
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for group in groups:
        for name, child in group.choices.items():
            yield from commands(child, (*path, name))


@pytest.fixture
def model(make_tokenizer: Make, tmp_path: Path) -> Path:
    return make_tokenizer(text="none").save_pretrained(tmp_path / "model")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (80 * i, 10, 200)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"caption {i}")
    return folder


# -- help and arguments -------------------------------------------------------------------------------------------------------

ALL = [path for path, _ in commands(build_parser())]


def test_all_commands_are_there() -> None:
    names = {"demo", "data", "train", "recipes", "encode", "decode", "sample", "convert", "evaluate", "export", "bench", "info"}
    assert {path[0] for path in ALL if path} == names
    assert {("train", "tokenizer"), ("train", "generator"), ("data", "fetch"), ("data", "pack")} <= set(ALL)
    assert {path[1] for path in ALL if len(path) > 1 and path[0] == "bench"} == {
        "speedup", "draw", "steps", "peers", "profile", "parity", "weights", "deploy", "training",
    }  # fmt: skip


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_shows_an_example_that_parses(run: Callable[..., Result], path: tuple[str, ...]) -> None:
    import shlex

    result = run(*path, "--help")
    assert result.code == 0
    assert "example:" in result.out
    example = result.out.split("example:")[1].strip().splitlines()[0]
    program, *arguments = shlex.split(example)
    assert program == "textok-fast"
    assert tuple(arguments[: len(path)]) == path
    assert callable(build_parser().parse_args(arguments).handler)


def test_settings_may_stand_behind_options() -> None:
    args = _parse(["train", "tokenizer", "a=1", "--resume", "b=2", "--json", "c=3"])
    assert (args.overrides, args.resume, args.json) == (["a=1", "b=2", "c=3"], True, True)
    assert _parse(["train", "tokenizer", "--resume", "a=1"]).overrides == ["a=1"]


def test_with_json_everything_else_goes_to_stderr(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("textok_fast.info.collect", lambda: print("a note of some library") or {"a": 1})
    monkeypatch.setattr("textok_fast.info.describe", str)
    result = run("info", "--json")
    assert json.loads(result.out) == {"a": 1}
    assert "a note of some library" in result.err


def test_of_several_processes_one_tells_the_result(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    accelerate = pytest.importorskip("accelerate")
    told = {}
    for is_main in (True, False):
        monkeypatch.setattr(accelerate, "PartialState", lambda is_main=is_main: types.SimpleNamespace(is_main_process=is_main))
        told[is_main] = (_trained(TrainResult(Path("run"), Path("run/final"), []), "wrote run/final"), capsys.readouterr().out)
    assert told == {True: ({"run": "run", "final": "run/final", "last": None}, "wrote run/final\n"), False: (None, "")}


def test_choices_are_those_of_the_library(run: Callable[..., Result]) -> None:
    """The parser knows them without importing torch."""
    assert set(PRECISIONS) == {*get_args(plans.Precision), "auto"}
    assert get_args(plans.Compile) == COMPILE_MODES
    text = run("sample", "--help").out
    assert all(name in text for name in SAMPLERS)


def test_options_override_a_plans_file(tmp_path: Path) -> None:
    def plan(*options: object, command: str = "sample") -> Plan:
        given = {"sample": [], "decode": ["--tokens", "t"]}[command]
        return _plan(_parse([command, "--model", "m", "--out", "o", *given, *map(str, options)]), 1)

    fp32 = Plan.automatic(precision="fp32", batch=1)
    assert plan() == plan(command="decode") == fp32
    assert plan("--device", "cpu", "--precision", "auto") == Plan.automatic("cpu")
    assert plan("--split", "--compile") == dataclasses.replace(fp32, split=True, compile="default")
    saved = Plan("bf16", compile="max-autotune", modulation="inside", step_cache=StepCache(3), split=True)
    file = saved.save(tmp_path / "plan.json")
    assert plan("--plan", file) == plan("--plan", file, command="decode") == saved
    assert plan("--plan", file, "--compile", "none") == dataclasses.replace(saved, compile="none")
    assert plan("--plan", file, "--precision", "int8", "--device", "cpu") == dataclasses.replace(saved, precision="int8")
    assert plan("--plan", file, "--precision", "auto").precision == Plan.automatic("cpu").precision
    for options, message in ((("--plan", tmp_path / "none"), "no plan at"), (("--device", "tpu"), "tpu")):
        with pytest.raises(InputError, match=message):
            plan(*options)


def test_version(run: Callable[..., Result]) -> None:
    assert __version__ in run("--version").out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nope"],
        ["train"],
        ["encode"],
        ["bench", "speedup", "--size", "huge"],
        ["bench", "steps", "--size", "huge"],
        ["info", "a=1"],
        ["train", "tokenizer", "a=1", "--nope", "b=2"],
    ],
)
def test_wrong_arguments_end_with_2_and_the_usage(run: Callable[..., Result], arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert "usage: textok-fast" in result.err


# -- mistakes -----------------------------------------------------------------------------------------------------------------


def test_no_such_file(run: Callable[..., Result], model: Path, pictures: Path, tmp_path: Path) -> None:
    none = tmp_path / "none"
    assert_one_line(run("encode", "--model", model, "--images", none, "--out", tmp_path / "t"), str(none))
    assert_one_line(run("encode", "--model", none, "--images", pictures, "--out", tmp_path / "t"), str(none))
    assert_one_line(run("encode", "--model", model, "--images", none / "x.tar", "--out", tmp_path / "t"), "x.tar")
    assert_one_line(run("decode", "--model", model, "--tokens", none, "--out", tmp_path / "t"), str(none))
    assert_one_line(run("sample", "--model", none, "--prompt", "a", "--out", tmp_path / "t"), str(none))
    assert_one_line(run("train", "tokenizer", "--config", none), str(none))
    assert_one_line(run("train", "generator", f"tokenizer={none}", f"run.output_dir={tmp_path / 'r'}"), str(none))
    assert_one_line(run("data", "preview", "source=folder", f"path={none}"), str(none))
    assert_one_line(run("data", "preview", "source=folder"), "path")


def test_not_an_image(run: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "a.png").write_text("not an image")
    (folder / "a.txt").write_text("caption")
    assert_one_line(run("encode", "--model", model, "--images", folder, "--out", tmp_path / "t"), str(folder))
    picture = folder / "a.png"
    assert_one_line(run("encode", "--model", model, "--images", picture, "--out", tmp_path / "t"), str(picture))


def test_a_wrong_checkpoint_directory(run: Callable[..., Result], pictures: Path, model: Path, tmp_path: Path) -> None:
    dit = DiT(DiTConfig(num_tokens=3, in_channels=4, width=32, depth=1, heads=2)).save_pretrained(tmp_path / "dit")
    out = tmp_path / "t"
    assert_one_line(run("encode", "--model", pictures, "--images", pictures, "--out", out), "config.json", str(pictures))
    assert_one_line(run("encode", "--model", dit, "--images", pictures, "--out", out), "textok-dit")
    assert_one_line(run("sample", "--model", model, "--prompt", "a", "--out", out), "pipeline.json")
    (model / "model.safetensors").write_bytes(b"")
    assert_one_line(run("encode", "--model", model, "--images", pictures, "--out", out), "model.safetensors")


def test_an_empty_caption_file(
    run: Callable[..., Result], model: Path, make_tokenizer: Make, pictures: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n  \n")
    assert_one_line(run("sample", "--model", model, "--prompts", prompts, "--out", tmp_path / "t"), str(prompts), "no captions")
    prompts.write_bytes(b"\xff\xfe\x00")
    assert_one_line(run("sample", "--model", model, "--prompts", prompts, "--out", tmp_path / "t"), str(prompts))
    reader = make_tokenizer().save_pretrained(tmp_path / "reader")  # of captions; `model` needs none
    for name in ("captions.jsonl", "captions.csv"):
        (pictures / name).write_text("")
        assert_one_line(run("encode", "--model", reader, "--images", pictures, "--out", tmp_path / "t"), "pictures")
        (pictures / name).unlink()


def test_settings_that_cannot_be(run: Callable[..., Result], tmp_path: Path) -> None:
    out = f"run.output_dir={tmp_path / 'r'}"
    assert_one_line(run("train", "tokenizer", out, "model.image_size=66", "data.image_size=66"), "66", "patch_size")
    assert_one_line(run("train", "tokenizer", out, "optim.learning_rate=1"), "optim.learning_rate")
    assert_one_line(run("train", "generator", out, "modl.size=S"), "modl")
    assert_one_line(run("train", "tokenizer", out, "--recipe", "none"), "none", "demo")
    assert_one_line(run("train", "tokenizer", out, "run.batch_size=0"), "batch_size")
    assert_one_line(run("data", "preview", "source=shapes", "colour=1"), "colour")
    assert_one_line(run("data", "preview", "source=shapes", "--split", "x", "--out", tmp_path / "s.png"), "'x'")
    assert_one_line(run("data", "preview", "source=shapes", "image_size=0", "--out", tmp_path / "s.png"), "image_size")
    assert not (tmp_path / "r").exists()


def test_an_impossible_device(run: Callable[..., Result], model: Path, pictures: Path, tmp_path: Path) -> None:
    arguments = ("encode", "--model", model, "--images", pictures, "--out", tmp_path / "t", "--device")
    assert_one_line(run(*arguments, "tpu"), "tpu")
    if not torch.cuda.is_available():
        assert_one_line(run(*arguments, "cuda"), "no GPU")


def test_a_place_that_cannot_be_written(run: Callable[..., Result], model: Path, pictures: Path, tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("mine")
    assert_one_line(run("encode", "--model", model, "--images", pictures, "--out", taken), str(taken))
    assert_one_line(run("bench", "steps", "--size", "tiny", "--tokens", 4, "--out", tmp_path), str(tmp_path))
    assert_one_line(run("bench", "speedup", "--size", "tiny", "--out", taken), str(taken))
    for study in ("peers", "parity", "profile"):
        assert_one_line(run("bench", study, "--out", taken, "device=cpu"), str(taken))
    assert taken.read_text() == "mine"


def test_mistakes_of_benchmarks(run: Callable[..., Result], tmp_path: Path) -> None:
    assert_one_line(run("bench", "speedup", "--systems", "DiT/9", "--out", tmp_path / "s"), "DiT/9", "TexTok-32")
    assert_one_line(run("bench", "draw", tmp_path / "none.json"), "none.json")
    assert_one_line(run("bench", "peers", "token=[32]"), "token")
    assert_one_line(run("bench", "parity", "size=huge"), "huge")
    assert not (tmp_path / "s").exists()


def test_bench_studies_write_what_they_found(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    @dataclasses.dataclass
    class Config:
        size: str = "XL"
        out: str = ""

    def measure(config: Config, command: str | None = None) -> types.SimpleNamespace:
        return types.SimpleNamespace(to_dict=lambda: {"size": config.size, "out": config.out}, to_markdown=lambda: "a table")

    fake = types.SimpleNamespace(ProfileConfig=Config, run_profile=measure)
    monkeypatch.setitem(sys.modules, "textok_fast.evaluation.profile", fake)
    out = tmp_path / "a place"
    result = run("bench", "profile", "--out", out, "size=S", "--json")
    assert json.loads(result.out) == {"size": "S", "out": str(out)}
    assert json.loads((out / "profile.json").read_text()) == {"size": "S", "out": str(out)}
    assert (out / "profile.md").read_text() == "a table"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device", "/somewhere/file"), OSError(errno.ENOSPC, "x")]
)
def test_a_full_disk(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def full() -> None:
        raise error

    monkeypatch.setattr("textok_fast.info.collect", full)
    assert_one_line(run("info", "--json"), "the disk is full", error.filename or "", "free some space")


LIMITED = """
import json, resource, sys
from textok_fast.cli import main
import textok_fast.training.loop, textok_fast.inference.folders
for limit, arguments in json.loads(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    print(main(arguments), file=sys.stderr)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of a file as Linux does")
def test_files_that_cannot_be_written_to_their_end(
    run: Callable[..., Result],
    train_config: Callable[..., TokenizerTrainConfig],
    model: Path,
    pictures: Path,
    tmp_path: Path,
) -> None:
    """Token shards and checkpoints, by safetensors and by torch: one line, and what was finished before stays."""
    pytest.importorskip("accelerate")
    (pictures / "2.txt").write_text("word " * 2000)  # the second shard's header alone is over the limit
    encode = ["encode", "--model", model, "--images", pictures, "--out", tmp_path / "tokens", "--shard-size", 2, "--json"]
    settings, directory = tmp_path / "settings.yaml", tmp_path / "run"
    settings.write_text(yaml.safe_dump(to_dict(train_config(directory))))
    train = ["train", "tokenizer", "--config", settings, "--json"]
    size = (model / "model.safetensors").stat().st_size
    calls = [(6000, encode), (size // 2, train), (size * 3 // 2, train)]
    arguments = json.dumps([(limit, [str(part) for part in command]) for limit, command in calls])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [line for line in done.stderr.splitlines() if line in ("0", "2")] == ["2", "2", "2"]
    for error, name in zip(errors, ("tokens-00001.safetensors", "model.safetensors", "optimizer.pt"), strict=True):
        assert error.endswith(f"{name}: {os.strerror(errno.EFBIG)}")
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == [
        "index.json", "plan.json", "tokens-00000.safetensors",
    ]  # fmt: skip
    assert not list(directory.glob("*checkpoint*"))
    assert json.loads(run(*encode).out)["shards_reused"] == 1


def test_a_full_disk_while_training_keeps_the_checkpoints(
    run: Callable[..., Result],
    train_config: Callable[..., TokenizerTrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import textok_fast.training.checkpoints as checkpoints

    directory, settings = tmp_path / "run", tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump(to_dict(train_config(directory))))
    save, calls = torch.save, 0

    def full(*arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*arguments, **options)

    monkeypatch.setattr(checkpoints.torch, "save", full)
    result = run("train", "tokenizer", "--config", settings, "--json")
    assert result.code == 2
    assert "the disk is full" in result.err.splitlines()[-1]
    assert "Traceback" not in result.err
    assert [path.name for path in checkpoints.list_checkpoints(directory)] == ["checkpoint-000003"]
    assert not list(directory.glob(".checkpoint*"))
    assert run("train", "tokenizer", "--config", settings, "--resume", "--json").code == 0


def test_ctrl_c(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("textok_fast.info.collect", interrupted)
    result = run("info")
    assert result.code == 130
    assert "what was written so far is kept" in result.err
    assert "Traceback" not in result.err


def test_a_message_of_several_lines_is_one_line(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> None:
        raise InputError("first\n   second")

    monkeypatch.setattr("textok_fast.info.collect", wrong)
    assert_one_line(run("info"), "error: first second")


def test_a_bug_keeps_its_traceback(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("textok_fast.info.collect", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("info")


# -- the commands at work ---------------------------------------------------------------------------------------------


def test_info(run: Callable[..., Result]) -> None:
    found = json.loads(run("info", "--json").out)
    assert found["textok_fast"] == __version__
    # The metadata of PyPI's CUDA build leave the local part (+cu130) out.
    assert found["libraries"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"machine", "native", "extras", "cache"} <= set(found)
    assert f"textok-fast {__version__}" in run("info").out


def test_info_tells_what_the_engine_would_do(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    found = json.loads(run("info", "--json").out)["engine"]
    plan = Plan.automatic()
    assert Plan.from_dict(found["plan"]) == plan
    assert {"fp32", "bf16", "fp8"} <= set(found["products"])
    assert found["compile"] == why_not_compiled(plan.device)
    monkeypatch.setattr("shutil.which", lambda name: None)
    text = run("info").out
    assert plan.describe().splitlines()[0] in text
    for line in (f"products in bf16: {found['products']['bf16']}", "torch.compile: no: torch.compile needs a compiler"):
        assert line in text
    if not torch.cuda.is_available():
        assert "CUDA graphs: no: a CUDA graph runs on a CUDA device" in text
        assert "ahead-of-time packages: no: " in text


def test_info_names_the_instructions_of_native_products(monkeypatch: pytest.MonkeyPatch) -> None:
    choose: Callable[..., str] = lambda name, weight, kind, rows: "onednn" if rows > 128 and kind < 2 else "native"  # noqa: E731
    monkeypatch.setattr("textok_fast.ops.dispatch.choose", choose)
    native = NativeStatus(True, "", {"kernels": "avx512", "products": "vnni"})
    assert info._cpu_products(native) == {
        "fp32": "native (avx512) for 64 rows, oneDNN for 1,056",
        "bf16": "native (avx512) for 64 rows, oneDNN for 1,056",
        "int8": "native (avx512 with vnni)",
        "fp8": "PyTorch, emulated and slow",
    }
    assert info._cpu_products(NativeStatus(True, "", {"kernels": "avx2", "products": "none"}))["int8"] == "native (avx2)"


@pytest.mark.parametrize(("capability", "fp8"), [((9, 0), "scaled_mm"), ((8, 0), "none, it needs compute capability 8.9")])
def test_info_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], fp8: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("textok_fast.ops.choices.choices", lambda device: {"fp8_linear": {"bfloat16": "scaled_mm"}})
    assert info._gpu_products(torch.device("cuda"))["fp8"] == fp8


def test_data(run: Callable[..., Result], tmp_path: Path) -> None:
    shapes = ("source=shapes", "objects=8", "held_out_objects=4", "image_size=16")
    sheet = run("data", "preview", "--out", tmp_path / "new" / "sheet.png", "--count", 4, "--json", *shapes)
    assert json.loads(sheet.out)["out"] == str(tmp_path / "new" / "sheet.png")
    assert Image.open(tmp_path / "new" / "sheet.png").size[0] > 16
    made = run("data", "make", "--out", tmp_path / "made", "--count", 3, "--json", *shapes)
    assert json.loads(made.out)["new"] == 3
    assert len(list((tmp_path / "made").glob("*.png"))) == len(list((tmp_path / "made").glob("*.txt"))) == 3
    assert json.loads(run("data", "make", "--out", tmp_path / "made", "--count", 3, "--json", *shapes).out)["new"] == 0


def test_results_and_the_plan_that_made_them(run: Callable[..., Result], model: Path, pictures: Path, tmp_path: Path) -> None:
    tokens, back, samples = (tmp_path / name for name in ("tokens", "back", "samples"))
    encode = ("encode", "--model", model, "--images", pictures, "--out", tokens, "--device", "cpu")
    done = run(*encode, "--precision", "bf16")
    assert done.code == 0, done.err
    bf16 = Plan("bf16", "cpu")
    assert Plan.load(tokens / "plan.json") == bf16
    assert all(f"  {line}\n" in done.out for line in bf16.describe().splitlines())
    assert_one_line(run(*encode), "made otherwise", "precision differ")
    again = json.loads(run(*encode, "--precision", "bf16", "--json").out)
    assert (again["shards_reused"], Plan.from_dict(again["plan"])) == (1, bf16)

    decode = ("decode", "--model", model, "--tokens", tokens, "--out", back, "--plan", tokens / "plan.json", "--precision")
    assert run(*decode, "int8").code == 0
    assert Plan.load(back / "plan.json") == Plan("int8")
    (back / "0.png").unlink()
    assert_one_line(run(*decode, "fp32"), "not decoded from these tokens in this way")
    assert Plan.load(back / "plan.json") == Plan("int8")

    pipeline = tmp_path / "pipeline"
    dit = DiTConfig(num_tokens=3, in_channels=4, width=32, depth=3, heads=2, num_classes=2, learn_sigma=False)
    DiT(dit).save_pretrained(pipeline / "generator")
    TexTok.from_pretrained(model).save_pretrained(pipeline / "tokenizer")
    about = {"objective": "gaussian", "prediction": "epsilon", "label_names": ["a", "b"], "captions": {}}
    (pipeline / "pipeline.json").write_text(json.dumps(about))
    sample = ("sample", "--model", pipeline, "--label", "a", "--steps", 3, "--sampler", "unipc", "--device", "cpu")
    cached = Plan("bf16", step_cache=StepCache(2), memory_limit=2**20)
    given = ("--plan", cached.save(tmp_path / "mine.json"), "--out", samples)
    assert_one_line(run(*sample, "--out", samples, "--precision", "fp8", "--plan", pictures / "0.txt"), "cannot read the plan")
    done = run(*sample, *given, "--split", "--count", 2)
    assert done.code == 0, done.err
    assert "once in 2 evaluations" in done.out and "is split" in done.out
    assert Plan.load(samples / "plan.json") == dataclasses.replace(cached, split=True)
    listed = json.loads((samples / "samples.json").read_text())
    assert (listed["precision"], listed["step_cache"]["interval"]) == ("bf16", 2)
    assert_one_line(run(*sample, "--out", samples, "--count", 2), "precision, step_cache differ")
    small = dataclasses.replace(cached, memory_limit=1).save(tmp_path / "small.json")
    assert_one_line(run(*sample, "--plan", small, "--out", tmp_path / "x"), "does not fit")
    assert not (tmp_path / "x").exists()


def test_the_whole_way(
    run: Callable[..., Result], train_config: Callable[..., TokenizerTrainConfig], pictures: Path, tmp_path: Path
) -> None:
    """train, encode, decode, train, sample: with --json nothing but JSON on stdout."""
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump(to_dict(train_config(tmp_path / "tok"))))
    trained = run("train", "tokenizer", "--config", settings, "--json", "run.steps=2")
    assert (trained.code, json.loads(trained.out)["last"]["step"]) == (0, 2)
    final = json.loads(trained.out)["final"]
    again = run("train", "tokenizer", "--config", settings, "run.steps=2")
    assert (again.code, "--resume" in again.err.splitlines()[-1], "Traceback" in again.err) == (2, True, False)

    tokens = tmp_path / "tokens"
    encoded = run("encode", "--model", final, "--images", pictures, "--out", tokens, "--json")
    assert json.loads(encoded.out)["pictures"] == 3
    spoken = run("encode", "--model", final, "--images", pictures, "--out", tokens)
    assert f"wrote 3 pictures' tokens to {tokens} (1 shards were there)" in spoken.out
    decoded = run("decode", "--model", final, "--tokens", tokens, "--out", tmp_path / "back", "--json")
    assert json.loads(decoded.out)["new"] == 3
    assert len(list((tmp_path / "back").glob("*.png"))) == 3

    model = {"num_tokens": 3, "in_channels": 4, "width": 32, "depth": 1, "heads": 2, "num_classes": 8, "text_dim": 0}
    config = {**to_dict(train_config(tmp_path / "dit")), "tokenizer": final, "model": model, "objective": "gaussian"}
    config = {key: value for key, value in config.items() if key not in ("loss", "discriminator", "caption_dropout")}
    settings.write_text(yaml.safe_dump(config))
    generator = run("train", "generator", "--config", settings, "--json", "run.steps=2", "cache_images=8")
    assert generator.code == 0, generator.err
    directory = json.loads(generator.out)["final"]
    name = json.loads((Path(directory) / "pipeline.json").read_text())["label_names"][0]
    arguments = ("sample", "--model", directory, "--label", name, "--label", 1, "--count", 2, "--steps", 2, "--guidance", 2)
    sampled = run(*arguments, "--out", tmp_path / "samples", "--json")
    report = json.loads(sampled.out)
    assert [item["seed"] for item in report["samples"]] == [0, 1, 2, 3]
    assert [item["for"] for item in report["samples"]] == [name, name, "1", "1"]
    assert all(np.asarray(Image.open(path)).shape == (16, 16, 3) for path in report["images"])
    assert "wrote 0 pictures" in run(*arguments, "--out", tmp_path / "samples").out
    assert_one_line(run(*arguments, "--seed", 1, "--out", tmp_path / "samples"), "made otherwise (seed differ")
    assert_one_line(run("sample", "--model", directory, "--prompt", "a", "--out", tmp_path / "x"), "--label")
    assert_one_line(run("sample", "--model", directory, "--label", "nobody", "--out", tmp_path / "x"), "nobody")
    assert_one_line(run("sample", "--model", directory, "--label", -1, "--out", tmp_path / "x"), "-1")
    assert_one_line(run("sample", "--model", directory, "--out", tmp_path / "x"), "--label")
    assert_one_line(run("sample", "--model", directory, "--label", 1, "--steps", 0, "--out", tmp_path / "x"), "steps")
    assert_one_line(run("sample", "--model", directory, "--label", 1, "--sampler", "euler", "--out", tmp_path / "x"), "euler")
    assert_one_line(run("sample", "--model", directory, "--label", 1, "--seed", -1, "--out", tmp_path / "x"), "seed")
