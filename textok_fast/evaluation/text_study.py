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

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from textok_fast.config import TokenizerTrainConfig, load_config, to_dict
from textok_fast.data import CaptionedImages, collate, load_dataset
from textok_fast.errors import InputError
from textok_fast.evaluation.features import FeatureNetwork, load_networks
from textok_fast.evaluation.fidelity import frechet_distance, gaussian
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
# Student's t for 95 %, two-sided, by degrees of freedom from 1; 2 beyond, which is wider than it needs to be from 60 on.
STUDENT_T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass
class StudyConfig:
    """``tokens``, ``text`` (of :data:`PLACES`) and ``seeds``: one training for each combination. ``overrides`` are settings of
    the recipe ``study``; ``pictures`` of each split are compared, by PSNR, SSIM and Fréchet distances over ``features``
    (:func:`~textok_fast.evaluation.features.load_networks`), of which the first is plotted; ``jobs`` trainings run at once, 0:
    one for each core of a CPU, one on a GPU."""

    out: Path
    tokens: Sequence[int] = (4, 8, 16, 32)
    text: Sequence[str] = PLACES
    seeds: Sequence[int] = (0, 1, 2)
    pictures: int = 1024
    features: Sequence[str] = ("random", "pixels")
    jobs: int = 0
    recipe: str = "study"
    overrides: Sequence[str] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.text) - set(PLACES)):
            raise InputError(f"text is placed in {', '.join(PLACES)}; got {unknown[0]}")
        for name in ("tokens", "text", "seeds", "features"):
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
    """Trains, compares and writes ``out``/study.json, study.md and for each split study-SPLIT.svg (PSNR) and
    study-SPLIT-frechet.svg; returns what study.json holds.

    What is finished in ``out`` is kept: the same study again goes on where the last one stopped, however that was, and ends
    with the same numbers. Raises: InputError where ``out`` holds a study with other settings, for features that cannot be had,
    and for a training that fails.
    """
    out = config.out
    base = load_config(TokenizerTrainConfig, config.recipe, overrides=config.overrides)
    data = {split: load_dataset(base.data, split) for split in SPLITS}
    if (fewest := min(len(dataset) for dataset in data.values())) < config.pictures:
        raise InputError(f"the held-out splits have {fewest} pictures; {config.pictures} were to be compared (--pictures)")
    runs = [_Run(*each) for each in ((n, text, seed) for seed in config.seeds for n in config.tokens for text in config.text)]
    networks = _networks(config.features)
    settings: dict[str, Any] = {"training": to_dict(base), "pictures": config.pictures}
    settings["features"] = {network.label: {"title": network.title, **network.identity} for network in networks}
    settings["training"]["run"]["output_dir"] = ""
    _claim(out, settings)
    _train(config, runs, progress)
    rows = [{**dataclasses.asdict(run), **json.loads(_measured(out, run).read_text(encoding="utf-8"))} for run in runs]
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
        "findings": findings(rows),
    }
    write_text(out / "study.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    write_text(out / "study.md", table(result))
    for split in SPLITS:
        write_text(out / f"study-{split}.svg", plot(result, split, "psnr") + "\n")
        write_text(out / f"study-{split}-frechet.svg", plot(result, split, _distance(networks[0].label)) + "\n")
    return result


def _networks(names: Sequence[str]) -> list[FeatureNetwork]:
    networks, missing = load_networks(names, device=default_device())
    for name, reason in missing.items():
        raise InputError(f"no features {name}: {reason}")
    return networks


def _distance(label: str) -> str:
    return f"frechet_distance/{label}"


def _claim(out: Path, settings: dict[str, Any]) -> None:
    path = out / "settings.json"
    text = json.dumps(settings, indent=1) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise InputError(f"{out} holds a study of other settings ({path.name}); choose another --out")
    write_text(path, text)


# -- training ------------------------------------------------------------------------------------------------------------------


def _train(config: StudyConfig, runs: Sequence[_Run], progress: bool) -> None:
    """Trains and measures all of them, ``jobs`` at once, one seed after the other."""
    waiting = [run for run in runs if not _measured(config.out, run).is_file()]
    on_cpu = default_device().type == "cpu"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = config.jobs or (cores if on_cpu else 1)
    threads = {"OMP_NUM_THREADS": str(max(1, cores // jobs))}
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


def _log(out: Path, run: _Run) -> Path:
    return out / f"{run.name}.log"


def _measured(out: Path, run: _Run) -> Path:
    return out / run.name / "study.json"


def _start(config: StudyConfig, run: _Run, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    directory = config.out / run.name
    directory.mkdir(exist_ok=True)
    with FileLock(directory / ".lock", timeout=PATIENCE):  # the training of a killed study ends with a checkpoint first
        pass
    settings = [*config.overrides, *run.settings, f"run.output_dir={json.dumps(str(directory))}"]
    job: dict[str, Any] = {"directory": str(directory), "recipe": config.recipe, "settings": settings}
    job |= {"pictures": config.pictures, "features": list(config.features)}
    with _log(config.out, run).open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-c", _JOB, json.dumps(job)],
            stdin=subprocess.PIPE,  # never written to: it closes when this process ends, however that is
            stdout=file,
            stderr=file,
            env={**os.environ, **environment},
            start_new_session=True,  # a terminal's Ctrl-C reaches only us: a second signal would cut a checkpoint short
        )


# A training that writes a checkpoint and ends when its standard input closes.
_JOB = """
import json, os, signal, sys, threading

def end_with_the_study():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=end_with_the_study, daemon=True).start()
from textok_fast.evaluation.text_study import train_and_measure

sys.exit(train_and_measure(**json.loads(sys.argv[1])))
"""


def train_and_measure(directory: str, recipe: str, settings: list[str], pictures: int, features: list[str]) -> int:
    """One tokenizer of the study: trained into ``directory``/final unless it is there, its numbers in ``directory``/study.json.
    Returns the training's exit status."""
    from textok_fast.cli import main

    final = Path(directory) / "final"
    if not (final / "config.json").is_file():
        status = main(["train", "tokenizer", "--recipe", recipe, "--resume", *settings])
        if status or not (final / "config.json").is_file():  # stopped by a signal, after a checkpoint
            return status or 1
    data = load_config(TokenizerTrainConfig, recipe, overrides=settings).data
    tokenizer = TexTok.from_pretrained(final, device=default_device())
    networks = _networks(features)
    found = {split: _reconstruct(tokenizer, load_dataset(data, split), pictures, networks) for split in SPLITS}
    write_text(Path(directory) / "study.json", json.dumps(found, indent=1) + "\n")
    return 0


# -- numbers -------------------------------------------------------------------------------------------------------------------


def _reconstruct(
    tokenizer: TexTok, dataset: CaptionedImages, count: int, networks: Sequence[FeatureNetwork]
) -> dict[str, dict[str, float]]:
    """{captions: {metric: value}} on the first ``count`` pictures: their own captions, and others' if text is in both."""
    kinds = ["own", SHUFFLED] if tokenizer.config.text == "both" else ["own"]
    original: list[np.ndarray] = []
    decoded: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    for start in range(0, count, BATCH):
        batch = collate([dataset[index] for index in range(start, min(start + BATCH, count))])
        others = [dataset[(index + 1) % count].caption for index in range(start, min(start + BATCH, count))]
        original.append(batch["images"].numpy())
        for kind in kinds:
            captions = None if tokenizer.config.text == "none" else batch["captions"] if kind == "own" else others
            made = tokenizer.decode(tokenizer.encode(batch["images"], captions), captions, output="uint8")
            decoded[kind].append(torch.as_tensor(made).cpu().numpy())
    known = {network.label: gaussian(_features(network, original)) for network in networks}
    found = {}
    for kind, parts in decoded.items():
        metrics = reconstruction_metrics(np.concatenate(original), np.concatenate(parts))
        found[kind] = {name: metrics[name] for name in ("psnr", "ssim")}
        for network in networks:
            distance = frechet_distance(known[network.label], gaussian(_features(network, parts)))
            found[kind][_distance(network.label)] = distance
    return found


def _features(network: FeatureNetwork, pictures: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.cat([network(part)["pool"] for part in pictures])


Key = tuple[str, int, str, int]  # split, tokens, kind of text, seed


def _values(rows: Sequence[dict[str, Any]]) -> dict[Key, dict[str, float]]:
    """The metrics of every tokenizer, split and kind of captions; "shuffled" is a kind of text."""
    return {
        (split, row["tokens"], row["text"] if kind == "own" else kind, row["seed"]): found
        for row in rows
        for split in SPLITS
        for kind, found in row[split].items()
    }


def _gains(rows: Sequence[dict[str, Any]]) -> dict[Key, dict[str, float]]:
    """What text brought over no text, by metric, seed by seed: both of a pair saw the same batches. More is better, so a
    distance's gain is by how much it fell."""
    values = _values(rows)
    gained = {}
    for (split, tokens, text, seed), found in values.items():
        plain = values.get((split, tokens, "none", seed))
        if text != "none" and plain is not None:
            gained[split, tokens, text, seed] = {name: _sign(name) * (found[name] - plain[name]) for name in found}
    return gained


def _sign(metric: str) -> int:
    return -1 if metric.startswith("frechet_distance") else 1


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation over the seeds: a row for each split, number of tokens and kind of text."""
    return _over_seeds(_values(rows))


def gains(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same of what text in each place, and captions of other pictures, brought over no text; more is better."""
    return _over_seeds(_gains(rows))


def _over_seeds(values: dict[Key, dict[str, float]]) -> list[dict[str, Any]]:
    """Rows of {"split", "tokens", "text", "seeds", metric: mean, metric_std: sample standard deviation, None of one value}."""
    groups: dict[tuple[str, int, str], list[dict[str, float]]] = {}
    for (split, tokens, text, _), found in values.items():
        groups.setdefault((split, tokens, text), []).append(found)
    rows: list[dict[str, Any]] = []
    for (split, tokens, text), found_by_seed in groups.items():
        row: dict[str, Any] = {"split": split, "tokens": tokens, "text": text, "seeds": len(found_by_seed)}
        for name in found_by_seed[0]:
            each = [found[name] for found in found_by_seed]
            row[name] = statistics.fmean(each)
            row[f"{name}_std"] = statistics.stdev(each) if len(each) > 1 else None
        rows.append(row)
    return rows


# What is asked of the numbers: the question, and whether a positive answer is what was published.
_TREND = "gain of text in both, its change with each doubling of the tokens"
_PLACE = "encoder's text over the decoder's"
_WORTH = "gain of text in both"
_WRONG = "captions of other pictures, over no text"


def findings(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The published direction, held against these numbers in every metric, each seed giving one value.

    Rows of {"split", "question", "tokens" (None: over all of them), "metric", "value": mean over the seeds, "error": half of
    its 95 % interval by Student's t, None of one seed, "verdict"}. The trend is the least-squares slope of the gain over
    log2(tokens), published as falling; the encoder's text was published as worth more. What captions of other pictures do was
    not published, so that is told without a verdict of ours on it.
    """
    gained = _gains(rows)
    counts, seeds = sorted({key[1] for key in gained}), sorted({key[3] for key in gained})
    found: list[dict[str, Any]] = []
    for split in SPLITS:
        for metric in next(iter(gained.values()), {}):
            gain: dict[str, np.ndarray] = {}  # (tokens, seeds) of each kind of text that this study has in full
            for text in (*PLACES, SHUFFLED):
                values = [[gained.get((split, tokens, text, seed), {}).get(metric) for seed in seeds] for tokens in counts]
                if all(value is not None for row in values for value in row):
                    gain[text] = np.array(values)
            asked: list[tuple[str, int | None, np.ndarray, int]] = []  # question, tokens, a value for each seed, sign
            if "both" in gain:
                asked.append((_WORTH, None, gain["both"].mean(0), 1))
                if len(counts) > 1:
                    asked.append((_TREND, None, np.polyfit(np.log2(counts), gain["both"], 1)[0], -1))
            if "encoder" in gain and "decoder" in gain:
                over = gain["encoder"] - gain["decoder"]
                asked.append((_PLACE, None, over.mean(0), 1))
                asked += [(_PLACE, tokens, row, 1) for tokens, row in zip(counts, over, strict=True)]
            if SHUFFLED in gain:
                asked.append((_WRONG, None, gain[SHUFFLED].mean(0), 0))
            for question, tokens, each, sign in asked:
                value, error = float(each.mean()), _interval(each.tolist())
                row = {"split": split, "question": question, "tokens": tokens, "metric": metric, "value": value, "error": error}
                found.append({**row, "verdict": _verdict(value, error, sign)})
    return found


def _interval(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of their mean; None of one value."""
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    t = STUDENT_T[freedom - 1] if freedom <= len(STUDENT_T) else STUDENT_T[-1]
    return t * statistics.stdev(values) / math.sqrt(len(values))


def _verdict(value: float, error: float | None, sign: int) -> str:
    """Of a value that was published as having this sign; 0: as neither."""
    if error is None:
        return "undecided: one seed has no spread"
    if abs(value) <= error:
        return "undecided: within the seeds' spread"
    if not sign:
        return "better" if value > 0 else "worse"
    return "confirmed" if value * sign > 0 else "the opposite was found"


# -- what is shown -------------------------------------------------------------------------------------------------------------

_NAMES = {
    "both": "text in both",
    "encoder": "text in the encoder only",
    "decoder": "text in the decoder only",
    "none": "no text",
    SHUFFLED: "text in both, captions of other pictures",
}


def table(result: dict[str, Any]) -> str:
    """Markdown: tables a split, mean ± standard deviation over the seeds, and the findings."""
    training, machine = result["training"], result["machine"]
    run, model = training["run"], training["model"]
    where = machine["gpus"][0]["name"] if machine["gpus"] else machine["cpu"]
    lines = [
        "# What text is worth, by number of tokens",
        "",
        f"`{result['command']}`, {result['date'][:10]}, {where}, commit {str(machine['git_commit'])[:9]}. "
        f"{model['image_size']} px, tokens of {model['latent_dim']} channels, width {model['width']}, "
        f"{model['encoder_depth']} + {model['decoder_depth']} layers, {run['steps']} steps of {run['batch_size']} pictures; "
        f"{result['pictures']} pictures a split, {len(result['seeds'])} seeds: mean ± standard deviation.",
    ]
    shown: dict[str, tuple[str, ...]] = {"PSNR in dB / SSIM": ("psnr", "ssim")}
    for label, about in result["features"].items():
        shown[f"Fréchet distance over {about['title']}, less is better"] = (_distance(label),)
    for split, name in SPLITS.items():
        rows = {(row["tokens"], row["text"]): row for row in result["means"] if row["split"] == split}
        kinds = [kind for kind in _NAMES if any(text == kind for _, text in rows)]
        lines += ["", f"## {name[0].upper()}{name[1:]}", "", result["data"][split]]
        for title, metrics in shown.items():
            lines += ["", title, "", "| tokens | " + " | ".join(_NAMES[kind] for kind in kinds) + " |"]
            lines.append("|---:|" + "---|" * len(kinds))
            for tokens in result["tokens"]:
                cells = [_cell(rows.get((tokens, kind)), metrics) for kind in kinds]
                lines.append(f"| {tokens} | " + " | ".join(cells) + " |")
    if said := result["findings"]:
        lines += [
            "",
            "## The published direction",
            "",
            "Gains are over no text, seed by seed, more is better (of a distance: by how much it fell); ± half of the 95 % "
            "interval by Student's t.",
            "",
            "| split | what | tokens | metric | value | verdict |",
            "|---|---|---|---|---:|---|",
        ]
        for each in said:
            error = "" if each["error"] is None else f" ± {_number(each['metric'], each['error'])}"
            value = f"{_number(each['metric'], each['value'], sign=True)}{error}"
            cells = [SPLITS[each["split"]], each["question"], str(each["tokens"] or "all"), _metric_name(each["metric"])]
            lines.append(f"| {' | '.join(cells)} | {value} | {each['verdict']} |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any] | None, metrics: Sequence[str]) -> str:
    if row is None:
        return ""
    parts = []
    for name in metrics:
        std = row[f"{name}_std"]
        parts.append(_number(name, row[name]) + ("" if std is None else f" ± {_number(name, std)}"))
    return " / ".join(parts)


def _number(metric: str, value: float, sign: bool = False) -> str:
    digits = {"psnr": ".2f", "ssim": ".3f"}.get(metric, "#.3g")
    return format(value, f"{'+' if sign else ''}{digits}")


def _metric_name(metric: str) -> str:
    name, _, features = metric.partition("/")
    return {"psnr": "PSNR in dB", "ssim": "SSIM"}.get(name) or f"Fréchet distance ({features})"


def plot(result: dict[str, Any], split: str, metric: str) -> str:
    """``metric`` over the number of tokens, a line for each kind of text with bars of one standard deviation over the seeds:
    SVG."""
    series = []
    for kind, name in _NAMES.items():
        rows = [row for row in result["means"] if row["split"] == split and row["text"] == kind]
        if rows:
            points = [(float(row["tokens"]), row[metric]) for row in rows]
            series.append(Series(name, points, markers=True, errors=[row[f"{metric}_std"] or 0.0 for row in rows]))
    title = f"Reconstruction of {SPLITS[split]}"
    return line_plot(title, "tokens", _metric_name(metric), series, x_ticks=result["tokens"], log_x=True, standalone=True)
