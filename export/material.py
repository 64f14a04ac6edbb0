"""Captioned pictures as inputs of exported graphs: what they are calibrated on and compared on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textok_fast import ops
from textok_fast.config import DataConfig
from textok_fast.data import load_dataset
from textok_fast.data.base import collate
from textok_fast.data.degradation import degrade
from textok_fast.diffusion import FlowMatching, sampler_program
from textok_fast.errors import InputError
from textok_fast.export.directory import Source
from textok_fast.export.graphs import Graph, Inputs, TextGraph
from textok_fast.inference.generator import sample_shape
from textok_fast.inference.pipelines import SuperResolutionPipeline, build_pipeline
from textok_fast.modeling.text_encoders import TextFeatures
from textok_fast.modeling.tokenizer import from_uint8
from textok_fast.paths import cache_dir

BATCH = 2  # pictures that a graph is run on at once
HELD_OUT = 4  # pictures, at most, that nothing is calibrated on
STEPS = 8  # of the sampler whose rows a sampler graph is run with


@dataclass
class Material:
    """n pictures with all that the graphs of one source take.

    Attributes:
        about: what the pictures are.
        pixels: (n, 3, S, S) in [-1, 1]; None without a tokenizer.
        text: the captions' features, (n, N_t, D_t) with mask; None where nothing reads any.
        tokens: (n, N, d) or (n, C, S, S): what the generator makes.
        image_tokens: (n, M, D_i): of super-resolution, what its generator reads of the pictures, which are made small and worn
            as in its training; normal numbers without a pipeline; None for a generator that reads none.
    """

    source: Source
    about: str
    pixels: Tensor | None
    text: TextFeatures | None
    tokens: Tensor
    labels: Tensor
    captions: list[str] = field(default_factory=list)
    image_tokens: Tensor | None = None

    @classmethod
    def gather(cls, source: Source, images: str | Path | None = None, count: int = 8) -> Material:
        """``images``: a folder of captioned pictures; None for scenes of emoji where they have been fetched, else of drawn
        shapes. Without a tokenizer there are no pictures: normal numbers stand in for tokens.

        Raises: InputError for a folder without pictures, and a count below 1.
        """
        if count < 1:
            raise InputError(f"at least 1 picture is needed, got {count}")
        draw = torch.Generator().manual_seed(0)
        tokenizer, generator = source.tokenizer, source.generator
        labels = torch.arange(count) % max(1, generator.config.num_classes if generator is not None else 1)
        if tokenizer is None:
            assert generator is not None
            tokens = torch.randn(count, *sample_shape(generator), generator=draw)
            dim = generator.config.text_dim
            text = (
                TextFeatures(torch.randn(count, 8, dim, generator=draw), torch.ones(count, 8, dtype=torch.bool))
                if dim
                else None
            )
            about = "normal numbers: there is no tokenizer beside the generator"
            return cls(source, about, None, text, tokens, labels, image_tokens=_image_tokens(source, count, None))
        config = tokenizer.config
        size = config.image_size
        if images is not None:
            dataset = load_dataset(DataConfig(source="folder", path=str(images), image_size=size), "all")
            found = min(count, len(dataset))
        else:
            kind: Any = "emoji" if (cache_dir() / "emoji").is_dir() else "shapes"
            dataset, found = load_dataset(DataConfig(source=kind, image_size=size), "composition", count), count
        batch = collate([dataset[index] for index in range(found)])
        pixels = from_uint8(batch["images"])  # (n, 3, S, S)
        reads = config.text_in_encoder or config.text_in_decoder or (generator is not None and generator.config.text_dim)
        text = tokenizer.text_features(batch["captions"], found) if reads else None
        parts = [
            tokenizer.encode(pixels[i : i + BATCH], _part(text, slice(i, i + BATCH))).mode() for i in range(0, found, BATCH)
        ]
        captions, seen = list(batch["captions"]), _image_tokens(source, found, batch["images"])
        return cls(source, dataset.describe(), pixels, text, torch.cat(parts), labels[:found], captions, seen)

    def __len__(self) -> int:
        return len(self.tokens)

    def parted(self) -> tuple[Material, Material]:
        """Those to calibrate on, and others to compare on: the very same object where there is only one picture."""
        held_out = min(HELD_OUT, len(self) // 3) or (len(self) > 1)
        border = len(self) - held_out
        return (self._part(slice(0, border)), self._part(slice(border, None))) if held_out else (self, self)

    def _part(self, part: slice) -> Material:
        pixels = None if self.pixels is None else self.pixels[part]
        return dataclasses.replace(
            self,
            pixels=pixels,
            text=_part(self.text, part),
            tokens=self.tokens[part],
            labels=self.labels[part],
            captions=self.captions[part],
            image_tokens=None if self.image_tokens is None else self.image_tokens[part],
        )

    @torch.no_grad()
    def inputs(self, graph: Graph) -> Iterator[Inputs]:
        """What the pictures give the graph, :data:`BATCH` at a time. A generator sees them at times spread over all."""
        if isinstance(graph, TextGraph):
            for start in range(0, len(self.captions), BATCH):
                yield from graph.of_captions(self.captions[start : start + BATCH])
            return
        for number, start in enumerate(range(0, len(self), BATCH)):
            part = slice(start, start + BATCH)
            made = self._conditions(part)
            if self.pixels is not None:
                made["pixels"] = self.pixels[part]
            made["tokens"] = self.tokens[part]
            if self.source.generator is not None and graph.name not in ("encoder", "decoder"):
                made |= self._noised(part, (number + 0.5) / -(-len(self) // BATCH))
            yield {name: made[name] for name in graph.axes}

    def _conditions(self, part: slice) -> Inputs:
        text = _part(self.text, part)
        made: Inputs = {} if text is None else {"text": text.features, "text_mask": text.mask}
        made |= {"y": self.labels[part], "labels": self.labels[part]}
        if self.image_tokens is not None:
            made["image_tokens"] = self.image_tokens[part]
        return made

    def _noised(self, part: slice, level: float) -> Inputs:
        """Tokens at a level of noise in (0, 1), and all else that a step takes."""
        model, process = self.source.generator, self.source.process
        assert model is not None
        clean = self.tokens[part]
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(part.start))
        batch = len(clean)
        if process is None:  # nobody said what it was trained with
            t = torch.full((batch,), level * (1.0 if model.config.time_scale != 1 else 999.0))
            x = clean * (1 - level) + noise * level
        elif isinstance(process, FlowMatching):
            t = torch.full((batch,), level)
            x = process.add_noise(clean, noise, t)
        else:
            step = torch.full((batch,), int(level * process.num_steps))
            t, x = process.model_times(step).float(), process.add_noise(clean, noise, step)
        y = self.labels[part] if model.config.num_classes else None
        rows = torch.cat(model.modulation(model.condition(t, y)), dim=1)
        made = {"x": x.float(), "t": t.float(), "rows": rows, "noise": noise}
        if process is not None:
            program = sampler_program(process, "euler" if process.objective == "flow" else "ddpm", 2.0, steps=STEPS)
            index = torch.tensor([min(int((1 - level) * STEPS), STEPS - 1)])
            made |= {"index": index, "table": program.table, "times": program.times.float()}
        else:
            made |= {
                "index": torch.tensor([0]),
                "table": torch.tensor([[2.0, 1.0, -level, 0.5, 0.5, 0.0, 0.0, 0.0]]),
                "times": t[:1],
            }
        return made


def _part(text: TextFeatures | None, part: slice) -> TextFeatures | None:
    return None if text is None else TextFeatures(text.features[part], text.mask[part])


def _image_tokens(source: Source, count: int, images: Tensor | None) -> Tensor | None:
    """:attr:`Material.image_tokens` of ``images`` (n, S, S, 3) uint8."""
    if source.generator is None or not source.generator.config.image_token_dim:
        return None
    config = source.generator.config
    if images is None or source.pipeline is None or source.tokenizer is None:
        shape = (count, config.num_image_tokens, config.image_token_dim)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))
    pipeline = build_pipeline(source.generator, source.tokenizer, source.pipeline, "the model")
    assert isinstance(pipeline, SuperResolutionPipeline)
    scale = images.shape[1] // pipeline.size
    small = [degrade(each.numpy(), scale, index=i, strength=pipeline.strength) for i, each in enumerate(images)]
    return ops.patchify_uint8(torch.from_numpy(np.stack(small)), pipeline.patch_size)
