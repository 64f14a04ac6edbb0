from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from textok_fast import DiT, DiTConfig, InputError, TexTok, ops
from textok_fast.diffusion import SAMPLERS, StopSampling, build_process, guided, sample
from textok_fast.inference import (
    ClassToImagePipeline,
    Engine,
    GeneratorEngine,
    Plan,
    SamplingOptions,
    StepCache,
    TokenizerEngine,
)
from textok_fast.inference import generator as generator_module
from textok_fast.inference import tokenizer as tokenizer_module
from textok_fast.inference.memory import weights_estimate
from textok_fast.modeling.text_encoders import TextFeatures

SEEDS = [5, 6, 2**40]
KINDS: dict[str, dict[str, Any]] = {
    "class": {"num_classes": 5},
    "text": {"text_dim": 8},
    "image": {"num_classes": 5, "image_token_dim": 6, "num_image_tokens": 2},
    "2d": {"num_classes": 5, "num_tokens": 0, "input_size": 4, "patch_size": 2},
}


def make(kind: str = "class", objective: str = "gaussian", **overrides: Any) -> DiT:
    torch.manual_seed(1)
    sizes = {"num_tokens": 3, "in_channels": 4, "width": 32, "depth": 4, "heads": 2, "num_classes": 0}
    flow = {"learn_sigma": False, "time_scale": 1000.0} if objective == "flow" else {}
    model = DiT(DiTConfig(**{**sizes, **flow, **KINDS[kind], **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def conditions(kind: str, batch: int) -> dict[str, Any]:
    """Labels with one twice, captions of unlike length with an empty one, image tokens: what a model of the kind takes."""
    torch.manual_seed(2)
    labels = None if kind == "text" else torch.tensor([1, 4, 1])[:batch]
    mask = torch.arange(5) < torch.tensor([[3], [5], [0]])
    text = TextFeatures(torch.randn(3, 5, 8)[:batch], mask[:batch]) if kind == "text" else None
    return {"labels": labels, "text": text, "image_tokens": torch.randn(3, 2, 6)[:batch] if kind == "image" else None}


def reference(
    model: DiT, given: dict[str, Any], seeds: Sequence[int], sampler: str, steps: int, scale: float = 1.0, **options: Any
) -> Tensor:
    """The sampler's loop over the model itself."""
    labels, text, image = given["labels"], given["text"], given["image_tokens"]
    keys = torch.tensor(seeds)
    interval, channels = options.pop("guidance_interval", None), options.pop("guided_channels", None)

    def source(draw: int, shape: Sequence[int]) -> Tensor:
        return ops.seeded_normal(keys, torch.tensor([draw]), shape[1:])

    def call(x: Tensor, t: Tensor, c: tuple[Any, ...]) -> Tensor:
        return model(x, t, c[0], None if c[1] is None else TextFeatures(c[1], c[2]), c[3])

    condition = (labels, *(text or (None, None)), image)
    null_labels = None if labels is None else torch.full_like(labels, model.config.num_classes)
    null = (null_labels, *((text.features, torch.zeros_like(text.mask)) if text else (None, None)), image)
    objective = SAMPLERS[sampler]
    noise = source(0, (len(seeds), *generator_module.sample_shape(model)))
    process = build_process(objective, model.config.learn_sigma)
    function = guided(call, condition, null, scale, interval, channels)
    return sample(sampler, function, noise, steps, process, generator=source, **options)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


# -- the same samples --------------------------------------------------------------------------------------------------------

GUIDANCE = [
    (1.0, False, [("image", 3)]),
    (2.5, False, [("class", 3), ("text", 1)]),
    (2.5, True, [("text", 3), ("class", 1)]),
]


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize(("scale", "limited", "cases"), GUIDANCE)
def test_samples_are_the_samplers(sampler: str, scale: float, limited: bool, cases: list[tuple[str, int]]) -> None:
    objective = SAMPLERS[sampler]
    interval = ((200, 700) if objective == "gaussian" else (0.2, 0.7)) if limited else None
    process = build_process(objective, objective == "gaussian")
    for kind, batch in cases:
        model, given = make(kind, objective), conditions(kind, batch)
        engine = Engine(model, Plan(modulation_budget=25_000))  # a few evaluations at a time
        run = engine.start(
            process, **given, seeds=SEEDS[:batch], sampler=sampler, steps=5, guidance_scale=scale, guidance_interval=interval
        )
        assert run.total == (9 if sampler == "heun" else 5)
        wanted = reference(model, given, SEEDS[:batch], sampler, 5, scale, guidance_interval=interval)
        found = run.finish()
        assert found.dtype == torch.float32
        assert relative(found, wanted) < 2e-6


def test_options_reach_the_sampler() -> None:
    model, given = make(), conditions("class", 3)
    engine, process = Engine(model, Plan()), build_process("gaussian", True)
    options = {"sampler": "ddim", "steps": 4, "eta": 0.7, "guidance_scale": 3.0, "guided_channels": 3}
    found = engine.sample(process, **given, seeds=SEEDS, **options)
    wanted = reference(model, given, SEEDS, "ddim", 4, 3.0, eta=0.7, guided_channels=3)
    assert relative(found, wanted) < 2e-6
    noise = torch.randn(3, 3, 4)
    found = engine.sample(process, **given, seeds=SEEDS, sampler="ddim", steps=4, noise=noise)
    null = (given["labels"], None, None, None)
    function = guided(lambda x, t, c: model(x, t, c[0]), null, null, 1.0)
    assert relative(found, sample("ddim", function, noise, 4, process)) < 2e-6
    unlabelled = engine.sample(process, seeds=[1], steps=2)
    assert torch.equal(unlabelled, engine.sample(process, labels=torch.tensor([5]), seeds=[1], steps=2))


def test_two_dimensional_latents_and_a_text_models_null_caption() -> None:
    model, given = make("2d"), conditions("class", 3)
    found = Engine(model, Plan()).sample(build_process("gaussian", True), **given, seeds=SEEDS, steps=3, guidance_scale=2.0)
    assert found.shape == (3, 4, 4, 4)
    assert relative(found, reference(model, given, SEEDS, "ddpm", 3, 2.0)) < 2e-6
    model, nothing = make("text", "flow"), {"labels": None, "text": None, "image_tokens": None}
    found = Engine(model, Plan()).sample(build_process("flow", False), seeds=[1, 2], steps=3, guidance_scale=2.0)
    assert relative(found, reference(model, nothing, [1, 2], "euler", 3)) < 2e-6


@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("mode", ["inside", "ahead"])
@pytest.mark.parametrize("budget", [1, 30_000, 2**29])
def test_modulation_ahead_and_inside_are_the_same(kind: str, mode: Any, budget: int) -> None:
    model, given, process = make(kind), conditions(kind, 3), build_process("gaussian", True)
    engine = Engine(model, Plan(modulation=mode, modulation_budget=budget))
    found = engine.sample(process, **given, seeds=SEEDS, steps=7, guidance_scale=2.0, guidance_interval=(100, 800))
    assert relative(found, reference(model, given, SEEDS, "ddpm", 7, 2.0, guidance_interval=(100, 800))) < 2e-6


@pytest.mark.parametrize("kind", ["class", "text"])
def test_a_sample_does_not_depend_on_its_batch(kind: str) -> None:
    given, process = conditions(kind, 3), build_process("gaussian", True)
    engine = Engine(make(kind), Plan())
    options = {"steps": 4, "guidance_scale": 2.0}
    together = engine.sample(process, **given, seeds=SEEDS, **options)
    for i, seed in enumerate(SEEDS):
        own = {name: None if value is None else value[i : i + 1] for name, value in given.items() if name != "text"}
        text = None if given["text"] is None else TextFeatures(*(part[i : i + 1] for part in given["text"]))
        alone = engine.sample(process, **own, text=text, seeds=[seed], **options)
        assert relative(alone[0], together[i]) < 2e-6
    again = engine.sample(process, **given, seeds=SEEDS, **options)
    assert torch.equal(again, together)


@pytest.mark.parametrize("kind", list(KINDS))
@torch.no_grad()
def test_it_is_called_as_the_model(kind: str) -> None:
    model, given = make(kind), conditions(kind, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = Engine(model, Plan())
    x, t = torch.randn(3, *generator_module.sample_shape(model)), torch.tensor([0, 500, 999])
    arguments = (x, t, given["labels"], given["text"], given["image_tokens"])
    torch.testing.assert_close(engine(*arguments), model(*arguments), atol=2e-5, rtol=2e-5)
    if kind == "text":
        torch.testing.assert_close(engine(x, t), model(x, t), atol=2e-5, rtol=2e-5)
    assert engine(x.double(), *arguments[1:]).dtype == torch.float64
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match="x must be"):
        engine(x[:, :2], t)


@pytest.mark.parametrize(("precision", "most"), [("bf16", 2e-2), ("int8", 6e-2), ("fp8", 1e-1)])
def test_other_precisions_come_near(precision: Any, most: float) -> None:
    """How near is for the tests of the precisions; here only that all parts of the loop work in them."""
    for kind in ("class", "text"):
        model, given = make(kind, width=64), conditions(kind, 3)
        engine = Engine(model, Plan(precision))
        x, t = torch.randn(3, 3, 4), torch.tensor([10, 500, 990])
        with torch.no_grad():
            wanted = model.double()(x.double(), t, given["labels"], given["text"])
            model.float()
        assert 1e-7 < relative(engine(x, t, given["labels"], given["text"]), wanted) < most
        found = engine.sample(build_process("gaussian", True), **given, seeds=SEEDS, steps=3, guidance_scale=2.0)
        assert found.dtype == torch.float32 and bool(found.isfinite().all())


class Lora(torch.nn.Module):
    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = torch.nn.Linear(base.in_features, 2), torch.nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def changed(what: str) -> DiT:
    """A model somebody has done ``what`` to."""
    model = make("text", num_classes=0)
    block = model.blocks[1]
    if what == "lora":
        block.adaLN_modulation[1] = Lora(block.adaLN_modulation[1])
    elif what == "hooked adaLN":
        model.final_layer.adaLN_modulation[1].register_forward_hook(lambda module, given, out: out * 1.5)
    elif what == "hooked keys":
        block.cross_attn.register_forward_hook(lambda module, given, out: out * 1.5)
    else:
        places = {"patched fc1": (block.mlp, "fc1"), "patched qkv": (block.attn, "qkv"), "patched keys": (block, "cross_attn")}
        owner, name = places[what]
        layer = getattr(owner, name)
        layer.forward = lambda *given, inner=layer.forward: inner(*given) * 1.5
    return model


@pytest.mark.parametrize("what", ["lora", "hooked adaLN", "hooked keys", "patched fc1", "patched qkv", "patched keys"])
@torch.no_grad()
def test_what_somebody_changed_counts(what: str) -> None:
    model, given = changed(what), conditions("text", 3)
    x, t = torch.randn(3, 3, 4), torch.tensor([0, 500, 999])
    wanted, before = model(x, t, None, given["text"]), make("text")(x, t, None, given["text"])
    assert relative(wanted, before) > 1e-3
    engine = Engine(model, Plan())
    assert relative(engine(x, t, None, given["text"]), wanted) < 2e-6
    found = engine.sample(build_process("gaussian", True), **given, seeds=SEEDS, steps=3, guidance_scale=2.0)
    assert relative(found, reference(model, given, SEEDS, "ddpm", 3, 2.0)) < 2e-6


def test_a_hook_on_the_whole_model_is_refused() -> None:
    model = make()
    handle = model.register_forward_hook(lambda module, given, out: out * 2)
    with pytest.raises(InputError, match="the DiT itself has a hook"):
        Engine(model, Plan())
    handle.remove()
    model.forward = lambda *given: None  # type: ignore[method-assign, assignment]
    with pytest.raises(InputError, match="a replaced forward"):
        Engine(model, Plan())


@pytest.mark.parametrize("products", ["auto", "reference"])
def test_the_callers_modes_do_not_matter(products: Any, make_tokenizer: Callable[..., TexTok]) -> None:
    model, given, process = make("text"), conditions("text", 3), build_process("gaussian", True)
    options: dict[str, Any] = {"seeds": SEEDS, "steps": 3, "guidance_scale": 2.0}
    wanted = GeneratorEngine(model, Plan(products=products)).sample(process, **given, **options)
    tokenizer, pictures = make_tokenizer(), torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    codec = TokenizerEngine(tokenizer, Plan(products=products))
    tokens = codec.encode(pictures, ["a", "b c"]).mode()
    images = codec.decode(tokens, ["a", "b c"])
    for mode in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.enable_grad()):
        with mode:
            engine = GeneratorEngine(model, Plan(products=products))
            assert torch.equal(engine.sample(process, **given, **options), wanted)
            other = TokenizerEngine(tokenizer, Plan(products=products))
            assert torch.equal(other.encode(pictures, ["a", "b c"]).mode(), tokens)
            assert torch.equal(other.decode(tokens, ["a", "b c"]), images)
        assert torch.equal(engine.sample(process, **given, **options), wanted)  # the same buffers
        assert torch.equal(other.encode(pictures, ["a", "b c"]).mode(), tokens)
        assert torch.equal(other.decode(tokens, ["a", "b c"]), images)


# -- step cache --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_step_cache_adds_what_its_blocks_added_last() -> None:
    model, process = make("class", "flow"), build_process("flow", False)
    labels = torch.tensor([1, 4])
    engine = Engine(model, Plan(step_cache=StepCache(2, 1, 3)))
    found = engine.sample(process, labels=labels, seeds=[1, 2], steps=5)

    x = ops.seeded_normal(torch.tensor([1, 2]), torch.tensor([0]), (3, 4))
    added = torch.zeros(())
    for step in range(5):
        modulations = model.modulation(model.condition(torch.full((2,), 1 - step / 5), labels))
        h, _ = model.run_blocks(model.embed(x), modulations, None, 0, 1)
        if step % 2 == 0:
            after, _ = model.run_blocks(h, modulations, None, 1, 3)
            added = after - h
        _, hidden = model.run_blocks(h + added, modulations, None, 3)
        x = x - model.project(hidden) / 5
    torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-5)
    full = Engine(model, Plan()).sample(process, labels=labels, seeds=[1, 2], steps=5)
    assert 1e-4 < relative(found, full) < 0.5


def test_a_step_cache_follows_the_guidance_interval() -> None:
    """A last block that is kept whole: with blocks that add nothing in between, the samples are those without a cache."""
    model, process, given = make(), build_process("gaussian", True), conditions("class", 3)
    with torch.no_grad():
        for block in list(model.blocks)[1:3]:  # gates of zero
            block.adaLN_modulation[1].weight.zero_()
            block.adaLN_modulation[1].bias.zero_()
    options = {"seeds": SEEDS, "steps": 6, "guidance_scale": 2.0, "guidance_interval": (150, 700)}
    found = Engine(model, Plan(step_cache=StepCache(3, 1, 3))).sample(process, **given, **options)
    wanted = Engine(model, Plan()).sample(process, **given, **options)
    assert relative(found, wanted) < 2e-6


# -- how the loop runs --------------------------------------------------------------------------------------------------------


class NoSynchronization(TorchDispatchMode):
    """Fails on what would wait for a GPU: reading a value, sizes that depend on values, and copies between devices."""

    FORBIDDEN = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} waits for the device"
        assert name != "_to_copy" or (kwargs or {}).get("device") is None, "a copy to another device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["class", "text", "image"])
@pytest.mark.parametrize("sampler", ["ddpm", "unipc"])
@pytest.mark.parametrize("mode", ["ahead", "inside"])
def test_the_loop_never_waits(kind: str, sampler: str, mode: Any) -> None:
    engine = Engine(make(kind), Plan(modulation=mode, modulation_budget=30_000, step_cache=StepCache(2)))
    options: dict[str, Any] = {"sampler": sampler, "steps": 6, "guidance_scale": 2.0, "guidance_interval": (200, 800)}
    run = engine.start(build_process("gaussian", True), **conditions(kind, 3), seeds=SEEDS, **options)
    with NoSynchronization():
        while not run.finished:
            run.advance()
    assert bool(run.result().isfinite().all())
    with pytest.raises(AssertionError, match="waits"), NoSynchronization():
        run.result().sum().item()


class Recorder(TorchDispatchMode):
    """Keeps each operation with the very tensors that it read and made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class FakeGraph:
    """Does on a CPU what a captured graph does: its first call records operations, and each call does them again, on the
    tensors and with the numbers of the first."""

    made: list[FakeGraph] = []  # noqa: RUF012

    def __init__(
        self, function: Callable[[], None], state: Sequence[Tensor], enabled: bool, name: str, warm_up: Any = None
    ) -> None:
        self.function, self.state, self.warm_up, self.calls = function, state, warm_up or function, 0
        self.recorder: Recorder | None = None
        self.enabled = enabled
        if enabled:
            self.made.append(self)

    def __call__(self) -> None:
        if not self.enabled:
            self.function()
            return
        self.calls += 1
        if self.recorder is None:
            saved = [tensor.clone() for tensor in self.state]
            for run in (self.warm_up, self.record):
                run()
                for tensor, value in zip(self.state, saved, strict=True):
                    tensor.copy_(value)
        assert self.recorder is not None
        for func, args, kwargs, result in self.recorder.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.numel() and old.data_ptr() != new.data_ptr():  # no view, not in place
                    old.copy_(new)

    def record(self) -> None:
        with Recorder() as self.recorder:
            self.function()


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., GeneratorEngine]]:
    """Engines on a CPU whose loop believes to be captured."""
    monkeypatch.setattr(generator_module, "Captured", FakeGraph)
    FakeGraph.made.clear()

    def engine(model: DiT, capture: str, **fields: Any) -> GeneratorEngine:
        made = GeneratorEngine(model, Plan(**fields))
        object.__setattr__(made.plan, "capture", capture)
        return made

    yield engine
    FakeGraph.made.clear()


def test_a_chunk_of_evaluations_is_one_graph(capturing: Callable[..., GeneratorEngine]) -> None:
    model, given, process = make(), conditions("class", 3), build_process("gaussian", True)
    engine = capturing(model, "loop", modulation_budget=4 * 4 * 26 * 32 * 4)  # rows of three labels are four: four evaluations
    options: dict[str, Any] = {"seeds": SEEDS, "steps": 10, "guidance_scale": 2.0}
    wanted = reference(model, given, SEEDS, "ddpm", 10, 2.0)
    seen: list[tuple[int, int]] = []
    assert relative(engine.sample(process, **given, **options, progress=lambda *at: seen.append(at)), wanted) < 2e-6
    assert seen == [(4, 10), (8, 10), (10, 10)]
    assert [graph.calls for graph in FakeGraph.made] == [2, 1]  # the last chunk is shorter
    assert relative(engine.sample(process, **given, **options), wanted) < 2e-6
    assert [graph.calls for graph in FakeGraph.made] == [4, 2]  # the next run replays the same graphs

    run = engine.start(process, **given, **options)
    run.advance()  # one by one up to the border
    assert run.done == 1
    assert relative(run.finish(), wanted) < 2e-6
    assert [graph.calls for graph in FakeGraph.made] == [5, 3, 4]


def test_a_step_is_one_graph_for_pair_and_single(capturing: Callable[..., GeneratorEngine]) -> None:
    model, given, process = make(), conditions("class", 3), build_process("gaussian", True)
    engine = capturing(model, "step", modulation_budget=30_000)
    found = engine.sample(process, **given, seeds=SEEDS, steps=6, guidance_scale=2.0, guidance_interval=(300, 800))
    assert relative(found, reference(model, given, SEEDS, "ddpm", 6, 2.0, guidance_interval=(300, 800))) < 2e-6
    assert len(FakeGraph.made) == 2 and sum(graph.calls for graph in FakeGraph.made) == 6
    other = {**given, "labels": torch.tensor([0, 2, 0])}  # as many distinct labels: nothing is captured again
    engine.sample(process, **other, seeds=SEEDS, steps=6, guidance_scale=2.0, guidance_interval=(300, 800))
    assert len(FakeGraph.made) == 2


@pytest.mark.parametrize("kind", ["text", "image", "2d"])
@pytest.mark.parametrize("sampler", ["ddpm", "unipc"])
@pytest.mark.parametrize("mode", ["ahead", "inside"])
def test_a_graph_is_right_for_the_next_run(
    capturing: Callable[..., GeneratorEngine], kind: str, sampler: str, mode: Any
) -> None:
    """Whatever changes from run to run, and from chunk to chunk, lies where the first run had it."""
    model, process = make(kind), build_process("gaussian", True)
    engine = capturing(model, "loop", modulation=mode, modulation_budget=40_000, step_cache=StepCache(2, 1, 2))
    plain = GeneratorEngine(model, Plan(step_cache=StepCache(2, 1, 2)))
    options: dict[str, Any] = {"sampler": sampler, "steps": 5, "guidance_scale": 2.0}
    given = conditions(kind, 3)
    other = {name: None if value is None or name == "text" else value.flip(0) for name, value in given.items()}
    if given["text"] is not None:
        other["text"] = TextFeatures(*(part.flip(0) for part in given["text"]))
    for each, seeds in ((given, SEEDS), (other, [1, 2, 3])):
        found, wanted = (which.sample(process, **each, seeds=seeds, **options) for which in (engine, plain))
        assert relative(found, wanted) < 2e-6
    graphs = len(FakeGraph.made)
    engine.sample(process, **given, seeds=SEEDS, **options)
    assert len(FakeGraph.made) == graphs


def test_each_kind_of_evaluation_warms_up_once(
    capturing: Callable[..., GeneratorEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = capturing(make(), "loop")
    evaluated: list[Any] = []
    evaluate = generator_module._Loop._evaluate

    def counted(self: Any, kind: Any) -> None:
        evaluated.append(kind)
        evaluate(self, kind)

    monkeypatch.setattr(generator_module._Loop, "_evaluate", counted)
    engine.sample(build_process("gaussian", True), seeds=[1], steps=20, guidance_scale=2.0, guidance_interval=(300, 800))
    assert len(FakeGraph.made) == 1
    assert len(evaluated) == 2 + 20  # pair and single, and then the chunk


def test_runs_do_not_disturb_each_other() -> None:
    model, process = make("text"), build_process("gaussian", True)
    engine = Engine(model, Plan())
    given = [conditions("text", 3), {**conditions("text", 3), "text": TextFeatures(torch.ones(3, 5, 8), torch.ones(3, 5) > 0)}]
    wanted = [reference(model, each, SEEDS, "ddpm", 4, 2.0) for each in given]
    first, second = (engine.start(process, **each, seeds=SEEDS, steps=4, guidance_scale=2.0) for each in given)
    for run in (first, second, second, first, first, second, first, second):
        run.advance()
    third = engine.start(process, **given[0], seeds=SEEDS, steps=4, guidance_scale=2.0)  # takes buffers that hold a result
    third.advance()
    assert relative(first.result(), wanted[0]) < 2e-6
    assert relative(second.result(), wanted[1]) < 2e-6
    kept = first.result().clone()
    third.finish().zero_()
    assert torch.equal(first.result(), kept)
    assert len(engine._loops) <= generator_module.KEPT_LOOPS


def test_a_run_writes_into_nothing_of_the_users() -> None:
    process, engine = build_process("gaussian", True), Engine(make("image"), Plan())
    one, other = torch.randn(1, 2, 6), torch.randn(1, 2, 6)
    before = one.clone()
    first = engine.sample(process, image_tokens=one, seeds=[1], steps=2)
    engine.sample(process, image_tokens=other, seeds=[1], steps=2)
    assert torch.equal(one, before)
    assert torch.equal(engine.sample(process, image_tokens=one, seeds=[1], steps=2), first)
    engine = Engine(make("text"), Plan())
    first = engine.sample(process, seeds=[1], steps=2)
    engine.sample(process, text=TextFeatures(torch.randn(1, 1, 8), torch.ones(1, 1) > 0), seeds=[1], steps=2)
    assert torch.equal(engine.sample(process, seeds=[1], steps=2), first)


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_samples() -> None:
    model, given, process = make("text", depth=2), conditions("text", 3), build_process("gaussian", True)
    options: dict[str, Any] = {"seeds": SEEDS, "steps": 4, "guidance_scale": 2.0}
    wanted = reference(model, given, SEEDS, "ddpm", 4, 2.0, guidance_interval=(300, 800))
    engine = Engine(model, Plan(compile="default"))
    assert relative(engine.sample(process, **given, **options, guidance_interval=(300, 800)), wanted) < 2e-6
    cached = [Engine(make(), Plan("int8", compile=mode, step_cache=StepCache())) for mode in ("default", "none")]  # type: ignore[arg-type]
    found, wanted = (each.sample(process, **conditions("class", 3), **options) for each in cached)
    assert relative(found, wanted) < 1e-3


def test_a_run_says_where_it_is() -> None:
    engine, process = Engine(make(), Plan()), build_process("gaussian", True)
    run = engine.start(process, seeds=[1], steps=3)
    run.advance()
    assert (run.done, run.total, run.finished) == (1, 3, False)
    with pytest.raises(InputError, match="1 of 3 evaluations are done"):
        run.result()
    seen: list[tuple[int, int]] = []
    run.finish(lambda *at: seen.append(at))
    assert seen == [(2, 3), (3, 3)]
    with pytest.raises(InputError, match="all 3 evaluations are done"):
        run.advance()


def test_nothing_keeps_an_engine_alive() -> None:
    engine, process = Engine(make(), Plan()), build_process("gaussian", True)
    engine.sample(process, seeds=[1], steps=2)
    gone = weakref.ref(engine)
    gc.disable()
    try:
        del engine
        assert gone() is None  # at once, with its buffers and graphs: not when the collector comes by
    finally:
        gc.enable()


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_residual_stream_and_condition_are_float32(precision: Any) -> None:
    model, given = make(), conditions("class", 2)
    engine = Engine(model, Plan(precision=precision, step_cache=StepCache(2)))
    t, labels = torch.tensor([300, 20]), given["labels"]
    condition = engine.model.condition(t, labels)
    assert torch.equal(condition, model.condition(t, labels))
    rows = engine.modulation(condition)
    x = torch.randn(2, 3, 4).to(engine.dtype)
    output, added = engine._first(x, rows, None, None)
    assert rows.dtype == output.dtype == torch.bfloat16 and added.dtype == torch.float32
    assert torch.equal(engine._short(x, rows, None, None, added), output)
    assert torch.equal(engine._whole(x, rows, None, None), output)
    stream = engine.model.embed(x).float()
    whole, hidden = engine.model.run_blocks(stream, engine.modulation.split(rows))
    assert whole.dtype == torch.float32 and hidden.dtype == torch.bfloat16
    assert torch.equal(engine.model.project(hidden), output)


def test_a_norm_with_a_hook_takes_a_float32_residual_stream() -> None:
    model, given = make("text"), conditions("text", 2)
    wanted = model(x := torch.randn(2, 3, 4), t := torch.tensor([3, 9]), text=given["text"])
    called = []
    model.blocks[1].cross_norm.register_forward_hook(lambda *_: called.append(1))  # type: ignore[union-attr]
    found = Engine(model, Plan(precision="bf16"))(x, t, text=given["text"])
    assert called and relative(found, wanted.detach()) < 3e-2


# -- memory --------------------------------------------------------------------------------------------------------


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time."""

    def __init__(self, existing: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in existing}

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        self._seen.discard(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._seen:
                    self._seen.add(storage._cdata)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize(
    ("kind", "batch", "guidance", "length"),
    [("class", 8, True, 5), ("class", 3, False, 5), ("text", 4, True, 5), ("text", 16, True, 128), ("2d", 4, True, 5)],
)
def test_memory_is_as_predicted(precision: Any, kind: str, batch: int, guidance: bool, length: int) -> None:
    sizes = {"input_size": 16} if kind == "2d" else {"num_tokens": 32 if length > 64 else 64}
    model = make(kind, width=128, in_channels=8, **sizes)
    # What one operation holds inside nobody sees: its parts hold the same.
    engine = Engine(model, Plan(precision, ops={"packed_block": "reference"}))
    estimate = engine.memory(batch, 4, guidance, text_tokens=length)
    modules = [model, engine.model, engine.modulation, *([engine._text_keys] if engine._text_keys else [])]
    existing = [tensor for module in modules for tensor in itertools.chain(module.parameters(), module.buffers())]
    text = TextFeatures(torch.randn(batch, length, 8), torch.ones(batch, length) > 0) if kind == "text" else None
    labels = None if kind == "text" else torch.arange(batch) % 5
    options: dict[str, Any] = {"steps": 4, "guidance_scale": 2.0 if guidance else 1.0}
    with PeakMemory(existing) as measured:
        process = build_process("gaussian", True)
        for _ in range(2):  # the second time into the same buffers
            engine.sample(process, labels=labels, text=text, seeds=range(batch), **options)
    predicted = estimate.total - estimate.weights
    assert 0.95 < predicted / measured.peak < 1.8  # never too little; products that write GELU at once need less
    share = {"fp32": 0.9, "bf16": 0.45, "fp8": 0.25}[precision]
    assert estimate.weights >= sum(tensor.nbytes for tensor in model.parameters()) * share


def test_what_does_not_fit_is_refused_or_split() -> None:
    model, process, given = make(num_tokens=64), build_process("gaussian", True), conditions("class", 3)
    free = Engine(model, Plan())
    three, two = (free.memory(batch, 4, True).total for batch in (3, 2))
    limit = (three + two) // 2
    options: dict[str, Any] = {"seeds": SEEDS, "steps": 4, "guidance_scale": 2.0}
    message = r"a batch of 3 does not fit, it takes .*weights .*available .*split=True.*another precision"
    with pytest.raises(InputError, match=message):
        Engine(model, Plan(memory_limit=limit)).start(process, **given, **options)
    split = Engine(model, Plan(memory_limit=limit, split=True))
    seen: list[tuple[int, int]] = []
    found = split.sample(process, **given, **options, progress=lambda *at: seen.append(at))
    assert seen == [(i, 8) for i in range(1, 9)]  # two parts of four evaluations
    assert relative(found, reference(model, given, SEEDS, "ddpm", 4, 2.0)) < 2e-6
    with pytest.raises(InputError, match=r"a batch of 1 does not fit"):
        Engine(model, Plan(memory_limit=free.weight_bytes + 1000, split=True)).start(process, **given, **options)


def test_the_largest_part_has_to_fit() -> None:
    """The first four samples share a class, the last four do not, and have more modulation."""
    model, process = make(num_tokens=16), build_process("gaussian", True)
    options: dict[str, Any] = {"seeds": range(8), "steps": 40, "labels": torch.tensor([0] * 4 + [0, 1, 2, 3])}
    free = Engine(model, Plan())
    four = free.memory(4, 40, guidance=False).total  # of four classes
    like = four - 3 * 40 * free.modulation.columns * 4  # of one
    for limit, parts in (((four + like) // 2, 3), (four + 1000, 2)):
        seen: list[int] = []
        engine = Engine(model, Plan(memory_limit=limit, split=True))
        found = engine.sample(process, progress=lambda done, total: seen.append(total), **options)  # noqa: B023
        assert seen[-1] == parts * 40
        assert torch.equal(found, free.sample(process, **options))


def test_runs_under_way_count_against_the_limit() -> None:
    model, process = make(num_tokens=64), build_process("gaussian", True)
    free = Engine(model, Plan())
    one = free.memory(2, 4)
    engine = Engine(model, Plan(memory_limit=one.total + one.state + one.modulation + 1000))
    options: dict[str, Any] = {"seeds": [1, 2], "steps": 4, "labels": torch.tensor([1, 2]), "guidance_scale": 2.0}
    first, second = engine.start(process, **options), engine.start(process, **options)
    with pytest.raises(InputError, match="a batch of 2 does not fit"):
        engine.start(process, **options)
    wanted = free.sample(process, **options)
    assert torch.equal(first.finish(), wanted)
    third = engine.start(process, **options)  # in the place of the first
    assert torch.equal(second.finish(), wanted) and torch.equal(third.finish(), wanted)
    del first, second, third
    # Buffers that are only kept, of these runs, give way to those of another shape.
    found = engine.sample(process, **{**options, "steps": 5})
    assert torch.equal(found, free.sample(process, **{**options, "steps": 5}))
    assert [loop.shape.evaluations for loop in engine._loops.values()] == [5] or engine._available(True) >= one.total


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "fp8"])
def test_weights_that_do_not_fit_are_refused_before_anything_moves(
    precision: Any, monkeypatch: pytest.MonkeyPatch, make_tokenizer: Callable[..., TexTok]
) -> None:
    for kind, model, module in (("DiT", make(width=64), "generator"), ("TexTok", make_tokenizer(), "tokenizer")):
        engine: Any = Engine(model, Plan(precision))
        actual = engine.memory(1).weights
        predicted = weights_estimate(model, precision, torch.device("cpu")).weights
        assert (0.7 if kind == "DiT" else 0.5) < predicted / actual <= 1.01  # of a tokenizer also what is computed once
        with monkeypatch.context() as patch:
            patch.setattr(f"textok_fast.inference.{module}.prepare", lambda *a, **k: pytest.fail("it moved"))
            with pytest.raises(InputError, match=rf"the model in {precision} does not fit, it takes .* available"):
                Engine(model, Plan(precision, memory_limit=predicted - 1))


def test_weights_count_once() -> None:
    for kind in KINDS:
        model = make(kind)
        wanted = sum(tensor.nbytes for tensor in itertools.chain(model.parameters(), model.buffers()))
        assert Engine(model, Plan(products="reference")).memory(1).weights == wanted


def test_a_modulation_budget_is_kept() -> None:
    engine = Engine(make(), Plan(modulation_budget=50_000))
    assert engine.memory(1, 250).modulation <= 50_000 + 2 * engine.modulation.columns * 4
    assert Engine(make(), Plan(modulation="inside")).memory(1, 250).modulation == 2 * engine.modulation.columns * 4


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_are_named() -> None:
    gaussian, flow = build_process("gaussian", True), build_process("flow", False)
    engine, text = Engine(make(), Plan()), Engine(make("text"), Plan())
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: engine.start(gaussian, seeds=[]), "at least one seed"),
        (lambda: engine.start(gaussian, seeds=[1.5]), "seeds must be"),
        (lambda: engine.start(gaussian, seeds=[2**70]), "seeds must be"),
        (lambda: engine.start(gaussian, seeds=[1], sampler="euler"), "sampler 'euler' needs a flow model"),
        (lambda: engine.start(flow, seeds=[1]), "learn_sigma"),
        (lambda: engine.start(gaussian, seeds=[1], steps=0), "at least"),
        (lambda: engine.start(gaussian, seeds=[1], labels=torch.tensor([1, 2])), r"y must be \(1,\)"),
        (lambda: engine.start(gaussian, seeds=[1], labels=torch.tensor([6])), r"labels must be in \[0, 5\]"),
        (lambda: engine.start(gaussian, seeds=[1], labels=torch.tensor([1.0])), "int64"),
        (lambda: engine.start(gaussian, seeds=[1], labels=[1]), "int64"),  # type: ignore[arg-type]
        (lambda: engine.start(gaussian, seeds=[1], noise=torch.zeros(2, 3, 4)), "noise must be"),
        (lambda: engine.start(gaussian, seeds=[1], image_tokens=torch.zeros(1, 2, 6)), "image_tokens"),
        (lambda: engine.start(gaussian, seeds=[1], guidance_scale=2, guidance_interval=(2, 1)), "interval"),
        (lambda: text.start(gaussian, seeds=[1], labels=torch.tensor([0])), "no classes"),
        (lambda: text.start(gaussian, seeds=[1], text=(torch.zeros(1, 5, 7), torch.ones(1, 5) > 0)), "text features"),
        (lambda: engine.memory(0), "at least one sample"),
        (lambda: Engine(make(), Plan(step_cache=StepCache(2, 2, 9))), "stop 9"),
        (lambda: Engine(torch.nn.Linear(2, 2)), "an engine runs a DiT or a TexTok, got Linear"),  # type: ignore[call-overload]
    ]
    for call, message in calls:
        with pytest.raises(InputError, match=message):
            call()


def test_forced_backends_hold_inside_the_engine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    inside = generator_module.ops.guided_step
    monkeypatch.setattr(ops, "guided_step", lambda *a, **k: (used.append(str(ops.dispatch.forced())), inside(*a, **k))[1])
    engine = Engine(make(), Plan(ops={"*": "reference", "attention": "sdpa"}))
    engine.sample(build_process("gaussian", True), seeds=[1], steps=1)
    assert used == ["{'*': 'reference', 'attention': 'sdpa'}"]
    assert ops.dispatch.forced() == {}


# -- a tokenizer's graphs --------------------------------------------------------------------------------------------------


def test_a_shape_that_comes_again_is_a_graph(monkeypatch: pytest.MonkeyPatch, make_tokenizer: Callable[..., TexTok]) -> None:
    """A tokenizer on a CPU that believes to capture."""
    monkeypatch.setattr(tokenizer_module, "Captured", FakeGraph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *a: SimpleNamespace(cuda_stream=7))
    FakeGraph.made.clear()
    model = make_tokenizer()
    plain, plan = TokenizerEngine(model, Plan()), Plan()
    object.__setattr__(plan, "capture", "loop")
    engine = TokenizerEngine(model, plan)
    captions = [["a", "two words"], ["others", "of as few"], ["x", "y"], ["z", "w"]]
    graphs = []
    for given in captions:
        pictures = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
        wanted, found = (each.encode(pictures, given).mode() for each in (plain, engine))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        images = engine.decode(wanted, given)
        torch.testing.assert_close(images, plain.decode(wanted, given), atol=1e-5, rtol=1e-5)
        patches = engine.model.decoder.patches(wanted, None)  # what the network itself gives
        kept = patches.clone(), images.clone()
        engine.decode(wanted + 1, given)
        engine.model.decoder.patches(wanted + 1, None)
        assert torch.equal(patches, kept[0]) and torch.equal(images, kept[1])  # not what a replay writes
        graphs.append(len(FakeGraph.made))
    assert graphs[0] == 2 and graphs[-1] == graphs[-2]  # the decoder's, with and without captions; then nothing new
    assert engine.memory(2).state == 2 * plain.memory(2).state
    FakeGraph.made.clear()


# -- pipelines --------------------------------------------------------------------------------------------------------


def test_a_pipeline_with_a_plan_makes_the_same_pictures(make_tokenizer: Callable[..., TexTok]) -> None:
    model, tokenizer = make(), make_tokenizer()
    assert isinstance(Engine(tokenizer, Plan()), TokenizerEngine)
    plain = ClassToImagePipeline(model, tokenizer, captions={1: ["one"], 4: ["four words of it"]})
    fast = ClassToImagePipeline(model, tokenizer, captions=plain.captions, plan=Plan())
    options = SamplingOptions("ddim", 4, 2.0, (200, 900), 0.5)
    seen: list[tuple[int, int]] = []
    found = fast([1, 4], seed=3, options=options, output="float", progress=lambda *at: seen.append(at))
    wanted = plain([1, 4], seed=3, options=options, output="float")
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert found.captions == wanted.captions
    torch.testing.assert_close(found.tokens, wanted.tokens, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(found.images, wanted.images, atol=1e-4, rtol=1e-4)
    assert fast.to("cpu") is fast
    with pytest.raises(InputError, match="plan runs it on cpu"):
        fast.to("meta")
    with pytest.raises(InputError, match="precision is its plan's, fp32"):
        fast.to(dtype=torch.bfloat16)
    with pytest.raises(InputError, match="a seed is"):
        fast(1, seed=-1)


@pytest.mark.parametrize("sampler", ["ddpm", "unipc"])
def test_negative_text_takes_the_null_captions_place(sampler: str) -> None:
    """Against a model whose null caption is that one; also in parts, and where the conditional half has no caption."""
    model, process, given = make("text"), build_process("gaussian", True), conditions("text", 3)
    torch.manual_seed(3)
    negative = TextFeatures(torch.randn(3, 7, 8), torch.arange(7) < torch.tensor([[7], [2], [4]]))  # longer than the captions
    keys = torch.tensor(SEEDS)

    def source(draw: int, shape: Sequence[int]) -> Tensor:
        return ops.seeded_normal(keys, torch.tensor([draw]), shape[1:])

    for text in (given["text"], None):

        def both(x: Tensor, t: Tensor, text: TextFeatures | None = text) -> Tensor:
            c, u = model(x, t, text=text), model(x, t, text=negative)
            return torch.cat([u[..., :4] + 2.5 * (c - u)[..., :4], c[..., 4:]], dim=-1)

        with torch.no_grad():
            wanted = sample(sampler, both, source(0, (3, 3, 4)), 4, process, generator=source)
        options: dict[str, Any] = {"seeds": SEEDS, "sampler": sampler, "steps": 4, "guidance_scale": 2.5}
        engine = Engine(model, Plan())
        found = engine.sample(process, text=text, negative_text=negative, **options)
        assert relative(found, wanted) < 1e-5
        assert relative(engine.sample(process, text=text, **options), wanted) > 1e-3
        two = (engine.memory(2, 4, text_tokens=7).total + engine.memory(3, 4, text_tokens=7).total) // 2
        split = Engine(model, Plan(split=True, memory_limit=two)).start(process, text=text, negative_text=negative, **options)
        assert split.total == 8 and relative(split.finish(), wanted) < 1e-5
    with pytest.raises(InputError, match="no text conditioning"):
        Engine(make(), Plan()).sample(process, seeds=SEEDS, negative_text=negative)


CAPTURES = ["none", pytest.param("step", marks=pytest.mark.gpu), pytest.param("loop", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("capture", CAPTURES)
def test_latents_of_a_run(capture: Any) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and capture != "none":
        pytest.skip("captures on a CUDA device only")
    process = build_process("gaussian", True)
    engine = Engine(make(), Plan(device=device, capture=capture))
    options: dict[str, Any] = {"labels": torch.tensor([1, 4, 1]), "seeds": SEEDS, "sampler": "dpmpp_2m", "steps": 4}
    wanted, seen = engine.sample(process, **options), []
    found = engine.sample(process, on_step=lambda *at: seen.append(at), **options)
    assert relative(found, wanted) < 1e-5 and [index for index, *_ in seen] == [0, 1, 2, 3]
    assert [time for _, time, _ in seen] == engine.start(process, **options).times and torch.equal(seen[-1][2], found)
    run = engine.start(process, **options)
    run.advance()
    kept = run.latents
    run.advance()
    run.advance()
    assert torch.equal(kept, seen[0][2]) and not torch.equal(kept, run.latents)
    run.advance()
    run.latents = run.latents + 1
    torch.testing.assert_close(run.result(), found + 1)

    def stop(index: int, time: float, x: Tensor) -> None:
        if index == 2:
            raise StopSampling(2 * x)

    assert torch.equal(engine.sample(process, on_step=stop, **options), 2 * seen[2][2])
    assert torch.equal(engine.sample(process, **options), wanted)  # the run that was left has left nothing
    with pytest.raises(InputError, match=r"latents must be \(3, 3, 4\), got \(1,\)"):
        run.latents = torch.zeros(1)


# -- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["class", "text", "2d"])
@pytest.mark.parametrize("sampler", ["ddpm", "unipc"])
def test_graphs_give_what_single_kernels_give(kind: str, sampler: str) -> None:
    given = conditions("text" if kind == "text" else "class", 3)
    model, process = make(kind, width=64), build_process("gaussian", True)
    options: dict[str, Any] = {"seeds": SEEDS, "steps": 8, "guidance_scale": 2.0, "guidance_interval": (200, 800)}
    options["sampler"] = sampler
    wanted = Engine(model, Plan()).sample(process, **given, **options)
    # Three evaluations a chunk, and then two: rows of three classes are four, of captions one, of (6 depth + 2) D numbers.
    three = 3 * (1 if kind == "text" else 4) * 26 * 64 * 4
    for capture, mode in itertools.product(("none", "step", "loop"), ("ahead", "inside")):
        plan = Plan(device="cuda", capture=capture, modulation=mode, modulation_budget=three)
        engine = Engine(model, plan)
        first = engine.sample(process, **given, **options)
        assert relative(first.cpu(), wanted) < 1e-3
        assert torch.equal(engine.sample(process, **given, **options), first)  # replayed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_on_a_gpu_is_as_predicted() -> None:
    model = make(width=512, depth=8, heads=8, num_tokens=256)
    engine = Engine(model, Plan("bf16", "cuda"))
    estimate = engine.memory(32, 10)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    engine.sample(build_process("gaussian", True), labels=torch.arange(32) % 5, seeds=range(32), steps=10, guidance_scale=2.0)
    peak = torch.cuda.max_memory_allocated() - before
    assert 0.95 < (estimate.total - estimate.weights) / peak < 2.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("capture", ["none", "step", "loop"])
@pytest.mark.parametrize(
    "fields",
    [{"precision": "bf16"}, {"precision": "fp8"}, {"step_cache": StepCache(2, 1, 3)}, {"compile": "default"}],
    ids=lambda fields: next(iter(fields)),
)
def test_on_a_gpu_graphs_of_every_kind_replay(capture: Any, fields: dict[str, Any]) -> None:
    """Replayed, after other shapes have come and gone and torch has given its unused memory back, in every kind of plan."""
    if fields.get("precision") == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    model, process, given = make("class", width=128, heads=2), build_process("gaussian", True), conditions("class", 3)
    options: dict[str, Any] = {"steps": 8, "guidance_scale": 2.0, "guidance_interval": (200, 800)}
    budget = 3 * 4 * 26 * 128 * 4
    single = Engine(model, Plan(device="cuda", modulation_budget=budget, **fields))
    engine = Engine(model, Plan(device="cuda", capture=capture, modulation_budget=budget, **fields))
    wanted = single.sample(process, **given, seeds=SEEDS, **options)
    first = engine.sample(process, **given, seeds=SEEDS, **options)
    assert relative(first, wanted) < 1e-3
    for batch in (1, 2, 4, 5, 6):  # more than are kept
        engine.sample(process, seeds=range(batch), **options)
        torch.cuda.empty_cache()
        torch.full((64, 2**20), torch.nan, device="cuda")  # whoever reads freed memory
        assert torch.equal(engine.sample(process, **given, seeds=SEEDS, **options), first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("capture", ["none", "step"])
@pytest.mark.parametrize("kind", ["class", "text", "image"])
def test_on_a_gpu_the_loop_never_waits(capture: Any, kind: str) -> None:
    engine = Engine(make(kind), Plan(device="cuda", capture=capture, modulation_budget=30_000))
    options: dict[str, Any] = {"steps": 6, "guidance_scale": 2.0, "guidance_interval": (200, 800)}
    process, given = build_process("gaussian", True), conditions(kind, 3)
    wanted = engine.sample(process, **given, seeds=SEEDS, **options)  # captures, which waits
    run = engine.start(process, **given, seeds=SEEDS, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        while not run.finished:
            run.advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(run.result(), wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_captured_runs_in_turn_and_in_parts() -> None:
    model, process, given = make("class", width=64), build_process("gaussian", True), conditions("class", 3)
    options: dict[str, Any] = {"steps": 6, "guidance_scale": 2.0}
    engine = Engine(model, Plan(device="cuda", capture="step"))
    seeds = [SEEDS, [1, 2, 3]]
    wanted = [engine.sample(process, **given, seeds=each, **options) for each in seeds]
    runs = [engine.start(process, **given, seeds=each, **options) for each in seeds]
    for _ in range(6):
        for run in runs:
            run.advance()
    assert all(torch.equal(run.result(), each) for run, each in zip(runs, wanted, strict=True))
    three, two = (engine.memory(batch, 6).total for batch in (3, 2))
    for capture in ("step", "loop"):
        split = Engine(model, Plan(device="cuda", capture=capture, split=True, memory_limit=(three + two) // 2))  # type: ignore[arg-type]
        run = split.start(process, **given, seeds=SEEDS, **options)
        assert run.total == 12
        assert relative(run.finish(), wanted[0]) < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_tokenizers_graphs_on_a_gpu(make_tokenizer: Callable[..., TexTok]) -> None:
    model = make_tokenizer(width=64, heads=2)
    plain, engine = (TokenizerEngine(model, Plan(device="cuda", capture=capture)) for capture in ("none", "step"))  # type: ignore[arg-type]
    for captions in (["a", "two words"], ["b", "so many words"], ["c", "d"], ["e", "f"], ["g", "h i"]):
        pictures = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
        wanted, found = (each.encode(pictures, captions).mode() for each in (plain, engine))
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
        decoded = (each.decode(wanted, captions) for each in (plain, engine))
        torch.testing.assert_close(*decoded, atol=1e-3, rtol=1e-3)
