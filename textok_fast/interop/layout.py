"""What a file of weights must hold: the name of each tensor, and its shape in sizes that the tensors tell themselves."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction

import torch
from torch import Tensor

from textok_fast.modeling.saving import misfit

# A dimension is a number, or a product such as "3 D", "p p O", "G G" or "1/2 D" of numbers and named sizes.
Shape = tuple[int | str, ...]


def read_sizes(
    state: Mapping[str, Tensor], layout: Mapping[str, Shape], what: str, known: Mapping[str, int] | None = None
) -> dict[str, int]:
    """The sizes that the layout names, each what most of the tensors that tell it have.

    So a tensor of a wrong shape is found by the others: it is the one that is named, whatever the sizes are read from.

    Args:
        what: whose weights these are meant to be, for the message.
        known: sizes that are not to be read.

    Raises: InputError naming the keys that are missing, unexpected or of another shape, in the names of ``state``, or whose
        values are not finite floats.
    """
    sizes, tellers = dict(known or {}), dict[str, list[str]]()
    while votes := _votes(state, layout, sizes):
        for name, by_value in votes.items():
            sizes[name] = max(by_value, key=lambda value: len(set(by_value[value])))
            tellers[name] = list(dict.fromkeys(by_value[sizes[name]]))
    problems = [f"missing {key}" for key in layout if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in layout]
    readable = not problems  # else what lacks may be why a size is not known
    for key, shape in layout.items():
        if key in state and (problem := _misshapen(state, key, shape, sizes, tellers, readable)):
            problems.append(problem)
    if problems:
        raise misfit(f"these are not the weights of a {what}", problems)
    if problems := [problem for key in layout if (problem := _no_values(key, state[key]))]:
        raise misfit(f"these are no weights that a {what} could run with", problems)
    return sizes


def _no_values(key: str, value: Tensor) -> str:
    """Why a tensor's values are no weights, "" where they are."""
    if not value.is_floating_point():
        return f"{key} is {str(value.dtype).removeprefix('torch.')}, wanted floats"
    if value.is_meta:
        return f"{key} is on the meta device, where it has no values"
    return "" if bool(torch.isfinite(value.float()).all()) else f"{key} contains NaN or infinity"


def count_blocks(state: Mapping[str, Tensor], prefix: str, names: Iterable[str]) -> int:
    """How many blocks ``prefix``0, ``prefix``1, ... there are: up to the last one with half of the tensors ``names``, so that
    neither a tensor that lacks nor a stray one changes it. At least 1."""
    indices = {int(found[1]) for key in state if (found := re.match(re.escape(prefix) + r"(\d{1,4})\.", key))}
    return 1 + max((index for index in indices if holds(state, (f"{prefix}{index}.{name}" for name in names))), default=0)


def holds(state: Mapping[str, Tensor], keys: Iterable[str]) -> bool:
    """Whether an optional part is there: at least half of its tensors are."""
    there = [key in state for key in keys]
    return 2 * sum(there) >= len(there)


def _factors(dimension: int | str, sizes: Mapping[str, int]) -> tuple[Fraction, list[str]]:
    """The product of what is known of a dimension, and the names of what is not."""
    known, unknown = Fraction(1), []
    for part in str(dimension).split():
        if part in sizes:
            known *= sizes[part]
        elif part[0].isdigit():
            known *= Fraction(part)
        else:
            unknown.append(part)
    return known, unknown


def _votes(
    state: Mapping[str, Tensor], layout: Mapping[str, Shape], sizes: Mapping[str, int]
) -> dict[str, dict[int, list[str]]]:
    """For each size that is not known and a dimension tells: the keys by the value that they tell."""
    votes: dict[str, dict[int, list[str]]] = {}
    for key, shape in layout.items():
        if key not in state or state[key].ndim != len(shape):
            continue
        for dimension, found in zip(shape, state[key].shape, strict=True):
            known, unknown = _factors(dimension, sizes)
            if len(set(unknown)) != 1 or found % known:
                continue
            value = int(found / known)
            if len(unknown) == 2 and math.isqrt(value) ** 2 != value:
                continue
            value = math.isqrt(value) if len(unknown) == 2 else value
            if value > 0:
                votes.setdefault(unknown[0], {}).setdefault(value, []).append(key)
    return votes


def shape_of(state: Mapping[str, Tensor], key: str) -> str:
    """For messages: key and shape."""
    return f"{key} of shape {tuple(state[key].shape)}"


def _misshapen(
    state: Mapping[str, Tensor],
    key: str,
    shape: Shape,
    sizes: Mapping[str, int],
    tellers: Mapping[str, list[str]],
    readable: bool,
) -> str:
    """What is wrong with a shape, "" for nothing. ``readable``: a dimension without a size is wrong too."""
    found = tuple(state[key].shape)
    wanted: list[str] = []
    because: list[str] = []
    wrong = len(found) != len(shape)
    for index, dimension in enumerate(shape):
        known, unknown = _factors(dimension, sizes)
        wanted.append(str(dimension) if unknown else str(known))
        if len(found) == len(shape) and (readable if unknown else known != found[index]):
            wrong = True
            for name in set(str(dimension).split()) & tellers.keys():
                because += tellers[name] if len(tellers[name]) < 3 else []  # too few to tell who is wrong
    if not wrong:
        return ""
    by = " and ".join(shape_of(state, other) for other in dict.fromkeys(because) if other != key)
    return f"{key} has the shape {found}, wanted ({', '.join(wanted)}{',' * (len(wanted) == 1)})" + (f" by {by}" if by else "")
