"""Whole folders at once: pictures to tokens, tokens to pictures, conditions to pictures. Every one of them can be interrupted
and run again: what is complete is kept."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from textok_fast.config import DataConfig, to_dict
from textok_fast.data import data_of, load_dataset
from textok_fast.data.base import CaptionedImages
from textok_fast.data.token_cache import (
    TokenDataset,
    captions_identity,
    claim_index,
    read_index,
    read_skipped,
    shard_ranges,
)
from textok_fast.errors import InputError
from textok_fast.files import only_writer, save_tensors, write_atomically, write_text
from textok_fast.inference.encode_job import EncodeJob, Format, run_here, run_processes, run_ray
from textok_fast.inference.engine import Engine
from textok_fast.inference.pipelines import (
    AnyPipeline,
    ClassToImagePipeline,
    SamplingOptions,
    SuperResolutionPipeline,
    load_pipeline,
)
from textok_fast.inference.plan import Plan
from textok_fast.modeling.autoencoder import load_tokenizer, token_shape
from textok_fast.modeling.encoding import fingerprint, reads_captions, token_identity

PLAN_NAME = "plan.json"

Progress = Callable[[int, int], None]


def encode_folder(
    model: str,
    images: str | DataConfig,
    out: Path,
    format: Format = "safetensors",
    batch_size: int = 32,
    shard_size: int = 1024,
    plan: Plan | None = None,
    progress: Progress | None = None,
    workers: int = 1,
    ray: str | None = None,
    captions: int = 0,
) -> dict[str, Any]:
    """Writes the tokens of all captioned pictures in ``images`` to ``out``, and the plan to ``out``/plan.json.

    A tokenizer whose encoder reads no text takes pictures without a caption too, of which the stored caption is "". Of several
    captions the first ``captions`` are (0: all), each with the tokens that it makes, or all beside those of the picture alone.

    ``images``: a folder as :class:`~textok_fast.data.FolderDataset` reads it, or WebDataset shards: a .tar file, a pattern of
    them, a URL, or a directory that holds .tar files and no pictures; or the configuration of any source, whose image size and
    seed are the tokenizer's and the caller's.

    ``model``: a TexTok, or an autoencoder, whose latents (C, h, w) are then the tokens.

    ``format`` "safetensors": shards of :mod:`textok_fast.data.token_cache`. "webdataset": tokens-000000.tar with, for each
    picture, key.npy (tokens (N, d) float32), key.txt (the captions, one a line), key.cls, and key.indices.npy for VQ and FSQ;
    of a second caption that makes others, key.1.npy and key.1.indices.npy, and so on. The keys of
    pictures that turn out to be corrupt are in tokens-*.skipped.json.

    ``workers``: processes of this machine; with ``ray``, the address of a cluster (:func:`encode_job.run_ray`), actors of it, 0
    for as many as it has room for. However many write, and whoever of them is killed in between, the files are the same.

    ``plan``: what the tokenizer runs by; None is float32 on the CPU. Tokens of another precision are other tokens: raises
    InputError when ``out`` holds such, or those of another tokenizer or of other pictures, or is being written to.
    """
    _require_at_least_one(batch_size=batch_size, shard_size=shard_size)
    if ray is None:
        _require_at_least_one(workers=workers)
    if captions < 0:
        raise InputError(f"captions must be at least 0, got {captions}")
    plan = Plan() if plan is None else plan
    tokenizer = load_tokenizer(model, plan.device)
    config = data_of(images) if isinstance(images, str) else images
    config = dataclasses.replace(config, image_size=tokenizer.config.image_size)
    dataset = load_dataset(config, "all", need_captions=reads_captions(tokenizer))
    # The data are known by their content, however their folder is spelled today.
    identity = {**token_identity(tokenizer, {**to_dict(config), "path": ""}), **_unless_fp32(plan)}
    identity |= {"content": dataset.content_hash(), "count": len(dataset), "shard_size": shard_size}
    identity |= captions_identity(dataset, captions)
    identity |= {"drawn_by_seed": None} if format == "safetensors" else {"format": format}
    with only_writer(out, ".tokens-*"):
        claim_index(out, identity)
        job = EncodeJob(model, dataset, out, format, batch_size, shard_size, plan, captions)
        missing = job.missing()
        reused = len(shard_ranges(len(dataset), shard_size)) - len(missing)
        before = len(dataset) - sum(map(job.count, missing))
        skipped = Counter(dataset.skipped)  # those of shards are counted from their lists
        done: dict[int, int] = {}

        def advance(number: int, pictures: int) -> None:
            done[number] = pictures
            if progress is not None:
                progress(before + sum(done.values()), len(dataset))

        if missing:
            plan.save(out / PLAN_NAME)
        if progress is not None and before:
            progress(before, len(dataset))
        if ray is not None:
            run_ray(job, missing, advance, workers, ray)
        elif min(workers, len(missing)) > 1:
            run_processes(job, missing, advance, workers)
        else:
            run_here(job, missing, advance, tokenizer)
    skipped["corrupt image"] += len(read_skipped(out))
    return {
        "out": str(out),
        "pictures": len(dataset) - len(read_skipped(out)),
        "tokens": list(token_shape(tokenizer)),
        "shards_reused": reused,
        "skipped": {reason: count for reason, count in skipped.items() if count},
    }


def decode_folder(
    model: str,
    tokens: Path,
    out: Path,
    batch_size: int = 32,
    with_captions: bool = True,
    plan: Plan | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Decodes what :func:`encode_folder` wrote, in either format, into ``out``/<key>.png; pictures that are there are kept.

    Of a picture with several captions the tokens of the first are decoded. ``out``/decoded.json records what they were decoded
    from, ``out``/plan.json the plan they were decoded by (None: float32 on the CPU). Raises InputError when ``tokens`` is not
    complete, was made by another tokenizer, or ``out`` holds pictures of these names that were decoded from something else.
    """
    _require_at_least_one(batch_size=batch_size)
    if not tokens.is_dir():
        raise InputError(f"no directory {tokens}; wanted one that `textok-fast encode` wrote")
    plan = Plan() if plan is None else plan
    tokenizer = load_tokenizer(model, plan.device)
    index = read_index(tokens)
    wanted = token_identity(tokenizer, {})["tokenizer"]
    if index.get("tokenizer") != wanted:
        raise InputError(f"the tokens in {tokens} were made by another tokenizer than {model}: decoding them would give noise")
    read = _read_tar_tokens if index.get("format") == "webdataset" else _read_shard_tokens
    keys, captions, tokens_of = read(tokens)
    found = len(keys) + len(read_skipped(tokens))
    if found != index.get("count"):
        raise InputError(
            f"{tokens} holds {found} of {index.get('count')} pictures: run the same `textok-fast encode` again to finish it"
        )
    hashed = hashlib.sha256(json.dumps([keys, captions]).encode())
    for _, first, last in shard_ranges(len(keys), 1024):
        hashed.update(tokens_of(range(first, last)).numpy().tobytes())
    digest = hashed.hexdigest()[:32]
    missing = [i for i, key in enumerate(keys) if not (out / f"{key}.png").exists()]
    made_of = {"tokenizer": wanted, "tokens": digest, "captions": with_captions, **_unless_fp32(plan)}
    _claim_pictures(out, made_of, new=len(missing) == len(keys))
    engine: Any = Engine(cast(Any, tokenizer), plan)
    if missing:
        plan.save(out / PLAN_NAME)
    for start in range(0, len(missing), batch_size):
        rows = missing[start : start + batch_size]
        given = [captions[i] for i in rows] if with_captions else None
        pictures = engine.decode(tokens_of(rows), given, output="uint8").cpu().numpy()  # (b, S, S, 3)
        for row, picture in zip(rows, pictures, strict=True):
            save_png(picture, out / f"{keys[row]}.png")
        if progress is not None:
            progress(start + len(rows), len(missing))
    return {"out": str(out), "pictures": len(keys), "new": len(missing)}


def sample_to_folder(
    model: str,
    prompts: Sequence[str],
    labels: Sequence[str],
    out: Path,
    *,
    count: int = 1,
    seed: int = 0,
    steps: int = 50,
    sampler: str = "",
    guidance: float = 1.0,
    interval: tuple[float, float] | None = None,
    guided_channels: int | None = None,
    plan: Plan | None = None,
    batch_size: int = 32,
    images: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Generates ``count`` pictures for each prompt, label or small picture: ``out``/00000.png, ..., tokens.safetensors,
    samples.json and plan.json.

    A generator of super-resolution takes ``images``, a folder or shards of small pictures, brought to the size it reads, with
    captions or without; ``prompts``, one a picture, stand in for these.

    A generator by class takes ``labels`` (a class's name before its index), and ``prompts`` only as the captions that the
    decoder reads, one a label. After each batch everything is on the disk: the same call again goes on behind the last picture
    that is listed in samples.json. ``plan``: what both models run by; None is float32 on the CPU. Raises InputError when
    ``out`` holds samples made otherwise, also in another precision or with another step cache.
    """
    _require_at_least_one(count=count, steps=steps, batch_size=batch_size)
    plan = Plan() if plan is None else plan
    pipeline = load_pipeline(model, plan.device, plan)
    small = _small_pictures(pipeline, images, model)
    by_class = isinstance(pipeline, ClassToImagePipeline)
    if by_class and not labels:
        raise InputError(f"{model} generates by class: give --label" + (", not --prompt" if prompts else ""))
    if not by_class and labels:
        raise InputError(f"{model} generates from captions: give {'--prompt' if small is None else '--images'}, not --label")
    if not by_class and small is None and not prompts:
        raise InputError("give at least one --prompt")
    named = labels if small is None else [small.key(row) for row in range(len(small))]
    if (by_class or small is not None) and prompts and len(prompts) != len(named):
        whose = "by class and decodes with the prompts" if by_class else "from pictures and their captions"
        raise InputError(
            f"{model} generates {whose}: give one --prompt for each {'--label' if by_class else 'picture'}, or none; "
            f"got {len(prompts)} for {len(named)}"
        )
    wanted = [item for item in (named if by_class or small is not None else prompts) for _ in range(count)]
    captions = [prompt for prompt in prompts for _ in range(count)] if (by_class or small is not None) and prompts else None
    settings = {
        "generator": fingerprint(pipeline.generator),
        "tokenizer": fingerprint(pipeline.tokenizer),
        "sampler": sampler or "default",
        "steps": steps,
        "guidance": guidance,
        "guidance_interval": None if interval is None else list(interval),
        "guided_channels": guided_channels or pipeline.generator.config.guided_channels,
        "seed": seed,
        "precision": plan.precision,
        "step_cache": None if plan.step_cache is None else dataclasses.asdict(plan.step_cache),
        "for": wanted,
        "captions": captions,
        **({} if small is None else {"pictures": small.content_hash()}),
    }
    listed, tokens = _finished_samples(out, settings)
    before = len(listed)

    def write_listing() -> None:
        text = json.dumps({"model": model, **settings, "samples": listed}, indent=1, ensure_ascii=False)
        write_text(out / "samples.json", text + "\n")

    options = SamplingOptions(sampler, steps, guidance, interval, guided_channels=guided_channels)
    total = -(-(len(wanted) - before) // batch_size) * steps
    for number, start in enumerate(range(before, len(wanted), batch_size)):
        rows = range(start, min(start + batch_size, len(wanted)))
        done = number * steps
        extra: dict[str, Any] = {} if captions is None else {"captions": [captions[row] for row in rows]}
        given: Any = [wanted[row] for row in rows]
        if small is not None:
            found = small.fetch([row // count for row in rows])
            examples = [example for example in found if example is not None]
            if len(examples) < len(found):
                raise InputError(f"the picture {wanted[rows[found.index(None)]]} of {images} cannot be read: remove it")
            given = torch.stack([torch.from_numpy(example.image) for example in examples])  # (b, s, s, 3)
            extra.setdefault("captions", [example.caption for example in examples])
        made = cast(Any, pipeline)(
            given,
            seed=[seed + row for row in rows],
            options=options,
            progress=None if progress is None else lambda step, of, done=done: progress(done + step * steps // of, total),
            **extra,
        )
        if not listed:
            write_listing()  # from here on the directory is ours
        plan.save(out / PLAN_NAME)
        for i, picture in enumerate(made.images.cpu().numpy()):
            name = f"{rows[i]:05d}.png"
            save_png(picture, out / name)
            listed.append({"image": name, "for": wanted[rows[i]], "caption": made.captions[i], "seed": made.seeds[i]})
        tokens.append(made.tokens.cpu())
        # The listing last: what it names is there, with its tokens.
        save_tensors({"tokens": torch.cat(tokens).contiguous()}, out / "tokens.safetensors")  # (B, N, d)
        write_listing()
    return {
        "model": model,
        **settings,
        "samples": listed,
        "images": [str(out / item["image"]) for item in listed],
        "tokens": str(out / "tokens.safetensors"),
        "new": len(listed) - before,
    }


def _small_pictures(pipeline: AnyPipeline, images: str | None, model: str) -> CaptionedImages | None:
    """What a pipeline of super-resolution starts from, at its size; None for the others."""
    if not isinstance(pipeline, SuperResolutionPipeline):
        if images is not None:
            raise InputError(f"{model} is no super-resolution: it reads no --images")
        return None
    if images is None:
        raise InputError(f"{model} makes pictures of {pipeline.size} px larger: give --images")
    return load_dataset(data_of(images, image_size=pipeline.size), "all", need_captions=False)


def _unless_fp32(plan: Plan) -> dict[str, Any]:
    """What a plan adds to the description of its results; nothing else in it changes a tokenizer's by more than rounding."""
    return {} if plan.precision == "fp32" else {"precision": plan.precision}


def _finished_samples(out: Path, settings: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """What an interrupted run listed, up to the first picture that is gone, and its tokens: one tensor, or none."""
    file = out / "samples.json"
    if not file.exists():
        if out.is_dir() and any(out.iterdir()):
            raise InputError(f"{out} holds files that `textok-fast sample` did not make; choose another --out")
        return [], []
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        listed = list(found["samples"])
        if not listed:
            return [], []
        found = {"precision": "fp32", "guided_channels": 0, **found}  # listings of earlier versions do not say so
        changed = [name for name, value in settings.items() if found.get(name) != value]
        tokens = load_file(out / "tokens.safetensors")["tokens"]
        count = next((i for i, item in enumerate(listed) if not (out / item["image"]).exists()), len(listed))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise InputError(f"cannot read the samples in {out} ({error}); choose another --out") from None
    if changed:
        raise InputError(f"{out} holds samples made otherwise ({', '.join(changed)} differ); choose another --out")
    if len(tokens) < count:
        raise InputError(f"{out / 'tokens.safetensors'} has tokens of {len(tokens)} of {count} samples; choose another --out")
    return listed[:count], [tokens[:count]]


def _claim_pictures(out: Path, made_of: dict[str, Any], new: bool) -> None:
    """Writes decoded.json, or checks that the pictures in ``out`` were decoded from the same. ``new``: none is there yet."""
    file = out / "decoded.json"
    if not new:
        try:
            same = json.loads(file.read_text(encoding="utf-8")) == made_of
        except (OSError, ValueError):
            same = False
        if not same:
            raise InputError(f"{out} holds pictures that were not decoded from these tokens in this way; choose another --out")
    write_text(file, json.dumps(made_of, indent=1) + "\n")


def save_png(picture: np.ndarray, path: Path) -> None:
    """(S, S, 3) uint8 to a PNG that is complete or not there."""
    write_atomically(path, lambda target: Image.fromarray(picture).save(target, format="PNG"))


def _require_at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise InputError(f"{name.replace('_', '-')} must be at least 1, got {value}")


# Keys, captions, and what gives the tokens (b, N, d) of rows.
_Tokens = tuple[list[str], list[str], Callable[[Sequence[int]], Tensor]]


def _read_shard_tokens(directory: Path) -> _Tokens:
    dataset = TokenDataset(directory)
    return dataset.keys, dataset.captions, lambda rows: torch.stack([dataset[row]["tokens"] for row in rows])


def _read_tar_tokens(directory: Path) -> _Tokens:
    keys, captions, values = [], [], []
    paths = sorted(directory.glob("tokens-*.tar"))
    if not paths:
        raise InputError(f"{directory} holds no token shards (tokens-000000.tar, ...)")
    for path in paths:
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    file = archive.extractfile(member)
                    data = file.read() if file is not None else b""
                    key, _, suffix = member.name.partition(".")  # keys have no dot
                    if suffix == "txt":
                        keys.append(key)
                        captions.append(data.decode().partition("\n")[0])
                    elif suffix == "npy":  # of the first caption
                        values.append(torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False)))
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            raise InputError(f"cannot read the token shard {path}: {error}; remove it and encode again") from None
    if not len(values) == len(keys) > 0 or len({value.shape for value in values}) != 1:
        raise InputError(f"the token shards in {directory} are empty or do not fit together; encode again")
    return keys, captions, lambda rows: torch.stack([values[row] for row in rows])
