"""Noise schedules, training losses, samplers and guidance. No network lives here: a model is any ``(x, t) -> output``."""

from __future__ import annotations

from textok_fast.diffusion.flow import FlowMatching
from textok_fast.diffusion.gaussian import GaussianDiffusion, MeanVariance
from textok_fast.diffusion.guidance import GuidedModel, classifier_free_guidance, guided, merge_conditions
from textok_fast.diffusion.noise import NoiseSource, draw_noise, generators_for_seeds
from textok_fast.diffusion.process import Objective, Process, build_process
from textok_fast.diffusion.program import SAMPLERS, SamplerProgram, sampler_program
from textok_fast.diffusion.samplers import (
    OnStep,
    StopSampling,
    ddim_step,
    ddpm_step,
    run_program,
    sample,
    sample_ddim,
    sample_ddpm,
    sample_euler,
    sample_heun,
)
from textok_fast.diffusion.schedule import betas_for, respaced_timesteps
from textok_fast.diffusion.tensors import ModelFn, channel_dim

__all__ = [
    "SAMPLERS",
    "FlowMatching",
    "GaussianDiffusion",
    "GuidedModel",
    "MeanVariance",
    "ModelFn",
    "NoiseSource",
    "Objective",
    "OnStep",
    "Process",
    "SamplerProgram",
    "StopSampling",
    "betas_for",
    "build_process",
    "channel_dim",
    "classifier_free_guidance",
    "ddim_step",
    "ddpm_step",
    "draw_noise",
    "generators_for_seeds",
    "guided",
    "merge_conditions",
    "respaced_timesteps",
    "run_program",
    "sample",
    "sample_ddim",
    "sample_ddpm",
    "sample_euler",
    "sample_heun",
    "sampler_program",
]
