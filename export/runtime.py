"""Exported directories run as the PyTorch classes are: the same calls, inputs and errors, over what lies there."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from textok_fast.config import DiTConfig, TexTokConfig, from_mapping
from textok_fast.errors import InputError
from textok_fast.export import tensorrt
from textok_fast.export.directory import Manifest
from textok_fast.inference.generator import GeneratorEngine
from textok_fast.inference.packages import BOTTLENECK, PackagedGenerator, _both, load_package
from textok_fast.inference.pipelines import AnyPipeline, build_pipeline
from textok_fast.inference.plan import Plan
from textok_fast.inference.tokenizer import TokenizerEngine, shorten
from textok_fast.modeling.bottlenecks import build_bottleneck
from textok_fast.modeling.text_encoders import TextEncoder, TextFeatures, _Network, _Source
from textok_fast.modeling.tokenizer import TexTok, Tokens, from_uint8, to_uint8
from textok_fast.ops.device import resolve_device

TEXT_FOLDER = "text_tokenizer"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}

Loaded = AnyPipeline | GeneratorEngine | TokenizerEngine


class Program(Protocol):
    """One exported graph, called with its inputs in their order (None is left out); returns its outputs."""

    def __call__(self, *given: Tensor | None) -> list[Tensor]: ...


def load(directory: str | Path, device: str | torch.device | None = None, provider: str = "") -> Loaded:
    """What ``textok-fast export`` wrote, as a pipeline where it holds generator and tokenizer, else as the one that it holds.

    Args:
        device: "cpu", "cuda" or "cuda:N"; None or "auto" is the GPU where torch and the runtime have one, else the CPU. Engines
            of TensorRT and TensorRT-RTX run on a GPU alone; those that do not suit it are built again.
        provider: of ONNX Runtime, of :data:`PROVIDERS`; empty for the device's own.

    Raises: InputError for a directory that is none or not complete, a runtime that is not installed, and a device that it does
        not have.
    """
    directory = Path(directory)
    manifest = Manifest.read(directory)
    manifest.require_complete(directory)
    if manifest.to == "aoti":
        return _packages(directory, manifest, device)
    if manifest.to in tensorrt.MODULES:
        gpu = tensorrt.gpu_device(device)
        return assemble(directory, manifest, gpu, lambda name: tensorrt.load_engine(directory, name, gpu))
    if manifest.to != "onnx":
        raise InputError(f"{directory} was exported to {manifest.to}, which textok_fast.export.load does not run")
    where = place(device, provider)
    program = functools.partial(OnnxProgram, device=where, provider=provider)
    return assemble(directory, manifest, where, lambda name: program(directory / manifest.files[name]["file"]))


def assemble(directory: Path, manifest: Manifest, device: torch.device, program: Callable[[str], Program]) -> Loaded:
    """Engines over programs of any kind: ``program(name)`` makes the one of an exported graph."""
    plan = Plan(device=str(device))  # of the graphs' inputs and outputs, whatever lies between
    size = sum(entry["bytes"] for entry in manifest.files.values())
    generator = tokenizer = None
    if manifest.generator is not None and {"modulation", "step"} <= set(manifest.files):
        config = from_mapping(DiTConfig, manifest.generator)
        programs: dict[str, Any] = {"modulation": program("modulation"), "network": program("step")}
        if config.text_dim:
            programs["text"] = lambda *given: list(given)  # the step takes features and mask as they are
        generator = PackagedGenerator(config, plan, device, programs, size)
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
    if (device is None or str(device) == "auto") and (provider == "cpu" or PROVIDERS["cuda"] not in there):
        return torch.device("cpu")
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
    """An ONNX file in ONNX Runtime. On a GPU inputs and outputs are bound where they lie: nothing is copied to the host."""

    def __init__(self, path: Path, device: torch.device, provider: str = "") -> None:
        import onnxruntime

        self._device = device
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        chosen: list[Any] = [PROVIDERS["cpu"]]
        if device.type == "cuda":
            own: dict[str, Any] = {"device_id": device.index or 0}
            own["user_compute_stream"] = str(torch.cuda.current_stream(device).cuda_stream)  # torch's: no waiting in between
            chosen = [(PROVIDERS["cuda"], {**own, "use_tf32": 0}), *chosen]
            if provider == "tensorrt":
                chosen = [(PROVIDERS["tensorrt"], {**own, "trt_engine_cache_enable": True}), *chosen]
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=chosen)
        except Exception as error:  # what the runtime raises has no common class
            raise InputError(f"ONNX Runtime cannot load {path}: {' '.join(str(error).split())[:300]}") from None
        self._inputs = [(each.name, each.type, each.shape) for each in self._session.get_inputs()]
        self._outputs = [(each.name, each.type, each.shape) for each in self._session.get_outputs()]

    def __call__(self, *given: Tensor | None) -> list[Tensor]:
        tensors = [each.detach().contiguous() for each in given if each is not None]
        if len(tensors) != len(self._inputs):
            raise InputError(f"the graph takes {', '.join(name for name, _, _ in self._inputs)}; got {len(tensors)} tensors")
        if self._device.type == "cpu":
            named = {name: tensor.numpy() for (name, _, _), tensor in zip(self._inputs, tensors, strict=True)}
            return [torch.from_numpy(value) for value in self._session.run(None, named)]
        return self._bound(tensors)

    def _bound(self, tensors: list[Tensor]) -> list[Tensor]:
        binding, index = self._session.io_binding(), self._device.index or 0
        sizes: dict[str, int] = {}
        for (name, kind, shape), tensor in zip(self._inputs, tensors, strict=True):
            sizes |= {size: tensor.shape[axis] for axis, size in enumerate(shape) if isinstance(size, str)}
            binding.bind_input(name, "cuda", index, _NUMPY[kind], tuple(tensor.shape), tensor.data_ptr())
        outputs = []
        for name, kind, shape in self._outputs:
            size = [sizes[axis] if isinstance(axis, str) else axis for axis in shape]
            out = torch.empty(size, dtype=_TORCH[kind], device=self._device)
            binding.bind_output(name, "cuda", index, _NUMPY[kind], tuple(size), out.data_ptr())
            outputs.append(out)
        self._session.run_with_iobinding(binding)
        return outputs


_NUMPY = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(bool)": "bool"}
_TORCH = {"tensor(float)": torch.float32, "tensor(int64)": torch.int64, "tensor(bool)": torch.bool}


# -- the tokenizer -------------------------------------------------------------------------------------------------------------


class ExportedTokenizer(TokenizerEngine):
    """A :class:`TokenizerEngine` whose two halves are programs from pixels to tokens and from tokens to pixels."""

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


class _ExportedTexTok(TexTok):
    """A TexTok's interface and checks without its networks."""

    _programs: dict[str, Program]
    _directory: Path

    def use(self, programs: dict[str, Program], device: torch.device, directory: Path) -> None:
        config = self.config
        self._programs, self._directory = programs, directory
        self.bottleneck = build_bottleneck(config)
        if (directory / BOTTLENECK).is_file():
            from safetensors.torch import load_file

            self.bottleneck.load_state_dict(load_file(directory / BOTTLENECK))
        self.bottleneck.to(device)
        self.latent_mean = torch.tensor(config.latent_mean or (0.0,) * config.latent_dim, device=device)
        self.latent_std = torch.tensor(config.latent_std or (1.0,) * config.latent_dim, device=device)
        self.encoder = nn.Identity()  # type: ignore[assignment]
        self.decoder = _ExportedDecoder(self, device)  # type: ignore[assignment]
        self.eval().requires_grad_(False)

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
        source = _Source(about["name"], str(folder), str(folder), None, f"exported {about['identity']}", about["dim"])
        self._use(source, max_tokens, split, False, device, torch.float32, window)
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
        self.tokenizer = AutoTokenizer.from_pretrained(source.files)
        self.special, self.max_positions = about["special"], about["max_positions"]

        def model(input_ids: Tensor, attention_mask: Tensor) -> types.SimpleNamespace:
            return types.SimpleNamespace(last_hidden_state=program(input_ids, attention_mask)[0])

        self.model = model  # type: ignore[assignment]
