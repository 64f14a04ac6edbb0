"""ADM's .npz batches both ways, and pictures in files."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from textok_fast.data import DataConfig, load_dataset, pack, write_shards
from textok_fast.errors import InputError
from textok_fast.evaluation.batches import SPATIAL_STATISTICS, NpzPictures, open_pictures, write_npz
from textok_fast.evaluation.inception import PUBLISHED_SHA256


def pictures(count: int, size: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def adm_read(path: Path, batch: int) -> list[np.ndarray]:
    """As ADM's evaluator streams ``arr_0`` out of a file: header by version, then bytes."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        assert not fortran and not dtype.hasobject
        read = []
        for first in range(0, shape[0], batch):
            count = min(batch, shape[0] - first)
            data = file.read(count * int(np.prod(shape[1:])) * dtype.itemsize)
            read.append(np.frombuffer(data, dtype).reshape(count, *shape[1:]))
        assert file.read() == b""
        return read


def test_what_is_written_is_what_the_published_evaluator_reads(tmp_path: Path) -> None:
    given = pictures(7)
    statistics = {"mu": np.arange(4.0), "sigma": np.eye(4), "mu_s": np.ones(3), "sigma_s": np.eye(3, dtype=np.float32)}
    write_npz(tmp_path / "new" / "batch.npz", given.shape, iter([given[:3], given[3:]]), statistics)
    path = tmp_path / "new" / "batch.npz"
    np.testing.assert_array_equal(np.concatenate(adm_read(path, 2)), given)
    with np.load(path) as archive:
        assert sorted(archive.files) == ["arr_0", "mu", "mu_s", "sigma", "sigma_s"]
        for name, array in {**statistics, "arr_0": given}.items():
            np.testing.assert_array_equal(archive[name], array)
    found = NpzPictures(path)
    assert found.inception_sha256 == PUBLISHED_SHA256
    spatial = found.statistics(SPATIAL_STATISTICS)
    assert spatial is not None and spatial.covariance.dtype == np.float64
    np.testing.assert_array_equal(spatial.covariance, np.eye(3))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_numpys_batches_are_read(tmp_path: Path, save: Any) -> None:
    given = pictures(5)
    save(tmp_path / "batch.npz", mu=np.zeros(2), sigma=np.eye(2), arr_0=given)
    found = NpzPictures(tmp_path / "batch.npz")
    assert (len(found), found.shape) == (5, (12, 12, 3))
    assert isinstance(found._array, np.memmap) == (save is np.savez)  # ten gigabytes are not read at once
    np.testing.assert_array_equal(found.read(1, 4).pictures, given[1:4])
    assert found.statistics() is not None and found.statistics(SPATIAL_STATISTICS) is None


def test_a_reference_of_statistics_alone(tmp_path: Path) -> None:
    np.savez(tmp_path / "reference.npz", mu=np.zeros(2), sigma=np.eye(2))
    found = NpzPictures(tmp_path / "reference.npz")
    assert len(found) == 0 and not found.has_pictures
    with pytest.raises(InputError, match="holds no pictures"):
        open_pictures(tmp_path / "reference.npz")


def test_batches_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "batch.npz"
    for data in (b"", b"no archive"):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"cannot read .* as an \.npz batch"):
            NpzPictures(path)
    for array in (pictures(3).astype(np.float32), pictures(3).transpose(0, 3, 1, 2), pictures(3)[..., :1], pictures(3)[:0]):
        np.savez(path, array)
        with pytest.raises(InputError, match="must be uint8"):
            NpzPictures(path)
    np.savez(path, np.array([{}], dtype=object))
    with pytest.raises(InputError, match="plain array|must be uint8"):
        NpzPictures(path)
    np.savez(path, pictures(2), mu=np.zeros(2), sigma=np.eye(3))
    with pytest.raises(InputError, match="no mean and covariance"):
        NpzPictures(path).statistics()
    with pytest.raises(InputError, match="no pictures at"):
        open_pictures(tmp_path / "nowhere")


def test_a_batch_that_does_not_add_up_is_not_left(tmp_path: Path) -> None:
    given = pictures(4)
    for parts in ([given[:3]], [given, given], [given.astype(np.float32)], [given[:, :5]]):
        with pytest.raises(InputError):
            write_npz(tmp_path / "batch.npz", given.shape, parts)
    assert not list(tmp_path.iterdir())


# -- files ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "photos"
    path.mkdir()
    for i, picture in enumerate(pictures(5)):
        Image.fromarray(picture).save(path / f"{i}.png")
    (path / "1.txt").write_text("a caption")
    return path


def test_a_folder_in_the_order_of_its_keys(folder: Path) -> None:
    found = open_pictures(folder)
    batch = found.read(0, 5)
    np.testing.assert_array_equal(batch.pictures, pictures(5))  # at their own size nothing is resampled
    assert (batch.captions, found.shape) == (["", "a caption", "", "", ""], (12, 12, 3))
    first = open_pictures(folder, count=2)
    assert len(first) == 2 and len(first.read(0, 5).pictures) == 2 and first.identity != found.identity
    assert open_pictures(folder, image_size=8).read(2, 4).pictures.shape == (2, 8, 8, 3)
    with pytest.raises(InputError, match="6 pictures were asked for, of a set of 5"):
        open_pictures(folder, count=6)


def adms_center_crop(file: Path, size: int) -> np.ndarray:
    """ADM's data loader written out: openai/guided-diffusion, guided_diffusion/image_datasets.py, ``center_crop_arr``."""
    picture = Image.open(file).convert("RGB")
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.size[0] // 2, picture.size[1] // 2), resample=Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.size[0] * scale), round(picture.size[1] * scale)), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("form", ["folder", "shards"])
def test_pictures_are_cropped_as_adms_reference_was(tmp_path: Path, form: str) -> None:
    sizes = [(75, 50), (31, 97), (16, 16), (33, 32), (9, 40), (64, 64), (129, 67)]
    (tmp_path / "photos").mkdir()
    for i, (width, height) in enumerate(sizes):
        noise = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise if i % 2 else noise[..., 0]).save(tmp_path / "photos" / f"{i}.png")  # gray ones too
    where = tmp_path / "photos"
    if form == "shards":
        where = tmp_path / "shards"
        pack(load_dataset(DataConfig(source="folder", path=str(tmp_path / "photos")), "all", need_captions=False), where)
    found = {crop: open_pictures(where, 16, crop=crop) for crop in ("center", "adm")}
    wanted = np.stack([adms_center_crop(tmp_path / "photos" / f"{i}.png", 16) for i in range(len(sizes))])
    np.testing.assert_array_equal(found["adm"].read(0, len(sizes)).pictures, wanted)
    assert (found["center"].read(0, len(sizes)).pictures != wanted).any((1, 2, 3)).sum() == len(sizes) - 1  # but the 16 x 16
    assert found["center"].identity != found["adm"].identity and found["center"].identity == open_pictures(where, 16).identity
    with pytest.raises(InputError, match="center or adm, got 'random'"):
        open_pictures(where, 16, crop="random")  # type: ignore[arg-type]


def test_other_pictures_under_the_old_names_are_other_pictures(folder: Path) -> None:
    before = open_pictures(folder).identity
    assert open_pictures(folder).identity == before
    changed = folder / "3.png"
    stamp = changed.stat().st_mtime_ns
    data = io.BytesIO()
    Image.fromarray(pictures(1, seed=9)[0]).save(data, "PNG")
    changed.write_bytes(data.getvalue())
    os.utime(changed, ns=(stamp, stamp + 1))
    assert open_pictures(folder).identity != before


def test_what_sample_wrote_comes_with_its_captions(folder: Path) -> None:
    listed = [{"image": f"{i}.png", "caption": f"number {i}"} for i in (3, 0, 4)]
    (folder / "samples.json").write_text(json.dumps({"samples": listed}))
    found = open_pictures(folder)
    batch = found.read(1, 3)
    np.testing.assert_array_equal(batch.pictures, pictures(5)[[0, 4]])
    assert (len(found), batch.captions) == (3, ["number 0", "number 4"])
    (folder / "0.png").unlink()
    with pytest.raises(InputError, match=r"lacks 0\.png"):
        open_pictures(folder)
    (folder / "samples.json").write_text("{}")
    with pytest.raises(InputError, match="cannot read"):
        open_pictures(folder)


def test_shards(folder: Path, tmp_path: Path) -> None:
    dataset = load_dataset(DataConfig(source="folder", path=str(folder), image_size=12), "all", need_captions=False)
    write_shards(dataset, tmp_path / "shards", shard_size=3)
    with pytest.raises(InputError, match="--image-size"):
        open_pictures(tmp_path / "shards")
    found = open_pictures(tmp_path / "shards", image_size=12)
    assert (len(found), found.shape) == (5, (12, 12, 3))
    np.testing.assert_array_equal(found.read(0, 5).pictures, pictures(5))
