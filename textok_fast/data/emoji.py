"""The colour bitmaps of Noto Color Emoji as named objects (136 x 128 pixels in the font of Debian 12).

A picture is one glyph of the font's CBDT table. A single code point is named by Unicode (``unicodedata.name``); a sequence
joined by ZERO WIDTH JOINER by the small tables below; a pair of regional indicators by its country. Left out: skin tones,
keycaps, tag sequences, private use, and any picture whose name or bitmap another one has already.
"""

from __future__ import annotations

import hashlib
import io
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from textok_fast.data.flag_names import FLAG_NAMES
from textok_fast.data.sprites import MAX_WORDS, Sprite

_ZWJ, _VS16 = 0x200D, 0xFE0F
_PEOPLE = {0x1F468: "man", 0x1F469: "woman", 0x1F9D1: "person", 0x1F466: "boy", 0x1F467: "girl"}
_GENDER = {0x2640: "woman", 0x2642: "man"}
# Person + thing. "{}" is the person.
_ROLES = {
    0x2695: "{} health worker", 0x2696: "{} judge", 0x2708: "{} pilot", 0x1F33E: "{} farmer", 0x1F373: "{} cook",
    0x1F37C: "{} feeding baby", 0x1F384: "{} claus", 0x1F393: "{} student", 0x1F3A4: "{} singer", 0x1F3A8: "{} artist",
    0x1F3EB: "{} teacher", 0x1F3ED: "{} factory worker", 0x1F4BB: "{} technologist", 0x1F4BC: "{} office worker",
    0x1F527: "{} mechanic", 0x1F52C: "{} scientist", 0x1F680: "{} astronaut", 0x1F692: "{} firefighter",
    0x1F9AF: "{} with white cane", 0x1F9B0: "{} with red hair", 0x1F9B1: "{} with curly hair", 0x1F9B2: "bald {}",
    0x1F9B3: "{} with white hair", 0x1F9BC: "{} in motorized wheelchair", 0x1F9BD: "{} in manual wheelchair",
}  # fmt: skip
_SEQUENCES = {
    (0x1F408, 0x2B1B): "black cat", (0x1F415, 0x1F9BA): "service dog", (0x1F43B, 0x2744): "polar bear",
    (0x1F426, 0x2B1B): "black bird", (0x1F3F3, 0x1F308): "rainbow flag", (0x1F3F3, 0x26A7): "transgender flag",
    (0x1F3F4, 0x2620): "pirate flag", (0x1F441, 0x1F5E8): "eye in speech bubble", (0x2764, 0x1F525): "heart on fire",
    (0x2764, 0x1FA79): "mending heart", (0x1F62E, 0x1F4A8): "face exhaling", (0x1F635, 0x1F4AB): "face with spiral eyes",
    (0x1F636, 0x1F32B): "face in clouds", (0x1F9D1, 0x1F91D, 0x1F9D1): "people holding hands",
}  # fmt: skip
# Unicode 15 names that Python 3.11 lacks, so that every Python gives the same objects; and pictures that look unlike their
# formal name (a "heavy black heart" is red).
_NAMES = {
    0x1F6DC: "wireless", 0x1FA75: "light blue heart", 0x1FA76: "grey heart", 0x1FA77: "pink heart", 0x1FA87: "maracas",
    0x1FA88: "flute", 0x1FAAD: "folding hand fan", 0x1FAAE: "hair pick", 0x1FAAF: "khanda", 0x1FABB: "hyacinth",
    0x1FABC: "jellyfish", 0x1FABD: "wing", 0x1FABF: "goose", 0x1FACE: "moose", 0x1FACF: "donkey", 0x1FADA: "ginger root",
    0x1FADB: "pea pod", 0x1FAE8: "shaking face", 0x1FAF7: "leftwards pushing hand", 0x1FAF8: "rightwards pushing hand",
    0x2764: "red heart", 0x2763: "red heart exclamation mark", 0x2705: "green check mark button", 0x2714: "check mark",
    0x2716: "multiplication mark", 0x274C: "red cross mark", 0x26AA: "white circle", 0x26AB: "black circle",
    0x263A: "smiling face outline", 0x2639: "frowning face", 0x2B50: "yellow star", 0x1F534: "red circle",
    0x1F535: "blue circle",
    0x2660: "black spade suit", 0x2663: "black club suit", 0x2665: "red heart suit", 0x2666: "red diamond suit",
    0x2757: "red exclamation mark", 0x2753: "red question mark", 0x2754: "white question mark",
    0x2755: "white exclamation mark",
    0x1F004: "mahjong red dragon", 0x1F0CF: "playing card joker", 0x1F919: "call me hand", 0x1F44C: "ok hand sign",
}  # fmt: skip
_DROPPED_WORDS = ("symbol", "sign", "with", "and", "the", "of", "face")  # tried in this order when a name is too long


class EmojiLibrary:
    """The distinctly named pictures of one font file.

    Raises ``ValueError`` (or another error of the font reader) when the file is no font with CBDT bitmaps.
    """

    def __init__(self, font: Path) -> None:
        self.font = font
        self._pictures = _read_pictures(font)
        self.left_out: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        return sorted(self._pictures)

    def load(self, name: str) -> Sprite:
        with Image.open(io.BytesIO(self._pictures[name])) as picture:
            return Sprite(name, np.asarray(picture.convert("RGBA")).copy())


def _read_pictures(font: Path) -> dict[str, bytes]:
    """Name -> PNG file of every usable glyph."""
    from fontTools.ttLib import TTFont

    with TTFont(font, lazy=True) as tables:
        if "CBDT" not in tables:
            raise ValueError(f"{font} has no colour bitmaps (CBDT)")
        bitmaps = tables["CBDT"].strikeData[0]
        pictures: dict[str, bytes] = {}
        seen: set[bytes] = set()
        for codes, glyph in _sequences(tables):
            name = emoji_name(codes)
            if name is None or name in pictures or glyph not in bitmaps:
                continue
            png = bytes(bitmaps[glyph].imageData)
            digest = hashlib.blake2b(png, digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                pictures[name] = png
    return pictures


def _sequences(tables: object) -> Iterator[tuple[tuple[int, ...], str]]:
    """Code points and glyph: single ones first, then the ligatures, each in the order of the code points."""
    cmap: dict[int, str] = tables.getBestCmap()  # type: ignore[attr-defined]
    yield from (((code,), glyph) for code, glyph in sorted(cmap.items()))
    code_of = {glyph: code for code, glyph in cmap.items()}
    found = []
    if "GSUB" in tables:  # type: ignore[operator]
        for lookup in tables["GSUB"].table.LookupList.Lookup:  # type: ignore[index]
            for subtable in lookup.SubTable:
                subtable = getattr(subtable, "ExtSubTable", subtable)
                for first, ligatures in getattr(subtable, "ligatures", {}).items():
                    for ligature in ligatures:
                        glyphs = [first, *ligature.Component]
                        if all(glyph in code_of for glyph in glyphs):
                            found.append((tuple(code_of[glyph] for glyph in glyphs), ligature.LigGlyph))
    yield from sorted(found)


def emoji_name(codes: tuple[int, ...]) -> str | None:
    """A short lower-case name of at most six words, or None for a sequence that is left out."""
    if len(codes) == 1:
        return _single_name(codes[0])
    if all(0x1F1E6 <= code <= 0x1F1FF for code in codes):
        country = FLAG_NAMES.get("".join(chr(code - 0x1F1E6 + ord("A")) for code in codes))
        return f"flag of {country}" if country else None
    if _ZWJ not in codes:
        return None
    parts = tuple(code for code in codes if code not in (_ZWJ, _VS16))
    if parts in _SEQUENCES:
        return _SEQUENCES[parts]
    if any(0x1F3FB <= code <= 0x1F3FF for code in parts):
        return None
    if len(parts) == 2 and parts[1] in _GENDER:
        base = _single_name(parts[0])
        gender = _GENDER[parts[1]]
        if base is None:
            return None
        renamed = re.sub(r"\b(wo)?man\b|\bperson\b", gender, base, count=1)
        name = renamed if renamed != base or gender in base.split() else f"{gender} {base}"
        return name if len(name.split()) <= MAX_WORDS else None
    if len(parts) == 2 and parts[0] in _PEOPLE and parts[1] in _ROLES:
        return _ROLES[parts[1]].format(_PEOPLE[parts[0]])
    if 0x2764 in parts:
        people = [_PEOPLE[code] for code in parts if code in _PEOPLE]
        what = "kiss" if 0x1F48B in parts else "couple with heart"
        return f"{what} {people[0]} and {people[1]}" if len(people) == 2 else None
    if all(code in _PEOPLE for code in parts) and parts[0] in (0x1F468, 0x1F469):  # the font lists the reverse order too
        return "family " + " ".join(_PEOPLE[code] for code in parts)
    return None


def _single_name(code: int) -> str | None:
    is_part = code < 0xA9 or code == 0x20E3 or 0x1F1E6 <= code <= 0x1F1FF or 0x1F3FB <= code <= 0x1F3FF
    if is_part or code >= 0xE0000:
        return None
    if code in _NAMES:
        return _NAMES[code]
    name = unicodedata.name(chr(code), "").lower()
    name = " ".join(re.sub(r"[^a-z0-9' -]", " ", name).split())
    if not name or unicodedata.category(chr(code)) in ("Mn", "Me", "Cf", "Zs"):
        return None
    words = name.split()
    # In the names of symbols "black" and "white" mean filled and outlined, "heavy" means bold; the pictures have other colours.
    if (code < 0x2800 and not {"square", "circle"} & set(words)) or {"index", "sun", "for", "heavy"} & set(words):
        words = [word for word in words if word not in ("black", "white", "heavy")]
    for drop in _DROPPED_WORDS:
        if len(words) > MAX_WORDS:
            words = [word for word in words if word != drop]
    return " ".join(words) if 0 < len(words) <= MAX_WORDS else None
