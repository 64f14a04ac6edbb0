"""The examples of README.md and docs/ run as they stand, on small models; their commands are understood."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from textok_fast import DiT, DiTConfig, TexTok, config, inference
from textok_fast.cli import _parse, main
from textok_fast.diffusion import SAMPLERS
from textok_fast.inference import Plan

ROOT = Path(__file__).parents[1]
TINY = {"width": 32, "heads": 2}


def read(name: str, section: str = "") -> str:
    """A document, or the section of that title."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.split(r"^## ", text.split(f"\n## {section}\n", 1)[1], flags=re.MULTILINE)[0] if section else text


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def table(text: str) -> list[str]:
    """The first cells of a table, without the quotes of code."""
    return re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, loads_fake_text: Any, make_tokenizer: Callable[..., TexTok], tmp_path: Path) -> Path:
    """A directory with a trained pipeline and pictures where the examples look for them; named sizes are small ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(type(loads_fake_text), "dim", 384)  # minilm's
    monkeypatch.setitem(config.GENERATOR_SIZES, "S", {**TINY, "depth": 12})
    monkeypatch.setitem(config.TOKENIZER_SIZES, "tiny", {**TINY, "depth": 1, "grid": 8})
    directory = tmp_path / "runs" / "demo" / "generator" / "final"
    dit = DiT(DiTConfig(**TINY, num_tokens=3, in_channels=4, depth=1, num_classes=0, text_dim=384, learn_sigma=False))
    dit.save_pretrained(directory / "generator")
    make_tokenizer(text_dim=384).save_pretrained(directory / "tokenizer")
    about = {"objective": "flow", "prediction": "velocity", "label_names": [], "captions": {}}
    (directory / "pipeline.json").write_text(json.dumps(about))
    shapes = ["source=shapes", "objects=8", "held_out_objects=4", "image_size=64"]
    assert main(["data", "make", "--count", "3", "--out", "photos", *shapes]) == 0
    return tmp_path


def run(text: str) -> dict[str, Any]:
    """Runs the Python blocks one after the other, and holds lines such as ``x.shape  # (1, 2)`` to what they say."""
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks(text, "python")):
        exec(compile(block, f"block {number}", "exec"), names)
        for expression, said in re.findall(r"^([\w.]+\.shape)  # (\(.*?\))$", block, flags=re.MULTILINE):
            assert tuple(eval(expression, names)) == eval(said), (number, expression)
    return names


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Where ``save_package`` puts engines that nobody compiled, which takes minutes and is tested in test_packages.py."""
    saved: dict[str, Any] = {}
    save, load = inspect.signature(inference.save_package), inspect.signature(inference.load_package)

    def save_package(*arguments: Any, **options: Any) -> None:
        given = save.bind(*arguments, **options).arguments
        saved[given["directory"]] = inference.Engine(given["model"], given["plan"])

    def load_package(*arguments: Any, **options: Any) -> Any:
        return saved[load.bind(*arguments, **options).arguments["directory"]]

    monkeypatch.setattr(inference, "save_package", save_package)
    monkeypatch.setattr(inference, "load_package", load_package)
    return saved


def test_examples_of_the_engine(work: Path, packages: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    names = run(read("docs/engine.md"))
    out = capsys.readouterr().out
    assert names["plan"].describe() in out and names["estimate"].describe() in out
    assert names["record"].tokens.shape == (32, 8) and names["record"].index == 2
    assert "int8, " in out
    assert set(packages) == {"packages/dit", "packages/tokenizer"} and names["pictures"].shape == (2, 64, 64, 3)


def test_the_example_of_the_readme(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(read("README.md", "Fast inference"))
    assert names["made"].images.shape == (1, 16, 16, 3)
    assert names["plan"].describe() in capsys.readouterr().out


@pytest.mark.parametrize("name", ["README.md", "docs/engine.md", "docs/operations.md"])
def test_commands_parse(name: str) -> None:
    lines = [line for block in blocks(read(name), "bash") for line in block.splitlines() if line.startswith("textok-fast ")]
    commands = [shlex.split(line, comments=True)[1:] for line in lines]
    if name != "docs/operations.md":
        assert len(commands) >= 5
    for command in commands:
        assert callable(_parse(command).handler)


def test_tables_are_complete() -> None:
    text = read("docs/engine.md")
    assert table(read("docs/engine.md", "The plan")) == [field.name for field in dataclasses.fields(Plan)]
    assert table(read("docs/engine.md", "Samplers")) == list(SAMPLERS)
    for title, target in re.findall(r"\[([^]]+)\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or (ROOT / "docs" / target).exists(), title


def test_links_inside_the_page_exist() -> None:
    text = read("docs/engine.md")
    titles = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^## (.*)$", text, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= titles
