"""The headline benchmark: what it runs, counts, leaves out and writes. No test looks at a speed."""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from textok_fast.diffusion import GaussianDiffusion, guided, sample
from textok_fast.errors import InputError
from textok_fast.evaluation import roofline, speedup, speedup_report, systems
from textok_fast.evaluation.speedup import Row, SpeedupConfig, SpeedupResult, Timing, load, ratios_of, run_speedup
from textok_fast.evaluation.systems import Bench, System, step_cost, system_named
from textok_fast.modeling.text_encoders import TextFeatures

CPU = torch.device("cpu")
TINY: dict[str, Any] = {"size": "tiny", "systems": ("TexTok-4", "DiT/1"), "batch": (1,), "device": "cpu", "threads": 1}


class FakeEncoder:
    """Stands for MiniLM, which takes seconds to load."""

    dim = 384

    def __init__(self) -> None:
        self.network = torch.nn.Embedding(100, 384)

    def __call__(self, captions: list[str]) -> TextFeatures:
        return TextFeatures(torch.randn(len(captions), 16, 384), torch.ones(len(captions), 16, dtype=torch.bool))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(roofline, "CPU_SHAPES", ((32, 32, 32),))
    monkeypatch.setattr(roofline, "CPU_COPY_BYTES", 2**20)
    monkeypatch.setattr(speedup, "measure_ceilings", functools.partial(roofline.measure_ceilings, seconds=0.01))
    monkeypatch.setattr(systems, "load_text_encoder", lambda *_, **__: FakeEncoder())
    monkeypatch.setattr(Bench, "text", lambda self, form, batch: lambda: torch.ones(64).sum())
    monkeypatch.setattr(speedup, "ROUND_SECONDS", 0.02)
    monkeypatch.setattr(speedup, "ENERGY_SECONDS", 0.01)
    with torch.no_grad():
        yield


# -- systems -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "name", "tokens", "decoder", "guided_channels"),
    [
        ("TexTok-32", "TexTok-32 + DiT-XL", 32, "TexTok-32", None),
        ("textok-256", "TexTok-256 + DiT-XL", 256, "TexTok-256", None),
        ("DiT/2", "DiT-XL/2", 1024, "SD-VAE f8", 3),
        ("dit-xl/1", "DiT-XL/1", 4096, "SD-VAE f8", 3),
    ],
)
def test_systems_are_the_published_ones(given: str, name: str, tokens: int, decoder: str, guided_channels: int | None) -> None:
    found = system_named(given)
    assert (found.name, found.tokens, found.decoder, found.guided_channels) == (name, tokens, decoder, guided_channels)
    if found.textok is not None:
        assert (found.textok.image_size, found.textok.patch_size, found.textok.width, found.textok.decoder_depth) == (
            512, 16, 768, 12,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["TexTok", "TexTok-", "TexTok-0", "DiT/3", "DiT", ""])
def test_an_unknown_system_is_named(name: str) -> None:
    with pytest.raises(InputError, match="unknown system"):
        system_named(name)


def test_what_a_step_costs_at_least() -> None:
    system, n = system_named("TexTok-16", "tiny"), 16
    config, labels = system.generator, 2 + 1  # two classes and the null class
    d, depth = config.width, config.depth
    tokens = depth * (2 * n * 12 * d * d + 2 * (2 * n * n * d)) + 2 * n * 8 * d + 2 * n * d * 16
    matrices = depth * 12 * d * d
    others = depth * (3 * d + d + 4 * d + d) + 8 * d + d + n * d + d * 16 + 16  # biases, embedding, positions, projection
    modulation = labels * (6 * depth + 2) * d
    for precision, narrow, wide in (("fp32", 4, 4), ("bf16", 2, 2), ("int8", 1, 4), ("fp8", 1, 2)):
        cost = step_cost(system, precision, 2)
        assert cost.flops == 4 * tokens  # two samples and their guidance pair
        assert cost.bytes == matrices * narrow + (others + modulation) * wide


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("name", ["TexTok-4", "DiT/2"])
def test_the_original_loop_is_the_sampler(name: str, sampler: str) -> None:
    bench, system = Bench(CPU, "fp32", sampler, steps=3, guidance=2.0), system_named(name, "tiny")
    loop: Any = bench.loop(system, "reference", 2)
    torch.manual_seed(0)
    loop.begin()
    noise = loop.z.clone()
    state = torch.get_rng_state()
    loop.finish()
    assert loop.done == loop.total == 3
    labels, null = torch.tensor([0, 1]), torch.tensor([1000, 1000])
    model = guided(bench.network(system), labels, null, 2.0, channels=system.guided_channels)
    torch.set_rng_state(state)
    step_noise = torch.stack([torch.randn_like(noise) for _ in range(2)] + [torch.zeros_like(noise)])
    expected = sample(sampler, model, noise, 3, GaussianDiffusion(), step_noise=step_noise)
    torch.testing.assert_close(loop.z, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["TexTok-4", "DiT/2"])
def test_every_form_computes_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDIM from one noise; torch.compile itself is left out, for its minutes."""
    monkeypatch.setattr(systems, "_compile", lambda function, device: function)
    bench, system = Bench(CPU, "fp32", "ddim", steps=4), system_named(name, "tiny")
    noise, results = None, {}
    for form in ("reference", "compile", "engine"):
        loop: Any = bench.loop(system, form, 2)
        loop.begin()
        state = loop.run._current._loop.work[0] if form == "engine" else loop.z
        noise = state.clone() if noise is None else noise
        state.copy_(noise)
        for _ in range(loop.total):
            loop.advance()
        results[form] = loop.run.result() if form == "engine" else loop.z
    scale = results["reference"].abs().max()
    for form in ("compile", "engine"):
        torch.testing.assert_close(results[form] / scale, results["reference"] / scale, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["TexTok-4", "DiT/2"])
def test_every_form_of_a_decoder_gives_the_same_picture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "DiT/2":
        pytest.importorskip("diffusers")
    monkeypatch.setattr(systems, "_compile", lambda function, device: function)
    bench, system = Bench(CPU, "fp32"), system_named(name, "tiny")
    pictures = {}
    for form in ("reference", "compile", "engine"):
        torch.manual_seed(1)
        monkeypatch.setattr(bench, "features", lambda batch: FakeEncoder()(["a"] * batch))
        pictures[form] = bench.decoder(system, form, 2)()
    assert pictures["reference"].shape == (2, 64, 64, 3)
    assert pictures["reference"].dtype == torch.uint8
    for form in ("compile", "engine"):
        assert (pictures[form].int() - pictures["reference"].int()).abs().max() <= 1


def test_the_modulation_ahead_is_the_engines() -> None:
    bench, system = Bench(CPU, "fp32", steps=5), system_named("TexTok-4", "tiny")
    loop: Any = bench.loop(system, "engine", 2)
    shape = loop.run._current._loop.shape
    assert loop.layout == shape.layout
    assert loop.until_ahead == 0
    assert callable(loop.ahead)
    assert cast(Any, bench.loop(system, "engine", 2)).engine is loop.engine
    loop.begin()
    loop.advance()
    assert loop.until_ahead == 4
    rows: list[int] = []
    loop.engine.modulation = lambda c: rows.append(len(c))
    loop.ahead()
    assert sum(rows) == 5 * shape.layout.rows


# -- a run -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result() -> SpeedupResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "CPU_SHAPES", ((32, 32, 32),))
        patch.setattr(roofline, "CPU_COPY_BYTES", 2**20)
        patch.setattr(speedup, "measure_ceilings", functools.partial(roofline.measure_ceilings, seconds=0.01))
        patch.setattr(systems, "load_text_encoder", lambda *_, **__: FakeEncoder())
        patch.setattr(Bench, "text", lambda self, form, batch: lambda: torch.ones(64).sum())
        patch.setattr(systems, "_sd_vae_on_meta", lambda tiny: _FakeVae())
        patch.setattr(speedup, "ROUND_SECONDS", 0.02)
        patch.setattr(speedup, "WHOLE_SECONDS", 0.02)
        config = SpeedupConfig(**TINY, forms=("reference", "engine"), precisions=("fp32", "int8"), steps=6, rounds=3, full=True)
        return run_speedup(config, command="textok-fast bench speedup", progress=False)


class _FakeVae(torch.nn.Module):
    """The parts of an AutoencoderKL that a decoder's forms run."""

    config = SimpleNamespace(sample_size=64, block_out_channels=(8,) * 4, latent_channels=4, scaling_factor=0.18215)
    device, dtype = CPU, torch.float32

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.post_quant_conv = torch.nn.Conv2d(4, 4, 1)
            self.decoder = torch.nn.ConvTranspose2d(4, 3, 8, 8)

    def decode(self, z: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        assert not return_dict
        return (self.decoder(self.post_quant_conv(z)),)


def test_every_row_is_complete_and_consistent(result: SpeedupResult) -> None:
    small, large = "TexTok-4 + DiT-tiny", "DiT-tiny/1"
    assert [(*row.key, row.precision) for row in result.rows] == [
        (small, "reference", "fp32"),
        (large, "reference", "fp32"),
        (small, "engine", "fp32"),
        (large, "engine", "fp32"),
        (small, "engine", "int8"),
        (large, "engine", "int8"),
    ]
    assert (result.complete, result.skipped, result.threads) == (True, [], 1)
    ceilings = {entry.dtype: entry for entry in result.ceilings}
    assert set(ceilings) == {"fp32", "int8"}
    for row in result.rows:
        assert ("text" in row.parts) == (row.system == small)
        assert row.decoder_precision == ("int8" if (row.precision, row.system) == ("int8", small) else "fp32")
        assert row.steps == 6
        assert 1 <= row.steps_timed <= 6
        for timing in row.parts.values():
            assert timing.min <= timing.p25 <= timing.p50 <= timing.p75 <= timing.p99 <= timing.max
            assert len(timing.rounds) == 3
            assert timing.samples >= 3
        total = sum(timing.p50 * (row.steps if name == "step" else 1) for name, timing in row.parts.items())
        assert row.batch_s == pytest.approx(total)
        assert row.images_per_s == pytest.approx(1 / row.batch_s)
        cost, ceiling = step_cost(system_named(row.system.split(" ")[0], "tiny"), row.precision, 1), ceilings[row.precision]
        assert (row.flops, row.bytes) == (cost.flops, cost.bytes)
        assert row.floor_s == pytest.approx(max(cost.flops / ceiling.matmul_flops, cost.bytes / ceiling.read_bytes))
        assert row.floor_share == pytest.approx(row.floor_s / row.parts["step"].p50)
        assert row.full is not None
        assert row.full.samples == 1


def test_the_three_ratios_are_apart(result: SpeedupResult) -> None:
    small, large = "TexTok-4 + DiT-tiny", "DiT-tiny/1"
    assert {(r.kind, r.precision, r.slow, r.fast) for r in result.ratios} == {
        ("method", "fp32", (large, "reference"), (small, "reference")),
        ("method", "fp32", (large, "engine"), (small, "engine")),
        ("engine", "fp32", (small, "reference"), (small, "engine")),
        ("engine", "fp32", (large, "reference"), (large, "engine")),
        ("both", "fp32", (large, "reference"), (small, "engine")),
        ("method", "int8", (large, "engine"), (small, "engine")),
    }
    for ratio in result.ratios:
        slow, fast = (result.row(*key, ratio.precision, 1) for key in (ratio.slow, ratio.fast))
        images = [a / b for a, b in zip(slow.batch_rounds, fast.batch_rounds, strict=True)]
        assert ratio.image == pytest.approx(statistics.median(images))
        by_round = [a / b for a, b in zip(slow.parts["step"].rounds, fast.parts["step"].rounds, strict=True)]
        assert ratio.step == pytest.approx(statistics.median(by_round))
        assert ratio.step_range == pytest.approx((min(by_round), max(by_round)))


def test_the_result_survives_its_file_and_is_drawn_again(result: SpeedupResult, tmp_path: Path) -> None:
    written = speedup_report.save(result, tmp_path / "deep")
    assert [path.name for path in written] == ["results.json", "results.md", "speedup.svg", "latency.svg", "parts.svg"]
    assert load(written[0]) == result
    again = speedup_report.save(load(written[0]), tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]
    for path in written[2:]:
        ElementTree.fromstring(path.read_text())
    (tmp_path / "other.json").write_text('{"benchmark": "speedup", "rows": []}')
    (tmp_path / "list.json").write_text("[1]")
    for name in ("missing", "other", "list"):
        with pytest.raises(InputError):
            load(tmp_path / f"{name}.json")


def test_the_report_says_all_of_it(result: SpeedupResult) -> None:
    text = speedup_report.markdown(result)
    for wanted in ("93.5x", "ddpm, 6 steps", "Method, at equal engine", "Engine, at equal method", "Both together", "(fp32)"):
        assert wanted in text
    for row in result.rows:
        if row.steps_timed != row.steps:
            assert f"(from {row.steps_timed} of 6)" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)
    assert "published: 93.5x" in speedup_report.speedup_svg(result)
    incomplete = dataclasses.replace(result, complete=False, rows=[], ratios=[])
    assert "interrupted" in speedup_report.markdown(incomplete)
    assert speedup_report.plots(incomplete) == {}
    assert "TexTok-4 + DiT-tiny" in speedup_report.console(result)


def test_ctrl_c_keeps_the_rounds_that_were_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[SpeedupResult] = []

    def interrupt(result: SpeedupResult) -> None:
        seen.append(result)
        if len(seen) == 2:
            raise KeyboardInterrupt

    config = SpeedupConfig(**{**TINY, "systems": ("TexTok-4",)}, forms=("reference",), precisions=("fp32",), steps=2)
    with pytest.raises(KeyboardInterrupt):
        run_speedup(config, progress=False, on_result=interrupt)
    assert [len(one.rows[0].parts["step"].rounds) for one in seen] == [1, 2]
    assert not seen[-1].complete


# -- what is left out --------------------------------------------------------------------------------------------------------


def reasons(monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, str]:
    given = {**TINY, "forms": ("reference",), "precisions": ("fp32",), "steps": 2, "rounds": 3, **options}
    found = run_speedup(SpeedupConfig(**given), progress=False)
    assert {row.system for row in found.rows}.isdisjoint(each.system for each in found.skipped)
    return {each.system: each.reason for each in found.skipped}


def test_without_diffusers_the_baseline_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    found = reasons(monkeypatch)
    assert list(found) == ["DiT-tiny/1"]
    assert "pip install 'textok-fast[bench]'" in found["DiT-tiny/1"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        InputError("a batch of 1 does not fit"),
    ],
)
def test_what_does_not_fit_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    loop = Bench.loop

    def refuses(self: Bench, system: System, form: str, batch: int) -> Any:
        if system.tokens > 4:
            raise error
        return loop(self, system, form, batch)

    monkeypatch.setattr(Bench, "loop", refuses)
    found = reasons(monkeypatch)
    assert list(found) == ["DiT-tiny/1"]
    assert "does not fit" in found["DiT-tiny/1"]


def test_a_bug_is_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Bench, "loop", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        reasons(monkeypatch)


def test_memory_and_time_are_asked_for_before(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"systems": ("TexTok-4",)}
    assert "time budget" in reasons(monkeypatch, **small, time_budget_s=1e-6)["TexTok-4 + DiT-tiny"]
    monkeypatch.setattr(speedup, "available_memory", lambda device: 1000)
    assert "1000 B are free" in reasons(monkeypatch, **small)["TexTok-4 + DiT-tiny"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"size": "XXL"}, "XXL"),
        ({"systems": ("DiT/3",)}, "DiT/3"),
        ({"forms": ("onnx",)}, "onnx"),
        ({"forms": ()}, "forms"),
        ({"precisions": ("fp16",)}, "fp16"),
        ({"batch": (0,)}, "batch"),
        ({"sampler": "euler"}, "euler"),
        ({"steps": 0}, "steps"),
        ({"scale": 1.0}, "guidance"),
        ({"rounds": 2}, "min_rounds"),
        ({"time_budget_s": 0.0}, "time_budget_s"),
    ],
)
def test_a_wrong_configuration_is_named(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        SpeedupConfig(**wrong)


def test_defaults_follow_the_device() -> None:
    cpu, cuda = (SpeedupConfig().resolved(torch.device(name)) for name in ("cpu", "cuda"))
    assert (cpu.systems, cpu.precisions, cpu.batch) == (("TexTok-32", "DiT/2", "DiT/1"), ("bf16", "fp32"), (1,))
    assert (len(cuda.systems), cuda.precisions, cuda.batch) == (6, ("bf16", "fp8"), (1, 8, 64, 256))
    assert SpeedupConfig(batch=(3,)).resolved(torch.device("cuda")).batch == (3,)


def test_timing() -> None:
    found = Timing.of([[(1.0, 2.0), (3.0, 2.0)], [(2.0, 4.0)], [(6.0, 1.0), (4.0, 1.0), (5.0, 1.0)]])
    assert (found.p50, found.min, found.max, found.samples, found.rounds) == (3.5, 1.0, 6.0, 6, [2.0, 2.0, 5.0])
    assert (found.p25, found.p75) == (2.25, 4.75)
    assert found.p99 == pytest.approx(5.95)
    assert found.processor == 1.5


def test_ratios_of_what_is_there() -> None:
    def row(system: str, tokens: int, form: str, seconds: float) -> Row:
        part = Timing.of([[(seconds, seconds)]] * 3)
        blank: dict[str, Any] = {field.name: None for field in dataclasses.fields(Row)}
        given = {"system": system, "tokens": tokens, "form": form, "precision": "bf16", "batch": 1, "parts": {"step": part}}
        return Row(**{**blank, **given, "batch_s": 10 * seconds, "batch_rounds": [10 * seconds] * 3})

    rows = [row("A", 32, "engine", 1.0), row("B", 1024, "reference", 60.0), row("B", 1024, "engine", 30.0)]
    found = {(r.kind, r.slow, r.fast): (r.step, r.image) for r in ratios_of(rows)}
    assert found == {
        ("method", ("B", "engine"), ("A", "engine")): (30.0, 30.0),
        ("engine", ("B", "reference"), ("B", "engine")): (2.0, 2.0),
        ("both", ("B", "reference"), ("A", "engine")): (60.0, 60.0),
    }
    json.dumps([dataclasses.asdict(ratio) for ratio in ratios_of(rows)])


@pytest.mark.gpu
def test_on_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    config = SpeedupConfig(
        **{**TINY, "device": "cuda", "batch": (1, 2)}, forms=("reference", "engine"), precisions=("bf16",), steps=8
    )
    found = run_speedup(config, progress=False)
    assert found.complete
    assert {row.form for row in found.rows if row.system.startswith("TexTok")} == {"reference", "engine"}
    for row in found.rows:
        assert row.parts["step"].min > 0
        assert row.memory_bytes
