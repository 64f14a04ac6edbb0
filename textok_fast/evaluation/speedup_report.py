"""What a reader of ``textok-fast bench speedup`` sees: tables and plots, drawn from the result and from nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from textok_fast.evaluation.plots import Level, Series, bar_plot, line_plot
from textok_fast.evaluation.speedup import PARTS, Ratio, Row, SpeedupResult
from textok_fast.evaluation.systems import FORMS
from textok_fast.files import write_text
from textok_fast.inference.memory import format_bytes

RESULTS_NAME = "results.json"
KINDS = {
    "method": "Method, at equal engine: many tokens against few",
    "engine": "Engine, at equal method: another form against the engine",
    "both": "Both together: the reference form over many tokens against the engine over few",
}
PART_NAMES = {
    "text": "text encoder",
    "modulation": "modulation, once a run",
    "step": "denoising steps",
    "decoder": "decoder",
}
ROW_HEADS = (
    "system",
    "form",
    "tokens",
    "ms a step",
    "p25 .. p75",
    "p99",
    "CPU ms",
    "floor ms",
    "of roofline",
    "s a picture",
    "pictures/s",
    "text ms",
    "modulation ms",
    "decoder ms",
    "generator memory",
    "J a picture",
    "whole, s",
)
RATIO_HEADS = ("slow", "fast", "a step", "by round", "a picture", "by round")


def save(result: SpeedupResult, directory: str | Path) -> list[Path]:
    """Writes ``results.json``, ``results.md`` and the plots into ``directory``; returns the paths.

    A killed run leaves the former files whole. Raises OSError for a place that cannot be written.
    """
    directory = Path(directory)
    texts = {RESULTS_NAME: json.dumps(result.to_dict(), indent=1) + "\n", "results.md": markdown(result)}
    texts |= {f"{name}.svg": svg + "\n" for name, svg in plots(result).items()}
    for name, text in texts.items():
        write_text(directory / name, text)
    return [directory / name for name in texts]


# -- tables ------------------------------------------------------------------------------------------------------------------


def markdown(result: SpeedupResult) -> str:
    """The whole report, with the plots beside it linked."""
    config = result.config
    lines = ["# Pictures of 512 px over few and over many tokens" if config.size != "tiny" else "# A trial of the benchmark"]
    lines += ["", *(f"- {note}" for note in notes(result))]
    for precision, batch in dict.fromkeys((row.precision, row.batch) for row in result.rows):
        rows = [row for row in result.rows if (row.precision, row.batch) == (precision, batch)]
        lines += ["", f"## {precision}, batch {batch}", "", *_table(ROW_HEADS, [row_cells(row) for row in rows], 2)]
        ratios = [ratio for ratio in result.ratios if (ratio.precision, ratio.batch) == (precision, batch)]
        for kind, title in KINDS.items():
            here = [ratio_cells(ratio) for ratio in ratios if ratio.kind == kind]
            if here:
                lines += ["", f"### {title}", "", *_table(RATIO_HEADS, here, 2)]
    if result.skipped:
        cells = [[s.system, s.form, s.precision, str(s.batch), s.reason] for s in result.skipped]
        lines += ["", "## Not measured", "", *_table(("system", "form", "precision", "batch", "why"), cells, 5)]
    lines += ["", *(f"![{name}]({name}.svg)" for name in plots(result))]
    return "\n".join(lines) + "\n"


def console(result: SpeedupResult) -> str:
    """The ratios and the seconds a step, as plain lines."""
    lines = []
    for row in result.rows:
        share = f", {100 * row.floor_share:.0f} % of the roofline" if row.floor_share is not None else ""
        step = f"{figures(1000 * row.parts['step'].p50)} ms a step{share}"
        picture = f"{figures(row.batch_s / row.batch)} s a picture"
        lines.append(f"{row.precision} batch {row.batch}: {row.system}, {row.form}: {step}, {picture}")
    for ratio in result.ratios:
        lines.append(
            f"{ratio.precision} batch {ratio.batch}, {ratio.kind}: {' '.join(ratio.slow)} / {' '.join(ratio.fast)}: "
            f"{figures(ratio.step)}x a step, {figures(ratio.image)}x a picture"
        )
    lines += [f"not measured: {s.system}, {s.form}, {s.precision}, batch {s.batch}: {s.reason}" for s in result.skipped]
    return "\n".join(lines)


def row_cells(row: Row) -> list[str]:
    """A row as text under :data:`ROW_HEADS`; what was not measured is empty."""

    def part(name: str) -> str:
        return figures(1000 * row.parts[name].p50) if name in row.parts else ""

    step, scaled = row.parts["step"], "" if row.steps_timed == row.steps else f" (from {row.steps_timed} of {row.steps})"
    return [
        row.system,
        row.form,
        f"{row.tokens:,}",
        figures(1000 * step.p50),
        f"{figures(1000 * step.p25)} .. {figures(1000 * step.p75)}",
        figures(1000 * step.p99),
        figures(1000 * step.processor),
        "" if row.floor_s is None else f"{figures(1000 * row.floor_s)} ({row.floor_by})",
        "" if row.floor_share is None else f"{100 * row.floor_share:.0f} %",
        figures(row.batch_s / row.batch) + scaled,
        figures(row.images_per_s),
        part("text"),
        part("modulation"),
        part("decoder") + ("" if row.decoder_precision == row.precision else f" ({row.decoder_precision})"),
        "" if row.memory_bytes is None else format_bytes(row.memory_bytes),
        "" if row.joules_per_image is None else figures(row.joules_per_image),
        "" if row.full is None else figures(row.full.p50 / row.batch),
    ]


def ratio_cells(ratio: Ratio) -> list[str]:
    """A ratio as text under :data:`RATIO_HEADS`."""

    def spread(pair: tuple[float, float]) -> str:
        return f"{figures(pair[0])} .. {figures(pair[1])}"

    step, image = (f"{figures(ratio.step)}x", spread(ratio.step_range)), (f"{figures(ratio.image)}x", spread(ratio.image_range))
    return [", ".join(ratio.slow), ", ".join(ratio.fast), *step, *image]


def notes(result: SpeedupResult) -> list[str]:
    """What one must know to read the tables."""
    machine, config = result.machine, result.config
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"])
    on = gpus if result.device.startswith("cuda") and gpus else f"{result.threads} thread(s)"
    found = [
        f"Machine: {machine['cpu']}, {machine['cores']} cores{', ' + gpus if gpus else ''}; run on {result.device}, {on}; "
        f"torch {machine['torch']}, Python {machine['python']}, commit {machine['git_commit'] or 'unknown'}.",
        f"Sampler {config.sampler}, {config.steps} steps, classifier-free guidance of scale {config.scale:g} on all of them; "
        "random weights, the same in every form.",
        "A picture is the text encoder (TexTok only: its decoder reads a caption), the modulation that the engine computes "
        "ahead, all steps, and the decoder. Unless the run was timed as a whole its steps are scaled from those that were "
        "timed, as the row says.",
        "Generator memory is its weights and one step's, without decoder and text encoder; energy that of the loop.",
        *(f"{form}: {FORMS[form]}; {how}." for form, how in _hows(result.rows).items()),
        "Rounds alternate over all systems and forms of one precision and batch. A ratio is the median of the single rounds' "
        "ratios, beside it the lowest and the highest of them.",
        "The floor of a step is the longer of its counted FLOPs at the fastest matrix product measured here and its bytes "
        "(weights of the token path once, modulation rows) at the read rate measured here, whatever a form really reads.",
        *(
            f"Ceiling {c.dtype}: {figures(c.matmul_flops / 1e9)} GFLOP/s ({' x '.join(map(str, c.matmul_shape))}), "
            f"{figures(c.read_bytes / 1e9)} GB/s read, {figures(c.copy_bytes / 1e9)} GB/s copy."
            for c in result.ceilings
        ),
        f"Published for comparison: {result.published['speedup']}x, {result.published['claim']}, on the authors' hardware.",
        f"{result.date}, {result.duration_s:.0f} s: `{result.command}`",
    ]
    return found if result.complete else [*found, "This run was interrupted: it holds the rounds that were finished."]


def _hows(rows: Sequence[Row]) -> dict[str, str]:
    """form -> how it ran; of several ways all."""
    return {form: " / ".join(dict.fromkeys(row.how for row in rows if row.form == form)) for form in {r.form: 0 for r in rows}}


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> list[str]:
    """The first ``words`` columns hold words, the others numbers; columns that are empty in all rows are left out."""
    keep = [column for column in range(len(heads)) if any(row[column] for row in rows)]
    lines = ["| " + " | ".join(heads[column] for column in keep) + " |"]
    lines.append("|" + "".join("---|" if column < words else "---:|" for column in keep))
    return lines + ["| " + " | ".join(row[column].replace("|", "/") for column in keep) + " |" for row in rows]


def figures(value: float) -> str:
    """Three significant figures, never in exponent form above 1e-4."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# -- plots -------------------------------------------------------------------------------------------------------------------


def plots(result: SpeedupResult) -> dict[str, str]:
    """name -> SVG: "speedup" (over tokens), "latency" (over the batch), "parts" (of a picture). None for an empty result."""
    if not result.rows:
        return {}
    return {"speedup": speedup_svg(result), "latency": latency_svg(result), "parts": parts_svg(result)}


def speedup_svg(result: SpeedupResult) -> str:
    """How many times as long a step takes as over the fewest tokens, in the same form and precision, at the smallest batch."""
    batch = min(row.batch for row in result.rows)
    rows = [row for row in result.rows if row.batch == batch]
    fewest, series = min(row.tokens for row in rows), []
    for form, precision in dict.fromkeys((row.form, row.precision) for row in rows):
        ratios = [
            r for r in result.ratios if r.kind == "method" and (r.precision, r.batch, r.slow[1]) == (precision, batch, form)
        ]
        if ratios:
            points = [(float(fewest), 1.0), *((float(r.tokens), r.step) for r in sorted(ratios, key=lambda r: r.tokens))]
            last = len(points) - 1
            labels = [f"{figures(y)}x" if index == last else "" for index, (_, y) in enumerate(points)]
            series.append(Series(f"{form}, {precision}", points, labels, markers=True))
    return line_plot(
        f"A denoising step over N / {fewest} tokens, batch {batch} ({_where(result)})",
        "transformer tokens N",
        f"times the step over {fewest}",
        series,
        [Level(float(result.published["speedup"]), f"published: {result.published['speedup']}x a picture")],
        log=True,
        x_ticks=[float(row.tokens) for row in rows],
        standalone=True,
    )


def latency_svg(result: SpeedupResult) -> str:
    """Seconds for a batch of pictures over its size, of every system in its fastest form and the first precision."""
    precision = result.rows[0].precision
    rows = [row for row in result.rows if row.precision == precision]
    form = next(form for form in ("engine", "compile", "reference") if any(row.form == form for row in rows))
    rows = [row for row in rows if row.form == form]
    series = [
        Series(system, [(float(row.batch), row.batch_s) for row in rows if row.system == system], markers=True)
        for system in dict.fromkeys(row.system for row in rows)
    ]
    ticks = [float(row.batch) for row in rows]
    title = f"Latency of a batch, {form}, {precision} ({_where(result)})"
    return line_plot(title, "pictures in a batch", "seconds", series, log=True, x_ticks=ticks, standalone=True)


def parts_svg(result: SpeedupResult) -> str:
    """Where the time of a picture goes, at the first precision and smallest batch."""
    precision, batch = result.rows[0].precision, min(row.batch for row in result.rows)
    rows = [row for row in result.rows if (row.precision, row.batch) == (precision, batch)]

    def seconds(row: Row, part: str) -> float:
        return row.parts[part].p50 * (row.steps if part == "step" else 1) if part in row.parts else 0.0

    names = [f"{row.system}, {row.form}" for row in rows]
    parts = [(PART_NAMES[part], [seconds(row, part) for row in rows]) for part in PARTS]
    title = f"Where the time of a picture goes, {precision}, batch {batch} ({_where(result)})"
    return bar_plot(title, "share of the time", names, [part for part in parts if any(part[1])], standalone=True)


def _where(result: SpeedupResult) -> str:
    gpus: list[dict[str, Any]] = result.machine["gpus"]
    return str(gpus[0]["name"]) if result.device.startswith("cuda") and gpus else f"CPU, {result.threads} thread(s)"
