"""What a diffusers scheduler's config.json says of the noise that a model was trained with. Needs no diffusers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from textok_fast.errors import InputError

SCHEDULER_NAME = "scheduler/scheduler_config.json"  # in a pipeline's directory
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}  # diffusers' names -> ours
SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}


def gaussian_noise(config: Mapping[str, Any]) -> tuple[str, str]:
    """(prediction, schedule), in our names, of a scheduler of Gaussian diffusion; what is left out has diffusers' defaults.

    How it samples (its method, spacing, clipping) says nothing about training and is not looked at.
    Raises: InputError for a flow's scheduler, and for noise that no schedule here adds.
    """
    name = str(config.get("_class_name", "the scheduler"))
    if "FlowMatch" in name or config.get("prediction_type") == "flow_prediction":
        raise InputError(f"{name} is a flow's: wanted one of Gaussian diffusion, such as DDPMScheduler or DDIMScheduler")
    prediction, beta = config.get("prediction_type", "epsilon"), config.get("beta_schedule", "linear")
    if prediction not in PREDICTIONS:
        raise InputError(f"{name}: prediction_type is one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    steps, first, last = (
        config.get(key, default) for key, default in (("num_train_timesteps", 1000), ("beta_start", 1e-4), ("beta_end", 0.02))
    )
    other = next((key for key in ("trained_betas", "rescale_betas_zero_snr") if config.get(key)), None)
    if other is None and steps == 1000 and (beta == "squaredcos_cap_v2" or (beta, first, last) == ("linear", 1e-4, 0.02)):
        return PREDICTIONS[prediction], SCHEDULES[beta]
    raise InputError(
        f"{name}: noise is added linearly from 1e-4 to 0.02 or by squaredcos_cap_v2, in 1000 steps; got {beta} in {steps} from "
        f"{first} to {last}" + (f" with {other}" if other else "")
    )


def read_scheduler(pipeline: Path) -> Mapping[str, Any] | None:
    """The config of a pipeline directory's scheduler; None where there is none. InputError for one that cannot be read."""
    file = pipeline / SCHEDULER_NAME
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file}: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{file} holds a {type(values).__name__}, wanted a scheduler's settings")
    return values
