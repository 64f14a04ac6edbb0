"""The demo's report: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from textok_fast.errors import InputError
from textok_fast.evaluation.mini import MINI, ROWS, Demonstration
from textok_fast.evaluation.plots import Series, line_plot
from textok_fast.evaluation.step_times import HEADINGS, StepTimesResult, step_times_svg, table_cells
from textok_fast.files import write_text
from textok_fast.pictures import as_uint8

# Keys of DemoResults.pictures and .metrics, in the order of the page, with their names.
PICTURES = {"original": "original", "no_text": "no text", "with_text": "with text", "shuffled": "shuffled captions"}
CONDITIONS = {
    "with_text": "with text",
    "no_text": "no text (trained without)",
    "shuffled": "with text, captions shuffled",
    "null": "with text, null caption",
}
SPLITS = {"compositions": "held-out compositions", "objects": "held-out objects"}
SPLIT_NOTES = {
    "compositions": "Scenes that training never saw, of objects that it did see.",
    "objects": "Scenes of objects that training never saw: their names are new to it as well.",
}

# Columns of the benchmark's table that the page renames, or leaves out ("").
SPEEDUP_COLUMNS = {
    "batch": "",
    "CPU ms": "",
    "weights GB/s": "",
    "CPU x": "",
    "x slower (by round)": "times as long (by round)",
}


@dataclass
class DemoResults:
    """What the demo found. Everything but the pictures is JSON-ready; a part that was not run stays empty and the page says so.

    Splits are the keys of :data:`SPLITS`, pictures of :data:`PICTURES`, conditions of :data:`CONDITIONS`.
    """

    command: str  # what to type to repeat it
    date: str  # ISO 8601
    machine: dict[str, Any]  # machine_info()
    data: dict[str, str] = field(default_factory=dict)  # "source", "licence", and "note" where there is something to say
    settings: dict[str, Any] = field(default_factory=dict)  # name -> value, shown as they are: pixels, tokens, steps, ...
    pictures: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # split -> picture -> (B, H, W, 3) uint8
    captions: dict[str, list[str]] = field(default_factory=dict)  # split -> B captions
    shuffled_captions: dict[str, list[str]] = field(default_factory=dict)  # split -> the B captions given instead
    metrics: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # split -> condition -> psnr, ssim, images
    losses: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # "tokenizer, with text" -> [(step, loss)]
    generator_losses: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # "DiT" -> [(step, loss)]
    samples: np.ndarray | None = None  # (B, H, W, 3) uint8
    sample_captions: list[str] = field(default_factory=list)
    mini: Demonstration | None = None  # what the weights in the box do
    onnx: list[dict[str, Any]] = field(default_factory=list)  # a row a runtime: "runtime", "passed", "reason", errors
    speedup: dict[str, Any] = field(default_factory=dict)  # StepTimesResult.to_dict()
    durations: dict[str, float] = field(default_factory=dict)  # part -> seconds
    notes: list[str] = field(default_factory=list)  # what a reader must know, such as a stand-in for the pictures

    def to_dict(self) -> dict[str, Any]:
        """All but the pictures, JSON-ready."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if name not in ("pictures", "samples", "mini")}


def write_report(path: str | Path, results: DemoResults) -> Path:
    """Writes the page (atomically) and returns its path. Raises :class:`InputError` for pictures of another form than
    :class:`DemoResults` says, OSError for a place that cannot be written."""
    path = Path(path)
    write_text(path, render_report(results))
    return path


def render_report(results: DemoResults) -> str:
    """The page as HTML: styles, plots and pictures are in it, nothing is loaded from elsewhere."""
    sections = [
        *([] if results.mini is None else [_section("Weights in the box", _mini(results.mini))]),
        _section("Reconstructions", _pictures(results)),
        _section("Reconstruction quality", _quality(results)),
        _section("Training", _losses(results)),
        _section("Generated from captions", _samples(results)),
        _section("One denoising step: few tokens against many", _speedup(results)),
        _section("Export: a row for each runtime", _onnx(results)),
        _section("How this was made", _provenance(results)),
    ]
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in results.notes)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>textok-fast demo</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>textok-fast demo</h1>\n{_headline(results)}\n{notes}</header>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


# -- parts of the page ----------------------------------------------------------------------------------------------------


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>"


def _headline(results: DemoResults) -> str:
    sentences = []
    seen = results.metrics.get("compositions", {})
    if "with_text" in seen and "no_text" in seen:
        with_text, no_text = seen["with_text"]["psnr"], seen["no_text"]["psnr"]
        tokens = results.settings.get("tokens")
        through = f" through {tokens} tokens" if tokens else ""
        sentence = (
            f"On held-out scenes the tokenizer that reads captions reaches <b>{_db(with_text)}</b> PSNR{through}, "
            f"the same tokenizer trained without text <b>{_db(no_text)}</b>"
        )
        if "shuffled" in seen:
            sentence += f", and with the wrong captions {_db(seen['shuffled']['psnr'])}"
        sentences.append(sentence + ".")
    if results.speedup:
        result = StepTimesResult.from_dict(results.speedup)
        if result.ratios:
            ratio = max(result.ratios, key=lambda r: r.tokens)  # of several dtypes the first, not the most flattering
            sentences.append(
                f"One denoising step of DiT-{escape(result.config.size)} takes <b>{_times(ratio.wall)} times as long</b> over "
                f"{ratio.tokens:,} tokens as over {ratio.base_tokens:,} ({ratio.dtype}, batch {ratio.batch}, "
                f"{_where(result)}; the paper publishes {result.published['speedup']}x for whole images at XL)."
            )
    return f'<p class="lead">{" ".join(sentences) or "Nothing was measured."}</p>'


def _mini(made: Demonstration) -> str:
    cards = []
    for index, (caption, edited) in enumerate(zip(made.captions, made.edited, strict=True)):
        cells = "".join(
            f"<div>{_img(made.pictures[name][index], f'{title}: {caption}')}<span>{escape(title)}</span></div>"
            for name, title in ROWS.items()
        )
        below = f"<figcaption>{escape(caption)}<small>edited: {escape(edited)}</small></figcaption>"
        cards.append(f'<figure class="card"><div class="strip">{cells}</div>{below}</figure>')
    return (
        f"<p>{MINI} comes with the package: what it makes of these scenes before anything is trained. Edited means that the "
        f'tokens were made with the right caption and decoded with another.</p><div class="cards">{"".join(cards)}</div>'
    )


def _pictures(results: DemoResults) -> str:
    parts = []
    for split in _ordered(results.pictures, SPLITS):
        given = results.pictures[split]
        columns = {name: as_uint8(given[name], f"{split} {name}") for name in _ordered(given, PICTURES)}
        counts = {len(pictures) for pictures in columns.values()}
        captions, wrong = results.captions.get(split, []), results.shuffled_captions.get(split, [])
        if len(counts) != 1 or len(captions) not in (0, *counts) or len(wrong) not in (0, *counts):
            sizes = {name: len(pictures) for name, pictures in columns.items()}
            raise InputError(
                f"{split}: as many captions as pictures of each kind are wanted, got {sizes}, {len(captions)} captions, "
                f"{len(wrong)} shuffled ones"
            )
        cards = []
        for index in range(counts.pop()):
            caption = captions[index] if captions else ""
            named = [(PICTURES.get(name, name), pictures[index]) for name, pictures in columns.items()]
            cells = "".join(
                f"<div>{_img(image, f'{name}: {caption}')}<span>{escape(name)}</span></div>" for name, image in named
            )
            below = f"<figcaption>{escape(caption)}"
            if wrong:
                below += f"<small>shuffled: {escape(wrong[index])}</small>"
            cards.append(f'<figure class="card"><div class="strip">{cells}</div>{below}</figcaption></figure>')
        title, note = SPLITS.get(split, split), SPLIT_NOTES.get(split, "")
        parts.append(f"<h3>{escape(title.capitalize())}</h3><p>{escape(note)}</p>")
        parts.append(f'<div class="cards">{"".join(cards)}</div>')
    return "\n".join(parts) or _not_run("Reconstructions")


def _quality(results: DemoResults) -> str:
    splits = _ordered(results.metrics, SPLITS)
    if not splits:
        return _not_run("The measurement")
    names = _ordered({name: 0 for split in splits for name in results.metrics[split]}, CONDITIONS)
    head = [""] + [f"{SPLITS.get(split, split)}: {metric}" for split in splits for metric in ("PSNR (dB)", "SSIM")]
    rows = []
    for name in names:
        cells = [CONDITIONS.get(name, name)]
        for split in splits:
            values = results.metrics[split].get(name, {})
            cells.append(f"{values['psnr']:.2f}" if "psnr" in values else "not measured")
            cells.append(f"{values['ssim']:.3f}" if "ssim" in values else "not measured")
        rows.append(cells)
    counts = {split: int(v["images"]) for split in splits for v in results.metrics[split].values() if "images" in v}
    over = "; ".join(f"{SPLITS.get(split, split)}: {count:,} pictures" for split, count in counts.items())
    return (
        _table(head, rows)
        + "<p>Higher is better. PSNR and SSIM (Gaussian window of 11 px) are computed picture by picture and averaged"
        + (f" ({escape(over)})" if over else "")
        + ". Both tokenizers saw the same batches. Shuffled captions belong to other pictures; the null caption is the trained "
        "stand-in for no caption: if the gain came from anything but what the captions say, these two rows would keep it.</p>"
    )


def _losses(results: DemoResults) -> str:
    plots = []
    for title, losses in (("Tokenizer training loss", results.losses), ("Generator training loss", results.generator_losses)):
        if losses:
            series = [Series(name, [(float(x), float(y)) for x, y in points]) for name, points in losses.items()]
            plots.append(f'<div class="plot">{line_plot(title, "step", "loss", series)}</div>')
    return f'<div class="plots">{"".join(plots)}</div>' if plots else _not_run("Training")


def _samples(results: DemoResults) -> str:
    if results.samples is None or not len(results.samples):
        return _not_run("Generation")
    pictures = as_uint8(results.samples, "samples")
    if len(results.sample_captions) not in (0, len(pictures)):
        raise InputError(f"{len(pictures)} samples need as many captions, got {len(results.sample_captions)}")
    captions = results.sample_captions or [""] * len(pictures)
    cards = "".join(
        f'<figure class="card">{_img(picture, caption)}<figcaption>{escape(caption)}</figcaption></figure>'
        for picture, caption in zip(pictures, captions, strict=True)
    )
    return f'<div class="cards narrow">{cards}</div>'


def _speedup(results: DemoResults) -> str:
    if not results.speedup:
        return _not_run("The measurement")
    result = StepTimesResult.from_dict(results.speedup)
    dtypes = " and ".join(dict.fromkeys(row.dtype for row in result.rows))
    head = [SPEEDUP_COLUMNS.get(name, name) for name in HEADINGS if SPEEDUP_COLUMNS.get(name, name)]
    keep = [column for column, name in enumerate(HEADINGS) if SPEEDUP_COLUMNS.get(name, name)]
    rows = [[cells[column] for column in keep] for cells in table_cells(result)]
    ceilings = "; ".join(
        f"{c.dtype} {c.matmul_flops / 1e9:,.0f} GFLOP/s, {c.read_bytes / 1e9:.3g} GB/s read" for c in result.ceilings
    )
    return (
        f"<p>Measured: one forward of the reference PyTorch DiT-{escape(result.config.size)} with random weights, "
        f"{escape(dtypes)}, batch {', '.join(map(str, result.config.batch))}, {_where(result)}, the token counts in turn. The "
        f"numbers on the line say how many times as long a step takes as at {min(row.tokens for row in result.rows):,} "
        "tokens (ratio of medians, wall time). The dashed line is what the paper publishes: "
        f"{result.published['speedup']}x, {escape(str(result.published['claim']))}. That compares whole systems on the paper's "
        "hardware; this compares one step of one network on this machine, so the two need not agree.</p>"
        f'<div class="plot wide">{step_times_svg(result)}</div>'
        + _table(head, rows)
        + f"<p>Peak: the fastest torch matrix product and read measured in the same run ({escape(ceilings)}).</p>"
    )


def _onnx(results: DemoResults) -> str:
    if not results.onnx:
        return _not_run("The export")
    names = list(dict.fromkeys(name for row in results.onnx for name in row))
    rows = [[_value(row.get(name)) for name in names] for row in results.onnx]
    return _table([name.replace("_", " ") for name in names], rows)


def _provenance(results: DemoResults) -> str:
    machine = dict(results.machine)
    gpus = machine.pop("gpus", None) or []
    if gpus:
        machine["GPU"] = ", ".join(str(gpu.get("name")) for gpu in gpus)
    memory = machine.pop("memory_bytes", None)
    if memory:
        machine["memory"] = f"{memory / 2**30:.1f} GiB"
    total = sum(results.durations.values())
    durations = [[name, _duration(seconds)] for name, seconds in results.durations.items()]
    parts = [f"<h3>Repeat it</h3><pre><code>{escape(results.command)}</code></pre>"]
    if results.data:
        parts.append("<h3>Pictures</h3>" + _facts(results.data))
    if durations:
        parts.append("<h3>Durations</h3>" + _table(None, [*durations, ["in all", _duration(total)]]))
    if results.settings:
        parts.append("<h3>Settings</h3>" + _facts(results.settings))
    facts = {name: value for name, value in machine.items() if value not in (None, "", [])}
    parts.append("<h3>Machine and versions</h3>" + _facts({**facts, "date": results.date}))
    return '<div class="columns">' + "".join(f"<div>{part}</div>" for part in parts) + "</div>"


def _ordered(found: Iterable[str], order: Iterable[str]) -> list[str]:
    """The keys of ``found``, those of ``order`` first and in its order."""
    keys, known = list(found), list(order)
    return [key for key in known if key in keys] + [key for key in keys if key not in known]


def _table(head: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> str:
    """The first column is text, the others numbers; without a head, names and values."""
    kind = "data" if head else "facts"
    titles = "".join(f'<th scope="col">{escape(name)}</th>' for name in head or ())
    top = f"<thead><tr>{titles}</tr></thead>" if head else ""
    body = ""
    for name, *cells in rows:
        body += f'<tr><th scope="row">{escape(name)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def _facts(values: Mapping[str, Any]) -> str:
    return _table(None, [[name.replace("_", " "), _value(value)] for name, value in values.items()])


def _not_run(what: str) -> str:
    return f"<p>{escape(what)} was not part of this run.</p>"


def _where(result: StepTimesResult) -> str:
    place = "this CPU" if result.device == "cpu" else "this GPU"
    return f"{place}, {result.threads} thread{'s' if result.threads != 1 else ''}"


def _db(value: float) -> str:
    return f"{value:.1f} dB" if math.isfinite(value) else f"{value} dB"


def _times(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}"


def _duration(seconds: float) -> str:
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s" if seconds >= 60 else f"{seconds:.1f} s"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _img(picture: np.ndarray, text: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    height, width, _ = picture.shape
    return f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{escape(text)}">'


STYLE = """
:root {
  color-scheme: light dark;
  --text: #1f2328; --soft: #59636e; --line: #d1d9e0; --ground: #ffffff; --card: #f6f8fa; --mark: #0b57d0;
}
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --soft: #9aa4af; --line: #3a424c; --ground: #0f1318; --card: #181e25; --mark: #8ab4f8; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text); }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.7rem; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .8rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .4rem 0 .9rem; max-width: 76ch; }
.lead { font-size: 1.12rem; }
.lead b { color: var(--mark); }
.note { padding: .5rem .8rem; border-left: 3px solid #d9822b; background: var(--card); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 14px; }
.cards.narrow { grid-template-columns: repeat(auto-fill, minmax(min(47%, 150px), 1fr)); }
.card { margin: 0; padding: 10px; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.card img { display: block; width: 100%; height: auto; border-radius: 4px; image-rendering: pixelated; }
.strip { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: 8px; }
.strip span { display: block; margin-top: 3px; font-size: .76rem; line-height: 1.25; color: var(--soft); text-align: center; }
figcaption { margin-top: 8px; font-size: .88rem; line-height: 1.4; overflow-wrap: anywhere; }
figcaption small { display: block; margin-top: 3px; color: var(--soft); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 18px; }
.plot svg { display: block; width: 100%; height: auto; }
.plot.wide { max-width: 660px; margin: 1rem 0; }
.scroll { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: 6px 12px 6px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
.data thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
.data td, .data thead th:not(:first-child) { text-align: right; padding-left: 12px; font-variant-numeric: tabular-nums; }
.data td { white-space: nowrap; }
tbody th { font-weight: 500; }
.data tbody th { white-space: nowrap; }
.facts { width: 100%; }
.facts th { color: var(--soft); white-space: nowrap; font-weight: 400; }
.facts td { overflow-wrap: anywhere; }
.columns { columns: 2 420px; column-gap: 40px; }
.columns > div { break-inside: avoid; }
.columns > div:first-child h3 { margin-top: 0; }
pre { margin: 0 0 1rem; padding: 10px 12px; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
code { font: .86rem ui-monospace, SFMono-Regular, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 520px) {
  main { padding: 16px 14px 40px; }
  .strip { gap: 5px; }
  .strip span { font-size: .68rem; }
  .data tbody th { white-space: normal; }
}
"""
