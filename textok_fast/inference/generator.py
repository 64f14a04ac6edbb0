"""A DiT run fast: modulation ahead of the loop, guidance pair as one batch, and a loop that never waits for its device.

All that changes from one evaluation to the next lies on the device: the state of the sampler, the number of the evaluation,
the tables it indexes. So an evaluation is a function without arguments, and can be captured as a CUDA graph, alone or many in
a row.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from textok_fast import ops
from textok_fast.diffusion import OnStep, Process, SamplerProgram, StopSampling, sampler_program
from textok_fast.errors import InputError
from textok_fast.inference.execution import Captured, compiled, own_modes
from textok_fast.inference.memory import MemoryEstimate, available_memory, require_fits, weights_estimate
from textok_fast.inference.modulation import Layout, StackedModulation, layout, unique_labels
from textok_fast.inference.plan import Plan, StepCache
from textok_fast.inference.precision import STREAM, prepare, weight_bytes
from textok_fast.modeling.dit import DiT
from textok_fast.modeling.layers import CrossAttention, TextTokens, is_untouched
from textok_fast.modeling.text_encoders import TextFeatures, same_length

Progress = Callable[[int, int], None]  # (evaluations done, evaluations in all)

KEPT_LOOPS = 4  # buffers and graphs of so many shapes are kept for the next run of the same shape
# Tensors (B, N, D) alive at the worst moment of a block, in its MLP, beside the hidden layer before and after GELU: the
# residual stream as it entered the block and as it enters the MLP; of activations, the LayerNorm of both, the branch before the
# MLP, its output, one to spare.
_LIVE_STREAMS, _LIVE_WIDTHS = 2, 5
_WORKSPACE = 64 * 2**20  # what cuBLAS keeps


class GeneratorEngine:
    """A DiT as a plan says. Called like the model; :meth:`sample` runs a whole sampler, :meth:`start` one step by step.

    The model given stays as it was; the engine holds a copy that shares what it can. One engine serves one thread.
    """

    def __init__(self, model: DiT, plan: Plan) -> None:
        self.plan, self.config = plan.require_machine(), model.config
        self.device = plan.torch_device
        if str(self.device) == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        if plan.step_cache is not None:
            plan.step_cache.blocks(model.config.depth)  # refuses blocks that are not there
        if model._forward_hooks or model._forward_pre_hooks or "forward" in vars(model):
            raise InputError(
                "the DiT itself has a hook or a replaced forward, which an engine would pass by: it calls the parts. Remove it"
            )
        estimate = weights_estimate(model, plan.precision, self.device, plan.products != "reference", plan.memory_limit)
        other = "another precision" if plan.precision == "fp32" else "another device"
        require_fits(estimate, f"the model in {plan.precision}", f"use {other}")
        with self._context():  # packed products are of the backend that is forced while they are packed
            self.model = prepare(model, plan.precision, device=self.device, products=plan.products)
            self.modulation = StackedModulation(self.model, plan.products, int8=plan.precision == "int8")
            # An error in what all blocks are modulated by is in every block the same: time and class are embedded in float32.
            for name in ("t_embedder", "y_embedder"):
                if (part := getattr(model, name)) is not None:
                    setattr(self.model, name, prepare(part, "fp32", device=self.device, products="reference"))
        self.dtype: torch.dtype = self.model.pos_embed.dtype  # of activations
        self._text_keys = TextKeys.take(self.model)
        keys = 0 if self._text_keys is None else weight_bytes(self._text_keys)
        self.weight_bytes = weight_bytes(self.model) + self.modulation.bytes + keys
        network = Network(self.model, self.modulation, plan.step_cache)
        self._whole = compiled(network.whole, plan)
        self._first = compiled(network.first, plan)
        self._short = compiled(network.short, plan)
        self._loops: OrderedDict[_Shape, _Loop] = OrderedDict()

    # -- as the model ----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        text: TextFeatures | None = None,
        image_tokens: Tensor | None = None,
    ) -> Tensor:
        """One evaluation: arguments, result and errors as ``DiT.forward``; computed on the plan's device and in its precision.

        Returns: the output in x's dtype, on the plan's device.
        """
        self.model._check(x, t, y, text, image_tokens)
        with self._context():
            y = None if y is None else y.to(self.device)
            rows = self.modulation(self.model.condition(t.to(self.device), y))  # (B, L)
            tokens = self._text_tokens(text, len(x))
            image = None if image_tokens is None else image_tokens.to(self.device, self.dtype)
            return self._whole(x.to(self.device, self.dtype), rows, tokens, image).to(x.dtype)

    # -- sampling ----------------------------------------------------------------------------------------------------

    def start(
        self,
        process: Process,
        *,
        labels: Tensor | None = None,
        text: TextFeatures | None = None,
        negative_text: TextFeatures | None = None,
        image_tokens: Tensor | None = None,
        seeds: Sequence[int] | Tensor,
        sampler: str = "",
        steps: int | str = 50,
        guidance_scale: float | Sequence[float] = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        guided_channels: int | None = None,
        eta: float = 0.0,
        noise: Tensor | None = None,
    ) -> SamplingRun:
        """A run of a sampler over B samples, as far as its initial noise.

        Sample i depends on ``seeds[i]`` and its conditions alone, not on what else is in the batch, but for rounding: a matrix
        product of another size may add in another order (packed CPU products do not).

        Args:
            process: what the model was trained with.
            labels: (B,) int64 classes; None, for a model with classes, is the null class for all.
            text: caption features (B, N_t, D_t) and mask (B, N_t), or None for the null caption.
            negative_text: what guidance leads away from, in the null caption's place; the same form.
            image_tokens: (B, M, image_token_dim), for a model built with them; guidance leaves them in both halves.
            seeds: B integers of 64 bits.
            sampler: of ``diffusion.SAMPLERS``; empty for ddpm, or for a flow euler.
            steps: how many, or a respacing of a Gaussian process.
            guidance_scale: one, or one for each evaluation; guidance runs only where it is not 1.
            guidance_interval: (low, high) in the model's own time; outside the scale is 1.
            guided_channels: guide the first so many channels; None is what the model's configuration says.
            eta: of ddim.
            noise: initial noise (B, N, d) or (B, C, S, S), in place of what the seeds give.

        Raises: InputError for conditions that do not fit the model or each other, impossible options, and a run that does not
            fit into memory.
        """
        if len(seeds) == 0:
            raise InputError("give at least one seed: there is a sample for each")
        kind = sampler or ("euler" if process.objective == "flow" else "ddpm")
        program = sampler_program(process, kind, guidance_scale, guidance_interval, steps=steps, eta=eta)
        guided_channels = guided_channels or self.config.guided_channels or None
        given = _Conditions.checked(
            self.model, seeds, labels, text, negative_text, image_tokens, noise, process, guided_channels
        )
        parts = self._parts(given, program)
        pieces = [given.part(slice(start, start + parts)) for start in range(0, len(given.seeds), parts)]
        return SamplingRun([partial(_Part, self, piece, program) for piece in pieces], program.times.tolist())

    def sample(
        self, process: Process, *, progress: Progress | None = None, on_step: OnStep | None = None, **options: Any
    ) -> Tensor:
        """Samples (B, N, d) or (B, C, S, S), float32, on the plan's device. Options and errors as :meth:`start`, ``progress``
        and ``on_step`` as :meth:`SamplingRun.finish`."""
        return self.start(process, **options).finish(progress, on_step)

    # -- memory ----------------------------------------------------------------------------------------------------

    def memory(self, batch: int, steps: int = 50, guidance: bool = True, *, text_tokens: int = 1) -> MemoryEstimate:
        """What a run of ``steps`` evaluations over ``batch`` samples, all of other classes, takes.

        Args:
            text_tokens: N_t of its captions, for a model that takes text.
        """
        if batch < 1 or steps < 1:
            raise InputError(f"a run has at least one sample and one step, got batch {batch} and {steps} steps")
        rows = batch + guidance if self.config.num_classes else 1
        return self._estimate(self._shape(batch, steps, 1, guidance, rows, text_tokens, False), spare=False)

    def _shape(
        self, batch: int, evaluations: int, slots: int, pair: bool, rows: int, text_tokens: int, draws: bool, **others: Any
    ) -> _Shape:
        element, both = self.dtype.itemsize, 2 * batch if pair else batch
        plan = layout(self.plan, self.modulation.columns, self.config.width, element, evaluations, both, rows)
        return _Shape(batch, evaluations, slots, pair, plan, text_tokens if self.config.text_dim else 0, draws, **others)

    def _estimate(self, shape: _Shape, spare: bool) -> MemoryEstimate:
        """For a new run. ``spare``: leave the buffers alone that are only kept for later runs; else they may give way."""
        config, element = self.config, self.dtype.itemsize
        batch = 2 * shape.batch if shape.pair else shape.batch
        tokens = batch * (config.sequence_length + config.num_image_tokens)
        rows = shape.layout.rows * shape.layout.chunk + batch
        sample = shape.batch * config.sequence_length * config.in_channels * config.patch_size**2
        emulated = self.plan.precision == "fp8" and self.device.type == "cpu"  # in float32
        active = 4 if emulated else element
        row = (_LIVE_WIDTHS + 2 * max(config.mlp_ratio, 1.5)) * active + _LIVE_STREAMS * STREAM.itemsize
        captions = batch * shape.text_tokens
        text = captions * config.width * (2 * config.depth if self._text_keys else 1) * element
        if self._text_keys and not self._text_keys.layers:
            text *= 2  # a package's program gives them, and then they are copied
        # While they are made, which is not while the network runs: features, as float32 and twice as activations, tokens and
        # one layer's keys and values; of an emulated product its input, and its result without and with bias, in float32 too.
        loading = captions * (config.text_dim * (4 + 2 * element) + config.width * (3 * element + 21 * emulated))
        cache = tokens * config.width * STREAM.itemsize if self.plan.step_cache is not None else 0
        weights = self.weight_bytes
        return MemoryEstimate(
            weights=weights,
            modulation=rows * self.modulation.columns * element,
            activations=max(int(tokens * config.width * row), loading) + _WORKSPACE * (self.device.type == "cuda"),
            state=4 * sample * (shape.slots + 8) + text + cache + 200 * shape.evaluations,
            available=self._available(spare),
        )

    def _available(self, spare: bool) -> int:
        idle = 0 if spare else sum(loop.bytes for loop in self._loops.values() if loop.idle)
        limit = self.plan.memory_limit
        if limit is not None:  # which what other runs hold counts against
            limit -= sum(loop.bytes for loop in self._live) - idle
        return available_memory(self.device, self.weight_bytes + idle, limit)

    def _ready(self, shape: _Shape) -> bool:
        """Whether buffers of this shape lie there, and no run is using them."""
        return shape in self._loops and self._loops[shape].idle

    def _parts(self, given: _Conditions, program: SamplerProgram) -> int:
        """How many samples run at once: all, or with ``plan.split`` as many as fit."""
        total = len(given.seeds)
        for count in range(1, total + 1):
            size = -(-total // count)
            if count > 1 and size == -(-total // (count - 1)):
                continue
            pieces = [given.part(slice(start, start + size)) for start in range(0, total, size)]
            shapes = {shape for piece in pieces if not self._ready(shape := piece.shape(self, program))}
            if not shapes:
                return size
            estimate = max((self._estimate(shape, spare=False) for shape in shapes), key=lambda each: each.total)
            if not estimate.fits and not self.plan.split:
                for shape in [shape for shape, loop in self._loops.items() if loop.idle]:
                    self._drop(shape)  # graphs have memory of their own, which is free only when they are gone
                estimate = max((self._estimate(shape, spare=False) for shape in shapes), key=lambda each: each.total)
            if estimate.fits:
                return size
            if not self.plan.split or size == 1:
                smaller = "a smaller batch, " if total > 1 else ""
                split = "split=True in the plan, " if total > 1 and not self.plan.split else ""
                ahead = "a smaller modulation_budget, " if estimate.modulation > estimate.total // 8 else ""
                other = "another precision" if self.plan.precision == "fp32" else "another device"
                require_fits(estimate, f"a batch of {size}", f"use {smaller}{split}{ahead}or {other}")
        raise AssertionError("unreachable")

    # -- inside ----------------------------------------------------------------------------------------------------

    def _variants(self, given: _Conditions, program: SamplerProgram) -> list[_Variant]:
        """How each evaluation of a run is made."""
        return _variants(self.plan, program)

    def _sampler_step(self, loop: _Loop) -> Tensor:
        """A whole evaluation in one call, of an engine that has it as a program: x after it."""
        raise NotImplementedError

    def _text_tokens(self, text: TextFeatures | None, batch: int) -> TextTokens | None:
        if self.model.text_embedder is None:
            return None
        tokens = self._embedded(text, batch)
        return tokens if self._text_keys is None else TextTokens(self._text_keys(tokens.tokens), tokens.mask)

    def _embedded(self, text: TextFeatures | None, batch: int) -> TextTokens:
        given = None if text is None else TextFeatures(text[0].to(self.device), text[1].to(self.device))
        tokens: TextTokens = self.model.text_embedder(given, batch)  # type: ignore[misc]
        return tokens

    def _text_in_place(self, target: TextTokens | None, text: TextFeatures | None, batch: int) -> TextTokens | None:
        """:meth:`_text_tokens` at the addresses of ``target``, or for the first time at new ones."""
        keys = self._text_keys
        if keys is None or not keys.layers:  # none: the keys of a package are one program's
            given = self._text_tokens(text, batch)
            return None if given is None else _in_place(target, given)
        tokens, mask = self._embedded(text, batch)
        if target is None:  # the keys are the largest buffer: never held twice
            new = tokens.new_empty(len(keys.layers), *tokens.shape[:2], 2 * tokens.shape[2])  # (depth, B, N_t, 2 D)
            target = TextTokens(new, torch.empty_like(mask))
        keys(tokens, out=target.tokens)
        target.mask.copy_(mask)
        return target

    @contextmanager
    def _context(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(own_modes(self.device))
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))
            if self.plan.ops:
                everywhere, single = self.plan.backends
                stack.enter_context(ops.use_backend(everywhere, **single))
            yield

    def _loop(self, shape: _Shape) -> _Loop:
        """Buffers and graphs for a run: those of an earlier one of the same shape, unless that is still under way."""
        loop = self._loops.pop(shape, None)
        if loop is not None and loop.idle:
            loop.leave()
            self._loops[shape] = loop  # again as the latest
            return loop
        estimate = self._estimate(shape, spare=True)
        for old in [old for old, kept in self._loops.items() if kept.idle]:  # the oldest first
            if estimate.fits:
                break
            self._drop(old)
            estimate = self._estimate(shape, spare=True)
        loop = self._loops[shape] = _Loop(self, shape, estimate.modulation + estimate.state)
        self._live.add(loop)
        while len(self._loops) > KEPT_LOOPS:
            self._drop(next(iter(self._loops)))
        return loop

    def _drop(self, shape: _Shape) -> None:
        """Keeps no longer buffers and graphs of this shape; a run that is under way still has them."""
        self._loops.pop(shape).leave()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the memory of graphs that are gone is nobody else's before

    @cached_property
    def _live(self) -> weakref.WeakSet[_Loop]:
        """The loops that are kept, and those of runs that are under way."""
        return weakref.WeakSet()


class Network(nn.Module):
    """The functions that are compiled: a DiT with its modulation given as rows (B, L), and its residual stream in float32."""

    def __init__(self, model: DiT, modulation: StackedModulation, cache: StepCache | None = None) -> None:
        super().__init__()
        self._model, self._split = model, modulation.split
        self._left_out = (0, 0) if cache is None else cache.blocks(model.config.depth)

    def whole(self, x: Tensor, rows: Tensor, text: TextTokens | None, image: Tensor | None) -> Tensor:
        """x (B, N, C) or (B, C, S, S) -> the output, as :meth:`DiT.step`."""
        _, hidden = self._model.run_blocks(self._embed(x, image), self._split(rows), text)
        return self._model.project(hidden)

    def first(self, x: Tensor, rows: Tensor, text: TextTokens | None, image: Tensor | None) -> tuple[Tensor, Tensor]:
        """Also what the blocks that a step cache leaves out added to the residual stream, (B, N, D)."""
        model, modulations, (start, stop) = self._model, self._split(rows), self._left_out
        before, _ = model.run_blocks(self._embed(x, image), modulations, text, 0, start)  # (B, N, D)
        after, _ = model.run_blocks(before, modulations, text, start, stop)  # (B, N, D)
        _, hidden = model.run_blocks(after, modulations, text, stop)
        return model.project(hidden), after - before

    def short(self, x: Tensor, rows: Tensor, text: TextTokens | None, image: Tensor | None, added: Tensor) -> Tensor:
        """Without those blocks: ``added`` is what they added the last time."""
        model, modulations, (start, stop) = self._model, self._split(rows), self._left_out
        before, _ = model.run_blocks(self._embed(x, image), modulations, text, 0, start)  # (B, N, D)
        _, hidden = model.run_blocks(before + added, modulations, text, stop)
        return model.project(hidden)

    def _embed(self, x: Tensor, image: Tensor | None) -> Tensor:
        return self._model.embed(x, image).to(STREAM)  # (B, N, D)


class SamplingRun:
    """A sampler under way, made by :meth:`GeneratorEngine.start`."""

    def __init__(self, parts: Sequence[Callable[[], _Part]], times: Sequence[float]) -> None:
        """``parts``: each starts one part of the batch; the next one begins when the one before is through.
        ``times``: of each evaluation, as the model has them."""
        self.times = times
        self._waiting = list(parts)
        self._through: list[_Part] = []
        self._current = self._waiting.pop(0)()
        self.total = len(parts) * len(times)

    @property
    def done(self) -> int:
        """Evaluations so far, of ``total``."""
        return sum(part.done for part in (*self._through, self._current))

    @property
    def finished(self) -> bool:
        return self.done == self.total

    def advance(self) -> None:
        """One evaluation: the network on the guidance pair or alone, guidance, the sampler's update.

        Does not wait for it, but where it is captured for the first time, and where another part of a split batch begins.
        """
        self._next_part()
        self._current.advance()

    @property
    def latents(self) -> Tensor:
        """x after the evaluations so far, (B, N, d) or (B, C, S, S) float32, a copy. What is assigned to it takes x's place,
        while a sampler's memory of earlier steps stays. InputError for a batch run in parts (``split``), or another shape.
        """
        self._require_whole()
        return self._current.latents.clone()

    @latents.setter
    def latents(self, value: Tensor) -> None:
        self._require_whole()
        place = self._current.latents
        if value.shape != place.shape:
            raise InputError(f"latents must be {tuple(place.shape)}, got {tuple(value.shape)}")
        place.copy_(value.detach())

    def _require_whole(self) -> None:
        if self.total > len(self.times):
            parts = self.total // len(self.times)
            raise InputError(f"this batch runs in {parts} parts, so that its latents are never all there: use a smaller batch")

    def finish(self, progress: Progress | None = None, on_step: OnStep | None = None) -> Tensor:
        """Everything that is left, with ``capture="loop"`` many evaluations in one graph. Returns :meth:`result`.

        ``progress`` is called after each evaluation, or each graph, that has been handed to the device. ``on_step`` sees and
        may change :attr:`latents` after each evaluation, each then a graph of its own, and may raise ``StopSampling``.
        """
        while not self.finished:
            self._next_part()
            if on_step is None:
                self._current.advance_far()
            else:
                self._current.advance()
                try:
                    changed = on_step(self.done - 1, self.times[self.done - 1], self.latents)
                except StopSampling as stopped:
                    return stopped.sample
                if changed is not None:
                    self.latents = changed
            if progress is not None:
                progress(self.done, self.total)
        return self.result()

    def result(self) -> Tensor:
        """The samples, (B, N, d) or (B, C, S, S) float32. InputError while evaluations are left."""
        if not self.finished:
            raise InputError(f"{self.done} of {self.total} evaluations are done: call advance() for the others, or finish()")
        results = [part.result() for part in (*self._through, self._current)]
        return results[0] if len(results) == 1 else torch.cat(results)

    def _next_part(self) -> None:
        if self.finished:
            raise InputError(f"all {self.total} evaluations are done; result() has the samples")
        if self._current.finished:
            self._through.append(self._current)
            self._current = self._waiting.pop(0)()


# -- one part of a batch -------------------------------------------------------------------------------------------------------


class _Shape(NamedTuple):
    """All that decides which tensors a loop has: runs of one shape share buffers and graphs."""

    batch: int
    evaluations: int
    slots: int
    pair: bool
    layout: Layout
    text_tokens: int
    draws: bool
    mixes: bool = False
    flow: bool = False
    guided_channels: int | None = None


class _Conditions(NamedTuple):
    """What a run was given, checked, for B samples."""

    seeds: Tensor  # (B,) int64, on the CPU
    labels: Tensor | None  # (B,) int64, on the CPU; None without classes
    text: TextFeatures | None
    negative_text: TextFeatures | None  # as long as ``text``, which is then there
    image_tokens: Tensor | None
    noise: Tensor | None
    flow: bool
    guided_channels: int | None

    @classmethod
    def checked(
        cls,
        model: DiT,
        seeds: Sequence[int] | Tensor,
        labels: Tensor | None,
        text: TextFeatures | None,
        negative_text: TextFeatures | None,
        image_tokens: Tensor | None,
        noise: Tensor | None,
        process: Process,
        guided_channels: int | None,
    ) -> _Conditions:
        config = model.config
        try:
            numbers = torch.as_tensor(seeds)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise InputError(f"seeds must be integers of 64 bits, got {seeds!r}") from None
        if numbers.ndim != 1 or numbers.dtype != torch.int64:
            raise InputError(
                f"seeds must be a sequence of integers, got {str(numbers.dtype)[6:]} of shape {tuple(numbers.shape)}"
            )
        batch = len(numbers)
        sample = sample_shape(model)
        learns = getattr(process, "learn_sigma", False)
        if learns != config.learn_sigma:
            raise InputError(
                f"the process has learn_sigma={learns}, the model learn_sigma={config.learn_sigma}; "
                f"build_process(objective, model.config.learn_sigma) makes one that fits"
            )
        if labels is not None and (not isinstance(labels, Tensor) or labels.dtype != torch.int64):
            raise InputError(f"labels must be an int64 tensor ({batch},), got {labels!r}")
        text = None if text is None else TextFeatures(*text)
        empty = torch.empty(batch, *sample, device="meta")
        model._check(empty, torch.empty(batch, device="meta"), labels, text, image_tokens)
        if negative_text is not None:
            negative_text = TextFeatures(*negative_text)
            model._check(empty, torch.empty(batch, device="meta"), labels, negative_text, image_tokens)
            if text is None:
                text = TextFeatures(negative_text.features, torch.zeros_like(negative_text.mask))
            text, negative_text = same_length(text, negative_text)
        if labels is not None and not bool(((labels >= 0) & (labels <= config.num_classes)).all()):
            raise InputError(
                f"labels must be in [0, {config.num_classes}], {config.num_classes} for no label, got {labels.tolist()}"
            )
        if noise is not None and tuple(noise.shape) != (batch, *sample):
            raise InputError(f"noise must be {(batch, *sample)}, got {tuple(noise.shape)}")
        if labels is None and config.num_classes:
            labels = torch.full((batch,), config.num_classes)
        labels = None if labels is None else labels.cpu()
        flow = process.objective == "flow"
        return cls(numbers.cpu(), labels, text, negative_text, image_tokens, noise, flow, guided_channels)

    def part(self, samples: slice) -> _Conditions:
        """Those of some of the samples."""
        text, negative = (
            None if each is None else TextFeatures(each.features[samples], each.mask[samples])
            for each in (self.text, self.negative_text)
        )
        labels, image, noise = (
            None if each is None else each[samples] for each in (self.labels, self.image_tokens, self.noise)
        )
        return self._replace(
            seeds=self.seeds[samples], labels=labels, text=text, negative_text=negative, image_tokens=image, noise=noise
        )

    def shape(self, engine: GeneratorEngine, program: SamplerProgram) -> _Shape:
        pair, batch = any(program.guided), len(self.seeds)
        unique, _ = unique_labels(self.labels, engine.config.num_classes, batch, pair)
        return engine._shape(
            *(batch, program.evaluations, program.slots, pair),
            1 if unique is None else len(unique),
            1 if self.text is None else self.text.mask.shape[1],
            any(program.noisy),
            mixes=program.mix is not None,
            flow=self.flow,
            guided_channels=self.guided_channels,
        )


class _Part:
    """One run over one set of buffers."""

    def __init__(self, engine: GeneratorEngine, given: _Conditions, program: SamplerProgram) -> None:
        self._engine = engine
        self._variants = engine._variants(given, program)
        self.done, self.total = 0, program.evaluations
        self._kept: Tensor | None = None
        with engine._context():
            self._loop: _Loop | None = engine._loop(given.shape(engine, program))
            self._loop.owner = weakref.ref(self)
            self._loop.load(given, program)

    @property
    def finished(self) -> bool:
        return self.done == self.total

    def advance(self) -> None:
        self._run(1, alone=True)

    def advance_far(self) -> None:
        """With ``capture="loop"`` up to the next border of a chunk of modulation, else one evaluation."""
        assert self._loop is not None
        chunk = self._loop.shape.layout.chunk or self.total
        whole = self._engine.plan.capture == "loop" and self.done % chunk == 0
        self._run(min(chunk, self.total - self.done) if whole else 1, alone=not whole)

    def _run(self, count: int, alone: bool) -> None:
        assert self._loop is not None
        with self._engine._context():
            chunk = self._loop.shape.layout.chunk
            if chunk and self.done % chunk == 0 and self._variants[self.done].network != "sampler":
                self._loop.compute_modulation(self.done)
            self._loop.run(tuple(self._variants[self.done : self.done + count]), alone)
        self.done += count

    @property
    def latents(self) -> Tensor:
        """x where it lies, (B, ...) float32."""
        if self._loop is None:
            assert self._kept is not None
            return self._kept
        return self._loop.work[0]

    def keep_result(self) -> None:
        """Takes the result out of the buffers, which another run is about to use."""
        if self._loop is not None:
            self._kept, self._loop = self._loop.work[0].clone(), None

    def result(self) -> Tensor:
        self.keep_result()
        assert self._kept is not None
        return self._kept


class _Variant(NamedTuple):
    """How an evaluation runs: on the guidance pair or the conditional half alone, and what of a step cache it uses."""

    pair: bool
    # "whole", or with a step cache "first" (all blocks, kept) or "short"; "sampler" for all evaluations of a run, of an engine
    # that has guidance and update inside a program
    network: str


def _variants(plan: Plan, program: SamplerProgram) -> list[_Variant]:
    if plan.step_cache is None:
        return [_Variant(pair, "whole") for pair in program.guided]
    full = plan.step_cache.full_evaluations(program.guided)
    return [_Variant(pair, "first" if whole else "short") for pair, whole in zip(program.guided, full, strict=True)]


class _Loop:
    """The buffers of runs of one shape, and an evaluation over them that has no argument and reads nothing from the host."""

    def __init__(self, engine: GeneratorEngine, shape: _Shape, size: int) -> None:
        # Weak: the engine keeps its loops, and graphs are to go with it, not when the collector comes by.
        self._engine, self.shape = weakref.proxy(engine), shape
        self.bytes = size  # of its buffers, as estimated
        self.owner: Callable[[], _Part | None] = lambda: None
        new = torch.empty
        device, config, batch = engine.device, engine.config, shape.batch
        both = 2 * batch if shape.pair else batch
        self._sample = sample_shape(engine.model)
        # The sampler's state, and after it, for a mixing sampler, what the model's output says and fresh noise.
        slots = shape.slots + 2 if shape.mixes else 1
        self.work = torch.zeros(slots, batch, *self._sample, device=device)  # (S or S + 2, B, ...)
        # All numbers that go on from one evaluation to the next, so that one addition is enough: the evaluation that comes
        # next, the draw of its noise, and the row of modulation of each sample.
        self._numbers = torch.zeros(2 + both, dtype=torch.int64, device=device)
        self._index, self._draw, self._row = self._numbers.split([1, 1, both])
        self._advance = torch.full_like(self._numbers, shape.layout.rows)
        self._advance[:2] = 1
        self._x = new(both, *self._sample, dtype=engine.dtype, device=device)  # what the network gets, the pair as one batch
        self._table = new(shape.evaluations, 8, device=device)
        self._mix = new(shape.evaluations, shape.slots, slots, device=device) if shape.mixes else None
        self._times = new(shape.evaluations, dtype=torch.float32 if shape.flow else torch.int64, device=device)
        self._seeds = new(batch, dtype=torch.int64, device=device)
        self._labels = new(shape.layout.rows, dtype=torch.int64, device=device) if config.num_classes else None
        self._row_of = new(both, dtype=torch.int64, device=device)
        self._rows: Tensor | None = None  # (c U, L), of the chunk of evaluations that is under way
        self._text: TextTokens | None = None
        self._image: Tensor | None = None
        self._residual: Tensor | None = None
        if engine.plan.step_cache is not None:
            tokens = config.sequence_length + config.num_image_tokens
            self._residual = new(both, tokens, config.width, dtype=STREAM, device=device)
        self._graphs: dict[tuple[_Variant, ...], Captured] = {}

    @property
    def idle(self) -> bool:
        """Whether no run needs the buffers, except for a result that it can take with it."""
        owner = self.owner()
        return owner is None or owner.finished

    def leave(self) -> None:
        """Lets a finished run take its result out of the buffers."""
        owner = self.owner()
        if owner is not None and owner.finished:
            owner.keep_result()

    def load(self, given: _Conditions, program: SamplerProgram) -> None:
        """Everything that a run is given goes to its place in the buffers."""
        engine, shape = self._engine, self.shape
        self._table.copy_(program.table)
        self._times.copy_(program.times)
        if self._mix is not None and program.mix is not None:
            self._mix.copy_(program.mix)
        self._seeds.copy_(given.seeds)
        labels, rows = unique_labels(given.labels, engine.config.num_classes, shape.batch, shape.pair)
        self._row_of.copy_(rows)
        if self._labels is not None and labels is not None:
            self._labels.copy_(labels)
        text, image = given.text, given.image_tokens
        if shape.pair and text is not None:  # the other half has the null caption, or what guidance leads away from
            other = given.negative_text or TextFeatures(text.features, torch.zeros_like(text.mask))
            text = TextFeatures(*(torch.cat(halves) for halves in zip(text, other, strict=True)))  # (2 B, N_t, ...)
        if shape.pair and image is not None:
            image = torch.cat([image, image])  # (2 B, M, ...)
        self._text = engine._text_in_place(self._text, text, len(rows))
        if image is not None:
            if self._image is None:
                self._image = torch.empty(image.shape, dtype=engine.dtype, device=engine.device)
            self._image.copy_(image)
        self._index.zero_()
        self._draw.fill_(1)
        self.work.zero_()
        self.work[0].copy_(ops.seeded_normal(self._seeds, self._index, self._sample) if given.noise is None else given.noise)

    def compute_modulation(self, start: int) -> None:
        """The adaLN rows of the evaluations from ``start`` on, as many as a chunk holds."""
        engine, rows = self._engine, self.shape.layout.rows
        count = min(self.shape.layout.chunk, self.shape.evaluations - start)
        t = self._times[start : start + count].unsqueeze(1).expand(count, rows).reshape(-1)  # (c U,)
        y = None if self._labels is None else self._labels.repeat(count)  # (c U,)
        if engine.plan.capture == "none":
            self._rows = None  # before the next ones are computed
            self._rows = engine.modulation(engine.model.condition(t, y))
        else:  # graphs read them at one place
            if self._rows is None:
                size = (self.shape.layout.chunk * rows, engine.modulation.columns)
                self._rows = torch.empty(size, dtype=engine.dtype, device=engine.device)
            engine.modulation(engine.model.condition(t, y), out=self._rows[: count * rows])
        self._row.copy_(self._row_of)

    def run(self, variants: tuple[_Variant, ...], alone: bool) -> None:
        """These evaluations, as one graph each or all in one, where the plan captures."""
        capture = self._engine.plan.capture != "none"
        for part in [(variant,) for variant in variants] if alone else [variants]:
            if part not in self._graphs:
                state = [self.work, self._numbers, *([] if self._residual is None else [self._residual])]
                own = weakref.proxy(self)

                def evaluate(part: Iterable[_Variant] = part, own: _Loop = own) -> None:
                    for variant in part:
                        own._evaluate(variant)

                # Hundreds of evaluations are of one, two or four kinds: each warms up once.
                kinds = partial(evaluate, tuple(dict.fromkeys(part)))
                name = "the sampling loop" if len(part) > 1 else "a step"
                self._graphs[part] = Captured(evaluate, state, capture, name, kinds)
            self._graphs[part]()

    def _evaluate(self, variant: _Variant) -> None:
        engine, shape = self._engine, self.shape
        z = self.work[0]  # (B, ...)
        if variant.network == "sampler":
            z.copy_(engine._sampler_step(self))
            self._numbers.add_(self._advance)
            return
        batch = 2 * shape.batch if variant.pair else shape.batch
        x = self._x[:batch]  # (B or 2 B, ...)
        x.unflatten(0, (-1, shape.batch)).copy_(z)
        rows = self._modulation_rows(batch)  # (B or 2 B, L)
        text = self._text
        if text is not None and len(text.mask) != batch:
            text = TextTokens(text.tokens[..., :batch, :, :], text.mask[:batch])
        image = None if self._image is None else self._image[:batch]
        if variant.network == "whole":
            output = engine._whole(x, rows, text, image)  # (B or 2 B, ...)
        elif variant.network == "first":
            assert self._residual is not None
            output, residual = engine._first(x, rows, text, image)
            self._residual[:batch].copy_(residual)
        else:
            assert self._residual is not None
            output = engine._short(x, rows, text, image, self._residual[:batch])
        noise = ops.seeded_normal(self._seeds, self._draw, self._sample) if shape.draws else None  # (B, ...)
        result = ops.guided_step(output, z, self._table, self._index, noise, guided_channels=shape.guided_channels)
        if self._mix is None:
            z.copy_(result)
        else:
            self.work[shape.slots].copy_(result)
            if noise is not None:
                self.work[shape.slots + 1].copy_(noise)
            weights = self._mix.index_select(0, self._index)[0]  # (S, S + 2)
            # Not a matrix product, which could be rounded to TF32.
            mixed = (weights.view(*weights.shape, *[1] * z.ndim) * self.work).sum(1)  # (S, B, ...)
            self.work[: shape.slots].copy_(mixed)
        self._numbers.add_(self._advance)

    def _modulation_rows(self, batch: int) -> Tensor:
        """Shifts, scales and gates of this evaluation, (B, L), from the chunk or from a product here."""
        engine, rows = self._engine, self.shape.layout.rows
        if self.shape.layout.chunk:
            assert self._rows is not None
            if rows == 1:
                return self._rows.index_select(0, self._row[:1]).expand(batch, -1)
            return self._rows.index_select(0, self._row[:batch])
        t = self._times.index_select(0, self._index)  # (1,)
        if self._labels is None or rows == 1:
            return engine.modulation(engine.model.condition(t, self._labels)).expand(batch, -1)
        y = self._labels.index_select(0, self._row_of[:batch])  # (B,)
        # One time for all: its embedding, a product of one row, is then the same whatever the batch.
        return engine.modulation(engine.model.condition(t, y))


def sample_shape(model: DiT) -> tuple[int, ...]:
    """One sample's shape: (N, C) for 1-D tokens, (C, S, S) for 2-D."""
    config = model.config
    if config.input_size:
        return config.in_channels, config.input_size, config.input_size
    return config.num_tokens, config.in_channels


def _in_place(target: TextTokens | None, source: TextTokens) -> TextTokens:
    """``source`` at the addresses of ``target``, or for the first time at new ones: it may be a view of the null caption."""
    if target is None:
        target = TextTokens(*(torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in source))
    target.tokens.copy_(source.tokens)
    target.mask.copy_(source.mask)
    return target


# -- text ----------------------------------------------------------------------------------------------------------------------


class TextKeys(nn.Module):
    """Keys and values of every block's cross-attention: (B, N_t, D) -> (depth, B, N_t, 2 D).

    Captions do not change from one evaluation to the next, so neither do these.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @classmethod
    def take(cls, model: DiT) -> TextKeys | None:
        """Takes the products out of the cross-attention of ``model``; None where it has none, or another kind."""
        attentions = [block.cross_attn for block in model.blocks]
        if not all(is_untouched(attention, CrossAttention) for attention in attentions):  # type: ignore[arg-type]
            return None
        for index, block in enumerate(model.blocks):
            block.cross_attn = _TextAttention(attentions[index], index)  # type: ignore[arg-type]
        return cls([attention.kv for attention in attentions])  # type: ignore[union-attr,misc]

    def forward(self, tokens: Tensor, out: Tensor | None = None) -> Tensor:
        """Into ``out`` if given, layer by layer."""
        if out is None:
            return torch.stack([layer(tokens) for layer in self.layers])  # (depth, B, N_t, 2 D)
        for layer, target in zip(self.layers, out, strict=True):
            target.copy_(layer(tokens))
        return out


class _TextAttention(nn.Module):
    """``CrossAttention`` whose context is the keys and values of all blocks, (depth, B, N_t, 2 D)."""

    def __init__(self, attention: CrossAttention, index: int) -> None:
        super().__init__()
        self.heads, self.index = attention.heads, index
        self.q, self.proj = attention.q, attention.proj

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, N, D), mask (B, N_t) -> (B, N, D)."""
        q = self.q(x).unflatten(-1, (self.heads, -1))  # (B, N, H, D / H)
        k, v = context[self.index].unflatten(-1, (2, self.heads, -1)).unbind(2)  # each (B, N_t, H, D / H)
        return self.proj(ops.attention(q, k, v, mask))
