"""Token shards: mapped, with a row for each caption, and beside pictures that are read by ranges."""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from textok_fast.config import DataConfig
from textok_fast.data import CaptionedImages, Draw, load_dataset, pack
from textok_fast.data import webdataset as webdataset_module
from textok_fast.data.token_cache import TokenDataset, drawn_rows, write_token_shards
from textok_fast.data.token_pictures import TokensAndPictures, collate_tokens_and_pictures
from textok_fast.errors import InputError
from textok_fast.training.loop import StepBatches

CAPTIONS = {0: ["one"], 1: ["two", "dos", "zwei"], 2: ["three", "tres"]}  # of picture k those of k % 3


def encode(images: torch.Tensor, captions: list[str]) -> dict[str, torch.Tensor]:
    """Tokens (B, 2, 3) that tell the picture's gray and the caption."""
    told = torch.tensor([sum(map(ord, caption)) for caption in captions])
    gray = images[:, 0, 0, 0].float()
    tokens = torch.stack([gray, told.float(), gray + told], dim=1)  # (B, 3)
    return {"tokens": tokens.unsqueeze(1).repeat(1, 2, 1), "indices": torch.stack([told, told], 1)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for k in range(20):
        Image.fromarray(np.full((8, 8, 3), 10 * k, dtype=np.uint8)).save(tmp_path / "pictures" / f"{k:02d}.png")
        (tmp_path / "pictures" / f"{k:02d}.txt").write_text("\n".join(CAPTIONS[k % 3]))
    return tmp_path / "pictures"


@pytest.fixture
def dataset(folder: Path) -> CaptionedImages:
    return load_dataset(DataConfig(source="folder", path=str(folder), image_size=8), "all")


def write(directory: Path, dataset: CaptionedImages, **options: Any) -> TokenDataset:
    settings: dict[str, Any] = {"identity": {"of": "test"}, "batch_size": 4, "shard_size": 6, **options}
    write_token_shards(directory, dataset, encode, **settings)
    return TokenDataset(directory)


@pytest.mark.parametrize("captions", [0, 2, 1])
def test_each_caption_has_its_tokens_and_draws_choose_one(dataset: CaptionedImages, tmp_path: Path, captions: int) -> None:
    tokens = write(tmp_path / "tokens", dataset, captions=captions)
    assert len(tokens) == 20 and tokens.keys == [f"{k:02d}" for k in range(20)]
    assert tokens.captions == [CAPTIONS[k % 3][0] for k in range(20)]
    assert tokens.index.get("captions", 1) == captions
    rows = sum(len(load_file(path)["tokens"]) for path in (tmp_path / "tokens").glob("*.safetensors"))
    assert rows == sum(len(CAPTIONS[k % 3][: captions or None]) for k in range(20))
    for k in range(20):
        drawn = Counter(tokens[Draw(k, 3, epoch)]["caption"] for epoch in range(60))
        assert set(drawn) == set(CAPTIONS[k % 3][: captions or None])
        assert min(drawn.values()) > 5  # none of three is rare
        for index in (k, Draw(k, 3, 7), Draw(k, 4, 7)):
            item = tokens[index]
            told = encode(torch.full((1, 8, 8, 3), 10 * k), [item["caption"]])
            assert torch.equal(item["tokens"], told["tokens"][0]) and torch.equal(item["indices"], told["indices"][0])
        assert tokens[k]["caption"] == CAPTIONS[k % 3][0]
    # A draw is a function of seed, epoch and key; and the one by which a tokenizer's training draws.
    assert [tokens[Draw(k, 1, 5)]["caption"] for k in range(20)] == [tokens[Draw(k, 1, 5)]["caption"] for k in range(20)]
    if captions == 0:
        assert all(tokens[Draw(k, 1, 5)]["caption"] == dataset[Draw(k, 1, 5)].caption for k in range(20))
    with pytest.raises(IndexError):
        tokens[20]
    assert tokens[-1]["key"] == "19"


def test_captions_that_change_no_tokens_share_them(dataset: CaptionedImages, tmp_path: Path) -> None:
    def blind(images: torch.Tensor, captions: list[str]) -> dict[str, torch.Tensor]:
        assert captions == [CAPTIONS[int(image[0, 0, 0]) // 10 % 3][0] for image in images]
        return {"tokens": images[:, 0, :2].float()}

    settings: dict[str, Any] = {"identity": {}, "captions": 0, "reads_captions": False, "batch_size": 4, "shard_size": 6}
    write_token_shards(tmp_path / "tokens", dataset, blind, **settings)
    tokens = TokenDataset(tmp_path / "tokens")
    assert sum(len(load_file(path)["tokens"]) for path in (tmp_path / "tokens").glob("*.safetensors")) == len(tokens) == 20
    for k in range(20):
        items = [tokens[Draw(k, 3, epoch)] for epoch in range(60)]
        assert {item["caption"] for item in items} == set(CAPTIONS[k % 3])
        assert all(torch.equal(item["tokens"], torch.full((2, 3), 10.0 * k)) for item in items)
    assert all(tokens[Draw(k, 1, 5)]["caption"] == dataset[Draw(k, 1, 5)].caption for k in range(20))
    assert tokens.captions == [CAPTIONS[k % 3][0] for k in range(20)]


def test_another_number_of_captions_is_another_cache(dataset: CaptionedImages, tmp_path: Path) -> None:
    write(tmp_path / "all", dataset, captions=0)
    with pytest.raises(InputError, match="captions differ"):
        write(tmp_path / "all", dataset, captions=1)
    single = load_dataset(DataConfig(source="shapes", image_size=16, objects=8, held_out_objects=2), "train", 5)
    (tmp_path / "single").mkdir()
    one = write(tmp_path / "single", single, captions=1)
    assert write(tmp_path / "single", single, captions=0).index == one.index  # where there is one each, it is the same


def test_shards_from_before_are_read(tmp_path: Path) -> None:
    """A row a picture, as all shards had."""
    (tmp_path / "index.json").write_text("{}")
    given = torch.arange(24.0).reshape(4, 2, 3)
    for number, rows in enumerate((slice(0, 3), slice(3, 4))):
        keys = [f"k{row}" for row in range(4)][rows]
        header = {"keys": json.dumps(keys), "captions": json.dumps([f"c {key}" for key in keys])}
        labels = torch.arange(4)[rows]
        save_file(
            {"tokens": given[rows].clone(), "labels": labels.clone()}, tmp_path / f"tokens-{number:05d}.safetensors", header
        )
    tokens = TokenDataset(tmp_path)
    assert [(each["key"], each["caption"], int(each["label"])) for each in tokens] == [
        (f"k{k}", f"c k{k}", k) for k in range(4)
    ]
    assert torch.equal(torch.stack([each["tokens"] for each in tokens]), given) and "indices" not in tokens[0]
    assert torch.equal(pickle.loads(pickle.dumps(tokens))[3]["tokens"], given[3])
    save_file({"tokens": given[:1].repeat(1, 2, 1), "labels": torch.zeros(1)}, tmp_path / "tokens-00002.safetensors", header)
    with pytest.raises(InputError, match="do not fit together"):
        TokenDataset(tmp_path)
    save_file({"tokens": given, "labels": torch.zeros(4)}, tmp_path / "tokens-00002.safetensors", header)
    with pytest.raises(InputError, match="not as many keys as tokens"):
        TokenDataset(tmp_path)


def resident(file: Path) -> int:
    """Bytes of a mapped file that this process has touched."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
def test_what_is_not_asked_for_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("{}")
    count, file = 2048, tmp_path / "tokens-00000.safetensors"
    given = torch.arange(count * 256 * 32.0).reshape(count, 256, 32)  # 64 MiB
    keys = json.dumps([f"k{row}" for row in range(count)])
    save_file({"tokens": given, "labels": torch.zeros(count, dtype=torch.int64)}, file, {"keys": keys, "captions": keys})
    size = file.stat().st_size
    tokens = TokenDataset(tmp_path)
    assert resident(file) == 0 and not tokens._mapped
    for row in (7, 1500):
        assert torch.equal(tokens[row]["tokens"], given[row])
    assert 0 < resident(file) < size / 8  # the kernel maps what lies around a row
    assert len(pickle.dumps(tokens)) < size / 100  # nor does another process get it


def test_pictures_beside_tokens_are_read_by_ranges(
    dataset: CaptionedImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order that keeps a shard's reads together, a batch in one request, each with the caption that its draw chose."""
    from textok_fast.data import PackOptions

    pack(dataset, tmp_path / "shards", PackOptions(shard_pictures=5))
    config = DataConfig(source="webdataset", path=str(tmp_path / "shards"), image_size=8, shuffle_buffer=4, read_streams=2)
    shards = load_dataset(config, "all")
    rows = drawn_rows(len(shards), 16, seed=0)
    assert len(rows) == 16 and list(rows) != list(range(16))
    tokens = write(tmp_path / "tokens", shards, count=16, seed=0, captions=0)
    both = TokensAndPictures(tokens, shards, rows)
    order = both.epoch_order(1, 0, 4)
    assert order is not None and sorted(order.tolist()) == list(range(16))
    assert not np.array_equal(order, both.epoch_order(1, 1, 4))
    # Lanes of neighbours: with two streams a batch of four has two from either half of the shards' sequence.
    places = [int(shards._records.places[shards._rows[rows[index]], 0]) for index in order]  # type: ignore[attr-defined]
    lanes = np.array(places).reshape(4, 2, 2).transpose(1, 0, 2).reshape(2, 8)
    assert all((np.diff(lane) != 0).sum() <= 4 for lane in lanes)  # of 16 in any order it would be most of them
    reads: list[int] = []
    usual = webdataset_module.read_parts

    def counted(parts: Sequence[Any], *rest: Any) -> Any:
        reads.append(len(parts))
        return usual(parts, *rest)

    monkeypatch.setattr(webdataset_module, "read_parts", counted)
    batches = list(StepBatches(len(both), 4, 1, 0, 8, 0, 1, order=both.epoch_order))
    for indices in batches:
        batch = collate_tokens_and_pictures(both.__getitems__(indices))
        assert [10 * int(key.split("_")[-1]) for key in batch["keys"]] == batch["images"][:, 0, 0, 0].tolist()
        told = encode(batch["images"], batch["captions"])
        assert torch.equal(batch["tokens"], told["tokens"])
    assert reads == [4] * 8
    seen = [caption for indices in batches for caption in (item["caption"] for item in both.__getitems__(indices))]
    assert set(seen) - {"one", "two", "three"}  # not the first ones alone
