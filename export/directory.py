"""What is exported, and the directory it becomes: export.json says what lies there, and from which models."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from textok_fast import __version__
from textok_fast.config import to_dict
from textok_fast.diffusion.process import Process, build_process
from textok_fast.errors import InputError
from textok_fast.files import replace_directory, write_text
from textok_fast.inference.pipelines import FOLDERS, PIPELINE_NAME
from textok_fast.modeling.autoencoder import load_tokenizer
from textok_fast.modeling.dit import DiT
from textok_fast.modeling.saving import CONFIG_NAME, WEIGHTS_NAME, locate, read_config
from textok_fast.modeling.shipped import find_model
from textok_fast.modeling.tokenizer import TexTok

MANIFEST, FORMAT = "export.json", 1
PARITY_FILES = ("parity.json", "parity.md")
WHAT = ("encoder", "decoder", "generator", "text", "all")


@dataclass
class Source:
    """Trained models to export. ``pipeline``: what pipeline.json says, where the two belong together."""

    tokenizer: TexTok | None = None
    generator: DiT | None = None
    pipeline: dict[str, Any] | None = None

    @classmethod
    def load(cls, model: str | Path) -> Source:
        """A tokenizer's, a generator's or a pipeline's directory, a tokenizer's or generator's Hub id, or the name of weights
        that come with the package; on the CPU."""
        directory = find_model(model)
        if (directory / PIPELINE_NAME).is_file():
            try:
                about = json.loads((directory / PIPELINE_NAME).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise InputError(f"cannot read {directory / PIPELINE_NAME}: {error}") from None
            found = {ours: theirs if (directory / theirs).is_dir() else ours for ours, theirs in FOLDERS.items()}
            tokenizer = load_tokenizer(directory / found["tokenizer"])
            generator = DiT.from_pretrained(directory / found["generator"])
            # An SD-VAE is exported by diffusers' tools; its generator here.
            return cls(tokenizer if isinstance(tokenizer, TexTok) else None, generator, about)
        place = locate(model, [CONFIG_NAME, WEIGHTS_NAME])
        kind = read_config(place).get("model_type")
        if kind == TexTok.model_type:
            return cls(TexTok.from_pretrained(place))
        if kind == DiT.model_type:
            return cls(generator=DiT.from_pretrained(place))
        raise InputError(f"{model} holds a model of type {kind!r}; wanted a tokenizer, a generator or a pipeline")

    @property
    def process(self) -> Process | None:
        """What the generator was trained with, where that is known."""
        if self.generator is None or self.pipeline is None:
            return None
        about = self.pipeline
        prediction, schedule = about.get("prediction", "epsilon"), about.get("schedule", "linear")
        return build_process(about["objective"], self.generator.config.learn_sigma, prediction, schedule)

    def require(self, what: str) -> None:
        """InputError for a part that is not there."""
        if what not in WHAT:
            raise InputError(f"what to export must be one of {', '.join(WHAT)}, got {what!r}")
        if what in ("encoder", "decoder", "text") and self.tokenizer is None:
            raise InputError(f"there is no {what} of ours to export: the model is a generator, alone or with an SD-VAE")
        if what == "generator" and self.generator is None:
            raise InputError("there is no generator to export: the model is a tokenizer alone")


@dataclass
class Manifest:
    """export.json. ``files``: name -> {"file", "bytes", "sha256"}, all that was written; ``parts``: names of files and
    directories that the export owns, whether ``files`` lists them or not."""

    to: str
    precision: str
    opset: int | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokenizer: dict[str, Any] | None = None
    generator: dict[str, Any] | None = None
    pipeline: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    parts: list[str] = field(default_factory=list)
    textok_fast: str = __version__
    format: int = FORMAT

    @classmethod
    def of(cls, source: Source, to: str, precision: str, **fields: Any) -> Manifest:
        """With the configurations of ``source``; latent statistics are part of a tokenizer's."""
        tokenizer = None if source.tokenizer is None else to_dict(source.tokenizer.config)
        generator = None if source.generator is None else to_dict(source.generator.config)
        return cls(to, precision, tokenizer=tokenizer, generator=generator, pipeline=source.pipeline, **fields)

    @classmethod
    def read(cls, directory: str | Path) -> Manifest:
        """Of a directory that ``textok-fast export`` wrote; InputError for another."""
        path = Path(directory) / MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{directory} has no {MANIFEST}: `textok-fast export` writes such a directory") from None
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path}: {error}") from None
        known = {each.name for each in dataclasses.fields(cls)}
        if not isinstance(values, dict) or values.get("format") != FORMAT or not {"to", "precision", "files"} <= set(values):
            raise InputError(f"{path} is not of format {FORMAT}: export again with this version of textok-fast")
        manifest = cls(**{name: value for name, value in values.items() if name in known})
        if wrong := manifest._wrong():
            raise InputError(f"{path} is damaged: {wrong}; copy it or export again")
        return manifest

    def _wrong(self) -> str:
        """What no export writes, or ""."""
        for name in ("to", "precision"):
            if not isinstance(getattr(self, name), str):
                return f"{name} is {getattr(self, name)!r}, wanted a string"
        for name in ("tokenizer", "generator", "pipeline", "text"):
            if not isinstance(getattr(self, name), dict | None):
                return f"{name} is no object"
        files: Any = self.files
        if not isinstance(files, dict):
            return "files is no object"
        for name, entry in files.items():
            kinds = {"file": str, "bytes": int, "sha256": str}
            if not isinstance(entry, dict) or not all(isinstance(entry.get(key), kind) for key, kind in kinds.items()):
                return f"files has no file, bytes and sha256 for {name!r}"
            if _leaves(entry["file"]):
                return f"{entry['file']!r} does not lie in the directory"
        if not isinstance(self.parts, list) or not all(isinstance(part, str) and not _leaves(part) for part in self.parts):
            return "parts is no list of names in the directory"
        return ""

    def require_complete(self, directory: Path, content: bool = True) -> None:
        """InputError for a file that is missing or cut short, and with ``content`` for one whose SHA-256 is another.

        Engines are left to :func:`textok_fast.export.tensorrt.load_engine`, which builds those again that do not fit.
        """
        for entry in self.files.values():
            path = directory / entry["file"]
            if ".engine" in path.suffixes:
                continue
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise InputError(
                    f"{directory} is not complete: {entry['file']} is missing or cut short; copy or export it again"
                )
            if content and sha256(path) != entry["sha256"]:
                raise InputError(
                    f"{directory} is damaged: {entry['file']} is not what was exported, its SHA-256 differs; copy or export it "
                    "again"
                )

    def add(self, directory: Path, name: str, file: str) -> None:
        """Takes note of a finished file."""
        path = directory / file
        self.files[name] = {"file": file, "bytes": path.stat().st_size, "sha256": sha256(path)}

    def add_part(self, directory: Path, part: str) -> None:
        """Takes note of a finished file, or of a directory and all files in it, under their own names."""
        self.parts.append(part)
        place = directory / part
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file():
                name = path.relative_to(directory).as_posix()
                self.add(directory, name, name)

    def write(self, directory: Path) -> None:
        write_text(directory / MANIFEST, json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n")

    @property
    def owned(self) -> set[str]:
        """Names of all that an export put into its directory."""
        files = {Path(entry["file"]).parts[0] for entry in self.files.values()}
        return {MANIFEST, *PARITY_FILES, *files, *self.parts}


SETTLED = 100_000_000  # ns since a file was written, within which clocks of file systems may not tell a second writing
_digests: dict[Path, tuple[tuple[int, ...], str]] = {}  # by a file's path: what it looked like, and its SHA-256 then


def sha256(path: Path) -> str:
    """A file's SHA-256. A file that has not been written to since is not read a second time: graphs share large ones."""
    path = path.resolve()
    about = path.stat()
    looks = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    known, digest = _digests.get(path, ((), ""))
    if known != looks:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if time.time_ns() - about.st_mtime_ns > SETTLED:
            _digests[path] = looks, digest
    return digest


def _leaves(name: str) -> bool:
    """Whether a name, joined to a directory, is of something outside it, or of the directory itself."""
    path = PurePath(name)
    return path.is_absolute() or ".." in path.parts or not path.parts


@contextlib.contextmanager
def replaced(directory: Path) -> Iterator[Path]:
    """A directory to work in that takes the place of ``directory`` when all has gone well.

    Raises: InputError where ``directory`` holds something that no export has put there, and where it cannot be replaced since
        this process works in it.
    """
    directory = directory.resolve()
    if Path.cwd().is_relative_to(directory):
        raise InputError(
            f"{directory} cannot be replaced: it is, or holds, the working directory; give a new one for the export"
        )
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is not a directory: give a new one for the export")
    if directory.is_dir():
        found = {path.name for path in directory.iterdir()}
        own = Manifest.read(directory).owned if MANIFEST in found else set()
        if others := sorted(found - own):
            raise InputError(f"{directory} holds {others[0]}, which is no part of an export: give a new or empty directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        yield work
        work.chmod(0o755)
        replace_directory(work, directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)
