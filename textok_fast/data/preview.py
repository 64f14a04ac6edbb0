"""A look at a data set: one sheet of examples with their captions, or pictures and captions as files."""

from __future__ import annotations

import json
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from textok_fast.data.base import CaptionedImages, encode_png
from textok_fast.errors import InputError
from textok_fast.files import write_atomically, write_text

_MARGIN, _FONT_SIZE, _LINE = 8, 11, 14  # pixels
_SHOWN = 160  # smallest side of a picture on the sheet


def contact_sheet(dataset: CaptionedImages, n: int) -> Image.Image:
    """The first ``n`` examples (fewer when the data set is shorter) in a near-square grid, captions wrapped below them."""
    count = min(n, len(dataset))
    if count < 1:
        raise InputError(f"a contact sheet needs at least one picture, got n={n}")
    examples = [dataset[index] for index in range(count)]
    size = examples[0].image.shape[0]
    shown = size * max(1, math.ceil(_SHOWN / size))
    font = ImageFont.load_default(size=_FONT_SIZE)
    captions = [_wrap(example.caption, font, shown) for example in examples]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    cell_width, cell_height = shown + _MARGIN, shown + _LINE * max(map(len, captions)) + 2 * _MARGIN
    sheet = Image.new("RGB", (columns * cell_width + _MARGIN, rows * cell_height + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for position, (example, lines) in enumerate(zip(examples, captions, strict=True)):
        left = _MARGIN + position % columns * cell_width
        top = _MARGIN + position // columns * cell_height
        sheet.paste(Image.fromarray(example.image).resize((shown, shown), Image.Resampling.NEAREST), (left, top))
        for row, line in enumerate(lines):
            draw.text((left, top + shown + 2 + row * _LINE), line, fill="black", font=font)
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int = 8) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines if len(lines) <= most else [*lines[: most - 1], f"{lines[most - 1]} ..."]


def materialize(dataset: CaptionedImages, directory: str | Path, n: int) -> int:
    """Writes the first ``n`` examples as key.png and key.txt; returns how many pictures were new.

    Can be interrupted and run again: complete files are kept. Raises :class:`InputError` when the directory holds the
    pictures of other settings (``dataset.json`` tells which).
    """
    if n < 1:
        raise InputError(f"at least one picture must be asked for, got n={n}")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    description = {"data": dataset.describe(), "first": dataset[0].key, "caption": dataset[0].caption}
    record = folder / "dataset.json"
    if record.exists():
        try:
            found = json.loads(record.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found != description:
            raise InputError(f"{folder} holds the pictures of another data set (see {record}); choose another directory")
    elif any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and was not written by this command; choose an empty directory")
    else:
        write_text(record, json.dumps(description, indent=1, ensure_ascii=False) + "\n")
    new = 0
    for index in range(min(n, len(dataset))):
        example = dataset[index]
        picture, caption = folder / f"{example.key}.png", folder / f"{example.key}.txt"
        if picture.exists() and caption.exists():
            continue
        write_text(caption, f"{example.caption}\n")
        data = encode_png(example.image)
        write_atomically(picture, lambda path, data=data: path.write_bytes(data))  # type: ignore[misc]
        new += 1
    return new
