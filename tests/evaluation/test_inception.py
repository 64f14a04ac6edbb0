"""FID's Inception against torch-fidelity's, and the loading of its weights."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from narrow_inception import save_inception, seeded_state

from textok_fast.errors import InputError
from textok_fast.evaluation import inception
from textok_fast.evaluation.features import InceptionNetwork, PixelNetwork, load_networks
from textok_fast.evaluation.inception import FIDInception, find_inception, load_inception, resize_like_tensorflow
from textok_fast.paths import cache_dir


def pictures(count: int, height: int = 96, width: int = 80, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, height, width), dtype=np.uint8))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "narrow.pth"
    save_inception(path)
    return path


def test_features_are_torch_fidelitys() -> None:
    """Numbers of torch-fidelity 0.4.0's FeatureExtractorInceptionV3 on these weights and pictures, the spatial ones from a hook
    on its Mixed_6d.branch1x1; on the CPU ours were the same to the bit."""
    network = FIDInception()
    network.load_state_dict({**network.state_dict(), **seeded_state(1)})
    found = network(pictures(2))
    assert (found.pool.shape, found.spatial.shape) == ((2, 2048), (2, 2023))
    pool = [
        [0.8681, 1.6751, 0.0, 0.0035, 2.3521, 0.071, 3.3891, 9.315],
        [0.8493, 1.5838, 0.0, 0.0075, 2.4096, 0.0507, 3.2178, 9.3123],
    ]
    spatial = [[0.0, 8.4109, 0.0, 0.0, 0.0, 0.0, 2.3625, 0.0], [0.0, 8.4857, 0.0, 0.0, 0.0, 0.0, 1.751, 0.0]]
    logits = [
        [-3.6333, -11.4221, -0.5111, 13.2314, 5.4504, 2.9066, 3.6657, -0.9138],
        [-3.5757, -11.5038, -0.5682, 13.1431, 5.5191, 2.9458, 3.8015, -1.1136],
    ]
    close: dict[str, Any] = {"atol": 2e-3, "rtol": 1e-3}
    torch.testing.assert_close(found.pool[:, 3::256], torch.tensor(pool), **close)
    torch.testing.assert_close(found.spatial[:, 3::256], torch.tensor(spatial), **close)
    torch.testing.assert_close(network.logits(found.pool)[:, 3::126], torch.tensor(logits), **close)
    norms = [float(x.norm()) for x in (found.pool, found.spatial, network.logits(found.pool))]
    assert norms == pytest.approx([340.552, 150.0981, 221.5156], rel=1e-4)


def test_spatial_features_are_the_first_seven_channels_of_mixed_6_conv(narrow: Path) -> None:
    """TensorFlow's mixed_6 is the layout's Mixed_6d (mixed_3 is Mixed_6a), and orders row, column, channel."""
    network = load_inception(narrow).network
    seen = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, out: seen.append(out))
    found = network(pictures(2))
    places = itertools.product(range(2), range(17), range(17), range(7))
    expected = [seen[0][picture, channel, y, x] for picture, y, x, channel in places]
    assert seen[0].shape == (2, 12, 17, 17)
    torch.testing.assert_close(found.spatial.flatten(), torch.stack(expected), rtol=0, atol=0)
    assert found.spatial.std() > 0


def test_logits_have_no_bias(narrow: Path) -> None:
    network = load_inception(narrow).network
    pool = torch.rand(3, 128)
    torch.testing.assert_close(network.logits(pool), pool @ network.fc.weight.T)
    assert network.fc.bias.abs().max() > 0


@pytest.mark.parametrize(("length", "size"), [(4, 6), (7, 3), (5, 5)])
def test_resize_is_tensorflows_first(length: int, size: int) -> None:
    """Place i of the output reads i * length / size, between the two pixels there."""
    row = torch.arange(length, dtype=torch.float32) ** 2
    expected = []
    for i in range(size):
        at = i * length / size
        low = int(at)
        high = min(low + 1, length - 1)
        expected.append(float(row[low]) * (1 - (at - low)) + float(row[high]) * (at - low))
    found = resize_like_tensorflow(row.expand(1, 1, length, length), size)
    torch.testing.assert_close(found[0, 0], torch.tensor(expected).expand(size, size), rtol=0, atol=1e-5)
    torch.testing.assert_close(resize_like_tensorflow(row.expand(1, 1, length, length).mT, size), found.mT)


def test_a_batch_does_not_change_a_pictures_features(narrow: Path) -> None:
    network = load_inception(narrow).network
    given = pictures(3)
    torch.testing.assert_close(network(given).pool[2:], network(given[2:]).pool, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_features_are_the_cpus(narrow: Path) -> None:
    """Without TensorFloat-32, which moves them by a thousandth."""
    given = pictures(3).permute(0, 2, 3, 1).numpy()
    here, there = (InceptionNetwork(str(narrow), device=device)(given) for device in ("cpu", "cuda"))
    for name, features in here.items():
        torch.testing.assert_close(there[name], features, rtol=1e-4, atol=1e-4)


# -- weights ----------------------------------------------------------------------------------------------------------------


def test_only_the_published_file_is_fid(narrow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = InceptionNetwork(str(narrow))
    digest = other.identity["sha256"]
    assert (other.is_fid, other.label) == (False, f"inception-{digest[:8]}")
    assert "other weights" in other.title
    monkeypatch.setattr(inception, "PUBLISHED_SHA256", digest)
    assert (InceptionNetwork(str(narrow)).is_fid, InceptionNetwork(str(narrow)).label) == (True, "inception")
    assert not PixelNetwork.is_fid


def test_safetensors_and_a_published_state_without_counts(narrow: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = torch.load(narrow, weights_only=True)
    assert not any(key.endswith("num_batches_tracked") for key in state)
    save_file(state, tmp_path / "inception.safetensors")
    given = pictures(1)
    pool = load_inception(narrow).network(given).pool
    torch.testing.assert_close(load_inception(tmp_path / "inception.safetensors").network(given).pool, pool, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("Mixed_6d.branch1x1.conv.weight"), r"missing Mixed_6d\.branch1x1\.conv\.weight"),
        (lambda state: state.update({"AuxLogits.fc.weight": torch.zeros(1)}), r"unexpected AuxLogits\.fc\.weight"),
        (lambda state: state.update({"fc.weight": torch.zeros(62, 128)}), r"fc\.weight has the shape \(62, 128\)"),
        (lambda state: state.pop("Conv2d_1a_3x3.conv.weight"), "no Inception in pytorch-fid's layout"),
        (lambda state: state.update({"Conv2d_1a_3x3.conv.weight": torch.zeros(3, 3, 3, 3)}), "no Inception"),
    ],
)
def test_other_weights_are_refused(narrow: Path, tmp_path: Path, change: Any, message: str) -> None:
    state = torch.load(narrow, weights_only=True)
    change(state)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(InputError, match=message):
        load_inception(tmp_path / "other.pth")


def test_a_download_is_checked_and_kept(narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEXTOK_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "weights.pth"
    source.write_bytes(narrow.read_bytes())
    digest = load_inception(narrow).sha256
    url = source.as_uri()
    with pytest.raises(InputError, match="give the sha256"):
        find_inception(url)
    with pytest.raises(InputError, match="cannot download"):
        find_inception(url, "0" * 64)
    assert not [path for path in cache_dir().rglob("*") if path.suffix != ".lock" and path.is_file()]
    found = find_inception(url, digest)
    source.unlink()  # the second time nothing is fetched
    assert find_inception(url, digest) == found
    assert cache_dir() in found.parents
    found.write_bytes(b"broken")
    with pytest.raises(InputError, match="not the file that was meant"):
        find_inception(url, digest)


def test_what_is_missing_is_said(narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEXTOK_CACHE", str(tmp_path / "cache"))
    networks, missing = load_networks(["inception", "pixels"])
    assert [network.label for network in networks] == ["pixels"]
    assert "--inception published downloads" in missing["inception"]
    with pytest.raises(InputError, match="no file"):  # one that was named must be there
        load_networks(["inception"], str(tmp_path / "none.pth"))
    with pytest.raises(InputError, match="wanted " + "1" * 64):
        find_inception(str(narrow), "1" * 64)
    with pytest.raises(InputError, match="each of the features once"):
        load_networks(["pixels", "pixels"])
    # What --inception published leaves in the cache is found without naming it.
    monkeypatch.setattr(inception, "PUBLISHED_URL", narrow.as_uri())
    monkeypatch.setattr(inception, "PUBLISHED_SHA256", load_inception(narrow).sha256)
    assert find_inception("published") == find_inception()
    assert load_networks(["inception"])[0][0].is_fid


# -- other features ---------------------------------------------------------------------------------------------------------


def test_pixel_features_are_averages() -> None:
    picture = np.zeros((1, 16, 16, 3), dtype=np.uint8)
    picture[:, :2, 2:4, 1] = [[255, 0], [255, 255]]
    pool = PixelNetwork()(picture)["pool"].reshape(3, 8, 8)
    assert pool[1, 0, 1] == pytest.approx(0.75)
    assert pool.sum() == pytest.approx(0.75)


@pytest.mark.filterwarnings("ignore")
def test_a_vision_model_of_transformers(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=1)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "dino-tiny")
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path / "dino-tiny")
    (network,), _ = load_networks([str(tmp_path / "dino-tiny")])
    given = pictures(2, 28, 28).permute(0, 2, 3, 1).numpy()
    pixels = (torch.from_numpy(given).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    with torch.no_grad():
        expected = model(pixels).pooler_output
    torch.testing.assert_close(network(given)["pool"], expected, rtol=1e-4, atol=1e-5)
    assert (network.label, network.is_fid, network.logits(expected)) == ("dino-tiny", False, None)
    for source in (str(tmp_path / "none"), "./nothing"):
        with pytest.raises(InputError, match="no directory"):
            load_networks([source])
