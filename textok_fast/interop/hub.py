"""Models on the Hugging Face Hub: a model card from what the model is, and the upload. ``from_pretrained`` is the way back."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

import textok_fast
from textok_fast.config import to_dict
from textok_fast.errors import InputError
from textok_fast.files import write_text
from textok_fast.interop.convert import note_calls, unwrapped
from textok_fast.interop.softvq import ContinuousTokenizer
from textok_fast.interop.titok import TiTok
from textok_fast.modeling.dit import DiT
from textok_fast.modeling.tokenizer import TexTok

CARD_NAME = "README.md"


def _own(model: Any) -> TexTok | DiT:
    """The model itself, or the one inside an interface's object. InputError for an engine, which has no weights to save."""
    inner = model
    while not isinstance(inner, (TexTok, DiT)):
        inner = (getattr(inner, "tokenizer", None) or getattr(inner, "dit", None)) if isinstance(inner, nn.Module) else None
        if inner is None:
            raise InputError(
                f"a card is for a TexTok, a DiT or an interface around one, got {type(model).__name__}; "
                "of an engine, or around one, give the model that it was made from"
            )
    return inner


def model_card(
    model: Any,
    *,
    name: str,
    licence: str,
    data: str,
    metrics: Mapping[str, float | str] | None = None,
    limits: str = "",
) -> str:
    """The card of a model, Markdown with the Hub's front matter: sizes from the model, the rest from you.

    Args:
        model: a TexTok, a DiT, or one of this package's interfaces around one (TiTok, AutoencoderTexTok, ...).
        name: the repository's, as it is loaded by.
        licence: an identifier of the Hub's, such as "apache-2.0".
        data: what it was trained on, and under which licences.
        metrics: name -> value, such as {"PSNR, held-out compositions (dB)": 20.8}.
        limits: what it is not good for.
    """
    given, model = model, _own(model)
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if isinstance(model, TexTok):
        task, tags = "image-feature-extraction", ["image-tokenizer", "textok"]
        what = (
            f"A TexTok image tokenizer (arXiv 2412.05796): a picture of {config.image_size} px becomes {config.num_tokens} "
            f"tokens of {config.latent_dim} channels and comes back; bottleneck: {config.bottleneck}; text in: {config.text}"
            + (f", features of {config.text_encoder}." if config.text != "none" else ".")
        )
        use = f"""from textok_fast import TexTok

tok = TexTok.from_pretrained("{name}")
tokens = tok.encode(images, captions)  # (B, {config.num_tokens}, {config.latent_dim})
again = tok.decode(tokens, captions, output="uint8")"""
        if isinstance(given, (TiTok, ContinuousTokenizer)):  # which have the calls of their own code
            use = f"""from textok_fast import interop

tok = interop.load(None, "{name}")  # {type(given).__name__}
latents, *about = tok.encode(images)
again = tok.decode(latents)"""
    else:
        task, tags = "unconditional-image-generation", ["diffusion-transformer", "dit"]
        over = f"{config.num_tokens} tokens" if config.num_tokens else f"{config.sequence_length:,} patches"
        what = f"A diffusion transformer (arXiv 2212.09748) over {over} of {config.in_channels} channels."
        use = f"""from textok_fast import DiT

dit = DiT.from_pretrained("{name}")
out = dit(x, t, y)"""
    front = {"library_name": "textok-fast", "license": licence, "pipeline_tag": task, "tags": tags}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", f"# {name}", "", what, ""]
    lines += [f"{parameters:,} parameters; written by textok-fast {textok_fast.__version__}.", "", "```python", use, "```", ""]
    lines += ["## Data", "", data, ""]
    if metrics:
        lines += [
            "## Metrics",
            "",
            "| metric | value |",
            "|---|---:|",
            *(f"| {key} | {value if isinstance(value, str) else format(value, 'g')} |" for key, value in metrics.items()),
        ]
        lines.append("")
    if limits:
        lines += ["## Limits", "", limits, ""]
    lines += ["## Configuration", "", "```json", json.dumps(to_dict(config), indent=1), "```", ""]
    return "\n".join(lines)


def push_to_hub(model: Any, repository: str, *, private: bool = False, message: str = "Upload model", **card: Any) -> str:
    """Uploads config.json, model.safetensors and the card to ``repository`` (made where it is not there); returns its address.

    ``model`` and ``card``: the arguments of :func:`model_card`. Needs a token of the Hub's (`hf auth login`).
    Raises: InputError when the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    text = model_card(model, name=repository, **card)
    with tempfile.TemporaryDirectory(prefix="textok-push-") as folder:
        _own(model).save_pretrained(folder)
        note_calls(Path(folder), unwrapped(model)[1])
        write_text(Path(folder, CARD_NAME), text)
        try:
            api = HfApi()
            api.create_repo(repository, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message))
        except Exception as error:  # of the Hub's library, or of the HTTP library that its version has
            raise InputError(f"cannot push to {repository}: {(str(error) or type(error).__name__).splitlines()[0]}") from error
