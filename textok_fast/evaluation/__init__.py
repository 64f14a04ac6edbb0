"""Metrics, the machine's measured limits, the headline speed-up benchmark and the demo's report."""

from textok_fast.evaluation.metrics import psnr, reconstruction_metrics, ssim
from textok_fast.evaluation.report import DemoResults, render_report, write_report
from textok_fast.evaluation.roofline import Ceilings, count_flops, machine_info, measure_ceilings
from textok_fast.evaluation.speedup import (
    PUBLISHED_SPEEDUP,
    SpeedupConfig,
    SpeedupResult,
    console_table,
    load,
    markdown_table,
    run_speedup,
    save,
    speedup_svg,
    step_flops,
)

__all__ = [
    "PUBLISHED_SPEEDUP",
    "Ceilings",
    "DemoResults",
    "SpeedupConfig",
    "SpeedupResult",
    "console_table",
    "count_flops",
    "load",
    "machine_info",
    "markdown_table",
    "measure_ceilings",
    "psnr",
    "reconstruction_metrics",
    "render_report",
    "run_speedup",
    "save",
    "speedup_svg",
    "ssim",
    "step_flops",
    "write_report",
]
