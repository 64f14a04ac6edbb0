"""Weights by URL: checked, kept, and gone on with where a download was cut off."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from file_server import FileServer, serving

from textok_fast.errors import InputError
from textok_fast.evaluation.downloads import cached_path, download, require_sha256

DATA = random.Random(0).randbytes(5000)
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("TEXTOK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "served").mkdir()
    (tmp_path / "served/net.pth").write_bytes(DATA)
    with serving(tmp_path / "served") as running:
        yield running


def left(tmp_path: Path) -> dict[str, bytes]:
    """What is in the cache, but for locks."""
    files = (path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path.name: path.read_bytes() for path in files}


def test_a_file_is_fetched_once(server: FileServer, tmp_path: Path) -> None:
    url = f"{server.url}/net.pth?download=true"
    found = download(url, DIGEST.upper(), "things")
    assert found == tmp_path / "cache/things" / f"{DIGEST[:16]}-net.pth" == cached_path(url, DIGEST, "things")
    assert left(tmp_path) == {found.name: DATA}
    assert download(url, DIGEST, "things") == found and server.asked == [("/net.pth?download=true", "")]
    found.write_bytes(b"broken")
    with pytest.raises(InputError, match="not the file that was meant"):
        download(url, DIGEST, "things")


@pytest.mark.parametrize("ranges", [True, False])
def test_what_was_cut_off_is_gone_on_with(server: FileServer, tmp_path: Path, ranges: bool) -> None:
    url, server.ranges = f"{server.url}/net.pth", ranges
    server.limit = 2000
    with pytest.raises(InputError, match="ended after 2,000 of 5,000 bytes"):
        download(url, DIGEST, "things")
    name = cached_path(url, DIGEST, "things").name
    assert left(tmp_path) == {f"{name}.partial": DATA[:2000]}  # and nothing where a whole file would be
    server.limit = None
    assert download(url, DIGEST, "things").read_bytes() == DATA
    assert server.asked[1:] == [("/net.pth", "bytes=2000-")] and set(left(tmp_path)) == {name}


def test_a_whole_file_that_was_not_moved_yet(server: FileServer, tmp_path: Path) -> None:
    """A process killed between the last byte and the move: the server has nothing to add."""
    url = f"{server.url}/net.pth"
    path = cached_path(url, DIGEST, "things")
    path.parent.mkdir(parents=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(DATA)
    assert download(url, DIGEST, "things").read_bytes() == DATA and not partial.exists()
    path.unlink()
    partial.write_bytes(DATA + b"more")  # of another file
    with pytest.raises(InputError, match="what came has the sha256"):
        download(url, DIGEST, "things")
    assert download(url, DIGEST, "things").read_bytes() == DATA


def test_what_is_refused(server: FileServer, tmp_path: Path) -> None:
    url = f"{server.url}/net.pth"
    for given, digest, message in (
        (url, "", "give the sha256 of http"),
        (url, DIGEST[:16], "64 hexadecimal digits"),
        (f"{server.url}/none.pth", DIGEST, "cannot download .*none.pth: HTTP Error 404"),
        ("nowhere://net.pth", DIGEST, "cannot download nowhere"),
        (url, "0" * 64, f"what came has the sha256 {DIGEST}, wanted 000"),
    ):
        with pytest.raises(InputError, match=message):
            download(given, digest, "things")
        assert not left(tmp_path)
    (tmp_path / "file").write_bytes(DATA)
    assert require_sha256(tmp_path / "file", "") == require_sha256(tmp_path / "file", DIGEST) == tmp_path / "file"
    with pytest.raises(InputError, match="not the file that was meant"):
        require_sha256(tmp_path / "file", "0" * 64)


def test_two_at_once_fetch_it_once(server: FileServer) -> None:
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(download(f"{server.url}/net.pth", DIGEST, "things"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(set(found)) == 1 and len(server.asked) == 1
