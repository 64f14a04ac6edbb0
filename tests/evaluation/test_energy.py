"""Energy counters: RAPL's files, polled power, and what happens without either."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from textok_fast.evaluation import energy
from textok_fast.evaluation.energy import Energy, PowerPoll, rapl_packages, read_power


def _package(root: Path, name: str, label: str, micro: int, wrap: int = 1_000_000_000) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    for file, text in (("name", label), ("energy_uj", str(micro)), ("max_energy_range_uj", str(wrap))):
        (folder / file).write_text(f"{text}\n")
    return folder


def test_packages_are_counted_and_their_parts_are_not(tmp_path: Path) -> None:
    packages = [_package(tmp_path, f"intel-rapl:{index}", f"package-{index}", 5) for index in range(2)]
    _package(tmp_path, "intel-rapl:0:0", "core", 5)
    _package(tmp_path, "intel-rapl:2", "psys", 5)
    (tmp_path / "intel-rapl").mkdir()
    assert rapl_packages(tmp_path) == packages


def test_energy_of_a_block_is_the_difference_of_the_counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _package(tmp_path, "intel-rapl:0", "package-0", 2_000_000)
    second = _package(tmp_path, "intel-rapl:1", "package-1", 999_000_000)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    with Energy("cpu") as used:
        assert used.joules is None
        (first / "energy_uj").write_text("5500000")
        (second / "energy_uj").write_text("1000000")  # past its end at 1,000 J
    assert used.joules == pytest.approx(3.5 + 2.0)
    assert used.source == "rapl" and used.reason == "" and used.seconds > 0


def test_without_a_counter_there_is_a_reason_and_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    with Energy("cpu") as used:
        pass
    assert used.joules is None and used.source == "" and "RAPL" in used.reason


def test_a_counter_that_vanishes_is_a_reason_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = _package(tmp_path, "intel-rapl:0", "package-0", 7)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    with Energy("cpu") as used:
        (package / "energy_uj").unlink()
    assert used.joules is None and "FileNotFoundError" in used.reason


def test_an_error_in_the_block_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _package(tmp_path, "intel-rapl:0", "package-0", 7)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    with pytest.raises(KeyError), Energy("cpu"):
        raise KeyError


def test_polled_power_is_integrated_by_the_trapezoidal_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, watts = iter([0.0, 1.0, 3.0]), iter([100.0, 200.0, 50.0])
    poll = PowerPoll(lambda: next(watts))
    monkeypatch.setattr(energy.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(energy, "POLL_SECONDS", 3600.0)
    poll.start()
    poll._sample()
    joules, reason = poll.stop()
    assert joules == pytest.approx(1.0 * 150 + 2.0 * 125) and reason == ""


def test_polling_reads_while_the_block_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POLL_SECONDS", 0.005)
    read = []
    poll = PowerPoll(lambda: read.append(1) or 10.0)
    poll.start()
    deadline = time.monotonic() + 20
    while len(read) < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    joules, _ = poll.stop()
    assert len(read) >= 5 and joules is not None and joules > 0


def test_power_that_nobody_reports_gives_no_energy() -> None:
    poll = PowerPoll(lambda: None)
    poll.start()
    assert poll.stop() == (None, "nvidia-smi reported power less than twice")


@pytest.mark.parametrize(("output", "watts"), [("71.25\n", 71.25), ("[N/A]\n", None), ("", None)])
def test_reading_of_power(output: str, watts: float | None) -> None:
    assert read_power(["printf", output]) == watts
    assert read_power(["/no/such/command"]) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_takes_energy() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    with Energy("cuda") as used:
        for _ in range(300):
            x = x @ x / 64
    assert used.joules is None or used.joules > 0
    assert (used.joules is None) == bool(used.reason)
