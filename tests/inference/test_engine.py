from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from textok_fast import DiT, DiTConfig, InputError, TexTok, ops
from textok_fast.diffusion import SAMPLERS, build_process, guided, sample
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


class FakeGraph:
    """Stands for a captured graph: runs the function, and counts."""

    made: list[FakeGraph] = []  # noqa: RUF012

    def __init__(self, function: Callable[[], None], state: Sequence[Tensor], enabled: bool, name: str) -> None:
        assert enabled
        self.function, self.state, self.calls = function, state, 0
        self.made.append(self)

    def __call__(self) -> None:
        self.calls += 1
        # What a graph reads lies where it lay at its first call.
        places = [tensor.data_ptr() for tensor in self.state]
        self.function()
        assert places == [tensor.data_ptr() for tensor in self.state]


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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "batch", "guidance"), [("class", 8, True), ("class", 3, False), ("text", 4, True), ("2d", 4, True)]
)
def test_memory_is_as_predicted(precision: Any, kind: str, batch: int, guidance: bool) -> None:
    sizes = {"input_size": 16} if kind == "2d" else {"num_tokens": 64}
    model = make(kind, width=128, in_channels=8, **sizes)
    engine = Engine(model, Plan(precision))
    estimate = engine.memory(batch, 4, guidance, text_tokens=5)
    modules = [model, engine.model, engine.modulation, *([engine._text_keys] if engine._text_keys else [])]
    existing = [tensor for module in modules for tensor in itertools.chain(module.parameters(), module.buffers())]
    text = TextFeatures(torch.randn(batch, 5, 8), torch.ones(batch, 5) > 0) if kind == "text" else None
    labels = None if kind == "text" else torch.arange(batch) % 5
    with PeakMemory(existing) as measured:
        process = build_process("gaussian", True)
        engine.sample(process, labels=labels, text=text, seeds=range(batch), steps=4, guidance_scale=2.0 if guidance else 1.0)
    predicted = estimate.total - estimate.weights
    assert 0.95 < predicted / measured.peak < 1.8  # never too little; products that write GELU at once need less
    assert estimate.weights >= sum(tensor.nbytes for tensor in model.parameters()) * (0.45 if precision == "bf16" else 0.9)


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
        Engine(model, Plan(memory_limit=1000, split=True)).start(process, **given, **options)


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
    with pytest.raises(InputError, match="plan runs it on cpu"):
        fast.to("cpu")
    with pytest.raises(InputError, match="a seed is"):
        fast(1, seed=-1)


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
    for capture, mode in itertools.product(("none", "step", "loop"), ("ahead", "inside")):
        engine = Engine(model, Plan(device="cuda", capture=capture, modulation=mode, modulation_budget=300_000))
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
