"""Scenes: one to four objects in a 2 x 2 grid on a varied background, with a caption that says what is where.

The caption is a list of clauses joined by "; ": one for each object in reading order ("red apple top left"), then the
background ("blue and white striped background"). Every clause comes from a finite set, objects x 4 places + backgrounds.

A scene is a pure function of (seed, split, index, objects): no state, no order of access. All choices come from the digits of a
BLAKE2 hash rather than from ``numpy.random.Generator``, whose streams NumPy does not promise to keep between versions.

Splits:

- ``train``: the first ``objects`` names in an order that the seed decides; combinations that are held out are drawn again.
- ``composition``: the same objects, held-out combinations only.
- ``object``: the next ``held_out_objects`` names, which no other split shows.

A combination is the set of a scene's (object, place) pairs. Two or more pairs are held out when the hash of the set says so,
one time in ten. Of single-object scenes one in ten is held out as well: four objects in ten have one place (never more) in
which they do not stand alone in training, so that training shows every object. The rule does not depend on the seed.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from textok_fast.config import DataConfig
from textok_fast.data.base import CaptionedImages, Example, describe_skipped, stable_hash
from textok_fast.data.fetch import FetchedSource, fetch
from textok_fast.data.sprites import PALETTE, Sprite, SpriteLibrary, premultiplied
from textok_fast.errors import InputError

log = logging.getLogger(__name__)

SCENE_SPLITS = ("train", "composition", "object")
DEFAULT_LENGTHS = {"train": 1_000_000, "composition": 2_048, "object": 2_048}
PLACES = ("top left", "top right", "bottom left", "bottom right")
PATTERNS = ("plain", "gradient", "striped", "checked", "dotted")

# What the caption does not tell, kept small: a position off by up to 3 % of the picture's side, one of three sizes, and each
# background colour off by up to 8 of 255 levels.
POSITION_JITTER = 0.03
SCALES = (0.9, 0.95, 1.0)
COLOR_JITTER = 8
# Longer side of an object at scale 1, as a share of its cell: with the jitter it still ends inside the cell.
OBJECT_SHARE = 1 - 4 * POSITION_JITTER

_PALETTE_NAMES = tuple(PALETTE)
_PALETTE_COLORS = np.array(list(PALETTE.values()), dtype=np.int32)  # (12, 3)
_MAX_ATTEMPTS = 20_000
_CACHE_BYTES = 256 * 2**20  # resized sprites kept by one process


class Placement(NamedTuple):
    """One object of a scene. ``dx`` and ``dy`` are its offset from the cell's centre, in shares of the picture's side."""

    item: int
    cell: int  # index into PLACES
    scale: float
    dx: float
    dy: float


class Background(NamedTuple):
    """A pattern of one or two palette colours, and the jitter of their channels in levels."""

    pattern: str
    colors: tuple[int, ...]
    shift: tuple[int, ...]

    @property
    def clause(self) -> str:
        names = [_PALETTE_NAMES[color] for color in self.colors]
        if self.pattern == "plain":
            return f"{names[0]} background"
        joint = " to " if self.pattern == "gradient" else " and "
        return f"{joint.join(names)} {self.pattern} background"


class Scene(NamedTuple):
    """Everything that decides a picture, at any resolution. ``placements`` are in reading order."""

    placements: tuple[Placement, ...]
    background: Background


class _Draws:
    """Independent draws from the digits of one 512-bit hash. The largest scene uses fewer than 250 bits."""

    def __init__(self, seed: int, split: int, index: int, attempt: int) -> None:
        message = f"{seed} {split} {index} {attempt}".encode()
        self._rest = int.from_bytes(hashlib.blake2b(message, digest_size=64, person=b"textok-scene").digest(), "little")

    def below(self, count: int) -> int:
        self._rest, value = divmod(self._rest, count)
        return value

    def distinct(self, count: int, among: int) -> list[int]:
        """``count`` different numbers below ``among``."""
        drawn: list[int] = []
        for taken in range(count):
            value = self.below(among - taken)
            for earlier in sorted(drawn):
                value += value >= earlier
            drawn.append(value)
        return drawn


def is_held_out(pairs: Iterable[tuple[str, int]]) -> bool:
    """Whether training leaves out the scenes with exactly these (object name, index of the place) pairs."""
    members = sorted(pairs)
    if len(members) == 1:
        name, cell = members[0]
        value = stable_hash("alone", name)
        return value % 10 < 4 and value // 10 % 4 == cell
    return stable_hash("together", *(f"{name}@{cell}" for name, cell in members)) % 10 == 0


def split_names(names: Sequence[str], config: DataConfig) -> tuple[list[str], list[str]]:
    """The names for training and the held-out names, in the order that ``config.seed`` decides."""
    order = sorted(sorted(names), key=lambda name: stable_hash("object", config.seed, name))
    count = config.objects or len(order) - config.held_out_objects
    return order[:count], order[count : count + config.held_out_objects]


class SceneDataset(CaptionedImages):
    """Scenes of ``sprites``, generated when they are asked for.

    Args:
        sprites: the objects of this split. ``label_names`` are their names; the label of a scene is its first object's.
        split: one of :data:`SCENE_SPLITS`.
        image_size: S, pixels a side.
        min_objects, max_objects: how many objects a scene has, at most 4.
        jitter: how much of :data:`POSITION_JITTER` and of the spread of :data:`SCALES` is used, in [0, 1].
        length: how many scenes; default :data:`DEFAULT_LENGTHS`.
        origin: a sentence about the source for :meth:`describe`.

    Raises :class:`InputError` when no scene of the split exists, such as with a single object.
    """

    def __init__(
        self,
        sprites: Sequence[Sprite],
        split: str,
        image_size: int,
        *,
        min_objects: int = 1,
        max_objects: int = 4,
        jitter: float = 1.0,
        seed: int = 0,
        length: int | None = None,
        origin: str = "",
        skipped: dict[str, int] | None = None,
    ) -> None:
        if split not in SCENE_SPLITS:
            raise InputError(f"scenes have the splits {', '.join(SCENE_SPLITS)}; got {split!r}")
        if not sprites:
            raise InputError(
                f"the split {split!r} has no objects; raise data.{'held_out_' if split == 'object' else ''}objects"
            )
        if not 1 <= min_objects <= max_objects <= len(PLACES):
            raise InputError(f"objects a scene must be 1 to 4, at least <= at most; got {min_objects} to {max_objects}")
        if not 0 <= jitter <= 1:
            raise InputError(f"data.jitter must be in [0, 1], got {jitter}")
        if image_size < 8:
            raise InputError(f"image_size must be at least 8 for scenes, got {image_size}")
        if length is not None and length < 1:
            raise InputError(f"a data set needs at least one picture, got length {length}")
        if len(sprites) < min_objects:
            raise InputError(
                f"a scene of {min_objects} different objects needs as many; the split {split!r} has {len(sprites)}"
            )
        self.sprites = list(sprites)
        self.split = split
        self.image_size = image_size
        self.min_objects, self.max_objects = min_objects, min(max_objects, len(sprites))
        self.jitter = jitter
        self.seed = seed
        self.label_names = [sprite.name for sprite in sprites]
        self.skipped = dict(skipped or {})
        self._length = length if length is not None else DEFAULT_LENGTHS[split]
        self._origin = origin
        self._reset_caches()
        self.scene(0)

    def _reset_caches(self) -> None:
        self._resized: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._resized_bytes = 0
        self._patterns: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_resized", "_resized_bytes", "_patterns")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset_caches()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        position = self._position(index)
        scene = self.scene(position)
        return Example(self.render(scene), self.caption(scene), scene.placements[0].item, f"{self.split}-{position:07d}")

    def captions(self, index: int) -> tuple[str, ...]:
        return (self.caption(self.scene(self._position(index))),)

    def scene(self, index: int) -> Scene:
        """The plan of scene ``index`` (any number from 0, also beyond the length), nothing rendered."""
        split_number = SCENE_SPLITS.index(self.split)
        for attempt in range(_MAX_ATTEMPTS):
            draws = _Draws(self.seed, split_number, index, attempt)
            count = self.min_objects + draws.below(self.max_objects - self.min_objects + 1)
            cells = sorted(draws.distinct(count, len(PLACES)))
            items = draws.distinct(count, len(self.sprites))
            if self._is_in_split(items, cells):
                placements = tuple(self._place(draws, item, cell) for item, cell in zip(items, cells, strict=True))
                return Scene(placements, _draw_background(draws))
        raise InputError(
            f"no scene of {self.min_objects} to {self.max_objects} of {len(self.sprites)} objects is in the split "
            f"{self.split!r}; use more objects, or more objects a scene"
        )

    def _is_in_split(self, items: list[int], cells: list[int]) -> bool:
        if self.split == "object":
            return True
        held_out = is_held_out((self.label_names[item], cell) for item, cell in zip(items, cells, strict=True))
        return held_out == (self.split == "composition")

    def _place(self, draws: _Draws, item: int, cell: int) -> Placement:
        scale = 1 - self.jitter * (1 - SCALES[draws.below(len(SCALES))])
        dx, dy = (self.jitter * POSITION_JITTER * (draws.below(1025) / 512 - 1) for _ in range(2))
        return Placement(item, cell, scale, dx, dy)

    def caption(self, scene: Scene) -> str:
        """Clauses like those of "red apple top left; cat face bottom right; blue and white striped background"."""
        clauses = [f"{self.label_names[place.item]} {PLACES[place.cell]}" for place in scene.placements]
        return "; ".join([*clauses, scene.background.clause])

    def render(self, scene: Scene) -> np.ndarray:
        """The picture, (S, S, 3) uint8."""
        image = self._render_background(scene.background)  # (S, S, 3)
        size = self.image_size
        for item, cell, scale, dx, dy in scene.placements:
            color, transparency = self._sprite(item, max(1, math.floor(OBJECT_SHARE * scale * size / 2)))  # (h, w, 3) each
            height, width = color.shape[:2]
            left = math.floor((0.25 + 0.5 * (cell % 2) + dx) * size - width / 2 + 0.5)
            top = math.floor((0.25 + 0.5 * (cell // 2) + dy) * size - height / 2 + 0.5)
            left, top = min(max(left, 0), size - width), min(max(top, 0), size - height)
            under = image[top : top + height, left : left + width]  # (h, w, 3), a view
            # over = premultiplied colour + (1 - alpha) * under; the shifts divide by 255 with exact rounding.
            blend = under * transparency  # (h, w, 3) uint16
            blend += 128
            blend += blend >> 8
            blend >>= 8
            np.add(color, blend, out=under, casting="unsafe")
        return image

    def _render_background(self, background: Background) -> np.ndarray:
        size = self.image_size
        colors = _PALETTE_COLORS[list(background.colors)] + np.array(background.shift, dtype=np.int32).reshape(-1, 3)
        colors = colors.clip(0, 255)  # (1 or 2, 3)
        if background.pattern == "plain":
            return np.broadcast_to(colors[0].astype(np.uint8), (size, size, 3)).copy()
        if background.pattern not in self._patterns:
            self._patterns[background.pattern] = pattern_mask(background.pattern, size)
        steps = np.arange(256, dtype=np.int32)[:, None]  # (256, 1)
        blends = ((colors[0] * (255 - steps) + colors[1] * steps + 127) // 255).astype(np.uint8)  # (256, 3)
        image: np.ndarray = blends.take(self._patterns[background.pattern], axis=0)  # (S, S, 3)
        return image

    def _sprite(self, item: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Colour times alpha, uint8, and 255 - alpha, uint16, both (h, w, 3): an axis of length 1 would broadcast slowly."""
        key = (item, size)
        found = self._resized.get(key)
        if found is None:
            pixels = premultiplied(self.sprites[item], size)  # (h, w, 4)
            transparency = np.repeat(255 - pixels[..., 3:].astype(np.uint16), 3, axis=2)  # (h, w, 3)
            found = self._resized[key] = np.ascontiguousarray(pixels[..., :3]), transparency
            self._resized_bytes += found[0].nbytes + found[1].nbytes
            while self._resized_bytes > _CACHE_BYTES and len(self._resized) > 1:
                self._resized_bytes -= sum(part.nbytes for part in self._resized.popitem(last=False)[1])
        return found

    def captions_by_label(self, limit: int) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        missing = len(self.sprites) * limit
        # The scenes of the split go on beyond its length; a rare label may still stay short of ``limit``.
        for index in range(max(len(self.sprites) * limit * 8, 64)):
            scene = self.scene(index)
            captions = found.setdefault(scene.placements[0].item, [])
            if len(captions) < limit and (caption := self.caption(scene)) not in captions:
                captions.append(caption)
                missing -= 1
                if not missing:
                    break
        return dict(sorted(found.items()))

    def content_hash(self) -> str:
        """Of the objects' names and pictures: a stand-in, or another version of a font, is told from what it stands for."""
        digest = hashlib.blake2b(digest_size=16)
        for sprite in self.sprites:
            digest.update(f"{sprite.name} {sprite.image.shape}".encode())
            digest.update(sprite.image.tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        few, most = self.min_objects, self.max_objects
        per_scene = f"{few}" if few == most else f"{few} to {most}"
        return (
            f"{self._length:,} scenes of {per_scene} objects from {len(self.sprites)} "
            f"({self.split} split, {self.image_size} px, seed {self.seed}). {self._origin}{describe_skipped(self.skipped)}"
        ).rstrip()


def _draw_background(draws: _Draws) -> Background:
    pattern = PATTERNS[draws.below(len(PATTERNS))]
    colors = draws.distinct(1 if pattern == "plain" else 2, len(_PALETTE_NAMES))
    shift = tuple(draws.below(2 * COLOR_JITTER + 1) - COLOR_JITTER for _ in range(3 * len(colors)))
    return Background(pattern, tuple(colors), shift)


def pattern_mask(pattern: str, size: int) -> np.ndarray:
    """How much of the second colour each pixel has: (S, S) uint8, 255 = all. Edges are smoothed by 4 x 4 samples a pixel."""
    fine = (np.arange(4 * size) + 0.5) / (4 * size)  # (4S,)
    y, x = fine[:, None], fine[None, :]
    if pattern == "gradient":  # from top to bottom
        value = np.broadcast_to(y, (4 * size, 4 * size))
    elif pattern == "striped":  # eight horizontal bands
        value = np.broadcast_to(np.floor(y * 8) % 2, (4 * size, 4 * size))
    elif pattern == "checked":
        value = (np.floor(y * 8) + np.floor(x * 8)) % 2
    elif pattern == "dotted":
        value = (((x * 8) % 1 - 0.5) ** 2 + ((y * 8) % 1 - 0.5) ** 2 < 0.3**2).astype(np.float64)
    else:
        raise ValueError(f"no pattern {pattern!r}")
    mean = value.reshape(size, 4, size, 4).mean(axis=(1, 3))  # (S, S)
    mask: np.ndarray = np.floor(255 * mean + 0.5).astype(np.uint8)
    return mask


def load_scenes(config: DataConfig, split: str, length: int | None = None) -> SceneDataset:
    """Fetches ``config.source`` and composes its objects.

    Raises :class:`InputError` for settings that the source cannot meet; a stand-in with fewer pictures than asked for takes as
    many as it has, in the same proportion, and says so.
    """
    if split not in SCENE_SPLITS:
        raise InputError(f"{config.source} scenes have the splits {', '.join(SCENE_SPLITS)}; got {split!r}")
    if config.objects < 0 or config.held_out_objects < 0:
        raise InputError(f"objects and held_out_objects must be 0 or more; got {config.objects} and {config.held_out_objects}")
    fetched = fetch(config.source)
    library = fetched.library()
    names = library.names
    wanted = (config.objects or 1) + config.held_out_objects
    if wanted > len(names):
        if fetched.name == config.source:
            raise InputError(f"{config.source} has {len(names)} objects, objects + held_out_objects asks for {wanted}")
        held_out = len(names) * config.held_out_objects // wanted
        log.warning("the stand-in has %d objects for the %d asked for", len(names), wanted)
        config = DataConfig(**{**vars(config), "objects": len(names) - held_out, "held_out_objects": held_out})
    training, held_out_names = split_names(names, config)
    sprites, corrupt = _load_sprites(library, held_out_names if split == "object" else training)
    return SceneDataset(
        sprites,
        split,
        config.image_size,
        min_objects=config.min_scene_objects,
        max_objects=config.scene_objects,
        jitter=config.jitter,
        seed=config.seed,
        length=length,
        origin=_origin(fetched),
        skipped={**library.left_out, "corrupt image": corrupt},
    )


def _load_sprites(library: SpriteLibrary, names: Sequence[str]) -> tuple[list[Sprite], int]:
    sprites = []
    for name in names:
        try:
            sprites.append(library.load(name))
        except Exception as error:  # image decoders fail in many ways on a corrupt file
            log.warning("skipping the object %r: %s", name, error)
    return sprites, len(names) - len(sprites)


def _origin(fetched: FetchedSource) -> str:
    return f"Objects: {fetched.name}, {fetched.pictures:,} pictures, {fetched.note}. Licence: {fetched.licence}"
