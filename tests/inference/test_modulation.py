from __future__ import annotations

from typing import Any

import pytest
import torch

from textok_fast import DiT, DiTConfig
from textok_fast.inference.modulation import Layout, StackedModulation, layout, unique_labels
from textok_fast.inference.plan import Plan
from textok_fast.inference.precision import prepare

COLUMNS, WIDTH = 170 * 1152, 1152  # DiT-XL's
MIB = 2**20


def model(**overrides: Any) -> DiT:
    torch.manual_seed(1)
    sizes = {"num_tokens": 3, "in_channels": 4, "width": 32, "depth": 3, "heads": 2, "num_classes": 5}
    made = DiT(DiTConfig(**{**sizes, **overrides}))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


@pytest.mark.parametrize("products", ["auto", "reference"])
@torch.no_grad()
def test_one_product_is_all_of_them(products: str) -> None:
    original = model()
    copy = prepare(original, "fp32", products=products)
    stacked = StackedModulation(copy, products)
    c = original.condition(torch.tensor([3, 900]), torch.tensor([1, 5]))
    wanted = original.modulation(c)
    found = stacked.split(stacked(c))
    assert [tuple(rows.shape) for rows in found] == [(2, 192)] * 3 + [(2, 64)]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    buffer = torch.full((2, stacked.columns), torch.nan)
    assert stacked(c, out=buffer).data_ptr() == buffer.data_ptr()
    torch.testing.assert_close(buffer, torch.cat(wanted, 1), atol=1e-6, rtol=1e-5)
    # The layers are gone from the copy, and still in the original.
    assert not [name for name, _ in copy.named_parameters() if "adaLN" in name]
    assert len([name for name, _ in original.named_parameters() if "adaLN" in name]) == 8
    assert stacked.columns * 33 * 4 <= stacked.bytes < 2 * stacked.columns * 33 * 4  # packed ones may be padded


@torch.no_grad()
def test_layers_that_somebody_changed_are_called() -> None:
    original = model()
    linear = original.blocks[1].adaLN_modulation[1]
    original.blocks[1].adaLN_modulation[1] = torch.nn.Sequential(linear, torch.nn.Tanh())
    stacked = StackedModulation(prepare(original, "fp32"))
    c = original.condition(torch.tensor([3, 900]), torch.tensor([1, 5]))
    wanted = torch.cat(original.modulation(c), 1)
    torch.testing.assert_close(stacked(c), wanted, atol=1e-6, rtol=1e-5)
    buffer = torch.full_like(wanted, torch.nan)
    assert stacked(c, out=buffer).data_ptr() == buffer.data_ptr()
    torch.testing.assert_close(buffer, wanted, atol=1e-6, rtol=1e-5)
    assert stacked.bytes == stacked.columns * 33 * 4 and linear.weight is original.blocks[1].adaLN_modulation[1][0].weight


def test_rows_at_any_stride_are_modulations() -> None:
    original = model()
    stacked = StackedModulation(prepare(original, "fp32"))
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        one = stacked(original.condition(torch.tensor([7]), torch.tensor([2])))
        given = original.step(x, stacked.split(one.expand(2, -1)))
        torch.testing.assert_close(given, original(x, torch.tensor([7, 7]), torch.tensor([2, 2])), atol=1e-5, rtol=1e-5)


def test_ahead_or_inside_is_a_matter_of_bytes() -> None:
    def auto(batch: int, rows: int, evaluations: int = 250, element: int = 2, **fields: Any) -> Layout:
        return layout(Plan(**fields), COLUMNS, WIDTH, element, evaluations, batch, rows)

    # One sample with guidance: two rows an evaluation of 0.4 MB each, so 250 evaluations fit into 512 MiB at once.
    assert auto(2, 2) == Layout(2, 250)
    assert auto(2, 2, modulation_budget=100 * MIB) == Layout(2, 133)
    # Every sample with a class of its own: a chunk gets short, and its rows are what is moved.
    assert auto(128, 65).chunk == 512 * MIB // (65 * COLUMNS * 2)
    assert auto(2048, 1001).chunk == 0
    # Captions do not enter the modulation: one row an evaluation, whatever the batch.
    assert auto(2048, 1) == Layout(1, 250)
    # A budget below a single row saves nothing.
    assert auto(2, 2, modulation_budget=1).chunk == 0
    assert auto(2, 2, modulation_budget=1, modulation="ahead").chunk == 1
    assert auto(2, 2, modulation="inside") == Layout(2, 0)


def test_every_label_gets_one_row() -> None:
    labels, rows = unique_labels(torch.tensor([7, 2, 7, 7]), 10, 4, True)
    assert labels is not None and labels.tolist() == [2, 7, 10, 10]  # rounded up to a power of two
    assert labels[rows].tolist() == [7, 2, 7, 7, 10, 10, 10, 10]
    labels, rows = unique_labels(torch.tensor([3, 1, 10]), 10, 3, True)
    assert labels is not None and labels.tolist() == [1, 3, 10, 10]
    labels, rows = unique_labels(torch.tensor([0, 1, 2, 3, 4]), 10, 5, True)
    assert labels is not None and len(labels) == 6  # not above a row a sample and one more
    assert labels[rows].tolist() == [0, 1, 2, 3, 4] + [10] * 5
    labels, rows = unique_labels(torch.tensor([4, 4]), 10, 2, False)
    assert labels is not None and (labels.tolist(), rows.tolist()) == ([4], [0, 0])
    assert unique_labels(None, 0, 2, True)[0] is None
