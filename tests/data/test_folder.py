from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from textok_fast.config import DataConfig
from textok_fast.data import CaptionedImages, load_dataset
from textok_fast.data.files import check_image, decode_image, unique_keys
from textok_fast.errors import InputError

COLORS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 230)}


def read(folder: Path, split: str = "all", size: int = 8) -> CaptionedImages:
    return load_dataset(DataConfig(source="folder", path=str(folder), image_size=size), split)


@pytest.fixture
def pictures(tmp_path: Path, write_image: Callable[..., Path]) -> Path:
    """Three good pictures, a truncated PNG, an empty file, a text named .jpg, and one without a caption."""
    folder = tmp_path / "pictures"
    write_image(folder / "red.png", COLORS["red"])
    write_image(folder / "sub" / "green.png", COLORS["green"])
    write_image(folder / "blue.bmp", COLORS["blue"])
    good = write_image(folder / "cut.png", (1, 2, 3), (64, 64)).read_bytes()
    (folder / "cut.png").write_bytes(good[: len(good) - 14])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no picture at all")
    write_image(folder / "silent.png", (9, 9, 9))
    return folder


FILES = {
    "red.png": "a  red card\n",
    "sub/green.png": "a green card",
    "blue.bmp": "a blue card, \u00fcber",
    "cut.png": "cut",
    "empty.png": "empty",
    "text.jpg": "text",
}


def write_captions(folder: Path, form: str) -> None:
    if form == "txt":
        for name, caption in FILES.items():
            (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
        (folder / "silent.txt").write_text(" \n")
        return
    rows = [{"file_name": name, "caption": caption, "label": name[:1]} for name, caption in FILES.items()]
    rows += [
        {"file_name": "silent.png", "caption": "", "label": "s"},
        {"file_name": "gone.png", "caption": "gone", "label": "g"},
    ]
    rows += [{"file_name": "../outside.png", "caption": "not ours", "label": "o"}]
    if form == "jsonl":
        text = "\n".join(json.dumps(row) for row in rows) + "\n{broken\n[1]\n\n"
        (folder / "captions.jsonl").write_text(text)
    elif form == "csv":
        with (folder / "captions.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "caption", "label"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "captions.parquet")


@pytest.mark.parametrize("form", ["txt", "jsonl", "csv", "parquet"])
def test_every_form_of_captions(pictures: Path, form: str) -> None:
    (pictures.parent / "outside.png").write_bytes((pictures / "red.png").read_bytes())
    write_captions(pictures, form)
    dataset = read(pictures)
    found = {example.caption: example for example in dataset}
    assert set(found) == {"a red card", "a green card", "a blue card, \u00fcber"}
    for caption, example in found.items():
        color = COLORS[caption.split()[1]]
        assert example.image.shape == (8, 8, 3) and example.image.dtype == np.uint8
        assert (example.image == color).all()
    expected = {"corrupt image": 3, "missing caption": 1}
    if form != "txt":
        expected["missing image"] = 2
        assert dataset.label_names == ["b", "r", "s"]
        assert {e.caption.split()[1]: dataset.label_names[e.label] for e in dataset} == {"red": "r", "green": "s", "blue": "b"}
        assert dataset.captions_by_label(1)[dataset.label_names.index("r")] == ["a red card"]
    else:
        assert dataset.label_names == [] and {example.label for example in dataset} == {0}
        assert sorted(dataset.captions_by_label(2)[0]) == ["a blue card, \u00fcber", "a red card"]
    if form == "jsonl":
        expected["malformed row"] = 2
    assert dataset.skipped == expected
    assert "3 corrupt image" in dataset.describe()


def test_pictures_without_a_row_are_counted(pictures: Path) -> None:
    (pictures / "captions.jsonl").write_text(json.dumps({"file_name": "red.png", "caption": "red"}))
    assert read(pictures).skipped == {"missing caption": 6}


def test_unreadable_caption_is_skipped(pictures: Path) -> None:
    write_captions(pictures, "txt")
    (pictures / "red.txt").write_bytes(b"\xff\xfe\xfa")
    dataset = read(pictures)
    assert len(dataset) == 2 and dataset.skipped["unreadable caption"] == 1


def test_validation_is_a_stable_twentieth(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    for number in range(120):
        write_image(tmp_path / f"{number}.png", (number, 0, 0), (4, 4)).with_suffix(".txt").write_text(f"number {number}")
    train, validation, everything = ({e.key for e in read(tmp_path, split)} for split in ("train", "validation", "all"))
    assert not train & validation and train | validation == everything and len(everything) == 120
    assert 1 <= len(validation) <= 16
    (tmp_path / f"{sorted(train)[0]}.png").unlink()
    assert {example.key for example in read(tmp_path, "validation")} == validation


def test_few_pictures_still_have_both_splits(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    for number in range(2):
        write_image(tmp_path / f"{number}.png").with_suffix(".txt").write_text("card")
    assert len(read(tmp_path, "train")) == len(read(tmp_path, "validation")) == 1
    (tmp_path / "0.png").unlink()
    with pytest.raises(InputError, match="too few"):
        read(tmp_path, "train")


def test_corrupt_pixels_found_late_are_replaced_and_counted(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    for number in range(3):
        write_image(tmp_path / f"{number}.png", (10 * number, 0, 0)).with_suffix(".txt").write_text(f"number {number}")
    dataset = read(tmp_path)
    (tmp_path / "1.png").write_bytes(b"gone bad")
    assert [dataset[index].caption for index in (0, 1, 2, 1)] == ["number 0", "number 2", "number 2", "number 2"]
    assert dataset.skipped == {"corrupt image": 1}
    for number in range(3):
        (tmp_path / f"{number}.png").unlink()
    with pytest.raises(InputError, match="any more"):
        dataset[0]


def test_truncated_jpeg_is_found(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / "noise.jpg"
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    check_image(data)
    with pytest.raises(OSError):
        check_image(data[: len(data) // 2])


def test_decoding(tmp_path: Path) -> None:
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (decode_image((tmp_path / "wide.png").read_bytes(), 10) == 255).all()  # the center square
    clear = np.zeros((6, 6, 4), dtype=np.uint8)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert (decode_image((tmp_path / "clear.png").read_bytes(), 6) == 255).all()  # on white
    deep = np.full((6, 6), 32768, dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert (decode_image((tmp_path / "deep.png").read_bytes(), 6) == 127).all()  # 16 bits
    turned = np.zeros((8, 8, 3), dtype=np.uint8)
    turned[:4] = 200
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(turned).save(tmp_path / "turned.png", exif=exif)
    upright = decode_image((tmp_path / "turned.png").read_bytes(), 8)
    assert (upright[:4] == 0).all() and (upright[4:] == 200).all()


def test_keys_are_safe_distinct_and_stable() -> None:
    names = ["a/b.png", "a_b.png", "A_B.jpg", "c d.png", "..png", "x.png", "x.png", "v1.2/photo.final.png"]
    keys = unique_keys(names)
    assert len({key.lower() for key in keys}) == len(names)
    assert all(set(key) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-") for key in keys)
    assert keys[3] == "c_d" and keys[-1] == "v1_2_photo_final"
    assert dict(zip(names[:4], keys[:4], strict=True)) == dict(zip(names[3::-1], unique_keys(names[3::-1]), strict=True))


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        (["10", "9", "2"], ["2", "9", "10"]),
        (["1", "01", "0"], ["0", "01", "1"]),
        (["10", "9", "cat"], ["10", "9", "cat"]),
        (["\u00b2", "1"], ["1", "\u00b2"]),
    ],
)
def test_classes_are_in_the_order_of_their_numbers_or_names(
    tmp_path: Path, write_image: Callable[..., Path], labels: list[str], wanted: list[str]
) -> None:
    rows = [{"file_name": f"{k}.png", "caption": f"card {k}", "label": label} for k, label in enumerate([*labels, ""])]
    for row in rows:
        write_image(tmp_path / str(row["file_name"]))
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = read(tmp_path)
    assert dataset.label_names == wanted
    found = {example.caption: dataset.label_names[example.label] for example in dataset}
    assert found == {str(row["caption"]): row["label"] or wanted[0] for row in rows}
    assert f"1 without a label count as {wanted[0]!r}" in dataset.describe()


def test_the_content_hash_tells_other_captions_keys_and_labels(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    def content(folder: str, **row: str) -> str:
        write_image(tmp_path / folder / "a.png")
        write_image(tmp_path / folder / "b.png")
        rows = [{"file_name": "a.png", "caption": "one"}, {"file_name": "b.png", "caption": "two", "label": "x", **row}]
        (tmp_path / folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return read(tmp_path / folder).content_hash()

    assert content("first") == content("copy")
    changed = [content("caption", caption="three"), content("label", label="y"), content("fewer", file_name="gone.png")]
    assert len({content("first"), *changed}) == 4


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ("", "has the columns none"),
        ("name,text\na,b\n", "lacks file_name and caption"),
        ("file_name,caption\n", "no picture with a"),
    ],
)
def test_bad_csv(pictures: Path, captions: str, message: str) -> None:
    (pictures / "captions.csv").write_text(captions)
    with pytest.raises(InputError, match=message):
        read(pictures)


def test_unusable_folders(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(InputError, match="no picture with a caption; skipped: 7 missing caption"):
        read(pictures)
    (tmp_path / "void").mkdir()
    with pytest.raises(InputError, match="no picture with a caption"):
        read(tmp_path / "void")
    with pytest.raises(InputError, match="not a directory"):
        read(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"needs data\.path"):
        load_dataset(DataConfig(source="folder"), "train")
    write_captions(pictures, "txt")
    with pytest.raises(InputError, match="splits train, validation, all"):
        read(pictures, "composition")
    (pictures / "captions.parquet").write_bytes(b"PAR1 but not really")
    pytest.importorskip("pyarrow")
    with pytest.raises(InputError, match="cannot read the captions"):
        read(pictures)
