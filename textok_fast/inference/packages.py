"""Engines compiled ahead of time: a directory that loads in the time of reading its files, and compiles nothing.

A package holds the networks as machine code with their weights (torch.export and AOTInductor, one ``.pt2`` file a network), and
``package.json``: plan, configuration and the machine it was made on. It runs with the same PyTorch on the same kind of machine,
and is refused elsewhere. A ``.pt2`` file is a program: load only packages whose maker you trust.

The networks' operations are the references, which inductor fuses into its own kernels; on CPUs that was as fast as keeping the
native ones and leaves the package without a need for the native library. Those that ``plan.ops`` forces one by one stay in.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import platform
import re
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import textok_fast
from textok_fast import ops
from textok_fast.config import DiTConfig, TexTokConfig, from_mapping, to_dict
from textok_fast.errors import InputError
from textok_fast.files import replace_directory, save_tensors, write_text
from textok_fast.inference.execution import why_not_compiled
from textok_fast.inference.generator import GeneratorEngine, Network, TextKeys, sample_shape
from textok_fast.inference.plan import Plan
from textok_fast.inference.precision import DTYPES
from textok_fast.inference.tokenizer import FastDecoder, FastEncoder, ShortText, TokenizerEngine, _DecoderSide, _Side
from textok_fast.modeling.bottlenecks import build_bottleneck
from textok_fast.modeling.dit import DiT
from textok_fast.modeling.layers import TextProjection, TextTokens
from textok_fast.modeling.text_encoders import TextFeatures
from textok_fast.modeling.tokenizer import Decoder, Encoder, TexTok
from textok_fast.ops.device import resolve_device

MANIFEST = "package.json"
BOTTLENECK = "bottleneck.safetensors"
_CONV_OUT = "conv_out."  # in that file, before the names of the decoder's convolution
FORMAT = 1
PRECISIONS = ("fp32", "bf16")
ALIGNMENT = 16  # bytes: compiled code reads its inputs in vectors, as far aligned as torch allocates them
_TEXT = 16  # length of the captions that are traced

# -- making one ----------------------------------------------------------------------------------------------------------------


def save_package(model: DiT | TexTok, directory: str | Path, plan: Plan | None = None) -> Path:
    """Compiles what ``Engine(model, plan)`` runs, for any batch size and caption length, and writes it to ``directory``.

    Takes the time of a torch.compile for each network: two for a DiT, one more with text; two for a TexTok.

    Args:
        model: on any device; it stays as it was.
        directory: made, or a package that is there replaced when the new one is complete.
        plan: precision "fp32" or "bf16"; its device is the kind the package is for, and has to be there. ``compile`` may be
            "max-autotune"; ``capture``, modulation and memory limits hold for the loaded engine. None: ``Plan.automatic()``.

    Returns: ``directory``.
    Raises: InputError for another model, a plan that no package can follow, a missing C++ compiler, and a directory that holds
        something else.
    """
    if not isinstance(model, (DiT, TexTok)):
        raise InputError(f"a package holds a DiT or a TexTok, got {type(model).__name__}")
    plan = Plan.automatic(next(model.parameters()).device) if plan is None else plan
    if plan.precision not in PRECISIONS:
        raise InputError(f"a package holds {' or '.join(PRECISIONS)}, got precision={plan.precision!r}: use an Engine for that")
    if plan.step_cache is not None:
        raise InputError("a package runs all blocks at every step: use step_cache=None, or an Engine")
    if reason := why_not_compiled("cpu"):  # also for CUDA, whose kernels are launched by compiled code
        raise InputError(f"a package cannot be made here: {reason}; install one")
    directory = Path(directory)
    _require_replaceable(directory)
    # What is packed for this processor cannot be written: the compiler gets plain weights, and packs them itself.
    source = dataclasses.replace(plan, products="reference" if plan.torch_device.type == "cpu" else "auto")
    source = dataclasses.replace(source, compile="none", capture="none")
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        compiler = _Compiler(work, plan)
        if isinstance(model, DiT):
            files = _save_generator(model, source, compiler)
        else:
            files = _save_tokenizer(model, source, compiler)
        manifest = {
            "format": FORMAT,
            "model_type": model.model_type,
            "textok_fast": textok_fast.__version__,
            "made_on": machine(plan.torch_device),
            "plan": dataclasses.replace(plan, device=plan.torch_device.type, compile="none", products="auto").to_dict(),
            "config": to_dict(model.config),
            "files": {name: (work / name).stat().st_size for name in files},
        }
        write_text(work / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        work.chmod(0o755)
        replace_directory(work, directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return directory


def _save_generator(model: DiT, plan: Plan, compiler: _Compiler) -> list[str]:
    engine = GeneratorEngine(model, plan)
    with engine._context():
        t = torch.zeros(2, device=engine.device)
        y = torch.zeros(2, dtype=torch.int64, device=engine.device) if model.config.num_classes else None
        modulation = _ModulationNetwork(engine)
        compiler.add("modulation", modulation, [t, y], [{0: "batch"}, {0: "batch"}])
        x = torch.zeros(2, *sample_shape(engine.model), dtype=engine.dtype, device=engine.device)
        given: list[Tensor | None] = [x, modulation(t, y), None, None]
        dims: list[dict[int, str]] = [{0: "batch"}, {0: "batch"}, {}, {}]
        if model.config.text_dim:
            features = torch.zeros(2, _TEXT, model.config.text_dim, dtype=engine.dtype, device=engine.device)
            mask = torch.ones(2, _TEXT, dtype=torch.bool, device=engine.device)
            text = _TextNetwork(engine)
            compiler.add("text", text, [features, mask], [{0: "batch", 1: "text"}] * 2)
            given[2:] = text(features, mask)
            dims[2:] = [{0: "batch", 1: "text"} if text.keys is None else {1: "batch", 2: "text"}, {0: "batch", 1: "text"}]
        if size := model.config.image_token_dim:
            shape = (2, model.config.num_image_tokens, size)
            given.append(torch.zeros(shape, dtype=engine.dtype, device=engine.device))
            dims.append({0: "batch"})
        compiler.add("network", _StepNetwork(engine), given, dims)
    return compiler.files


def _save_tokenizer(model: TexTok, plan: Plan, compiler: _Compiler) -> list[str]:
    engine, config = TokenizerEngine(model, plan), model.config
    place: dict[str, Any] = {"dtype": engine.dtype, "device": engine.device}
    encoder, decoder = cast(_Side, engine.model.encoder).network, cast(_Side, engine.model.decoder).network
    assert isinstance(encoder, FastEncoder) and isinstance(decoder, FastDecoder)
    patches = torch.zeros(2, config.num_patches, 3 * config.patch_size**2, **place)
    latents = torch.zeros(2, config.num_tokens, config.latent_dim, **place)
    networks: dict[str, tuple[nn.Module, TextProjection | None, Tensor]] = {
        "encoder": (_EncoderNetwork(encoder), encoder.vit.text, patches),
        "decoder": (_DecoderNetwork(decoder), decoder.vit.text, latents),
    }
    with torch.no_grad(), engine._backends():
        for name, (network, projection, x) in networks.items():
            given, dims, most = [x], [{0: "batch"}], None
            if projection is not None:
                most = None if projection.positions is None else len(projection.positions)
                length = _TEXT if most is None else min(_TEXT, most)
                given.append(torch.zeros(2, length, config.text_dim, **place))
                given.append(torch.ones(2, length, dtype=torch.bool, device=engine.device))
                dims += [{0: "batch", 1: "text"}] * 2
            compiler.add(name, network, given, dims, most)
    kept = dict(engine.model.bottleneck.state_dict())  # and what else no program holds
    convolution = cast(nn.Module | None, decoder.vit.conv_out)
    if convolution is not None:
        kept |= {f"{_CONV_OUT}{name}": value for name, value in convolution.state_dict().items()}
    state = {name: value.detach().cpu().contiguous() for name, value in kept.items()}
    save_tensors(state, compiler.directory / BOTTLENECK)
    return [*compiler.files, BOTTLENECK]


class _Compiler:
    """Exports networks and compiles them to ``directory``."""

    def __init__(self, directory: Path, plan: Plan) -> None:
        self.directory = directory
        self.files: list[str] = []
        self._options: dict[str, Any] = {"max_autotune": plan.compile == "max-autotune"}
        if plan.torch_device.type == "cpu":
            # Weights in the order in which oneDNN reads them, and as many threads as torch has when it runs.
            self._options |= {"freezing": True, "cpp.dynamic_threads": True}

    def add(
        self,
        name: str,
        network: nn.Module,
        given: Sequence[Tensor | None],
        dims: Sequence[dict[int, str]],
        most_text: int | None = None,
    ) -> None:
        """Compiles ``network(*given)`` to ``name.pt2``.

        ``dims``: for each argument which of its sizes are free, by name: "batch" and "text", of which there may be
        ``most_text``.
        """
        free = {"batch": torch.export.Dim("batch", min=1), "text": torch.export.Dim("text", min=1, max=most_text)}
        shapes = tuple(
            None if tensor is None else {axis: free[size] for axis, size in axes.items()}
            for tensor, axes in zip(given, dims, strict=True)
        )
        program = torch.export.export(network.eval(), tuple(given), dynamic_shapes=shapes, strict=True)
        path = self.directory / f"{name}.pt2"
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=dict(self._options))
        self.files.append(path.name)


# -- what is compiled ----------------------------------------------------------------------------------------------------------


class _ModulationNetwork(nn.Module):
    """t (R,) float32, y (R,) int64 -> all adaLN outputs side by side, (R, L)."""

    weight: Tensor
    bias: Tensor

    def __init__(self, engine: GeneratorEngine) -> None:
        super().__init__()
        self.model, stacked = engine.model, engine.modulation
        if stacked.layers is not None:
            raise InputError(
                "a package needs plain adaLN layers, some of this model's are replaced or hooked: merge them first"
            )
        weight, bias = (stacked.weight, stacked.bias) if stacked.packed is None else stacked.packed[:3:2]
        self.register_buffer("weight", weight)  # (L, D)
        self.register_buffer("bias", bias)  # (L,)

    def forward(self, t: Tensor, y: Tensor | None) -> Tensor:
        activated = F.silu(self.model.condition(t, y)).to(self.weight.dtype)  # (R, D)
        return F.linear(activated, self.weight, self.bias)


class _TextNetwork(nn.Module):
    """Caption features (B, N_t, D_t) and mask (B, N_t) -> what the step takes of them, and the mask."""

    def __init__(self, engine: GeneratorEngine) -> None:
        super().__init__()
        assert engine.model.text_embedder is not None
        self.embedder, self.keys = engine.model.text_embedder, engine._text_keys

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        tokens, mask = self.embedder(TextFeatures(features, mask), features.shape[0])
        return tokens if self.keys is None else self.keys(tokens), mask


class _StepNetwork(nn.Module):
    """:meth:`Network.whole` with the text as two tensors."""

    def __init__(self, engine: GeneratorEngine) -> None:
        super().__init__()
        self.network = Network(engine.model, engine.modulation)

    def forward(
        self, x: Tensor, rows: Tensor, tokens: Tensor | None = None, mask: Tensor | None = None, image: Tensor | None = None
    ) -> Tensor:
        text = None if tokens is None or mask is None else TextTokens(tokens, mask)
        return self.network.whole(x, rows, text, image)


class _EncoderNetwork(nn.Module):
    """Flat patches (B, hw, 3 p p), caption features and mask -> (B, N, out_dim)."""

    def __init__(self, network: FastEncoder) -> None:
        super().__init__()
        self.network = network

    def forward(self, patches: Tensor, features: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        vit = self.network.vit
        x = vit.patch_embed(patches) + vit.patch_positions  # type: ignore[operator]  # (B, hw, D)
        return vit.to_latents(self.network.blocks(x, ShortText(features, mask)))  # type: ignore[operator]


class _DecoderNetwork(nn.Module):
    """Raw latents (B, N, d), caption features and mask -> flat patches (B, hw, 3 p p)."""

    def __init__(self, network: FastDecoder) -> None:
        super().__init__()
        self.network = network

    def forward(self, latents: Tensor, features: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return self.network.run(latents, features, mask)


# -- loading one ---------------------------------------------------------------------------------------------------------------


def load_package(directory: str | Path, device: str | torch.device | None = None) -> GeneratorEngine | TokenizerEngine:
    """The engine that :func:`save_package` wrote, with the calls and the results of ``Engine(model, plan)``.

    Args:
        device: of the kind that the package was made for; None is the first of that kind.

    Raises: InputError when there is no package, a file of it is missing or cut short, or it was made for another version of
        PyTorch, kind of device, GPU or processor; the message says which, and what to do.
    """
    directory = Path(directory)
    manifest = _read(directory)
    made_on: dict[str, Any] = manifest["made_on"]
    place = resolve_device(made_on["device"] if device is None else device)
    if str(place) == "cuda":
        place = torch.device("cuda", torch.cuda.current_device())
    if reason := why_not_here(made_on, machine(place)):
        raise InputError(f"the package {directory} does not run here: {reason}; make it again here with save_package")
    for name, size in manifest["files"].items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != size:
            raise InputError(f"the package {directory} is not complete: {name} is missing or cut short; copy or make it again")
    plan = dataclasses.replace(Plan.from_dict(manifest["plan"]), device=str(place)).require_machine()
    programs = {Path(name).stem: _Program(directory / name, place) for name in manifest["files"] if name.endswith(".pt2")}
    size = sum(manifest["files"].values())
    if manifest["model_type"] == DiT.model_type:
        return PackagedGenerator(from_mapping(DiTConfig, manifest["config"]), plan, place, programs, size)
    return PackagedTokenizer(from_mapping(TexTokConfig, manifest["config"]), plan, place, programs, size, directory)


def machine(device: torch.device) -> dict[str, Any]:
    """What compiled code depends on: PyTorch, system, device, and the instructions of the processor that it may contain."""
    cuda = device.type == "cuda"
    return {
        "torch": torch.__version__.split("+")[0],
        "system": f"{platform.system()} {platform.machine()}",
        "device": device.type,
        "cuda": torch.version.cuda if cuda else None,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if cuda else None,
        "instructions": _instructions(),
    }


def why_not_here(made_on: dict[str, Any], here: dict[str, Any]) -> str:
    """Why a package of one :func:`machine` does not run on another, or ""."""
    names = {"torch": "PyTorch", "system": "", "device": "device", "cuda": "CUDA", "capability": "GPU compute capability"}
    for key, name in names.items():
        if made_on.get(key) != here[key]:
            return f"it was made for {name} {made_on.get(key)}".replace("  ", " ") + f", this is {here[key]}"
    if lacking := sorted(set(made_on.get("instructions", ())) - set(here["instructions"])):
        more = f" and {len(lacking) - 4} more" if len(lacking) > 4 else ""
        return f"it was made for a processor with {', '.join(lacking[:4])}{more}, which this one lacks"
    return ""


# Those that a compiler uses without being asked for each: the package is compiled for the processor it is made on.
_VECTOR = re.compile(r"sse|ssse|avx|amx|fma|f16c|bmi|abm|movbe|popcnt|asimd|sve|bf16|i8mm")


def _instructions() -> list[str]:
    """The processor's instruction sets as Linux names them; empty on another system."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return sorted({flag for flag in flags if _VECTOR.match(flag)})


class _Program:
    """One compiled network, called with its arguments in order (None is left out); returns its results."""

    def __init__(self, path: Path, device: torch.device) -> None:
        cuda = device.type == "cuda"
        try:
            # The class inside torch._inductor.aoti_load_package, whose import alone takes seconds. On CUDA without
            # synchronization of its own, so that a run can be captured as a CUDA graph: an engine there serves one thread.
            loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", cuda, 1, device.index if cuda else -1)
        except RuntimeError as error:
            raise InputError(f"cannot load {path}: {' '.join(str(error).split())}; make the package again") from error
        self._run: Callable[[list[Tensor]], list[Tensor]] = loader.boxed_run

    def __call__(self, *given: Tensor | None) -> list[Tensor]:
        return self._run([_as_compiled(each) for each in given if each is not None])


def _as_compiled(x: Tensor) -> Tensor:
    """``x`` in the layout that was compiled: contiguous and aligned."""
    if x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


# -- the loaded engines --------------------------------------------------------------------------------------------------------


class _Outline(DiT):
    """A DiT's shapes and checks without its weights; what it would make of t and y is left to the package."""

    def condition(self, t: Tensor, y: Tensor | None) -> Any:
        return t, y


class _Modulation:
    """In the place of ``StackedModulation``."""

    def __init__(self, program: _Program, config: DiTConfig) -> None:
        self._program, self._null = program, config.num_classes
        self.columns = (6 * config.depth + 2) * config.width

    def __call__(self, condition: tuple[Tensor, Tensor | None], out: Tensor | None = None) -> Tensor:
        t, y = condition
        if self._null and y is None:
            y = torch.full_like(t, self._null, dtype=torch.int64)
        t = t if y is None else t.expand(len(y))  # one time may be all rows'
        (rows,) = self._program(t.float(), y)  # (R, L)
        return rows if out is None else out.copy_(rows)


class PackagedGenerator(GeneratorEngine):
    """A :class:`GeneratorEngine` whose network, modulation and text keys are compiled programs."""

    def __init__(
        self, config: DiTConfig, plan: Plan, device: torch.device, programs: dict[str, _Program], weights: int
    ) -> None:
        self.plan, self.config, self.device = plan, config, device
        self.dtype = DTYPES[plan.precision]
        with torch.device("meta"):
            self.model = _Outline(config)
        self.modulation = _Modulation(programs["modulation"], config)  # type: ignore[assignment]
        self._network, self._text = programs["network"], programs.get("text")
        self._text_keys = TextKeys([]) if self._text is not None else None
        self.weight_bytes = self._weights = weights
        self._whole = self._run_whole
        self._loops = OrderedDict()

    def _run_whole(self, x: Tensor, rows: Tensor, text: TextTokens | None, image: Tensor | None) -> Tensor:
        tokens, mask = (None, None) if text is None else text
        return self._network(x, rows, tokens, mask, image)[0]

    def _text_tokens(self, text: TextFeatures | None, batch: int) -> TextTokens | None:
        if self._text is None:
            return None
        like = torch.empty(0, device=self.device, dtype=self.dtype)
        features, mask = (None, None) if text is None else (text[0].to(like), text[1].to(self.device))
        return TextTokens(*self._text(*_both(features, mask, batch, self.config.text_dim, like)))


class PackagedTokenizer(TokenizerEngine):
    """A :class:`TokenizerEngine` whose encoder and decoder are compiled programs. The bottleneck is as it is in the model."""

    def __init__(
        self,
        config: TexTokConfig,
        plan: Plan,
        device: torch.device,
        programs: dict[str, _Program],
        weights: int,
        directory: Path,
    ) -> None:
        from safetensors.torch import load_file

        self.plan, self._weights = plan, weights
        self._largest = {"encode": 0, "decode": 0}
        place: dict[str, Any] = {"device": device, "dtype": DTYPES[plan.precision]}
        with torch.device("meta"):
            self.model = TexTok(config)
        self.model.bottleneck = build_bottleneck(config)
        kept = load_file(directory / BOTTLENECK)
        convolution = {name.removeprefix(_CONV_OUT): kept.pop(name) for name in list(kept) if name.startswith(_CONV_OUT)}
        self.model.bottleneck.load_state_dict(kept)
        self.model.bottleneck.to(**place)
        if self.model.decoder.conv_out is not None:
            self.model.decoder.conv_out.load_state_dict(convolution, assign=True)
            self.model.decoder.conv_out.to(**place)
        self.model.latent_mean = torch.tensor(config.latent_mean or (0.0,) * config.latent_dim, **place)
        self.model.latent_std = torch.tensor(config.latent_std or (1.0,) * config.latent_dim, **place)
        for name, call, kind in (("encoder", "encode", _Side), ("decoder", "decode", _DecoderSide)):
            network = _CompiledViT(getattr(self.model, name), programs[name], config.text_dim, **place)
            room = functools.partial(self._room, call)
            setattr(self.model, name, kind(cast(FastEncoder, network), network.run, plan, room))
        self.model.eval().requires_grad_(False)


class _CompiledViT(nn.Module):
    """In the place of a :class:`FastEncoder` or :class:`FastDecoder`; ``vit`` is on the meta device."""

    rows: Tensor

    def __init__(
        self, vit: Encoder | Decoder, program: _Program, text_dim: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.vit, self._program, self._text_dim = vit, program, text_dim
        self.register_buffer("rows", torch.empty(0, device=device, dtype=dtype), persistent=False)

    def run(self, x: Tensor, features: Tensor | None, mask: Tensor | None) -> Tensor:
        """:meth:`FastEncoder.run` or :meth:`FastDecoder.run`. Bytes and floats alike become patches before the program."""
        if isinstance(self.vit, Encoder):
            if x.dtype == torch.uint8:
                x = ops.patchify_uint8(x, self.vit.patch_size, self.rows.dtype)  # (B, hw, 3 p p)
            else:
                x = ops.patchify(x, self.vit.patch_size)  # (B, hw, 3 p p)
        if self.vit.text is None:
            return self._program(x)[0]
        return self._program(x, *_both(features, mask, len(x), self._text_dim, self.rows))[0]


def _both(features: Tensor | None, mask: Tensor | None, batch: int, text_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Features (B, N_t, D_t) and mask (B, N_t) for a program, which always takes both.

    Without features they are the null caption, without a mask nothing is padded; new ones have ``like``'s device and dtype.
    """
    if features is None:
        return like.new_zeros(batch, 1, text_dim), torch.zeros(batch, 1, dtype=torch.bool, device=like.device)
    if mask is None:
        mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    return features, mask


# -- directories ---------------------------------------------------------------------------------------------------------------


def _read(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{directory} has no {MANIFEST}: it is no package; save_package makes one") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not of format {FORMAT}: make the package again with this version of textok-fast")
    return manifest


def _require_replaceable(directory: Path) -> None:
    """InputError where ``directory`` is something else than a package, or holds more than one."""
    if not directory.exists() and not directory.is_symlink():
        return
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory: give a new one for the package")
    found = {path.name for path in directory.iterdir()}
    own = {MANIFEST, *_read(directory)["files"]} if MANIFEST in found else set()
    if others := sorted(found - own):
        raise InputError(f"{directory} holds {others[0]}, which is no part of a package: give a new or empty directory")
