"""``textok-fast evaluate``: tokenizers by what they reconstruct, generators by what they make, and pictures by their captions.

Each task leaves TASK.json, TASK.md and TASK.png in its directory, and parts/, from which a run that was stopped goes on (see
:mod:`textok_fast.evaluation.parts`, also on several processes). What cannot be computed, such as FID without Inception's
weights, is named with the reason, and the rest is computed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from textok_fast.config import GeneratorTrainConfig, from_mapping, read_yaml
from textok_fast.data import load_dataset
from textok_fast.data.degradation import degrade
from textok_fast.data.storage import is_url
from textok_fast.data.token_cache import shard_ranges
from textok_fast.errors import InputError
from textok_fast.evaluation.batches import (
    SPATIAL_STATISTICS,
    STATISTICS,
    Batch,
    DatasetPictures,
    FilePictures,
    First,
    NpzPictures,
    PictureCrop,
    Pictures,
    SampledPictures,
    open_pictures,
    write_npz,
)
from textok_fast.evaluation.downloads import download, require_sha256
from textok_fast.evaluation.features import ClipScore, FeatureNetwork, exact_convolutions, load_networks
from textok_fast.evaluation.fidelity import (
    NEIGHBOURS,
    Gaussian,
    codebook_use,
    frechet_distance,
    gaussian,
    inception_score,
    precision_recall,
)
from textok_fast.evaluation.metrics import picture_metrics
from textok_fast.evaluation.parts import Job, Parts, Processes, Progress, Stage, Values
from textok_fast.evaluation.provenance import provenance
from textok_fast.files import write_atomically, write_text
from textok_fast.inference.engine import Engine
from textok_fast.inference.pipelines import (
    PIPELINE_NAME,
    ClassToImagePipeline,
    SamplingOptions,
    SuperResolutionPipeline,
    load_pipeline,
)
from textok_fast.inference.plan import Plan
from textok_fast.interop.weights import locate
from textok_fast.modeling.autoencoder import load_tokenizer
from textok_fast.modeling.encoding import fingerprint
from textok_fast.modeling.shipped import find_model
from textok_fast.modeling.tokenizer import TexTok
from textok_fast.pictures import image_grid
from textok_fast.training.perceptual import VGG16_SHA256, VGG16_URL, load_lpips

PUBLISHED_COUNT = 50_000  # pictures of published FIDs
REFERENCE_PICTURES = 10_000  # of a reference batch, for precision and recall
FEATURE_BATCH = 64  # pictures that a feature network sees at once
GRID_PICTURES = 16
PICTURE_METRICS = (("psnr", "PSNR, dB", "higher"), ("ssim", "SSIM", "higher"), ("lpips", "LPIPS (VGG)", "lower"))
PART_SIZE = FEATURE_BATCH
LPIPS_SMALLEST = 16  # pixels
NO_CLIP = "needs a CLIP of transformers: --clip DIR, or a Hub id such as openai/clip-vit-base-patch32"


@dataclass
class Options:
    """What all tasks take.

    Attributes:
        features: "inception", "pixels", or vision models of transformers by directory or Hub id.
        inception: Inception's weights: a file, a URL, "published", or "" for the cache's; ``inception_sha256`` is checked.
        lpips_sha256: of the tasks' ``lpips``, in that order, "" for none: checked, and what a URL needs.
        count: pictures, at most; None is all of a set, and 50,000 of a generator.
        image_size: of pictures in files, where no model says it; None is the first one's.
        crop: of pictures in files: "center", or "adm", by the steps that made ADM's reference batches.
        plan: what the models run by, the feature networks on its device in float32. None: float32 on the CPU.
        batch_size: of the models.
        part_size: pictures whose results are kept together.
        npz: also write the evaluated pictures as an .npz batch.
        command: the report's; None is this process's.
        progress: called with (pictures done, in all) of this process.
    """

    features: Sequence[str] = ("inception",)
    inception: str = ""
    inception_sha256: str = ""
    lpips_sha256: Sequence[str] = ()
    count: int | None = None
    image_size: int | None = None
    crop: PictureCrop = "center"
    plan: Plan | None = None
    batch_size: int = 32
    part_size: int = PART_SIZE
    npz: bool = False
    command: str | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.count is not None and self.count < 1):
            raise InputError("batch-size and count must be at least 1")
        self.plan = Plan() if self.plan is None else self.plan

    @property
    def device(self) -> torch.device:
        assert self.plan is not None
        return torch.device(self.plan.device)


@dataclass
class Metric:
    """One number, with what it is called and which way is better. ``detail``: further numbers that belong to it. ``of``: which
    of several sets of pictures it is of, where a task compares them."""

    value: float
    title: str
    better: str  # "lower", "higher" or ""
    detail: dict[str, float] = field(default_factory=dict)
    of: str = ""


@dataclass
class Evaluation:
    """What a task found."""

    task: str
    metrics: dict[str, Metric]
    missing: dict[str, str]  # what was not computed -> why
    settings: dict[str, Any]
    notes: list[str]
    machine: dict[str, Any]
    command: str
    date: str
    files: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)

    def to_markdown(self) -> str:
        """The table, what is missing, what a reader must know, and how to repeat it."""
        columns = list(dict.fromkeys(metric.of for metric in self.metrics.values())) or [""]
        rows: dict[tuple[str, str], dict[str, str]] = {}
        for metric in self.metrics.values():
            detail = "".join(f", {name} {_number(value)}" for name, value in metric.detail.items())
            rows.setdefault((metric.title, metric.better), {})[metric.of] = f"{_number(metric.value)}{detail}"
        heads = " | ".join(column or "value" for column in columns)
        lines = [f"# Evaluation: {self.task}", "", f"| metric | {heads} | better |", "|---" * (len(columns) + 2) + "|"]
        for (title, better), cells in rows.items():
            lines.append(f"| {title} | {' | '.join(cells.get(column, '') for column in columns)} | {better} |")
        if self.missing:
            lines += ["", "Not computed:", *(f"- {name}: {reason}" for name, reason in self.missing.items())]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        lines += ["", "| setting | |", "|---|---|"]
        lines += [f"| {name.replace('_', ' ')} | {value} |" for name, value in self.settings.items()]
        gpus = ", ".join(gpu["name"] for gpu in self.machine["gpus"])
        machine = f"{self.machine['cpu']}, {self.machine['threads']} threads" + (f", {gpus}" if gpus else "")
        versions = (
            f"textok-fast {self.machine['textok_fast']}, torch {self.machine['torch']}, commit {self.machine['git_commit']}"
        )
        return "\n".join([*lines, "", f"`{self.command}`", "", f"{self.date}, {machine}; {versions}"]) + "\n"


def _number(value: float) -> str:
    if not math.isfinite(value) or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 0.01 else f"{value:.4f}" if abs(value) < 1 else f"{value:,.3f}"


# -- reconstruction ---------------------------------------------------------------------------------------------------------


class _Pair(NamedTuple):
    """Pictures and what a tokenizer makes of them."""

    originals: np.ndarray  # uint8 (n, S, S, 3)
    reconstructions: np.ndarray  # the same
    captions: list[str]  # n, "" for none
    indices: Tensor | None  # (n, N) of VQ and FSQ


def evaluate_reconstruction(
    model: str,
    images: str,
    out: Path,
    *,
    reference: str = "",
    with_captions: bool = True,
    lpips: tuple[str, str] = ("", ""),
    options: Options | None = None,
) -> Evaluation | None:
    """rFID, inception score, PSNR, SSIM, LPIPS and codebook use of a tokenizer on captioned pictures, compared as uint8.

    Args:
        model: a TexTok or an autoencoder: a directory or a Hub id.
        images: a folder, WebDataset shards, or an .npz batch, which has no captions.
        reference: an .npz reference batch for the Fréchet distance; "" compares with the originals.
        with_captions: False gives the tokenizer the null caption.
        lpips: weights of VGG16 and LPIPS' heads, as :func:`textok_fast.training.perceptual.load_lpips` takes them, URLs, or
            "published" for torchvision's VGG16; "" leaves LPIPS out.

    Returns None in processes other than the main one. InputError for what cannot be read, and for a directory with results of
    other models, pictures or settings.
    """
    options = Options() if options is None else options
    plan = cast(Plan, options.plan)
    tokenizer = load_tokenizer(model, plan.device)
    size = tokenizer.config.image_size
    pictures = open_pictures(images, size, options.count, options.crop)
    networks, missing = load_networks(options.features, options.inception, options.inception_sha256, plan.device)
    given = _open_reference(reference, size, options.crop)
    if pictures.shape != (size, size, 3):
        raise InputError(f"{images} has pictures {pictures.shape}, {model} takes {(size, size, 3)}")
    part = _reconstructor(Engine(cast(Any, tokenizer), plan), pictures, options.batch_size, with_captions)
    made_by = {"tokenizer": fingerprint(tokenizer), "precision": plan.precision, "captions": with_captions}
    made_by = {**made_by, "pictures": pictures.identity}
    comparisons = _comparisons(size, lpips, options, made_by, missing)
    stages = list(comparisons)
    if reads_captions := with_captions and isinstance(tokenizer, TexTok) and tokenizer.config.text != "none":
        stages.append(Stage("captions", made_by, lambda pair: {"given": torch.tensor([bool(text) for text in pair.captions])}))
    codes = tokenizer.bottleneck.codebook_size if isinstance(tokenizer, TexTok) else 0
    if codes:
        stages.append(Stage("codes", made_by, lambda pair: {"indices": cast(Tensor, pair.indices)}))
    for network in networks:
        run = _in_batches(network)
        if given is None:
            described = {**network.identity, "pictures": pictures.identity}
            stages.append(Stage(_stage("originals", network), described, lambda pair, run=run: run(pair.originals)))  # type: ignore[misc]
        described = {**network.identity, **made_by}
        stages.append(Stage(_stage("reconstructions", network), described, lambda pair, run=run: run(pair.reconstructions)))  # type: ignore[misc]
    if options.npz:
        stages.append(Stage("pictures", made_by, lambda pair: {"pictures": torch.from_numpy(pair.reconstructions)}))
    parts = Parts(out / "parts", options.part_size, Processes.join())
    count = len(pictures)
    parts.run([Job(count, part, stages), *_reference_jobs(given, networks)], options.progress)
    if not parts.processes.is_main:
        return None

    compared = {name: values for stage in comparisons for name, values in parts.gather(stage.name, count).items()}
    metrics = {
        name: Metric(float(compared[name].double().mean()), title, better)
        for name, title, better in PICTURE_METRICS
        if name in compared
    }
    if codes:
        use = codebook_use(parts.gather("codes", count)["indices"], codes)
        detail = {"perplexity": use.perplexity, "codes": float(use.size)}
        metrics["codebook_use"] = Metric(use.share, "codebook use, share of its codes", "higher", detail)
    notes = _count_notes(count)
    for network in networks:
        made = parts.gather(_stage("reconstructions", network), count)
        if given is None:
            against = _Reference.of(parts.gather(_stage("originals", network), count))
        else:
            against = _Reference.of_batch(given, network, parts, notes)
        metrics |= _distribution_metrics("r", network, made, against, missing, options.device, manifold=False, spatial=False)
    if missing.get("inception"):
        missing["rFID, inception score"] = missing.pop("inception")
    if isinstance(given, NpzPictures) and given.crop != (own := pictures.identity.get("crop", given.crop)):
        says = f"was cropped by {given.crop}" if given.crop else "does not say how it was cropped (ADM's batches: by adm)"
        if given.crop or own != "adm":
            notes.append(f"{given.path.name} {says}, and these pictures by {own}: see --crop.")
    settings = {
        "model": model,
        "images": images,
        "pictures": count,
        "image_size": size,
        "captions": "read" if reads_captions else "not read" if with_captions else "withheld",
        "reference": reference or "the originals",
        **_settings(options, parts),
    }
    lacking = count - int(parts.gather("captions", count)["given"].sum()) if reads_captions else 0
    if lacking:
        notes.append(f"{lacking:,} of the {count:,} pictures have no caption: the tokenizer, which reads them, had none there.")
    first = part(0, min(GRID_PICTURES // 2, count))
    shown = np.concatenate([first.originals, first.reconstructions])  # originals above, reconstructions below
    written = _write_pictures(parts, "pictures", count, out / "reconstructions.npz") if options.npz else []
    return _finish(
        "reconstruction", out, metrics, missing, settings, notes, options, shown, None, len(first.originals), written
    )


def _reconstructor(engine: Any, pictures: Pictures, batch_size: int, with_captions: bool) -> Callable[[int, int], _Pair]:
    """What reads a part of ``pictures`` and sends it through a tokenizer's engine."""

    def part(first: int, last: int) -> _Pair:
        originals, captions = pictures.read(first, last)
        made, indices = _reconstruct(engine, originals, captions if with_captions else None, batch_size)
        return _Pair(originals, made, captions or [""] * len(originals), indices)

    return part


def _reconstruct(
    engine: Any, originals: np.ndarray, captions: list[str] | None, batch_size: int
) -> tuple[np.ndarray, Tensor | None]:
    """What a tokenizer's engine makes of uint8 (n, S, S, 3), and its codes (n, N) of VQ and FSQ."""
    made, indices = [], []
    for start in range(0, len(originals), batch_size):
        rows = slice(start, start + batch_size)
        texts = None if captions is None else captions[rows]
        tokens = engine.encode(torch.from_numpy(originals[rows]), texts)
        made.append(engine.decode(tokens, texts, output="uint8").cpu().numpy())
        if tokens.indices is not None:
            indices.append(tokens.indices.cpu())
    return np.concatenate(made), torch.cat(indices) if indices else None


def _comparisons(
    size: int, lpips: tuple[str, str], options: Options, made_by: dict[str, Any], missing: dict[str, str]
) -> list[Stage[_Pair]]:
    """The stages of :data:`PICTURE_METRICS`; what cannot be computed of pictures of ``size`` px goes to ``missing``."""
    stages: list[Stage[_Pair]] = []
    try:
        picture_metrics(*[np.zeros((1, size, size, 3), np.uint8)] * 2)
        stages.append(Stage("psnr-ssim", made_by, lambda pair: picture_metrics(pair.originals, pair.reconstructions)))
    except InputError as error:  # no torchmetrics, or pictures too small for SSIM
        missing["PSNR, SSIM"] = str(error)
    if not lpips[0]:
        if any(options.lpips_sha256):
            raise InputError("--lpips-sha256 is of what --lpips names, which is not given")
        missing["LPIPS"] = (
            f"it needs VGG16's weights for ImageNet: --lpips published downloads them once (528 MB, {VGG16_URL}), "
            "--lpips FILE takes a copy"
        )
    elif size < LPIPS_SMALLEST:
        missing["LPIPS"] = f"it needs pictures of at least {LPIPS_SMALLEST} px, these have {size}"
    else:
        network = load_lpips(*_lpips_files(lpips, options.lpips_sha256)).to(options.device)
        described = {**made_by, "lpips": fingerprint(network)}
        stages.append(Stage("lpips", described, lambda pair: {"lpips": _lpips(network, pair)}))
    return stages


def _lpips_files(lpips: tuple[str, str], sha256: Sequence[str]) -> tuple[str, str]:
    """What ``load_lpips`` takes: URLs are downloaded, and what has a hash is checked."""
    if len(sha256) > sum(map(bool, lpips)):
        raise InputError(f"--lpips-sha256 has {len(sha256)} hashes of the {sum(map(bool, lpips))} that --lpips names")
    found = []
    for source, wanted in itertools.zip_longest(lpips, sha256, fillvalue=""):
        if source == "published":
            found.append(str(download(VGG16_URL, wanted or VGG16_SHA256, "lpips")))
        elif is_url(source):
            found.append(str(download(source, wanted, "lpips")))
        elif wanted and (path := locate(source)).is_dir():
            raise InputError(f"a sha256 is of a file, and {source} is a directory: name the file in it")
        else:
            found.append(str(require_sha256(path, wanted)) if wanted else source)
    return found[0], found[1]


# -- generation and text ----------------------------------------------------------------------------------------------------


@dataclass
class Sampling:
    """How a pipeline makes the samples: of the prompts, or of all classes, in turn; sample i from seed + i."""

    prompts: Sequence[str] = ()
    seed: int = 0
    steps: int = 50
    sampler: str = ""
    guidance: float = 1.0
    interval: tuple[float, float] | None = None
    guided_channels: int | None = None


class PipelinePictures:
    """What a pipeline's directory makes, kept in parts, so that no picture is made twice."""

    def __init__(self, model: str, sampling: Sampling, parts: Parts, options: Options) -> None:
        plan = cast(Plan, options.plan)
        self._pipeline = load_pipeline(model, plan.device, plan)
        if isinstance(self._pipeline, SuperResolutionPipeline):
            raise InputError(
                f"{model} makes small pictures large: `textok-fast evaluate generation --images` compares these with their "
                "originals; of what `textok-fast sample --images` wrote, --samples takes the folder"
            )
        self._parts, self._batch, self._seed = parts, options.batch_size, sampling.seed
        self._count = options.count or PUBLISHED_COUNT
        by_class = isinstance(self._pipeline, ClassToImagePipeline)
        if by_class and sampling.prompts:
            raise InputError(f"{model} generates by class, evenly over all of them: it takes no prompts")
        if not by_class and not sampling.prompts:
            raise InputError(f"{model} generates from captions: give --prompts, a file with one a line")
        self._of: Sequence[Any] = range(self._pipeline.generator.config.num_classes) if by_class else list(sampling.prompts)
        self._options = SamplingOptions(
            sampling.sampler, sampling.steps, sampling.guidance, sampling.interval, guided_channels=sampling.guided_channels
        )
        self.sampling = {**dataclasses.asdict(sampling), "prompts": list(sampling.prompts)}
        self.identity = {
            "generator": fingerprint(self._pipeline.generator),
            "tokenizer": fingerprint(self._pipeline.tokenizer),
            "precision": plan.precision,
            "step_cache": None if plan.step_cache is None else dataclasses.asdict(plan.step_cache),
            "sampling": self.sampling,
            "count": self._count,
        }
        size = self._pipeline.tokenizer.config.image_size
        self.shape = (size, size, 3)

    @property
    def stage(self) -> Stage[Batch]:
        """What keeps them; the first of a job over them."""
        return Stage(
            "samples",
            self.identity,
            lambda made: {"pictures": torch.from_numpy(made.pictures), "captions": made.captions or []},
        )

    def __len__(self) -> int:
        return self._count

    def read(self, first: int, last: int) -> Batch:
        """Of one part, from its start; what is not on the disk is made."""
        found = self._parts.load("samples", first // self._parts.size)
        if found is None:
            return self._make(first, last)
        return Batch(found["pictures"][: last - first].numpy(), found["captions"][: last - first])

    def _make(self, first: int, last: int) -> Batch:
        pictures, captions = [], []
        for start in range(first, last, self._batch):
            rows = range(start, min(start + self._batch, last))
            wanted = [self._of[row % len(self._of)] for row in rows]
            made = self._pipeline(wanted, seed=[self._seed + row for row in rows], options=self._options)
            pictures.append(made.images.cpu())
            captions += made.captions
        return Batch(torch.cat(pictures).numpy(), captions)


def evaluate_generation(
    samples: str, out: Path, *, reference: str, sampling: Sampling | None = None, options: Options | None = None
) -> Evaluation | None:
    """gFID, sFID, inception score, precision and recall of samples against a reference, by the mathematics of ADM's evaluator.

    Args:
        samples: a pipeline's directory, which then makes them, a folder of pictures, shards, or an .npz batch.
        reference: an .npz reference batch, or pictures in any of these forms.

    Returns None in processes other than the main one. InputError as for :func:`evaluate_reconstruction`.
    """
    options = Options() if options is None else options
    parts = Parts(out / "parts", options.part_size, Processes.join())
    pictures = _samples(samples, sampling, parts, options)
    networks, missing = load_networks(options.features, options.inception, options.inception_sha256, options.device)
    given = _open_reference(reference, pictures.shape[0], options.crop)
    if not networks and not options.npz:
        raise InputError(f"nothing can be computed: {missing.get('inception', 'no features were asked for')}")
    stages = _kept(pictures)
    for network in networks:
        described = {**network.identity, "pictures": pictures.identity}
        stages.append(Stage(_stage("samples", network), described, _of_batch(network)))
    count = len(pictures)
    parts.run([Job(count, pictures.read, stages), *_reference_jobs(given, networks)], options.progress)
    if not parts.processes.is_main:
        return None

    metrics: dict[str, Metric] = {}
    notes = _count_notes(count)
    for network in networks:
        made = parts.gather(_stage("samples", network), count)
        against = _Reference.of_batch(cast(Pictures, given), network, parts, notes)
        metrics |= _distribution_metrics("g", network, made, against, missing, options.device)
    if missing.get("inception"):
        missing["gFID, sFID, inception score, precision, recall"] = missing.pop("inception")
    settings = {"samples": samples, "pictures": count, "image_size": pictures.shape[0], "reference": reference}
    settings |= _sampling_settings(pictures) | _settings(options, parts)
    written = _write_npz(pictures, parts.size, out / "samples.npz") if options.npz else []
    shown = pictures.read(0, min(GRID_PICTURES, count))
    return _finish("generation", out, metrics, missing, settings, notes, options, shown.pictures, shown.captions, 4, written)


def is_super_resolution(samples: str) -> bool:
    """Whether these are a pipeline that reads small pictures: :func:`evaluate_super_resolution` is for it."""
    try:
        about = json.loads((find_model(samples) / PIPELINE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(about, dict) and "low_resolution" in about


def evaluate_text(
    samples: str, out: Path, *, clip: str = "", sampling: Sampling | None = None, options: Options | None = None
) -> Evaluation | None:
    """The CLIP score of pictures and their captions.

    Args:
        samples: a pipeline's directory, or a folder or shards of captioned pictures, as ``textok-fast sample`` writes.
        clip: a CLIP of transformers: a directory, a Hub id or "ID@REVISION". Without one, ``options.npz`` is all that is done.

    Returns None in processes other than the main one. InputError as for :func:`evaluate_reconstruction`, for pictures without
    captions, and where there is nothing to do.
    """
    options = Options() if options is None else options
    if not clip and not options.npz:
        raise InputError(f"nothing can be computed: the CLIP score {NO_CLIP}")
    parts = Parts(out / "parts", options.part_size, Processes.join())
    pictures = _samples(samples, sampling, parts, options)
    stages = _kept(pictures)
    settings: dict[str, Any] = {"samples": samples, "pictures": len(pictures)}
    if clip:
        scorer = ClipScore(clip, options.device)

        def score(batch: Batch) -> dict[str, Tensor]:
            captions = batch.captions
            if captions is None or not all(captions):
                raise InputError(f"{samples} has pictures without a caption: a CLIP score compares each with its own")
            rows = [slice(start, start + FEATURE_BATCH) for start in range(0, len(captions), FEATURE_BATCH)]
            return {"score": torch.cat([scorer(batch.pictures[row], captions[row]) for row in rows])}

        stages.append(Stage("clip", {**scorer.identity, "pictures": pictures.identity}, score))
        settings["clip"] = scorer.source
    count = len(pictures)
    parts.run([Job(count, pictures.read, stages)], options.progress)
    if not parts.processes.is_main:
        return None
    metrics, missing = {}, {}
    if clip:
        scores = parts.gather("clip", count)["score"].double()
        error = float(scores.std() / math.sqrt(count)) if count > 1 else 0.0
        metrics["clip_score"] = Metric(float(scores.mean()), f"CLIP score ({clip})", "higher", {"standard error": error})
    else:
        missing["CLIP score"] = f"it {NO_CLIP}"
    settings |= _sampling_settings(pictures) | _settings(options, parts)
    written = _write_npz(pictures, parts.size, out / "samples.npz") if options.npz else []
    shown = pictures.read(0, min(GRID_PICTURES, count))
    return _finish("text", out, metrics, missing, settings, [], options, shown.pictures, shown.captions, 4, written)


def captions_of(images: str | Path) -> list[str]:
    """The captions of a folder or of shards, by key, no picture being decoded; InputError where there are none."""
    pictures = open_pictures(images, image_size=8)
    captions = [each for each in pictures.captions if each] if isinstance(pictures, FilePictures | SampledPictures) else []
    if not captions:
        raise InputError(f"the pictures of {images} have no captions")
    return captions


def write_reference(images: str, out: Path, options: Options | None = None) -> dict[str, Any] | None:
    """Writes an .npz reference batch of a set of pictures, as ADM's: statistics of all of them, and 10,000 (or all) of them.

    Statistics of another Inception than the published carry its sha256, and are used with that one only. Parts are kept beside
    it, in NAME.parts/. Returns None in processes other than the main one. InputError as for :func:`evaluate_reconstruction`.
    """
    options = Options() if options is None else options
    if out.suffix != ".npz":
        raise InputError(f"a reference batch is an .npz file, got {out}")
    pictures = open_pictures(images, options.image_size, options.count, options.crop)
    networks, missing = load_networks(["inception"], options.inception, options.inception_sha256, options.device)
    if missing:
        raise InputError(missing["inception"])
    network, count = networks[0], len(pictures)
    parts = Parts(out.with_suffix(".parts"), options.part_size, Processes.join())
    stage = Stage(_stage("reference", network), {**network.identity, "pictures": pictures.identity}, _of_batch(network))
    parts.run([Job(count, pictures.read, [stage])], options.progress)
    if not parts.processes.is_main:
        return None
    features = parts.gather(stage.name, count)
    statistics: dict[str, np.ndarray] = {}
    for (mean, covariance), name in ((STATISTICS, "pool"), (SPATIAL_STATISTICS, "spatial")):
        statistics[mean], statistics[covariance] = gaussian(features[name])
    statistics["inception_sha256"] = np.array(network.identity["sha256"])
    if "crop" in pictures.identity:
        statistics["crop"] = np.array(options.crop)
    kept = _spread(count)
    write_npz(out, (len(kept), *pictures.shape), (pictures.read(row, row + 1).pictures for row in kept), statistics)
    made = {"out": str(out), "pictures": count, "kept": len(kept), "crop": options.crop, "features": network.title}
    return {**made, **provenance(options.command)}


# -- super-resolution -------------------------------------------------------------------------------------------------------


class _Enlarged:
    """A part of the pictures, made small, and what each way makes of these: what ``parts`` has is not made again."""

    def __init__(self, first: int, originals: np.ndarray, small: np.ndarray, captions: list[str], parts: Parts) -> None:
        self.first, self.originals, self.small, self.captions = first, originals, small, captions
        self._parts = parts
        self._made: dict[str, np.ndarray] = {}

    def made(self, way: _Way) -> np.ndarray:
        """uint8 (n, S, S, 3)."""
        if way.name not in self._made:
            found = self._parts.load(way.stage, self.first // self._parts.size)
            self._made[way.name] = way.make(self) if found is None else found["pictures"][: len(self.originals)].numpy()
        return self._made[way.name]


class _Way(NamedTuple):
    """One way from small pictures to large ones."""

    name: str  # in the names of its stages and metrics
    title: str  # of its column
    identity: dict[str, Any]
    make: Callable[[_Enlarged], np.ndarray]  # -> uint8 (n, S, S, 3)

    @property
    def stage(self) -> str:
        """What keeps its pictures."""
        return f"samples-{self.name}"


def evaluate_super_resolution(
    model: str,
    out: Path,
    *,
    images: str = "",
    reference: str = "",
    strength: float | None = None,
    lpips: tuple[str, str] = ("", ""),
    sampling: Sampling | None = None,
    options: Options | None = None,
) -> Evaluation | None:
    """PSNR, SSIM, LPIPS and Fréchet distances of what a super-resolution pipeline makes of worn, small pictures, against the
    originals: without captions, with them, guided by them, and beside these bicubic upscaling and what the pipeline's tokenizer
    makes of the originals, which is the most that can be reached.

    Args:
        model: the pipeline's directory.
        images: captioned pictures as :func:`evaluate_reconstruction` takes them. "": the split that its training did not see,
            of the data in config.yaml beside the directory.
        reference: for the Fréchet distance, as there.
        strength: of the degradations; None: what the pipeline was trained on. Picture i is worn by (``sampling.seed``, i).
        lpips: as there.
        sampling: picture i is made from seed + i; guidance 1 guides nothing. Prompts are the pictures' captions.

    Returns None in processes other than the main one. InputError as for :func:`evaluate_reconstruction`.
    """
    options, sampling = options or Options(), sampling or Sampling()
    plan = cast(Plan, options.plan)
    pipeline = load_pipeline(model, plan.device, plan)
    if not isinstance(pipeline, SuperResolutionPipeline):
        raise InputError(f"{model} reads no small pictures: there is nothing to compare its samples with, picture by picture")
    if sampling.prompts:
        raise InputError("super-resolution is told the pictures' own captions: it takes no prompts")
    size = pipeline.tokenizer.config.image_size
    pictures, source = _high_resolution(model, images, size, options)
    if pictures.shape != (size, size, 3):
        raise InputError(f"{source} has pictures {pictures.shape}, {model} makes {(size, size, 3)}")
    networks, missing = load_networks(options.features, options.inception, options.inception_sha256, plan.device)
    given = _open_reference(reference, size, options.crop)
    strength = pipeline.strength if strength is None else strength
    wear: dict[str, Any] = {"scale": size // pipeline.size, "strength": strength, "seed": sampling.seed}
    wear_of = {"pictures": pictures.identity, "degradation": wear}
    ways = _ways(pipeline, sampling, options, wear_of, missing, pictures.read(0, 1).captions is not None)
    parts = Parts(out / "parts", options.part_size, Processes.join())

    def part(first: int, last: int) -> _Enlarged:
        originals, captions = pictures.read(first, last)
        small = [degrade(picture, index=first + i, **wear) for i, picture in enumerate(originals)]
        return _Enlarged(first, originals, np.stack(small), captions or [""] * len(originals), parts)

    compared = _comparisons(size, lpips, options, {}, missing)
    stages: list[Stage[_Enlarged]] = []
    for way in ways:
        stages.append(Stage(way.stage, way.identity, lambda part, way=way: {"pictures": torch.from_numpy(part.made(way))}))  # type: ignore[misc]
        for stage in compared:
            compare = functools.partial(_compare, stage, way)
            stages.append(Stage(f"{stage.name}-{way.name}", {**stage.identity, **way.identity}, compare))
    stages.append(Stage("captions", wear_of, lambda part: {"given": torch.tensor([bool(text) for text in part.captions])}))
    for network in networks:
        run = _in_batches(network)
        if given is None:
            described = {**network.identity, "pictures": pictures.identity}
            stages.append(Stage(_stage("originals", network), described, lambda part, run=run: run(part.originals)))  # type: ignore[misc]
        for way in ways:
            described = {**network.identity, **way.identity}
            stages.append(Stage(_stage(way.name, network), described, lambda part, run=run, way=way: run(part.made(way))))  # type: ignore[misc]
    count = len(pictures)
    parts.run([Job(count, part, stages), *_reference_jobs(given, networks)], options.progress)
    if not parts.processes.is_main:
        return None

    metrics: dict[str, Metric] = {}
    compared_of: dict[str, dict[str, Tensor]] = {way.name: {} for way in ways}
    for way, stage in itertools.product(ways, compared):
        gathered = parts.gather(f"{stage.name}-{way.name}", count)
        compared_of[way.name] |= {name: values.double() for name, values in gathered.items()}
    notes = _count_notes(count)
    for way in ways:
        own = compared_of[way.name]
        for name, title, better in PICTURE_METRICS:
            if name in own:
                metrics[f"{name}/{way.name}"] = _mean(own[name], title, better, way.title)
        if "psnr" in own and way.name != "bicubic":
            gain = own["psnr"] - compared_of["bicubic"]["psnr"]
            metrics[f"psnr_gain/{way.name}"] = _mean(gain, "PSNR over bicubic's, dB", "higher", way.title)
        if "psnr" in own and way.name == "guided":
            gain = own["psnr"] - compared_of["captioned"]["psnr"]
            metrics["psnr_gain_of_guidance/guided"] = _mean(gain, "PSNR over guidance 1's, dB", "higher", way.title)
        for network in networks:
            made = parts.gather(_stage(way.name, network), count)
            if given is None:
                against = _Reference.of(parts.gather(_stage("originals", network), count))
            else:
                against = _Reference.of_batch(given, network, parts, notes)
            of_way = _distribution_metrics("g", network, made, against, missing, options.device, manifold=False, spatial=False)
            metrics |= {f"{name}/{way.name}": dataclasses.replace(metric, of=way.title) for name, metric in of_way.items()}
    if missing.get("inception"):
        missing["gFID, inception score"] = missing.pop("inception")
    lacking = count - int(parts.gather("captions", count)["given"].sum())
    if lacking:
        notes.append(f"{lacking:,} of the {count:,} pictures have no caption: they were made without one everywhere.")
    settings = {
        "samples": model,
        "images": source,
        "pictures": count,
        "image_size": size,
        **wear,
        "reference": reference or "the originals",
        **{name: value for name, value in dataclasses.asdict(sampling).items() if name != "prompts"},
        **_settings(options, parts),
        **({} if images else {"crop": "as in the training"}),
    }
    first = part(0, min(GRID_PICTURES // 2, options.part_size, count))
    large = first.small.repeat(wear["scale"], axis=1).repeat(wear["scale"], axis=2)
    shown = np.concatenate([large, *map(first.made, ways), first.originals])
    titles = [way.title for way in ways]
    notes.append(
        f"generation.png, from above: the small pictures, {', '.join(f'*{title}*' for title in titles)}, the originals."
    )
    main = next(way for name in ("guided", "captioned", "uncaptioned") for way in ways if way.name == name)
    written = _write_pictures(parts, main.stage, count, out / "samples.npz") if options.npz else []
    return _finish("generation", out, metrics, missing, settings, notes, options, shown, None, len(first.originals), written)


def _ways(
    pipeline: SuperResolutionPipeline,
    sampling: Sampling,
    options: Options,
    wear_of: dict[str, Any],
    missing: dict[str, str],
    captioned: bool,
) -> list[_Way]:
    """Those that make sense: with captions only where something reads them."""
    plan, tokenizer = cast(Plan, options.plan), pipeline.tokenizer
    made_by = {
        **wear_of,
        "generator": fingerprint(pipeline.generator),
        "tokenizer": fingerprint(tokenizer),
        "precision": plan.precision,
        "step_cache": None if plan.step_cache is None else dataclasses.asdict(plan.step_cache),
        "sampling": {**dataclasses.asdict(sampling), "prompts": [], "guidance": 1.0},
    }

    def enlarge(part: _Enlarged, with_captions: bool, guidance: float) -> np.ndarray:
        chosen = SamplingOptions(
            sampling.sampler, sampling.steps, guidance, sampling.interval, guided_channels=sampling.guided_channels
        )
        made = []
        for start in range(0, len(part.small), options.batch_size):
            rows = slice(start, start + options.batch_size)
            texts = part.captions[rows] if with_captions else None
            seeds = [sampling.seed + part.first + row for row in range(len(part.small))[rows]]
            made.append(pipeline(part.small[rows], texts, seed=seeds, options=chosen).images.cpu().numpy())
        return np.concatenate(made)

    def bicubic(part: _Enlarged) -> np.ndarray:
        size = part.originals.shape[2], part.originals.shape[1]
        return np.stack([np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)) for small in part.small])

    ways = [_Way("bicubic", "bicubic", wear_of, bicubic)]
    ways.append(_Way("uncaptioned", "no caption", {**made_by, "captions": False}, lambda part: enlarge(part, False, 1.0)))
    reads = bool(pipeline.generator.config.text_dim) or (isinstance(tokenizer, TexTok) and tokenizer.config.text != "none")
    if not reads or not captioned:
        missing["with captions"] = "the pictures have none" if reads else "neither the generator nor its tokenizer reads them"
    else:
        known = {**made_by, "captions": True}
        ways.append(_Way("captioned", "caption", known, lambda part: enlarge(part, True, 1.0)))
        if not pipeline.generator.config.text_dim:
            missing["guided by captions"] = "the generator reads none, its tokenizer alone does"
        elif sampling.guidance == 1:
            missing["guided by captions"] = "give --guidance, such as 2"
        else:
            guided = {**known, "guidance": sampling.guidance}
            title = f"caption, guidance {sampling.guidance:g}"
            ways.append(_Way("guided", title, guided, lambda part: enlarge(part, True, sampling.guidance)))
    engine: Any = Engine(cast(Any, tokenizer), plan)
    kept = {
        "pictures": wear_of["pictures"],
        "tokenizer": made_by["tokenizer"],
        "precision": plan.precision,
        "captions": captioned,
    }

    def reconstruct(part: _Enlarged) -> np.ndarray:
        return _reconstruct(engine, part.originals, part.captions if captioned else None, options.batch_size)[0]

    return [*ways, _Way("tokenizer", "tokenizer alone, of the originals", kept, reconstruct)]


def _compare(stage: Stage[_Pair], way: _Way, part: _Enlarged) -> Values:
    return stage.compute(_Pair(part.originals, part.made(way), part.captions, None))


def _mean(values: Tensor, title: str, better: str, of: str) -> Metric:
    """Of (n,) pictures."""
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0
    return Metric(float(values.mean()), title, better, {"standard error": error}, of)


def _high_resolution(model: str, images: str, size: int, options: Options) -> tuple[Pictures, str]:
    """The pictures to make small and large again, and what they are called."""
    if images:
        return open_pictures(images, size, options.count, options.crop), images
    from textok_fast.training.generator import held_out_split

    file = find_model(model).parent / "config.yaml"
    if not file.is_file():
        raise InputError(
            f"give --images, pictures of {size} px: there is no {file}, which would say what {model} was trained on"
        )
    config = from_mapping(GeneratorTrainConfig, read_yaml(file))
    split = held_out_split(config)
    found = DatasetPictures(load_dataset(config.data, split), size)
    where = config.data.validation_path or config.data.path or config.data.source
    source = f"the {split} split of {where}, which training did not see"
    count = options.count
    return found if count is None or count == len(found) else First(found, count), source


# -- what the tasks share ---------------------------------------------------------------------------------------------------


class _Reference(NamedTuple):
    """What samples are compared with, over one network's features."""

    pool: Gaussian | None
    spatial: Gaussian | None
    manifold: Tensor | None  # (R, D), at most 10,000 pictures' pool features

    @classmethod
    def of(cls, features: dict[str, Tensor]) -> _Reference:
        """Of pictures' own features."""
        pool, spatial = features["pool"], features.get("spatial")
        if len(pool) < 2:
            return cls(None, None, pool)
        return cls(gaussian(pool), None if spatial is None else gaussian(spatial), pool[_spread(len(pool))])

    @classmethod
    def of_batch(cls, given: Pictures, network: FeatureNetwork, parts: Parts, notes: list[str]) -> _Reference:
        """Of a reference: its statistics where they are of this network, else those of its pictures."""
        features = parts.gather(_stage("reference", network), len(given)) if len(given) else None
        pool = given.statistics(STATISTICS) if isinstance(given, NpzPictures) else None
        if not isinstance(given, NpzPictures) or pool is None:
            return cls(None, None, None) if features is None else cls.of(features)
        if given.inception_sha256 == network.identity.get("sha256"):
            manifold = None if features is None else features["pool"][_spread(len(given))]
            return cls(pool, given.statistics(SPATIAL_STATISTICS), manifold)
        notes.append(
            f"The statistics in {given.path.name} are not of {network.title}: its {len(given):,} pictures stand in for them."
        )
        return cls(None, None, None) if features is None else cls.of(features)


def _spread(count: int) -> list[int]:
    """The indices of 10,000 of ``count`` pictures, evenly spread; of all where there are no more."""
    kept = min(count, REFERENCE_PICTURES)
    return [row * count // kept for row in range(kept)]


def _distribution_metrics(
    kind: str,
    network: FeatureNetwork,
    made: dict[str, Tensor],
    against: _Reference,
    missing: dict[str, str],
    device: torch.device,
    manifold: bool = True,
    spatial: bool = True,
) -> dict[str, Metric]:
    """By the names that the network's features allow: FID is of Inception's published weights only."""
    found: dict[str, Metric] = {}
    own = "" if network.is_fid else f"/{network.label}"
    of = "" if network.is_fid else f" over {network.title}"
    distance = (f"{kind}fid", f"{kind}FID") if network.is_fid else (f"frechet_distance{own}", f"Fréchet distance{of}")
    if against.pool is None:
        missing[distance[1]] = "the reference has neither statistics nor two pictures"
    else:
        found[distance[0]] = Metric(frechet_distance(gaussian(made["pool"]), against.pool), distance[1], "lower")
    if spatial and "spatial" in made:
        named = ("sfid", "sFID") if network.is_fid else (f"spatial_frechet_distance{own}", f"spatial Fréchet distance{of}")
        if against.spatial is None:
            missing[named[1]] = "the reference has no statistics of the spatial features (mu_s, sigma_s)"
        else:
            found[named[0]] = Metric(frechet_distance(gaussian(made["spatial"]), against.spatial), named[1], "lower")
    logits = network.logits(made["pool"])
    if logits is not None:
        score = inception_score(logits)
        detail = {"over splits": float(score.splits), "std": score.std}
        found[f"inception_score{own}"] = Metric(score.mean, f"inception score{of}", "higher", detail)
    if not manifold:
        return found
    if against.manifold is None or min(len(against.manifold), len(made["pool"])) <= NEIGHBOURS:
        missing[f"precision, recall{of}"] = f"more than {NEIGHBOURS} pictures of the reference and of the samples are needed"
        return found
    shares = precision_recall(against.manifold.to(device), made["pool"].to(device))
    for name, value in zip(("precision", "recall"), shares, strict=True):
        found[f"{name}{own}"] = Metric(value, f"{name}{of}", "higher")
    return found


def _open_reference(reference: str, size: int, crop: PictureCrop) -> Any:
    """A reference batch or set of pictures; None for "". Statistics alone are enough."""
    if not reference:
        return None
    return NpzPictures(reference) if reference.endswith(".npz") else open_pictures(reference, size, crop=crop)


def _reference_jobs(given: Pictures | None, networks: Sequence[FeatureNetwork]) -> list[Job[Any]]:
    if given is None or not len(given):
        return []
    stages = [
        Stage(_stage("reference", network), {**network.identity, "pictures": given.identity}, _of_batch(network))
        for network in networks
    ]
    return [Job(len(given), given.read, stages)]


def _samples(samples: str, sampling: Sampling | None, parts: Parts, options: Options) -> Pictures:
    if (find_model(samples) / PIPELINE_NAME).is_file():
        return PipelinePictures(samples, sampling or Sampling(), parts, options)
    if sampling is not None and sampling.prompts:
        raise InputError(f"{samples} holds pictures, which take no prompts: give a pipeline's directory")
    return open_pictures(samples, options.image_size, options.count, options.crop)


@torch.no_grad()
def _lpips(network: nn.Module, pair: _Pair) -> Tensor:
    """(n,) distances of originals and reconstructions."""
    device = next(network.parameters()).device
    found = []
    for start in range(0, len(pair.originals), FEATURE_BATCH):
        rows = slice(start, start + FEATURE_BATCH)
        both = [torch.from_numpy(side[rows]).permute(0, 3, 1, 2).to(device) for side in (pair.originals, pair.reconstructions)]
        with exact_convolutions():
            found.append(network(both[1] / 127.5 - 1, both[0] / 127.5 - 1).cpu())
    return torch.cat(found)


def _kept(pictures: Pictures) -> list[Stage[Batch]]:
    return [pictures.stage] if isinstance(pictures, PipelinePictures) else []


def _in_batches(network: FeatureNetwork) -> Callable[[np.ndarray], dict[str, Tensor]]:
    def run(pictures: np.ndarray) -> dict[str, Tensor]:
        found = [network(pictures[start : start + FEATURE_BATCH]) for start in range(0, len(pictures), FEATURE_BATCH)]
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    return run


def _of_batch(network: FeatureNetwork) -> Callable[[Batch], dict[str, Tensor]]:
    run = _in_batches(network)
    return lambda batch: run(batch.pictures)


def _stage(what: str, network: FeatureNetwork) -> str:
    return f"{what}-{re.sub(r'[^A-Za-z0-9_.-]+', '_', network.label)}"


def _count_notes(count: int) -> list[str]:
    if count >= PUBLISHED_COUNT:
        return []
    return [
        f"{count:,} pictures: Fréchet distances are biased upward by small numbers. Compare equal numbers only; published are "
        f"{PUBLISHED_COUNT:,}."
    ]


def _settings(options: Options, parts: Parts) -> dict[str, Any]:
    plan = cast(Plan, options.plan)
    return {
        "precision": plan.precision,
        "device": str(plan.device),
        "features": ", ".join(options.features),
        "crop": options.crop,
        "processes": parts.processes.world,
        "batch_size": options.batch_size,
        "part_size": options.part_size,
    }


def _sampling_settings(pictures: Pictures) -> dict[str, Any]:
    if not isinstance(pictures, PipelinePictures):
        return {}
    return {**pictures.sampling, "prompts": len(pictures.sampling["prompts"])}


def _write_npz(pictures: Pictures, part_size: int, path: Path) -> list[Path]:
    ranges = shard_ranges(len(pictures), part_size)
    write_npz(path, (len(pictures), *pictures.shape), (pictures.read(first, last).pictures for _, first, last in ranges))
    return [path]


def _write_pictures(parts: Parts, name: str, count: int, path: Path) -> list[Path]:
    def read() -> Iterator[np.ndarray]:
        for number, _, _ in shard_ranges(count, parts.size):
            found = parts.load(name, number)
            if found is not None:
                yield found["pictures"].numpy()

    first = next(read())
    write_npz(path, (count, *first.shape[1:]), read())
    return [path]


def _finish(
    task: str,
    out: Path,
    metrics: dict[str, Metric],
    missing: dict[str, str],
    settings: dict[str, Any],
    notes: list[str],
    options: Options,
    shown: np.ndarray,
    captions: list[str] | None,
    columns: int,
    written: list[Path],
) -> Evaluation:
    """Writes the report and its pictures."""
    found = Evaluation(task, metrics, missing, settings, notes, **provenance(options.command))
    grid = image_grid(shown, columns, captions)
    write_atomically(out / f"{task}.png", lambda path: grid.save(path, format="PNG"))
    files = [out / f"{task}.json", out / f"{task}.md", out / f"{task}.png", *written]
    found.files = [str(file) for file in files]
    write_text(files[0], json.dumps(found.to_dict(), indent=1, ensure_ascii=False) + "\n")
    write_text(files[1], found.to_markdown())
    return found
