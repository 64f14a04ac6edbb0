"""The tokenizer run by a plan: what :class:`TexTok` computes, without what need not be computed.

- Rows of a ViT's input that are parameters (the decoder's patch queries, the encoder's latents) have the same first LayerNorm,
  queries, keys and values for every picture: they are computed once. On a CPU so is the patch queries' attention among
  themselves, which is most of the first block's.
- Bytes go to the patch embedding as they are: their change to [-1, 1] is part of its weights.
- Captions are as long as the batch's longest, and attention has no mask where nothing is padded. Compiled, captured, and
  where there is padding, lengths are multiples of 16: few shapes to compile, and aligned ones.
- The last blocks compute only the rows that are read, which TexTok does itself.
- On CUDA a plan that captures makes encoder and decoder a graph for each shape that comes a second time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from textok_fast import ops
from textok_fast.inference.execution import CapturedByShape, compiled, own_modes
from textok_fast.inference.memory import MemoryEstimate, available_memory, require_fits, weights_estimate
from textok_fast.inference.plan import Plan
from textok_fast.inference.precision import STREAM, SplitAttention, pack_linears, prepare, weight_bytes
from textok_fast.modeling.layers import (
    Attention,
    Rotary,
    RowModulation,
    TextProjection,
    ViTBlock,
    add_and_norm,
    is_plain,
    is_untouched,
)
from textok_fast.modeling.text_encoders import TextEncoder, TextFeatures
from textok_fast.modeling.tokenizer import Captions, Decoder, Encoder, Images, TexTok, Tokens, to_uint8
from textok_fast.ops.device import resolve_device
from textok_fast.ops.dispatch import choose, use_backend

if TYPE_CHECKING:
    from textok_fast.inference.stream import Decoded, Encoded

TEXT_MULTIPLE = 16
BYTE_ZERO = 128  # what is taken from a byte: -128 to 127 is exact in bfloat16, and near the middle of [-1, 1]


class TokenizerEngine:
    """A TexTok run by a :class:`Plan`: ``encode`` and ``decode`` take, give, check and refuse what the model's do.

    Results are the model's but for rounding. The model itself stays as it was; its text encoder is shared.

    Args:
        model: the tokenizer, on any device.
        plan: None for ``Plan.automatic()``.

    Raises: InputError for a plan that this machine cannot follow.
    """

    def __init__(self, model: TexTok, plan: Plan | None = None) -> None:
        self.plan = (Plan.automatic() if plan is None else plan).require_machine()
        device = resolve_device(self.plan.device)
        packs = self.plan.products != "reference"
        estimate = weights_estimate(model, self.plan.precision, device, packs, self.plan.memory_limit)
        other = "another precision" if self.plan.precision == "fp32" else "another device"
        require_fits(estimate, f"the model in {self.plan.precision}", f"use {other}")
        with self._backends():  # packed products are of the backend that is forced while they are packed
            self.model = prepare(model, self.plan.precision, device=device, products=self.plan.products)
            self.model._text_encoder = model._text_encoder  # the list itself: a text encoder given to either is both's
            encoder = FastEncoder(self.model.encoder, model.encoder)
            decoder = FastDecoder(self.model.decoder, model.decoder)
            if device.type == "cpu" and packs:  # what `prepare` leaves: the embeddings and outputs
                for network in (encoder, decoder):
                    pack_linears(network, "bf16" if self.model.dtype == torch.bfloat16 else "fp32", self.plan.products)
        self._largest = {"encode": 0, "decode": 0}  # rows of the sequence, over all pictures, that have fitted
        side = _Side(encoder, compiled(encoder.run, self.plan), self.plan, partial(self._room, "encode"))
        self.model.encoder = side  # type: ignore[assignment]
        side = _DecoderSide(decoder, compiled(decoder.run, self.plan), self.plan, partial(self._room, "decode"))
        self.model.decoder = side  # type: ignore[assignment]
        self._weights = weight_bytes(self.model)

    def encode(self, images: Images, captions: Captions = None) -> Tokens:
        """:meth:`TexTok.encode`: pictures and captions -> tokens (B, N, d) in the plan's precision, on its device."""
        with self._backends():
            return self.model.encode(images, captions)

    def encode_pixels(self, pixels: Tensor, text: TextFeatures | None) -> Tokens:
        """:meth:`TexTok.encode_pixels`; ``text`` may lie on the CPU, and then nothing waits for the device."""
        with self._backends():
            return self.model.encode_pixels(pixels, text)

    def decode(self, tokens: Tensor, captions: Captions = None, output: Literal["float", "uint8"] = "float") -> Tensor:
        """:meth:`TexTok.decode`: tokens and captions -> pictures, float (B, 3, S, S) or uint8 (B, S, S, 3)."""
        with self._backends():
            return self.model.decode(tokens, captions, output)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, text: TextFeatures | None) -> Tensor:
        """What :meth:`decode` does after its checks: raw latents (B, N, d) and text features -> uint8 (B, S, S, 3)."""
        with self._backends():
            return self.model.decoder.uint8(latents, text)

    def encode_stream(self, items: Iterable[Any], batch_size: int = 32, **options: Any) -> Iterator[Encoded]:
        """:func:`textok_fast.inference.stream.encode_stream` with this engine."""
        from textok_fast.inference.stream import encode_stream

        return encode_stream(self, items, batch_size, **options)

    def decode_stream(self, items: Iterable[Any], batch_size: int = 32, **options: Any) -> Iterator[Decoded]:
        """:func:`textok_fast.inference.stream.decode_stream` with this engine."""
        from textok_fast.inference.stream import decode_stream

        return decode_stream(self, items, batch_size, **options)

    def memory(self, batch: int, text_tokens: int | None = None) -> MemoryEstimate:
        """What encoding or decoding ``batch`` pictures takes, the larger of both.

        ``text_tokens``: of the longest caption; None for the most that there can be.
        """
        config = self.model.config
        text = config.max_text_tokens if text_tokens is None else text_tokens
        has_text = config.text_in_encoder or config.text_in_decoder
        rows = (
            config.num_patches + config.num_tokens + max(config.registers, config.decoder_registers) + (text if has_text else 0)
        )
        # At the worst moment: the residual stream, its LayerNorm, and either packed q, k, v (twice where the first block puts
        # constant and other rows together) and the attention's result, or the MLP's hidden layer before and after the GELU.
        size = self.model.dtype.itemsize
        row = max(config.width, config.decoder_width) * (STREAM.itemsize + size * (1 + max(7.0, 2 * config.mlp_ratio)))
        # Bytes, patches and pictures of 3 S S numbers in the model's dtype; captions.
        state = batch * (3 * config.image_size**2 * (1 + 3 * size) + text * (config.text_dim * size + 1) * has_text)
        device = self.model.device
        if self.plan.capture != "none":
            state *= 2  # what the graphs read and write
        available = available_memory(device, self._weights, self.plan.memory_limit)
        return MemoryEstimate(self._weights, 0, int(batch * rows * row), state, available)

    def _room(self, side: str, batch: int, text_tokens: int) -> int:
        """How many of ``batch`` pictures go through at once; InputError when not all, and the plan does not split."""
        rows = batch * (self.model.config.num_patches + self.model.config.num_tokens + text_tokens)
        if rows <= self._largest[side]:
            return batch
        fitting = batch
        while self.plan.split and fitting > 1 and not self.memory(fitting, text_tokens).fits:
            fitting = math.ceil(fitting / 2)
        advice = "use fewer pictures at once, or split=True in the plan"
        require_fits(self.memory(fitting, text_tokens), f"a batch of {fitting} to {side}", advice)
        if fitting == batch:
            self._largest[side] = rows
        return fitting

    @contextmanager
    def _backends(self) -> Iterator[None]:
        """What the networks run in: the plan's backends and modes, on the plan's device."""
        with ExitStack() as stack:
            device = resolve_device(self.plan.device)
            stack.enter_context(own_modes(device))
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
            if self.plan.ops:
                every, single = self.plan.backends
                stack.enter_context(use_backend(every, **single))
            yield

    # -- what else a tokenizer is asked for ----------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def text_encoder(self) -> TextEncoder:
        return self.model.text_encoder

    @property
    def latent_mean(self) -> Tensor:
        return self.model.latent_mean

    @property
    def latent_std(self) -> Tensor:
        return self.model.latent_std

    def text_features(self, captions: Captions, batch: int) -> TextFeatures | None:
        """:meth:`TexTok.text_features`."""
        return self.model.text_features(captions, batch)

    def preprocess(self, images: Images) -> Tensor:
        """:meth:`TexTok.preprocess`."""
        return self.model.preprocess(images)

    def normalize(self, latents: Tensor) -> Tensor:
        """:meth:`TexTok.normalize`."""
        return self.model.normalize(latents)

    def denormalize(self, tokens: Tensor) -> Tensor:
        """:meth:`TexTok.denormalize`."""
        return self.model.denormalize(tokens)


# -- captions ----------------------------------------------------------------------------------------------------------------


class ShortText(NamedTuple):
    """Captions cut to what the batch needs."""

    features: Tensor | None  # (B, N_t, D_t); None: nobody has a caption
    mask: Tensor | None  # (B, N_t) bool; None: nothing is padded


def shorten(text: TextFeatures | None, fixed_lengths: bool, most: int | None = None) -> ShortText:
    """Captions without the places that no caption of the batch uses.

    Captions of one length stay that long, unless ``fixed_lengths`` asks for few different ones; else N_t is the longest's,
    rounded up to a multiple of 16, but not above ``most``.
    """
    if text is None or not text.mask.numel():
        return ShortText(None, None)
    features, mask = text
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)  # (N_t,)
    last = (mask * places).amax(1)  # (B,): the last real token's place; a mask may have holes
    longest, padded = torch.stack([last.max(), (mask.sum(1) < last.max()).any().long()]).tolist()
    if not longest:
        return ShortText(None, None)
    width = longest
    if fixed_lengths or padded:
        width = math.ceil(longest / TEXT_MULTIPLE) * TEXT_MULTIPLE
        width = width if most is None else min(width, max(most, longest))
    features, mask = features[:, :width], mask[:, :width]
    if missing := width - mask.shape[1]:
        features = nn.functional.pad(features, (0, 0, 0, missing))  # (B, N_t, D_t)
        mask = nn.functional.pad(mask, (0, missing))  # (B, N_t)
    return ShortText(features, mask if padded or width > longest else None)


def upload(values: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``values`` on ``device`` in ``dtype``. From the CPU to a GPU in that dtype and out of pinned memory, which torch reuses
    when the copy is through: so the host does not wait for it."""
    dtype = values.dtype if dtype is None else dtype
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.to(dtype).pin_memory()
    return values.to(device, dtype, non_blocking=True)


def _text_rows(projection: TextProjection | None, text: ShortText, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """Tokens (B, N_t, D) and their mask (B, N_t), or None where nothing is padded."""
    if projection is None:
        return None, None
    if text.features is None:
        return projection(None, batch).tokens, None
    given = text.mask
    if given is None:
        given = torch.ones(text.features.shape[:2], dtype=torch.bool, device=text.features.device)  # (B, N_t)
    tokens, mask = projection(TextFeatures(text.features, given), batch)
    return tokens, None if text.mask is None else mask


# -- the networks ------------------------------------------------------------------------------------------------------------


class ConstantRows(nn.Module):
    """Rows of a ViT's input that are parameters, and all that the first block computes of them alone.

    Args:
        rows: (n, D).
        block: the first block.
        alone: also their attention among themselves, to which :meth:`attend` adds the other rows. Where torch's attention on
            the CPU runs, which returns the logarithm of the sum that it divides by.
    """

    qkv: Tensor
    out: Tensor
    log_sum: Tensor

    def __init__(self, rows: Tensor, block: ViTBlock, alone: bool) -> None:
        super().__init__()
        rows = rows.detach().unsqueeze(0)  # (1, n, D)
        self.heads = block.attn.heads
        self.register_buffer("qkv", block.attn.qkv(block.norm1(rows)), persistent=False)  # (1, n, 3 D)
        q, k, v = self.qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)  # each (1, n, H, D / H)
        self.alone = alone and rows.is_cpu and choose("attention", q, k, v, None) in ("native", "sdpa")
        if self.alone:
            out, log_sum = _attention_with_log_sum(q, k, v)
            self.register_buffer("out", out.float(), persistent=False)  # (1, n, H, D / H)
            self.register_buffer("log_sum", log_sum, persistent=False)  # (1, n, H)

    def attend(self, qkv: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of all rows (B, n + M, 3 D) to all of them, the constant ones first -> (B, n + M, D).

        With o and s the result and the sum of exponentials over some keys, those of two sets of keys join to
        (s_1 o_1 + s_2 o_2) / (s_1 + s_2) (Milakov & Gimelshein 2018, arXiv 1805.02867).
        """
        if not self.alone:
            return ops.short_attention(qkv, self.heads, mask)
        n = self.qkv.shape[1]
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)  # each (B, n + M, H, D / H)
        to_others, log_sum = _attention_with_log_sum(q[:, :n], k[:, n:], v[:, n:], None if mask is None else mask[:, n:])
        share = torch.sigmoid(log_sum - self.log_sum).unsqueeze(-1)  # (B, n, H, 1)
        constant = torch.lerp(self.out, to_others.float(), share).to(qkv.dtype).flatten(2)  # (B, n, D)
        return torch.cat([constant, ops.attention(q[:, n:], k, v, mask)], dim=1)  # (B, n + M, D)


def _attention_with_log_sum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention (B, N_q, H, D / H) and, for each query, log sum exp of its scores (B, N_q, H) float32."""
    bias = None
    if mask is not None:  # (B, 1, 1, N_k)
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -math.inf)[:, None, None, :]
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias
    )
    return out.transpose(1, 2), log_sum.transpose(1, 2)


def _is_made_of_parts(block: nn.Module) -> TypeGuard[ViTBlock]:
    """Whether a block does what its parts do one after the other. Not an FP8 block, which hands on quantized rows, nor one that
    somebody has put something in the place of, or hung a hook on."""
    return (
        is_untouched(block, ViTBlock)
        and isinstance(block, ViTBlock)
        and (is_untouched(block.attn, Attention) or is_untouched(block.attn, SplitAttention))
    )


class _ViT(nn.Module):
    """The blocks of ``vit`` over [constant rows, other rows], the first of them without what is constant.

    Args:
        vit: the network in the precision to run.
        original: in the model's own precision: so its constant rows enter the residual stream, which is float32.
        name: of the parameter that is the constant rows, (n, D).
        read: how many of them are read in the end.
        patches: at which row the patches begin.
    """

    rows: Tensor
    stream: Tensor

    def __init__(
        self, vit: Encoder | Decoder, original: Encoder | Decoder, name: str, read: int, patches: int, alone: bool
    ) -> None:
        super().__init__()
        self.vit, self._read, self._alike = vit, slice(0, read), original.rope is None
        rows, exact = getattr(vit, name).detach(), getattr(original, name).detach()  # each (n, D)
        if vit.pre_norm is not None and original.pre_norm is not None:
            rows, exact = vit.pre_norm(rows).detach(), original.pre_norm(exact).detach()
        block = vit.blocks[0]
        # Rows that are turned by their places have no common keys; of their own they would still have constant ones.
        self.constant = ConstantRows(rows, block, alone) if self._alike and _is_made_of_parts(block) else None
        self.register_buffer("rows", rows.unsqueeze(0), persistent=False)  # (1, n, D)
        exact = exact.unsqueeze(0).to(rows.device, STREAM)  # (1, n, D)
        self.register_buffer("stream", self.rows if rows.dtype == STREAM else exact, persistent=False)
        self._start = patches
        angles = [] if original.rope is None else original.rope(patches)  # in float32, whatever runs
        for name in ("cos", "sin"):
            table = torch.stack([getattr(each, name) for each in angles]).detach().to(rows.device) if angles else None
            self.register_buffer(f"_{name}", table, persistent=False)  # (depth, hw, H, D / 2)

    def _rotary(self, block: int) -> Rotary | None:
        return None if self._alike else Rotary(self._cos[block], self._sin[block], self._start)  # type: ignore[index]

    def blocks(self, x: Tensor, text: ShortText, modulations: Sequence[RowModulation] | None = None) -> Tensor:
        """x (B, M, D), what comes after the constant rows and before the text -> norm(last block's constant rows) (B, n, D).

        ``modulations``: of each block, none of them of constant rows.
        """
        batch, count = x.shape[0], self.rows.shape[1]
        tokens, mask = _text_rows(self.vit.text, text, batch)
        if mask is not None:
            own = torch.ones(batch, count + x.shape[1], dtype=torch.bool, device=x.device)  # (B, n + M)
            mask = torch.cat([own, mask], dim=1)  # (B, n + M + N_t)
        x = x if tokens is None else torch.cat([x, tokens], dim=1)  # (B, M + N_t, D)
        x = x if self.vit.pre_norm is None else self.vit.pre_norm(x)
        blocks, wanted = self.vit.blocks, self._read
        following: list[Any] = [*(block.norm1 for block in blocks[1:]), self.vit.norm]
        last, done = len(blocks) - 1, 0
        modulated = [None] * len(blocks) if modulations is None else modulations
        if self.constant is None:
            hidden = blocks[0].norm1(torch.cat([self.rows.expand(batch, -1, -1), x], dim=1))  # type: ignore[operator]
            x = torch.cat([self.stream.expand(batch, -1, -1), x.to(STREAM)], dim=1)  # (B, n + M + N_t, D)
        else:
            x, hidden = self._first_block(x, following[0], mask, wanted if last == 0 else None, modulated[0])
            done = 1
        for index in range(done, len(blocks)):
            rows, rotary = wanted if index == last else None, self._rotary(index)
            x, hidden = blocks[index](x, hidden, following[index], mask, rows, rotary, modulated[index])
        return hidden

    def _first_block(
        self, x: Tensor, following: nn.LayerNorm, mask: Tensor | None, rows: slice | None, modulation: RowModulation | None
    ) -> tuple[Tensor, Tensor]:
        """:meth:`ViTBlock.forward` of the constant rows and x (B, M, D)."""
        block, constant = self.vit.blocks[0], self.constant
        assert constant is not None and isinstance(block, ViTBlock)
        hidden = block.norm1(x)
        if modulation is not None:
            hidden = modulation._replace(start=modulation.start - self.rows.shape[1]).before_attention(hidden)
        qkv = block.attn.qkv(hidden)  # (B, M, 3 D)
        qkv = torch.cat([constant.qkv.expand(x.shape[0], -1, -1), qkv], dim=1)  # (B, n + M, 3 D)
        x = torch.cat([self.stream.expand(x.shape[0], -1, -1), x.to(STREAM)], dim=1)  # (B, n + M, D)
        out = constant.attend(qkv, mask)  # (B, n + M, D)
        x, out = (x, out) if rows is None else (x[:, rows], out[:, rows])
        x, hidden = add_and_norm(x, block.attn.proj(out), block.norm2)
        hidden = hidden if modulation is None else modulation.before_mlp(hidden)
        return add_and_norm(x, block.mlp(hidden), following)


class FastEncoder(_ViT):
    """:class:`Encoder` over [latents, patches, text]: the order of the rows is of no consequence to attention.

    Args:
        vit: the encoder in the precision to run.
        original: the encoder in the model's own precision, whose latents and patch embedding are taken.
    """

    def __init__(self, vit: Encoder, original: Encoder) -> None:
        read = vit.latent_rows.stop - vit.latent_rows.start
        super().__init__(vit, original, "latents", read, patches=len(vit.latents), alone=False)
        self.patch_size = vit.patch_size
        self.from_bytes: nn.Sequential | None = None
        if is_plain(original.patch_embed, nn.Linear):
            self.from_bytes = nn.Sequential(_fold_bytes(original.patch_embed, self.patch_size).to(vit.latents))

    def run(self, pixels: Tensor, features: Tensor | None, mask: Tensor | None) -> Tensor:
        """pixels (B, 3, S, S) in [-1, 1] or uint8 (B, S, S, 3); :class:`ShortText` -> (B, N, out_dim)."""
        if pixels.dtype != torch.uint8:
            patches = self.vit.patch_embed(ops.patchify(pixels, self.patch_size))  # type: ignore[operator]  # (B, hw, D)
        elif self.from_bytes is None:
            patches = ops.patchify_uint8(pixels, self.patch_size, self.rows.dtype)  # (B, hw, 3 p p)
            patches = self.vit.patch_embed(patches)  # type: ignore[operator]  # (B, hw, D)
        else:
            levels = byte_patches(pixels, self.patch_size).to(self.rows.dtype)
            patches = self.from_bytes(levels - BYTE_ZERO)  # (B, hw, D)
        x = patches + self.vit.patch_positions
        return self.vit.to_latents(self.blocks(x, ShortText(features, mask)))  # type: ignore[operator]  # (B, N, out_dim)


def byte_patches(images: Tensor, patch_size: int) -> Tensor:
    """(B, S, S, 3) -> (B, hw, p p 3): inside a patch row, column, channel, the order in which the bytes lie."""
    b, height, width, _ = images.shape
    p = patch_size
    rows = images.reshape(b, height // p, p, width // p, p * 3).transpose(2, 3)  # (B, h, w, p, p 3)
    return rows.reshape(b, (height // p) * (width // p), p * p * 3)


def _fold_bytes(embed: nn.Linear, patch_size: int) -> nn.Linear:
    """A linear layer over ``byte_patches - 128`` that gives what ``embed`` gives for the patches of byte / 127.5 - 1.

    W (u / 127.5 - 1) + b = (W / 127.5) (u - 128) + b + W 0.5 / 127.5.
    """
    weight = embed.weight.detach().double() / 127.5  # (D, 3 p p)
    bias = weight.sum(1) * (BYTE_ZERO - 127.5) + embed.bias.detach().double()  # (D,)
    weight = weight.unflatten(1, (3, patch_size, patch_size)).permute(0, 2, 3, 1).flatten(1)  # (D, p p 3)
    folded = nn.Linear(embed.in_features, embed.out_features, device="meta")
    folded.weight, folded.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return folded


class FastDecoder(_ViT):
    """:class:`Decoder` over [patch queries, latents, text]. ``original``: as in :class:`FastEncoder`."""

    def __init__(self, vit: Decoder, original: Decoder) -> None:
        super().__init__(vit, original, "queries", vit.patch_rows.stop, patches=0, alone=True)

    def run(self, latents: Tensor, features: Tensor | None, mask: Tensor | None) -> Tensor:
        """latents (B, N, d); :class:`ShortText` -> flat patches (B, hw, 3 p p), not clamped."""
        x = self.vit.from_latents(latents) + self.vit.latent_positions  # type: ignore[operator]  # (B, N, D)
        hidden = self.blocks(x, ShortText(features, mask), self.vit.modulations(latents))  # type: ignore[operator]
        return self.vit.to_pixels(hidden)  # type: ignore[operator]  # (B, hw, 3 p p)


# -- in the model's place ----------------------------------------------------------------------------------------------------


class _Side(nn.Module):
    """Stands where the model has its encoder: shortens the captions, and runs the batch in parts where the plan says so."""

    def __init__(
        self, network: FastEncoder | FastDecoder, run: Callable[..., Tensor], plan: Plan, room: Callable[[int, int], int]
    ) -> None:
        super().__init__()
        self.network = network
        self._run, self._room = run if plan.capture == "none" else CapturedByShape(run, "the tokenizer"), room
        self._fixed_lengths = plan.compile != "none" or plan.capture != "none"
        positions = network.vit.text.positions if network.vit.text is not None else None
        self._most = None if positions is None else len(positions)

    def forward(self, x: Tensor, text: TextFeatures | None) -> Tensor:
        """pixels or latents (B, ...) and text features -> what the network's ``run`` gives, (B, ...)."""
        features, mask = shorten(text, self._fixed_lengths, self._most)
        if features is not None:
            features = upload(features, x.device, self.network.rows.dtype)
            mask = None if mask is None else upload(mask, x.device)
        size = max(self._room(len(x), 1 if features is None else features.shape[1]), 1)
        parts = [
            self._run(
                x[start : start + size],
                None if features is None else features[start : start + size],
                None if mask is None else mask[start : start + size],
            )
            for start in range(0, max(len(x), 1), size)  # of no picture, one part of none
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class _DecoderSide(_Side):
    """Stands where the model has its decoder."""

    @property
    def queries(self) -> Tensor:
        """By which a TexTok knows its device and dtype."""
        return self.network.rows

    def patches(self, latents: Tensor, text: TextFeatures | None) -> Tensor:
        """As :meth:`Decoder.patches`."""
        return super().forward(latents, text)

    def forward(self, latents: Tensor, text: TextFeatures | None) -> Tensor:
        """As :meth:`Decoder.forward`."""
        pixels = ops.unpatchify(self.patches(latents, text), self.network.vit.patch_size)  # (B, 3, S, S)
        conv: nn.Module | None = self.network.vit.conv_out  # type: ignore[assignment]
        return pixels if conv is None else conv(pixels)

    def uint8(self, latents: Tensor, text: TextFeatures | None) -> Tensor:
        """As :meth:`Decoder.uint8`."""
        if self.network.vit.conv_out is None:
            return ops.unpatchify_uint8(self.patches(latents, text), self.network.vit.patch_size)
        return to_uint8(self(latents, text))
