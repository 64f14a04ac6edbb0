from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from textok_fast.config import DataConfig, from_mapping
from textok_fast.data import CaptionedImages, Draw, PackOptions, load_dataset, pack
from textok_fast.data.huggingface import HuggingFaceStream
from textok_fast.data.token_cache import TokenDataset, write_token_shards
from textok_fast.errors import InputError
from textok_fast.training.loop import StepBatches

datasets = pytest.importorskip("datasets")

COUNT = 40


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures in three parquet files as they lie on the Hub, and beside them the same by ``save_to_disk``."""
    folder = tmp_path_factory.mktemp("hub")
    noise = np.random.default_rng(0).integers(0, 256, (COUNT, 10, 12, 3), dtype=np.uint8)
    rows = {
        "image": [Image.fromarray(pixels) for pixels in noise],
        "text": [[f"number {k}", f"the {k}th"] if k % 5 else [] for k in range(COUNT)],
        "label": [k % 3 for k in range(COUNT)],
        "width": [12] * COUNT,
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.List(datasets.Value("string")),
            "label": datasets.ClassLabel(names=["cow", "star", "tree"]),
            "width": datasets.Value("int32"),
        }
    )
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(str(folder / "disk"))
    (folder / "parquet").mkdir()
    for number in range(3):
        part = made.shard(3, number, contiguous=True)
        part.to_parquet(str(folder / "parquet" / f"train-{number:05d}-of-00003.parquet"), batch_size=4)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def read(path: Path, split: str = "all", need_captions: bool = True, **settings: Any) -> CaptionedImages:
    options = {key: settings.pop(key) for key in list(settings) if key not in ("crop", "shuffle_buffer", "image_size")}
    if "split_of_hub" in options:
        options["split"] = options.pop("split_of_hub")
    values = {"source": "huggingface", "path": str(path), "image_size": 8, "huggingface": options, **settings}
    return load_dataset(from_mapping(DataConfig, values), split, need_captions=need_captions)


def examples(dataset: CaptionedImages) -> list[tuple[Any, ...]]:
    return [(example.image.tobytes(), *example[1:]) for example in dataset]


@pytest.mark.parametrize("name", ["disk", "parquet"])
def test_downloaded_and_streamed_are_the_same(saved: Path, name: str) -> None:
    whole = read(saved / name)
    assert len(whole) == 32 and whole.skipped == {"missing caption": 8}
    assert whole.label_names == ["cow", "star", "tree"]
    assert [e.caption for e in whole] == [f"number {k}" for k in range(COUNT) if k % 5]
    assert [whole.label_names[e.label] for e in whole][:3] == ["star", "tree", "cow"]
    assert pickle.loads(pickle.dumps(whole))[3].caption == whole[3].caption
    everything = read(saved / name, need_captions=False)
    streamed = read(saved / name, need_captions=False, streaming=True, shuffle_buffer=8, length=COUNT)
    assert isinstance(streamed, HuggingFaceStream)
    assert examples(streamed) == examples(everything) and len(streamed) == COUNT
    assert {streamed[Draw(7, 0, epoch)].caption for epoch in range(9)} == {"number 7", "the 7th"}


def test_a_column_that_is_not_there_is_named(saved: Path) -> None:
    with pytest.raises(InputError, match=r"no column 'prompt' for data.huggingface.caption_column; it has image, text"):
        read(saved / "disk", caption_column="prompt")
    with pytest.raises(InputError, match="no column of images"):
        read(saved / "disk", image_column="width")
    with pytest.raises(InputError, match="cannot load the data set"):
        read(saved / "nowhere")
    with pytest.raises(InputError, match=r"cannot load the data set .*parquet' \(test\)"):
        read(saved / "parquet", split_of_hub="test")


def test_a_stream_must_know_its_length(saved: Path) -> None:
    with pytest.raises(InputError, match="set data.huggingface.length=40"):
        list(read(saved / "parquet", streaming=True, length=50, need_captions=False))


def test_a_continued_stream_gives_the_same_batches_and_reads_little_again(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    usual = HuggingFaceStream._next_row

    def counted(self: HuggingFaceStream) -> Any:
        rows.append(self._at)
        return usual(self)

    monkeypatch.setattr(HuggingFaceStream, "_next_row", counted)

    def batches(start: int) -> list[list[tuple[Any, ...]]]:
        dataset = read(saved / "parquet", "train", streaming=True, length=COUNT, shuffle_buffer=8, crop="random")
        indices = StepBatches(len(dataset), 5, 3, start, 21, 0, 1, order=dataset.epoch_order)
        found = [dataset.__getitems__(batch) for batch in indices]  # type: ignore[attr-defined]
        return [[(example.image.tobytes(), *example[1:]) for example in batch] for batch in found]

    whole = batches(0)
    assert len(whole) == 21 and all(caption for batch in whole for _, caption, _, _ in batch)  # three epochs
    keys = [[key for batch in whole[start : start + 7] for _, _, _, key in batch] for start in (0, 7)]
    assert keys[0] != keys[1] and len(rows) <= 3 * COUNT
    for start in (3, 6, 12):
        rows.clear()
        assert batches(start) == whole[start:]
        first_window = (start % 7 * 5) // 8 * 8 + 2  # behind two held-out pictures
        assert rows[0] == (first_window if start % 7 else 0)  # from a noted place, not from the beginning


def test_splits_of_a_stream_do_not_overlap(saved: Path) -> None:
    keys = {
        split: {example.key for example in read(saved / "parquet", split, False, streaming=True, length=COUNT)}
        for split in ("train", "validation", "all")
    }
    assert len(keys["validation"]) == 2 and not keys["train"] & keys["validation"]
    assert keys["train"] | keys["validation"] == keys["all"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hugging_face_data_set_is_packed(saved: Path, tmp_path: Path, streaming: bool) -> None:
    options = {"streaming": True, "length": COUNT, "shuffle_buffer": 16} if streaming else {}
    source = read(saved / "parquet", need_captions=False, **options)
    assert pack(source, tmp_path / "out", PackOptions(shard_pictures=15))["pictures"] == COUNT
    config = DataConfig(source="webdataset", path=str(tmp_path / "out"), image_size=8)
    back = load_dataset(config, "all", need_captions=False)
    assert [(e.image.tobytes(), e.caption, e.label) for e in back] == [row[:3] for row in examples(source)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_of_the_data_set_is_held_out(saved: Path, tmp_path_factory: pytest.TempPathFactory, streaming: bool) -> None:
    folder = tmp_path_factory.mktemp(
        "hub"
    )  # `datasets` reads splits from directories' names too, and tmp_path has "test" in its own
    for name, part in (("train", 0), ("test", 2)):
        (folder / f"{name}.parquet").write_bytes((saved / "parquet" / f"train-{part:05d}-of-00003.parquet").read_bytes())
    options = {"need_captions": False, "streaming": streaming, "validation_split": "test", "shuffle_buffer": 4}
    if streaming:
        options["length"] = 14
    train, everything = (examples(read(folder, split, **options)) for split in ("train", "all"))
    assert train == everything and len(train) == 14
    if streaming:  # parquet files do not say how many rows the other split has
        with pytest.raises(InputError, match=r"\(test\) does not say how many pictures it has"):
            read(folder, "validation", **options)
    else:
        validation = examples(read(folder, "validation", **options))
        assert [row[1] for row in validation][-1] == "number 39" and len(validation) == 13
    with pytest.raises(InputError, match=r"huggingface\.validation_split=validation"):
        DataConfig(source="huggingface", path=str(folder), validation_path="elsewhere")


def test_all_captions_of_a_stream_are_encoded_reading_it_once(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    usual = HuggingFaceStream._next_row

    def counted(self: HuggingFaceStream) -> Any:
        rows.append(self._at)
        return usual(self)

    def encode(images: torch.Tensor, captions: list[str]) -> dict[str, torch.Tensor]:
        return {"tokens": torch.tensor([[[float(len(caption))]] for caption in captions])}

    monkeypatch.setattr(HuggingFaceStream, "_next_row", counted)
    stream = read(saved / "parquet", "train", streaming=True, length=COUNT, shuffle_buffer=8)
    assert stream.several_captions
    settings: dict[str, Any] = {"identity": {}, "batch_size": 5, "shard_size": 16, "captions": 0}
    write_token_shards(tmp_path / "tokens", stream, encode, **settings)
    assert rows == list(range(COUNT))  # once, from its beginning
    tokens = TokenDataset(tmp_path / "tokens")
    numbers = [k for k in range(2, COUNT) if k % 5]
    assert tokens.keys == [stream.key(k - 2) for k in numbers]
    for place, k in enumerate(numbers):
        drawn = [tokens[Draw(place, 0, epoch)] for epoch in range(12)]
        assert {item["caption"] for item in drawn} == {f"number {k}", f"the {k}th"} == {*stream.captions(k - 2)}
        assert all(float(item["tokens"]) == len(item["caption"]) for item in drawn)
    # The pictures beside these tokens keep the stream's windows.
    assert isinstance(stream, HuggingFaceStream)
    order = stream.epoch_order(1, 0, 4, [k - 2 for k in numbers])
    assert order is not None and len(set(order.tolist())) == len(numbers) // 4 * 4
    windows = [(numbers[place] - 2) // 8 for place in order]
    assert windows == sorted(windows) and list(order) != sorted(order)
