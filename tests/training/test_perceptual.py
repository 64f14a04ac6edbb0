from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from textok_fast import InputError
from textok_fast.training.perceptual import VGG16_CHANNELS, VGG16_CONVOLUTIONS, load_lpips

SMALL = (2, 3, 4, 5, 6)


def vgg(channels: tuple[int, ...] = SMALL) -> dict[str, Tensor]:
    """Random weights under torchvision's names, with what else its file holds."""
    state, before = {}, 3
    for width, numbers in zip(channels, VGG16_CONVOLUTIONS, strict=True):
        for number in numbers:
            state[f"features.{number}.weight"] = torch.randn(width, before, 3, 3) * (2 / (9 * before)) ** 0.5
            state[f"features.{number}.bias"] = 0.1 * torch.randn(width)
            before = width
    return {**state, "classifier.0.weight": torch.randn(2, 2), "classifier.0.bias": torch.randn(2)}


def heads(channels: tuple[int, ...] = SMALL) -> dict[str, Tensor]:
    return {f"lin{k}.model.1.weight": torch.rand(1, width, 1, 1) for k, width in enumerate(channels)}


def save(state: dict[str, Tensor], path: Path) -> str:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    return torch.rand(3, 3, 32, 32) * 2 - 1, torch.rand(3, 3, 32, 32) * 2 - 1


def written_out(state: dict[str, Tensor], lins: dict[str, Tensor], a: Tensor, b: Tensor) -> np.ndarray:
    """The paper's equation 1 in float64: for every stage, pixel and channel."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]).double(), torch.tensor([0.458, 0.448, 0.450]).double()
    stages = []
    for x in (a, b):
        x = (x.double() - shift[:, None, None]) / scale[:, None, None]
        taken = []
        for number in range(30):  # torchvision's features: convolutions, a ReLU after each, and poolings
            if f"features.{number}.weight" in state:
                weight, bias = state[f"features.{number}.weight"].double(), state[f"features.{number}.bias"].double()
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
            elif number in (4, 9, 16, 23):
                x = F.max_pool2d(x, 2, 2)
            if number in (2, 7, 14, 21, 28):
                taken.append(x.numpy())
        stages.append(taken)
    total = np.zeros(len(a))
    for k, (one, other) in enumerate(zip(*stages, strict=True)):
        one, other = (f / np.sqrt((f**2).sum(axis=1, keepdims=True) + 1e-8) for f in (one, other))
        weight = lins[f"lin{k}.model.1.weight"].double().numpy()
        total += ((one - other) ** 2 * weight).sum(axis=1).mean(axis=(1, 2))
    return total


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_formula_on_torchvisions_file_and_lpips_heads(pair: tuple[Tensor, Tensor], tmp_path: Path, suffix: str) -> None:
    state, lins = vgg(), heads()
    model = load_lpips(save(state, tmp_path / f"vgg16{suffix}"), save(lins, tmp_path / f"heads{suffix}"), SMALL)
    found = model(*pair)
    np.testing.assert_allclose(found.numpy(), written_out(state, lins, *pair), rtol=1e-4)
    assert torch.equal(model(pair[0], pair[0]), torch.zeros(3))
    torch.testing.assert_close(model(*reversed(pair)), found)


@pytest.mark.parametrize("prefix", ["", "features.", "slices", "lpips"])
def test_other_layouts_of_the_same_weights(pair: tuple[Tensor, Tensor], tmp_path: Path, prefix: str) -> None:
    state, lins = vgg(), heads()
    wanted = load_lpips(save(state, tmp_path / "a.pth"), save(lins, tmp_path / "heads.pth"), SMALL)(*pair)
    convolutions = {key: value for key, value in state.items() if key.startswith("features.")}
    slices = {number: k + 1 for k, numbers in enumerate(VGG16_CONVOLUTIONS) for number in numbers}
    other: dict[str, Tensor] = {}
    for key, value in convolutions.items():
        _, number, kind = key.split(".")
        nested = f"slice{slices[int(number)]}.{number}.{kind}"
        other[{"slices": nested, "lpips": f"net.{nested}"}.get(prefix, f"{prefix}{number}.{kind}")] = value
    if prefix == "lpips":  # the whole of lpips' or taming's module, whose heads are its own
        other |= lins | {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    found = load_lpips(save(other, tmp_path / "b.pth"), "" if prefix == "lpips" else str(tmp_path / "heads.pth"), SMALL)
    assert torch.equal(found(*pair), wanted)


def test_the_real_size_against_torchmetrics_and_its_heads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torchmetrics' module needs torchvision for VGG16's layers alone: it is given them, with our weights."""
    from torchmetrics.functional.image import lpips

    state = vgg(VGG16_CHANNELS)
    layers: list[nn.Module] = []
    for number in range(31):
        if f"features.{number}.weight" in state:
            weight = state[f"features.{number}.weight"]
            layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
            layer.load_state_dict({"weight": weight, "bias": state[f"features.{number}.bias"]})
            layers.append(layer)
        else:
            layers.append(nn.MaxPool2d(2, 2) if number in (4, 9, 16, 23, 30) else nn.ReLU())
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda *_: nn.Sequential(*layers))
    other = lpips._LPIPS(net="vgg")
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    found = load_lpips(save(state, tmp_path / "vgg16-397923af.pth"))
    torch.testing.assert_close(found(*pictures), other(*pictures).flatten(), atol=1e-6, rtol=1e-5)
    assert sum(parameter.numel() for parameter in found.convolutions.parameters()) == 14_714_688  # VGG16 without its classifier


def test_only_the_first_pictures_get_gradients_and_dark_ones_finite_ones(tmp_path: Path) -> None:
    state = vgg()
    for key in state:
        if key.endswith(".bias"):
            state[key] = torch.full_like(state[key], -100.0)  # all features are 0
    model = load_lpips(save(state, tmp_path / "vgg.pth"), save(heads(), tmp_path / "heads.pth"), SMALL)
    a, b = (torch.rand(1, 3, 16, 16, requires_grad=True) for _ in range(2))
    model(a, b).sum().backward()
    assert a.grad is not None and torch.isfinite(a.grad).all()
    assert b.grad is None
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_bad_files_are_refused_by_the_name_of_the_tensor(tmp_path: Path) -> None:
    good, lins = vgg(), save(heads(), tmp_path / "heads.pth")

    def load(state: dict[str, Tensor], file: str = lins) -> None:
        load_lpips(save(state, tmp_path / "vgg.pth"), file, SMALL)

    with pytest.raises(InputError, match=r"vgg\.pth lacks features\.12\.weight"):
        load({key: value for key, value in good.items() if key != "features.12.weight"})
    with pytest.raises(InputError, match=r"features\.5\.bias has the shape \(4,\), wanted \(3,\)"):
        load({**good, "features.5.bias": torch.zeros(4)})
    with pytest.raises(InputError, match=r"unexpected features\.16\.weight"):  # VGG19's fourth convolution of a stage
        load({**good, "features.16.weight": torch.zeros(4, 4, 3, 3)})
    with pytest.raises(InputError, match=r"lin3\.model\.1\.weight has the shape \(7,\), wanted \(5,\)"):
        load(good, save({**heads(), "lin3.model.1.weight": torch.ones(1, 7, 1, 1)}, tmp_path / "other.pth"))
    with pytest.raises(InputError, match=r"other\.pth lacks lin4\.model\.1\.weight"):
        load(good, save({k: v for k, v in heads().items() if k[3] != "4"}, tmp_path / "other.pth"))
    with pytest.raises(InputError, match=r"has LPIPS' heads itself: leave loss\.lpips_heads empty"):
        load({**good, **heads()})
    (tmp_path / "cut.pth").write_bytes((tmp_path / "vgg.pth").read_bytes()[:2000])
    with pytest.raises(InputError, match=r"cut\.pth is no file of torch\.save"):
        load_lpips(str(tmp_path / "cut.pth"))


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"loss\.lpips_weights=<file, directory or Hub id>.*vgg16-397923af\.pth"):
        load_lpips("")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"loss\.lpips_heads=.*textok-fast\[eval\]"):
        load_lpips(save(vgg(), tmp_path / "vgg.pth"), "", SMALL)


def test_pictures_too_small_to_halve_four_times_are_refused(tmp_path: Path) -> None:
    model = load_lpips(save(vgg(), tmp_path / "vgg.pth"), save(heads(), tmp_path / "heads.pth"), SMALL)
    with pytest.raises(InputError, match=r"at least 16 x 16 px, got \(8, 32\)"):
        model(torch.zeros(1, 3, 8, 32), torch.zeros(1, 3, 8, 32))
