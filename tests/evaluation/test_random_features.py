"""The features that need no weights: the same everywhere, and blur and noise move them."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from textok_fast.config import DataConfig
from textok_fast.data import collate, load_dataset
from textok_fast.errors import InputError
from textok_fast.evaluation.features import RandomNetwork, load_networks
from textok_fast.evaluation.fidelity import frechet_distance, gaussian


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    scenes = load_dataset(DataConfig(source="shapes", image_size=32), "train")
    return collate([scenes[index] for index in range(128)])["images"].numpy()


def test_the_weights_are_the_same_on_every_machine():
    """Numbers of two machines can be compared only if torch's generator draws the same."""
    assert RandomNetwork().identity == {"network": "random", "weights": "622666415ba69f24523795dc4784d32e"}


def test_each_stage_is_in_the_features(pictures):
    (network,), missing = load_networks(["random"])
    features = network(pictures[:3])["pool"]
    assert (features.shape, features.dtype, missing) == ((3, 256), torch.float32, {})
    assert torch.equal(features[1:], network(pictures[1:3])["pool"])
    assert all(part.std() > 1e-3 for part in features.split((16, 32, 48, 64, 96), dim=1))


def test_the_distance_grows_with_blur(pictures):
    network = RandomNetwork()

    def distance(made: np.ndarray) -> float:
        return frechet_distance(*(gaussian(network(part)["pool"]) for part in (pictures, made)))

    def blurred(size: int) -> np.ndarray:
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
        x = F.interpolate(F.adaptive_avg_pool2d(x, size), size=32, mode="bilinear")
        return x.permute(0, 2, 3, 1).round().byte().numpy()

    assert 100 * distance(pictures) < distance(blurred(16)) < distance(blurred(8)) < distance(blurred(4))


def test_pictures_must_have_16_pixels():
    with pytest.raises(InputError, match="16 x 16"):
        RandomNetwork()(np.zeros((1, 15, 20, 3), np.uint8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_sees_the_same(pictures):
    here, there = (RandomNetwork(device)(pictures)["pool"] for device in ("cpu", "cuda"))
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)
