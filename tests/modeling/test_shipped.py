"""Weights by name: found, checked, and refused when they are not what was shipped."""

import shutil

import pytest
import torch

from textok_fast import DiT, DiTConfig, TexTok, TexTokConfig
from textok_fast.errors import InputError
from textok_fast.inference import load_pipeline
from textok_fast.inference.pipelines import build_pipeline
from textok_fast.modeling import shipped
from textok_fast.modeling.autoencoder import load_tokenizer


@pytest.fixture
def named(tmp_path, monkeypatch):
    """The directory of a shipped pipeline "textok-nano"."""
    torch.manual_seed(0)
    size = {"width": 32, "heads": 2}
    tokenizer = TexTok(TexTokConfig(image_size=16, patch_size=8, num_tokens=2, latent_dim=4, encoder_depth=1, decoder_depth=1,
        text="none", **size))  # fmt: skip
    generator = DiT(DiTConfig(num_tokens=2, in_channels=4, depth=1, num_classes=3, **size))
    directory = tmp_path / "pretrained" / "textok-nano"
    build_pipeline(generator, tokenizer, {"objective": "gaussian", "label_names": ["a", "b", "c"], "captions": {}}, "here"
        ).save_pretrained(directory)  # fmt: skip
    shipped.write_sums(directory)
    monkeypatch.setattr(shipped, "ROOT", tmp_path / "pretrained")
    monkeypatch.chdir(tmp_path)
    return directory


def test_every_loader_takes_the_name(named):
    wanted = TexTok.from_pretrained(named / "tokenizer").state_dict()
    for found in (TexTok.from_pretrained("textok-nano"), load_tokenizer("textok-nano"), load_pipeline("textok-nano").tokenizer):
        assert all(torch.equal(value, wanted[key]) for key, value in found.state_dict().items())
    assert DiT.from_pretrained("textok-nano").config.num_classes == 3
    assert shipped.shipped_names() == ["textok-nano"]


def test_a_pipeline_directory_of_ones_own_gives_its_models(named, tmp_path):
    shutil.copytree(named, tmp_path / "mine")
    assert TexTok.from_pretrained(tmp_path / "mine").config.num_tokens == 2
    assert DiT.from_pretrained("mine").config.depth == 1


def test_a_directory_here_goes_before_the_name(named, tmp_path):
    TexTok(TexTokConfig(image_size=16, patch_size=8, num_tokens=7, latent_dim=4, encoder_depth=1, decoder_depth=1, width=32,
        heads=2, text="none")).save_pretrained(tmp_path / "textok-nano")  # fmt: skip
    assert TexTok.from_pretrained("textok-nano").config.num_tokens == 7


@pytest.mark.parametrize("harm", ["changed", "gone"])
def test_a_damaged_file_is_refused(named, harm):
    shipped._check.cache_clear()
    file = named / "tokenizer" / "model.safetensors"
    if harm == "gone":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors.*install it again"):
        TexTok.from_pretrained("textok-nano")


def test_an_unknown_name_says_which_there_are(named):
    with pytest.raises(InputError, match="textok-nano"):
        TexTok.from_pretrained("textok-micro")
