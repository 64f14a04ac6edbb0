from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from textok_fast import InputError
from textok_fast.inference import MemoryEstimate, Plan, StepCache, memory, plan

OPS = {"attention": "sdpa", "*": "reference"}
FULL = Plan("bf16", modulation_budget=2**20, ops=OPS, step_cache=StepCache(3, 1, 2), split=True)
ON_GPU = Plan("fp8", "cuda:1", capture="loop", compile="max-autotune")


@pytest.mark.parametrize("given", [Plan(), FULL, ON_GPU])
def test_a_plan_is_saved_and_read_on_any_machine(given: Plan, tmp_path: Path) -> None:
    path = given.save(tmp_path / "run" / "plan.json")
    assert Plan.load(path) == given
    assert Plan.from_dict(json.loads(path.read_text())) == given
    assert set(json.loads(path.read_text())) == {each.name for each in dataclasses.fields(Plan)}


def test_a_plan_is_a_key() -> None:
    assert {FULL: 1}[Plan.from_dict(FULL.to_dict())] == 1
    assert len({Plan(), Plan(), Plan("bf16")}) == 2


def test_a_plan_says_what_it_is() -> None:
    text = FULL.describe()
    assert len(text.splitlines()) == 8
    for part in ("bf16 on cpu", "attention=sdpa", "once in 3 evaluations", "from 1 to before 2", "1.0 MiB ahead", "is split"):
        assert part in text
    assert "from a quarter of them to before the last quarter" in Plan(step_cache=StepCache()).describe()
    assert "refused" in Plan().describe() and "step cache  off" in Plan().describe()


def test_the_plan_for_this_machine_runs_on_it() -> None:
    found = Plan.automatic("cpu")
    assert found.require_machine() is found
    assert (found.device, found.capture, found.step_cache) == ("cpu", "none", None)
    assert found.precision in ("fp32", "bf16")
    assert Plan.automatic("cpu", "int8", modulation="inside") == Plan("int8", modulation="inside")


@pytest.mark.parametrize(("capability", "precision"), [((9, 0), "bf16"), ((7, 5), "fp32")])
def test_a_gpu_gets_graphs(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str) -> None:
    monkeypatch.setattr(plan, "resolve_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    assert Plan.automatic() == Plan(precision, "cuda:0", capture="loop")
    assert Plan.automatic(batch=64).capture == "step"
    fp8 = Plan("fp8", "cuda")
    if capability < (8, 9):
        with pytest.raises(InputError, match=r"some GPU has 7\.5: use precision='bf16'"):
            fp8.require_machine()
    else:
        assert fp8.require_machine() is fp8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plan("fp16"), "precision must be one of fp32, bf16, int8, fp8; got 'fp16'"),
        (lambda: Plan(compile="fast"), "compile must be one of"),
        (lambda: Plan(device="tpu"), "device must be cpu, cuda or cuda:N, got 'tpu'"),
        (lambda: Plan(device="auto"), "Plan.automatic"),
        (lambda: Plan(capture="step"), "needs CUDA graphs"),
        (lambda: Plan("int8", "cuda"), "int8 runs on a CPU only"),
        (lambda: Plan(device="cuda", products="native"), "CPU's packed products"),
        (lambda: Plan(modulation_budget=0), "modulation_budget is a number of bytes"),
        (lambda: Plan(memory_limit=1.5), "memory_limit is a number of bytes"),
        (lambda: Plan(ops={"attention": "magic"}).require_machine(), "unknown backend 'magic' of attention"),
        (lambda: Plan(ops={"sorting": "native"}).require_machine(), "unknown operation 'sorting'"),
        (lambda: Plan(device="cuda:99").require_machine(), "is not there"),
        (lambda: Plan(ops=["attention"]), "ops are a dict"),
        (lambda: Plan(ops={"attention": 1}), "ops are a dict"),
        (lambda: Plan(split="no"), "split is True or False, got 'no'"),
        (lambda: Plan(step_cache=2), "step_cache is a StepCache or None, got 2"),
        (lambda: StepCache(start="a"), "start is the number of a block, or None, got 'a'"),
        (lambda: StepCache(stop=-1), "stop is the number of a block"),
        (lambda: StepCache(1), "at least 2, got 1"),
        (lambda: StepCache(2, 3, 3).blocks(4), "0 <= start < stop <= 4"),
        (lambda: StepCache(2, 0, 5).blocks(4), "stop 5"),
        (lambda: Plan.from_dict({"speed": 1}), "a plan has no speed; its fields: precision"),
        (lambda: Plan.from_dict([]), "a mapping of its fields"),
        (lambda: Plan.from_dict({"step_cache": {"every": 2}}), "not a plan"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_files_that_hold_no_plan_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no plan at"):
        Plan.load(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match="cannot read the plan"):
        Plan.load(tmp_path / "broken.json")


def test_a_step_cache_runs_all_blocks_where_it_must() -> None:
    assert StepCache().blocks(28) == (7, 21)
    assert StepCache(2).full_evaluations((True,) * 5) == [True, False, True, False, True]
    assert StepCache(3).full_evaluations((False,) * 5) == [True, False, False, True, False]
    # The pair begins at evaluation 1: what evaluation 0 left has no unconditional half.
    assert StepCache(4).full_evaluations((False, True, True, True, False, False)) == [True, True, False, False, True, False]
    # Its conditional half serves an evaluation without guidance.
    assert StepCache(3).full_evaluations((True, False, True)) == [True, False, False]


def test_an_estimate_adds_up_and_refuses_with_its_numbers() -> None:
    estimate = MemoryEstimate(weights=3 * 2**30, modulation=0, activations=2**20, state=100, available=2**30)
    assert estimate.total == 3 * 2**30 + 2**20 + 100
    assert not estimate.fits
    message = r"a batch of 8 does not fit, it takes 3\.0 GiB: weights 3\.0 GiB, activations 1\.0 MiB, .*available 1\.0 GiB; use"
    with pytest.raises(InputError, match=message):
        memory.require_fits(estimate, "a batch of 8", "use a smaller one")
    memory.require_fits(dataclasses.replace(estimate, available=2**40), "a batch of 8", "use a smaller one")


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "group")
    cpu = torch.device("cpu")
    assert memory.available_memory(cpu, limit=10**9) == 10**9  # no /proc at all: only the plan's limit
    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    assert memory.available_memory(cpu) == 5000 * 1024
    assert memory.available_memory(cpu, resident=7) == 5000 * 1024 + 7
    write("proc/self/cgroup", "0::/jobs/one\n")
    write("group/jobs/one/memory.max", "max\n")
    write("group/jobs/one/memory.current", "1\n")
    write("group/jobs/memory.max", "3000000\n")
    write("group/jobs/memory.current", "1000000\n")
    write("group/jobs/memory.stat", "anon 1\ninactive_file 200000\n")
    assert memory.available_memory(cpu) == 2_200_000  # of the group above; cached files give way
    assert memory.available_memory(cpu, limit=50) == 50
    write("proc/self/cgroup", "5:cpu,memory:/box\n")
    write("group/memory/box/memory.limit_in_bytes", "1000\n")
    write("group/memory/box/memory.usage_in_bytes", "900\n")
    write("group/memory/box/memory.stat", "total_inactive_file 50\n")
    assert memory.available_memory(cpu) == 150


def test_the_memory_of_graphs_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ((0, (0, 0), 100, 30), (0, (0, 7), 1000, 0), (1, (0, 0), 10_000, 0))  # one of a graph, one of another device
    names = ("device", "segment_pool_id", "total_size", "active_size")
    segments = [dict(zip(names, each, strict=True)) for each in sizes]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda include_traces: segments)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 99))
    assert memory.available_memory(torch.device("cuda", 0), resident=1) == 5 + 70 + 1


def test_bytes_are_written_for_readers() -> None:
    assert [memory.format_bytes(size) for size in (5, 2048, 3 * 2**19, 2**41)] == ["5 B", "2 KiB", "1.5 MiB", "2048.0 GiB"]
