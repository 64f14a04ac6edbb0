"""``from_pretrained`` and ``save_pretrained``: config.json and model.safetensors in a directory or on the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from textok_fast.config import from_mapping, to_dict
from textok_fast.errors import InputError
from textok_fast.files import save_tensors, write_text
from textok_fast.modeling.shipped import find_model, shipped_names

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")  # of huggingface_hub's downloads

NO_WEIGHTS = "this model was loaded from exported programs, which do not give their weights: save the one it was exported from"


class PretrainedMixin(nn.Module):
    """Adds saving and loading to a module whose ``config`` is a dataclass of type ``config_class``."""

    config_class: type
    model_type: str
    folder: str  # of a pipeline's directory, where such a model lies
    config: Any

    def save_pretrained(self, directory: str | Path, notes: Mapping[str, Any] | None = None) -> Path:
        """Writes config.json and model.safetensors; each file replaces an old one only when complete. Returns the directory.

        ``notes``: further entries of config.json for other libraries, with names in ``_``, which :meth:`from_pretrained` skips.
        Raises: InputError, before anything is written, for a model whose weights are not here but in exported programs.
        """
        directory = Path(directory)
        state = {key: value.detach().contiguous() for key, value in self.state_dict().items()}
        if any(value.is_meta for value in state.values()):
            raise InputError(NO_WEIGHTS)
        directory.mkdir(parents=True, exist_ok=True)
        save_tensors(state, directory / WEIGHTS_NAME, metadata={"format": "pt"})
        text = json.dumps({"model_type": self.model_type, **to_dict(self.config), **(notes or {})}, indent=2) + "\n"
        write_text(directory / CONFIG_NAME, text)
        return directory

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        subfolder: str = "",
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        **hub: Any,
    ) -> Self:
        """Loads a directory that :meth:`save_pretrained` wrote, a pipeline's directory's model of this kind, a Hub repository
        by id, or weights that come with the package by their name ("textok-mini"), in eval mode.

        Args:
            subfolder: of the directory or the repository.
            dtype: of the weights then; None as they were saved.
            hub: :data:`HUB_OPTIONS`.

        Raises: InputError when there is no such model, it is of another kind, or a weight is missing, unexpected or of
            another shape.
        """
        directory = cls.within(locate(source, [CONFIG_NAME, WEIGHTS_NAME], subfolder, **hub))
        values = read_config(directory, f"a saved {cls.__name__}")
        kind = values.pop("model_type", values.get("_class_name"))  # diffusers'
        values = {name: value for name, value in values.items() if not name.startswith("_")}
        if kind != cls.model_type:
            raise InputError(f"{directory} holds a model of type {kind!r}, wanted {cls.model_type!r} ({cls.__name__})")
        model = cls(from_mapping(cls.config_class, values))
        try:
            state = load_file(directory / WEIGHTS_NAME)
        except FileNotFoundError:
            raise InputError(f"{directory} has no {WEIGHTS_NAME}") from None
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot read {directory / WEIGHTS_NAME}: {error}") from None
        load_state(model, state, str(directory))
        return model.to(device=device, dtype=dtype).eval()

    @classmethod
    def within(cls, directory: Path) -> Path:
        """Where in a pipeline's directory such a model lies; another directory as it is."""
        inner = directory / cls.folder
        return inner if not (directory / CONFIG_NAME).is_file() and (inner / CONFIG_NAME).is_file() else directory


def read_config(directory: Path, what: str = "a saved model") -> dict[str, Any]:
    """config.json of a directory; InputError where there is none, or it holds something else."""
    try:
        values = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{directory} has no {CONFIG_NAME}: it is not {what}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {directory / CONFIG_NAME}: {error}") from None
    return values if isinstance(values, dict) else {}


def load_state(model: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """``load_state_dict`` whose errors name the key: missing, unexpected or of another shape."""
    wanted = model.state_dict()
    problems = [f"missing {key}" for key in wanted if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in wanted]
    problems += [
        f"{key} has the shape {tuple(state[key].shape)}, wanted {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    if problems:
        raise misfit(f"the weights in {source} do not fit {type(model).__name__}", problems)
    model.load_state_dict(state)


def misfit(what: str, problems: list[str]) -> InputError:
    """The error that lists the first of ``problems``."""
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return InputError(f"{what}: {'; '.join(problems[:3])}{more}")


def locate(source: str | Path, files: Sequence[str], subfolder: str = "", **hub: Any) -> Path:
    """A local directory or one that comes with the package, or a Hub id's ``files`` (patterns) downloaded to the Hub's cache;
    the ``subfolder`` of either.

    ``hub``: :data:`HUB_OPTIONS`. Raises: InputError where there is none, the Hub cannot be reached, or for another option.
    """
    if unknown := sorted(set(hub) - set(HUB_OPTIONS)):
        raise InputError(f"unknown options {', '.join(unknown)}; known: {', '.join(HUB_OPTIONS)}")
    path = find_model(source)
    if path.is_dir():
        return path / subfolder
    name = str(source)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(
            f"no model at {source}: wanted a directory with {CONFIG_NAME}, a Hub id such as owner/name, or one of "
            f"{', '.join(shipped_names()) or 'the names that come with the package, of which this install has none'}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [f"{subfolder.strip('/')}/{file}" if subfolder else file for file in files]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, **hub)) / subfolder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"no directory {source}, and the Hub has no such model or cannot be reached: {str(error).splitlines()[0]}"
        ) from None
