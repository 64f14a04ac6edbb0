"""The weights in the box do what the model card says: they are the real ones, checked by their sums, and small enough."""

import numpy as np
import pytest
import torch

from textok_fast import TexTok
from textok_fast.config import GeneratorTrainConfig, TokenizerTrainConfig, load_config
from textok_fast.data import collate, load_dataset
from textok_fast.evaluation import psnr
from textok_fast.evaluation.mini import MINI, ROWS, demonstrate
from textok_fast.inference import load_pipeline
from textok_fast.interop.titok import TiTok
from textok_fast.modeling.shipped import ROOT, shipped_names


@pytest.fixture
def scenes(users_cache):
    """Held-out scenes of the emoji."""
    dataset = load_dataset(load_config(TokenizerTrainConfig, MINI).data, "composition")
    if "Objects: emoji" not in dataset.describe():
        pytest.skip("the emoji could not be fetched: textok-mini knows no other pictures")
    return dataset


def test_it_is_there_and_at_most_40_mb():
    assert MINI in shipped_names()
    assert sum(path.stat().st_size for path in (ROOT / MINI).rglob("*")) < 40e6
    tokenizer, generator = TexTok.from_pretrained(MINI), load_pipeline(MINI).generator
    assert tokenizer.config.text == "both" and len(tokenizer.config.latent_std) == 8
    assert all(value.dtype == torch.float32 for value in tokenizer.state_dict().values() if value.is_floating_point())
    # What the recipe would train is what lies there.
    recipe, of_generator = load_config(TokenizerTrainConfig, MINI).model, load_config(GeneratorTrainConfig, MINI).model
    trained = {"latent_mean": (), "latent_std": ()}
    assert recipe == type(recipe)(**{**vars(tokenizer.config), **trained})
    assert vars(of_generator) == vars(generator.config)


def test_captions_are_worth_what_the_card_says(scenes):
    made = demonstrate(scenes, 16)
    assert set(made.pictures) == set(ROWS)
    original = made.pictures["original"]
    found = {name: psnr(original, made.pictures[name]) for name in ("with", "without", "edited")}
    assert found["with"] > 23 and found["without"] < 18.5  # over 512 scenes 25.6 and 16.2
    assert found["edited"] < found["with"] - 3
    # The edited object alone has changed: the other half of the picture is as good as before.
    for index, caption in enumerate(made.captions):
        size = original.shape[1] // 2
        if "top" not in caption.split("; ")[0]:
            continue
        lower = np.s_[index : index + 1, size:]
        before, after = (
            psnr(original[lower], made.pictures["with"][lower]),
            psnr(original[lower], made.pictures["edited"][lower]),
        )
        assert after > before - 6, caption


def test_samples_look_like_what_their_captions_say(scenes):
    """Its own tokenizer's pictures of the scenes are nearer than those of other scenes."""
    made = demonstrate(scenes, 8).pictures
    real, sampled = (made[name].astype(np.float64).reshape(8, -1) for name in ("with", "generated"))
    distance = np.square(real[:, None] - sampled[None]).mean(-1)
    assert (distance.argmin(0) == np.arange(8)).sum() >= 7


def test_drop_in_calls_take_it(scenes):
    batch = collate([scenes[index] for index in range(2)])
    tokenizer = TexTok.from_pretrained(MINI)
    tokens = tokenizer.encode(batch["images"], batch["captions"])
    assert tokens.mode().shape == (2, 8, 8)
    diffusers = pytest.importorskip("textok_fast.interop.diffusers")
    vae = diffusers.AutoencoderTexTok.from_textok(tokenizer)
    assert vae.encode(tokenizer.preprocess(batch["images"])).latent_dist.mode().shape == (2, 8, 8)
    with pytest.raises(ValueError):
        TiTok(tokenizer).encode(batch["images"])  # TiTok's images are floats in [0, 1]
