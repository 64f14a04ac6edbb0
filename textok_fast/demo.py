"""The whole path on real pictures in minutes: ``textok-fast demo``.

Pictures, what the weights in the box do with them, two tokenizers (with and without text) on the same batches, their quality on
held-out compositions and objects, cached tokens, a small DiT, samples, exports run beside PyTorch, one denoising step over few
and over many tokens, and a report. Every part that is finished is kept: the same command again goes on where the last one
stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from textok_fast.config import GeneratorTrainConfig, TokenizerTrainConfig, load_config
from textok_fast.errors import InputError
from textok_fast.files import write_text

DURATIONS_NAME = "durations.json"  # part -> seconds, over all runs of this demo
SHOWN = 8  # pictures a grid
SAMPLES = 8
NEEDED = ("accelerate", "torchmetrics", "onnx", "onnxscript", "onnxruntime")  # of the extras train, eval and export


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much of everything. None keeps the recipe's number."""

    steps: int | None = None  # of each tokenizer
    evaluated: int = 320  # pictures of each split
    cached: int | None = None  # pictures whose tokens the generator trains on
    generator_steps: int | None = None
    speedup_size: str = "S"
    speedup_tokens: tuple[int, ...] = (32, 256, 1024, 4096)
    speedup_seconds: float = 45.0


QUICK = Effort(6, 16, 256, 6, "tiny", (32, 256), 5.0)  # enough to see that every part runs; nothing is learned


def demo(
    out: Path, *, source: str = "emoji", steps: int | None = None, quick: bool = False, command: str = ""
) -> dict[str, Any]:
    """Runs everything, writes ``out``/report.html and ``out``/results.json, and prints where they are.

    ``steps`` overrides the tokenizers' training steps. Returns the results without the pictures.
    """
    if steps is not None and steps < 1:
        raise InputError(f"--steps must be at least 1, got {steps}")
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        raise InputError(f"the demo needs {', '.join(lacking)}: pip install 'textok-fast[train,eval,export]'")
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    effort = QUICK if quick else Effort()
    results = _Demo(out, source, effort if steps is None else dataclasses.replace(effort, steps=steps)).all(command)

    from textok_fast.evaluation import write_report

    report = write_report(out / "report.html", results)
    summary = {**results.to_dict(), "report": str(report), "seconds": time.perf_counter() - started}
    text = json.dumps(summary, indent=1, ensure_ascii=False)
    write_text(out / "results.json", text)
    _print_summary(summary)
    return summary


class _Demo:
    """The parts in their order. Each leaves its products in ``out`` and its duration in ``durations``."""

    def __init__(self, out: Path, source: str, effort: Effort) -> None:
        self.out, self.effort, self.source = out, effort, source
        self._use(source)
        self.durations = _read_durations(out)

    def _use(self, source: str) -> None:
        """Every part from here on takes its pictures from ``source``."""
        steps = [f"run.steps={self.effort.steps}"] if self.effort.steps else []
        self.overrides = [f"data.source={source}", *steps]
        self.config = load_config(TokenizerTrainConfig, "demo", overrides=self.overrides)

    def all(self, command: str) -> Any:
        from textok_fast.data import fetch, load_dataset
        from textok_fast.evaluation import DemoResults, machine_info
        from textok_fast.evaluation.mini import demonstrate
        from textok_fast.inference import load_pipeline
        from textok_fast.modeling import TexTok
        from textok_fast.training.loop import read_history

        with self._part("pictures"):
            fetched = fetch(self.source)
            self._use(fetched.name)  # what stands in for a source that cannot be had stands in for all parts
            splits = {"compositions": "composition", "objects": "object"}
            held_out = {name: load_dataset(self.config.data, split) for name, split in splits.items()}
            print(f"pictures: {load_dataset(self.config.data, 'train').describe()}")
        mini = None
        if fetched.name == "emoji":  # what these weights know
            with self._part("weights in the box"):
                mini = demonstrate(held_out["compositions"], SHOWN)
        with self._part("training both tokenizers", resumes=True):
            self._train_tokenizers()
        tokenizers = {name: TexTok.from_pretrained(self.out / name / "final") for name in ("with_text", "no_text")}
        results = DemoResults(
            command=command,
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            machine=machine_info(),
            data={"source": fetched.name, "licence": fetched.licence, "note": fetched.note},
            durations=self.durations,
            mini=mini,
        )
        if fetched.name != self.source:
            results.notes.append(f"{self.source} could not be had, {fetched.name} stand in: {fetched.note}")
        if self.effort.generator_steps:
            results.notes.append("This was --quick: a few steps of everything. The pictures and numbers mean nothing.")
        with self._part("evaluation"):
            for name, dataset in held_out.items():
                self._evaluate(results, name, dataset, tokenizers)
        with self._part("tokens and generator", resumes=True):
            generator = self._train_generator()
        with self._part("sampling"):
            pipeline = load_pipeline(generator)
            self._sample(results, pipeline, held_out["compositions"])
        with self._part("export"):
            self._export(results, generator)
        with self._part("speed-up"):
            self._speedup(results, command)
        results.losses = {
            label: [(line["step"], line["loss"]) for line in read_history(self.out / name)]
            for name, label in (("with_text", "with text"), ("no_text", "no text"))
        }
        results.generator_losses = {"DiT": [(line["step"], line["loss"]) for line in read_history(self.out / "generator")]}
        results.settings = self._settings(tokenizers["with_text"], pipeline.generator)
        return results

    @contextlib.contextmanager
    def _part(self, name: str, resumes: bool = False) -> Iterator[None]:
        """``resumes``: the part goes on where an earlier run was interrupted, so their times add up."""
        print(f"-- {name}", flush=True)
        start, before = time.perf_counter(), self.durations.get(name, 0.0) if resumes else 0.0
        try:
            yield
        finally:
            self.durations[name] = before + time.perf_counter() - start
            write_text(self.out / DURATIONS_NAME, json.dumps(self.durations, indent=1) + "\n")

    # -- tokenizers -------------------------------------------------------------------------------------------------

    def _train_tokenizers(self) -> None:
        """Both at once, one core each, from the same seed: the same batches in the same order."""
        jobs = {"with_text": "both", "no_text": "none"}
        running: dict[str, subprocess.Popen[bytes]] = {}
        logs = {name: self.out / f"{name}.log" for name in jobs}
        total = self.config.run.steps
        try:
            for name, text in jobs.items():
                directory = self.out / name
                self._require_same_run(directory, text)
                if not (directory / "final" / "config.json").exists():
                    running[name] = self._start(name, text, logs[name])
                if (os.cpu_count() or 1) < 2:  # one after the other
                    self._watch(running, total, logs)
                    running = {}
            self._watch(running, total, logs)
        finally:
            for process in running.values():
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)
            for process in running.values():
                process.wait()

    def _require_same_run(self, directory: Path, text: str) -> None:
        """A finished or interrupted run in the way must be one of these very settings."""
        from textok_fast.config import from_mapping, read_yaml, to_dict

        file = directory / "config.yaml"
        if file.exists():
            found = to_dict(from_mapping(TokenizerTrainConfig, read_yaml(file)))
            wanted = to_dict(load_config(TokenizerTrainConfig, "demo", overrides=self._job_overrides(directory, text)))
            if {**found, "run": {**found["run"], "output_dir": ""}} != {**wanted, "run": {**wanted["run"], "output_dir": ""}}:
                raise InputError(f"{directory} holds a demo of other settings; choose another --out")

    def _job_overrides(self, directory: Path, text: str) -> list[str]:
        return [*self.overrides, f"model.text={text}", f"run.output_dir={_quoted(directory)}"]

    def _start(self, name: str, text: str, log: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "textok_fast", "train", "tokenizer", "--recipe", "demo", "--resume"]
        command += self._job_overrides(self.out / name, text)
        with log.open("ab") as file:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # a terminal's Ctrl-C reaches only us: a second signal would cut a checkpoint short
            )

    def _watch(self, running: dict[str, subprocess.Popen[bytes]], total: int, logs: dict[str, Path]) -> None:
        """One bar for each until all have ended; InputError with the log's last line if one failed."""
        from textok_fast.training.loop import read_history

        bars = {
            name: tqdm(total=total, desc=name, unit="step", position=i, file=sys.stderr, mininterval=1.0)
            for i, name in enumerate(running)
        }
        try:
            while True:
                ended = all(process.poll() is not None for process in running.values())
                for name, bar in bars.items():
                    history = read_history(self.out / name)
                    if history:
                        bar.set_postfix_str(
                            f"loss {history[-1]['loss']:.4f}, {history[-1]['images_per_s']:.0f} images/s", False
                        )
                        bar.update(int(history[-1]["step"]) - bar.n)
                for name, process in running.items():
                    if process.poll():
                        lines = logs[name].read_text(errors="replace").strip().splitlines()
                        cause = lines[-1].removeprefix("error: ") if lines else f"exit status {process.returncode}"
                        raise InputError(f"training {name} failed: {cause} (see {logs[name]})")
                if ended:
                    return
                time.sleep(1.0)
        finally:
            for bar in bars.values():
                bar.close()

    def _evaluate(self, results: Any, name: str, dataset: Any, tokenizers: dict[str, Any]) -> None:
        """Reconstruction of ``dataset`` by both tokenizers, and by the one with text under wrong and without captions."""
        import numpy as np
        import torch

        from textok_fast.data import collate
        from textok_fast.evaluation import reconstruction_metrics

        examples = [dataset[i] for i in range(self.effort.evaluated)]
        outputs: dict[str, list[Any]] = {"with_text": [], "no_text": [], "shuffled": [], "null": []}
        originals, captions, wrong = [], [], []
        for start in range(0, len(examples), 64):
            batch = collate(examples[start : start + 64])
            images, own = batch["images"], batch["captions"]
            shuffled = own[1:] + own[:1]
            given = {"with_text": own, "no_text": None, "shuffled": shuffled, "null": None}
            for condition, texts in given.items():
                tokenizer = tokenizers["no_text" if condition == "no_text" else "with_text"]
                outputs[condition].append(tokenizer.decode(tokenizer.encode(images, texts), texts, output="uint8"))
            originals.append(images)
            captions += own
            wrong += shuffled
        original = torch.cat(originals)  # (B, S, S, 3)
        pictures = {condition: torch.cat(parts) for condition, parts in outputs.items()}
        results.metrics[name] = {
            condition: reconstruction_metrics(original, picture) for condition, picture in pictures.items()
        }
        shown = {"original": original, **{key: pictures[key] for key in ("no_text", "with_text", "shuffled")}}
        results.pictures[name] = {key: np.asarray(value[:SHOWN]) for key, value in shown.items()}
        results.captions[name], results.shuffled_captions[name] = captions[:SHOWN], wrong[:SHOWN]

    # -- generator --------------------------------------------------------------------------------------------------

    def _train_generator(self) -> Path:
        from textok_fast.training import train_generator

        directory = self.out / "generator"
        overrides = [
            f"tokenizer={_quoted(self.out / 'with_text' / 'final')}",
            f"run.output_dir={_quoted(directory)}",
            f"data.source={self.config.data.source}",
        ]
        if self.effort.generator_steps:
            overrides += [f"run.steps={self.effort.generator_steps}"]
        if self.effort.cached:
            overrides += [f"cache_images={self.effort.cached}"]
        if not (directory / "final" / "pipeline.json").exists():
            with tqdm(desc="tokens", unit="picture", file=sys.stderr, mininterval=1.0) as bar:

                def advance(done: int, total: int) -> None:
                    bar.total = total
                    bar.update(done - bar.n)

                config = load_config(GeneratorTrainConfig, "demo", overrides=overrides)
                train_generator(config, resume=True, on_cache=advance)
        return directory / "final"

    def _sample(self, results: Any, pipeline: Any, dataset: Any) -> None:
        from textok_fast.inference.pipelines import SamplingOptions

        captions = [dataset[i].caption for i in range(self.effort.evaluated, self.effort.evaluated + SAMPLES)]
        made = pipeline(captions, seed=0, options=SamplingOptions(steps=50, guidance_scale=2.0))
        results.samples, results.sample_captions = made.images.numpy(), captions

    def _export(self, results: Any, directory: Path) -> None:
        """A row for each runtime; of one whose export fails the report says why, beside everything else."""
        from textok_fast.export import Source

        source = Source.load(directory)
        for precision in ("fp32", "int8"):
            results.onnx.append(self._exported(source, f"ONNX Runtime, {precision}", "onnx", precision, "all"))
        if importlib.util.find_spec("tensorrt_rtx") is not None:  # builds without a GPU; with one it is compared too
            results.onnx.append(self._exported(source, "TensorRT-RTX, fp16", "tensorrt-rtx", "fp16", "decoder"))
        else:
            results.onnx.append({"runtime": "TensorRT-RTX", "reason": "not installed: pip install 'textok-fast[tensorrt-rtx]'"})
        reason = "left out: it compiles every network anew; textok-fast export --to aoti does that"
        results.onnx.append({"runtime": "AOTInductor", "reason": reason})

    def _exported(self, source: Any, runtime: str, to: str, precision: str, what: str) -> dict[str, Any]:
        """``what`` of the pipeline for one runtime, and where that runs here, samples drawn through ``export.load``."""
        from textok_fast.export import export, load
        from textok_fast.export.material import Material
        from textok_fast.export.parity import whole_samples
        from textok_fast.inference.pipelines import GenerationPipeline, build_pipeline

        row: dict[str, Any] = {"runtime": runtime, "of": "the pipeline" if what == "all" else f"the {what}"}
        out = self.out / "export" / f"{to}-{precision}"
        try:
            made = export(source, out, to, what=what, precision=precision, pictures=4)
            (decoder,) = [each for each in made.parity if each.graph == ("decoder" if to == "onnx" else "decoder.engine")]
            row |= {"largest_error_of_pixels": decoder.max_abs, "relative_error": decoder.relative, "psnr": decoder.psnr}
            row |= {"passed": decoder.passed, "reason": decoder.reason, "opset": made.manifest.opset, "directory": str(out)}
            if what == "all":
                loaded = load(out, "cpu")
                assert isinstance(loaded, GenerationPipeline)
                reference = build_pipeline(source.generator, source.tokenizer, source.pipeline, "the demo")
                tokens, pictures = whole_samples(reference, loaded, Material.gather(source, count=4), precision)
                row |= {"relative_error_of_samples": tokens.relative, "psnr_of_samples": pictures.psnr}
                row["passed"] = bool(row["passed"] and tokens.passed and pictures.passed)
        except InputError as error:
            row |= {"passed": False, "reason": str(error)}
        return row

    def _speedup(self, results: Any, command: str) -> None:
        from textok_fast.evaluation import StepTimesConfig, run_step_times

        config = StepTimesConfig(
            size=self.effort.speedup_size,
            tokens=self.effort.speedup_tokens,
            dtypes=("fp32",),
            time_budget_s=self.effort.speedup_seconds,
        )
        results.speedup = run_step_times(config, command=command).to_dict()

    def _settings(self, tokenizer: Any, generator: Any) -> dict[str, Any]:
        config, train = tokenizer.config, self.config
        parameters = sum(p.numel() for p in tokenizer.parameters())
        return {
            "tokens": config.num_tokens,
            "channels a token": config.latent_dim,
            "image size": f"{config.image_size} px, patches of {config.patch_size} px",
            "tokenizer": f"{parameters / 1e6:.1f} M parameters, width {config.width}, "
            f"{config.encoder_depth} + {config.decoder_depth} layers",
            "text encoder": f"{config.text_encoder}, frozen, clause by clause",
            "objects": f"{train.data.objects} for training, {train.data.held_out_objects} held out",
            "jitter": f"{train.data.jitter:g} (share of the variation in place and size that captions do not tell)",
            "training": f"{train.run.steps} steps of {train.run.batch_size} pictures, seed {train.run.seed}",
            "optimizer": f"{train.optim.name}, learning rate {train.optim.lr:g}",
            "generator": f"DiT of {sum(p.numel() for p in generator.parameters()) / 1e6:.1f} M parameters, flow matching, "
            "caption by cross-attention",
            "evaluated": f"{self.effort.evaluated} pictures a split",
        }


def _quoted(path: Path) -> str:
    """A path as the value of a setting, whatever characters it has: a setting is read as YAML."""
    return json.dumps(str(path), ensure_ascii=False)


def _read_durations(out: Path) -> dict[str, float]:
    """What earlier runs of the demo in ``out`` took; empty when there was none."""
    try:
        found = json.loads((out / DURATIONS_NAME).read_text(encoding="utf-8"))
        return {str(name): float(seconds) for name, seconds in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _print_summary(summary: dict[str, Any]) -> None:
    names = {"with_text": "with text", "no_text": "without text", "shuffled": "captions shuffled", "null": "null caption"}
    print("\nPSNR / SSIM of the reconstructions")
    for split, conditions in summary["metrics"].items():
        print(f"  held-out {split}")
        for condition, values in conditions.items():
            print(f"    {names[condition]:<18} {values['psnr']:6.2f} dB  {values['ssim']:.4f}")
    for ratio in summary["speedup"].get("ratios", []):
        few, many, size = ratio["base_tokens"], ratio["tokens"], summary["speedup"]["config"]["size"]
        print(f"one step of DiT-{size} in fp32 over {many} tokens takes {ratio['wall']:.1f} times as long as over {few}")
    print(f"\nreport: {Path(summary['report']).resolve()}  ({summary['seconds'] / 60:.1f} minutes)")
