"""Sets of pictures to evaluate: ADM's ``.npz`` batches, read and written, folders, shards, and what a pipeline makes.

A batch is ``arr_0`` uint8 (B, H, W, 3). A reference batch also holds ``mu`` (2048,), ``sigma`` (2048, 2048), ``mu_s`` (2023,)
and ``sigma_s`` (2023, 2023): mean and covariance of pool_3 and of the spatial features over the whole data set, of which
``arr_0`` is 10,000 pictures. Pictures are read and written in parts, so that 50,000 need no memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
from PIL import Image

from textok_fast.config import DataConfig
from textok_fast.data import load_dataset
from textok_fast.data.base import CaptionedImages
from textok_fast.data.files import IMAGE_SUFFIXES
from textok_fast.data.webdataset import find_shards
from textok_fast.errors import InputError
from textok_fast.evaluation.fidelity import Gaussian
from textok_fast.evaluation.inception import PUBLISHED_SHA256
from textok_fast.files import write_atomically

PICTURES, STATISTICS, SPATIAL_STATISTICS = "arr_0", ("mu", "sigma"), ("mu_s", "sigma_s")
PictureCrop = Literal["center", "adm"]  # of a data configuration's crops those without chance
READERS = min(8, os.cpu_count() or 1)  # threads that decode pictures


class Batch(NamedTuple):
    """Some pictures of a set."""

    pictures: np.ndarray  # uint8 (n, H, W, 3)
    captions: list[str] | None  # n, where the set has captions


class Pictures(Protocol):
    """A set of pictures of one size, by index. Reading it twice gives the same."""

    identity: dict[str, Any]  # what tells it from other sets, JSON-ready: results of another are not taken for its own

    shape: tuple[int, int, int]  # (H, W, 3)

    def __len__(self) -> int: ...

    def read(self, first: int, last: int) -> Batch:
        """The pictures ``first`` to ``last`` - 1."""
        ...


# -- ADM's batches ----------------------------------------------------------------------------------------------------------


class NpzPictures:
    """A batch, left on the disk where it is not compressed. InputError for a file whose ``arr_0`` is no uint8 (B, H, W, 3)."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                self.names = {name.removesuffix(".npy") for name in archive.namelist()}
                array = _member(self.path, archive) if PICTURES in self.names else None
        except (OSError, zipfile.BadZipFile, ValueError, struct.error) as error:
            raise InputError(f"cannot read {path} as an .npz batch: {error}") from None
        if array is not None and (array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8 or 0 in array.shape):
            raise InputError(f"{path}: {PICTURES} must be uint8 (B, H, W, 3), got {array.dtype} {array.shape}")
        self._array = array
        self.identity = {"npz": _stamps([self.path])}
        self.shape = (0, 0, 3) if array is None else (array.shape[1], array.shape[2], 3)

    @property
    def has_pictures(self) -> bool:
        """Whether there is an ``arr_0``: a reference of statistics alone has none."""
        return self._array is not None

    def __len__(self) -> int:
        return 0 if self._array is None else len(self._array)

    def read(self, first: int, last: int) -> Batch:
        if self._array is None:
            raise InputError(f"{self.path} has no {PICTURES}: it holds no pictures")
        return Batch(np.array(self._array[first:last]), None)

    @property
    def inception_sha256(self) -> str:
        """Of which Inception the statistics are; batches that do not say so are ADM's, of the published one."""
        if "inception_sha256" not in self.names:
            return PUBLISHED_SHA256
        return self._text("inception_sha256")

    @property
    def crop(self) -> str:
        """How its pictures were cropped; "" for a batch that does not say so."""
        return self._text("crop") if "crop" in self.names else ""

    def _text(self, name: str) -> str:
        with np.load(self.path, allow_pickle=False) as archive:
            return str(archive[name])

    def statistics(self, names: tuple[str, str] = STATISTICS) -> Gaussian | None:
        """Mean and covariance by their names in the file; None where it has none."""
        if not set(names) <= self.names:
            return None
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                mean, covariance = (archive[name].astype(np.float64) for name in names)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(f"cannot read {' and '.join(names)} in {self.path}: {error}") from None
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise InputError(
                f"{self.path}: {names[0]} {mean.shape} and {names[1]} {covariance.shape} are no mean and covariance"
            )
        return Gaussian(mean, covariance)


def write_npz(
    path: Path, shape: Sequence[int], pictures: Iterable[np.ndarray], statistics: Mapping[str, np.ndarray] | None = None
) -> None:
    """Writes ``arr_0`` uint8 of ``shape`` (B, H, W, 3) out of parts (n, H, W, 3), and ``statistics`` by name; atomically.

    InputError for parts that do not add up to ``shape``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(target: Path) -> None:
        written = 0
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:  # as numpy.savez does
            with archive.open(f"{PICTURES}.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
                np.lib.format.write_array_header_1_0(file, header)
                for part in pictures:
                    if part.dtype != np.uint8 or part.shape[1:] != tuple(shape)[1:]:
                        raise InputError(f"a batch of {tuple(shape)} takes no pictures {part.dtype} {part.shape}")
                    file.write(np.ascontiguousarray(part).data)
                    written += len(part)
            for name, array in (statistics or {}).items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
        if written != shape[0]:
            raise InputError(f"a batch of {shape[0]} pictures was given {written}")

    write_atomically(path, write)


def _member(path: Path, archive: zipfile.ZipFile) -> np.ndarray:
    """``arr_0``, mapped where it is stored as it is, else read."""
    info = archive.getinfo(f"{PICTURES}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        with archive.open(info) as member:
            compressed: np.ndarray = np.lib.format.read_array(member, allow_pickle=False)
            return compressed
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)  # of the local file header; the lengths of name and extra field are its last two numbers
        name_length, extra_length = struct.unpack("<2H", header[26:30])
        file.seek(info.header_offset + 30 + name_length + extra_length)
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"{PICTURES} has the .npy version {version}")
        shape, fortran, dtype = read(file)
        if dtype.hasobject or fortran:
            raise ValueError(f"{PICTURES} is no plain array")
        return np.memmap(path, dtype, "r", file.tell(), shape) if 0 not in shape else np.empty(shape, dtype)


# -- files ------------------------------------------------------------------------------------------------------------------


class DatasetPictures:
    """The captioned pictures of a data set, of ``image_size`` px."""

    def __init__(self, dataset: CaptionedImages, image_size: int) -> None:
        self._dataset = dataset
        self.identity: dict[str, Any] = {"content": dataset.content_hash(), "image_size": image_size}
        self.shape = (image_size, image_size, 3)

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, first: int, last: int) -> Batch:
        with ThreadPoolExecutor(READERS) as pool:
            examples = list(pool.map(self._dataset.__getitem__, range(first, last)))
        return Batch(np.stack([example.image for example in examples]), [example.caption for example in examples])


class FilePictures(DatasetPictures):
    """The pictures of a folder or of WebDataset shards, sorted by key, with their captions ("" for none).

    ``image_size``: what they are cropped and resized to; None, which shards do not allow, takes the first picture's height.
    ``crop``: how (:class:`~textok_fast.data.crops.Crop`). InputError where there are none, and for another crop.
    """

    def __init__(self, path: str | Path, image_size: int | None = None, crop: PictureCrop = "center") -> None:
        if crop not in get_args(PictureCrop):
            raise InputError(f"pictures to evaluate are cropped by {' or '.join(get_args(PictureCrop))}, got {crop!r}")
        files = _image_files(Path(path))
        source = "folder" if files else "webdataset"
        files = files or [Path(shard) for shard in find_shards(str(path))]
        if not files:
            raise InputError(f"no pictures at {path}; wanted a folder of them, .tar shards or an .npz batch")
        if image_size is None and source == "webdataset":
            raise InputError(f"the pictures of {path} have no size of their own: give --image-size")
        size = _height(files[0]) if image_size is None else image_size
        config = DataConfig(source=source, path=str(path), image_size=size, crop=crop)  # type: ignore[arg-type]
        super().__init__(load_dataset(config, "all", need_captions=False), size)
        tables = sorted(file for file in Path(path).glob("captions.*")) if source == "folder" else []
        self.identity |= {"files": _stamps([*files, *tables]), "crop": crop}

    @property
    def captions(self) -> list[str]:
        """Of all pictures, which are not read for it."""
        return [next(iter(self._dataset.captions(index)), "") for index in range(len(self))]


class SampledPictures:
    """What ``textok-fast sample`` wrote, in the order of its samples.json, with the captions it was decoded with."""

    def __init__(self, directory: str | Path) -> None:
        listing = Path(directory) / "samples.json"
        try:
            samples = json.loads(listing.read_text(encoding="utf-8"))["samples"]
            self._listed = [(listing.parent / item["image"], str(item["caption"])) for item in samples]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"cannot read {listing}: {error!r}") from None
        missing = [file.name for file, _ in self._listed if not file.is_file()]
        if missing or not self._listed:
            raise InputError(
                f"{directory} lacks {', '.join(missing[:3]) or 'pictures'}: run the same `textok-fast sample` again"
            )
        self.identity = {"files": _stamps([listing, *(file for file, _ in self._listed)])}
        height, width, _ = _pixels(self._listed[0][0]).shape
        self.shape = (height, width, 3)

    def __len__(self) -> int:
        return len(self._listed)

    def read(self, first: int, last: int) -> Batch:
        files, captions = zip(*self._listed[first:last], strict=True)
        with ThreadPoolExecutor(READERS) as pool:
            return Batch(np.stack(list(pool.map(_pixels, files))), list(captions))

    @property
    def captions(self) -> list[str]:
        """Of all pictures, which are not read for it."""
        return [caption for _, caption in self._listed]


class First:
    """The first ``count`` pictures of a set."""

    def __init__(self, pictures: Pictures, count: int) -> None:
        if not 1 <= count <= len(pictures):
            raise InputError(f"{count:,} pictures were asked for, of a set of {len(pictures):,}")
        self._pictures, self._count = pictures, count
        self.identity = {**pictures.identity, "count": count}
        self.shape = pictures.shape

    def __len__(self) -> int:
        return self._count

    def read(self, first: int, last: int) -> Batch:
        return self._pictures.read(first, min(last, self._count))


def open_pictures(
    path: str | Path, image_size: int | None = None, count: int | None = None, crop: PictureCrop = "center"
) -> Pictures:
    """A set by its path: an .npz batch, a folder, or shards; ``count``: the first so many. InputError for what is none.

    ``image_size`` and ``crop``: as of :class:`FilePictures`; batches and samples have their size.
    """
    found: Pictures
    if str(path).endswith(".npz"):
        batch = NpzPictures(path)
        if not batch.has_pictures:
            raise InputError(f"{path} has no {PICTURES}: it holds no pictures")
        found = batch
    elif (Path(path) / "samples.json").is_file():
        found = SampledPictures(path)
    else:
        found = FilePictures(path, image_size, crop)
    return found if count is None or count == len(found) else First(found, count)


def _pixels(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise InputError(f"cannot read {file}: {error}") from None


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def _height(file: Path) -> int:
    try:
        with Image.open(file) as picture:
            return picture.height
    except (OSError, SyntaxError) as error:
        raise InputError(f"cannot read {file}: {error}; say the image size") from None


def _stamps(files: Sequence[Path]) -> str:
    """A hash of names, sizes and times: other pictures under the old names are other pictures, without reading them."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        found = file.stat()
        digest.update(json.dumps([file.name, found.st_size, found.st_mtime_ns]).encode())
    return digest.hexdigest()
