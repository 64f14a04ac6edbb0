"""The machine's ceilings, its description and the FLOP counter."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from textok_fast.errors import InputError
from textok_fast.evaluation import Ceilings, count_flops, machine_info, measure_ceilings
from textok_fast.evaluation.roofline import time_call, use_threads


def test_flops_of_a_product_and_of_attention() -> None:
    x, weight = torch.zeros(3, 5), torch.zeros(7, 5)
    assert count_flops(lambda: F.linear(x, weight)) == 2 * 3 * 5 * 7
    q = torch.zeros(2, 4, 16, 8)  # (B, H, N, d): q k^T and the product with v are 2 N N d each, a head
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * 4 * 2 * (2 * 16 * 16 * 8)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ceilings_are_positive_and_survive_json(dtype: str) -> None:
    found = measure_ceilings("cpu", dtype, threads=1, shapes=((16, 32, 8), (64, 64, 64)), copy_size=2**20, seconds=0.01)
    assert (found.device, found.dtype, found.threads) == ("cpu", dtype, 1)
    assert found.matmul_shape in ((16, 32, 8), (64, 64, 64))
    assert min(found.matmul_flops, found.read_bytes, found.copy_bytes) > 0
    assert Ceilings.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_the_better_of_two_measurements() -> None:
    a = Ceilings("cpu", "fp32", 1, 10.0, (1, 1, 1), 5.0, 2.0)
    b = Ceilings("cpu", "fp32", 1, 20.0, (2, 2, 2), 4.0, 3.0)
    assert a.better(b) == b.better(a) == Ceilings("cpu", "fp32", 1, 20.0, (2, 2, 2), 5.0, 3.0)


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    with use_threads(1) as threads:
        assert threads == torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with pytest.raises(InputError, match="threads"), use_threads(0):
        pass


def test_a_call_is_timed_once() -> None:
    calls: list[int] = []
    wall, processor = time_call(lambda: calls.append(1), torch.device("cpu"))
    assert calls == [1]
    assert wall > 0
    assert processor >= 0


def test_machine_info_is_json_and_names_what_ran() -> None:
    info = json.loads(json.dumps(machine_info()))
    assert info["torch"] == torch.__version__
    assert info["cpu"]
    assert info["threads"] == torch.get_num_threads()
    assert isinstance(info["isa"], list)
    assert {"cores", "memory_bytes", "gpus", "driver", "python", "git_commit"} <= set(info)


@pytest.mark.parametrize(("device", "says"), [("cuda:99", "not there"), ("meta", "auto, cpu, cuda"), ("fridge", "unknown")])
def test_a_device_that_is_not_there(device: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        measure_ceilings(device)


def test_an_unknown_dtype() -> None:
    with pytest.raises(InputError, match="fp8"):
        measure_ceilings("cpu", "fp8")


@pytest.mark.gpu
def test_ceilings_on_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    found = measure_ceilings("cuda", "bf16", shapes=((256, 256, 256),), copy_size=2**24, seconds=0.01)
    assert min(found.matmul_flops, found.read_bytes, found.copy_bytes) > 0
