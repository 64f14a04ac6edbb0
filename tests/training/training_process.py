"""One process of a run on several: trains what its argument, a JSON list, says, one after the other.

Each item: ``config``; ``resume``; ``die_at``, a step at whose end the process of the highest rank is killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys

import torch

from textok_fast.config import TokenizerTrainConfig, from_mapping
from textok_fast.training import loop, train_tokenizer


def die_at(step: int) -> None:
    update = loop.ExponentialMovingAverage.update

    def dying(self: loop.ExponentialMovingAverage, model: torch.nn.Module, done: int) -> None:
        update(self, model, done)
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    loop.ExponentialMovingAverage.update = dying  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(sys.argv[1]):
        if "die_at" in job and int(os.environ["RANK"]) + 1 == int(os.environ["WORLD_SIZE"]):
            die_at(job["die_at"])
        try:
            result = train_tokenizer(from_mapping(TokenizerTrainConfig, job["config"]), resume=job["resume"], progress=False)
        except ConnectionError as error:
            sys.exit(f"ConnectionError: {error}")
        print(json.dumps({"final": str(result.final), "main": result.is_main}), flush=True)
