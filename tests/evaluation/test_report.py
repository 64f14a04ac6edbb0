"""The report is one file that loads nothing, shows every picture and says what was measured."""

from __future__ import annotations

import base64
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from textok_fast.errors import InputError
from textok_fast.evaluation import DemoResults, StepTimesConfig, StepTimesResult, render_report, write_report
from textok_fast.evaluation.plots import Level, Series, line_plot
from textok_fast.evaluation.provenance import machine_info
from textok_fast.evaluation.roofline import Ceilings
from textok_fast.evaluation.step_times import Spread, StepTimesRatio, StepTimesRow
from textok_fast.pictures import image_grid


def pictures(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def spread(value: float) -> Spread:
    return Spread(value, value, value, value, value)


def speedup_result() -> StepTimesResult:
    rows = [
        StepTimesRow(n, name, "fp32", 1, 1, 10, 3, 3, spread(s), spread(s), [s] * 3, [s] * 3, 10**9, 1e9, 0.5, 40, 40.0, 0.1)
        for n, name, s in ((32, "TexTok-32 + DiT-S", 0.01), (4096, "DiT-S/1 at 512 px", 1.23))
    ]
    ratio = StepTimesRatio(
        "fp32", 1, 4096, 32, rows[1].network, rows[0].network, 123.0, spread(123.0), 122.0, spread(122.0), 200.0
    )
    ceiling = Ceilings("cpu", "fp32", 1, 2e9, (8, 8, 8), 1e9, 1e9)
    config = StepTimesConfig(size="S", tokens=(32, 4096), dtypes=("fp32",))
    return StepTimesResult(config, rows, [ratio], [ceiling], machine_info(), "cpu", 1, "bench", "2026-01-01", 3.0)


@pytest.fixture
def results() -> DemoResults:
    sets = {
        split: {kind: pictures(3, seed) for seed, kind in enumerate(("original", "no_text", "with_text", "shuffled"), start)}
        for start, split in ((0, "compositions"), (10, "objects"))
    }
    conditions = {"with_text": (18.41, 0.7), "no_text": (13.74, 0.41), "shuffled": (11.2, 0.3), "null": (12.0, 0.35)}
    measured = {name: {"psnr": psnr, "ssim": ssim, "images": 3} for name, (psnr, ssim) in conditions.items()}
    return DemoResults(
        command="textok-fast demo --seed 7",
        date="2026-11-22T10:00:00+00:00",
        machine=machine_info(),
        data={"source": "Noto Color Emoji", "licence": "SIL Open Font License 1.1"},
        settings={"tokens": 4, "steps": 1200},
        pictures=sets,
        captions={split: ["a red <apple> & a pear", "two boats", 'a "cat"'] for split in sets},
        shuffled_captions={split: ["two boats", 'a "cat"', "a red <apple> & a pear"] for split in sets},
        metrics=dict.fromkeys(sets, measured),
        losses={"with text": [(20, 0.5), (40, 0.2)], "no text": [(20, 0.6), (40, 0.3)]},
        generator_losses={"DiT": [(20, 1.5), (40, float("nan")), (60, 1.1)]},
        samples=pictures(2, 20),
        sample_captions=["a star", "a tree"],
        onnx=[{"model": "decoder", "max_abs_difference": 2.5e-6, "tolerance": 1e-4, "passed": True}],
        speedup=speedup_result().to_dict(),
        durations={"pictures": 3.0, "tokenizer": 250.0},
        notes=["Drawn shapes stood in."],
    )


class _Page(HTMLParser):
    """Collects what a browser would load, and checks that tags are closed in order."""

    VOID = ("meta", "img")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.sources += [
            value or "" for name, value in attrs if name in ("src", "srcset", "href", "data", "xlink:href", "action")
        ]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_loads_nothing_and_embeds_every_picture(results: DemoResults) -> None:
    page = render_report(results)
    parsed = _Page(page)
    assert parsed.open == []
    assert not {"script", "link", "iframe", "object", "embed"} & set(parsed.tags)
    assert all(source.startswith("data:image/png;base64,") for source in parsed.sources)
    assert "@import" not in page
    assert "url(" not in page
    found = [np.array(Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1])))) for source in parsed.sources]
    wanted = [picture for kinds in results.pictures.values() for images in kinds.values() for picture in images]
    assert results.samples is not None
    wanted += list(results.samples)
    assert sorted(picture.tobytes() for picture in found) == sorted(picture.tobytes() for picture in wanted)


def test_the_page_says_what_was_measured(results: DemoResults) -> None:
    page = render_report(results)
    for text in (
        "18.4 dB", "13.7 dB", "123 times as long", "93.5x", "4,096", "DiT-S/1 at 512 px", "textok-fast demo --seed 7",
        "SIL Open Font License 1.1", "Drawn shapes stood in.", "a red &lt;apple&gt; &amp; a pear", "held-out objects",
        "11.2 dB", "captions shuffled", "null caption", "0.700", "2.5e-06", "4 min 13 s", torch.__version__,
    ):  # fmt: skip
        assert text in page, text
    assert "<apple>" not in page


def test_plots_in_the_page_are_well_formed(results: DemoResults) -> None:
    plots = re.findall(r"<svg.*?</svg>", render_report(results), re.DOTALL)
    assert len(plots) == 3
    for plot in plots:
        ElementTree.fromstring(plot)
        assert "nan" not in plot


def test_parts_that_did_not_run_are_named() -> None:
    page = render_report(DemoResults(command="textok-fast demo", date="2026-01-01", machine={}))
    _Page(page)
    assert page.count("was not part of this run") == 6


def test_the_file_replaces_the_former_one(results: DemoResults, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    assert write_report(path, results) == path
    assert path.read_text(encoding="utf-8") == render_report(results)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(OSError, match="report.html"):
        write_report(path / "inside" / "report.html", results)


def test_results_without_pictures_are_json(results: DemoResults) -> None:
    values = json.loads(json.dumps(results.to_dict()))
    assert values["metrics"]["objects"]["null"]["psnr"] == 12.0
    assert "pictures" not in values


def test_captions_and_pictures_must_agree(results: DemoResults) -> None:
    results.captions["objects"] = ["only one"]
    with pytest.raises(InputError, match="objects"):
        render_report(results)
    results.captions = {}
    results.pictures["objects"]["original"] = np.zeros((3, 16, 16), dtype=np.uint8)
    with pytest.raises(InputError, match="objects original"):
        render_report(results)


def test_image_grid_places_every_picture() -> None:
    images = pictures(5, 0)
    grid = np.array(image_grid(images, columns=3))
    assert grid.shape == (2 * 20 + 4, 3 * 20 + 4, 3)
    for index, picture in enumerate(images):
        y, x = 4 + index // 3 * 20, 4 + index % 3 * 20
        assert (grid[y : y + 16, x : x + 16] == picture).all()
    as_float = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert (np.array(image_grid(as_float, columns=3)) == grid).all()


def test_image_grid_writes_captions_below() -> None:
    white = np.full((2, 48, 48, 3), 255, dtype=np.uint8)
    captions = ["a very long caption that needs more than three lines of this narrow picture", "b"]
    grid = np.array(image_grid(white, columns=2, captions=captions))
    assert grid.shape[0] > 48 + 3 * 11
    assert (grid[:52] == 255).all()  # the pictures themselves are not written on
    assert (grid[54:, :52] < 128).any()
    assert (grid[54:, 56:] < 128).any()
    with pytest.raises(InputError, match="captions"):
        image_grid(white, columns=2, captions=["one"])
    with pytest.raises(InputError, match="columns"):
        image_grid(white, columns=0)
    with pytest.raises(InputError, match="images"):
        image_grid(np.zeros((0, 8, 8, 3), dtype=np.uint8), columns=1)


def test_a_plot_maps_values_to_places() -> None:
    svg = line_plot(
        "t <&>", "x", "y", [Series("a", [(10, 1), (100, 10), (1000, 100)], markers=True)], [Level(10, "ten")], log=True
    )
    root = ElementTree.fromstring(svg)
    circles = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in root.iter() if c.tag.endswith("circle")]
    (x0, y0), (x1, y1), (x2, y2) = circles
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)  # equal factors, equal distances
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y0 > y2
    level = next(e.get("d", "") for e in root.iter() if e.get("stroke-dasharray") == "6 4")
    assert float(level.split()[1].split("H")[0]) == pytest.approx(y1, abs=0.2)


@pytest.mark.parametrize("points", [[], [(1.0, 2.0)], [(0.0, 0.0), (1.0, 0.0)], [(1.0, float("nan")), (2.0, float("inf"))]])
@pytest.mark.parametrize("log", [False, True])
def test_a_plot_of_little_or_odd_data(points: list[tuple[float, float]], log: bool) -> None:
    ElementTree.fromstring(line_plot("t", "x", "y", [Series("a", points)], log=log))
