from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import textok_fast
from textok_fast.config import DataConfig
from textok_fast.data import cache_dir, fetch, load_dataset
from textok_fast.data import fetch as fetch_function
from textok_fast.data.emoji import emoji_name
from textok_fast.data.fetch import _fetch_once
from textok_fast.data.flag_names import FLAG_NAMES
from textok_fast.data.shapes import ShapeLibrary
from textok_fast.data.stamps import StampLibrary, stamp_name
from textok_fast.errors import InputError

module = sys.modules[fetch_function.__module__]


@pytest.fixture
def fake_debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_image: Callable[..., Path]) -> Callable[[str], Path]:
    """Puts an ``apt-get`` of our own before the real one, and a ``dpkg-deb`` that unpacks a small set of stamps.

    The function takes the shell text of ``apt-get`` and returns a file in which each of its calls leaves a line.
    """
    stamps = tmp_path / "package" / "usr/share/tuxpaint/stamps"
    for number in range(12):
        file = write_image(stamps / "animals" / f"a{number}.png", (number, 99, 50, 255), (30, 20))
        file.with_suffix(".txt").write_text(f"An animal number {number}.\nfr.utf8=Un animal.\n")
    (stamps / "animals" / "a0_desc.ogg").write_bytes(b"sound")
    copyright_file = tmp_path / "package/usr/share/doc/tuxpaint-stamps-default/copyright"
    copyright_file.parent.mkdir(parents=True)
    copyright_file.write_text("GPL-2")
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    calls.write_text("")

    def program(name: str, text: str) -> None:
        path = programs / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    program("dpkg-deb", f'mkdir -p "$3" && cp -r "{tmp_path}/package/." "$3"')
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(module, "SYSTEM_ROOT", tmp_path / "bare-system")

    def install(apt_get: str) -> Path:
        program("apt-get", f'echo "$@" >> "{calls}"\n{apt_get}')
        return calls

    return install


DOWNLOAD = 'for last; do :; done; echo "deb" > "${last}_1.0_all.deb"'


def names_in(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()}


def test_download_then_cache(fake_debian: Callable[[str], Path], private_cache: Path) -> None:
    calls = fake_debian(DOWNLOAD)
    fetched = fetch("stamps")
    assert (fetched.name, fetched.pictures) == ("stamps", 12) and "GNU General Public License" in fetched.licence
    assert fetched.directory == private_cache / "stamps"
    assert names_in(private_cache) == {"stamps", ".stamps.lock"}
    assert (private_cache / "stamps" / "copyright").read_text() == "GPL-2"
    assert not list((private_cache / "stamps").rglob("*.ogg"))
    sprite = fetched.library().load("animal number 7")
    assert sprite.image.shape == (20, 30, 4) and (sprite.image == (7, 99, 50, 255)).all()
    _fetch_once.cache_clear()
    assert fetch("stamps").note == "from the cache"
    assert len(calls.read_text().splitlines()) == 1
    assert fetch("stamps", force=True).pictures == 12
    assert len(calls.read_text().splitlines()) == 2
    assert names_in(private_cache) == {"stamps", ".stamps.lock"}


def test_installed_pictures_need_no_download(
    fake_debian: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_debian("exit 1")
    monkeypatch.setattr(module, "SYSTEM_ROOT", tmp_path / "package")
    assert fetch("stamps").note == "installed on this system"
    assert calls.read_text() == ""


def test_missing_package_lists_are_fetched_privately(fake_debian: Callable[[str], Path], private_cache: Path) -> None:
    """Without lists ``download`` fails until an ``update`` has filled the directory that is named on the command line."""
    calls = fake_debian(
        'lists=""; for a; do case "$a" in Dir::State::Lists=*) lists="${a#*=}";; esac; done\n'
        'test -n "$lists" || { echo "E: Unable to locate package"; exit 100; }\n'
        'case "$*" in *update) touch "$lists/filled"; exit 0;; esac\n'
        'test -e "$lists/filled" || exit 100\n' + DOWNLOAD
    )
    assert fetch("stamps").name == "stamps"
    lines = calls.read_text().splitlines()
    assert len(lines) == 3 and all(str(private_cache) in line for line in lines[1:])


def test_failure_brings_the_stand_in_and_says_so(
    fake_debian: Callable[[str], Path], private_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls = fake_debian("echo 'E: no network here'; exit 100")
    fetched = fetch("stamps")
    assert (fetched.name, fetched.directory) == ("shapes", None)
    assert "stand-in for stamps" in fetched.note and "no network here" in fetched.note
    assert "shapes stand in" in caplog.text
    dataset = load_dataset(DataConfig(source="stamps", objects=300, held_out_objects=100, image_size=16), "train")
    assert "stand-in for stamps" in dataset.describe() and len(dataset.label_names) == 153
    assert len(load_dataset(DataConfig(source="stamps", objects=300, held_out_objects=100), "object").label_names) == 51
    assert len(calls.read_text().splitlines()) == 2  # download, update; not again in this process
    assert names_in(private_cache) == {".stamps.lock"}


def test_download_without_a_package(fake_debian: Callable[[str], Path], private_cache: Path) -> None:
    fake_debian("exit 0")
    assert "left no package" in fetch("stamps").note
    assert names_in(private_cache) == {".stamps.lock"}


def test_package_that_cannot_be_unpacked(fake_debian: Callable[[str], Path], private_cache: Path, tmp_path: Path) -> None:
    fake_debian(DOWNLOAD)
    (tmp_path / "bin" / "dpkg-deb").write_text("#!/bin/sh\necho 'not a Debian archive' >&2; exit 2\n")
    assert "not a Debian archive" in fetch("stamps").note
    assert names_in(private_cache) == {".stamps.lock"}


def test_package_without_pictures(fake_debian: Callable[[str], Path], private_cache: Path, tmp_path: Path) -> None:
    fake_debian(DOWNLOAD)
    (tmp_path / "bin" / "dpkg-deb").write_text('#!/bin/sh\nmkdir -p "$3/usr/share/tuxpaint/stamps"\n')
    assert "no pictures" in fetch("stamps").note
    assert names_in(private_cache) == {".stamps.lock"}


def test_cache_that_cannot_be_written(fake_debian: Callable[[str], Path], tmp_path: Path) -> None:
    fake_debian(DOWNLOAD)
    (tmp_path / "file").write_text("not a directory")
    assert fetch("stamps", cache_dir=tmp_path / "file" / "cache").name == "shapes"


def test_killed_download_is_done_again(fake_debian: Callable[[str], Path], private_cache: Path, tmp_path: Path) -> None:
    fake_debian(f'for last; do :; done; echo half > "${{last}}_1.0_all.deb"; touch "{tmp_path}/started"; exec sleep 60')
    code = (
        "import sys, pathlib; from textok_fast.data.fetch import fetch; m = sys.modules['textok_fast.data.fetch']; "
        "m.SYSTEM_ROOT = pathlib.Path(sys.argv[1]); fetch('stamps')"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "bare-system")],
        cwd=Path(textok_fast.__file__).parents[1],
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (tmp_path / "started").exists()
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert (
        any(name.startswith(".stamps.partial-") for name in names_in(private_cache)) and not (private_cache / "stamps").exists()
    )
    fake_debian(DOWNLOAD)
    assert fetch("stamps").pictures == 12
    assert names_in(private_cache) == {"stamps", ".stamps.lock"}


def test_two_at_once_download_once(fake_debian: Callable[[str], Path], private_cache: Path) -> None:
    calls = fake_debian("sleep 0.3\n" + DOWNLOAD)
    results: list[str] = []
    threads = [
        threading.Thread(target=lambda: results.append(_fetch_once.__wrapped__("stamps", private_cache, False).name))
        for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["stamps", "stamps"] and len(calls.read_text().splitlines()) == 1


def test_unknown_source() -> None:
    with pytest.raises(InputError, match="emoji, stamps or shapes"):
        fetch("photos")


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_dir() == Path(os.environ["TEXTOK_CACHE"])
    monkeypatch.delenv("TEXTOK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "textok-fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "textok-fast"


def test_shapes_are_distinct_in_name_and_picture() -> None:
    library = ShapeLibrary()
    names = library.names
    assert len(names) == len(set(names)) == 204
    pictures = [library.load(name).image for name in names]
    assert len({picture.tobytes() for picture in pictures}) == 204
    assert all(picture.shape == (128, 128, 4) and picture[..., 3].mean() > 20 for picture in pictures)
    masks = {name.split(" ", 1)[1]: picture[..., 3].tobytes() for name, picture in zip(names, pictures, strict=True)}
    assert len(set(masks.values())) == 17


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("A brown potato.", "brown potato"),
        ("A ripe, red tomato! Yum.", "ripe red tomato"),
        ("An iron for ironing clothes.", "iron for ironing clothes"),
        ("A candy cane is a traditional Christmas treat in the United States.", "candy cane"),
        ("A European coin of 1 cent (0.01 \u20ac).", "european coin of 1 cent"),
        ("Hard candy\u2014yum!", "hard candy"),
        ("A jack-o\u2019-lantern; spooky", "jack-o'-lantern"),
        ("The sign for the letter Q in American Sign Language.", None),
        ("...", None),
        ("", None),
    ],
)
def test_stamp_names(caption: str, name: str | None) -> None:
    assert stamp_name(caption) == name


def test_stamps_count_what_they_leave_out(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    for name, caption in {"a": "A cat.", "b": "The cat.", "c": "one two three four five six seven", "d": "", "e": None}.items():
        file = write_image(tmp_path / f"{name}.png", (1, 2, 3, 4))
        if caption is not None:
            file.with_suffix(".txt").write_text(caption)
    library = StampLibrary(tmp_path)
    assert library.names == ["cat"]
    assert library.left_out == {"missing caption": 2, "caption too long": 1, "repeated caption": 1}


@pytest.mark.parametrize(
    ("codes", "name"),
    [
        ((0x1F34E,), "red apple"),
        ((0x1F424,), "baby chick"),
        ((0x2764,), "red heart"),
        ((0x2705,), "green check mark button"),
        ((0x1F6DC,), "wireless"),
        ((0x1F606,), "smiling face open mouth tightly-closed eyes"),
        ((0x1F3C3, 0x200D, 0x2640), "woman runner"),
        ((0x1F468, 0x200D, 0x1F692), "man firefighter"),
        ((0x1F469, 0x200D, 0x2764, 0x200D, 0x1F468), "couple with heart woman and man"),
        ((0x1F468, 0x200D, 0x1F469, 0x200D, 0x1F466), "family man woman boy"),
        ((0x1F1EB, 0x1F1F7), "flag of france"),
        ((0x1F1EB, 0x1F1EB), None),  # no such region
        ((0x1F3FB,), None),  # skin tone
        ((0x1F44B, 0x1F3FD), None),
        ((0x23,), None),
        ((0x23, 0x20E3), None),  # keycap
        ((0x1F3F4, 0xE0067, 0xE0062, 0xE007F), None),  # tags
        ((0xFE4E5,), None),  # private use
    ],
)
def test_emoji_names(codes: tuple[int, ...], name: str | None) -> None:
    assert emoji_name(codes) == name


def test_flag_names_are_distinct() -> None:
    assert len(FLAG_NAMES) == len(set(FLAG_NAMES.values())) == 258 and FLAG_NAMES["US"] == "united states"


def test_emoji_of_the_real_font(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEXTOK_CACHE")  # the user's own cache, where the font may be already
    fetched = fetch("emoji")
    if fetched.name != "emoji":
        pytest.skip(f"Noto Color Emoji cannot be had here: {fetched.note}")
    library = fetched.library()
    assert "SIL Open Font License" in fetched.licence
    names = library.names
    assert len(names) == len(set(names)) > 1500
    assert all(0 < len(name.split()) <= 6 and ";" not in name and name == name.lower() for name in names)
    apple, tree = library.load("red apple").image, library.load("evergreen tree").image
    assert apple.shape[2] == 4 and apple.dtype == np.uint8 and {apple.shape[0], apple.shape[1]} <= {128, 136}
    solid = [picture[picture[..., 3] > 250][:, :3].mean(axis=0) for picture in (apple, tree)]
    assert solid[0].argmax() == 0 and solid[1].argmax() == 1  # the apple is red, the tree green
