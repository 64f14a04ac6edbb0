"""Exported directories run as the PyTorch classes are: the same calls, inputs and errors, over what lies there."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from textok_fast import ops
from textok_fast.config import DiTConfig, TexTokConfig, from_mapping, to_dict
from textok_fast.diffusion import SamplerProgram
from textok_fast.errors import InputError
from textok_fast.export import tensorrt
from textok_fast.export.directory import MANIFEST, Manifest, sha256
from textok_fast.inference.generator import GeneratorEngine, _Conditions, _Loop, _Variant
from textok_fast.inference.packages import BOTTLENECK, PackagedGenerator, _both, load_package
from textok_fast.inference.pipelines import AnyPipeline, GenerationPipeline, build_pipeline
from textok_fast.inference.plan import Plan
from textok_fast.inference.tokenizer import TokenizerEngine, shorten
from textok_fast.modeling.bottlenecks import build_bottleneck
from textok_fast.modeling.saving import NO_WEIGHTS
from textok_fast.modeling.text_encoders import TextEncoder, TextFeatures, _Network, _Source
from textok_fast.modeling.tokenizer import TexTok, Tokens, from_uint8, to_uint8
from textok_fast.ops.device import resolve_device
from textok_fast.paths import cache_dir

TEXT_FOLDER = "text_tokenizer"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}

Loaded = AnyPipeline | GeneratorEngine | TokenizerEngine


class Program(Protocol):
    """One exported graph, called with its inputs in their order (None is left out); returns its outputs."""

    @property
    def inputs(self) -> Sequence[str]: ...

    def __call__(self, *given: Tensor | None) -> list[Tensor]: ...


def load(
    directory: str | Path,
    device: str | torch.device | None = None,
    provider: str = "",
    verify: bool = True,
    sampler: bool = True,
) -> Loaded:
    """What ``textok-fast export`` wrote, as a pipeline where it holds generator and tokenizer, else as the one that it holds.

    Args:
        device: "cpu", "cuda" or "cuda:N"; None or "auto" is the GPU where torch and the runtime have one, else the CPU. Engines
            of TensorRT and TensorRT-RTX run on a GPU alone; those that do not suit it are built again.
        provider: of ONNX Runtime, of :data:`PROVIDERS`; empty for the device's own. "cuda" and "tensorrt" need a GPU.
        verify: compare the SHA-256 of all files with export.json's. Engines' are compared in any case.
        sampler: let a sampling run be a call of sampler.onnx a step where it fits (:class:`ExportedGenerator`); False is
            modulation.onnx and step.onnx at all times, which read adaLN's weights once a run instead of at each step.

    Raises: InputError for a directory that is none, not complete or damaged, a runtime that is not installed, and a device or a
        provider that it does not have.
    """
    directory = Path(directory)
    manifest = Manifest.read(directory)
    manifest.require_complete(directory, verify)
    if provider and manifest.to != "onnx":
        raise InputError(
            f"providers are ONNX Runtime's, {directory} was exported to {manifest.to}: leave provider={provider!r}"
        )
    if manifest.to == "aoti":
        return _packages(directory, manifest, device)
    if manifest.to in tensorrt.MODULES:
        gpu = tensorrt.gpu_device(device)
        return assemble(directory, manifest, gpu, lambda name: tensorrt.load_engine(directory, name, gpu), sampler)
    if manifest.to != "onnx":
        raise InputError(f"{directory} was exported to {manifest.to}, which textok_fast.export.load does not run")
    where = place(device, provider)
    if manifest.precision == "bf16" and where.type == "cpu":
        raise InputError(
            f"{directory} is in bf16, which ONNX Runtime's CPU provider does not have: load it on a GPU, or export in fp32 "
            "or int8"
        )
    program = functools.partial(OnnxProgram, device=where, provider=provider)
    return assemble(directory, manifest, where, lambda name: program(directory / manifest.files[name]["file"]), sampler)


def refit(loaded: Loaded, directory: str | Path) -> None:
    """Takes the weights of another export of the same model, such as a later checkpoint's, into engines that were built with
    ``refit``: ``loaded`` computes with them from now on, and nothing is built.

    Args:
        loaded: what :func:`load` returned, over engines of TensorRT or TensorRT-RTX.
        directory: of the other export, with its ONNX files.

    Raises: InputError for programs that are no engines, engines without ``refit``, and another model's files. Graphs that come
        before the one that fails have then the new weights.
    """
    directory = Path(directory)
    manifest = Manifest.read(directory)
    manifest.require_complete(directory)
    engines = loaded._engines if isinstance(loaded, GenerationPipeline) else (loaded,)
    parts = [each for each in engines or () if isinstance(each, ExportedGenerator | ExportedTokenizer)]
    programs = {name: program for part in parts for name, program in part.exported.items()}
    taking = {name: program for name, program in programs.items() if isinstance(program, tensorrt.EngineProgram)}
    if not programs or len(taking) < len(programs):
        raise InputError("only engines of TensorRT and TensorRT-RTX take other weights: load the other export instead")
    for part in parts:
        kind = "generator" if isinstance(part, ExportedGenerator) else "tokenizer"
        if lacking := model_differs(getattr(manifest, kind), part.config):
            raise InputError(f"{directory} holds another {kind}: {lacking}")
    if missing := sorted(name for name in programs if name not in manifest.files):
        raise InputError(f"{directory} holds no {missing[0]}.onnx: export the same parts")
    for name, program in taking.items():
        program.refit(directory / manifest.files[name]["file"])
    for part in parts:
        if isinstance(part, ExportedTokenizer):
            part.model.take_statistics(from_mapping(TexTokConfig, manifest.tokenizer or {}), directory)


STATISTICS = ("latent_mean", "latent_std")  # of a tokenizer's configuration, which training measures


def model_differs(exported: dict[str, Any] | None, config: DiTConfig | TexTokConfig, but: Sequence[str] = STATISTICS) -> str:
    """How a configuration in export.json differs from a model's, in fields other than ``but``; "" where it does not."""
    if exported is None:
        return "there is none"
    theirs, ours = to_dict(from_mapping(type(config), exported)), to_dict(config)
    found = [
        f"{name} is {theirs[name]}, wanted {ours[name]}" for name in ours if name not in but and theirs[name] != ours[name]
    ]
    return ", ".join(found[:3])


def assemble(
    directory: Path, manifest: Manifest, device: torch.device, program: Callable[[str], Program], sampler: bool = True
) -> Loaded:
    """Engines over programs of any kind: ``program(name)`` makes the one of an exported graph. ``sampler``: of :func:`load`."""
    plan = Plan(device=str(device))  # of the graphs' inputs and outputs, whatever lies between
    size = sum(entry["bytes"] for entry in manifest.files.values())
    generator = tokenizer = None
    if manifest.generator is not None and {"modulation", "step"} <= set(manifest.files):
        config = from_mapping(DiTConfig, manifest.generator)
        programs = {name: program(name) for name in ("modulation", "step")}
        whole = functools.partial(program, "sampler") if sampler and "sampler" in manifest.files else None
        generator = ExportedGenerator(config, plan, device, programs, whole, size)
    if manifest.tokenizer is not None and {"encoder", "decoder", "text"} & set(manifest.files):
        sides: dict[str, Program] = {str(name): program(name) for name in ("encoder", "decoder") if name in manifest.files}
        tokenizer = ExportedTokenizer(from_mapping(TexTokConfig, manifest.tokenizer), plan, device, sides, size, directory)
        if "text" in manifest.files and manifest.text is not None:
            config_ = tokenizer.config
            tokenizer.model.text_encoder = ExportedTextEncoder(
                *(directory / TEXT_FOLDER, manifest.text, program("text"), device),
                *(config_.max_text_tokens, config_.text_split, config_.text_window),
            )
    if generator is None and tokenizer is None:
        raise InputError(f"{directory} holds nothing that can be run: export an encoder, a decoder or a generator into it")
    if generator is None or tokenizer is None or manifest.pipeline is None:
        return generator if tokenizer is None else tokenizer  # type: ignore[return-value]
    about, name = manifest.pipeline, str(directory / "export.json")
    return build_pipeline(generator.model, tokenizer.model, about, name, engines=(generator, tokenizer))


def _packages(directory: Path, manifest: Manifest, device: str | torch.device | None) -> Loaded:
    place = None if device is None or str(device) == "auto" else device
    there = [name for name in ("generator", "tokenizer") if f"{name}/package" in manifest.files]
    engines = {name: load_package(directory / name, place) for name in there}
    if len(engines) == 2 and manifest.pipeline is not None:
        generator, tokenizer = engines["generator"], engines["tokenizer"]
        assert isinstance(generator, GeneratorEngine) and isinstance(tokenizer, TokenizerEngine)
        name = str(directory / "export.json")
        return build_pipeline(generator.model, tokenizer.model, manifest.pipeline, name, engines=(generator, tokenizer))
    if not engines:
        raise InputError(f"{directory} holds no package: export again")
    return next(iter(engines.values()))


# -- ONNX Runtime --------------------------------------------------------------------------------------------------------------


def place(device: str | torch.device | None, provider: str) -> torch.device:
    """The device, and InputError where the installed ONNX Runtime has no provider for it."""
    try:
        import onnxruntime
    except ImportError:
        raise InputError("running ONNX files needs onnxruntime: pip install 'textok-fast[export]'") from None
    if provider and provider not in PROVIDERS:
        raise InputError(f"provider must be one of {', '.join(PROVIDERS)}, got {provider!r}")
    there = onnxruntime.get_available_providers()
    if device is None or str(device) == "auto":
        if provider == "cpu" or (not provider and PROVIDERS["cuda"] not in there):
            return torch.device("cpu")
        device = "cuda" if provider else device  # never silently on the CPU
    found = resolve_device(device)
    wanted = PROVIDERS[provider or found.type]
    if provider and (provider == "cpu") != (found.type == "cpu"):
        raise InputError(f"the provider {provider!r} does not run on {found}")
    if wanted not in there:
        raise InputError(
            f"this build of ONNX Runtime has no {wanted}, only {', '.join(there)}: install onnxruntime-gpu, or use device='cpu'"
        )
    if str(found) == "cuda":
        found = torch.device("cuda", torch.cuda.current_device())
    return found


class OnnxProgram:
    """An ONNX file in ONNX Runtime, whose inputs and outputs are bound where they lie: nothing is copied.

    On a GPU it has a stream of its own, which waits for torch's current one and is waited for by it, on the device: so a call
    belongs to whatever stream it is made under, and the host waits for none. Serves one thread at a time.
    """

    def __init__(self, path: Path, device: torch.device, provider: str = "") -> None:
        import onnxruntime

        self._device, self._name = device, path.name
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._run = onnxruntime.RunOptions()
        self._queue = None
        chosen: list[Any] = [PROVIDERS["cpu"]]
        if device.type == "cuda":
            self._queue = _Queue(device)
            self._run.add_run_config_entry("disable_synchronize_execution_providers", "1")
            own: dict[str, Any] = {"device_id": device.index or 0, "user_compute_stream": str(self._queue.handle)}
            chosen = [(PROVIDERS["cuda"], {**own, "use_tf32": 0}), *chosen]
            if provider == "tensorrt":
                chosen = [(PROVIDERS["tensorrt"], {**own, **_tensorrt_options(path)}), *chosen]
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=chosen)
        except Exception as error:  # what the runtime raises has no common class
            raise InputError(f"ONNX Runtime cannot load {path}: {_said(error)}") from None
        wanted, got = chosen[0] if isinstance(chosen[0], str) else chosen[0][0], self._session.get_providers()
        if wanted not in got:  # the runtime goes on with another one where a library of the provider is missing
            raise InputError(
                f"ONNX Runtime did not start {wanted} for {path}, only {', '.join(got)}: a library that it needs is "
                "missing; its log says which"
            )
        self._inputs = {each.name: (each.type, each.shape) for each in self._session.get_inputs()}
        self._outputs = {each.name: (each.type, each.shape) for each in self._session.get_outputs()}
        self.inputs = list(self._inputs)
        self._binding = self._session.io_binding()
        self._nowhere = torch.empty(1, device=device)  # where tensors of no sample lie, which have no address
        self._bound: dict[str, tuple[int, tuple[int, ...]]] = {}  # by input: where it lies, and its shape

    def __call__(self, *given: Tensor | None) -> list[Tensor]:
        tensors = [each.detach().contiguous() for each in given if each is not None]
        if len(tensors) != len(self._inputs):
            raise InputError(f"{self._name} takes {', '.join(self._inputs)}; got {len(tensors)} tensors")
        kind, number = self._device.type, self._device.index or 0
        sizes: dict[str, int] = {}
        for (name, (dtype, shape)), tensor in zip(self._inputs.items(), tensors, strict=True):
            self._check(name, dtype, shape, tensor, sizes)
            place = (tensor.data_ptr() or self._nowhere.data_ptr(), tuple(tensor.shape))
            if self._bound.get(name) != place:  # most inputs of a loop stay where they are
                self._binding.bind_input(name, kind, number, _NUMPY[dtype], place[1], place[0])
                self._bound[name] = place
        outputs = []  # new ones, from torch's cache: a caller keeps them
        for name, (dtype, shape) in self._outputs.items():
            size = [sizes[axis] if isinstance(axis, str) else axis for axis in shape]
            out = torch.empty(size, dtype=_TORCH[dtype], device=self._device)
            self._binding.bind_output(
                name, kind, number, _NUMPY[dtype], tuple(size), out.data_ptr() or self._nowhere.data_ptr()
            )
            outputs.append(out)
        try:
            with contextlib.nullcontext() if self._queue is None else self._queue.ordered():
                self._session.run_with_iobinding(self._binding, self._run)
        except Exception as error:
            raise InputError(f"ONNX Runtime cannot run {self._name} on these inputs: {_said(error)}") from None
        return outputs

    def _check(self, name: str, dtype: str, shape: Sequence[int | str], tensor: Tensor, sizes: dict[str, int]) -> None:
        """InputError for what the graph does not take: the runtime would read on past the end of a tensor that is too small.
        Adds the free sizes to ``sizes``."""
        if tensor.dtype != _TORCH[dtype] or tensor.device != self._device:
            raise InputError(
                f"{name} of {self._name} must be {_NUMPY[dtype]} on {self._device}, got {str(tensor.dtype)[6:]} on "
                f"{tensor.device}"
            )
        fits = len(shape) == tensor.ndim
        for wanted, size in zip(shape, tensor.shape, strict=False):
            fits = fits and size == (wanted if isinstance(wanted, int) else sizes.setdefault(wanted, size))
        if not fits:
            raise InputError(f"{name} of {self._name} must be ({', '.join(map(str, shape))}), got {tuple(tensor.shape)}")


class _Queue:
    """A CUDA stream for a session, in order with torch's current one, whichever that is at the time of a call.

    ONNX Runtime takes a stream when a session is made and never another; torch's default one, whose handle is 0, counts as
    none.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self.handle: int = self._stream.cuda_stream

    @contextlib.contextmanager
    def ordered(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            yield
        finally:
            current.wait_stream(self._stream)


def _tensorrt_options(path: Path) -> dict[str, Any]:
    """Of the TensorRT provider for an exported graph: where engines are kept between processes, and one profile for the sizes
    that :data:`textok_fast.export.tensorrt.PROFILE` has, so that none is built again for another batch."""
    try:
        import onnx
    except ImportError:
        raise InputError("the provider tensorrt reads a graph's sizes with onnx: pip install onnx") from None
    files = [sha256(file) for file in tensorrt.onnx_files(path)]  # the graph, and its weights where they are external
    digest = files[0] if len(files) == 1 else hashlib.sha256("".join(files).encode()).hexdigest()
    cache = cache_dir() / "onnxruntime-tensorrt" / digest[:16]
    cache.mkdir(parents=True, exist_ok=True)
    low, usual, _ = tensorrt.PROFILE["text_length"]
    longest = tensorrt.longest_text(path.parent, path.stem)
    sizes = {**tensorrt.PROFILE, "text_length": (low, min(usual, longest), longest)}
    shapes: dict[str, list[int | str]] = {}
    for value in onnx.load(str(path), load_external_data=False).graph.input:
        shapes[value.name] = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
    profile = {
        f"trt_profile_{which}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, tensorrt.shape_at(shape, sizes, k)))}" for name, shape in shapes.items()
        )
        for k, which in enumerate(("min", "opt", "max"))
    }
    return {"trt_engine_cache_enable": True, "trt_engine_cache_path": str(cache), **profile}


def _said(error: Exception) -> str:
    """What ONNX Runtime has to say, in a line: without its own prefix, and cut."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^(Load model from \S+ failed|Exception during initialization): ?", "", text)
    return text if len(text) <= 120 else f"{text[:117]}..."


_NUMPY = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(bool)": "bool"}
_TORCH = {"tensor(float)": torch.float32, "tensor(int64)": torch.int64, "tensor(bool)": torch.bool}


# -- the generator -------------------------------------------------------------------------------------------------------------


class ExportedGenerator(PackagedGenerator):
    """A :class:`GeneratorEngine` over exported graphs.

    Where the directory has sampler.onnx, runs whose every evaluation is guided are a call of it each: guidance and update are
    inside, and the noise, where a sampler adds some, is all that is made outside. Samplers that keep more than x (dpmpp_2m,
    unipc, heun), negative captions, and other guided channels than the model's are not in it; without guidance its pair would
    cost twice as much. Those runs are modulation.onnx, for all evaluations at once, and step.onnx.

    ``programs``: modulation and step; ``sampler``: makes the program of sampler.onnx, which is loaded when a run needs it.
    """

    def __init__(
        self,
        config: DiTConfig,
        plan: Plan,
        device: torch.device,
        programs: dict[str, Program],
        sampler: Callable[[], Program] | None,
        weights: int,
    ) -> None:
        given: dict[str, Any] = {"modulation": programs["modulation"], "network": programs["step"]}
        if config.text_dim:
            given["text"] = lambda *given: list(given)  # the step takes features and mask as they are
        super().__init__(config, plan, device, given, weights)
        self._programs, self._make_sampler = dict(programs), sampler

    @property
    def exported(self) -> dict[str, Program]:
        """All programs, by the names of their graphs; loads those that no run has needed so far."""
        if self._make_sampler is not None:
            self._sampler()
        return self._programs

    def _sampler(self) -> Program:
        if "sampler" not in self._programs:
            assert self._make_sampler is not None
            self._programs["sampler"] = self._make_sampler()
        return self._programs["sampler"]

    def _variants(self, given: _Conditions, program: SamplerProgram) -> list[_Variant]:
        channels = (given.guided_channels or None) == (self.config.guided_channels or None)
        fits = program.mix is None and all(program.guided) and given.negative_text is None and channels
        if self._make_sampler is None or not fits:
            return super()._variants(given, program)
        return [_Variant(True, "sampler")] * program.evaluations

    def _sampler_step(self, loop: _Loop) -> Tensor:
        batch = loop.shape.batch
        noise = ops.seeded_normal(loop._seeds, loop._draw, loop._sample) if loop.shape.draws else loop.work[0]  # (B, ...)
        given: dict[str, Tensor] = {"x": loop.work[0], "index": loop._index, "table": loop._table, "noise": noise}
        given["times"] = loop._times.float()  # (E,)
        if loop._labels is not None:
            given["labels"] = loop._labels.index_select(0, loop._row_of[:batch])  # (B,)
        if loop._text is not None:  # of the pair, whose other half is the graph's own
            given |= {"text": loop._text.tokens[:batch], "text_mask": loop._text.mask[:batch]}
        if loop._image is not None:
            given["image_tokens"] = loop._image[:batch]
        sampler = self._sampler()
        return sampler(*(given[name] for name in sampler.inputs))[0]


# -- the tokenizer -------------------------------------------------------------------------------------------------------------


class ExportedTokenizer(TokenizerEngine):
    """A :class:`TokenizerEngine` whose two halves are programs from pixels to tokens and from tokens to pixels."""

    model: _ExportedTexTok

    def __init__(
        self,
        config: TexTokConfig,
        plan: Plan,
        device: torch.device,
        programs: dict[str, Program],
        weights: int,
        directory: Path,
    ) -> None:
        self.plan, self._weights = plan, weights
        self._largest = {"encode": 0, "decode": 0}
        with torch.device("meta"):
            self.model = _ExportedTexTok(config)
        self.model.use(programs, device, directory)

    @property
    def exported(self) -> dict[str, Program]:
        """All programs, by the names of their graphs."""
        encoder = self.model._text_encoder[0] if self.model._text_encoder else None
        text = {"text": encoder.program} if isinstance(encoder, ExportedTextEncoder) else {}
        return {**self.model._programs, **text}


class _ExportedTexTok(TexTok):
    """A TexTok's interface and checks without its networks."""

    _programs: dict[str, Program]
    _directory: Path
    _place: torch.device

    def use(self, programs: dict[str, Program], device: torch.device, directory: Path) -> None:
        self._programs, self._directory, self._place = programs, directory, device
        self.take_statistics(self.config, directory)
        self.encoder = nn.Identity()  # type: ignore[assignment]
        self.decoder = _ExportedDecoder(self, device)  # type: ignore[assignment]
        self.eval().requires_grad_(False)

    def take_statistics(self, config: TexTokConfig, directory: Path) -> None:
        """All that lies outside the graphs: the codebook, and the latents' mean and deviation."""
        bottleneck = build_bottleneck(config)
        if wanted := bottleneck.state_dict():
            path = directory / BOTTLENECK
            if not path.is_file():
                raise InputError(
                    f"{directory} is not complete: {BOTTLENECK}, the codebook, is missing; copy or export it again"
                )
            try:
                state = load_file(path)
            except (SafetensorError, OSError) as error:
                raise InputError(f"cannot read {path}: {error}; copy or export it again") from None
            if {name: value.shape for name, value in state.items()} != {name: value.shape for name, value in wanted.items()}:
                raise InputError(f"{path} is of another tokenizer: it has {', '.join(state)}; copy or export it again")
            bottleneck.load_state_dict(state)
        self.bottleneck = bottleneck.to(self._place).eval().requires_grad_(False)
        self.config.latent_mean, self.config.latent_std = config.latent_mean, config.latent_std
        self.latent_mean = torch.tensor(config.latent_mean or (0.0,) * config.latent_dim, device=self._place)
        self.latent_std = torch.tensor(config.latent_std or (1.0,) * config.latent_dim, device=self._place)

    def save_pretrained(self, directory: str | Path, notes: Mapping[str, Any] | None = None) -> Path:
        raise InputError(NO_WEIGHTS)

    def run(self, name: str, x: Tensor, text: TextFeatures | None, reads: bool) -> list[Tensor]:
        if name not in self._programs:
            raise InputError(f"{self._directory} holds no {name}: export it with --what {name}, or all")
        if not reads:
            return self._programs[name](x)
        features, mask = shorten(text, False, self.config.max_text_tokens if self.config.text_positions else None)
        return self._programs[name](x, *_both(features, mask, len(x), self.config.text_dim, self.latent_mean))

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor, text: TextFeatures | None) -> Tokens:
        if pixels.dtype == torch.uint8:
            pixels = from_uint8(pixels)
        tokens, *more = self.run("encoder", pixels, text, self.config.text_in_encoder)
        if not more:
            return Tokens.wrap(tokens)
        return Tokens.wrap(tokens, more[0]) if self.bottleneck.codebook_size else Tokens.wrap(tokens, None, (tokens, more[0]))

    def _raw_latents(self, tokens: Tensor) -> Tensor:
        """Tokens as the graph takes them, which undoes the normalisation itself."""
        if tokens.dtype == torch.int64:
            return self.normalize(self.bottleneck.latents_from_indices(tokens).to(self.dtype))
        return tokens.to(self.dtype)


class _ExportedDecoder(nn.Module):
    """In the place of a :class:`Decoder`, over tokens instead of raw latents."""

    queries: Tensor

    def __init__(self, model: _ExportedTexTok, device: torch.device) -> None:
        super().__init__()
        self._model = [model]  # in a list: it is no part of this one
        self.register_buffer("queries", torch.empty(0, device=device), persistent=False)

    def forward(self, tokens: Tensor, text: TextFeatures | None) -> Tensor:
        model = self._model[0]
        return model.run("decoder", tokens, text, model.config.text_in_decoder)[0]

    def uint8(self, tokens: Tensor, text: TextFeatures | None) -> Tensor:
        return to_uint8(self(tokens, text))


# -- text ----------------------------------------------------------------------------------------------------------------------


class ExportedTextEncoder(TextEncoder):
    """A :class:`TextEncoder` whose network is a program; its features are cached in memory."""

    def __init__(
        self,
        folder: Path,
        about: dict[str, Any],
        program: Program,
        device: torch.device,
        max_tokens: int,
        split: str,
        window: bool,
    ) -> None:
        if missing := sorted({"name", "dim", "identity", "max_positions", "special"} - set(about)):
            raise InputError(f"{folder.parent / MANIFEST} is damaged: text has no {missing[0]}; copy it or export again")
        source = _Source(about["name"], str(folder), str(folder), None, f"exported {about['identity']}", about["dim"])
        self._use(source, max_tokens, split, False, device, torch.float32, window)
        self.program = program
        self._network = _ExportedNetwork(source, about, program, device)

    def unload(self) -> None:
        """Nothing: the program is all there is."""


class _ExportedNetwork(_Network):
    def __init__(self, source: _Source, about: dict[str, Any], program: Program, device: torch.device) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise InputError(f"captions need transformers' tokenizers: pip install transformers ({error})") from None
        self.source, self.device, self.dtype = source, device, torch.float32
        if not Path(source.files).is_dir():  # which transformers would take for a name on the Hub
            raise InputError(f"{Path(source.files).parent} is not complete: {TEXT_FOLDER} is missing; copy or export it again")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source.files, local_files_only=True)
        except Exception as error:  # of files cut short the libraries raise what they come across
            raise InputError(f"cannot read the tokenizer in {source.files}: {error}; copy or export it again") from None
        self.special, self.max_positions = about["special"], about["max_positions"]

        def model(input_ids: Tensor, attention_mask: Tensor) -> types.SimpleNamespace:
            return types.SimpleNamespace(last_hidden_state=program(input_ids, attention_mask)[0])

        self.model = model  # type: ignore[assignment]
