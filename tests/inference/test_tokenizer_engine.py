from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from textok_fast import InputError, TexTok, ops
from textok_fast.inference import tokenizer as module
from textok_fast.inference.plan import Plan
from textok_fast.inference.precision import describe
from textok_fast.inference.tokenizer import ConstantRows, TokenizerEngine, byte_patches, shorten
from textok_fast.modeling.layers import ViTBlock
from textok_fast.modeling.text_encoders import TextFeatures
from textok_fast.ops import packed
from textok_fast.ops.attention import attention_reference

Make = Callable[..., TexTok]
FP32 = Plan(precision="fp32")
CAPTIONS = ["a red cow", "two green stars on sand", "a house"]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def pictures(count: int = 3, size: int = 16) -> Tensor:
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8)


def relative_error(value: Tensor, wanted: Tensor) -> float:
    return float((value.double() - wanted.double()).norm() / wanted.double().norm())


# -- the same results -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", ["both", "encoder", "decoder", "none"])
@pytest.mark.parametrize("bottleneck", ["none", "kl", "vq", "fsq"])
def test_it_gives_what_the_model_gives(make_tokenizer: Make, bottleneck: str, sides: str) -> None:
    model = make_tokenizer(bottleneck=bottleneck, text=sides)
    model.set_latent_statistics(torch.linspace(-1, 1, 4), torch.linspace(0.5, 2, 4))
    engine, images = TokenizerEngine(model, FP32), pictures()
    tokens, wanted = engine.encode(images, CAPTIONS), model.encode(images, CAPTIONS)
    torch.testing.assert_close(tokens.mode(), wanted.mode(), **CLOSE)
    assert (tokens.indices is None) is (wanted.indices is None)
    if wanted.indices is not None:
        assert torch.equal(tokens.indices, wanted.indices)  # type: ignore[arg-type]
        torch.testing.assert_close(engine.decode(wanted.indices, CAPTIONS), model.decode(wanted.indices, CAPTIONS), **CLOSE)
    drawn, also = (each.sample(torch.Generator().manual_seed(3)) for each in (tokens, wanted))
    torch.testing.assert_close(drawn, also, **CLOSE)
    torch.testing.assert_close(engine.decode(wanted, CAPTIONS), model.decode(wanted, CAPTIONS), **CLOSE)
    levels = engine.decode(wanted, CAPTIONS, "uint8").int() - model.decode(wanted, CAPTIONS, "uint8").int()
    assert int(levels.abs().max()) <= 1


def test_every_form_of_picture(make_tokenizer: Make) -> None:
    model, images = make_tokenizer(), pictures()
    engine = TokenizerEngine(model, FP32)
    floats = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    wanted = model.encode(images, CAPTIONS).mode()
    for form in (images, images.numpy(), [Image.fromarray(each) for each in images.numpy()], floats):
        torch.testing.assert_close(engine.encode(form, CAPTIONS).mode(), wanted, **CLOSE)
    one = engine.encode(Image.fromarray(images[0].numpy()), CAPTIONS[0]).mode()
    torch.testing.assert_close(one, wanted[:1], **CLOSE)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("positions", [False, True])
def test_every_form_of_caption(make_tokenizer: Make, positions: bool, depth: int) -> None:
    options = {"encoder_depth": depth, "decoder_depth": depth, "text_positions": positions, "max_text_tokens": 20}
    model, images = make_tokenizer(**options), pictures()
    engine = TokenizerEngine(model, FP32)
    features, mask = torch.randn(3, 20, 8), torch.ones(3, 20, dtype=torch.bool)
    padded = mask.clone()
    padded[0, 7:] = padded[1, 3:] = padded[2, 4:] = False
    with_nan = features.masked_fill(~padded.unsqueeze(-1), torch.nan)
    holes = torch.rand(3, 20) > 0.5
    some = padded.clone()
    some[1] = False
    given: list[Any] = [
        CAPTIONS,
        ["one two", "three four", "five six"],
        ["", "a cow", None],
        ["", "", ""],
        None,
        ["", "x", "y"],
    ]
    given += [features, (features, mask), (with_nan, padded), (features, holes), (features, some), (features, ~mask)]
    for captions in given:
        wanted = model.encode(images, captions)
        torch.testing.assert_close(engine.encode(images, captions).mode(), wanted.mode(), **CLOSE)
        torch.testing.assert_close(engine.decode(wanted, captions), model.decode(wanted, captions), **CLOSE)


def test_bf16_is_as_exact_as_the_models(make_tokenizer: Make) -> None:
    model = make_tokenizer(image_size=32, width=64, encoder_depth=4, decoder_depth=4, heads=4)
    with torch.no_grad():  # every product keeps its input's variance, so that all blocks count
        for layer in (*model.encoder.modules(), *model.decoder.modules()):
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(std=layer.in_features**-0.5)
        for rows in (
            model.encoder.latents,
            model.encoder.patch_positions,
            model.decoder.queries,
            model.decoder.latent_positions,
        ):
            rows.normal_()
    images, latents = pictures(4, 32), torch.randn(4, 3, 4)
    captions = [*CAPTIONS, "grass"]
    text = model.text_features(captions, 4)
    assert text is not None
    exact, wide = copy.deepcopy(model).double(), (text.features.double(), text.mask)
    tokens, decoded = exact.encode(images, wide).mode(), exact.decode(latents.double(), wide)
    plain, engine = copy.deepcopy(model).to(torch.bfloat16), TokenizerEngine(model, Plan(precision="bf16"))
    of_model = (
        relative_error(plain.encode(images, captions).mode(), tokens),
        relative_error(plain.decode(latents, captions), decoded),
    )
    of_engine = (
        relative_error(engine.encode(images, captions).mode(), tokens),
        relative_error(engine.decode(latents, captions), decoded),
    )
    assert engine.encode(images, captions).dtype == torch.bfloat16
    assert max(of_engine) < 1e-2
    assert of_engine[0] < 1.2 * of_model[0] and of_engine[1] < 1.2 * of_model[1]


def test_the_residual_stream_is_float32(make_tokenizer: Make) -> None:
    model = make_tokenizer()
    engine, seen = TokenizerEngine(model, Plan(precision="bf16", products="reference")), []
    for side in (engine.model.encoder, engine.model.decoder):
        for block in side.network.vit.blocks[1:]:  # type: ignore[union-attr]
            block.register_forward_hook(lambda _, given, result: seen.append((*given[:2], *result)))
    engine.decode(engine.encode(pictures(), CAPTIONS), CAPTIONS)
    assert len(seen) == 2 * (len(model.encoder.blocks) - 1) > 0
    for stream, hidden, after, normalized in seen:
        assert stream.dtype == after.dtype == torch.float32
        assert hidden.dtype == normalized.dtype == torch.bfloat16
    decoder = engine.model.decoder.network  # type: ignore[union-attr]
    assert torch.equal(decoder.stream[0], model.decoder.queries)  # not what is left of them in bfloat16


def test_int8_is_near(make_tokenizer: Make) -> None:
    model, images = make_tokenizer(), pictures()
    engine = TokenizerEngine(model, Plan(precision="int8"))
    wanted = model.encode(images, CAPTIONS).mode()
    assert 0 < relative_error(engine.encode(images, CAPTIONS).mode(), wanted) < 5e-2
    assert 0 < relative_error(engine.decode(wanted, CAPTIONS), model.decode(wanted, CAPTIONS)) < 5e-2


def test_fp8_emulated_is_near(make_tokenizer: Make) -> None:
    model, images = make_tokenizer(), pictures()
    engine = TokenizerEngine(model, Plan(precision="fp8"))
    wanted = model.encode(images, CAPTIONS).mode()
    assert 0 < relative_error(engine.encode(images, CAPTIONS).mode(), wanted) < 0.15
    assert 0 < relative_error(engine.decode(wanted, CAPTIONS), model.decode(wanted, CAPTIONS)) < 0.15


def test_the_model_stays_as_it_was_and_shares_its_text_encoder(make_tokenizer: Make) -> None:
    model = make_tokenizer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = [type(each) for each in model.modules()]
    model.train()
    engine = TokenizerEngine(model, FP32)
    engine.encode(pictures(), CAPTIONS)
    assert engine.text_encoder is model.text_encoder
    assert len(model.text_encoder.calls) == 1  # type: ignore[attr-defined]
    assert model.training
    assert layers == [type(each) for each in model.modules()]
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert engine.config == model.config
    assert (engine.device.type, engine.dtype) == ("cpu", torch.float32)


@pytest.mark.parametrize(
    ("images", "captions"),
    [
        (torch.zeros(1, 8, 16, 3, dtype=torch.uint8), None),
        (torch.full((1, 3, 16, 16), torch.nan), None),
        (torch.zeros(1, 16, 16, 3, dtype=torch.int32), None),
        (pictures(2), ["one"]),
        (pictures(1), [3]),
        (pictures(1), torch.zeros(1, 4, 5)),
        (pictures(1), (torch.zeros(1, 4, 8), torch.ones(1, 4))),
    ],
)
def test_it_refuses_what_the_model_refuses(make_tokenizer: Make, images: Tensor, captions: Any) -> None:
    model = make_tokenizer()
    with pytest.raises(InputError) as wanted:
        model.encode(images, captions)
    with pytest.raises(InputError) as found:
        TokenizerEngine(model, FP32).encode(images, captions)
    assert str(found.value) == str(wanted.value)


def test_it_refuses_tokens_as_the_model_does(make_tokenizer: Make) -> None:
    model = make_tokenizer(bottleneck="vq")
    engine = TokenizerEngine(model, FP32)
    calls: list[tuple[Any, str]] = [
        (torch.zeros(1, 2, 4), "float"),
        (torch.full((1, 3), 99), "float"),
        (torch.zeros(1, 3, 4), "png"),
    ]
    calls += [(torch.full((1, 3, 4), torch.inf), "uint8"), ([1], "float")]
    for tokens, output in calls:
        with pytest.raises(InputError) as wanted:
            model.decode(tokens, None, output)  # type: ignore[arg-type]
        with pytest.raises(InputError) as found:
            engine.decode(tokens, None, output)  # type: ignore[arg-type]
        assert str(found.value) == str(wanted.value)


def test_the_plans_backends_run(make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TokenizerEngine(make_tokenizer(), Plan(ops={"*": "reference", "attention": "reference"}))
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(engine.model, "decode", lambda *args: seen.append(ops.dispatch.forced()))
    engine.decode(torch.zeros(1, 3, 4))
    assert seen == [{"*": "reference", "attention": "reference"}]
    assert not ops.dispatch.forced()


@pytest.mark.parametrize("backend", ["native", "onednn", "reference"])
def test_the_plans_backends_pack_the_blocks(make_tokenizer: Make, backend: str) -> None:
    if backend != "reference" and (reason := packed._RULES[backend](torch.empty(4, 4), 0, 64)):
        pytest.skip(reason)
    model, images = make_tokenizer(), pictures()
    wanted = model.encode(images, CAPTIONS).mode()
    for operations in ({"packed_linear": backend}, {"*": backend}):
        engine = TokenizerEngine(model, Plan(ops=operations))
        products = describe(engine.model)
        assert len(products) >= 5  # of blocks, and of what comes before and after them
        assert all(line.endswith(f"fp32, {backend}") for line in products), products
        torch.testing.assert_close(engine.encode(images, CAPTIONS).mode(), wanted, **CLOSE)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_autocast_around_it_changes_nothing(make_tokenizer: Make, precision: Any) -> None:
    model, images = make_tokenizer(bottleneck="vq"), pictures()
    engine = TokenizerEngine(model, Plan(precision=precision))
    tokens = engine.encode(images, CAPTIONS)
    decoded = engine.decode(tokens, CAPTIONS)
    item = (images[0].numpy(), CAPTIONS[0])
    streamed = next(iter(engine.encode_stream([item], 1))).tokens
    with torch.autocast("cpu", torch.bfloat16):
        also = TokenizerEngine(model, Plan(precision=precision))  # what is computed once
        for each in (engine, also):
            assert torch.equal(each.encode(images, CAPTIONS).mode(), tokens.mode())
            assert torch.equal(each.decode(tokens, CAPTIONS), decoded)
            assert torch.equal(each.decode_latents(tokens[:0], None), torch.empty(0, 16, 16, 3, dtype=torch.uint8))
        assert torch.equal(next(iter(engine.encode_stream([item], 1))).tokens, streamed)
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("plan", [FP32, Plan(precision="bf16"), Plan(split=True), Plan(precision="int8")])
@pytest.mark.parametrize("captions", [None, (torch.zeros(0, 7, 8), torch.ones(0, 7, dtype=torch.bool))])
def test_a_batch_of_none(make_tokenizer: Make, captions: Any, plan: Plan) -> None:
    model = make_tokenizer(bottleneck="vq")
    engine = TokenizerEngine(model, plan)
    for tokens in (torch.zeros(0, 3, 4), torch.zeros(0, 3, dtype=torch.int64)):
        assert model.decode(tokens, None).shape == engine.decode(tokens, captions).shape == (0, 3, 16, 16)
        assert engine.decode(tokens, captions, "uint8").shape == (0, 16, 16, 3)
    assert engine.encode_pixels(pictures(0), None).shape == (0, 3, 4)


def test_a_copy_asks_itself(make_tokenizer: Make) -> None:
    model = make_tokenizer()
    engine = TokenizerEngine(model, FP32)
    wanted, tokens = engine.encode(pictures(1)), torch.zeros(2, 3, 4)
    other = copy.deepcopy(engine)
    other.plan = Plan(memory_limit=1)  # from which on it refuses what has not fitted before
    with pytest.raises(InputError, match="a batch of 2 to decode does not fit"):
        other.decode(tokens)
    engine.decode(tokens)
    assert engine._largest["decode"] > 0 and other._largest["decode"] == 0
    torch.testing.assert_close(engine.encode(pictures(1)).shape, wanted.shape)


@pytest.mark.parametrize("plan", [FP32, Plan(precision="int8"), Plan(products="reference")])
def test_it_can_be_pickled(make_tokenizer: Make, plan: Plan) -> None:
    model, images = make_tokenizer(), pictures()
    model._text_encoder.clear()  # the tests' own is a local thing of the tests
    engine = TokenizerEngine(model, plan)
    if any(line.endswith("onednn") for line in describe(engine.model)):
        pytest.skip("oneDNN's tensors cannot be pickled")
    again = pickle.loads(pickle.dumps(engine))
    assert torch.equal(again.encode(images).mode(), engine.encode(images).mode())
    assert torch.equal(again.decode(torch.zeros(1, 3, 4)), engine.decode(torch.zeros(1, 3, 4)))


# -- what need not be computed ------------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """Notes how many rows a layer is given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.rows = layer, []  # type: ignore[var-annotated]

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(x.shape[1])
        return self.layer(x)


def test_constant_rows_take_no_part_in_the_first_projections(make_tokenizer: Make) -> None:
    engine = TokenizerEngine(make_tokenizer(), FP32)
    recorders = []
    for side in (engine.model.encoder, engine.model.decoder):
        block: Any = side.network.vit.blocks[0]  # type: ignore[union-attr]
        for owner, name in ((block, "norm1"), (block.attn, "qkv"), (block.attn, "proj")):
            setattr(owner, name, Recorder(getattr(owner, name)))
            recorders.append(getattr(owner, name))
    tokens = engine.encode(pictures(2), ["a red cow", "one two three"])
    engine.decode(tokens, ["a red cow", "one two three"])
    # 4 patches, 3 latents, 3 words: the encoder's latents and the decoder's patch queries are constant.
    assert [each.rows for each in recorders] == [[4 + 3], [4 + 3], [10], [3 + 3], [3 + 3], [10]]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_joined_from_two_sets_of_keys(dtype: torch.dtype, bound: float, masked: bool) -> None:
    block = ViTBlock(48, 3, 2.0).requires_grad_(False)
    nn.init.normal_(block.attn.qkv.weight, std=0.4)  # sharp: some rows look mostly at one set, some at the other
    rows, others = torch.randn(20, 48), torch.randn(2, 7, 48)
    mask = torch.ones(2, 27, dtype=torch.bool)
    mask[0, 23:] = mask[1, 26:] = False
    constant = ConstantRows(rows.to(dtype), block.to(dtype), alone=True)
    assert constant.alone
    x = torch.cat([rows.expand(2, -1, -1), others], dim=1).to(dtype)  # (2, 27, 48)
    qkv = block.attn.qkv(block.norm1(x))
    found = constant.attend(qkv, mask if masked else None)
    q, k, v = qkv.double().unflatten(-1, (3, 3, 16)).unbind(2)
    wanted = attention_reference(q, k, v, mask if masked else None)
    assert found.dtype == dtype
    assert relative_error(found, wanted) < bound


def test_forced_attention_is_not_gone_around() -> None:
    block = ViTBlock(48, 3, 2.0).requires_grad_(False)
    with ops.use_backend(attention="reference"):
        assert not ConstantRows(torch.randn(5, 48), block, alone=True).alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_folded_into_the_patch_embedding(dtype: torch.dtype) -> None:
    embed = nn.Linear(3 * 4 * 4, 24).requires_grad_(False)
    images = torch.arange(256, dtype=torch.uint8).repeat(3 * 2)[: 2 * 16 * 16 * 3].reshape(2, 16, 16, 3)
    wanted = ops.patchify_uint8(images, 4, torch.float64) @ embed.weight.double().T + embed.bias.double()
    levels = byte_patches(images, 4).to(dtype) - module.BYTE_ZERO
    assert torch.equal(levels.int(), byte_patches(images, 4).int() - module.BYTE_ZERO)  # exact in bfloat16, too
    folded = module._fold_bytes(embed, 4).to(dtype)
    error = relative_error(folded(levels), wanted)
    plain = copy.deepcopy(embed).to(dtype)(ops.patchify_uint8(images, 4, dtype))
    assert error < (1e-6 if dtype == torch.float32 else 1.1 * relative_error(plain, wanted))


def test_bytes_and_numbers_give_the_same_patches() -> None:
    images = pictures(2, 12)
    by_channel = ops.patchify(images.permute(0, 3, 1, 2), 4)  # (2, 9, 3 4 4)
    assert torch.equal(byte_patches(images, 4), by_channel.unflatten(2, (3, 4, 4)).permute(0, 1, 3, 4, 2).flatten(2))


def test_a_patch_embedding_with_a_hook_is_called(make_tokenizer: Make) -> None:
    model, images = make_tokenizer(), pictures()
    model.encoder.patch_embed.register_forward_hook(lambda layer, args, out: out * 2)
    torch.testing.assert_close(TokenizerEngine(model, FP32).encode(images).mode(), model.encode(images).mode(), **CLOSE)


# -- captions -----------------------------------------------------------------------------------------------------------------


def text_of(lengths: list[int], places: int) -> TextFeatures:
    mask = torch.arange(places) < torch.tensor(lengths).unsqueeze(1)
    return TextFeatures(torch.randn(len(lengths), places, 8), mask)


@pytest.mark.parametrize(
    ("lengths", "fixed", "most", "width", "masked"),
    [
        ([5, 5], False, None, 5, False),  # one length: nothing is padded
        ([5, 5], True, None, 16, True),
        ([16, 16], True, None, 16, False),
        ([5, 3], False, None, 16, True),
        ([17, 3], False, None, 32, True),
        ([17, 3], True, 20, 20, True),
        ([17, 0], False, None, 32, True),
        ([1, 1], False, None, 1, False),
    ],
)
def test_captions_are_cut_to_what_is_needed(
    lengths: list[int], fixed: bool, most: int | None, width: int, masked: bool
) -> None:
    for places in (max(lengths), 40):
        text = text_of(lengths, places)
        features, mask = shorten(text, fixed, most)
        assert features is not None
        assert features.shape == (2, width, 8)
        assert (mask is not None) is masked
        kept = max(lengths)
        assert torch.equal(features[:, :kept], text.features[:, :kept])
        if mask is not None:
            assert torch.equal(mask.sum(1), text.mask.sum(1))


def test_nobody_has_a_caption() -> None:
    assert shorten(None, False) == (None, None)
    assert shorten(text_of([0, 0], 7), True) == (None, None)
    assert shorten(text_of([0, 0], 0), False) == (None, None)
    assert shorten(TextFeatures(torch.zeros(0, 7, 8), torch.ones(0, 7, dtype=torch.bool)), True) == (None, None)


class OnItsWay(Tensor):
    """Writes down the order of what is done to it, and plays the part of a CPU tensor on a machine with CUDA."""

    done: list[str]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name == "pin_memory":
            cls.done.append("pin" if args[0].is_contiguous() else "pin what is not contiguous")
            return args[0]
        if name == "to" and isinstance(args[1], torch.device):
            cls.done.append(f"to {args[1].type}, {'' if (kwargs or {}).get('non_blocking') else 'not '}at once")
            return args[0]
        if name == "to":
            cls.done.append(f"to {args[1]}".replace("torch.", ""))
        return super().__torch_function__(function, types, args, kwargs or {})


def test_captions_are_pinned_as_they_are_sent() -> None:
    """Cut, then converted, then pinned: anything that comes after pinning is in ordinary memory again."""
    OnItsWay.done = []
    module.upload(torch.zeros(2, 7, 8).as_subclass(OnItsWay)[:, :5], torch.device("cuda"), torch.bfloat16)
    assert OnItsWay.done == ["to bfloat16", "pin", "to cuda, at once"]
    OnItsWay.done = []
    module.upload(torch.zeros(2, 7).as_subclass(OnItsWay), torch.device("cpu"))
    assert OnItsWay.done == ["to cpu, at once"]


def test_compiled_functions_see_few_shapes(make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: set[tuple[Any, ...]] = set()

    def compiled(function: Any, plan: Plan) -> Any:
        whole = torch.compile(function, backend="eager", fullgraph=True, dynamic=False)

        def call(x: Tensor, features: Tensor | None, mask: Tensor | None) -> Tensor:
            shapes.add((function.__self__.__class__, x.shape, None if features is None else features.shape, mask is None))
            return whole(x, features, mask)

        return call

    monkeypatch.setattr(module, "compiled", compiled)
    model, images = make_tokenizer(), pictures(2)
    engine = TokenizerEngine(model, Plan(compile="default"))
    for first, second in itertools.product([1, 9, 15], [2, 7]):
        captions = [" ".join("abcdefghijklmno"[:count]) for count in (first, second)]
        wanted = model.encode(images, captions)
        torch.testing.assert_close(engine.encode(images, captions).mode(), wanted.mode(), **CLOSE)
        torch.testing.assert_close(engine.decode(wanted, captions), model.decode(wanted, captions), **CLOSE)
    assert len(shapes) == 2


# -- memory -------------------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_or_split(make_tokenizer: Make) -> None:
    model, images = make_tokenizer(), pictures(5)
    captions = ["a b", "c", "d e f", "", "g"]
    free = TokenizerEngine(model, FP32)
    small, large = free.memory(1, 16), free.memory(5, 16)
    assert small.weights == large.weights > 0
    assert large.activations == 5 * small.activations
    room = (free.memory(2, 16).total + free.memory(3, 16).total) // 2
    engine = TokenizerEngine(model, Plan(memory_limit=room))
    with pytest.raises(InputError, match="a batch of 5 to encode does not fit.*split=True"):
        engine.encode(images, captions)
    with pytest.raises(InputError, match="a batch of 5 to decode does not fit"):
        engine.decode(torch.zeros(5, 3, 4), captions)
    engine = TokenizerEngine(model, Plan(memory_limit=room, split=True))
    sizes: list[int] = []
    for side in (engine.model.encoder, engine.model.decoder):
        run = side._run
        side._run = lambda x, *text, run=run: (sizes.append(len(x)), run(x, *text))[1]  # type: ignore[assignment, misc]
    tokens, wanted = engine.encode(images, captions), free.encode(images, captions)
    torch.testing.assert_close(tokens.mode(), wanted.mode(), **CLOSE)
    torch.testing.assert_close(engine.decode(wanted, captions), free.decode(wanted, captions), **CLOSE)
    assert sizes == [2, 2, 1] * 2
    with pytest.raises(InputError, match="a batch of 1 to encode does not fit"):
        TokenizerEngine(model, Plan(memory_limit=small.weights, split=True)).encode(images)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_on_a_gpu(make_tokenizer: Make, precision: Any) -> None:
    model, images = make_tokenizer(width=64, heads=2), pictures()
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    engine = TokenizerEngine(model, Plan(precision=precision, device="cuda"))
    bound = {"fp32": 1e-3, "bf16": 2e-2, "fp8": 0.15}[precision]
    for captions in (CAPTIONS, ["a b", "c d", "e f"], None):
        wanted = model.encode(images, captions).mode()
        assert relative_error(engine.encode(images, captions).mode().cpu(), wanted) < bound
        assert relative_error(engine.decode(wanted, captions).cpu(), model.decode(wanted, captions)) < bound
    estimate = engine.memory(3)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    engine.encode(images, CAPTIONS)
    assert torch.cuda.max_memory_allocated() - before <= estimate.activations + estimate.state


def test_arrays_stay_arrays(make_tokenizer: Make) -> None:
    engine = TokenizerEngine(make_tokenizer(), FP32)
    out = engine.decode(engine.encode(np.zeros((1, 16, 16, 3), np.uint8)), output="uint8")
    assert (out.dtype, tuple(out.shape)) == (torch.uint8, (1, 16, 16, 3))
