"""The networks that evaluation looks at pictures with, each under a name that says what it is.

A Fréchet distance is called FID only over :class:`InceptionNetwork` with the published weights; over anything else it is named
after that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textok_fast.errors import InputError
from textok_fast.evaluation.inception import find_inception, load_inception
from textok_fast.modeling.encoding import fingerprint

HUB_TIMEOUT = 20  # seconds, for the question whether there is such a model
PIXEL_GRID = 8  # pixels: of PixelNetwork, 3 x 8 x 8 = 192 numbers
RANDOM_STAGES = (16, 32, 48, 64, 96)  # channels of RandomNetwork's stages, each at half the size of the one before: 256 numbers


class FeatureNetwork(Protocol):
    """Pictures -> features of fixed size.

    Attributes:
        label: short and unique among the networks of a run; names its results.
        title: what the features are, in words.
        is_fid: whether a Fréchet distance over ``pool`` is FID.
        identity: what tells it from other networks, JSON-ready.
    """

    label: str
    title: str
    is_fid: bool
    identity: dict[str, Any]

    def __call__(self, pictures: np.ndarray) -> dict[str, Tensor]:
        """uint8 (B, H, W, 3) -> float32 on the CPU: ``pool`` (B, D), and ``spatial`` (B, D_s) for Inception."""
        ...

    def logits(self, pool: Tensor) -> Tensor | None:
        """(B, D) -> (B, classes) of a classifier; None for other networks."""
        ...


class InceptionNetwork:
    """Inception's pool_3 and mixed_6/conv; FID's own if the weights are the published file, by its sha256."""

    def __init__(self, source: str = "", sha256: str = "", device: str | torch.device = "cpu") -> None:
        weights = load_inception(find_inception(source, sha256), device)
        self.network, self.device = weights.network, device
        self.is_fid = weights.published
        self.label = "inception" if self.is_fid else f"inception-{weights.sha256[:8]}"
        self.title = "Inception's pool_3" if self.is_fid else f"pool_3 of an Inception of other weights ({weights.sha256[:8]})"
        self.identity = {"network": "inception", "sha256": weights.sha256}

    def __call__(self, pictures: np.ndarray) -> dict[str, Tensor]:
        with exact_convolutions():
            found = self.network(torch.from_numpy(pictures).permute(0, 3, 1, 2).to(self.device))
        return {"pool": found.pool.cpu(), "spatial": found.spatial.cpu()}

    def logits(self, pool: Tensor) -> Tensor:
        return torch.cat([self.network.logits(part.to(self.device)).cpu() for part in pool.split(4096)])


class PixelNetwork:
    """The picture itself, averaged to 8 x 8 pixels in [0, 1]: colours and layout, and no weights to get."""

    label, is_fid = "pixels", False
    title = f"the pixels, averaged to {PIXEL_GRID} x {PIXEL_GRID}"

    def __init__(self) -> None:
        self.identity: dict[str, Any] = {"network": "pixels", "grid": PIXEL_GRID}

    def __call__(self, pictures: np.ndarray) -> dict[str, Tensor]:
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
        return {"pool": F.adaptive_avg_pool2d(pixels, PIXEL_GRID).flatten(1)}

    def logits(self, pool: Tensor) -> None:
        return None


class RandomNetwork:
    """A small convolutional network with fixed random weights: edges, textures and shapes at five scales, no weights to get.

    Random features tell sets of pictures apart where those trained on ImageNet do not fit (Naeem et al. 2020, arXiv 2002.09797,
    section 5.1, with a VGG16). Here: five stages of two 3 x 3 convolutions and ReLU, halved by averaging between them, each
    stage's mean over the picture. Weights are He-normal, from torch's CPU generator with seed 0; their hash is in ``identity``.
    """

    label, is_fid = "random", False
    title = "the spatial means of a convolutional network with fixed random weights"

    def __init__(self, device: str | torch.device = "cpu") -> None:
        generator, before = torch.Generator().manual_seed(0), 3
        self.stages = nn.ModuleList()
        for width in RANDOM_STAGES:
            layers: list[nn.Module] = []
            for channels in (before, width):
                layer = nn.Conv2d(channels, width, 3, padding=1, bias=False)
                layer.weight.data = (2 / (9 * channels)) ** 0.5 * torch.randn(layer.weight.shape, generator=generator)
                layers += [layer, nn.ReLU()]
            self.stages.append(nn.Sequential(*layers))
            before = width
        self.identity = {"network": "random", "weights": fingerprint(self.stages)}
        self.stages.requires_grad_(False).to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray) -> dict[str, Tensor]:
        if min(pictures.shape[1:3]) < 16:
            raise InputError(f"random features halve pictures four times: at least 16 x 16 px, got {pictures.shape[1:3]}")
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1
        means = []
        with exact_convolutions():
            for index, stage in enumerate(self.stages):
                x = stage(F.avg_pool2d(x, 2) if index else x)
                means.append(x.mean(dim=(2, 3)))
        return {"pool": torch.cat(means, dim=1).cpu()}  # (B, 256)

    def logits(self, pool: Tensor) -> None:
        return None


class TransformersNetwork:
    """The pooled features of a vision model of transformers (DINOv2, a CLIP's image tower, a ViT), by directory, Hub id or
    "ID@REVISION"."""

    is_fid = False

    def __init__(self, source: str, device: str | torch.device = "cpu") -> None:
        self.network, self.processor, _ = _load_transformers(source, "AutoModel", "AutoImageProcessor")
        self.network = getattr(self.network, "vision_model", self.network).to(device)
        self.device = device
        self.label = source.rstrip("/").rsplit("/", 1)[-1]
        self.title = f"the pooled features of {source}"
        self.identity = {"network": self.label, "weights": fingerprint(self.network)}

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray) -> dict[str, Tensor]:
        given = self.processor(images=list(pictures), return_tensors="pt")
        with exact_convolutions():
            out = self.network(given["pixel_values"].to(self.device))
        pooled = getattr(out, "pooler_output", None)
        return {"pool": (out.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)).float().cpu()}

    def logits(self, pool: Tensor) -> None:
        return None


class ClipScore:
    """100 max(cos(picture, caption), 0) of a CLIP of transformers (Hessel et al. 2021, arXiv 2104.08718, without their 2.5).

    Captions are cut at the length that the model reads. Values of different CLIPs cannot be compared. ``source`` is then what
    was loaded: a directory, or ID@COMMIT of the Hub.
    """

    def __init__(self, source: str, device: str | torch.device = "cpu") -> None:
        self.network, self.processor, self.source = _load_transformers(source, "CLIPModel", "AutoProcessor")
        self.network, self.device = self.network.to(device), device
        self.title = f"CLIP {source}"
        self.longest = int(self.network.config.text_config.max_position_embeddings)
        name = self.source.partition("@")[0].rstrip("/").rsplit("/", 1)[-1]  # the same weights are the same, pinned or not
        self.identity = {"clip": name, "weights": fingerprint(self.network)}

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray, captions: Sequence[str]) -> Tensor:
        """uint8 (B, H, W, 3) and B captions -> scores (B,) float32 on the CPU."""
        options = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": self.longest}
        given = self.processor(text=list(captions), images=list(pictures), **options)
        with exact_convolutions():
            out = self.network(**{name: value.to(self.device) for name, value in given.items()})
        cosine = F.cosine_similarity(out.image_embeds.float(), out.text_embeds.float(), dim=-1)
        return 100 * cosine.clamp_min(0).cpu()  # (B,)


def load_networks(
    names: Sequence[str], inception: str = "", sha256: str = "", device: str | torch.device = "cpu"
) -> tuple[list[FeatureNetwork], dict[str, str]]:
    """The networks of "inception", "pixels", "random" and others by directory, Hub id or "ID@REVISION" (a branch, a tag or a
    commit), and why one cannot be had.

    ``inception``, ``sha256``: as in :func:`~textok_fast.evaluation.inception.find_inception`; weights that were named and are
    not there are an InputError. So is a name twice.
    """
    if len(set(names)) != len(names):
        raise InputError(f"each of the features once, got {', '.join(names)}")
    found: list[FeatureNetwork] = []
    missing: dict[str, str] = {}
    for name in names:
        if name == "pixels":
            found.append(PixelNetwork())
        elif name == "random":
            found.append(RandomNetwork(device))
        elif name == "inception":
            try:
                found.append(InceptionNetwork(inception, sha256, device))
            except InputError as error:
                if inception:
                    raise
                missing[name] = str(error)
        else:
            found.append(TransformersNetwork(name, device))
    return found, missing


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """Convolutions without TensorFloat-32, which moves features by a thousandth."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def _load_transformers(source: str, model: str, processor: str) -> tuple[Any, Any, str]:
    """A model, its processor, and what was loaded: a directory, or ID@COMMIT of the Hub, whose cache is asked first."""
    path = Path(source).expanduser()
    if path.is_dir():
        return *_from_pretrained(source, str(path), None, model, processor), source
    if source.startswith((".", "/", "~")):
        raise InputError(f"no directory {source}: wanted a model that transformers reads, or a Hub id")
    from huggingface_hub import HfApi, try_to_load_from_cache

    name, _, revision = source.partition("@")
    cached = ""
    try:
        here = try_to_load_from_cache(name, "config.json", revision=revision or None)
        if isinstance(here, str):
            folder = Path(here).parent  # named by its commit
            try:
                return *_from_pretrained(source, str(folder), None, model, processor), f"{name}@{folder.name}"
            except InputError as error:  # such as one that lacks the weights
                cached = f"; of what the cache has: {error}"
        # One question without retries, before transformers asks for each of its files with many.
        HfApi().model_info(name, revision=revision or None, timeout=HUB_TIMEOUT)
    except Exception as error:  # anything from a refused connection to a model that is not there
        raise InputError(
            f"no directory {source}, and the Hub has no such model or cannot be reached ({_reason(error)}): check the name and "
            f"the network, or download it elsewhere and give its directory{cached}"
        ) from None
    loaded = _from_pretrained(source, name, revision or None, model, processor)
    here = try_to_load_from_cache(name, "config.json", revision=revision or None)
    return *loaded, f"{name}@{Path(here).parent.name}" if isinstance(here, str) else source


def _from_pretrained(source: str, place: str, revision: str | None, model: str, processor: str) -> tuple[Any, Any]:
    import transformers

    given = {} if revision is None else {"revision": revision}
    try:
        network: nn.Module = getattr(transformers, model).from_pretrained(place, **given)
        return network.eval().requires_grad_(False), getattr(transformers, processor).from_pretrained(place, **given)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise InputError(f"cannot load {source} as a {model} of transformers: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """In one line, not too long."""
    return " ".join(str(error).split())[:300] or type(error).__name__
