"""Pictures without end to tokens, and back: threads read and prepare what comes next while the network computes.

Items are drawn from the caller's iterable in the calling thread, as many as the look-ahead allows; threads decode pictures
(Pillow's decoders release Python's lock), one thread computes captions' features. A batch is the oldest item that is not done
and those of the look-ahead whose captions are nearest to its in length. Which items share a batch depends on the items alone,
not on which thread is faster. Results come in the order of the items.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from textok_fast.data.crops import center_square
from textok_fast.data.files import decode_image
from textok_fast.errors import InputError
from textok_fast.inference.tokenizer import TEXT_MULTIPLE, TokenizerEngine
from textok_fast.modeling.text_encoders import TextFeatures, pad_features

Picture = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor


@dataclass(frozen=True)
class Encoded:
    """What became of item ``index``: its tokens on the CPU, or the reason why it has none."""

    index: int
    tokens: Tensor | None = None  # (N, d) float32
    indices: Tensor | None = None  # (N,) int64, for VQ and FSQ
    error: str = ""  # names the item


@dataclass(frozen=True)
class Decoded:
    """What became of item ``index``: its picture, or the reason why it has none."""

    index: int
    image: np.ndarray | None = None  # (S, S, 3) uint8
    error: str = ""


def encode_stream(
    engine: TokenizerEngine,
    items: Iterable[tuple[Picture, str | None]],
    batch_size: int = 32,
    *,
    workers: int | None = None,
    bucket: int = TEXT_MULTIPLE,
    lookahead: int | None = None,
) -> Iterator[Encoded]:
    """Tokens of captioned pictures, one :class:`Encoded` an item, in their order.

    An item that cannot be read or prepared, or whose caption the text encoder refuses (InputError), gives a record with its
    ``error``, and the stream goes on. Closing the iterator, Ctrl-C, or any other exception stops it and its threads; one out of
    ``items`` is raised behind the results of what came before it. Arrays and tensors are copied when they are drawn, so that
    ``items`` may fill one buffer again and again.

    Args:
        engine: the tokenizer.
        items: pictures with captions (None or "" for no caption). A picture is a path, the bytes of a file, a PIL image, or
            uint8 (H, W, 3); of one that is not S x S the center square is resized.
        batch_size: pictures in one pass of the network.
        workers: threads that read and decode pictures; None for the number of processors, at most 8.
        bucket: captions whose lengths round up to the same multiple of it count as equally long.
        lookahead: how many items a batch is chosen from, at least ``batch_size``; None for four batches. At most
            ``lookahead + batch_size`` items are in memory, 3 S^2 bytes and a caption's features each.

    Raises: InputError for sizes that make no sense.
    """
    size = engine.config.image_size

    def run(pictures: Sequence[np.ndarray], text: TextFeatures | None) -> dict[str, Tensor]:
        pixels = _to_device(torch.from_numpy(np.stack(pictures)), engine.device)  # (B, S, S, 3) uint8
        tokens = engine.encode_pixels(pixels, text)
        values = {"tokens": tokens.as_subclass(Tensor).float()}
        return values if tokens.indices is None else {**values, "indices": tokens.indices}

    return _Stream(
        engine,
        prepare=lambda picture: load_picture(picture, size),
        run=run,
        result=Encoded,
        has_text=engine.config.text_in_encoder,
        sizes=_Sizes(batch_size, workers, bucket, lookahead),
    ).results(items)


def decode_stream(
    engine: TokenizerEngine,
    items: Iterable[tuple[Tensor, str | None]],
    batch_size: int = 32,
    *,
    bucket: int = TEXT_MULTIPLE,
    lookahead: int | None = None,
) -> Iterator[Decoded]:
    """Pictures of captioned tokens, one :class:`Decoded` an item, in their order: the way back of :func:`encode_stream`.

    ``items``: tokens (N, d) float, or indices (N,) int64 for VQ and FSQ, with captions. The rest as there.
    """

    def prepare(tokens: Tensor) -> Tensor:
        if not isinstance(tokens, Tensor):
            raise InputError(f"tokens must be a tensor, got {type(tokens).__name__}")
        checked = engine.model._check_tokens(tokens.unsqueeze(0))[0]  # on the CPU
        return checked.to(engine.dtype) if checked.is_floating_point() else checked

    def run(tokens: Sequence[Tensor], text: TextFeatures | None) -> dict[str, Tensor]:
        # Some items may be tokens and others indices.
        alike = [torch.stack(list(group)) for _, group in itertools.groupby(tokens, key=lambda each: each.dtype)]
        with torch.no_grad():
            latents = torch.cat([engine.model._raw_latents(_to_device(group, engine.device)) for group in alike])  # (B, N, d)
        return {"image": engine.decode_latents(latents, text)}  # (B, S, S, 3)

    return _Stream(
        engine,
        prepare=prepare,
        run=run,
        result=lambda index, image: Decoded(index, image.numpy()),
        failed=lambda index, error: Decoded(index, error=error),
        has_text=engine.config.text_in_decoder,
        sizes=_Sizes(batch_size, 1, bucket, lookahead),
    ).results(items)


def load_picture(picture: Picture, size: int) -> np.ndarray:
    """Any form of picture that :func:`encode_stream` takes -> its center square, (S, S, 3) uint8."""
    if isinstance(picture, (str, os.PathLike)):
        return decode_image(Path(picture).read_bytes(), size)
    if isinstance(picture, bytes):
        return decode_image(picture, size)
    if isinstance(picture, Image.Image):
        return center_square(picture, size)
    if not isinstance(picture, (np.ndarray, Tensor)):
        raise InputError(f"a picture is a path, bytes, a PIL image or a uint8 array, got {type(picture).__name__}")
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise InputError(f"a picture as an array must be uint8 (H, W, 3), got {array.dtype} {array.shape}")
    return array if array.shape[:2] == (size, size) else center_square(Image.fromarray(array), size)


# -- the stream --------------------------------------------------------------------------------------------------------------


class _Sizes:
    """The numbers that a caller may give, checked."""

    def __init__(self, batch_size: int, workers: int | None, bucket: int, lookahead: int | None) -> None:
        self.batch = batch_size
        self.workers = min(os.cpu_count() or 1, 8) if workers is None else workers
        self.bucket = bucket
        self.lookahead = 4 * batch_size if lookahead is None else lookahead
        for name, value in {"batch_size": self.batch, "workers": self.workers, "bucket": self.bucket}.items():
            if not _is_count(value) or value < 1:
                raise InputError(f"{name} must be at least 1, an integer, got {value!r}")
        if not _is_count(self.lookahead) or self.lookahead < self.batch:
            raise InputError(f"lookahead must be at least batch_size = {self.batch}, an integer, got {self.lookahead!r}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(eq=False)
class _Entry:
    """An item between being drawn and being delivered."""

    index: int
    name: str
    caption: Any
    ready: Future[Any]  # what `prepare` made of the item
    text: Future[list[Tensor | Exception]] | None = None  # of the group that it was drawn with
    place: int = 0  # in that group
    taken: bool = False  # by a batch, or failed
    result: Any = field(default=None)


class _Stream:
    """One run of :func:`encode_stream` or :func:`decode_stream`.

    Args:
        prepare: in a thread: an item's first half -> what ``run`` takes of it.
        run: prepared items and their captions -> tensors (B, ...) by the name of the result's field.
        result: makes a record of an index and those fields; ``failed`` of an index and an ``error``.
    """

    def __init__(
        self,
        engine: TokenizerEngine,
        *,
        prepare: Callable[[Any], Any],
        run: Callable[[Sequence[Any], TextFeatures | None], dict[str, Tensor]],
        result: Callable[..., Any],
        failed: Callable[..., Any] | None = None,
        has_text: bool,
        sizes: _Sizes,
    ) -> None:
        self.engine, self.sizes = engine, sizes
        self.prepare, self.run = prepare, run
        self.result, self.failed = result, failed or result
        self.text_encoder = engine.text_encoder if has_text else None  # loaded now: without it no item could be read
        self.window: deque[_Entry] = deque()  # drawn and not delivered, in their order
        self.exhausted: Exception | bool = False

    def results(self, items: Iterable[Any]) -> Iterator[Any]:
        """The records, in order."""
        source = enumerate(items)
        flying: deque[tuple[list[_Entry], _Download]] = deque()  # batches whose results are still on their way
        depth = 1 if self.engine.device.type == "cuda" else 0
        # Not as a with statement: what is queued must not be worked off when the stream is closed.
        threads = ThreadPoolExecutor(self.sizes.workers, "textok-read")
        text_thread = ThreadPoolExecutor(1, "textok-text")
        try:
            while True:
                self._draw(source, threads, text_thread)
                batch = self._choose()
                if batch:
                    flying.append((batch, self._start(batch)))
                while flying and (len(flying) > depth or not batch):
                    self._finish(*flying.popleft())
                while self.window and self.window[0].result is not None:
                    yield self.window.popleft().result
                if not self.window:
                    if isinstance(self.exhausted, Exception):
                        raise self.exhausted
                    if self.exhausted:
                        return
        finally:
            for pool in (threads, text_thread):
                pool.shutdown(wait=False, cancel_futures=True)
            for pool in (threads, text_thread):
                pool.shutdown(wait=True)

    def _draw(self, source: Iterator[tuple[int, Any]], threads: ThreadPoolExecutor, text_thread: ThreadPoolExecutor) -> None:
        """Fills the window: what a batch is chosen from, and one batch more that threads prepare meanwhile."""
        while not self.exhausted and (wanted := self.sizes.lookahead + self.sizes.batch - len(self.window)) > 0:
            group: list[_Entry] = []
            try:
                for index, item in itertools.islice(source, min(wanted, self.sizes.batch)):
                    picture, caption, name = _parts(index, item)
                    ready = threads.submit(_prepare, self.prepare, _own(picture))
                    group.append(_Entry(index, name, caption, ready, place=len(group)))
            except Exception as error:
                self.exhausted = error
            else:
                self.exhausted = len(group) < min(wanted, self.sizes.batch)
            if group and self.text_encoder is not None:
                text = text_thread.submit(_features, self.text_encoder, [entry.caption for entry in group])
                for entry in group:
                    entry.text = text
            self.window += group

    def _choose(self) -> list[_Entry]:
        """The next batch; what cannot be read becomes a failed entry on the way."""
        waiting = [entry for entry in itertools.islice(self.window, self.sizes.lookahead) if not entry.taken]
        buckets: dict[int, int] = {}
        for entry in waiting:
            features = self._features_of(entry)
            if isinstance(features, Exception):
                self._fail(entry, features)
            else:
                buckets[entry.index] = -(-len(features) // self.sizes.bucket)
        batch: list[_Entry] = []
        waiting = [entry for entry in waiting if not entry.taken]
        while waiting and not batch:  # again when the oldest could not be read: its length decides no more
            first = buckets[waiting[0].index]
            for entry in sorted(waiting, key=lambda each: (abs(buckets[each.index] - first), each.index)):
                if len(batch) == self.sizes.batch:
                    break
                error = entry.ready.exception()
                if error is None:
                    entry.taken = True
                    batch.append(entry)
                elif isinstance(error, Exception):
                    self._fail(entry, error)
                else:
                    raise error
            waiting = [entry for entry in waiting if not entry.taken]
        return sorted(batch, key=lambda entry: entry.index)

    def _features_of(self, entry: _Entry) -> Tensor | Exception:
        return torch.zeros(0, 1) if entry.text is None else entry.text.result()[entry.place]

    def _fail(self, entry: _Entry, error: Exception) -> None:
        reason = " ".join(str(error).split()) or type(error).__name__
        entry.taken, entry.result = True, self.failed(entry.index, error=f"item {entry.index}{entry.name}: {reason}")

    def _start(self, batch: list[_Entry]) -> _Download:
        """Runs the network; on CUDA the results are then still being computed."""
        # A last, smaller batch would be a new shape to compile: its last item fills it up.
        rows = batch
        if self.engine.plan.compile != "none":
            rows = batch + [batch[-1]] * (self.sizes.batch - len(batch))
        text = None
        if self.text_encoder is not None:
            text = pad_features([self._features_of(entry) for entry in rows], multiple=1)  # type: ignore[misc]
        return _Download(self.run([entry.ready.result() for entry in rows], text))

    def _finish(self, batch: list[_Entry], download: _Download) -> None:
        values = download.wait()
        for row, entry in enumerate(batch):
            # A copy: who keeps one result must not keep the whole batch, nor write to another's.
            entry.result = self.result(entry.index, **{name: value[row].clone() for name, value in values.items()})


def _parts(index: int, item: Any) -> tuple[Any, Any, str]:
    """An item's picture, caption and name in messages."""
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        return _Malformed(type(item).__name__), None, ""
    picture, caption = item
    return picture, caption, f" ({os.fspath(picture)})" if isinstance(picture, (str, os.PathLike)) else ""


def _own(picture: Any) -> Any:
    """Arrays and tensors as they are now: a thread reads them later, and the caller may fill the same one again. What lies on
    a GPU comes to the CPU here, behind what the caller has started there."""
    if isinstance(picture, Tensor):
        return picture.detach().as_subclass(Tensor).to("cpu", copy=True)
    return picture.copy() if isinstance(picture, np.ndarray) else picture


@dataclass(frozen=True)
class _Malformed:
    """Stands for an item that is no pair."""

    kind: str


def _prepare(prepare: Callable[[Any], Any], picture: Any) -> Any:
    if isinstance(picture, _Malformed):
        raise InputError(f"an item is a pair of a picture (or tokens) and a caption, got {picture.kind}")
    return prepare(picture)


def _features(encoder: Any, captions: Sequence[Any]) -> list[Tensor | Exception]:
    """Features (n, D_t) of each caption; when the encoder refuses them (InputError), of each by itself."""
    found: list[Tensor | Exception] = [
        InputError(f"a caption must be a string or None, got {type(caption).__name__}") for caption in captions
    ]
    usable = [place for place, caption in enumerate(captions) if caption is None or isinstance(caption, str)]
    try:
        text = encoder([captions[place] or "" for place in usable]) if usable else None
    except InputError as error:
        if len(captions) == 1:
            return [error]
        return [_features(encoder, [caption])[0] for caption in captions]
    for row, place in enumerate(usable):
        assert text is not None
        found[place] = text.features[row, : int(text.mask[row].sum())].clone()  # (n, D_t), without the group's padding
    return found


# -- to the device and back --------------------------------------------------------------------------------------------------


def _to_device(given: Tensor, device: torch.device) -> Tensor:
    """``given`` from the CPU to ``device``. On CUDA from pinned memory, which torch reuses when the copy is through, on a
    stream of its own, so that a batch is copied while the one before it is computed."""
    if device.type != "cuda":
        return given.to(device)
    copies = _copy_stream(device)
    current = torch.cuda.current_stream(device)
    with torch.cuda.stream(copies):
        moved = given.pin_memory().to(device, non_blocking=True)
    current.wait_stream(copies)
    moved.record_stream(current)
    return moved


_copy_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _copy_streams:
        _copy_streams[device] = torch.cuda.Stream(device)
    return _copy_streams[device]


class _Download:
    """Results on their way to the CPU."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        self._values = values
        if any(value.is_cuda for value in values.values()):
            self._values = {
                name: torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
                for name, value in values.items()
            }
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(next(iter(values.values())).device))

    def wait(self) -> dict[str, Tensor]:
        """The values on the CPU, where they came from a GPU in pinned memory."""
        if self._event is not None:
            self._event.synchronize()
        return self._values
