"""The model ``generate`` of a Triton Inference Server: prompts or labels in, pictures out. It calls the other models there.

:func:`textok_fast.export.server.write_repository` copies this file into the model repository. The server runs it in its Python
backend, without textok_fast and without torch: it needs numpy, and ``tokenizers`` where prompts are encoded. Each step of the
loop is a request to the model ``generator``, whose dynamic batcher joins the steps of all pictures under way, whatever their
number of steps; guidance, the sampler's update (one row of ``textok_fast.diffusion.sampler_program``) and the noise are numpy,
on a few thousand numbers.

What it is set to lies in ``settings.json`` beside it; for the same seed it draws what ``load_pipeline`` draws.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

Array = np.ndarray[Any, Any]


class RequestError(ValueError):
    """What a request has wrong, as its sender is told."""


class TritonPythonModel:
    """One instance. Requests that arrive together run side by side: while one awaits a step, others are handed in."""

    def initialize(self, args: dict[str, str]) -> None:
        here = Path(__file__).parent
        self.settings = json.loads((here / "settings.json").read_text(encoding="utf-8"))
        self.samplers = {int(steps): Sampler(**program) for steps, program in self.settings["programs"].items()}
        self.tokenizer: Any = None
        if self.settings["text"] is not None:
            from tokenizers import Tokenizer

            self.tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))
            self.tokenizer.no_padding()

    async def execute(self, requests: list[Any]) -> list[Any]:
        return list(await asyncio.gather(*(self._respond(request) for request in requests)))

    async def _respond(self, request: Any) -> Any:
        try:
            outputs = await self._generate(request)
        except (RequestError, pb_utils.TritonModelException) as error:  # another request's may well succeed
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in outputs.items()])

    async def _generate(self, request: Any) -> dict[str, Array]:
        settings = self.settings
        prompts, negative = _strings(request, "prompt"), _strings(request, "negative_prompt")
        labels = _column(request, "label")
        given = [each for each in (prompts, labels, _array(request, "text")) if each is not None]
        if not given:
            raise RequestError(f"give {' or '.join(settings['conditions'])}")
        count = len(given[0])
        if prompts is not None and not settings["num_classes"] and not all(prompt.strip() for prompt in prompts):
            raise RequestError("a prompt is a non-empty string")
        seeds = _column(request, "seed")
        if seeds is None:
            seeds = np.array([secrets.randbits(63) for _ in range(count)], np.int64)
        if (seeds < 0).any():
            raise RequestError(f"seeds are integers from 0 to 2**63 - 1, got {seeds.min()}")
        scale = _column(request, "guidance_scale")
        scale = np.full(count, settings["guidance_scale"], np.float32) if scale is None else scale
        steps = _column(request, "steps")
        sampler = self._sampler(settings["steps"] if steps is None else steps)

        classes = settings["num_classes"]
        if classes and labels is None:
            raise RequestError(f"give label, one of {classes} classes")
        if labels is not None and ((labels < 0) | (labels >= classes)).any():
            raise RequestError(f"labels are from 0 to {classes - 1}, got {labels.tolist()}")
        if prompts is None and labels is not None and self.tokenizer is not None:
            prompts = [self._caption(int(label), int(seed)) for label, seed in zip(labels, seeds, strict=True)]
        text, mask = await self._text(request, prompts, count)
        if negative is not None and not settings["generator_text"]:
            raise RequestError("this generator reads no text: there is no negative prompt to lead it away from")
        other, other_mask = text, None if mask is None else np.zeros_like(mask)
        if negative is not None:
            other, other_mask = await self._features(negative)
            assert text is not None and mask is not None
            (text, mask), (other, other_mask) = _same_length((text, mask), (other, other_mask))

        condition: dict[str, Array] = {}
        null: dict[str, Array] = {}
        if classes:
            assert labels is not None
            condition["y"], null["y"] = labels[:, None], np.full_like(labels[:, None], classes)
        if settings["generator_text"]:
            assert text is not None and mask is not None and other is not None and other_mask is not None
            condition |= {"text": text, "text_mask": mask}
            null |= {"text": other, "text_mask": other_mask}

        shape = tuple(settings["shape"])
        state = np.zeros((sampler.slots, count, *shape), np.float32)  # (S, B, N, C)
        state[0] = seeded_normal(seeds, 0, shape)
        for index in range(len(sampler.table)):
            scales = scale if sampler.guided[index] else np.ones(count, np.float32)
            output, paired = await self._evaluate(state[0], sampler.times[index], condition, null, scales)
            noise = seeded_normal(seeds, index + 1, shape) if sampler.noisy[index] else None
            state = sampler.update(index, state, output, scales if paired else None, noise, settings["guided_channels"])
        tokens = state[0]

        inputs = {"tokens": tokens}
        if settings["decoder_text"]:
            assert text is not None and mask is not None
            inputs |= {"text": text, "text_mask": mask}
        pixels = (await _call("decoder", inputs, "pixels"))["pixels"]  # (B, 3, S, S)
        images = np.clip(np.round((pixels + 1) * np.float32(127.5)), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
        return {"image": np.ascontiguousarray(images), "tokens": tokens, "seed": seeds[:, None]}

    def _sampler(self, steps: Any) -> Sampler:
        wanted = set(np.atleast_1d(steps).tolist())
        if len(wanted) != 1 or not wanted <= set(self.samplers):
            known = ", ".join(map(str, self.samplers))
            raise RequestError(f"steps is one number a request, of {known}; got {', '.join(map(str, sorted(wanted)))}")
        return self.samplers[wanted.pop()]

    async def _evaluate(
        self, x: Array, t: float, condition: dict[str, Array], null: dict[str, Array], scales: Array
    ) -> tuple[Array, bool]:
        """The generator's output (B, N, C'), or, where a scale is not 1, (2B, N, C') with the conditional half first."""
        paired = bool((scales != 1).any())
        inputs = {"x": x, "t": np.full((len(x), 1), t, np.float32), **condition}
        if paired:
            other = {"x": x, "t": inputs["t"], **null}
            inputs = {name: np.concatenate([value, other[name]]) for name, value in inputs.items()}
        return (await _call("generator", inputs, "output"))["output"], paired

    async def _text(self, request: Any, prompts: list[str] | None, count: int) -> tuple[Array | None, Array | None]:
        """Features (B, N_t, D_t) and mask (B, N_t) of the prompts, or as they were given; without either the null caption."""
        width = self.settings["text_dim"]
        if not width:
            return None, None
        if prompts is not None:
            if self.tokenizer is None:
                raise RequestError("this server holds no text encoder: give text and text_mask in the place of prompt")
            return await self._features(prompts)
        text, mask = _array(request, "text"), _array(request, "text_mask")
        if text is not None:
            mask = np.ones(text.shape[:2], np.bool_) if mask is None else mask.astype(np.bool_)
            if mask.shape != text.shape[:2]:
                raise RequestError(f"text_mask must be {text.shape[:2]}, as text is {text.shape}; got {mask.shape}")
            return text, mask
        length = self.settings["null_length"]
        return np.zeros((count, length, width), np.float32), np.zeros((count, length), np.bool_)

    async def _features(self, captions: list[str]) -> tuple[Array, Array]:
        """As ``textok_fast``'s TextEncoder has them: clause by clause where captions are split, padded to a ``multiple``."""
        about = self.settings["text"]
        if about is None:
            raise RequestError("this server holds no text encoder, so that it takes no negative_prompt")
        split, most, multiple = about["split"], about["max_tokens"], about["multiple"]
        clauses = [_clauses(caption, split) for caption in captions]
        texts = list(dict.fromkeys(text for caption in clauses for text in caption))
        found = dict(zip(texts, await asyncio.gather(*(self._encode(text, split, most) for text in texts)), strict=True))
        rows = [np.concatenate([found[text] for text in caption])[:most] if caption else None for caption in clauses]
        longest = max((len(row) for row in rows if row is not None), default=1)
        width = min(-(-longest // multiple) * multiple, max(most, 1))
        features = np.zeros((len(rows), width, self.settings["text_dim"]), np.float32)  # (B, N_t, D_t)
        mask = np.zeros((len(rows), width), np.bool_)  # (B, N_t)
        for i, row in enumerate(rows):
            if row is not None:
                features[i, : len(row)], mask[i, : len(row)] = row, True
        return features, mask

    async def _encode(self, text: str, split: str, most: int) -> Array:
        """Features (n, D_t) of one text, of a clause without the special tokens."""
        special = self.tokenizer.num_special_tokens_to_add(is_pair=False)
        limit = max(most + special if split else most, special + 1)
        encoder_limit = self.settings["text"]["max_positions"]
        self.tokenizer.enable_truncation(limit if encoder_limit is None else min(limit, encoder_limit))
        encoding = self.tokenizer.encode(text)
        ids = np.array([encoding.ids], np.int64)  # (1, n)
        multiple = self.settings["text"]["multiple"]
        padded = -(-ids.shape[1] // multiple) * multiple
        if encoder_limit is not None:
            padded = min(padded, encoder_limit)
        rest = ((0, 0), (0, padded - ids.shape[1]))
        inputs = {"input_ids": np.pad(ids, rest), "attention_mask": np.pad(np.ones_like(ids), rest)}
        features = (await _call("text", inputs, "text"))["text"][0, : ids.shape[1]]  # (n, D_t)
        return features[np.array(encoding.special_tokens_mask) == 0] if split else features

    def _caption(self, label: int, seed: int) -> str:
        """What ClassToImagePipeline draws for the decoder: torch's generator is the same Mersenne Twister."""
        choices = self.settings["captions"].get(str(label))
        if not choices:
            return ""
        draw = np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 2**32, dtype=np.uint32)
        return str(choices[int(draw) % len(choices)])


class Sampler:
    """A ``SamplerProgram``; ``table`` (E, 8), ``times`` (E,), ``mix`` (E, S, S + 2) or None, ``noisy`` and ``guided`` (E,)."""

    def __init__(self, table: Any, times: Any, mix: Any, noisy: list[bool], guided: list[bool]) -> None:
        self.table, self.times = np.array(table, np.float32), np.array(times, np.float32)
        self.mix = None if mix is None else np.array(mix, np.float32)
        self.noisy, self.guided = noisy, guided
        self.slots = 1 if self.mix is None else self.mix.shape[1]

    def update(
        self, index: int, state: Array, output: Array, scales: Array | None, noise: Array | None, guided_channels: int
    ) -> Array:
        """The next state (S, B, N, C), by ``textok_fast.ops.guided_step`` and the mixing of what is kept."""
        x = state[0]  # (B, N, C)
        batch, channels = x.shape[0], x.shape[-1]
        _, kx, km, a, b, low, high, factor = self.table[index]
        conditional = prediction = output[:batch]
        if scales is not None:
            guided = guided_channels or channels
            c, u = conditional[..., :guided], output[batch:, ..., :guided]
            prediction = np.concatenate([u + scales[:, None, None] * (c - u), conditional[..., guided:]], -1)
        h = kx * x + km * prediction[..., :channels]
        result = a * h + b * x
        if noise is not None and factor != 0:
            log_variance: Any = high
            if conditional.shape[-1] != channels:
                fraction = (conditional[..., channels:] + 1) / 2
                log_variance = fraction * high + (1 - fraction) * low
            result = result + factor * np.exp(0.5 * log_variance) * noise
        if self.mix is None:
            return np.asarray(result, np.float32)[None]
        parts = np.concatenate([state, result[None]])  # (S + 1, B, N, C); no sampler mixes noise in
        return np.tensordot(self.mix[index][:, :-1], parts, 1).astype(np.float32)


# -- noise by seed, as textok_fast.ops.seeded_normal ---------------------------------------------------------------------------


def seeded_normal(seeds: Array, draw: int, shape: tuple[int, ...]) -> Array:
    """(B, *shape) float32: Philox4x32-10 with the counter (e // 4, 0, draw, 0), keyed by the seed, through Box and Muller."""
    size = int(np.prod(shape))
    group = np.arange((size + 3) // 4, dtype=np.uint64)[None]  # (1, G)
    low = np.uint64(0xFFFFFFFF)
    seed = seeds.astype(np.uint64)[:, None]  # (B, 1)
    zero = np.zeros_like(group)
    c0, c1, c2, c3 = group, zero, zero + (np.uint64(draw) & low), zero
    k0, k1 = seed & low, seed >> np.uint64(32)
    for _ in range(10):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (second >> np.uint64(32)) ^ c1 ^ k0, second & low
        c2, c3 = (first >> np.uint64(32)) ^ c3 ^ k1, first & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    parts = []
    for p, q in ((c0, c1), (c2, c3)):
        radius = np.sqrt(-2 * np.log(p.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)))
        angle = q.astype(np.float32) * np.float32(2 * np.pi * 2**-32)
        parts += [radius * np.cos(angle), radius * np.sin(angle)]
    return np.stack(parts, -1).reshape(len(seeds), -1)[:, :size].reshape(len(seeds), *shape).astype(np.float32)


# -- tensors -------------------------------------------------------------------------------------------------------------------


async def _call(model: str, inputs: dict[str, Array], *outputs: str) -> dict[str, Array]:
    """Outputs of another model of this server, on the host."""
    request = pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=list(outputs),
        inputs=[pb_utils.Tensor(name, np.ascontiguousarray(value)) for name, value in inputs.items()],
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
    )
    response = await request.async_exec()
    if response.has_error():
        raise pb_utils.TritonModelException(f"{model}: {response.error().message()}")
    return {name: pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in outputs}


def _array(request: Any, name: str) -> Array | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def _column(request: Any, name: str) -> Array | None:
    """(B, 1) -> (B,)."""
    array = _array(request, name)
    return None if array is None else array.reshape(len(array))


def _strings(request: Any, name: str) -> list[str] | None:
    column = _column(request, name)
    return None if column is None else [value.decode() if isinstance(value, bytes) else str(value) for value in column]


def _clauses(caption: str, split: str) -> list[str]:
    if not split:
        return [caption] if caption.strip() else []
    return [clause for part in caption.split(split) if (clause := part.strip())]


def _same_length(*pairs: tuple[Array, Array]) -> list[tuple[Array, Array]]:
    """Features and masks padded to the longest of them."""
    longest = max(mask.shape[1] for _, mask in pairs)
    padded = []
    for features, mask in pairs:
        rest = longest - mask.shape[1]
        padded.append((np.pad(features, ((0, 0), (0, rest), (0, 0))), np.pad(mask, ((0, 0), (0, rest)))))
    return padded
