"""Optimizers, learning-rate schedule and the moving average of the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from textok_fast.config import AdamConfig, OptimConfig
from textok_fast.training.parallel import local, part_like


def build_optimizers(model: nn.Module, config: AdamConfig, fused: bool | None = True) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon beside it where ``config`` names it. Every optimizer steps once a step, at the same learning rate.

    ``fused``: of AdamW, its update as one kernel; None leaves that to torch.
    Weight decay is on the linear layers' matrices only, not on biases, norms, embeddings, positions and learned tokens.
    """
    by_muon = isinstance(config, OptimConfig) and config.name == "muon"
    in_blocks = {id(parameter) for name, parameter in model.named_parameters() if "blocks." in name}
    muon: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if not (isinstance(module, nn.Linear) and name == "weight"):
                plain.append(parameter)
            elif by_muon and id(parameter) in in_blocks:
                muon.append(parameter)
            else:
                decayed.append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)]
    if muon:
        optimizers.append(
            torch.optim.Muon(muon, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    return optimizers


def learning_rate(step: int, total: int, config: AdamConfig) -> float:
    """Linear warm-up to ``lr``, then a half cosine down to ``final_lr * lr`` at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


class ExponentialMovingAverage:
    """average = decay * average + (1 - decay) * parameter, the decay rising as (1 + n) / (10 + n) at first.

    Of weights that lie in parts on several processes each averages its part.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.averages = [parameter.detach().clone() for _, parameter in model.named_parameters() if parameter.requires_grad]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """``step``: updates done before this one."""
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = [local(parameter) for parameter in model.parameters() if parameter.requires_grad]
        torch._foreach_lerp_([local(average) for average in self.averages], parameters, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.averages, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """``state``: whole tensors."""
        for name, average in zip(self.names, self.averages, strict=True):
            local(average).copy_(local(part_like(state[name], average)))

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrites the model's parameters with the averages."""
        for parameter, average in zip((p for p in model.parameters() if p.requires_grad), self.averages, strict=True):
            local(parameter).copy_(local(average))
