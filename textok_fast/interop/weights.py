"""Reads other people's weights: a file, a directory, a Hub id or a state dict, without running anything that is in them."""

from __future__ import annotations

import argparse
import contextlib
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from textok_fast.errors import InputError
from textok_fast.interop.schedulers import SCHEDULER_NAME

Source = str | Path | Mapping[str, Any]
# Of a directory the first that is there; what else ends so is taken when it is alone.
NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.bin")
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
NESTS = ("ema", "model_ema", "model", "state_dict", "module")  # under which training scripts keep the tensors, best first
PIPELINE_NAME = "model_index.json"  # of diffusers' pipelines, whose parts lie in directories beside it
OWN_PIPELINE_NAME = "pipeline.json"  # of ours
WRAPPERS = ("module.", "_orig_mod.", "model.")  # before every name, of DataParallel, torch.compile and training frameworks
INDEX = ".index.json"  # ends the name of the file that says in which of several files each tensor is


class Weights(NamedTuple):
    """``state``: tensors by name; ``config``: what config.json beside them says, else empty; ``source``: for messages."""

    state: dict[str, Tensor]
    config: dict[str, Any]
    source: str


def read_weights(source: Source) -> Weights:
    """The tensors of a model, as its authors save them.

    Args:
        source: a .safetensors file, a file of ``torch.save`` (read ``weights_only``), a directory with one of
            them, a Hub id ("owner/name", or with a folder or a file behind it), or a mapping from name to tensor.

    Raises: InputError when there is nothing, and for a file that is not what it claims: cut short, a web page, a pickle that
        holds anything else than tensors. Nothing in such a file is run.
    """
    kind: type = type(source)
    if not issubclass(kind, (str, Path, Mapping)):
        wanted = "a file, a directory, a Hub id or a mapping from name to tensor"
        raise InputError(f"weights are {wanted}, got {kind.__name__}")
    if isinstance(source, Mapping):
        return Weights(_tensors(source, "the given mapping"), {}, "the given state dict")
    path = locate(source)
    refuse_pipeline(path, source)
    file = _file_in(path) if path.is_dir() else path
    found: Any = _sharded(file) if file.name.endswith(INDEX) else _read(file)
    return Weights(_tensors(found, str(file)), _config_beside(file), str(file))


def refuse_pipeline(path: Path, shown: str | Path, diffusers_too: bool = True) -> None:
    """InputError, naming a part, for a pipeline's directory: of this library, or of diffusers."""
    if (path / OWN_PIPELINE_NAME).is_file():
        part = next((part for part in ("generator", "transformer") if (path / part).is_dir()), "generator")
        raise InputError(f"{shown} is a pipeline of this library: name one of its parts, such as {shown}/{part}")
    if diffusers_too and (path / PIPELINE_NAME).is_file():
        raise InputError(f"{shown} is a pipeline of diffusers: name one of its parts, such as {shown}/transformer")


def _read(file: Path) -> Any:
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is no safetensors file ({_hint(file) or error})") from None
    if file.suffix in PICKLES:
        return _unpickled(file)
    raise InputError(f"{file}: wanted a .safetensors file, or one of torch.save ({', '.join(PICKLES)})")


def _sharded(index: Path) -> dict[str, Any]:
    """The tensors of all files that ``index`` names, each of which lies beside it."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} does not say in which file each tensor is (weight_map): {error}") from None
    if strange := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise InputError(f"{index} names {strange[0]!r}, which is no file beside it")
    if lacking := [name for name in names if not (index.parent / name).is_file()]:
        raise InputError(f"{index.parent} lacks {', '.join(lacking[:4])}, which {index.name} names")
    found: dict[str, Any] = {}
    for name in names:
        found |= _read(index.parent / name)
    if missing := [key for key in places if key not in found]:
        raise InputError(f"{index.parent}: no file has {missing[0]}, which {index.name} says is in {places[missing[0]]}")
    return found


def locate(source: str | Path) -> Path:
    """A file or directory as it is, a Hub id downloaded to the Hub's cache; InputError where there is none."""
    path = Path(source).expanduser()
    return path if path.exists() else from_hub(str(source))


def _unpickled(file: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # of training checkpoints; holds settings and runs nothing
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if hint := _hint(file):
            raise InputError(f"{file} is no file of torch.save ({hint})") from None
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {wanted[1]}" if wanted else "it is no pickle of tensors and their names"
        raise InputError(
            f"{file} holds something else than tensors, and nothing of it was run: {reason}. If it is a training checkpoint "
            "that you trust, save its tensors alone: torch.save(model.state_dict(), ...)"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = _hint(file) or "it is cut short, or something else"
        raise InputError(f"{file} is no file of torch.save ({reason})") from error


def _hint(file: Path) -> str:
    """What a file is instead, where its first bytes tell."""
    try:
        with file.open("rb") as stream:
            head = stream.read(512)
    except OSError:
        return ""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.match(rb"<(!doctype|\?xml|html|head|body|title|meta|script)\b|<!--", text, re.IGNORECASE):
        return "it is a web page: the download needs another address or a login"
    if re.match(rb"[\[{]\s*[\"\[{\]}]", text):
        return f"it is JSON, such as a server's answer: {' '.join(text.decode(errors='replace').split())[:80]}"
    with contextlib.suppress(zipfile.BadZipFile, OSError), zipfile.ZipFile(file) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            return "it is a TorchScript program, which is not run: save the tensors of its state_dict() alone"
    if text.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS: `git lfs pull` fetches the file itself"
    return "it is empty" if not head else ""


def _tensors(found: Any, source: str) -> dict[str, Tensor]:
    """Tensors by name, out of whatever nest and without wrappers' prefixes."""
    for _ in range(3):
        nest = next((name for name in NESTS if isinstance(found, Mapping) and _may_hold_tensors(found.get(name))), None)
        if nest is None:
            break
        found = found[nest]
    if not isinstance(found, Mapping):
        raise InputError(f"{source} holds a {type(found).__name__}, wanted tensors by name")
    state = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not state:
        raise InputError(f"{source} holds no tensors by name; its entries: {', '.join(map(str, list(found)[:6])) or 'none'}")
    while any(all(name.startswith(prefix) for name in state) for prefix in WRAPPERS):
        prefix = next(prefix for prefix in WRAPPERS if all(name.startswith(prefix) for name in state))
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _may_hold_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(each, (Tensor, Mapping)) for each in value.values())


def _file_in(directory: Path) -> Path:
    for name in NAMES:
        for there in (name, f"{name}{INDEX}"):
            if (directory / there).is_file():
                return directory / there
    others = sorted(path for path in directory.iterdir() if path.suffix in (".safetensors", *PICKLES))
    if len(others) != 1:
        found = f"{len(others)} of them ({', '.join(path.name for path in others[:4])}): name one" if others else "none"
        raise InputError(f"{directory}: wanted one file of weights ({', '.join(NAMES)}, or another), found {found}")
    return others[0]


def _config_beside(file: Path) -> dict[str, Any]:
    beside = file.parent / "config.json"
    if not beside.is_file():
        return {}
    try:
        values = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {beside}, which is beside the weights: {_hint(beside) or error}") from None
    return values if isinstance(values, dict) else {}


def from_hub(name: str) -> Path:
    """A file or a snapshot of weights and configuration from the Hub's cache, downloaded where it is not there."""
    plain = re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w./-]+)?", name) and not {"", ".", ".."} & set(name.rstrip("/").split("/"))
    if not plain or name.startswith("~"):
        raise InputError(
            f"no weights at {name}: wanted a file, a directory, or a Hub id such as owner/name, owner/name/folder or "
            "owner/name/file.pt"
        )
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    owner, repository, *rest = name.split("/", 2)
    inside = PurePosixPath(rest[0]) if rest else PurePosixPath()
    try:
        if inside.suffix in (".safetensors", *PICKLES):
            file = Path(hf_hub_download(f"{owner}/{repository}", str(inside)))
            with contextlib.suppress(EntryNotFoundError):  # not every file has one beside it
                hf_hub_download(f"{owner}/{repository}", str(inside.parent / "config.json"))
            return file
        names = ["config.json", "*.safetensors", "*.bin", f"*{INDEX}", PIPELINE_NAME, "*/config.json", SCHEDULER_NAME]
        wanted = [str(inside / pattern) for pattern in names]
        if inside.name == "transformer":  # of a pipeline, which says how it was trained
            wanted += [str(inside.parent / name) for name in (PIPELINE_NAME, SCHEDULER_NAME)]
        return Path(snapshot_download(f"{owner}/{repository}", allow_patterns=wanted)) / inside
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"no file or directory {name}, and the Hub has none or cannot be reached: {reason}") from None
