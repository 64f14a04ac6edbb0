"""The diffusion process that a model was trained with, by the names that configurations give it."""

from __future__ import annotations

from typing import Literal, TypeAlias, cast, get_args

from textok_fast.diffusion.flow import FlowMatching
from textok_fast.diffusion.gaussian import GaussianDiffusion, Prediction
from textok_fast.errors import InputError

Objective: TypeAlias = Literal["gaussian", "flow"]
Process: TypeAlias = GaussianDiffusion | FlowMatching


def build_process(objective: str, learn_sigma: bool, prediction: str = "epsilon", schedule: str = "linear") -> Process:
    """``prediction`` and ``learn_sigma`` say what a Gaussian model's output means, ``schedule`` (linear, cosine) how noise was
    added; a flow's output is its velocity, and its path linear.

    Raises :class:`InputError` for an unknown name, and for a flow with a learned variance.
    """
    if objective == "gaussian":
        if prediction not in get_args(Prediction):
            raise InputError(f"prediction must be one of {', '.join(get_args(Prediction))}; got {prediction!r}")
        return GaussianDiffusion(schedule=schedule, prediction=cast(Prediction, prediction), learn_sigma=learn_sigma)
    if objective != "flow":
        raise InputError(f"objective must be gaussian or flow, got {objective!r}")
    if learn_sigma:
        raise InputError("a flow has no learned variance: set model.learn_sigma=false, or objective=gaussian")
    return FlowMatching()
