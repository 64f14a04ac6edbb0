"""The modules that are exported: functions of named tensors, traced once for any batch and any caption length.

Inputs and outputs are float32, int64 and bool in every precision; what lies between is in the graph's own. As in the engines
the residual stream and the embedding of time and class stay float32, and a tokenizer's constant rows are computed here, once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from textok_fast import ops
from textok_fast.inference.generator import sample_shape
from textok_fast.inference.precision import STREAM, cast
from textok_fast.inference.tokenizer import FastDecoder, FastEncoder
from textok_fast.modeling.dit import DiT
from textok_fast.modeling.text_encoders import TextEncoder, TextFeatures
from textok_fast.modeling.tokenizer import TexTok
from textok_fast.ops.guided import guided_step_reference

BATCH, TEXT, EVALUATIONS = "batch", "text_length", "evaluations"  # names of sizes that are free
EXAMPLE_EVALUATIONS = 4
Inputs = dict[str, Tensor]
Axes = dict[str, dict[int, str]]  # input -> axis -> name of its size


class Part(NamedTuple):
    """A graph inside of another: by which names that one knows its inputs and its outputs."""

    graph: Graph
    inputs: dict[str, str]
    outputs: dict[str, str]


class Graph(nn.Module):
    """Base class: ``graph(**inputs)`` gives a tuple of tensors, in the order of ``outputs``.

    Attributes:
        name: of its file.
        outputs: names.
        axes: of each input, which sizes are free.
        most_text: how long a caption may be; None for any length.
        left_alone: scopes of modules whose products no quantization touches: what embeds, and what comes last.
    """

    name: str
    outputs: tuple[str, ...]
    axes: Axes
    most_text: int | None = None
    left_alone: ClassVar[tuple[str, ...]] = ()

    def example(self, batch: int, length: int, generator: torch.Generator) -> Inputs:
        """Inputs with numbers of the right kind; the last caption is one token shorter where that is possible."""
        raise NotImplementedError

    @torch.no_grad()
    def reference(self, *_: Any, **inputs: Any) -> tuple[Tensor, ...]:
        """What the PyTorch class gives for the same inputs, in float32."""
        raise NotImplementedError

    def parts(self) -> list[Part]:
        """Graphs that are this one when they run one after the other, each traced once for all; [] to trace this one."""
        return []


def tokenizer_graphs(tokenizer: TexTok, dtype: torch.dtype = torch.float32) -> list[Graph]:
    """Encoder and decoder of a tokenizer on the CPU in float32, computing in ``dtype``."""
    return [EncoderGraph(tokenizer, dtype), DecoderGraph(tokenizer, dtype)]


def generator_graphs(model: DiT, dtype: torch.dtype = torch.float32) -> list[Graph]:
    """The four graphs of a DiT on the CPU in float32, computing in ``dtype``; they share one copy of the weights."""
    network = GeneratorNetwork(model, dtype)
    return [kind(network) for kind in (ModulationGraph, StepGraph, ForwardGraph, SamplerGraph)]


def on_cpu(model: Any) -> Any:
    """The model in float32 on the CPU, where exported graphs are compared: itself, or a copy that shares what it can."""
    return cast(model, torch.float32, torch.device("cpu"))


def _captions(dim: int, batch: int, length: int, generator: torch.Generator) -> Inputs:
    mask = torch.ones(batch, length, dtype=torch.bool)  # (B, N_t)
    mask[-1, max(1, length - 1) :] = False
    return {"text": torch.randn(batch, length, dim, generator=generator), "text_mask": mask}  # (B, N_t, D_t)


_TEXT_AXES: Axes = {"text": {0: BATCH, 1: TEXT}, "text_mask": {0: BATCH, 1: TEXT}}


def _features(text: Tensor | None, mask: Tensor | None) -> TextFeatures | None:
    return None if text is None or mask is None else TextFeatures(text, mask)


# -- the tokenizer -------------------------------------------------------------------------------------------------------------


class _TokenizerGraph(Graph):
    def __init__(self, tokenizer: TexTok, dtype: torch.dtype, data: str, has_text: bool) -> None:
        super().__init__()
        self.tokenizer, self.dtype, self._data = tokenizer, dtype, data
        self.axes = {data: {0: BATCH}, **(_TEXT_AXES if has_text else {})}
        self.most_text = tokenizer.config.max_text_tokens if tokenizer.config.text_positions else None
        self._text_dim = tokenizer.config.text_dim if has_text else 0

    def _example(self, shape: Sequence[int], batch: int, length: int, generator: torch.Generator) -> Inputs:
        data = {self._data: torch.rand(batch, *shape, generator=generator) * 2 - 1}
        return data | (_captions(self._text_dim, batch, length, generator) if self._text_dim else {})


class EncoderGraph(_TokenizerGraph):
    """pixels (B, 3, S, S) in [-1, 1], text (B, N_t, D_t), text_mask (B, N_t) -> tokens (B, N, d): :meth:`TexTok.encode`.

    Of VQ and FSQ also ``indices`` (B, N) int64; of KL also ``std`` (B, N, d), the posterior's, whose mean the tokens are.
    """

    name = "encoder"
    left_alone = ("encoder.vit.patch_embed", "encoder.vit.text", "encoder.vit.to_latents", "bottleneck")

    def __init__(self, tokenizer: TexTok, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(tokenizer, dtype, "pixels", tokenizer.config.text_in_encoder)
        with ops.use_backend("reference"):
            self.encoder = FastEncoder(cast(tokenizer.encoder, dtype), tokenizer.encoder)
        kind = tokenizer.config.bottleneck
        self.outputs = ("tokens", *(("indices",) if kind in ("vq", "fsq") else ("std",) if kind == "kl" else ()))

    def forward(self, pixels: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        text = None if text is None else text.to(self.dtype)
        out = self.tokenizer.bottleneck(self.encoder.run(pixels.to(self.dtype), text, text_mask).float())
        tokens = self.tokenizer.normalize(out.latents if out.mean is None else out.mean)  # (B, N, d)
        if out.indices is not None:
            return tokens, out.indices
        return (tokens,) if out.logvar is None else (tokens, torch.exp(0.5 * out.logvar) / self.tokenizer.latent_std)

    def example(self, batch: int, length: int, generator: torch.Generator) -> Inputs:
        size = self.tokenizer.config.image_size
        return self._example((3, size, size), batch, length, generator)

    @torch.no_grad()
    def reference(self, pixels: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        tokens = self.tokenizer.encode_pixels(pixels, _features(text, text_mask))
        if tokens.indices is not None:
            return tokens.as_subclass(Tensor), tokens.indices
        return (tokens.mode(),) if tokens._posterior is None else tokens._posterior


class DecoderGraph(_TokenizerGraph):
    """tokens (B, N, d), text (B, N_t, D_t), text_mask (B, N_t) -> pixels (B, 3, S, S) in [-1, 1]: :meth:`TexTok.decode`."""

    name, outputs = "decoder", ("pixels",)
    left_alone = ("decoder.vit.from_latents", "decoder.vit.text", "decoder.vit.to_pixels")

    def __init__(self, tokenizer: TexTok, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(tokenizer, dtype, "tokens", tokenizer.config.text_in_decoder)
        with ops.use_backend("reference"):  # whose constant rows are standard operations
            self.decoder = FastDecoder(cast(tokenizer.decoder, dtype), tokenizer.decoder)

    def forward(self, tokens: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        text = None if text is None else text.to(self.dtype)
        latents = self.tokenizer.denormalize(tokens).to(self.dtype)
        vit = self.tokenizer.decoder
        pixels = ops.unpatchify(self.decoder.run(latents, text, text_mask).float(), vit.patch_size)  # (B, 3, S, S)
        return ((pixels if vit.conv_out is None else vit.conv_out(pixels)).clamp(-1.0, 1.0),)

    def example(self, batch: int, length: int, generator: torch.Generator) -> Inputs:
        config = self.tokenizer.config
        return self._example((config.num_tokens, config.latent_dim), batch, length, generator)

    @torch.no_grad()
    def reference(self, tokens: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        return (self.tokenizer.decoder(self.tokenizer.denormalize(tokens), _features(text, text_mask)).clamp(-1.0, 1.0),)


# -- the generator -------------------------------------------------------------------------------------------------------------


class GeneratorNetwork(nn.Module):
    """What a DiT's graphs have in common. ``model`` computes in ``dtype``, ``original`` is the one that was given."""

    def __init__(self, original: DiT, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.config = dtype, original.config
        self.original = [original]  # in a list: not a part of the graphs
        self.model = cast(original, dtype)
        for name in ("t_embedder", "y_embedder"):
            setattr(self.model, name, getattr(original, name))

    def rows(self, t: Tensor, y: Tensor | None) -> Tensor:
        """t (R,), y (R,) -> all adaLN outputs side by side, (R, L)."""
        activated = F.silu(self.model.condition(t, y)).to(self.dtype)  # (R, D)
        layers: list[Any] = [*self.model.blocks, self.model.final_layer]
        return torch.cat([layer.adaLN_modulation[1](activated) for layer in layers], dim=1)

    def step(self, x: Tensor, rows: Tensor, text: TextFeatures | None, image: Tensor | None) -> Tensor:
        """x as in :meth:`DiT.forward`, rows (B, L) -> the output, float32."""
        config, model = self.config, self.model
        sizes = [6 * config.width] * config.depth + [2 * config.width]
        modulations = list(rows.to(self.dtype).split(sizes, dim=1))
        tokens = None if model.text_embedder is None else model.text_embedder(text, x.shape[0])
        h = model.embed(x.to(self.dtype), None if image is None else image.to(self.dtype)).to(STREAM)  # (B, N, D)
        _, hidden = model.run_blocks(h, modulations, tokens)
        return model.project(hidden).float()


class _GeneratorGraph(Graph):
    network: GeneratorNetwork
    left_alone = (
        "network.model.x_embedder",
        "network.model.t_embedder",
        "network.model.text_embedder",
        "network.model.image_embedder",
        "network.model.final_layer",
    )

    def __init__(self, network: GeneratorNetwork) -> None:
        super().__init__()
        self.network = network

    @property
    def model(self) -> DiT:
        return self.network.original[0]

    def _conditions(self) -> Axes:
        config = self.network.config
        axes = dict(_TEXT_AXES) if config.text_dim else {}
        return axes | ({"image_tokens": {0: BATCH}} if config.image_token_dim else {})

    def _example(self, wanted: Sequence[str], batch: int, length: int, generator: torch.Generator) -> Inputs:
        config = self.network.config
        flow = config.time_scale != 1
        made: Inputs = {
            "x": torch.randn(batch, *sample_shape(self.model), generator=generator),
            "t": torch.rand(batch, generator=generator) * (1 if flow else 999),
            "y": torch.randint(0, config.num_classes + 1, (batch,), generator=generator),
        }
        if config.text_dim:
            made |= _captions(config.text_dim, batch, length, generator)
        if config.image_token_dim:
            shape = (batch, config.num_image_tokens, config.image_token_dim)
            made["image_tokens"] = torch.randn(shape, generator=generator)
        return {name: made[name] for name in wanted}


class ForwardGraph(_GeneratorGraph):
    """x (B, N, C) or (B, C, S, S), t (B,), y (B,), text, text_mask, image_tokens -> output: :meth:`DiT.forward` as one call."""

    name, outputs = "forward", ("output",)

    def __init__(self, network: GeneratorNetwork) -> None:
        super().__init__(network)
        y: Axes = {"y": {0: BATCH}} if network.config.num_classes else {}
        self.axes = {"x": {0: BATCH}, "t": {0: BATCH}, **y, **self._conditions()}

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_tokens: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        return (self.network.step(x, self.network.rows(t, y), _features(text, text_mask), image_tokens),)

    def parts(self) -> list[Part]:
        modulation, step = ModulationGraph(self.network), StepGraph(self.network)
        return [
            Part(modulation, {name: name for name in modulation.axes}, {"rows": "rows"}),
            Part(step, {name: name for name in step.axes}, {"output": "output"}),
        ]

    def example(self, batch: int, length: int, generator: torch.Generator) -> Inputs:
        return self._example(list(self.axes), batch, length, generator)

    @torch.no_grad()
    def reference(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_tokens: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        return (self.model(x, t, y, _features(text, text_mask), image_tokens),)


class ModulationGraph(_GeneratorGraph):
    """t (R,), y (R,) -> rows (R, L): every adaLN output, L = (6 depth + 2) D, for as many pairs as a run has."""

    name, outputs = "modulation", ("rows",)

    def __init__(self, network: GeneratorNetwork) -> None:
        super().__init__(network)
        self.axes = {"t": {0: "rows"}, **({"y": {0: "rows"}} if network.config.num_classes else {})}

    def forward(self, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        return (self.network.rows(t, y).float(),)

    def example(self, batch: int, length: int, generator: torch.Generator) -> Inputs:
        return self._example(list(self.axes), batch, length, generator)

    @torch.no_grad()
    def reference(self, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        return (torch.cat(self.model.modulation(self.model.condition(t, y)), dim=1),)


class StepGraph(_GeneratorGraph):
    """x, rows (B, L) of :class:`ModulationGraph`, text, text_mask, image_tokens -> output: a step without adaLN products."""

    name, outputs = "step", ("output",)

    def __init__(self, network: GeneratorNetwork) -> None:
        super().__init__(network)
        self.axes = {"x": {0: BATCH}, "rows": {0: BATCH}, **self._conditions()}

    def forward(
        self,
        x: Tensor,
        rows: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_tokens: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        return (self.network.step(x, rows, _features(text, text_mask), image_tokens),)

    @torch.no_grad()
    def example(self, batch: int, length: int, generator: torch.Generator) -> Inputs:
        y = ["y"] if self.network.config.num_classes else []
        made = self._example(["x", "t", *y, *self._conditions()], batch, length, generator)
        rows = torch.cat(self.model.modulation(self.model.condition(made.pop("t"), made.pop("y", None))), dim=1)
        return {"x": made.pop("x"), "rows": rows, **made}

    @torch.no_grad()
    def reference(
        self,
        x: Tensor,
        rows: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_tokens: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        config, model = self.network.config, self.model
        modulations = list(rows.split([6 * config.width] * config.depth + [2 * config.width], dim=1))
        tokens = None if model.text_embedder is None else model.text_embedder(_features(text, text_mask), len(x))
        return (model.step(x, modulations, tokens, image_tokens),)


class SamplerGraph(_GeneratorGraph):
    """One evaluation of a sampler with guidance and update inside: a loop calls it E times with its own outputs.

    Inputs: x (B, ...) float32; index (1,) int64, from 0; table (E, 8) and times (E,) float32 of
    :func:`textok_fast.diffusion.sampler_program` (a sampler without ``mix``: ddpm, ddim, euler, sde); labels (B,) int64; noise,
    as x, which rows without noise ignore; text, text_mask, image_tokens. The network runs on the guidance pair, whatever the
    row's scale: the other half has the null class and the null caption.

    Outputs: ``x_next`` and ``index_next``, the next call's x and index. An index outside the table gives NaN.
    """

    name, outputs = "sampler", ("x_next", "index_next")

    def __init__(self, network: GeneratorNetwork) -> None:
        super().__init__(network)
        labels: Axes = {"labels": {0: BATCH}} if network.config.num_classes else {}
        tables: Axes = {"index": {}, "table": {0: EVALUATIONS}, "times": {0: EVALUATIONS}}
        self.axes = {"x": {0: BATCH}, **tables, **labels, "noise": {0: BATCH}, **self._conditions()}
        self.pair, self.update = _PairGraph(network, self), _UpdateGraph(network, self)

    def forward(
        self,
        x: Tensor,
        index: Tensor,
        table: Tensor,
        times: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_tokens: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        pair = dict(zip(self.pair.outputs, self.pair(x, index, times, labels, text, text_mask, image_tokens), strict=True))
        rows = self.network.rows(pair["pair_t"], pair.get("pair_y"))
        output = self.network.step(pair["pair_x"], rows, *_text_and_image(pair))
        return self.update(output, x, index, table, noise)

    def parts(self) -> list[Part]:
        modulation, step = ModulationGraph(self.network), StepGraph(self.network)
        return [
            Part(self.pair, {name: name for name in self.pair.axes}, {name: name for name in self.pair.outputs}),
            Part(modulation, {name: f"pair_{name}" for name in modulation.axes}, {"rows": "rows"}),
            Part(step, {name: name if name == "rows" else f"pair_{name}" for name in step.axes}, {"output": "output"}),
            Part(self.update, {name: name for name in self.update.axes}, {name: name for name in self.outputs}),
        ]

    def example(self, batch: int, length: int, generator: torch.Generator) -> Inputs:
        labels = ["y"] if self.network.config.num_classes else []
        made = self._example(["x", *labels, *self._conditions()], batch, length, generator)
        made["index"] = torch.tensor([length % EXAMPLE_EVALUATIONS])
        table = torch.rand(EXAMPLE_EVALUATIONS, 8, generator=generator)  # (E, 8)
        table[:, 0] += 1  # the guidance scale
        made["table"] = table
        flow = self.network.config.time_scale != 1
        made["times"] = torch.rand(EXAMPLE_EVALUATIONS, generator=generator) * (1 if flow else 999)  # (E,)
        made["noise"] = torch.randn(made["x"].shape, generator=generator)
        if labels:
            made["labels"] = made.pop("y").clamp(max=self.network.config.num_classes - 1)
        return {name: made[name] for name in self.axes}

    @torch.no_grad()
    def reference(
        self,
        x: Tensor,
        index: Tensor,
        table: Tensor,
        times: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_tokens: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        pair = dict(zip(self.pair.outputs, self.pair(x, index, times, labels, text, text_mask, image_tokens), strict=True))
        output = self.model(pair["pair_x"], pair["pair_t"], pair.get("pair_y"), *_text_and_image(pair))
        return self.update(output, x, index, table, noise)


def _text_and_image(pair: Inputs) -> tuple[TextFeatures | None, Tensor | None]:
    return _features(pair.get("pair_text"), pair.get("pair_text_mask")), pair.get("pair_image_tokens")


class _PairGraph(_GeneratorGraph):
    """A sampler's inputs -> those of a forward on the guidance pair, the conditional half first."""

    name = "pair"

    def __init__(self, network: GeneratorNetwork, sampler: SamplerGraph) -> None:
        super().__init__(network)
        self._sampler = [sampler]
        self.axes = {name: axes for name, axes in sampler.axes.items() if name not in ("table", "noise")}
        self.outputs = ("pair_x", "pair_t", *(f"pair_{name}" for name in ("y", *self._conditions()) if self._has(name)))

    def _has(self, name: str) -> bool:
        return name != "y" or bool(self.network.config.num_classes)

    def forward(
        self,
        x: Tensor,
        index: Tensor,
        times: Tensor,
        labels: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_tokens: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        pair = [torch.cat([x, x])]  # (2 B, ...)
        t = times.index_select(0, index.clamp(0, times.shape[0] - 1))  # (1,)
        pair.append(t.expand(2 * x.shape[0]))  # (2 B,)
        if labels is not None:
            pair.append(torch.cat([labels, torch.full_like(labels, self.network.config.num_classes)]))  # (2 B,)
        if text is not None and text_mask is not None:
            pair += [torch.cat([text, text]), torch.cat([text_mask, torch.zeros_like(text_mask)])]
        if image_tokens is not None:
            pair.append(torch.cat([image_tokens, image_tokens]))
        return tuple(pair)

    def example(self, batch: int, length: int, generator: torch.Generator) -> Inputs:
        made = self._sampler[0].example(batch, length, generator)
        return {name: made[name] for name in self.axes}


class _UpdateGraph(_GeneratorGraph):
    """The pair's output -> the sampler's outputs: guidance and update."""

    name, outputs = "update", ("x_next", "index_next")

    def __init__(self, network: GeneratorNetwork, sampler: SamplerGraph) -> None:
        super().__init__(network)
        self._sampler = [sampler]
        # Twice the batch, which no name says: the pair's size is another free one.
        self.axes = {"output": {0: f"2*{BATCH}"}, **{name: sampler.axes[name] for name in ("x", "index", "table", "noise")}}

    def forward(self, output: Tensor, x: Tensor, index: Tensor, table: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        guided = self.network.config.guided_channels or None
        return guided_step_reference(output, x, table, index, noise, guided_channels=guided), index + 1

    def example(self, batch: int, length: int, generator: torch.Generator) -> Inputs:
        made = self._sampler[0].example(batch, length, generator)
        shape = list(made["x"].shape)
        shape[0] = 2 * batch
        if self.network.config.learn_sigma:
            shape[1 if len(shape) == 4 else 2] *= 2
        return {"output": torch.randn(shape, generator=generator), **{name: made[name] for name in list(self.axes)[1:]}}


class TextGraph(Graph):
    """input_ids, attention_mask (B, N_t) int64 -> text (B, N_t, D_t): the frozen encoder's last hidden states."""

    name, outputs = "text", ("text",)

    def __init__(self, encoder: nn.Module, vocabulary: int, most_text: int | None) -> None:
        super().__init__()
        self.encoder, self._vocabulary, self.most_text = encoder, vocabulary, most_text
        self._source: TextEncoder | None = None  # whose tokenizer and clauses captions go through
        self.axes = {"input_ids": {0: BATCH, 1: TEXT}, "attention_mask": {0: BATCH, 1: TEXT}}

    @classmethod
    def of(cls, encoder: TextEncoder) -> TextGraph:
        network = encoder._loaded()
        graph = cls(network.model, len(network.tokenizer), network.max_positions)
        graph._source = encoder
        return graph

    def of_captions(self, captions: Sequence[str]) -> Iterator[Inputs]:
        """What the text encoder hands its network for these captions, clause by clause where it splits them; nothing without
        one, and for captions without a word."""
        if self._source is None:
            return
        tokenizer = self._source._loaded().tokenizer
        texts = [clause for index, caption in enumerate(captions) for clause in self._source._clauses(index, caption)]
        ids = tokenizer(texts, truncation=self.most_text is not None, max_length=self.most_text)["input_ids"] if texts else []
        if not ids:
            return
        longest, pad = max(map(len, ids)), tokenizer.pad_token_id or 0
        yield {
            "input_ids": torch.tensor([[*row, *[pad] * (longest - len(row))] for row in ids]),  # (B, N_t)
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids]),
        }

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        return (self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state,)

    def example(self, batch: int, length: int, generator: torch.Generator) -> Inputs:
        mask = torch.ones(batch, length, dtype=torch.int64)  # (B, N_t)
        mask[-1, max(1, length - 1) :] = 0
        return {"input_ids": torch.randint(0, self._vocabulary, (batch, length), generator=generator), "attention_mask": mask}

    @torch.no_grad()
    def reference(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        return self(input_ids, attention_mask)
