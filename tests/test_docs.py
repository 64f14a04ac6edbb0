"""The examples of README.md and docs/ run as they stand, on small models; their commands are understood."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from soft_weights import soft_weights

from textok_fast import DiT, DiTConfig, TexTok, config, inference, interop
from textok_fast.cli import _parse, main
from textok_fast.diffusion import SAMPLERS
from textok_fast.evaluation.metrics import psnr
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


def test_the_first_example_of_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = run(read("README.md").split("\n## ", 1)[0])
    assert names["tokens"].mode().shape == (1, 8, 8)
    assert names["again"].shape == names["blind"].shape == names["other"].shape == names["made"].shape == (1, 64, 64, 3)
    assert not torch.equal(names["again"], names["other"])  # the caption decides what is decoded
    original = np.asarray(names["image"])[None]
    with_caption, without = (psnr(original, np.asarray(names[name])) for name in ("again", "blind"))
    assert with_caption > without + 3  # dB


def test_the_example_of_the_readme(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(read("README.md", "Fast inference"))
    assert names["made"].images.shape == (1, 16, 16, 3)
    assert names["plan"].describe() in capsys.readouterr().out


@pytest.fixture
def public(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small weights in the peers' layouts, where the examples name the public ones."""
    from textok_fast.interop import dit

    monkeypatch.setattr(dit, "PUBLISHED_HEADS", {32: 4, 48: 4})

    def put(name: str, golden: str) -> None:
        stored = load_file(ROOT / "tests" / "golden" / f"{golden}.safetensors")
        state = {key.removeprefix("weights."): value for key, value in stored.items() if key.startswith("weights.")}
        target = work / name
        if target.suffix == ".pt":
            torch.save({"ema": state}, target)
            return
        target.mkdir(parents=True)
        save_file(state, target / "model.safetensors")

    shutil.copytree(work / "runs/demo/generator/final/tokenizer", work / "runs/demo/with_text/final")
    put("DiT-XL-2-512x512.pt", "dit_2d")
    put("yucornetto/tokenizer_titok_bl64_vq8k_imagenet", "titok_vq")
    put("turkeyju/tokenizer_tatitok_bl32_vae", "tatitok_vae")
    put("SoftVQVAE/sit-xl_softvq-l-32-512", "sit_1d")
    put("SoftVQVAE/dit-xl_softvq-l-64", "dit_1d")
    put("MAETok/sit-xl_maetok-b-128-512", "sit_1d")
    released = {"rope": True, "decoder_class_token": False, "movq": True}  # as MAETok is
    for name, soft, form in (
        ("SoftVQVAE/softvq-l-32-512", True, {}),
        ("SoftVQVAE/softvq-l-64", True, {}),
        ("MAETok/maetok-b-512", False, released),
    ):
        (work / name).mkdir(parents=True)
        save_file(soft_weights(soft, tokens=8, channels=6, **form), work / name / "model.safetensors")
        (work / name / "config.json").write_text('{"config": {"vq_mean": 0.25, "vq_std": 0.5, "tau": 0.07}}')
    diffusers = pytest.importorskip("diffusers")
    layers: dict[str, Any] = {"block_out_channels": (4,) * 4, "layers_per_block": 1, "norm_num_groups": 2, "sample_size": 256}
    layers |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    hub = work / "facebook" / "DiT-XL-2-512"
    for directory in (work / "stabilityai" / "sd-vae-ft-ema", hub / "vae"):
        diffusers.AutoencoderKL(**layers, latent_channels=4).save_pretrained(directory)
    (hub / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    made = {"sample_size": 8, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "in_channels": 4}
    made |= {"out_channels": 8, "norm_type": "ada_norm_zero", "num_embeds_ada_norm": 1000, "patch_size": 2}
    model = diffusers.DiTTransformer2DModel(**made, norm_elementwise_affine=False)
    model.save_pretrained(hub / "transformer")
    return work


def small(line: str) -> list[list[str]]:
    """The commands of a line without their first word, on what the small models and this machine have."""
    line = re.sub(r"--steps \d+", "", line.replace("--label 207", "--label 7").replace("--precision auto", ""))
    line = line.replace("textok-fast sample", "textok-fast sample --steps 2")
    return [shlex.split(command, comments=True)[1:] for command in line.split(" && ")]


def test_examples_of_weights(public: Path) -> None:
    lines = blocks(read("docs/weights.md"), "bash")[0].splitlines()
    for line in lines:
        for command in small(line):
            assert main(command) == 0, line
    assert "diffusers' own DiTTransformer2DModel" in (public / "weights-hub" / "weights.md").read_text()
    text = read("docs/weights.md").replace("pipe(207,", "pipe(7,").replace("steps=50", "steps=2")
    names = run(text)
    assert names["made"].images.shape == (1, 64, 64, 3) and names["made"].tokens.shape == (1, 4, 8, 8)
    assert names["pixels"].shape == (1, 3, 64, 64)
    assert names["pictures"][0].size == (16, 16) and names["restored"][0].size == (16, 16)


def test_every_public_weight_in_the_readme_is_one_line(public: Path) -> None:
    text = read("README.md", "Bring your own weights")
    rows = re.findall(r"^\| (.*?) \| .*? \| `(textok-fast convert .*?)` \|$", text, flags=re.MULTILINE)
    assert set(re.findall(r"`([\w-]+)`", "".join(kinds for kinds, _ in rows))) == set(interop.KINDS)
    wrappers = {"titok": interop.TiTok, "tatitok": interop.TiTok, "softvq": interop.ContinuousTokenizer}
    for kinds, line in rows:
        convert, then = small(line)
        assert main(convert) == 0 and main(then) == 0, line
        out = Path(convert[convert.index("--out") + 1])
        if "--tokenizer" not in convert and (wrapper := wrappers.get(kinds.strip("`"))) is not None:
            assert isinstance(interop.load(None, out), wrapper), line
        if {"softvq", "maetok"} & set(re.findall(r"`([\w-]+)`", kinds)) and "--tokenizer" in convert:
            assert isinstance(interop.load(None, out / "tokenizer"), interop.ContinuousTokenizer), line
    for line in blocks(text, "bash")[0].splitlines():
        assert main(small(line.replace("image_size=512", "image_size=64"))[0]) == 0, line


DOCUMENTS = [
    "README.md",
    *(f"docs/{name}.md" for name in ("data", "engine", "evaluation", "export", "operations", "serving", "training", "weights")),
]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_parse(name: str) -> None:
    lines = [line for block in blocks(read(name), "bash") for line in block.splitlines() if line.startswith("textok-fast ")]
    commands = [shlex.split(line, comments=True)[1:] for line in lines]
    if name in ("README.md", "docs/engine.md"):
        assert len(commands) >= 5
    for command in commands:
        assert callable(_parse(command).handler)


def test_examples_of_data(work: Path) -> None:
    shutil.copytree(work / "runs/demo/generator/final/tokenizer", work / "runs/demo/with_text/final")
    lines = blocks(read("docs/data.md"), "bash")[0].splitlines()
    for line in lines:
        short = ["run.steps=2", "run.batch_size=4", "run.tensorboard=false"] if "-fast train" in line else []
        command = shlex.split(line, comments=True)[1:] + short
        assert main(command) == 0, line
    assert json.loads((work / "shards/index.json").read_text())["pictures"] == 3
    assert json.loads((work / "tokens/index.json").read_text())["count"] == 3
    assert (work / "runs/shards/final/config.json").exists()


def test_the_sources_of_data_are_all_there() -> None:
    text = read("docs/data.md").split("\n\n```bash")[0]
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \| ", text, flags=re.MULTILINE)))) - {"source"}
    assert named == set(get_args(get_type_hints(config.DataConfig)["source"]))


def test_the_recipe_of_evaluation(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchmetrics")
    for name in ("with_text", "no_text"):
        shutil.copytree(work / "runs/demo/generator/final/tokenizer", work / "runs/demo" / name / "final")
    for line in blocks(read("docs/evaluation.md"), "bash")[0].splitlines():
        line = line.replace("source=emoji", "source=shapes held_out_objects=4").replace("objects=128", "objects=8")
        line = re.sub(r"image_size=\d+", "image_size=16", re.sub(r"--count \d+", "--count 6", line))
        assert main([*shlex.split(line)[1:], *(["--steps", "2"] if "generation" in line else [])]) == 0, line
    out = capsys.readouterr().out
    assert "| PSNR, dB |" in out and "Fréchet distance over the pixels" in out and "| recall over the pixels" in out
    for name in ("with_text/reconstruction", "no_text/reconstruction", "null/reconstruction", "generator/generation"):
        assert all((work / "evaluation" / f"{name}{suffix}").is_file() for suffix in (".json", ".md", ".png"))


def test_the_recipe_of_export(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    for line in blocks(read("docs/export.md"), "bash")[0].splitlines():
        assert main(shlex.split(line)[1:]) == 0, line
    out = capsys.readouterr().out
    assert "Parity of the ONNX export in int8" in out and "| sampler | 1 | PyTorch fp32 |" in out
    # The text encoder of this test is not one of transformers', so it was not exported: the pipeline loads it.
    names = run(read("docs/export.md"))
    assert names["made"].images.shape == (1, 16, 16, 3)


def test_the_tables_of_export_are_complete() -> None:
    pytest.importorskip("onnxscript")
    from textok_fast.export.artifacts import PRECISIONS
    from textok_fast.export.quantize import METHODS

    text = read("docs/export.md")
    assert sorted(table(read("docs/export.md", "Precisions"))) == sorted([*PRECISIONS, *METHODS])
    assert set(re.findall(r"^\| `(\w+).onnx` \|", text, flags=re.MULTILINE)) == {
        "encoder", "decoder", "modulation", "step", "forward", "sampler", "text",
    }  # fmt: skip


def test_every_recipe_is_in_its_table() -> None:
    rows = re.findall(r"^\| (`[\w-]+`.*?) \| (x?) ?\| (x?) ?\|", read("docs/training.md", "Recipes"), flags=re.MULTILINE)
    told: dict[str, tuple[bool, ...]] = {}
    for names, *sections in rows:
        first, *more = re.findall(r"`([\w-]+)`", names)
        for name in (first, *(re.sub(r"-32-", f"-{tokens}-", first) for tokens in more)):
            told[name] = tuple(bool(section) for section in sections)
    kinds = {name: config.recipe_sections(name) for name in config.recipe_names()}
    assert told == {name: ("tokenizer" in found, "generator" in found) for name, found in kinds.items()}


def test_tables_are_complete() -> None:
    text = read("docs/engine.md")
    assert table(read("docs/engine.md", "The plan")) == [field.name for field in dataclasses.fields(Plan)]
    assert table(read("docs/engine.md", "Samplers")) == list(SAMPLERS)
    for title, target in re.findall(r"\[([^]]+)\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or (ROOT / "docs" / target).exists(), title


def test_the_table_of_losses_is_complete() -> None:
    """With the defaults that are so."""
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", read("docs/training.md", "Losses"), flags=re.MULTILINE))
    defaults = {field.name: field.default for field in dataclasses.fields(config.LossConfig)}
    assert rows.keys() == defaults.keys() | {"kind", "stylegan", "patchgan", "frozen"}
    for name, default in defaults.items():
        said = float(rows[name]) if isinstance(default, float) else rows[name]
        assert said == (default if isinstance(default, float) else ("none" if default == "" else str(default).lower())), name


DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "tests/golden/*/*.md", "textok_fast/pretrained/*/*.md")
    for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    """Files that a document links to exist, and headings in them too."""
    links = re.findall(r"\]\(([^()\s]*)\)", re.sub(r"```.*?```|`[^`\n]*`", "", read(document), flags=re.DOTALL))
    for link in links:
        place, _, heading = link.partition("#")
        if re.match(r"[a-z]+:", place):  # elsewhere
            continue
        target = (ROOT / document).parent / place if place else ROOT / document
        assert target.exists(), f"{document} links to {link}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in slugs, f"{document} links to {link}"
