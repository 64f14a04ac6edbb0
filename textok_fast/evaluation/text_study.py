"""What text is worth to a tokenizer, by its number of tokens and by where the text goes: ``textok-fast evaluate study``.

The ablation of arXiv 2412.05796 (TexTok; text in both, in the encoder only, in the decoder only, nowhere; 32 to 256 tokens,
rFID on ImageNet) on captioned scenes, with several seeds. Every tokenizer of a seed sees the same batches in the same order.
The one with text in both is also read with the captions of other pictures.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tqdm import tqdm

from textok_fast.config import TokenizerTrainConfig, load_config, to_dict
from textok_fast.data import CaptionedImages, collate, load_dataset
from textok_fast.errors import InputError
from textok_fast.evaluation.metrics import reconstruction_metrics
from textok_fast.evaluation.plots import Series, line_plot
from textok_fast.evaluation.provenance import provenance
from textok_fast.files import write_text
from textok_fast.modeling import TexTok
from textok_fast.ops.device import default_device

PLACES = ("both", "encoder", "decoder", "none")  # of text, as TexTokConfig.text
SHUFFLED = "shuffled"  # text in both, read with the captions of other pictures
SPLITS = {"composition": "held-out compositions", "object": "held-out objects"}
BATCH = 64
PATIENCE = 300.0  # seconds that a training may take to end


@dataclass
class StudyConfig:
    """``tokens``, ``text`` (of :data:`PLACES`) and ``seeds``: one training for each combination. ``overrides`` are settings of
    the recipe ``study``; ``pictures`` of each split are compared; ``jobs`` trainings run at once, 0: one for each core
    of a CPU, one on a GPU."""

    out: Path
    tokens: Sequence[int] = (4, 8, 16, 32)
    text: Sequence[str] = PLACES
    seeds: Sequence[int] = (0, 1, 2)
    pictures: int = 512
    jobs: int = 0
    recipe: str = "study"
    overrides: Sequence[str] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.text) - set(PLACES)):
            raise InputError(f"text is placed in {', '.join(PLACES)}; got {unknown[0]}")
        for name in ("tokens", "text", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise InputError(f"{name} must be one or more different values, got {list(values)}")
        if min(self.tokens) < 1 or min(self.seeds) < 0 or self.pictures < 2 or self.jobs < 0:
            raise InputError("tokens must be at least 1, seeds and jobs 0 or more, and pictures at least 2")
        fixed = ("model.num_tokens", "model.text", "run.seed", "run.output_dir")
        if taken := [item for item in self.overrides if item.partition("=")[0] in fixed]:
            raise InputError(f"{taken[0]} is one of the things that the study varies: use --tokens, --text, --seeds or --out")


@dataclass(frozen=True)
class _Run:
    tokens: int
    text: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.tokens:03d}-{self.text}-{self.seed}"

    @property
    def settings(self) -> list[str]:
        return [f"model.num_tokens={self.tokens}", f"model.text={self.text}", f"run.seed={self.seed}"]


def text_study(config: StudyConfig, *, command: str | None = None, progress: bool = True) -> dict[str, Any]:
    """Trains, compares and writes ``out``/study.json, study.md and study-SPLIT.svg; returns what study.json holds.

    What is finished in ``out`` is kept: the same study again goes on where the last one stopped, however that was, and ends
    with the same numbers. Raises: InputError where ``out`` holds a study with other settings, and for a training that fails.
    """
    out = config.out
    runs = [_Run(*each) for each in ((n, text, seed) for seed in config.seeds for n in config.tokens for text in config.text)]
    base = load_config(TokenizerTrainConfig, config.recipe, overrides=config.overrides)
    settings: dict[str, Any] = {"training": to_dict(base), "pictures": config.pictures}
    settings["training"]["run"]["output_dir"] = ""
    _claim(out, settings)
    trained = _train(config, runs, progress)
    rows = []
    data = {split: load_dataset(base.data, split) for split in SPLITS}
    for run in tqdm(trained, desc="comparing", unit="tokenizer", disable=not progress, file=sys.stderr):
        rows.append({**dataclasses.asdict(run), **_measure(out / run.name, data, config.pictures)})
    result = {
        **provenance(command),
        **settings,
        "data": {split: dataset.describe() for split, dataset in data.items()},
        "tokens": list(config.tokens),
        "text": list(config.text),
        "seeds": list(config.seeds),
        "runs": rows,
        "means": means(rows),
        "gains": gains(rows),
    }
    write_text(out / "study.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    write_text(out / "study.md", table(result))
    for split in SPLITS:
        write_text(out / f"study-{split}.svg", plot(result, split) + "\n")
    return result


def _claim(out: Path, settings: dict[str, Any]) -> None:
    path = out / "settings.json"
    text = json.dumps(settings, indent=1) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise InputError(f"{out} holds a study of other settings ({path.name}); choose another --out")
    write_text(path, text)


# -- training ------------------------------------------------------------------------------------------------------------------


def _train(config: StudyConfig, runs: Sequence[_Run], progress: bool) -> list[_Run]:
    """All of them, ``jobs`` at once, one seed after the other."""
    waiting = [run for run in runs if not (config.out / run.name / "final" / "config.json").is_file()]
    on_cpu = default_device().type == "cpu"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = config.jobs or (cores if on_cpu else 1)
    threads = {"OMP_NUM_THREADS": str(max(1, cores // jobs))} if on_cpu else {}
    running: dict[_Run, subprocess.Popen[bytes]] = {}
    bar = tqdm(total=len(runs), initial=len(runs) - len(waiting), desc="training", unit="tokenizer", disable=not progress,
        file=sys.stderr)  # fmt: skip
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running[run] = _start(config, run, threads)
            time.sleep(0.2)
            for run, process in list(running.items()):
                if (status := process.poll()) is None:
                    continue
                del running[run]
                if status:
                    lines = _log(config.out, run).read_text(errors="replace").strip().splitlines()
                    cause = lines[-1].removeprefix("error: ") if lines else f"exit status {status}"
                    raise InputError(f"training {run.name} failed: {cause} (see {_log(config.out, run)})")
                bar.update()
    finally:
        bar.close()
        for process in running.values():
            process.terminate()  # it writes a checkpoint first
        for process in running.values():
            process.wait()
    return list(runs)


def _log(out: Path, run: _Run) -> Path:
    return out / f"{run.name}.log"


def _start(config: StudyConfig, run: _Run, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    directory = config.out / run.name
    directory.mkdir(exist_ok=True)
    with FileLock(directory / ".lock", timeout=PATIENCE):  # the training of a killed study ends with a checkpoint first
        pass
    settings = [*config.overrides, *run.settings, f"run.output_dir={json.dumps(str(directory))}"]
    command = ["train", "tokenizer", "--recipe", config.recipe, "--resume", *settings]
    with _log(config.out, run).open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-c", _TRAINING, *command],
            stdin=subprocess.PIPE,  # never written to: it closes when this process ends, however that is
            stdout=file,
            stderr=file,
            env={**os.environ, **environment},
            start_new_session=True,  # a terminal's Ctrl-C reaches only us: a second signal would cut a checkpoint short
        )


# A training that writes a checkpoint and ends when its standard input closes.
_TRAINING = """
import os, signal, sys, threading

def end_with_the_study():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=end_with_the_study, daemon=True).start()
from textok_fast.cli import main

sys.exit(main(sys.argv[1:]))
"""


# -- numbers -------------------------------------------------------------------------------------------------------------------


def _measure(directory: Path, data: dict[str, CaptionedImages], count: int) -> dict[str, Any]:
    """{split: {caption: {"psnr", "ssim"}}} of the tokenizer in ``directory``, from a file where they have been measured."""
    path = directory / "study.json"
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    tokenizer = TexTok.from_pretrained(directory / "final", device=default_device())
    found = {split: _reconstruct(tokenizer, dataset, count) for split, dataset in data.items()}
    write_text(path, json.dumps(found, indent=1) + "\n")
    return found


def _reconstruct(tokenizer: TexTok, dataset: CaptionedImages, count: int) -> dict[str, dict[str, float]]:
    kinds = ["own", SHUFFLED] if tokenizer.config.text == "both" else ["own"]
    original: list[torch.Tensor] = []
    decoded: dict[str, list[torch.Tensor]] = {kind: [] for kind in kinds}
    for start in range(0, count, BATCH):
        batch = collate([dataset[index] for index in range(start, min(start + BATCH, count))])
        others = [dataset[(index + 1) % count].caption for index in range(start, min(start + BATCH, count))]
        original.append(batch["images"])
        for kind in kinds:
            captions = None if tokenizer.config.text == "none" else batch["captions"] if kind == "own" else others
            made = tokenizer.decode(tokenizer.encode(batch["images"], captions), captions, output="uint8")
            decoded[kind].append(torch.as_tensor(made).cpu())
    pictures = torch.cat(original)
    found = {}
    for kind, parts in decoded.items():
        metrics = reconstruction_metrics(pictures, torch.cat(parts))
        found[kind] = {name: metrics[name] for name in ("psnr", "ssim")}
    return found


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation over the seeds: a row for each split, number of tokens and kind of text."""
    values: dict[tuple[str, int, str], list[dict[str, float]]] = {}
    for row in rows:
        for split in SPLITS:
            for kind, found in row[split].items():
                values.setdefault((split, row["tokens"], row["text"] if kind == "own" else kind), []).append(found)
    return [
        {"split": split, "tokens": tokens, "text": text, "seeds": len(found)} | _spread(found)
        for (split, tokens, text), found in values.items()
    ]


def gains(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of text in each place over no text, seed by seed: both of a pair saw the same batches."""
    plain = {(row["tokens"], row["seed"]): row for row in rows if row["text"] == "none"}
    pairs: dict[tuple[str, int, str], list[dict[str, float]]] = {}
    for row in rows:
        other = plain.get((row["tokens"], row["seed"]))
        if row["text"] == "none" or other is None:
            continue
        for split in SPLITS:
            one, two = row[split]["own"], other[split]["own"]
            pairs.setdefault((split, row["tokens"], row["text"]), []).append({name: one[name] - two[name] for name in one})
    return [
        {"split": split, "tokens": tokens, "text": text, "seeds": len(found)} | _spread(found)
        for (split, tokens, text), found in pairs.items()
    ]


def _spread(found: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """{"psnr": mean, "psnr_std": sample standard deviation, None of one value}, the same of SSIM."""
    result: dict[str, float | None] = {}
    for name in ("psnr", "ssim"):
        values = [each[name] for each in found]
        result[name] = statistics.fmean(values)
        result[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
    return result


def findings(result: dict[str, Any]) -> list[str]:
    """The published direction, held against these numbers: sentences with what was found, whichever way."""
    said = []
    gain = {(row["split"], row["tokens"], row["text"]): row for row in result["gains"]}
    few, many = min(result["tokens"]), max(result["tokens"])
    for split, name in SPLITS.items():
        if few != many and (split, few, "both") in gain and (split, many, "both") in gain:
            one, two = gain[split, few, "both"], gain[split, many, "both"]
            clear = _is_clear(one, two)
            said.append(
                f"Fewer tokens, larger gain, in PSNR ({name}): text in both is worth {one['psnr']:+.2f} dB at {few} tokens and "
                f"{two['psnr']:+.2f} dB at {many}: {_verdict(one['psnr'] > two['psnr'], clear)}."
            )
        pairs = [(gain[split, n, "encoder"], gain[split, n, "decoder"]) for n in result["tokens"]
            if (split, n, "encoder") in gain and (split, n, "decoder") in gain]  # fmt: skip
        if pairs:
            encoder = statistics.fmean(one["psnr"] for one, _ in pairs)
            decoder = statistics.fmean(two["psnr"] for _, two in pairs)
            clear = all(_is_clear(one, two) for one, two in pairs)
            same = len({one["psnr"] > two["psnr"] for one, two in pairs}) == 1
            said.append(
                f"Encoder's text worth more than the decoder's, in PSNR ({name}): {encoder:+.2f} dB and {decoder:+.2f} dB, "
                f"means over the numbers of tokens: {_verdict(encoder > decoder, clear and same)}."
            )
    return said


def _is_clear(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Whether two mean gains differ by more than twice the standard error of their difference, as far as seeds tell it."""
    deviations = [each["psnr_std"] for each in (one, two)]
    if None in deviations:
        return False
    error = math.sqrt(sum(std**2 / each["seeds"] for std, each in zip(deviations, (one, two), strict=True)))
    return bool(abs(one["psnr"] - two["psnr"]) > 2 * error)


def _verdict(holds: bool, clear: bool) -> str:
    if not clear:
        return "within the seeds' spread, so neither confirmed nor refuted"
    return "confirmed" if holds else "not confirmed, the opposite was found"


# -- what is shown -------------------------------------------------------------------------------------------------------------

_NAMES = {
    "both": "text in both",
    "encoder": "text in the encoder only",
    "decoder": "text in the decoder only",
    "none": "no text",
    SHUFFLED: "text in both, captions of other pictures",
}


def table(result: dict[str, Any]) -> str:
    """Markdown: a table a split, mean ± standard deviation over the seeds, and the findings."""
    training, machine = result["training"], result["machine"]
    run, model = training["run"], training["model"]
    lines = [
        "# What text is worth, by number of tokens",
        "",
        f"`{result['command']}`, {result['date'][:10]}, {machine['cpu']}, commit {str(machine['git_commit'])[:9]}. "
        f"{model['image_size']} px, tokens of {model['latent_dim']} channels, width {model['width']}, "
        f"{model['encoder_depth']} + {model['decoder_depth']} layers, {run['steps']} steps of {run['batch_size']} pictures; "
        f"{result['pictures']} pictures a split, {len(result['seeds'])} seeds: mean ± standard deviation.",
    ]
    for split, name in SPLITS.items():
        rows = {(row["tokens"], row["text"]): row for row in result["means"] if row["split"] == split}
        kinds = [kind for kind in _NAMES if any(text == kind for _, text in rows)]
        lines += ["", f"## {name[0].upper()}{name[1:]}", "", result["data"][split], "", "PSNR in dB / SSIM", ""]
        lines += ["| tokens | " + " | ".join(_NAMES[kind] for kind in kinds) + " |", "|---:|" + "---|" * len(kinds)]
        for tokens in result["tokens"]:
            cells = [_cell(rows.get((tokens, kind))) for kind in kinds]
            lines.append(f"| {tokens} | " + " | ".join(cells) + " |")
    if said := findings(result):
        lines += ["", "## The published direction", "", *(f"- {each}" for each in said)]
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    psnr = f"{row['psnr']:.2f}" + ("" if row["psnr_std"] is None else f" ± {row['psnr_std']:.2f}")
    return f"{psnr} / {row['ssim']:.3f}" + ("" if row["ssim_std"] is None else f" ± {row['ssim_std']:.3f}")


def plot(result: dict[str, Any], split: str) -> str:
    """PSNR over the number of tokens, a line for each kind of text with bars of one standard deviation over the seeds: SVG."""
    series = []
    for kind, name in _NAMES.items():
        rows = [row for row in result["means"] if row["split"] == split and row["text"] == kind]
        if rows:
            points = [(float(row["tokens"]), row["psnr"]) for row in rows]
            series.append(Series(name, points, markers=True, errors=[row["psnr_std"] or 0.0 for row in rows]))
    title = f"Reconstruction of {SPLITS[split]}"
    return line_plot(title, "tokens", "PSNR in dB", series, x_ticks=result["tokens"], log_x=True, standalone=True)
