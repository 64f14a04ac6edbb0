from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from textok_fast.config import DataConfig
from textok_fast.data import CaptionedImages, Example, load_dataset, write_shards
from textok_fast.data.webdataset import find_shards
from textok_fast.errors import InputError


def read(path: object, split: str = "all", size: int = 8) -> CaptionedImages:
    return load_dataset(DataConfig(source="webdataset", path=str(path), image_size=size), split)


def examples(count: int = 7) -> list[Example]:
    pixels = np.random.default_rng(1).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return [Example(pixels[k], f"caption {k} \u00e9", k % 2, f"key-{k}") for k in range(count)]


def encoded(kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 77, dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_round_trip(tmp_path: Path) -> None:
    written = write_shards(iter(examples()), tmp_path / "shards", 3, label_names=["even", "odd"])
    assert [path.name for path in written] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert sorted((tmp_path / "shards").iterdir()) == written  # nothing unfinished beside them
    dataset = read(tmp_path / "shards")
    assert len(dataset) == 7 and dataset.skipped == {} and dataset.label_names == ["even", "odd"]
    for original, example in zip(examples(), dataset, strict=True):
        assert np.array_equal(example.image, original.image)
        assert (example.caption, example.label) == (original.caption, original.label)
        assert example.key.endswith(original.key)
    assert pickle.loads(pickle.dumps(dataset))[3].caption == dataset[3].caption
    again = write_shards(examples(), tmp_path / "again", 3, label_names=["even", "odd"])
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]
    train, validation = ({e.key for e in read(tmp_path / "shards", split)} for split in ("train", "validation"))
    assert not train & validation and len(train | validation) == 7


def test_the_webdataset_library_reads_our_shards(tmp_path: Path) -> None:
    library = pytest.importorskip("webdataset")
    (shard,) = write_shards(examples(), tmp_path, 10)
    samples = list(library.WebDataset(str(shard), shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [f"key-{k}" for k in range(7)]
    assert all(np.array_equal(s["png"], e.image) and s["txt"] == e.caption for s, e in zip(samples, examples(), strict=True))


def test_names_with_dots_stay_whole_in_shards(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    names = ["v1.0.png", "v1.5.png", "v2.png"]
    for name in names:
        write_image(tmp_path / "pictures" / name).with_suffix(".txt").write_text(name)
    folder = load_dataset(DataConfig(source="folder", path=str(tmp_path / "pictures"), image_size=8), "all")
    write_shards(folder, tmp_path / "shards")
    assert sorted(example.caption for example in read(tmp_path / "shards")) == names


def test_shards_are_not_overwritten(tmp_path: Path) -> None:
    (shard,) = write_shards(examples(2), tmp_path, 10)
    before = shard.read_bytes()
    with pytest.raises(InputError, match="has shards already"):
        write_shards(examples(5), tmp_path, 10)
    assert shard.read_bytes() == before


def test_interrupted_writer_leaves_whole_shards_only(tmp_path: Path) -> None:
    def failing() -> object:
        yield from examples(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(failing(), tmp_path, 2)  # type: ignore[arg-type]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["shard-000000.tar", "shard-000001.tar"]
    assert len(read(tmp_path)) == 4


def test_broken_members_are_counted(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        {
            "good.png": encoded(), "good.txt": b"a good one",
            "photo.JPG": encoded("JPEG"), "photo.json": json.dumps({"caption": "from json", "label": "x"}).encode(),
            "web.webp": encoded("WEBP"), "web.json": b"{broken", "web.txt": b"text wins",
            "corrupt.png": encoded()[:30], "corrupt.txt": b"corrupt",
            "silent.png": encoded(),
            "empty.png": encoded(), "empty.txt": b"  \n",
            "malformed.png": encoded(), "malformed.json": b"[1, 2]",
            "alone.txt": b"no picture",
            "deep/er/good.png": encoded(), "deep/er/good.txt": b"another folder",
        },
    )  # fmt: skip
    (tmp_path / "b.tar").write_bytes(b"this is no tar file" * 100)
    dataset = read(tmp_path / "*.tar")
    assert sorted(example.caption for example in dataset) == ["a good one", "another folder", "from json", "text wins"]
    assert dataset.skipped == {"corrupt image": 1, "missing caption": 3, "missing image": 1, "unreadable shard": 1}
    assert len({example.key for example in dataset}) == 4 and dataset.label_names == ["x"]


def test_truncated_shard_keeps_its_complete_members(tmp_path: Path) -> None:
    (shard,) = write_shards(examples(), tmp_path, 10)
    data = shard.read_bytes()
    with tarfile.open(shard) as archive:
        offset = archive.getmember("key-5.png").offset_data
    shard.write_bytes(data[: offset + 10])
    dataset = read(shard)
    assert [example.caption for example in dataset] == [e.caption for e in examples(5)]
    assert sum(dataset.skipped.values()) >= 1


def test_equal_keys_in_two_shards_stay_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_tar(tmp_path / f"{name}.tar", {"0.png": encoded(), "0.txt": name.encode()})
    assert sorted((e.key, e.caption) for e in read(tmp_path)) == [("one_0", "one"), ("two_0", "two")]


def test_patterns(tmp_path: Path) -> None:
    for name in ("s-008", "s-009", "s-010", "s-011", "extra"):
        write_tar(tmp_path / f"{name}.tar", {})
    names = lambda pattern: [Path(path).stem for path in find_shards(str(tmp_path / pattern))]  # noqa: E731
    assert names("s-{008..010}.tar") == ["s-008", "s-009", "s-010"]
    assert names("{s-0{08,11},extra}.tar") == ["extra", "s-008", "s-011"]
    assert names("s-*.tar") == ["s-008", "s-009", "s-010", "s-011"]
    assert len(names("")) == 5 and names("t-{0..3}.tar") == []
    with pytest.raises(InputError, match=r"no \.tar shard"):
        read(tmp_path / "none-*.tar")
    with pytest.raises(InputError, match="no picture with a caption"):
        read(tmp_path / "extra.tar")
