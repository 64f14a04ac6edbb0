"""Noise by seed: Philox against its published vectors, normal numbers against their formula and their distribution."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from textok_fast import ops
from textok_fast.errors import InputError
from textok_fast.ops import dispatch, seeded_normal
from textok_fast.ops.noise import philox4x32, seeded_normal_reference

MASK = 2**32 - 1
# Random123 (Salmon et al. 2011), kat_vectors: philox4x32 10, counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SEEDS = torch.tensor([0, 1, 7, 2**32, 2**32 + 7, 2**63 - 1, -1, -(2**63)])


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 in Python's integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & MASK, (first >> 32) ^ c3 ^ k1, first & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def by_element(seed: int, draw: int, element: int) -> float:
    """The docstring's formula for one element, in float64."""
    numbers = philox((element // 4, 0, draw & MASK, 0), (seed & MASK, (seed >> 32) & MASK))
    first, second = numbers[:2] if element % 4 < 2 else numbers[2:]
    radius = math.sqrt(-2 * math.log((first + 0.5) / 2**32))
    angle = 2 * math.pi * second / 2**32
    return radius * (math.sin(angle) if element % 2 else math.cos(angle))


def check_formula(device: torch.device | str, sizes: tuple[int, ...]) -> None:
    for size in sizes:
        for draw in (0, 1, 250, 2**32 - 1, 2**32 + 3):
            found = seeded_normal(SEEDS.to(device), torch.tensor([draw], device=device), (size,)).cpu()
            assert found.shape == (len(SEEDS), size) and found.dtype == torch.float32
            elements = sorted({*range(min(size, 9)), size // 2, size - 1})
            wanted = [[by_element(seed, draw, element) for element in elements] for seed in SEEDS.tolist()]
            torch.testing.assert_close(found[:, elements].double(), torch.tensor(wanted).double(), rtol=0, atol=3e-6)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_published_vectors(counter: str, key: str, result: str) -> None:
    assert philox(words(counter), words(key)) == words(result)
    counters = [torch.tensor([word]) for word in words(counter)]
    keys = [torch.tensor([word]) for word in words(key)]
    found = philox4x32((counters[0], counters[1], counters[2], counters[3]), (keys[0], keys[1]))
    assert tuple(int(number) for number in found) == words(result)


def test_formula() -> None:
    check_formula("cpu", (1, 3, 4, 37, 1000))


def test_a_sample_is_its_own() -> None:
    draw = torch.tensor(3)
    together = seeded_normal(SEEDS, draw, (8, 5))
    for i in range(len(SEEDS)):
        assert torch.equal(seeded_normal(SEEDS[i : i + 1], draw, (8, 5)), together[i : i + 1])
    assert torch.equal(seeded_normal(SEEDS.flip(0), draw, (8, 5)).flip(0), together)
    assert torch.equal(seeded_normal(SEEDS, draw.view(1, 1), (4, 2, 5)).flatten(1), together.flatten(1))
    assert torch.equal(seeded_normal(SEEDS, draw, (50,))[:, :40], together.flatten(1))  # each element by its own number
    strided = torch.stack((SEEDS, SEEDS + 1), 1)[:, 0]
    assert torch.equal(seeded_normal(strided, draw, (8, 5)), together)
    assert torch.equal(seeded_normal(SEEDS, draw, ()), together[:, 0, 0])
    assert seeded_normal(SEEDS, draw, (0, 3)).shape == (8, 0, 3) and seeded_normal(SEEDS[:0], draw, (3,)).shape == (0, 3)


def check_distribution(noise: Tensor) -> None:
    """(B, draws, n) with B * draws * n = 2**18 or so; the bounds hold for a right generator in about 99.9 % of all seeds."""
    flat = noise.double().flatten()
    n = len(flat)
    moments = {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}  # power: mean, variance of it
    for power, (mean, variance) in moments.items():
        assert abs(float((flat**power).mean()) - mean) < 3.3 * math.sqrt(variance / n), power
    ordered = torch.special.ndtr(flat.sort().values)
    rank = torch.arange(n, dtype=torch.float64) / n
    distance = torch.maximum(ordered - rank, rank + 1 / n - ordered).max()  # Kolmogorov and Smirnov
    assert distance * math.sqrt(n) < 1.95
    assert flat.unique().numel() > 0.98 * n  # float32 near 0 has room for all of them
    for name, first, second in (
        ("elements", noise[..., 1:], noise[..., :-1]),
        ("elements four apart", noise[..., 4:], noise[..., :-4]),
        ("seeds", noise[1:], noise[:-1]),
        ("draws", noise[:, 1:], noise[:, :-1]),
        ("squares", noise[..., 1:] ** 2 - 1, noise[..., :-1] ** 2 - 1),
    ):
        product = first.double() * second.double()
        bound = 3.3 * float(product.std()) / math.sqrt(product.numel())
        assert abs(float(product.mean())) < bound, name


def test_distribution() -> None:
    seeds = torch.arange(100, 116)
    check_distribution(torch.stack([seeded_normal(seeds, torch.tensor(draw), (64, 16)) for draw in range(16)], 1).flatten(2))


def test_what_does_not_fit_is_refused() -> None:
    seeds, draw = torch.tensor([1, 2]), torch.tensor(0)
    wrong: list[tuple[tuple[Any, Any, Any], str]] = [
        ((seeds.int(), draw, (3,)), r"seeds must be int64 \(B,\), got cpu int32 \(2,\)"),
        ((seeds[None], draw, (3,)), r"seeds must be int64 \(B,\), got cpu int64 \(1, 2\)"),
        (([1, 2], draw, (3,)), r"seeds must be int64 \(B,\), got \[1, 2\]"),
        ((seeds, 0, (3,)), "draw must be a tensor of one int64, got 0"),
        ((seeds, seeds, (3,)), r"draw must be a tensor of one int64, got cpu int64 \(2,\)"),
        ((seeds, draw.float(), (3,)), "draw must be a tensor of one int64, got cpu float32"),
        ((seeds, draw.to("meta"), (3,)), "seeds lie on cpu and draw on meta"),
        ((seeds, draw, (3, -1)), r"no negative size; got the shape \(3, -1\)"),
        ((seeds, draw, (2**14, 2**13)), r"at most 2\*\*26 elements"),
    ]
    for arguments, message in wrong:
        with pytest.raises(InputError, match=message):
            seeded_normal(*arguments)


# -- choice, compiler, exporter ------------------------------------------------------------------------------------------------


def check_compiled(device: torch.device | str) -> None:
    compiled = torch.compile(lambda seeds, draw: seeded_normal(seeds, draw, (6, 3)), fullgraph=True, backend="aot_eager")
    for draw in (0, 5):
        arguments = SEEDS.to(device), torch.tensor(draw, device=device)
        torch.testing.assert_close(compiled(*arguments), seeded_normal(*arguments, (6, 3)), rtol=0, atol=1e-6)


def test_compiled_in_one_graph() -> None:
    check_compiled("cpu")


def test_exported_as_standard_operators() -> None:
    class Noise(torch.nn.Module):
        def forward(self, seeds: Tensor, draw: Tensor) -> Tensor:
            return seeded_normal(seeds, draw, (6, 3))

    program = torch.export.export(Noise(), (SEEDS, torch.tensor(0)))
    assert "textok" not in str(program.graph)
    found = program.module()(SEEDS, torch.tensor(4))
    torch.testing.assert_close(found, seeded_normal(SEEDS, torch.tensor(4), (6, 3)), rtol=0, atol=1e-6)


def test_choice_on_the_cpu() -> None:
    assert dispatch.choose("seeded_normal", SEEDS, torch.tensor(0), [3]) == "reference"


# -- Triton --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def triton_device(device: torch.device) -> torch.device:
    if reason := dispatch.load_backend("triton"):
        pytest.skip(reason)
    return device


def test_triton_formula(triton_device: torch.device) -> None:
    with ops.use_backend(seeded_normal="triton"):
        check_formula(triton_device, (1, 37, 1030))  # within a block, and over several


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_triton_has_the_published_philox(triton_device: torch.device, counter: str, key: str, result: str) -> None:
    """What the kernel is made of; its own counters have zeros in two places."""
    from philox_kernel import philox_kernel

    low, high = words(key)
    seed = low + (high << 32)
    numbers = torch.tensor([*words(counter), seed - 2**64 if seed >= 2**63 else seed], device=triton_device)
    out = torch.empty(4, dtype=torch.int64, device=triton_device)
    philox_kernel[(1,)](numbers, out)
    assert tuple(out.tolist()) == words(result)


def test_triton_gives_what_the_reference_gives(triton_device: torch.device) -> None:
    for shape in ((32, 16), (3, 5, 7), ()):
        draw = torch.tensor(9, device=triton_device)
        found = torch.ops.textok_fast_triton.seeded_normal(SEEDS.to(triton_device), draw, shape)
        torch.testing.assert_close(found.cpu(), seeded_normal_reference(SEEDS, torch.tensor(9), shape), rtol=0, atol=3e-6)


def test_triton_operation_is_sound(triton_device: torch.device) -> None:
    arguments = (SEEDS.to(triton_device), torch.tensor([2], device=triton_device), (5, 3))
    torch.library.opcheck(torch.ops.textok_fast_triton.seeded_normal, arguments)


def test_triton_compiled_in_one_graph(triton_device: torch.device) -> None:
    with ops.use_backend("triton"):
        check_compiled(triton_device)


def test_what_triton_does_not_take(triton_device: torch.device) -> None:
    with ops.use_backend(seeded_normal="triton"), pytest.raises(InputError, match=r"it draws 1 to 2\*\*31 - 1 numbers, got 0"):
        seeded_normal(SEEDS[:0].to(triton_device), torch.tensor(0, device=triton_device), (3,))


def test_triton_launches_a_grid_that_a_gpu_takes(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from textok_fast.ops.triton_kernels import noise as kernels

    grids: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *args, **options: None

    monkeypatch.setattr(kernels, "seeded_normal_kernel", Kernel())
    draw = torch.tensor(0, device=triton_device)
    for samples, size in ((1, 2**26), (3, 1000), (70_000, 1)):  # memory that nobody writes to costs nothing
        kernels.seeded_normal(torch.zeros(samples, dtype=torch.int64, device=triton_device), draw, (size,))
    assert [math.prod(grid) for grid in grids] == [2**17, 3 * 2, 70_000]
    assert all(number < 2**16 for grid in grids for number in grid[1:])  # CUDA's limit but for the first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_large_samples_on_a_gpu() -> None:
    seeds, draw, size = torch.tensor([7, 2**63 - 1], device="cuda"), torch.tensor(3, device="cuda"), 2**26 - 3
    with ops.use_backend(seeded_normal="triton"):
        found = seeded_normal(seeds, draw, (size,))
    for row, seed in enumerate(seeds.tolist()):
        for element in (0, 2**25 - 1, 2**25, 33_553_920, size - 1):
            assert found[row, element].item() == pytest.approx(by_element(seed, 3, element), abs=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu() -> None:
    seeds = torch.arange(100, 116, device="cuda")
    draw = torch.zeros(1, dtype=torch.int64, device="cuda")
    found = []
    for backend in ("triton", "reference"):
        with ops.use_backend(seeded_normal=backend):
            seeded_normal(seeds, draw, (64, 16))  # compiled before it is captured
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = seeded_normal(seeds, draw, (64, 16))
                draw.add_(1)
            draw.zero_()
            rows = []
            for _ in range(16):
                graph.replay()
                rows.append(out.clone())
            draw.zero_()
            found.append(torch.stack(rows, 1).flatten(2).cpu())
    wanted = torch.stack([seeded_normal(seeds.cpu(), torch.tensor(draw), (64, 16)) for draw in range(16)], 1).flatten(2)
    for noise in found:
        check_distribution(noise)
        torch.testing.assert_close(noise, wanted, rtol=0, atol=1e-5)
