"""The systems that ``textok-fast bench speedup`` compares, in the forms it compares them in, ready to be timed.

A system makes a picture from a class: a DiT over N tokens, and the decoder of these tokens; TexTok's decoder also reads a
caption, which a text encoder turns into features first. All weights are random, and the same in every form.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from textok_fast import ops
from textok_fast.config import DiTConfig, TexTokConfig
from textok_fast.diffusion import (
    GaussianDiffusion,
    classifier_free_guidance,
    ddim_step,
    ddpm_step,
    sampler_program,
)
from textok_fast.errors import InputError
from textok_fast.evaluation.roofline import count_flops
from textok_fast.evaluation.step_times import TEXTOK_TOKENS, RandomWeights
from textok_fast.inference.engine import Engine
from textok_fast.inference.execution import Captured
from textok_fast.inference.generator import GeneratorEngine, SamplingRun
from textok_fast.inference.memory import available_memory
from textok_fast.inference.modulation import layout
from textok_fast.inference.plan import Plan
from textok_fast.inference.precision import pack_linears
from textok_fast.modeling import DiT, TexTok
from textok_fast.modeling.text_encoders import TextFeatures, load_text_encoder

FORMS = {
    "reference": "PyTorch, eager, as the original code runs it",
    "compile": "torch.compile with scaled_dot_product_attention",
    "engine": "textok_fast.inference",
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32, "fp8": torch.bfloat16}  # -> weights given
SAMPLERS = ("ddpm", "ddim")  # of the original code; the two that evaluate the network once a step and keep one state
SD_VAE = "SD-VAE f8"
# 140 words, which are about as many tokens as TexTok's captions have (120 to 220).
CAPTION = (
    "Picture {index}: a small wooden boat with a faded red hull and a short white mast rests on wet sand at low tide, tied "
    "by a long rope to an iron ring in the stone wall of the harbour behind it; green weed hangs from the rope and from the "
    "lower stones of the wall; two gulls stand on the bow, one of them with its wings half open, and a third walks through the "
    "shallow water in the foreground; on the quay above, a woman in a yellow raincoat holds a child by the hand and points at "
    "the birds; the sky is pale grey with a narrow bright band over the horizon, the light is soft and even, and the picture "
    "is taken from low down, with a wide lens, so that the boat looks large against the wall and the people look small."
)


@dataclass(frozen=True)
class System:
    """``textok`` is the decoder's configuration; None stands for the SD-VAE f8. ``guided_channels`` as its authors guide it."""

    name: str
    generator: DiTConfig
    textok: TexTokConfig | None
    guided_channels: int | None

    @property
    def tokens(self) -> int:
        """Transformer tokens N."""
        return self.generator.sequence_length

    @property
    def decoder(self) -> str:
        return SD_VAE if self.textok is None else f"TexTok-{self.textok.num_tokens}"


def system_named(name: str, size: str = "XL") -> System:
    """``TexTok-N`` for any N, ``DiT/2`` and ``DiT/1`` (also with the size in them), in any case; for pictures of 512 px.

    A generator of size "tiny" comes with small decoders for 64 px, to see that everything runs. InputError for other names.
    """
    known, tiny = name.lower().replace(f"dit-{size.lower()}", "dit"), size == "tiny"
    pixels = 64 if tiny else 512
    if known in ("dit/1", "dit/2"):
        patch = int(known[-1])
        config = DiTConfig.named(size, input_size=pixels // 8, patch_size=patch, in_channels=4)
        return System(f"DiT-{size}/{patch}", config, None, 3)  # the authors' code guides three of the four channels
    tokens = known.removeprefix("textok-")
    if known == tokens or not tokens.isdecimal() or int(tokens) < 1:
        raise InputError(f"unknown system {name!r}; known: TexTok-32 or another number of tokens, DiT/2, DiT/1")
    # A picture is made without the encoder, so that it is not built: one layer stands for it.
    decoder = TexTokConfig.named(
        "tiny" if tiny else "base", image_size=pixels, patch_size=16, num_tokens=int(tokens), encoder_depth=1
    )
    config = DiTConfig.named(size, num_tokens=int(tokens), in_channels=decoder.latent_dim)
    return System(f"TexTok-{tokens} + DiT-{size}", config, decoder, None)


def all_systems(size: str = "XL") -> list[System]:
    """The published token counts and both readings of the baseline."""
    return [system_named(name, size) for name in (*(f"TexTok-{n}" for n in TEXTOK_TOKENS), "DiT/2", "DiT/1")]


# -- what a step costs at least ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepCost:
    """What one step with guidance cannot do without, its modulation given: FLOPs (1 multiply-add = 2) and bytes read."""

    flops: int
    bytes: int


def step_cost(system: System, precision: str, batch: int) -> StepCost:
    """Counted on the meta device. Bytes: the weights of the token path once, in ``precision`` (int8 and fp8: the blocks'
    matrices), and a row of modulation for each label, the null label included."""
    model = _on_meta(system.generator)
    x, t, y = _inputs(system.generator, 2 * batch, torch.device("meta"), torch.float32)
    modulations = model.modulation(model.condition(t, y))
    flops = count_flops(lambda: model.step(x, modulations))
    base = PRECISIONS[precision].itemsize
    size = batch_rows(batch, system.generator) * sum(each.shape[1] for each in modulations) * base
    for name, parameter in model.named_parameters():
        if "adaLN" not in name and not name.startswith(("t_embedder.", "y_embedder.")):
            narrow = precision in ("int8", "fp8") and name.startswith("blocks.") and parameter.ndim == 2
            size += parameter.numel() * (1 if narrow else base)
    return StepCost(flops, size)


def batch_rows(batch: int, config: DiTConfig) -> int:
    """Distinct labels of a batch as the benchmark draws them, and the null label."""
    return min(batch, max(config.num_classes, 1)) + 1


# -- what is timed -----------------------------------------------------------------------------------------------------------


class Loop(Protocol):
    """A sampling run that is timed step by step, or as a whole."""

    total: int  # evaluations in a run
    weight_bytes: int  # of the generator in this form

    @property
    def done(self) -> int: ...

    @property
    def until_ahead(self) -> int:
        """How many evaluations come before one that also works for those after it; 0 is the next one."""

    @property
    def ahead(self) -> Callable[[], object] | None:
        """That work, for a whole run."""

    def begin(self) -> None:
        """A new run from new noise."""

    def advance(self) -> None:
        """One evaluation, as far as handing it to the device."""

    def finish(self) -> None:
        """All evaluations that are left."""


class Bench:
    """Builds the parts of systems for one device and precision; networks are kept, so that batches and forms share weights.

    Args:
        steps: of ``sampler``, with classifier-free guidance of scale ``guidance``.
        text_encoder: "minilm", or a transformers model by name or directory.
        compile_parts: whether on CUDA the engine form's text encoder and SD-VAE are compiled, or captured as they are.
    """

    def __init__(
        self,
        device: torch.device,
        precision: str,
        sampler: str = "ddpm",
        steps: int = 250,
        guidance: float = 1.5,
        text_encoder: str = "minilm",
        seed: int = 0,
        *,
        compile_parts: bool = True,
    ) -> None:
        self.compile_parts = compile_parts
        self.device, self.precision, self.dtype = device, precision, PRECISIONS[precision]
        self.sampler, self.steps, self.guidance, self.text_encoder = sampler, steps, guidance, text_encoder
        self.process = GaussianDiffusion()
        self._weights = RandomWeights(device, self.dtype, seed)
        self._vae_weights = RandomWeights(device, self.dtype, seed)
        self._kept: dict[tuple[Any, ...], Any] = {}
        self._numbers = itertools.count(10**6)  # of captions

    @property
    def base_precision(self) -> str:
        """What parts compute in that have no form in ``precision``: the SD-VAE and the text encoder."""
        return "fp32" if self.dtype == torch.float32 else "bf16"

    def plan(self, batch: int) -> Plan:
        return Plan.automatic(self.device, cast(Any, self.precision), batch)

    def how(self, form: str, batch: int) -> str:
        """How networks run in a form, in a few words."""
        if form == "compile":
            return "torch.compile, " + ", ".join(f"{key} {value}" for key, value in _compile_options(self.device).items())
        if form == "engine":
            plan = self.plan(batch)
            return f"{plan.precision}, capture {plan.capture}, compile {plan.compile}"
        return "eager"

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def forget(self, form: str, system: System) -> None:
        """Frees what was built for a system in a form, when it did not fit."""
        for key in [key for key in self._kept if key[0] == form and key[1] in (system.name, system.decoder)]:
            del self._kept[key]

    def forget_compiled(self) -> None:
        """Frees compiled functions: they are of one batch size, and their graphs hold memory."""
        found = [key for key in self._kept if key[0] == "compile" or key[-1] == "compiled"]
        for key in found:
            del self._kept[key]
        if found:
            torch._dynamo.reset()

    # -- generators ---------------------------------------------------------------------------------------------------------

    def network(self, system: System) -> DiT:
        return cast(DiT, self._once(("network", system.name), lambda: self._weights.fill(_on_meta(system.generator))))

    def weight_bytes(self, system: System) -> int:
        """Of the generator as it is given to every form."""
        return sum(parameter.numel() for parameter in _on_meta(system.generator).parameters()) * self.dtype.itemsize

    def loop(self, system: System, form: str, batch: int) -> Loop:
        """Raises InputError for a run that an engine refuses, and for a precision that the form does not have."""
        if form != "engine" and self.precision != self.base_precision:
            raise InputError(f"{self.precision} is a precision of the engine only")
        if form == "reference":
            return _OriginalLoop(self, system, batch)
        if form == "compile":
            return _CompiledLoop(self, system, batch)
        return _EngineLoop(self, self._engine(system, batch), system, batch)

    def _engine(self, system: System, batch: int) -> GeneratorEngine:
        plan = self.plan(batch)

        def make() -> GeneratorEngine:
            engine = Engine(self.network(system), plan)
            # The same in every system, and so held once. The blocks are packed for the number of tokens.
            engine.modulation = self._once(("modulation",), lambda: engine.modulation)
            return engine

        found: GeneratorEngine = self._once(("engine", system.name, plan.capture), make)
        return found

    # -- decoders -----------------------------------------------------------------------------------------------------------

    def decoder(self, system: System, form: str, batch: int) -> Callable[[], Tensor]:
        """Latents of ``batch`` pictures -> uint8 (B, S, S, 3)."""
        if system.textok is None:
            return self._sd_vae(system, form, batch)
        model = cast(TexTok, self._once(("textok", system.decoder), lambda: self._tokenizer(system.textok)))
        tokens = torch.randn(batch, model.config.num_tokens, model.config.latent_dim, device=self.device).to(self.dtype)
        text = self.features(batch)
        if form == "engine":
            engine = self._once((form, system.decoder), lambda: Engine(model, self.plan(batch)))
            return lambda: engine.decode(tokens, text, "uint8")
        if form == "reference":
            return _in_pytorch(lambda: model.decode(tokens, text, "uint8"))

        def decode(latents: Tensor, features: Tensor, mask: Tensor) -> Tensor:
            patches = model.decoder.patches(model.denormalize(latents), TextFeatures(features, mask))
            return ops.unpatchify_uint8(patches, model.config.patch_size)

        compiled = self._once((form, system.decoder), lambda: _compile(decode, self.device))
        return _in_pytorch(lambda: compiled(tokens, *text))

    def _tokenizer(self, config: TexTokConfig | None) -> nn.Module:
        assert config is not None
        encoder = load_text_encoder(self.text_encoder)
        with torch.device("meta"):
            model = TexTok(TexTokConfig(**{**vars(config), "text_encoder": self.text_encoder, "text_dim": encoder.dim}))
        return self._weights.fill(model)

    def _sd_vae(self, system: System, form: str, batch: int) -> Callable[[], Tensor]:
        vae = self._once(("sd-vae",), lambda: self._vae_weights.fill(_sd_vae_on_meta(system.generator.input_size < 64)))
        side = system.generator.input_size
        latents = torch.randn(batch, 4, side, side, device=self.device).to(self.dtype)  # (B, 4, S / 8, S / 8)

        def decode(z: Tensor) -> Tensor:
            pixels = vae.decoder(vae.post_quant_conv(z / 0.18215))  # (B, 3, S, S), the published scale of the latents
            return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)  # (B, S, S, 3)

        run: Callable[[Tensor], Tensor] = decode
        if form == "engine":
            vae = self._once((form, system.decoder), lambda: copy.deepcopy(vae).to(memory_format=torch.channels_last))
            latents = latents.contiguous(memory_format=torch.channels_last)
        if self._compiles(form):
            run = self._once((form, system.decoder, "compiled"), lambda: _compile(decode, self.device))
        # A picture's largest activations are 256 channels at full size, a few times over.
        each = 6 * 256 * (8 * side) ** 2 * self.dtype.itemsize
        at_once = max(1, min(batch, available_memory(self.device) // each))
        return self._fast(form, lambda: torch.cat([run(part) for part in latents.split(at_once)]))

    # -- text ---------------------------------------------------------------------------------------------------------------

    def features(self, batch: int) -> TextFeatures:
        """Features of ``batch`` captions on the device, as the decoder gets them."""
        encoder = load_text_encoder(self.text_encoder)
        found = self._once(("features", batch), lambda: encoder([CAPTION.format(index=i) for i in range(batch)]))
        return TextFeatures(found.features.to(self.device, self.dtype), found.mask.to(self.device))

    def text(self, form: str, batch: int) -> Callable[[], Tensor]:
        """The frozen encoder over the token ids of ``batch`` captions -> (B, N_t, D_t)."""
        encoder = load_text_encoder(self.text_encoder, cache=False, device=self.device, dtype=self.dtype)
        given: dict[str, Tensor] = {}

        def take(_: nn.Module, __: Any, inputs: dict[str, Tensor]) -> None:
            given.update(inputs)

        with _hooked(encoder.network, take):  # what the tokenizer makes of captions that no cache knows
            encoder([CAPTION.format(index=next(self._numbers)) for _ in range(batch)])

        def packed() -> nn.Module:
            network = copy.deepcopy(encoder.network)
            if self.device.type == "cpu":
                pack_linears(network, cast(Any, self.base_precision))
            return network

        network: Callable[..., Any] = encoder.network
        if form == "engine":
            network = self._once((form, "text"), packed)
        if self._compiles(form):
            network = self._once((form, "text", "compiled"), lambda: _compile(network, self.device))
        return self._fast(form, lambda: network(**given).last_hidden_state)

    # -- parts that are not ours ----------------------------------------------------------------------------------------------

    def _compiles(self, form: str) -> bool:
        """Whether the text encoder and the SD-VAE are compiled; on a CPU it made the SD-VAE slower than channels-last alone."""
        return form == "compile" or (form == "engine" and self.device.type == "cuda" and self.compile_parts)

    def _fast(self, form: str, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """``call`` as a CUDA graph, where the engine form is neither compiled nor on a CPU; as it is where it synchronizes."""
        if form != "engine" or self.device.type != "cuda" or self.compile_parts:
            return call
        result = call()

        def into_result() -> None:
            result.copy_(call())

        graph = Captured(into_result, [result], enabled=True, name="this part")
        try:
            graph()
        except InputError:
            return call

        def run() -> Tensor:
            graph()
            return result

        return run


# -- loops -------------------------------------------------------------------------------------------------------------------


class _EagerLoop:
    """What the loops over a plain network share: noise from torch's generator, a label for each sample, the null label."""

    ahead: Callable[[], object] | None = None
    until_ahead = 1000  # never: no sampler here has so many steps

    def __init__(self, bench: Bench, system: System, batch: int) -> None:
        self.model, self.process = bench.network(system), bench.process.respaced(bench.steps)
        self.device, self.dtype, self.scale = bench.device, bench.dtype, bench.guidance
        self.channels, self.sampler = system.guided_channels, bench.sampler
        x, _, y = _inputs(system.generator, batch, self.device, torch.float32)
        null = torch.full_like(y, system.generator.num_classes)
        self.shape, self.y = x.shape, torch.cat([y, null])  # (2 B,)
        self.total, self.done, self.weight_bytes = bench.steps, 0, bench.weight_bytes(system)

    def begin(self) -> None:
        self.z, self.done = torch.randn(self.shape, device=self.device), 0  # (B, ...) float32

    def finish(self) -> None:
        while self.done < self.total:
            self.advance()

    def advance(self) -> None:
        raise NotImplementedError


class _OriginalLoop(_EagerLoop):
    """The loop of DiT's code: the pair as one batch, guidance, then the sampler's formulas, one small operation at a time."""

    def advance(self) -> None:
        index = self.total - 1 - self.done
        with ops.use_backend("reference"):
            x = self.z.to(self.dtype)
            t = torch.full((2 * len(x),), int(self.process.timestep_map[index]), device=self.device)  # (2 B,)
            conditional, null = self.model(torch.cat([x, x]), t, self.y).chunk(2)  # each (B, ...), twice the channels
            channels = self.shape[2 if len(self.shape) == 3 else 1] if self.channels is None else self.channels
            output = classifier_free_guidance(conditional, null, self.scale, channels)
            if self.sampler == "ddim":
                self.z = ddim_step(self.process, output, self.z, index, 0.0, None)
            else:
                self.z = ddpm_step(self.process, output, self.z, index, torch.randn_like(self.z) if index else None)
        self.done += 1


class _CompiledLoop(_EagerLoop):
    """Network, guidance and sampler's update compiled as one function of the state, its noise and the step's number."""

    def __init__(self, bench: Bench, system: System, batch: int) -> None:
        super().__init__(bench, system, batch)
        program = sampler_program(bench.process, bench.sampler, self.scale, steps=bench.steps)
        self.table, self.times = program.table.to(self.device), program.times.to(self.device)
        model, channels, dtype = self.model, self.channels, self.dtype

        def step(z: Tensor, noise: Tensor, table: Tensor, times: Tensor, index: Tensor, y: Tensor) -> Tensor:
            x = z.to(dtype)
            output = model(torch.cat([x, x]), times.index_select(0, index).expand(len(y)), y)  # (2 B, ...)
            return ops.guided_step(output, z, table, index, noise, guided_channels=channels)

        self.step = bench._once(("compile", system.name), lambda: _compile(step, self.device))

    def begin(self) -> None:
        super().begin()
        self.index = torch.zeros(1, dtype=torch.int64, device=self.device)

    def advance(self) -> None:
        with ops.use_backend("reference"):
            # Into our own tensor: what a CUDA graph returns is overwritten by its next run.
            self.z.copy_(self.step(self.z, torch.randn_like(self.z), self.table, self.times, self.index, self.y))
        self.index += 1
        self.done += 1


class _EngineLoop:
    def __init__(self, bench: Bench, engine: GeneratorEngine, system: System, batch: int) -> None:
        self.bench, self.engine, self.system, self.batch = bench, engine, system, batch
        self.labels = _inputs(system.generator, batch, torch.device("cpu"), torch.float32)[2]  # (B,)
        self.seed, self.run = 0, cast(SamplingRun, None)
        self.begin()
        self.total, self.weight_bytes = self.run.total, engine.memory(batch, bench.steps).weights
        rows, element = batch_rows(batch, engine.config), engine.dtype.itemsize
        rows = min(batch + 1, 1 << (rows - 1).bit_length())  # as the engine pads them
        columns, width = engine.modulation.columns, engine.config.width
        self.layout = layout(engine.plan, columns, width, element, self.total, 2 * batch, rows)

    @property
    def done(self) -> int:
        return self.run.done

    @property
    def until_ahead(self) -> int:
        chunk = self.layout.chunk
        return -self.done % chunk if chunk else self.total

    @property
    def ahead(self) -> Callable[[], object] | None:
        """The modulation of all evaluations, chunk by chunk."""
        rows, chunk = self.layout
        if not chunk:
            return None
        engine, times = self.engine, torch.arange(self.total, device=self.engine.device)
        labels = torch.arange(rows, device=self.engine.device) % (engine.config.num_classes + 1)

        def compute() -> None:
            for part in times.split(chunk):
                t = part.unsqueeze(1).expand(-1, rows).reshape(-1)  # (c U,)
                engine.modulation(engine.model.condition(t, labels.repeat(len(part))))

        return compute

    def begin(self) -> None:
        self.seed += self.batch
        self.run = self.engine.start(
            self.bench.process,
            labels=self.labels,
            seeds=range(self.seed, self.seed + self.batch),
            sampler=self.bench.sampler,
            steps=self.bench.steps,
            guidance_scale=self.bench.guidance,
            guided_channels=self.system.guided_channels,
        )

    def advance(self) -> None:
        self.run.advance()

    def finish(self) -> None:
        self.run.finish()


# -- small things ------------------------------------------------------------------------------------------------------------


def _on_meta(config: DiTConfig) -> DiT:
    with torch.device("meta"):
        return DiT(config).eval()


def _inputs(config: DiTConfig, batch: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Noise (B, ...), t (B,) int64 and labels 0, 1, 2, ... (B,) int64."""
    sample = (config.num_tokens, config.in_channels)
    if config.input_size:
        sample = (config.in_channels, config.input_size, config.input_size)  # type: ignore[assignment]
    x = torch.randn(batch, *sample, device=device, dtype=dtype)  # (B, N, C) or (B, C, S, S)
    labels = torch.arange(batch, device=device) % max(1, config.num_classes)  # (B,)
    return x, torch.full((batch,), 500, device=device), labels


def _sd_vae_on_meta(tiny: bool) -> nn.Module:
    """Decoder and post_quant_conv of the autoencoder of Stable Diffusion 1 (f8, 4 channels)."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise InputError("the SD-VAE f8 decoder comes from diffusers: pip install 'textok-fast[bench]'") from None
    widths = (32, 32, 32, 32) if tiny else (128, 256, 512, 512)
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=widths,
            layers_per_block=1 if tiny else 2,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            sample_size=512,
        )
    return nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})


def _compile_options(device: torch.device) -> dict[str, str]:
    """On CUDA torch's best effort; on a CPU weights as constants, packed for its products, which tuning there does not beat."""
    return {"mode": "max-autotune"} if device.type == "cuda" else {"mode": "default", "weights": "frozen"}


def _compile(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    if device.type == "cuda":
        return torch.compile(function, mode="max-autotune", dynamic=False)
    return torch.compile(function, options={"freezing": True}, dynamic=False)


def _in_pytorch(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``call`` with all our operations in their PyTorch form."""

    def run() -> Tensor:
        with ops.use_backend("reference"):
            return call()

    return run


@contextlib.contextmanager
def _hooked(module: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
