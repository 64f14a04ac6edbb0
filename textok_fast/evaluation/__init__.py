"""Metrics, the machine's measured limits, the headline speed-up benchmark and the demo's report."""

from textok_fast.evaluation.metrics import psnr, reconstruction_metrics, ssim
from textok_fast.evaluation.provenance import machine_info
from textok_fast.evaluation.report import DemoResults, render_report, write_report
from textok_fast.evaluation.roofline import Ceilings, count_flops, measure_ceilings
from textok_fast.evaluation.step_times import (
    PUBLISHED_SPEEDUP,
    StepTimesConfig,
    StepTimesResult,
    console_table,
    load,
    markdown_table,
    run_step_times,
    save,
    step_flops,
    step_times_svg,
)

__all__ = [
    "PUBLISHED_SPEEDUP",
    "Ceilings",
    "DemoResults",
    "StepTimesConfig",
    "StepTimesResult",
    "console_table",
    "count_flops",
    "load",
    "machine_info",
    "markdown_table",
    "measure_ceilings",
    "psnr",
    "reconstruction_metrics",
    "render_report",
    "run_step_times",
    "save",
    "ssim",
    "step_flops",
    "step_times_svg",
    "write_report",
]
