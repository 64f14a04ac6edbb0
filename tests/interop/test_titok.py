"""TiTok and TA-TiTok: their recorded outputs, their calls, and the engine over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from textok_fast import InputError, TexTok, cli, interop
from textok_fast.inference import Engine, Plan
from textok_fast.interop import TiTok, convert_titok
from textok_fast.interop.titok import Posterior

HEADS = 4
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def loaded(golden: Callable[[str], Any], name: str, **options: Any) -> tuple[TiTok, dict[str, torch.Tensor]]:
    weights, io, config = golden(name)
    if name != "tatitok_vae":
        options["normalize_codes"] = config["use_l2_norm"]
    model = interop.load("titok" if name == "titok_vq" else "tatitok", weights, heads=HEADS, **options)
    assert isinstance(model, TiTok)
    return model, io


@pytest.mark.parametrize("name", ["titok_vq", "tatitok_vq", "tatitok_vae"])
@torch.no_grad()
def test_gives_the_peers_output(golden: Callable[[str], Any], name: str) -> None:
    model, io = loaded(golden, name)
    core = model.tokenizer
    z = core.encoder(2 * io["image"] - 1, None)  # (B, N, C)
    torch.testing.assert_close(z.transpose(1, 2).unsqueeze(2), io["encoder_out"], **CLOSE)
    quantized, found = model.encode(io["image"])
    text = (io["text_guidance"],) if "text_guidance" in io else ()
    if name == "tatitok_vae":
        assert isinstance(found, Posterior)
        torch.testing.assert_close(found.mean, io["mean"], **CLOSE)
        torch.testing.assert_close(found.logvar, io["logvar"], **CLOSE)
        torch.testing.assert_close(model.decode(found.mode(), *text), io["decoded"], **CLOSE)
        torch.testing.assert_close(model.decode_tokens(found.mode(), *text), io["decoded"], **CLOSE)
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(found.mean.shape, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(model.encode(io["image"], generator)[0], found.mean + torch.exp(0.5 * found.logvar) * noise)
        return
    assert isinstance(found, dict)
    assert torch.equal(found["min_encoding_indices"], io["indices"])
    torch.testing.assert_close(quantized, io["z_quantized"], **CLOSE)
    torch.testing.assert_close(model.decode_tokens(io["indices"], *text), io["decoded"], **CLOSE)
    torch.testing.assert_close(model.decode_tokens(io["indices"].squeeze(1), *text), io["decoded"], **CLOSE)
    torch.testing.assert_close(model(io["image"], *text)[0], io["decoded"], **CLOSE)
    torch.testing.assert_close(found["quantizer_loss"], found["commitment_loss"] + found["codebook_loss"])


@pytest.mark.parametrize("name", ["titok_vq", "tatitok_vae"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.no_grad()
def test_runs_in_the_engine(golden: Callable[[str], Any], name: str, precision: Any) -> None:
    model, io = loaded(golden, name)
    fast = TiTok(Engine(model.tokenizer, Plan(precision)))
    text = (io["text_guidance"],) if "text_guidance" in io else ()
    close = {"fp32": {"atol": 2e-5, "rtol": 1e-4}, "bf16": {"atol": 3e-2, "rtol": 3e-2}}[precision]
    z = io["mean"] if name == "tatitok_vae" else io["z_quantized"]
    torch.testing.assert_close(fast.decode(z, *text).float(), io["decoded"], **close)
    _, found = fast.encode(io["image"])
    if isinstance(found, Posterior):
        torch.testing.assert_close(found.mean.float(), io["mean"], **close)
    elif precision == "fp32":
        assert torch.equal(found["min_encoding_indices"], io["indices"])
    pictures = Engine(model.tokenizer, Plan(precision)).decode(
        model.tokenizer.encode(2 * io["image"] - 1), *text, output="uint8"
    )
    assert pictures.dtype == torch.uint8 and pictures.shape == (2, 32, 32, 3)


def test_is_an_ordinary_tokenizer(golden: Callable[[str], Any], tmp_path: Path) -> None:
    weights, io, _ = golden("tatitok_vae")
    tokenizer = convert_titok(weights, HEADS)
    again = TexTok.from_pretrained(tokenizer.save_pretrained(tmp_path / "own"))
    tokens = again.encode(2 * io["image"] - 1)
    assert again.config.text == "decoder" and again.config.text_dim == 12 and tokens.shape == (2, 8, 6)
    wanted = (2 * io["decoded"] - 1).clamp(-1, 1)
    torch.testing.assert_close(again.decode(tokens.mode(), io["text_guidance"]), wanted, atol=3e-5, rtol=1e-5)
    uint8 = again.decode(tokens.mode(), io["text_guidance"], output="uint8")
    assert ((uint8.permute(0, 3, 1, 2).float() / 127.5 - 1 - wanted).abs() < 1 / 127).all()


def test_another_caption_gives_another_picture(golden: Callable[[str], Any]) -> None:
    model, io = loaded(golden, "tatitok_vq")
    one = model.decode_tokens(io["indices"], io["text_guidance"])
    assert not torch.allclose(model.decode_tokens(io["indices"], 10 * io["text_guidance"].flip(0)), one, atol=1e-4)
    with pytest.raises(InputError, match=r"decodes with text: give text_guidance \(B, N_t, 12\)"):
        model.decode_tokens(io["indices"])
    plain, io = loaded(golden, "titok_vq")
    with pytest.raises(InputError, match="has no text"):
        plain.decode_tokens(io["indices"], torch.zeros(2, 7, 12))


WORDS = ["!", "a", "red", "ball", "<unk>", "<start>", "<end>"]


@pytest.fixture
def clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small CLIP text model and its tokenizer, as save_pretrained leaves them: 7 tokens of width 12, as the golden file."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    monkeypatch.setenv("TEXTOK_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 5), ("<end>", 6)]
    )
    special = {
        "bos_token": "<start>",
        "eos_token": "<end>",
        "pad_token": "<end>",
        "unk_token": "<unk>",
    }  # CLIP pads with its end
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "clip")
    config = transformers.CLIPTextConfig(
        vocab_size=len(WORDS), max_position_embeddings=7, hidden_size=12, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, projection_dim=8, bos_token_id=5, eos_token_id=6, pad_token_id=6,
    )  # fmt: skip
    model = transformers.CLIPTextModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@torch.no_grad()
def test_captions_become_the_features_that_its_authors_make(golden: Callable[[str], Any], clip: Path, tmp_path: Path) -> None:
    """open_clip's: the last hidden states of all 7 tokens, those behind the end being token 0 and counting like the others."""
    transformers = pytest.importorskip("transformers")
    weights, io, _ = golden("tatitok_vq")
    model: Any = interop.load("tatitok", weights, heads=HEADS, text_encoder=str(clip))
    ids = torch.tensor([[5, 1, 2, 3, 6, 0, 0], [5, 2, 2, 2, 2, 2, 6]])  # the second is cut, and keeps its end
    captions = ["a red ball", "red " * 9]
    features = transformers.CLIPTextModel.from_pretrained(clip)(input_ids=ids).last_hidden_state  # (2, 7, 12)
    wanted = model.decode_tokens(io["indices"], features)
    torch.testing.assert_close(model.decode_tokens(io["indices"], captions), wanted, **CLOSE)
    torch.testing.assert_close(model.decode_tokens(io["indices"], captions), wanted, **CLOSE)  # and from the cache
    fast = TiTok(Engine(model.tokenizer, Plan()))
    torch.testing.assert_close(fast.decode_tokens(io["indices"], captions), wanted, atol=2e-5, rtol=1e-4)
    interop.convert("tatitok", weights, tmp_path / "own", heads=HEADS, text_encoder=str(clip))
    own = TexTok.from_pretrained(tmp_path / "own")
    tokens = io["indices"].squeeze(1)
    torch.testing.assert_close(own.decode(tokens, captions), (2 * wanted - 1).clamp(-1, 1), atol=3e-5, rtol=1e-5)
    found = own.text_features(captions, 2)
    assert found is not None and found.mask.all()
    torch.testing.assert_close(found.features, features, **CLOSE)
    padded = transformers.CLIPTextModel.from_pretrained(clip)(input_ids=ids.where(ids != 0, 6)).last_hidden_state
    assert not torch.allclose(found.features[0], padded[0], atol=1e-2)  # transformers pads with the end token


def test_features_need_no_text_encoder_and_captions_say_what_they_lack(
    golden: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    weights, io, _ = golden("tatitok_vq")
    for name, message in ((str(tmp_path / "none"), "no text encoder at"), ("nobody/no-clip", "cannot get the text encoder")):
        model: Any = interop.load("tatitok", weights, heads=HEADS, text_encoder=name)
        torch.testing.assert_close(model.decode_tokens(io["indices"], io["text_guidance"]), io["decoded"], **CLOSE)
        with pytest.raises(InputError, match=message):
            model.decode_tokens(io["indices"], ["a red ball", "a"])
    assert interop.convert_titok(weights, HEADS).config.text_encoder == "openai/clip-vit-large-patch14-336"


def test_photos_without_captions_become_tokens(
    golden: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The encoder reads no text, so that none is asked for; the decoder reads it, or decodes without."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    interop.convert("tatitok", golden("tatitok_vae")[0], tmp_path / "own", heads=HEADS, text_encoder="nobody/no-clip")
    (tmp_path / "photos").mkdir()
    colours = ("teal", "red", "white")
    for colour in colours:
        Image.new("RGB", (40, 30), colour).save(tmp_path / "photos" / f"{colour}.png")
    (tmp_path / "photos" / "red.txt").write_text("a red field")
    own, device = ["--model", str(tmp_path / "own")], ["--device", "cpu"]
    tokens, out = str(tmp_path / "tokens"), str(tmp_path / "pictures")
    assert cli.main(["encode", *own, "--images", str(tmp_path / "photos"), "--out", tokens, *device]) == 0
    assert "wrote 3 pictures' tokens" in capsys.readouterr().out
    assert cli.main(["decode", *own, "--tokens", tokens, "--out", out, *device]) == 2
    assert "cannot get the text encoder 'nobody/no-clip'" in capsys.readouterr().err
    assert cli.main(["decode", *own, "--tokens", tokens, "--out", out, "--no-captions", *device]) == 0
    assert sorted(path.stem for path in (tmp_path / "pictures").glob("*.png")) == sorted(colours)


def test_bad_input_is_named(golden: Callable[[str], Any]) -> None:
    model, io = loaded(golden, "titok_vq")
    with pytest.raises(InputError, match="in \\[0, 1\\], got torch.uint8"):
        model.encode(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    with pytest.raises(InputError, match="in \\[-1, 1\\]"):
        model.encode(2 + io["image"])
    with pytest.raises(InputError, match=r"latents must be \(B, 4, 1, 8\), got \(2, 8, 4\)"):
        model.decode(torch.zeros(2, 8, 4))
    with pytest.raises(InputError, match=r"token indices must be \(B, 8\) int64, got \(2, 7\)"):
        model.decode_tokens(io["indices"][..., :7])
    with pytest.raises(InputError, match=r"in \[0, 24\)"):
        model.decode_tokens(io["indices"] + 24)
    with pytest.raises(InputError, match="tokens must be integers"):
        model.decode_tokens(torch.zeros(2, 1, 8))
    with pytest.raises(InputError, match=r"tokens must be an integer tensor \(B, 1, 8\), got list"):
        model.decode_tokens([[1] * 8])
    for wrong in ("x", io["indices"]):
        with pytest.raises(InputError, match=r"latents must be a float tensor \(B, 4, 1, 8\), got (str|torch.int64)"):
            model.decode(wrong)


def test_weights_that_do_not_fit_are_named(golden: Callable[[str], Any]) -> None:
    weights, _, _ = golden("titok_vq")
    without = {key: value for key, value in weights.items() if key != "encoder.transformer.1.attn.in_proj_bias"}
    for changed, message in (
        (without, "not the weights of a TiTok: missing encoder.transformer.1.attn.in_proj_bias"),
        ({**weights, "decoder.extra": torch.zeros(1)}, "unexpected decoder.extra"),
        (
            {**weights, "decoder.transformer.0.mlp.c_fc.weight": torch.zeros(3, 3)},
            r"decoder.transformer.0.mlp.c_fc.weight has the shape \(3, 3\), wanted \(128, 32\)",
        ),
        ({**weights, "decoder.ffn.2.weight": torch.zeros(1)}, "two-stage TiTok"),
    ):
        with pytest.raises(InputError, match=message):
            interop.load("titok", changed, heads=HEADS)
    with pytest.raises(InputError, match="width 32: give heads"):
        interop.load("titok", weights)
    with pytest.raises(InputError, match="titok has no option 'colour'; it has heads, normalize_codes$"):
        interop.load("titok", weights, colour=3)
