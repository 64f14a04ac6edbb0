"""Whole folders at once: pictures to tokens, tokens to pictures, conditions to pictures. Every one of them can be interrupted
and run again: what is complete is kept."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from textok_fast.config import DataConfig, to_dict
from textok_fast.data import load_dataset
from textok_fast.data.token_cache import (
    TokenDataset,
    claim_index,
    encode_range,
    read_index,
    shard_ranges,
    write_token_shards,
)
from textok_fast.errors import InputError
from textok_fast.files import write_atomically
from textok_fast.inference.pipelines import ClassToImagePipeline, SamplingOptions, load_pipeline
from textok_fast.modeling.encoding import encode_function, token_identity
from textok_fast.modeling.tokenizer import TexTok

Progress = Callable[[int, int], None]


def encode_folder(
    model: str,
    images: str,
    out: Path,
    format: Literal["safetensors", "webdataset"] = "safetensors",
    batch_size: int = 32,
    shard_size: int = 1024,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes the tokens of all captioned pictures in ``images`` to ``out``.

    ``format`` "safetensors": shards of :mod:`textok_fast.data.token_cache`. "webdataset": tokens-000000.tar with, for each
    picture, key.npy (tokens (N, d) float32), key.txt (the caption), key.cls, and key.indices.npy for VQ and FSQ.
    """
    _require_at_least_one(batch_size=batch_size, shard_size=shard_size)
    tokenizer = TexTok.from_pretrained(model, device=device)
    is_shards = images.endswith(".tar")
    if not is_shards and not Path(images).is_dir():
        raise InputError(f"no folder {images}; wanted a folder of captioned pictures or WebDataset shards (*.tar)")
    config = DataConfig(source="webdataset" if is_shards else "folder", path=images, image_size=tokenizer.config.image_size)
    dataset = load_dataset(config, "all")
    identity = token_identity(tokenizer, to_dict(config))
    encode = encode_function(tokenizer)
    if format == "safetensors":
        reused = write_token_shards(
            out, dataset, encode, identity=identity, batch_size=batch_size, shard_size=shard_size, progress=progress
        )
    else:
        out.mkdir(parents=True, exist_ok=True)
        claim_index(out, {**identity, "count": len(dataset), "shard_size": shard_size, "format": "webdataset"})
        reused = 0
        for number, first, last in shard_ranges(len(dataset), shard_size):
            path = out / f"tokens-{number:06d}.tar"
            if path.exists():
                reused += 1
            else:
                tensors, keys, captions = encode_range(dataset, encode, first, last, batch_size, progress, len(dataset))
                write_atomically(path, lambda target, parts=(tensors, keys, captions): _write_tar(target, *parts))  # type: ignore[misc]
            if progress is not None:
                progress(last, len(dataset))
    return {
        "out": str(out),
        "pictures": len(dataset),
        "tokens": [tokenizer.config.num_tokens, tokenizer.config.latent_dim],
        "shards_reused": reused,
        "skipped": dataset.skipped,
    }


def decode_folder(
    model: str,
    tokens: Path,
    out: Path,
    batch_size: int = 32,
    with_captions: bool = True,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Decodes what :func:`encode_folder` wrote, in either format, into ``out``/<key>.png; pictures that are there are kept."""
    _require_at_least_one(batch_size=batch_size)
    if not tokens.is_dir():
        raise InputError(f"no directory {tokens}; wanted one that `textok-fast encode` wrote")
    tokenizer = TexTok.from_pretrained(model, device=device)
    index = read_index(tokens)
    wanted = token_identity(tokenizer, {})["tokenizer"]
    if index.get("tokenizer") != wanted:
        raise InputError(f"the tokens in {tokens} were made by another tokenizer than {model}: decoding them would give noise")
    keys, captions, values = _read_tar_tokens(tokens) if index.get("format") == "webdataset" else _read_shard_tokens(tokens)
    out.mkdir(parents=True, exist_ok=True)
    missing = [i for i, key in enumerate(keys) if not (out / f"{key}.png").exists()]
    for start in range(0, len(missing), batch_size):
        rows = missing[start : start + batch_size]
        given = [captions[i] for i in rows] if with_captions else None
        pictures = tokenizer.decode(values[rows], given, output="uint8").cpu().numpy()  # (b, S, S, 3)
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
    device: str = "cpu",
    batch_size: int = 32,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Generates ``count`` pictures for each prompt or label: ``out``/00000.png, ..., tokens.safetensors and samples.json."""
    _require_at_least_one(count=count, steps=steps)
    pipeline = load_pipeline(model, device)
    by_class = isinstance(pipeline, ClassToImagePipeline)
    wanted: list[Any] = (
        [int(label) if label.lstrip("-").isdigit() else label for label in labels] if by_class else list(prompts)
    )
    if by_class and prompts and not labels:
        raise InputError(f"{model} generates by class: give --label, not --prompt")
    if not by_class and labels:
        raise InputError(f"{model} generates from captions: give --prompt, not --label")
    if not wanted:
        raise InputError("give at least one --label" if by_class else "give at least one --prompt")
    wanted = [item for item in wanted for _ in range(count)]
    existing = out / "samples.json"
    if existing.exists():
        raise InputError(f"{out} holds samples already; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    options = SamplingOptions(sampler, steps, guidance, interval)
    parts: list[Tensor] = []
    listed: list[dict[str, Any]] = []
    total = -(-len(wanted) // batch_size) * steps
    for start in range(0, len(wanted), batch_size):
        batch = wanted[start : start + batch_size]
        done = start // batch_size * steps
        made = pipeline(
            batch,
            seed=[seed + start + i for i in range(len(batch))],
            options=options,
            progress=None if progress is None else lambda step, of, done=done: progress(done + step * steps // of, total),  # type: ignore[misc]
        )
        for i, picture in enumerate(made.images.cpu().numpy()):
            name = f"{start + i:05d}.png"
            save_png(picture, out / name)
            listed.append({"image": name, "for": batch[i], "caption": made.captions[i], "seed": made.seeds[i]})
        parts.append(made.tokens.cpu())
    tokens = torch.cat(parts).contiguous()  # (B, N, d)
    write_atomically(out / "tokens.safetensors", lambda path: save_file({"tokens": tokens}, path))
    about = {"model": model, "sampler": options.sampler or "default", "steps": steps, "guidance": guidance, "samples": listed}
    text = json.dumps(about, indent=1, ensure_ascii=False)
    write_atomically(existing, lambda path: path.write_text(text, encoding="utf-8"))
    return {**about, "images": [str(out / item["image"]) for item in listed], "tokens": str(out / "tokens.safetensors")}


def save_png(picture: np.ndarray, path: Path) -> None:
    """(S, S, 3) uint8 to a PNG that is complete or not there."""
    write_atomically(path, lambda target: Image.fromarray(picture).save(target, format="PNG"))


def _require_at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise InputError(f"{name.replace('_', '-')} must be at least 1, got {value}")


def _read_shard_tokens(directory: Path) -> tuple[list[str], list[str], Tensor]:
    dataset = TokenDataset(directory)
    return dataset.keys, dataset.captions, dataset.tokens


def _write_tar(path: Path, tensors: dict[str, Tensor], keys: list[str], captions: list[str]) -> None:
    def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))

    def npy(array: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        return buffer.getvalue()

    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for row, (key, caption) in enumerate(zip(keys, captions, strict=True)):
            add(archive, f"{key}.npy", npy(tensors["tokens"][row].numpy()))
            if "indices" in tensors:
                add(archive, f"{key}.indices.npy", npy(tensors["indices"][row].numpy()))
            add(archive, f"{key}.txt", caption.encode())
            add(archive, f"{key}.cls", str(int(tensors["labels"][row])).encode())


def _read_tar_tokens(directory: Path) -> tuple[list[str], list[str], Tensor]:
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
                    if member.name.endswith(".txt"):
                        keys.append(member.name[:-4])
                        captions.append(data.decode())
                    elif member.name.endswith(".npy") and not member.name.endswith(".indices.npy"):
                        values.append(torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False)))
        except (tarfile.TarError, OSError, ValueError) as error:
            raise InputError(f"cannot read the token shard {path}: {error}; remove it and encode again") from None
    return keys, captions, torch.stack(values)  # (B, N, d)
