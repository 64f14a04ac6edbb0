from __future__ import annotations

import io
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from textok_fast import InputError, TexTok
from textok_fast.data.files import decode_image
from textok_fast.inference import stream as module
from textok_fast.inference.plan import Plan
from textok_fast.inference.stream import Encoded, decode_stream, encode_stream, load_picture
from textok_fast.inference.tokenizer import TokenizerEngine

Make = Callable[..., TexTok]


@pytest.fixture
def engine(make_tokenizer: Make) -> TokenizerEngine:
    return TokenizerEngine(make_tokenizer(bottleneck="vq"), Plan(precision="fp32"))


def picture(seed: int, height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def words(count: int) -> str:
    return " ".join(f"word{i}" for i in range(count))


def stream_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("textok-")]


@pytest.fixture
def batches(engine: TokenizerEngine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """For each pass of the network how many pictures it has, and the lengths of their captions."""
    seen: list[tuple[int, list[int]]] = []
    encode = engine.encode_pixels

    def spy(pixels: Tensor, text: Any) -> Any:
        seen.append((len(pixels), [] if text is None else text.mask.sum(1).tolist()))
        return encode(pixels, text)

    monkeypatch.setattr(engine, "encode_pixels", spy)
    return seen


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_results_are_those_of_encode_in_the_order_of_the_items(engine: TokenizerEngine, batch_size: int) -> None:
    lengths = [3, 20, 0, 40, 18, 2, 33, 5, 21, 1, 17]
    items = [(picture(i), words(n) if n else None) for i, n in enumerate(lengths)]
    found = list(encode_stream(engine, iter(items), batch_size, workers=2, lookahead=max(batch_size, 5)))
    assert [each.index for each in found] == list(range(len(items)))
    for each, (image, caption) in zip(found, items, strict=True):
        wanted = engine.encode(image[None], [caption])
        assert not each.error
        assert each.tokens is not None and each.indices is not None and wanted.indices is not None
        assert (each.tokens.dtype, tuple(each.tokens.shape)) == (torch.float32, (3, 4))
        torch.testing.assert_close(each.tokens, wanted.mode()[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(each.indices, wanted.indices[0])
    assert not stream_threads()


def test_no_items(engine: TokenizerEngine) -> None:
    assert list(encode_stream(engine, [], 4)) == []


def test_every_form_of_picture(engine: TokenizerEngine, tmp_path: Path) -> None:
    square, wide = picture(0), picture(1, 20, 31)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    data = (tmp_path / "wide.png").read_bytes()
    wanted = decode_image(data, 16)
    for form in (
        tmp_path / "wide.png",
        str(tmp_path / "wide.png"),
        data,
        Image.open(io.BytesIO(data)),
        wide,
        torch.from_numpy(wide),
    ):
        assert np.array_equal(load_picture(form, 16), wanted)
    assert np.array_equal(load_picture(square, 16), square)
    found = list(engine.encode_stream([(data, "a b"), (square, "a b")], 2))
    torch.testing.assert_close(found[0].tokens, engine.encode(wanted[None], ["a b"]).mode()[0], atol=1e-5, rtol=1e-5)


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(engine: TokenizerEngine, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG not really")
    good = (picture(0), "a cow")
    items: list[Any] = [good, (tmp_path / "none.jpg", "a"), (tmp_path / "broken.png", "b"), good, (b"", "c"), (picture(1), 7)]
    items += [(picture(1).astype(np.float32), "d"), (np.zeros((4, 4), np.uint8), "d"), (3, "e"), "ab", picture(2), good]
    for batch_size in (1, 3, 20):
        found = list(encode_stream(engine, items, batch_size))
        assert [each.index for each in found] == list(range(len(items)))
        for index in (0, 3, len(items) - 1):
            assert not found[index].error
            torch.testing.assert_close(found[index].tokens, engine.encode(picture(0)[None], ["a cow"]).mode()[0])
        wanted = {
            1: "none.jpg",
            2: "broken.png",
            4: "item 4: ",
            5: "caption.*int",
            6: "float32",
            7: "uint8 .H, W, 3.",
            8: "int",
        }
        wanted |= {9: "item 9: .*pair", 10: "pair.*ndarray"}
        for index, text in wanted.items():
            with pytest.raises(AssertionError, match=text):
                raise AssertionError(found[index].error)
            assert f"item {index}" in found[index].error
            assert found[index].tokens is None


def test_only_unreadable_items(engine: TokenizerEngine) -> None:
    found = list(encode_stream(engine, [(b"x", "a")] * 9, 2))
    assert [each.index for each in found] == list(range(9))
    assert all(each.error for each in found)


def test_one_caption_that_the_text_encoder_refuses(engine: TokenizerEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder: Any = engine.text_encoder
    usual = type(encoder).__call__

    def refuse(self: Any, captions: list[str]) -> Any:
        if "bad" in captions:
            raise InputError("a caption is not valid")
        return usual(self, captions)

    monkeypatch.setattr(type(encoder), "__call__", refuse)
    found = list(encode_stream(engine, [(picture(0), caption) for caption in ("a", "bad", "b", "c")], 2))
    assert [bool(each.error) for each in found] == [False, True, False, False]
    assert found[1].error == "item 1: a caption is not valid"


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), OSError("the disk is gone")])
def test_a_text_encoder_that_fails_stops_the_stream(
    engine: TokenizerEngine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    calls: list[int] = []

    def fail(self: Any, captions: list[str]) -> Any:
        calls.append(len(captions))
        raise error

    monkeypatch.setattr(type(engine.text_encoder), "__call__", fail)
    with pytest.raises(type(error), match=str(error)):
        list(encode_stream(engine, [(picture(0), "a")] * 6, 3))
    assert set(calls) == {3}  # not again for each caption
    assert not stream_threads()


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_one_buffer_may_be_filled_again(engine: TokenizerEngine, monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    def late(*args: Any) -> np.ndarray:
        time.sleep(0.01)
        return load_picture(*args)

    monkeypatch.setattr(module, "load_picture", late)
    for size in (16, 20):  # as large as the tokenizer's pictures, and to be resized
        pictures = [picture(i, size, size) for i in range(5)]
        buffer: Any = make(pictures[0])

        def items(buffer: Any = buffer, pictures: list[np.ndarray] = pictures) -> Iterator[tuple[Any, str]]:
            for each in pictures:
                buffer[:] = each if make is np.array else torch.from_numpy(each)
                yield buffer, "a b"

        found = list(encode_stream(engine, items(), 2, workers=2))
        wanted = engine.encode(np.stack([load_picture(each, 16) for each in pictures]), ["a b"] * 5)
        torch.testing.assert_close(torch.stack([each.tokens for each in found]), wanted.mode(), atol=1e-5, rtol=1e-5)  # type: ignore[misc]
    tokens = wanted.mode()
    one = tokens[0].clone()
    back = list(decode_stream(engine, ((one.copy_(each), "a b") for each in tokens), 2))
    for each, row in zip(back, engine.decode(tokens, ["a b"] * 5, "uint8").numpy(), strict=True):
        assert each.image is not None
        assert int(np.abs(each.image.astype(int) - row).max()) <= 1


def test_a_result_keeps_no_batch_alive(engine: TokenizerEngine) -> None:
    found = list(encode_stream(engine, [(picture(i), words(1 + 9 * i)) for i in range(4)], 4))
    for each in found:
        assert each.tokens is not None and each.indices is not None
        for value in (each.tokens, each.indices):
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
    for back in decode_stream(engine, [(each.tokens, "a") for each in found], 4):  # type: ignore[misc]
        assert back.image is not None
        storage = torch.from_numpy(back.image).untyped_storage()
        assert storage.nbytes() == back.image.nbytes


def test_features_are_without_their_groups_padding(engine: TokenizerEngine) -> None:
    long, short = module._features(engine.text_encoder, [words(50), "a"])
    assert isinstance(long, Tensor) and isinstance(short, Tensor)
    assert (len(long), len(short)) == (50, 1)
    assert short.untyped_storage().nbytes() == short.numel() * short.element_size()


def test_batches_are_of_like_captions_and_depend_on_the_items_alone(
    engine: TokenizerEngine, batches: list[tuple[int, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [3, 40, 5, 41, 2, 44, 7, 39, 20, 1]
    items = [(picture(i), words(n)) for i, n in enumerate(lengths)]
    list(encode_stream(engine, items, 2, lookahead=4, workers=3))
    assert batches == [(2, [3, 5]), (2, [40, 41]), (2, [2, 7]), (2, [44, 39]), (2, [20, 1])]
    first = batches.copy()
    batches.clear()
    delays = itertools.cycle([0.02, 0.0, 0.005])

    def slow(*args: Any) -> np.ndarray:
        time.sleep(next(delays))
        return load_picture(*args)

    monkeypatch.setattr(module, "load_picture", slow)
    list(encode_stream(engine, items, 2, lookahead=4, workers=3))
    assert batches == first


def test_a_side_without_text_asks_for_none(make_tokenizer: Make) -> None:
    engine = TokenizerEngine(make_tokenizer(text="decoder"), Plan(precision="fp32"))
    assert len(list(encode_stream(engine, [(picture(i), "a b") for i in range(3)], 2))) == 3
    assert not engine.text_encoder.calls  # type: ignore[attr-defined]


def test_a_last_batch_is_filled_up_where_shapes_are_compiled(
    engine: TokenizerEngine, batches: list[tuple[int, list[int]]]
) -> None:
    items = [(picture(i), words(i + 1)) for i in range(5)]
    plain = list(encode_stream(engine, items, 4))
    assert [size for size, _ in batches] == [4, 1]
    engine.plan = Plan(compile="default")
    filled = list(encode_stream(engine, items, 4))
    assert [size for size, _ in batches[2:]] == [4, 4]
    for a, b in zip(plain, filled, strict=True):
        torch.testing.assert_close(a.tokens, b.tokens)


# -- threads and memory -----------------------------------------------------------------------------------------------------


def endless(drawn: list[int]) -> Iterator[tuple[np.ndarray, str]]:
    for index in itertools.count():
        drawn.append(index)
        yield picture(index % 3), words(1 + index * 7 % 50)


@pytest.mark.parametrize("close", [True, False])
def test_memory_is_bounded_and_closing_stops_the_threads(engine: TokenizerEngine, close: bool) -> None:
    drawn: list[int] = []
    results = encode_stream(engine, endless(drawn), 3, lookahead=7, workers=2)
    assert not drawn  # nothing happens before the first is asked for
    for count in range(1, 40):
        next(results)
        assert len(drawn) - (count - 1) <= 7 + 3
    assert stream_threads()
    if close:
        results.close()  # type: ignore[attr-defined]
    else:
        del results
    assert not stream_threads()


def test_an_interrupt_stops_the_threads_and_what_is_queued(engine: TokenizerEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def slow(*args: Any) -> np.ndarray:
        started.append(1)
        time.sleep(0.05)
        return load_picture(*args)

    monkeypatch.setattr(module, "load_picture", slow)

    def interrupt(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "encode_pixels", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(encode_stream(engine, endless([]), 1, lookahead=30, workers=1))
    assert not stream_threads()
    assert len(started) < 10


def test_an_error_of_the_network_stops_the_threads(engine: TokenizerEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "encode_pixels", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(encode_stream(engine, endless([]), 2))
    assert not stream_threads()


def test_an_error_of_the_items_comes_behind_what_came_before_it(engine: TokenizerEngine) -> None:
    def items() -> Iterator[tuple[np.ndarray, str]]:
        for index in range(5):
            yield picture(index), "a"
        raise OSError("the disk is gone")

    found: list[Encoded] = []
    with pytest.raises(OSError, match="the disk is gone"):
        found.extend(encode_stream(engine, items(), 2))  # which keeps what came before the exception
    assert not stream_threads()
    assert [each.index for each in found] == list(range(5))


def test_sizes_are_checked_at_once(engine: TokenizerEngine) -> None:
    for options, text in (
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"workers": 0}, "workers"),
        ({"bucket": -1}, "bucket"),
        ({"workers": True}, "workers must be at least 1, an integer, got True"),
        ({"batch_size": 2.0}, "batch_size must be at least 1, an integer, got 2.0"),
        ({"batch_size": 4, "lookahead": 3}, "lookahead must be at least batch_size = 4, an integer, got 3"),
        ({"batch_size": 4, "lookahead": 4.5}, "lookahead must be at least batch_size = 4, an integer, got 4.5"),
        ({"batch_size": 1, "lookahead": True}, "lookahead must be at least batch_size = 1, an integer, got True"),
    ):
        with pytest.raises(InputError, match=text):
            encode_stream(engine, [], **options)  # type: ignore[arg-type]


# -- the way back -----------------------------------------------------------------------------------------------------------


def test_tokens_and_indices_come_back_as_pictures(engine: TokenizerEngine) -> None:
    captions = [words(n) if n else None for n in (3, 30, 0, 17, 2)]
    encoded = list(encode_stream(engine, [(picture(i), caption) for i, caption in enumerate(captions)], 2))
    for name in ("tokens", "indices"):
        items: list[Any] = [(getattr(each, name), caption) for each, caption in zip(encoded, captions, strict=True)]
        items.insert(2, (torch.zeros(2, 4), "a"))
        items.insert(4, ([1], "a"))
        found = list(decode_stream(engine, items, 2))
        assert [each.index for each in found] == list(range(7))
        assert "item 2" in found[2].error and "tokens must be float" in found[2].error
        assert "must be a tensor" in found[4].error
        for each, (tokens, caption) in zip(found, items, strict=True):
            if not each.error:
                wanted = engine.decode(tokens[None], [caption], "uint8")[0].numpy().astype(int)
                assert each.image is not None
                assert int(np.abs(each.image - wanted).max()) <= 1
    assert not stream_threads()


def test_tokens_are_checked_in_a_thread_and_moved_and_converted_together(
    engine: TokenizerEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs in a worker must not touch the device: it would be on another stream than the network."""
    encoded = engine.encode(np.stack([picture(i) for i in range(6)]))
    assert encoded.indices is not None
    tokens: list[Tensor] = [*encoded.mode()[:3].double(), encoded.indices[3], *encoded.mode()[4:]]
    main, moved, converted = threading.get_ident(), [], []  # type: ignore[var-annotated]
    to_device, raw_latents = module._to_device, engine.model._raw_latents
    check = engine.model._check_tokens

    def spy_move(given: Tensor, device: torch.device) -> Tensor:
        moved.append((len(given), given.dtype, threading.get_ident()))
        return to_device(given, device)

    def spy_convert(given: Tensor) -> Tensor:
        converted.append(threading.get_ident())
        return raw_latents(given)

    def spy_check(given: Tensor) -> Tensor:
        assert given.device.type == "cpu" and threading.get_ident() != main
        return check(given)

    monkeypatch.setattr(module, "_to_device", spy_move)
    monkeypatch.setattr(engine.model, "_raw_latents", spy_convert)
    monkeypatch.setattr(engine.model, "_check_tokens", spy_check)
    found = list(decode_stream(engine, [(each, None) for each in tokens], 6))
    assert moved == [(3, torch.float32, main), (1, torch.int64, main), (2, torch.float32, main)]
    assert converted == [main] * 3
    monkeypatch.undo()
    wanted = engine.decode(encoded, None, "uint8").numpy().astype(int)
    for each, row in zip(found, wanted, strict=True):
        assert each.image is not None
        assert int(np.abs(each.image - row).max()) <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(make_tokenizer: Make) -> None:
    engine = TokenizerEngine(make_tokenizer(width=64, heads=2), Plan(precision="fp32", device="cuda"))
    items = [(picture(i), words(1 + 5 * i % 40)) for i in range(30)]
    found = list(encode_stream(engine, items, 4))
    for each, (image, caption) in zip(found, items, strict=True):
        wanted = engine.encode(image[None], [caption]).mode()[0].cpu()
        torch.testing.assert_close(each.tokens, wanted, atol=1e-3, rtol=1e-3)
    back = list(decode_stream(engine, [(each.tokens, caption) for each, (_, caption) in zip(found, items, strict=True)], 4))  # type: ignore[misc]
    for each in back:
        tokens, caption = found[each.index].tokens, items[each.index][1]
        assert each.image is not None and tokens is not None
        wanted = engine.decode(tokens[None], [caption], "uint8")[0].cpu().numpy().astype(int)
        assert int(np.abs(each.image - wanted).max()) <= 1
    # Tokens that lie on the GPU, out of one buffer: what is drawn is what was there then.
    buffer = torch.empty_like(found[0].tokens, device="cuda")  # type: ignore[arg-type]
    refilled = ((buffer.copy_(each.tokens), items[each.index][1]) for each in found)  # type: ignore[arg-type]
    again = list(decode_stream(engine, refilled, 4))
    for each, before in zip(again, back, strict=True):
        assert np.array_equal(each.image, before.image)  # type: ignore[arg-type]
    assert not stream_threads()
