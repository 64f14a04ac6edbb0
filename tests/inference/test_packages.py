"""textok_fast.inference.packages: what is saved compiled gives the engine's results, and is refused where it cannot run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from textok_fast.config import DiTConfig
from textok_fast.diffusion import build_process
from textok_fast.errors import InputError
from textok_fast.inference import packages
from textok_fast.inference.engine import Engine
from textok_fast.inference.generator import GeneratorEngine
from textok_fast.inference.packages import MANIFEST, load_package, machine, save_package, why_not_here
from textok_fast.inference.plan import Plan, StepCache
from textok_fast.inference.tokenizer import TokenizerEngine
from textok_fast.modeling.dit import DiT
from textok_fast.modeling.text_encoders import TextFeatures
from textok_fast.modeling.tokenizer import TexTok

PLAN = Plan(precision="fp32", device="cpu", modulation_budget=2**20)


def tiny_dit(**fields: Any) -> DiT:
    torch.manual_seed(0)
    sizes = {"width": 32, "depth": 1, "heads": 2, "mlp_ratio": 2.0, "num_tokens": 4, "in_channels": 3, "num_classes": 5}
    model = DiT(DiTConfig(**{**sizes, "text_dim": 8, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def captions(batch: int, length: int, dim: int = 8) -> TextFeatures:
    """The first without padding, the last empty."""
    mask = torch.rand(batch, length) > 0.4
    mask[0], mask[-1] = True, batch == 1
    return TextFeatures(torch.randn(batch, length, dim), mask)


# -- made and loaded -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dit_package(tmp_path_factory: pytest.TempPathFactory) -> tuple[DiT, Path]:
    model = tiny_dit()
    return model, save_package(model, tmp_path_factory.mktemp("packages") / "dit", PLAN)


@pytest.mark.slow
def test_a_generator_gives_the_models_results(dit_package: tuple[DiT, Path]) -> None:
    model, directory = dit_package
    loaded = load_package(directory)
    assert isinstance(loaded, GeneratorEngine) and loaded.plan.modulation_budget == 2**20
    assert not [path for path in directory.parent.iterdir() if path != directory]
    for batch, text in ((1, None), (1, captions(1, 1)), (2, captions(2, 16)), (5, captions(5, 7))):
        x, t = torch.randn(batch, 4, 3), torch.randint(0, 1000, (batch,))
        for y in (None, torch.randint(0, 6, (batch,))):
            with torch.no_grad():
                wanted = model(x, t, y, text)
            torch.testing.assert_close(loaded(x, t, y, text), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match=r"x must be \(B, 4, 3\)"):
        loaded(torch.zeros(1, 5, 3), torch.zeros(1))


@pytest.mark.slow
def test_a_generator_samples_as_the_engine_does(dit_package: tuple[DiT, Path]) -> None:
    model, directory = dit_package
    process = build_process("gaussian", learn_sigma=model.config.learn_sigma)
    options: dict[str, Any] = {"seeds": [3, 1, 2], "steps": 3, "guidance_scale": 2.0, "guidance_interval": (0.0, 600.0)}
    options |= {"labels": torch.tensor([0, 4, 5]), "text": captions(3, 6)}
    for sampler in ("ddpm", "unipc"):
        wanted = Engine(model, PLAN).sample(process, sampler=sampler, **options)
        torch.testing.assert_close(
            load_package(directory, "cpu").sample(process, sampler=sampler, **options), wanted, rtol=1e-3, atol=1e-3
        )


@pytest.mark.slow
def test_a_tokenizer_gives_the_models_results(make_tokenizer: Callable[..., TexTok], tmp_path: Path) -> None:
    # Text in one side only, whose captions have positions; statistics that a loaded one has to know.
    model = make_tokenizer(encoder_depth=1, decoder_depth=1, text="decoder", bottleneck="vq", text_positions=True)
    model.set_latent_statistics(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    loaded = load_package(save_package(model, tmp_path / "tokenizer", Plan(precision="bf16", device="cpu")))
    assert isinstance(loaded, TokenizerEngine) and loaded.dtype == torch.bfloat16
    loaded.model.text_encoder = model.text_encoder
    engine = Engine(model, Plan(precision="bf16", device="cpu"))
    for given in (None, ["a red cat"], ["", "two blue cats", "a"]):
        batch = 2 if given is None else len(given)
        pictures = torch.randint(0, 256, (batch, 16, 16, 3), dtype=torch.uint8)
        tokens, wanted = loaded.encode(pictures, given), model.encode(pictures, given)
        assert tokens.indices is not None and wanted.indices is not None
        assert (tokens.indices == wanted.indices).float().mean() > 0.8  # bfloat16 may choose the next code
        floats = pictures.permute(0, 3, 1, 2) / 127.5 - 1
        assert torch.equal(loaded.encode(floats, given), tokens)
        for decoded in (loaded.decode(wanted, given), loaded.decode(wanted.indices, given)):
            reference = model.decode(wanted, given)
            error = (decoded.float() - reference).norm() / reference.norm()
            assert error < 0.02, error
        levels = loaded.decode(wanted, given, "uint8")
        assert levels.shape == (batch, 16, 16, 3)
        assert (levels.int() - engine.decode(wanted, given, "uint8").int()).abs().max() <= 4
    with pytest.raises(InputError, match="got 1 captions for 2 images"):
        loaded.decode(torch.zeros(2, 3, 4), ["one"])


# -- refused when loading --------------------------------------------------------------------------------------------------


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Saves a tiny DiT without compiling it: the programs are text files that name their arguments' shapes."""

    def add(self: Any, name: str, network: Any, given: Any, dims: Any, most_text: int | None = None) -> None:
        network(*given)  # it runs
        text = str([None if each is None else tuple(each.shape) for each in given])
        (self.directory / f"{name}.pt2").write_text(text, encoding="utf-8")
        self.files.append(f"{name}.pt2")

    monkeypatch.setattr(packages._Compiler, "add", add)

    def save(name: str = "package", plan: Plan = PLAN, **fields: Any) -> Path:
        return save_package(tiny_dit(**fields), tmp_path / name, plan)

    return save


def change(directory: Path, **made_on: Any) -> None:
    path = directory / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["made_on"] |= made_on
    path.write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"torch": "1.0.0"}, "it was made for PyTorch 1.0.0, this is "),
        ({"system": "Plan9 vax"}, "it was made for Plan9 vax, this is "),
        ({"instructions": ["sse2", "avx9000"]}, "it was made for a processor with avx9000, which this one lacks"),
    ],
)
def test_a_package_of_another_machine_is_refused(written: Callable[..., Path], other: dict[str, Any], reason: str) -> None:
    directory = written()
    change(directory, **other)
    with pytest.raises(InputError) as caught:
        load_package(directory)
    assert reason in str(caught.value) and str(caught.value).endswith("make it again here with save_package")


def test_a_package_of_another_device_is_refused(written: Callable[..., Path]) -> None:
    directory = written()
    change(directory, device="cuda", cuda="13.0", capability="9.0")
    with pytest.raises(InputError, match="it was made for device cuda, this is cpu"):
        load_package(directory, "cpu")


def test_gpus_of_another_architecture_are_told_apart() -> None:
    here = machine(torch.device("cpu")) | {"device": "cuda", "cuda": "13.0", "capability": "9.0"}
    assert why_not_here(here, here) == ""
    assert why_not_here(here | {"capability": "8.0"}, here) == "it was made for GPU compute capability 8.0, this is 9.0"
    assert why_not_here(here | {"cuda": "12.8"}, here) == "it was made for CUDA 12.8, this is 13.0"
    more = here | {"instructions": [*here["instructions"], "a", "b", "c", "d", "e"]}
    assert why_not_here(more, here) == "it was made for a processor with a, b, c, d and 1 more, which this one lacks"
    assert why_not_here(here, more) == ""  # a processor with more runs it


def test_incomplete_and_damaged_packages_are_refused(written: Callable[..., Path], tmp_path: Path) -> None:
    directory = written()
    with pytest.raises(InputError, match=r"cannot load .*modulation.pt2: .*; make the package again"):
        load_package(directory)  # a text is no program
    (directory / "network.pt2").write_text("short", encoding="utf-8")
    with pytest.raises(InputError, match=r"is not complete: network.pt2 is missing or cut short"):
        load_package(directory)
    (directory / MANIFEST).write_text('{"format": 99}', encoding="utf-8")
    with pytest.raises(InputError, match="is not of format 1"):
        load_package(directory)
    (directory / MANIFEST).write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="cannot read"):
        load_package(directory)
    with pytest.raises(InputError, match=r"has no package.json: it is no package; save_package makes one"):
        load_package(tmp_path / "nowhere")


# -- refused and replaced when saving --------------------------------------------------------------------------------------


def test_what_no_package_can_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_dit()
    for plan, reason in (
        (Plan(precision="int8"), "a package holds fp32 or bf16, got precision='int8'"),
        (Plan(step_cache=StepCache()), "use step_cache=None"),
    ):
        with pytest.raises(InputError, match=reason):
            save_package(model, tmp_path / "package", plan)
    with pytest.raises(InputError, match="holds a DiT or a TexTok, got Linear"):
        save_package(torch.nn.Linear(1, 1), tmp_path / "package")  # type: ignore[arg-type]
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InputError, match="cannot be made here: .*compiler"):
        save_package(model, tmp_path / "package", PLAN)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, {"modulation": "[(2,), (2,)]", "text": "[(2, 16, 8), (2, 16)]"}),
        ({"num_classes": 0, "text_dim": 0}, {"modulation": "[(2,), None]", "network": "[(2, 4, 3), (2, 256), None, None]"}),
        (
            {"text_dim": 0, "num_tokens": 0, "input_size": 4, "patch_size": 2},
            {"network": "[(2, 3, 4, 4), (2, 256), None, None]"},
        ),
        (
            {"text_dim": 0, "image_token_dim": 6, "num_image_tokens": 2},
            {"network": "[(2, 4, 3), (2, 256), None, None, (2, 2, 6)]"},
        ),
    ],
)
def test_every_kind_of_generator_has_its_programs(
    written: Callable[..., Path], fields: dict[str, Any], wanted: dict[str, str]
) -> None:
    directory = written(plan=Plan(compile="max-autotune", products="native"), **fields)
    for name, shapes in wanted.items():
        assert (directory / f"{name}.pt2").read_text(encoding="utf-8") == shapes
    assert (directory / "text.pt2").exists() == (fields.get("text_dim") != 0)
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["plan"]["compile"] == "none" and manifest["plan"]["products"] == "auto"


def test_a_package_is_replaced_only_by_a_complete_one(
    written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    directory = written()
    assert written(text_dim=0) == directory
    assert sorted(path.name for path in directory.iterdir()) == ["modulation.pt2", "network.pt2", MANIFEST]
    before = (directory / MANIFEST).read_text(encoding="utf-8")

    def fails(*args: Any, **options: Any) -> None:
        raise RuntimeError("the compiler gave up")

    monkeypatch.setattr(packages._Compiler, "add", fails)
    with pytest.raises(RuntimeError, match="gave up"):
        written()
    assert (directory / MANIFEST).read_text(encoding="utf-8") == before
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_other_peoples_files_are_left_alone(written: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("words", encoding="utf-8")
    with pytest.raises(InputError, match=r"holds chapter1.tex, which is no part of a package"):
        written("thesis")
    (written() / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=r"holds notes.txt"):
        written()
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match="is not a directory"):
        written("file")
    (tmp_path / "empty").mkdir()
    assert (written("empty") / MANIFEST).exists()


def test_programs_get_what_they_were_compiled_for() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    assert packages._as_compiled(x) is x
    for other in (x[:1].expand(5, -1), x.t(), torch.arange(13.0)[1:].reshape(3, 4)):
        copy = packages._as_compiled(other)
        assert torch.equal(copy, other) and copy.is_contiguous() and copy.data_ptr() % packages.ALIGNMENT == 0


# -- on a GPU ----------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("capture", ["none", "step", "loop"])
def test_packages_on_a_gpu(tmp_path: Path, capture: Any, make_tokenizer: Callable[..., TexTok]) -> None:
    model = tiny_dit()
    plan = Plan(precision="bf16", device="cuda", capture=capture)
    loaded = load_package(save_package(model, tmp_path / "dit", plan))
    process = build_process("gaussian", learn_sigma=model.config.learn_sigma)
    options: dict[str, Any] = {"seeds": [3, 1, 2], "steps": 3, "guidance_scale": 2.0, "sampler": "ddim"}
    options |= {"labels": torch.tensor([0, 4, 5]), "text": captions(3, 6)}
    wanted = Engine(model, plan).sample(process, **options)
    for _ in range(2):
        got = loaded.sample(process, **options)  # type: ignore[union-attr]
        assert (got - wanted).norm() / wanted.norm() < 0.05
    if capture == "none":
        tokenizer = make_tokenizer()
        pictures = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
        tokens = tokenizer.encode(pictures, ["a", "", "b c"])
        compiled = load_package(save_package(tokenizer, tmp_path / "tokenizer", Plan(device="cuda")), "cuda:0")
        compiled.model.text_encoder = tokenizer.text_encoder  # type: ignore[union-attr, assignment]
        torch.testing.assert_close(compiled.encode(pictures, ["a", "", "b c"]).cpu(), tokens, rtol=1e-3, atol=1e-3)  # type: ignore[union-attr]
