from __future__ import annotations

import hashlib
import json
import pickle
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from textok_fast.config import DataConfig
from textok_fast.data import SCENE_SPLITS, SceneDataset, collate, contact_sheet, load_dataset, materialize
from textok_fast.data.scenes import PATTERNS, PLACES, is_held_out, pattern_mask, split_names
from textok_fast.data.shapes import ShapeLibrary
from textok_fast.data.sprites import PALETTE, Sprite, premultiplied
from textok_fast.errors import InputError

CONFIG = DataConfig(source="shapes", image_size=32, objects=24, held_out_objects=8, seed=3)


def combination(dataset: SceneDataset, index: int) -> frozenset[tuple[str, int]]:
    return frozenset((dataset.label_names[place.item], place.cell) for place in dataset.scene(index).placements)


def digest(indices: list[int], config: DataConfig = CONFIG) -> dict[str, list[str]]:
    result = {}
    for split in SCENE_SPLITS:
        dataset = load_dataset(config, split)
        seen = {}
        for index in indices:
            example = dataset[index]
            seen[index] = (
                f"{example.key} {example.label} {example.caption} {hashlib.sha256(example.image.tobytes()).hexdigest()}"
            )
        result[split] = [seen[index] for index in sorted(seen)]
    return result


def test_same_scenes_in_another_process_and_another_order() -> None:
    indices = list(range(12))
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import test_scenes; "
        "print(json.dumps(test_scenes.digest(list(range(11, -1, -1)))))"
    )
    package = Path(sys.modules["textok_fast"].__file__ or "").parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True, check=True, cwd=package
    )
    assert json.loads(done.stdout) == digest(indices)


def test_pinned_scene() -> None:
    """Scenes must not change from version to version: trained models and published numbers refer to it."""
    dataset = load_dataset(CONFIG, "train")
    assert isinstance(dataset, SceneDataset)
    assert [dataset.caption(dataset.scene(index)) for index in (0, 1, 999_999)] == [
        "red house top right; black square bottom left; purple background",
        "teal pentagon top right; yellow semicircle bottom left; blue arrow bottom right; gray and black checked background",
        "teal pentagon top left; orange arrow top right; pink triangle bottom left; orange and green striped background",
    ]


def test_seeds_and_splits_differ() -> None:
    first, other = (load_dataset(DataConfig(source="shapes", objects=0, seed=seed), "train") for seed in (0, 1))
    assert [first[i].caption for i in range(8)] != [other[i].caption for i in range(8)]
    assert digest([0])["train"] != digest([0])["composition"]


def test_pickled_copy_gives_the_same() -> None:
    dataset = load_dataset(CONFIG, "train")
    dataset[0]
    assert np.array_equal(pickle.loads(pickle.dumps(dataset))[5].image, dataset[5].image)


def test_splits_are_disjoint() -> None:
    train, composition, unseen = (load_dataset(CONFIG, split) for split in SCENE_SPLITS)
    assert isinstance(train, SceneDataset) and isinstance(composition, SceneDataset) and isinstance(unseen, SceneDataset)
    assert train.label_names == composition.label_names and len(train.label_names) == 24
    assert len(unseen.label_names) == 8 and not set(unseen.label_names) & set(train.label_names)
    trained = {combination(train, index) for index in range(4000)}
    held_out = {combination(composition, index) for index in range(400)}
    assert not trained & held_out
    assert {len(members) for members in held_out} == {1, 2, 3, 4}
    assert not any(map(is_held_out, trained)) and all(map(is_held_out, held_out))
    assert {name for members in trained for name, _ in members} == set(train.label_names)


def test_about_one_combination_in_ten_is_held_out() -> None:
    names = [f"object {number}" for number in range(2000)]
    alone = [[is_held_out([(name, cell)]) for cell in range(4)] for name in names]
    assert np.mean(alone) == pytest.approx(0.1, abs=0.012)
    assert max(map(sum, alone)) == 1  # every object stands alone somewhere in training
    pairs = [is_held_out([(names[k], k % 3), (names[k + 1], 3)]) for k in range(1999)]
    assert np.mean(pairs) == pytest.approx(0.1, abs=0.025)
    assert is_held_out([("a", 0), ("b", 2)]) == is_held_out([("b", 2), ("a", 0)])


def test_split_names_follow_the_seed_not_the_order_given() -> None:
    names = ShapeLibrary().names
    train, held_out = split_names(names, CONFIG)
    assert (train, held_out) == split_names(names[::-1], CONFIG)
    more, _ = split_names(names, DataConfig(source="shapes", objects=40, seed=3))
    assert more[:24] == train
    everything, rest = split_names(names, DataConfig(source="shapes", objects=0, held_out_objects=4))
    assert len(everything) == len(names) - 4 and len(rest) == 4


@settings(max_examples=40, deadline=None)
@given(index=st.integers(0, 10**9), least=st.integers(1, 4), extra=st.integers(0, 3))
def test_caption_is_true_and_clauses_are_finite(index: int, least: int, extra: int) -> None:
    most = min(4, least + extra)
    sprites = [Sprite(name, np.zeros((4, 4, 4), dtype=np.uint8)) for name in "abcdef"]
    dataset = SceneDataset(sprites, "train", 16, min_objects=least, max_objects=most)
    scene = dataset.scene(index)
    *objects, background = dataset.caption(scene).split("; ")
    assert least <= len(objects) <= most
    assert len({place.item for place in scene.placements}) == len(objects)
    assert set(objects) <= {f"{name} {place}" for name, place in product("abcdef", PLACES)}
    colors = "|".join(PALETTE)
    assert re.fullmatch(
        rf"({colors}) background|({colors}) (to ({colors}) gradient|and ({colors}) (striped|checked|dotted)) background",
        background,
    )
    cells = [PLACES.index(clause.split(" ", 1)[1]) for clause in objects]
    assert cells == sorted(set(cells))


@pytest.mark.parametrize("size", [16, 33, 64])
def test_objects_are_where_the_caption_says(size: int) -> None:
    """A magenta sprite changes the pixels of the named cell and no others."""
    magenta = np.zeros((40, 30, 4), dtype=np.uint8)
    magenta[...] = (255, 0, 255, 255)
    dataset = SceneDataset([Sprite("block", magenta)], "train", size, max_objects=1)
    seen = set()
    for index in range(30):
        example = dataset[index]
        place = example.caption.split("; ")[0].removeprefix("block ")
        row, column = divmod(PLACES.index(place), 2)
        drawn = (example.image == (255, 0, 255)).all(axis=-1)  # (S, S)
        ys, xs = np.nonzero(drawn)
        assert drawn.sum() >= 0.2 * (size / 2) ** 2
        half = size / 2
        assert row * half - 0.5 <= ys.min() and ys.max() + 1 <= (row + 1) * half + 0.5
        assert column * half - 0.5 <= xs.min() and xs.max() + 1 <= (column + 1) * half + 0.5
        background = dataset._render_background(dataset.scene(index).background)
        assert np.array_equal(example.image[~drawn], background[~drawn])
        seen.add(place)
    assert len(seen) >= 3


def test_blending_matches_the_formula() -> None:
    generator = np.random.default_rng(0)
    sprite = Sprite("noise", generator.integers(0, 256, (50, 40, 4), dtype=np.uint8))
    dataset = SceneDataset([sprite], "train", 64, max_objects=1)
    scene = dataset.scene(0)
    image = dataset.render(scene).astype(np.float64)
    under = dataset._render_background(scene.background).astype(np.float64)
    (size,) = {key[1] for key in dataset._resized}
    over = premultiplied(sprite, size).astype(np.float64)
    expected_colors = over[..., :3]
    changed = np.nonzero((image != under).any(axis=-1))
    top, left = changed[0].min(), changed[1].min()
    height, width = over.shape[:2]
    assert (changed[0].max() - top, changed[1].max() - left) == (height - 1, width - 1)
    region = under[top : top + height, left : left + width]
    expected = expected_colors + region * (1 - over[..., 3:] / 255)
    assert np.abs(image[top : top + height, left : left + width] - expected).max() <= 0.5 + 1e-9


def test_transparent_pixels_leave_no_fringe() -> None:
    picture = np.zeros((64, 64, 4), dtype=np.uint8)
    picture[..., :3] = (0, 255, 0)  # an invisible green
    picture[16:48, 16:48] = (255, 0, 0, 255)
    small = premultiplied(Sprite("red", picture), 15)
    assert small[..., 1].max() == 0 and (small[..., :3] <= small[..., 3:]).all()


def test_background_colors_are_those_named() -> None:
    dataset = load_dataset(DataConfig(**{**vars(CONFIG), "image_size": 64}), "train")
    assert isinstance(dataset, SceneDataset)
    seen = set()
    for index in range(60):
        background = dataset.scene(index).background
        pixels = dataset._render_background(background).reshape(-1, 3).astype(int)
        for color in background.colors:
            nearest = np.abs(pixels - list(PALETTE.values())[color]).max(axis=1).min()
            assert nearest <= (8 if background.pattern != "gradient" else 16)
        seen.add(background.pattern)
    assert seen == set(PATTERNS)


@pytest.mark.parametrize("pattern", PATTERNS[1:])
def test_pattern_is_the_same_at_any_resolution(pattern: str) -> None:
    fine = pattern_mask(pattern, 128).reshape(32, 4, 32, 4).mean(axis=(1, 3))
    assert np.abs(fine - pattern_mask(pattern, 32)).max() <= (25 if pattern == "dotted" else 1)


def test_same_scene_at_any_resolution() -> None:
    small, large = (load_dataset(DataConfig(**{**vars(CONFIG), "image_size": size}), "train") for size in (32, 128))
    for index in range(6):
        assert small[index].caption == large[index].caption
        reduced = large[index].image.reshape(32, 4, 32, 4, 3).mean(axis=(1, 3))
        assert np.abs(reduced - small[index].image).mean() < 16


def test_batch_and_labels() -> None:
    dataset = load_dataset(CONFIG, "object")
    batch = collate([dataset[index] for index in range(5)])
    assert batch["images"].shape == (5, 32, 32, 3) and batch["images"].dtype == torch.uint8
    assert batch["labels"].dtype == torch.int64 and len(set(batch["keys"])) == 5
    for caption, label in zip(batch["captions"], batch["labels"].tolist(), strict=True):
        assert caption.startswith(dataset.label_names[label] + " ")


def test_captions_by_label() -> None:
    dataset = load_dataset(CONFIG, "composition")
    captions = dataset.captions_by_label(3)
    assert set(captions) == set(range(24))
    for label, texts in captions.items():
        assert len(texts) == len(set(texts)) == 3
        assert all(text.startswith(dataset.label_names[label] + " ") for text in texts)


def test_length_and_index() -> None:
    dataset = load_dataset(CONFIG, "train", length=7)
    assert len(dataset) == 7 and len(list(dataset)) == 7
    assert dataset[-1].key == dataset[6].key == "train-0000006"
    with pytest.raises(IndexError, match="7"):
        dataset[7]
    assert len(load_dataset(CONFIG, "train")) == 1_000_000
    assert "Apache-2.0" in dataset.describe() and "24" in dataset.describe()


@pytest.mark.parametrize(
    ("changes", "split", "message"),
    [
        ({}, "test", "splits train, composition, object"),
        ({"objects": 10_000}, "train", "has 204 objects"),
        ({"objects": -1}, "train", "0 or more"),
        ({"held_out_objects": 0}, "object", "held_out_objects"),
        ({"scene_objects": 5}, "train", "1 to 4"),
        ({"min_scene_objects": 3, "scene_objects": 2}, "train", "3 to 2"),
        ({"objects": 2, "min_scene_objects": 3}, "train", "needs as many"),
        ({"image_size": 4}, "train", "at least 8"),
    ],
)
def test_bad_settings(changes: dict[str, int], split: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_dataset(DataConfig(**{**vars(CONFIG), **changes}), split)


def test_no_scene_of_a_split() -> None:
    never = next(f"n{k}" for k in range(50) if not any(is_held_out([(f"n{k}", cell)]) for cell in range(4)))
    with pytest.raises(InputError, match="more objects"):
        SceneDataset([Sprite(never, np.zeros((4, 4, 4), dtype=np.uint8))], "composition", 16)


def test_the_content_hash_tells_other_objects_and_other_pictures_of_them() -> None:
    def content(sprites: list[Sprite], split: str = "train") -> str:
        return SceneDataset(sprites, split, 16).content_hash()

    sprites = [Sprite(name, np.full((8, 8, 4), 255, dtype=np.uint8)) for name in ("cow", "dog", "star")]
    redrawn = [*sprites[:2], Sprite("star", np.full((8, 8, 4), 254, dtype=np.uint8))]
    renamed = [*sprites[:2], Sprite("moon", sprites[2].image)]
    assert content(sprites) == content(list(sprites))
    assert len({content(found) for found in (sprites, redrawn, renamed, sprites[:2])}) == 4


def test_contact_sheet_shows_the_pictures() -> None:
    dataset = load_dataset(CONFIG, "train")
    sheet = np.asarray(contact_sheet(dataset, 3))
    assert np.array_equal(sheet[8 : 8 + 160 : 5, 8 : 8 + 160 : 5], dataset[0].image)
    assert (sheet[8 + 160 + 2 : 8 + 160 + 16, 8:168] < 128).any()  # some text below
    with pytest.raises(InputError, match="n=0"):
        contact_sheet(dataset, 0)


def test_materialize_resumes_and_reads_back(tmp_path: Path) -> None:
    dataset = load_dataset(CONFIG, "train")
    target = tmp_path / "out"
    assert materialize(dataset, target, 4) == 4
    kept = (target / "train-0000000.png").stat().st_mtime_ns
    (target / "train-0000002.png").unlink()
    assert materialize(dataset, target, 5) == 2
    assert (target / "train-0000000.png").stat().st_mtime_ns == kept
    back = load_dataset(DataConfig(source="folder", path=str(target), image_size=32), "all")
    assert [example.key for example in back] == [f"train-{k:07d}" for k in range(5)]
    assert all(np.array_equal(a.image, dataset[k].image) and a.caption == dataset[k].caption for k, a in enumerate(back))
    with pytest.raises(InputError, match="another data set"):
        materialize(load_dataset(DataConfig(**{**vars(CONFIG), "seed": 4}), "train"), target, 2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(InputError, match="not empty"):
        materialize(dataset, tmp_path / "mine", 1)
