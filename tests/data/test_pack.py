from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from textok_fast.cli import main
from textok_fast.config import DataConfig
from textok_fast.data import CaptionedImages, PackOptions, load_dataset, pack
from textok_fast.errors import InputError


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def folder_of(path: Path, split: str = "all", **settings: Any) -> CaptionedImages:
    config = DataConfig(**{"source": "folder", "path": str(path), "image_size": 8, **settings})
    return load_dataset(config, split, need_captions=False)


def shards_of(path: Path) -> CaptionedImages:
    return load_dataset(DataConfig(source="webdataset", path=str(path), image_size=8), "all", need_captions=False)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures of several kinds and sizes, with one, two or no captions and classes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    rows = []
    for k in range(60):
        name = f"sub{k % 3}/p.{k:03d}.{['png', 'jpg', 'webp', 'bmp'][k % 4]}"
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12 + k % 5, 20, 3), dtype=np.uint8)).save(folder / name)
        captions: Any = [f"number {k}", "a picture of noise"] if k % 2 else f"number {k}"
        rows.append({"file_name": name, "label": f"class {k % 3}"} | ({"caption": captions} if k % 7 else {}))
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_everything_is_kept_as_it_is(pictures: Path, tmp_path: Path) -> None:
    source = folder_of(pictures)
    seen: list[tuple[int, ...]] = []
    report = pack(
        source,
        tmp_path / "out",
        PackOptions(shard_pictures=25),
        lambda *counts: seen.append(counts),
        lambda *counts: seen.append(counts),
    )
    assert (report["pictures"], report["shards"], report["skipped"]) == (60, 3, [])
    assert seen == [(k, 60) for k in range(1, 61)] + [(25, 60), (50, 60), (60, 60)]
    back = shards_of(tmp_path / "out")
    raw = {picture.key: picture for picture in source.raw(range(60)) if picture is not None}
    found = {picture.key.partition("_")[2]: picture for picture in back.raw(range(60)) if picture is not None}
    assert len(found) == 60
    for key, picture in raw.items():
        assert (found[key].data, found[key].captions, found[key].label) == (picture.data, picture.captions, picture.label)
    assert {len(picture.captions) for picture in raw.values()} == {0, 1, 2}
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    for shard in index["shards"]:
        data = (tmp_path / "out" / shard["file"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert [shard["pictures"] for shard in index["shards"]] == [25, 25, 10]
    # Shards are a source too.
    assert pack(back, tmp_path / "again", PackOptions(shard_pictures=60))["shards"] == 1
    assert len(shards_of(tmp_path / "again" / "shard-000000.tar")) == 60


def test_the_webdataset_library_reads_them(pictures: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("webdataset")
    pack(folder_of(pictures), tmp_path, PackOptions(shard_pictures=30))
    samples = list(library.WebDataset(str(tmp_path / "shard-{000000..000001}.tar"), shardshuffle=False))
    assert len(samples) == 60 and len({sample["__key__"] for sample in samples}) == 60
    assert sum("txt" in sample for sample in samples) == 51


def test_bytes_bound_a_shard(pictures: Path, tmp_path: Path) -> None:
    bound = 30_000
    report = pack(folder_of(pictures), tmp_path, PackOptions(shard_bytes=bound))
    sizes = [path.stat().st_size for path in tmp_path.glob("*.tar")]
    assert report["shards"] == len(sizes) > 5 and max(sizes) <= bound + 10_240  # tar files end on a whole record
    assert len(shards_of(tmp_path)) == 60
    assert pack(folder_of(pictures), tmp_path / "one-each", PackOptions(shard_bytes=1))["shards"] == 60


def test_smaller_pictures_on_request(pictures: Path, tmp_path: Path) -> None:
    pack(folder_of(pictures), tmp_path, PackOptions(resize=13))
    source = {picture.key: picture for picture in folder_of(pictures).raw(range(60)) if picture is not None}
    for picture in shards_of(tmp_path).raw(range(60)):
        assert picture is not None
        before = source[picture.key.partition("_")[2]]
        size = Image.open(io.BytesIO(before.data)).size
        if min(size) <= 13:
            assert picture.data == before.data
            continue
        made = Image.open(io.BytesIO(picture.data))
        assert made.size == (round(size[0] * 13 / size[1]), 13)
        assert made.format == {"PNG": "PNG", "BMP": "PNG"}.get(before.kind, "JPEG")


def test_generated_scenes_are_packed_as_png(tmp_path: Path) -> None:
    dataset = load_dataset(DataConfig(source="shapes", image_size=16, objects=8, held_out_objects=4), "train", 7)
    assert pack(dataset, tmp_path)["pictures"] == 7
    back = load_dataset(DataConfig(source="webdataset", path=str(tmp_path), image_size=16), "all")
    assert all(np.array_equal(a.image, b.image) and a.caption == b.caption for a, b in zip(dataset, back, strict=True))


# -- interrupted ---------------------------------------------------------------------------------------------------------


def test_killed_packing_goes_on(pictures: Path, tmp_path: Path) -> None:
    """SIGKILL at several moments; in the end the bytes are those of a run that nobody stopped."""
    assert main(["data", "pack", "--images", str(pictures), "--out", str(tmp_path / "whole"), "--shard-pictures", "4"]) == 0
    out = tmp_path / "out"
    # A reader that takes its time, so that the kill meets every kind of moment.
    program = (
        "import sys, time\n"
        "from textok_fast.data import files\n"
        "usual = files.FileDataset.raw\n"
        "def slow(self, rows):\n"
        "    for row in rows:\n"
        "        time.sleep(0.01)\n"
        "        yield from usual(self, [row])\n"
        "files.FileDataset.raw = slow\n"
        "from textok_fast.cli import main\n"
        f"sys.exit(main(['data', 'pack', '--images', {str(pictures)!r}, '--out', {str(out)!r}, '--shard-pictures', '4']))\n"
    )
    for shards in (2, 7):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        deadline = time.monotonic() + 120
        while len(list(out.glob("shard-*.tar"))) < shards:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (out / "index.json").exists()
    # What a kill may leave between a shard and its index, or in the middle of a shard.
    (out / "shard-000008.tar").write_bytes(b"half a shard")
    (out / ".shard-000009.tar.abc").write_bytes(b"a temporary file")
    kept = {path: path.stat().st_mtime_ns for path in out.glob("shard-00000[0-5].tar")}
    assert main(["data", "pack", "--images", str(pictures), "--out", str(out), "--shard-pictures", "4"]) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert files(out) == files(tmp_path / "whole")
    assert main(["data", "pack", "--images", str(pictures), "--out", str(out), "--shard-pictures", "4"]) == 0  # nothing to do
    assert files(out) == files(tmp_path / "whole")


def test_corrupt_pictures_are_left_out_and_listed(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found late, as in a set of too many to look at each first; at the ends of shards and of the whole too."""
    from textok_fast.data import files as module

    monkeypatch.setattr(module, "VERIFY_AT_MOST", 0)
    bad = [0, 7, 8, 24, 58, 59]

    def broken(dataset: CaptionedImages) -> CaptionedImages:
        usual = dataset.raw
        dataset.raw = lambda rows: [None if row in bad else usual([row])[0] for row in rows]  # type: ignore[method-assign]
        return dataset

    source = broken(folder_of(pictures))
    report = pack(source, tmp_path / "out", PackOptions(shard_pictures=8))
    assert report["pictures"] == 54 and report["skipped"] == sorted(source.key(row) for row in bad)
    assert len(shards_of(tmp_path / "out")) == 54
    before = files(tmp_path / "out")
    for path in sorted((tmp_path / "out").glob("shard-*"))[5:]:
        path.unlink()
    pack(broken(folder_of(pictures)), tmp_path / "out", PackOptions(shard_pictures=8))
    assert files(tmp_path / "out") == before


def test_what_is_on_the_disk_is_checked(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(folder_of(pictures), out, PackOptions(shard_pictures=20))
    good = files(out)
    data = bytearray((out / "shard-000001.tar").read_bytes())
    data[len(data) // 2] ^= 1
    (out / "shard-000001.tar").write_bytes(data)
    with pytest.raises(InputError, match=r"shard-000001\.tar is not what was written"):
        pack(folder_of(pictures), out, PackOptions(shard_pictures=20))
    pack(folder_of(pictures), out, PackOptions(shard_pictures=20))
    assert files(out) == good


def test_other_settings_and_other_files_are_refused(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(folder_of(pictures), out, PackOptions(shard_pictures=20))
    good = files(out)
    with pytest.raises(InputError, match=r"made otherwise \(shard_pictures differ\)"):
        pack(folder_of(pictures), out, PackOptions(shard_pictures=21))
    with pytest.raises(InputError, match=r"made otherwise \(content, pictures differ\)"):
        pack(folder_of(pictures, "train"), out, PackOptions(shard_pictures=20))
    with FileLock(out / ".lock"), pytest.raises(InputError, match="by another process; wait for it"):
        pack(folder_of(pictures), out, PackOptions(shard_pictures=20))
    (out / ".lock").unlink()  # the test's own
    assert files(out) == good
    with pytest.raises(InputError, match="did not write"):
        pack(folder_of(pictures), pictures)
    for options in ({"shard_pictures": 0}, {"quality": 101}, {"resize": -1}):
        with pytest.raises(InputError, match=next(iter(options)).replace("_", "-")):
            PackOptions(**options)
