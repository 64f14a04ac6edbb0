"""Our models where diffusers' code expects its own: autoencoder, transformer, pipeline. Needs diffusers.

Latents are tokens, (B, N, d) rather than (B, C, h, w): what noise schedulers and losses do with them does not depend on it.
The models are saved in this library's own format, so that either class reads what the other wrote.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from torch import Tensor, nn

try:
    import diffusers
    from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
    from diffusers.configuration_utils import register_to_config
    from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput, Transformer2DModelOutput
    from diffusers.utils.accelerate_utils import apply_forward_hook
except ImportError as error:
    raise ImportError(f"textok_fast.interop.diffusers needs diffusers ({error}): pip install 'textok-fast[bench]'") from None

from textok_fast.config import DiTConfig, TexTokConfig, from_mapping, to_dict
from textok_fast.diffusion import SAMPLERS, Objective, StopSampling
from textok_fast.errors import InputError
from textok_fast.files import write_text
from textok_fast.inference.pipelines import (
    FOLDERS,
    PIPELINE_NAME,
    AnyPipeline,
    ClassToImagePipeline,
    GenerationPipeline,
    SamplingOptions,
    SuperResolutionPipeline,
    TextToImagePipeline,
    load_pipeline,
)
from textok_fast.inference.plan import Plan
from textok_fast.interop.schedulers import PREDICTIONS, SCHEDULES, gaussian_noise
from textok_fast.modeling.autoencoder import LatentTokenizer, latent_tokenizer
from textok_fast.modeling.dit import DiT
from textok_fast.modeling.saving import CONFIG_NAME, HUB_OPTIONS, PretrainedMixin, locate
from textok_fast.modeling.text_encoders import TextFeatures
from textok_fast.modeling.tokenizer import Captions, TexTok

# Of diffusers' from_pretrained; they say how weights are read, of which there is one file here, and one way.
_NO_MATTER = (
    *("low_cpu_mem_usage", "use_safetensors", "use_flashpack", "disable_mmap", "offload_state_dict", "offload_folder"),
    *("max_memory", "trust_remote_code", "use_onnx", "proxies"),
)


def _loading(options: dict[str, Any]) -> dict[str, Any]:
    """diffusers' options of from_pretrained -> ``dtype``, ``device`` and the Hub's. InputError for what cannot be done."""
    options = {name: value for name, value in options.items() if name not in _NO_MATTER and value is not None}
    dtype, place = options.pop("torch_dtype", options.pop("dtype", None)), options.pop("device_map", "cpu")
    if not (dtype is None or isinstance(dtype, torch.dtype)):
        raise InputError(f"torch_dtype is one torch.dtype, got {dtype!r}")
    places = list(place.values()) if isinstance(place, Mapping) else [place]
    try:
        (device,) = set(map(torch.device, [options.pop("device")] if "device" in options else places))
    except (RuntimeError, ValueError):
        raise InputError(
            f"these models run on one device: give device, or a device_map that names one; got {place!r}"
        ) from None
    if "variant" in options:
        raise InputError(f"there are no variants such as {options['variant']!r} here: weights are cast by torch_dtype")
    if unknown := sorted(set(options) - set(HUB_OPTIONS)):
        known = ", ".join(("torch_dtype", "device", *HUB_OPTIONS))
        raise InputError(f"unknown options {', '.join(unknown)}; known: {known}")
    return {"dtype": dtype, "device": device, **options}


_REGISTERED = "_registered"  # in config.json: what is in ``config`` and not of the model, such as an EMAModel's state


class _Model(ModelMixin, ConfigMixin):
    """One of our models, of the class ``own``, as one of diffusers': it lies in the attribute ``place``.

    :meth:`from_pretrained` and :meth:`save_pretrained` are those of ``own``: same directories, same Hub ids.
    """

    config_name = CONFIG_NAME
    own: ClassVar[type[PretrainedMixin]]
    place: ClassVar[str]

    def _about(self, **values: Any) -> None:
        """Puts what diffusers' code reads in ``config``."""
        self.register_to_config(**values)
        self._own_names = frozenset(self.config)

    @classmethod
    def from_textok(cls, model: Any) -> Self:
        """Around ``model`` itself: they share their weights, and its text encoder if it has one loaded."""
        if not isinstance(model, cls.own):
            raise InputError(f"{cls.__name__} goes around a {cls.own.__name__}, got {type(model).__name__}")
        with torch.device("meta"):
            made = cls(textok=to_dict(model.config))  # by name: diffusers keeps only such in `config`
        setattr(made, cls.place, model)
        return cast(Self, made.train(model.training))

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A model with new weights from another's ``config``, or from what :meth:`load_config` reads: a saved config.json.

        Returns: it, and with ``return_unused_kwargs`` also the entries that are none of its sizes, such as an EMAModel's.
        Raises: InputError for the configuration of something else.
        """
        values = {**(config if isinstance(config, Mapping) else cls.load_config(config)), **kwargs}
        names = {field.name for field in dataclasses.fields(cls.own.config_class)}
        sizes = values.pop("textok", None)
        if sizes is None:
            if values.get("model_type") != cls.own.model_type:
                raise InputError(
                    f"wanted the config of a {cls.__name__} or a {cls.own.__name__}, got one of {sorted(values)[:4]}"
                )
            sizes = {name: values[name] for name in names & values.keys()}
        made = cls(textok=sizes)
        unused = {name: value for name, value in values.items() if name not in {*names, *made.config} and name[0] != "_"}
        unused = {**values.get(_REGISTERED, {}), **unused}
        unused.pop("model_type", None)
        return (made, unused) if return_unused_kwargs else made

    @classmethod
    def from_pretrained(cls, source: str | Path, *, subfolder: str = "", **options: Any) -> Self:
        """What :meth:`save_pretrained` of this class or of ``own`` wrote, or a Hub id.

        ``options``: ``torch_dtype``, ``device``, and the Hub's ``revision``, ``cache_dir``, ``token``, ``local_files_only`` and
        ``force_download``; how else diffusers would read its files makes no difference. Raises: InputError.
        """
        return cls.from_textok(cls.own.from_pretrained(source, subfolder=subfolder, **_loading(options)))

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        save_function: Any = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: Any = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """config.json and model.safetensors, as ``own`` writes them; what others registered to ``config`` goes along.
        InputError for a pickle, a variant, and other options."""
        if not safe_serialization or variant is not None or save_function is not None or push_to_hub or options:
            raise InputError(
                "weights are saved as one model.safetensors, and uploaded by push_to_hub(...): leave the options out"
            )
        if is_main_process:
            notes = {"_class_name": type(self).__name__, "_diffusers_version": diffusers.__version__}
            more = {name: value for name, value in self.config.items() if name not in self._own_names and name[0] != "_"}
            getattr(self, self.place).save_pretrained(save_directory, {**notes, **({_REGISTERED: more} if more else {})})


class TokenDistribution(DiagonalGaussianDistribution):
    """What ``encode`` gives: a Gaussian for a KL bottleneck, else the tokens themselves (``deterministic``).

    ``mean``, ``std``, ``var`` and ``logvar``: (B, N, d), normalised as tokens; ``parameters``: mean and logvar, (B, N, 2 d).
    """

    def __init__(self, mean: Tensor, logvar: Tensor | None) -> None:
        """``logvar``: None for the tokens themselves."""
        self.deterministic = logvar is None
        self.mean = mean
        self.logvar = torch.full_like(mean, -30.0) if logvar is None else logvar.clamp(-30.0, 20.0)
        self.parameters = torch.cat([self.mean, self.logvar], dim=-1)
        self.std, self.var = (
            torch.zeros_like(mean) if self.deterministic else torch.exp(half * self.logvar) for half in (0.5, 1.0)
        )

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """KL(self || other), of ``other`` None: N(0, 1), summed over a sample's tokens: (B,); [0] for tokens themselves."""
        if self.deterministic:
            return torch.zeros(1)
        mean, var, logvar = (0.0, 1.0, 0.0) if other is None else (other.mean, other.var, other.logvar)
        terms = ((self.mean - mean).square() + self.var) / var - 1.0 - self.logvar + logvar  # (B, N, d)
        return 0.5 * terms.flatten(1).sum(1)

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2)) -> Tensor:
        """-log p(sample), sample (B, N, d), summed over ``dims``: (B,); [0] for tokens themselves."""
        return super().nll(sample, dims=tuple(dims))


class TokenOutput(AutoencoderKLOutput):
    """``latent_dist`` as of AutoencoderKL, and ``latent`` as of AutoencoderDC: its mode, (B, N, d)."""

    @property
    def latent(self) -> Tensor:
        return cast(Tensor, self.latent_dist.mode())


class AutoencoderTexTok(_Model):
    """:class:`TexTok` with the calls of diffusers' AutoencoderKL.

    ``encode(x).latent_dist`` (or ``.latent``, AutoencoderDC's), ``decode(z).sample``, both also with captions and both with
    gradients; ``enable_slicing`` for one picture at a time. Pictures have one size, at which AutoencoderKL does not tile
    either: ``enable_tiling`` changes nothing.

    ``config`` has what pipelines read: ``scaling_factor`` 1 and ``shift_factor`` 0 (tokens have zero mean and unit variance
    already), ``latent_channels`` d, ``sample_size`` S, ``force_upcast`` False, and as many ``block_out_channels`` as make
    ``2 ** (len - 1)``, their ``vae_scale_factor``, the patch size.

    Args:
        textok: a :class:`TexTokConfig` as a dict.
    """

    own, place = TexTok, "tokenizer"

    @register_to_config
    def __init__(self, textok: dict[str, Any]) -> None:
        super().__init__()
        config = from_mapping(TexTokConfig, textok)
        self.tokenizer = TexTok(config)
        self.use_slicing = self.use_tiling = False
        channels = (config.width,) * (1 + round(math.log2(config.patch_size)))
        about: dict[str, Any] = {"in_channels": 3, "out_channels": 3, "latent_channels": config.latent_dim}
        about |= {"sample_size": config.image_size, "block_out_channels": channels}
        about |= {"scaling_factor": 1.0, "shift_factor": 0.0, "latents_mean": None, "latents_std": None, "force_upcast": False}
        self._about(**about)

    @property
    def encoder(self) -> nn.Module:
        return self.tokenizer.encoder

    @property
    def decoder(self) -> nn.Module:
        return self.tokenizer.decoder

    def enable_slicing(self) -> None:
        """Encodes and decodes one picture at a time."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        self.use_slicing = False

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Changes nothing: a picture is as large as the one tile."""
        self.use_tiling = use_tiling

    def disable_tiling(self) -> None:
        self.use_tiling = False

    @apply_forward_hook
    def encode(self, x: Tensor, captions: Captions = None, return_dict: bool = True) -> Any:
        """x (B, 3, S, S) in [-1, 1] and captions as :meth:`TexTok.encode` takes them -> ``.latent_dist``, a
        :class:`TokenDistribution`, and ``.latent``, its mode."""
        tokenizer = self.tokenizer
        pixels = tokenizer._check_images(x)
        text = tokenizer.text_features(captions, len(pixels)) if tokenizer.config.text_in_encoder else None
        out = tokenizer.bottleneck(self._sliced(tokenizer.encoder, pixels, text))
        if out.mean is not None and out.logvar is not None:
            found = TokenDistribution(tokenizer.normalize(out.mean), out.logvar - 2 * tokenizer.latent_std.log())
        else:
            found = TokenDistribution(tokenizer.normalize(out.latents), None)
        return TokenOutput(latent_dist=found) if return_dict else (found,)

    @apply_forward_hook
    def decode(
        self,
        z: Tensor,
        captions: Captions = None,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> Any:
        """z (B, N, d) -> ``.sample`` (B, 3, S, S), as in AutoencoderKL not clamped to [-1, 1]: losses reach all of it.
        ``generator`` is not used, as there."""
        tokenizer = self.tokenizer
        latents = tokenizer._raw_latents(tokenizer._check_tokens(z).to(tokenizer.device))
        text = tokenizer.text_features(captions, len(latents)) if tokenizer.config.text_in_decoder else None
        pixels = self._sliced(tokenizer.decoder, latents, text)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    def forward(
        self,
        sample: Tensor,
        captions: Captions = None,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> Any:
        """:meth:`encode`, then :meth:`decode`."""
        posterior = self.encode(sample, captions).latent_dist
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, captions, return_dict)

    def _sliced(self, network: nn.Module, x: Tensor, text: TextFeatures | None) -> Tensor:
        """``network(x, text)``, with slicing one sample at a time."""
        if not self.use_slicing or len(x) == 1:
            return cast(Tensor, network(x, text))
        texts = (
            [None] * len(x) if text is None else [TextFeatures(*each) for each in zip(*(t.split(1) for t in text), strict=True)]
        )
        return torch.cat([network(*each) for each in zip(x.split(1), texts, strict=True)])


class TexTokTransformer(_Model):
    """:class:`DiT` with the call of diffusers' DiTTransformer2DModel, for loops of one's own.

    ``config`` has ``in_channels``, ``out_channels``, ``num_layers``, ``num_attention_heads``, ``attention_head_dim``,
    ``num_embeds_ada_norm`` (classes) and ``sample_size`` (of a 2-D model; tokens N of the others).

    Args:
        textok: a :class:`DiTConfig` as a dict.
    """

    own, place = DiT, "dit"

    @register_to_config
    def __init__(self, textok: dict[str, Any]) -> None:
        super().__init__()
        config = from_mapping(DiTConfig, textok)
        self.dit = DiT(config)
        about: dict[str, Any] = {"in_channels": config.in_channels, "out_channels": config.out_channels}
        about |= {"num_layers": config.depth, "num_attention_heads": config.heads, "patch_size": config.patch_size}
        about |= {"attention_head_dim": config.width // config.heads, "num_embeds_ada_norm": config.num_classes}
        self._about(**about, sample_size=config.input_size or config.num_tokens)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | None = None,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """hidden_states (B, N, C) or (B, C, S, S) -> ``.sample`` (B, N, C_out) or (B, C_out, S, S).

        Args:
            timestep: one, or (B,): a training step, or of a flow its time in [0, 1], a thousandth of what schedulers count in.
            class_labels: (B,) int64; ``num_embeds_ada_norm`` is no class.
            encoder_hidden_states, encoder_attention_mask: features of captions (B, N_t, D_t), and which are real (all if None).

        Raises: InputError for other shapes, and conditions that the model does not take.
        """
        if timestep is None:
            raise InputError("give the timestep")
        batch, text = len(hidden_states), None
        t = torch.as_tensor(timestep, device=hidden_states.device).expand(batch)  # (B,)
        if encoder_hidden_states is not None:
            real = torch.ones(encoder_hidden_states.shape[:2]) if encoder_attention_mask is None else encoder_attention_mask
            text = TextFeatures(encoder_hidden_states, real.to(hidden_states.device, torch.bool))
        out = self.dit(hidden_states, t, class_labels, text)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)


# -- schedulers ----------------------------------------------------------------------------------------------------------------

# diffusers' classes whose method one of our samplers is; how a run's steps are spaced is the sampler's own.
_SAMPLER_OF = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "heun",
}


def _scheduler(pipeline: GenerationPipeline) -> Any:
    """diffusers' scheduler of the noise that a generator was trained with."""
    if pipeline.objective == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler()
    about = {
        "prediction_type": next(name for name, ours in PREDICTIONS.items() if ours == pipeline.prediction),
        "beta_schedule": next(name for name, ours in SCHEDULES.items() if ours == pipeline.schedule),
        # It looks for a learned variance among the tokens: a loop of one's own takes the first d channels, as DiTPipeline.
        "variance_type": "fixed_small" if pipeline.generator.config.learn_sigma else "fixed_large",
    }
    return diffusers.DDPMScheduler(clip_sample=False, **about)


# What other samplers are made of; the settings that are not here are of spacing, or are read elsewhere, or do nothing alone.
_AS_HERE: dict[str, Any] = {
    **dict.fromkeys(("trained_betas", "solver_p", "sigma_min", "sigma_max", "shift_terminal"), None),
    **dict.fromkeys(("clip_sample", "thresholding", "rescale_betas_zero_snr", "use_dynamic_shifting", "invert_sigmas"), False),
    **{f"use_{kind}": False for kind in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas", "flow_sigmas")},
    "set_alpha_to_one": True,
    "final_sigmas_type": "zero",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "stochastic_sampling": False,
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "predict_x0": True,
    "lower_order_final": True,
    "euler_at_final": False,
    "disable_corrector": [],
}
_SOLVER_TYPES = {"DPMSolverMultistepScheduler": "midpoint", "UniPCMultistepScheduler": "bh2"}


def _trained_with(scheduler: Any, learn_sigma: bool | None = None) -> tuple[Objective, str, str]:
    """(objective, prediction, schedule) that a scheduler of diffusers' says.

    ``learn_sigma``: of the generator, by which a DDPMScheduler's variance is another; None does not look at it.
    Raises: InputError for one that no sampler here is: of another class, or with settings that would change what it computes.
    """
    name = type(scheduler).__name__
    sampler = _SAMPLER_OF.get(name)
    if sampler is None:
        raise InputError(f"no sampler here is {name}'s; known: {', '.join(_SAMPLER_OF)}. The call takes sampler=, too")
    config = scheduler.config
    wanted = {**_AS_HERE, "solver_type": _SOLVER_TYPES.get(name)}
    own = inspect.signature(type(scheduler).__init__).parameters  # config also keeps what other classes were made with
    for option in filter(own.__contains__, wanted):
        if not np.all(config[option] == wanted[option]):  # of an array too
            hint = f": {name}.from_config(pipe.scheduler.config) does not clamp latents" if option == "clip_sample" else ""
            raise InputError(f"{name} here has {option} {wanted[option]!r}, got {config[option]!r}{hint}")
    if SAMPLERS[sampler] == "flow":
        return "flow", "epsilon", "linear"
    prediction, schedule = gaussian_noise({**config, "_class_name": name})
    # With a learned variance diffusers' loop leaves that out, and says fixed_small; a loop with it says learned_range.
    if sampler == "ddpm" and learn_sigma is not None:
        variances = ("fixed_small", "learned_range") if learn_sigma else ("fixed_large",)
        if config.variance_type not in variances:
            raise InputError(f"{name} here has variance_type {variances[-1]!r}, got {config.variance_type!r}")
    return "gaussian", prediction, schedule


# -- the pipeline --------------------------------------------------------------------------------------------------------------

_CODE = '"""For ``DiffusionPipeline.from_pretrained(..., trust_remote_code=True)``."""\n\n'
_CODE += 'from textok_fast.interop.diffusers import TexTokPipeline\n\n__all__ = ["TexTokPipeline"]\n'


def _as_called_in_diffusers(call: Callable[..., Any]) -> Callable[..., Any]:
    """Arguments by position are those of DiTPipeline behind labels, else ``height`` and ``width``. InputError for others."""

    @functools.wraps(call)
    def run(self: Any, prompt: Any = None, *values: Any, **named: Any) -> Any:
        names: tuple[str, ...] = ("height", "width")
        if isinstance(self.pipeline, ClassToImagePipeline) and named.get("class_labels") is None:
            names = ("guidance_scale", "generator", "num_inference_steps", "output_type", "return_dict")
        if len(values) > len(names) or set(names[: len(values)]) & named.keys():
            raise InputError(f"by position go {', '.join(names)}, each once: give the {len(values)} values by name")
        return call(self, prompt, **dict(zip(names, values, strict=False)), **named)

    return run


class TexTokPipeline(DiffusionPipeline):
    """Generation behind diffusers' calls: ``pipe(prompt or class_labels, ...).images``.

    Args:
        transformer, vae: the generator and the tokenizer whose tokens it makes, or for latents diffusers' AutoencoderKL.
        scheduler: of diffusers; says what the generator was trained with, and by which method it samples unless the call says.
        label_names, captions: of a pipeline by class: what classes are called, and captions for its pictures' decoder.
        plan: how the engines run that both go through; None for the modules as they are.
    """

    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(
        self,
        transformer: TexTokTransformer,
        vae: AutoencoderTexTok | AutoencoderKL,
        scheduler: Any,
        label_names: Sequence[str] = (),
        captions: Mapping[Any, Sequence[str]] | None = None,
        plan: Plan | None = None,
    ) -> None:
        super().__init__()
        texts = {str(label): list(found) for label, found in (captions or {}).items()}
        self.register_to_config(label_names=list(label_names), captions=texts)
        self.pipeline = self._assemble(plan, transformer, vae, scheduler)
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self._interrupt, self._guidance_scale, self._num_timesteps = False, 1.0, 0

    @classmethod
    def from_textok(cls, pipeline: AnyPipeline) -> Self:
        """Around a pipeline of :func:`textok_fast.inference.load_pipeline`, with its plan: they share the models. InputError
        for super-resolution, which has no call of diffusers here."""
        if isinstance(pipeline, SuperResolutionPipeline):
            raise InputError("TexTokPipeline takes classes or prompts, no pictures: call the SuperResolutionPipeline itself")
        made = cls(**cls._parts(pipeline), plan=None)
        made.pipeline = pipeline  # which has engines already, if any
        return made

    @classmethod
    def from_pretrained(cls, source: str | Path, plan: Plan | None = None, **options: Any) -> Self:
        """What :meth:`save_pretrained`, ``textok-fast train generator`` or ``convert --tokenizer`` wrote, or a Hub id.

        ``options``: as :meth:`AutoencoderTexTok.from_pretrained`; and ``transformer``, ``vae`` or ``scheduler`` in place of
        those that are there. With a ``plan``, device and precision are the plan's.
        """
        given = {name: options.pop(name) for name in ("transformer", "vae", "scheduler") if options.get(name) is not None}
        loading = _loading(options)
        device, dtype = loading.pop("device"), loading.pop("dtype")
        if plan is not None and dtype is not None:
            raise InputError("a pipeline's precision is its plan's: leave torch_dtype out, or the plan")
        files = [f"{folder}/*" for names in FOLDERS.items() for folder in names]
        pipeline = load_pipeline(locate(source, [PIPELINE_NAME, *files], **loading), device)
        made = cls(**{**cls._parts(pipeline), **given}, plan=plan)
        return made if plan is not None else made.to(device, dtype)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """A directory for :meth:`from_pretrained`, :func:`textok_fast.inference.load_pipeline`, the command, and for
        ``DiffusionPipeline.from_pretrained(directory, trust_remote_code=True)``; options as in diffusers."""
        super().save_pretrained(str(save_directory), **options)

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **options: Any) -> None:
        """model_index.json, with pipeline.json and the module that it names as its class's beside it."""
        super().save_config(save_directory, push_to_hub=False)
        directory = Path(save_directory)
        index = json.loads((directory / self.config_name).read_text(encoding="utf-8"))
        index["_class_name"] = ["pipeline", type(self).__name__]
        write_text(directory / self.config_name, json.dumps(index, indent=2, sort_keys=True) + "\n")
        write_text(directory / "pipeline.py", _CODE)
        self.pipeline.save_about(directory)

    # -- parts -------------------------------------------------------------------------------------------------------

    @staticmethod
    def _parts(pipeline: GenerationPipeline) -> dict[str, Any]:
        parts: dict[str, Any] = {
            "transformer": TexTokTransformer.from_textok(pipeline.generator),
            "vae": _autoencoder(pipeline.tokenizer),
            "scheduler": _scheduler(pipeline),
        }
        if isinstance(pipeline, ClassToImagePipeline):
            parts |= {"label_names": pipeline.label_names, "captions": pipeline.captions}
        return parts

    def _assemble(
        self, plan: Plan | None, transformer: Any, vae: Any, scheduler: Any
    ) -> TextToImagePipeline | ClassToImagePipeline:
        for given, wanted in ((transformer, (TexTokTransformer,)), (vae, (AutoencoderTexTok, AutoencoderKL))):
            if not isinstance(given, wanted):
                names = " or ".join(each.__name__ for each in wanted)
                raise InputError(f"wanted a {names}, got {type(given).__name__}; a plan is what compiles (plan=Plan())")
        objective, prediction, schedule = _trained_with(scheduler, transformer.dit.config.learn_sigma)
        tokenizer = vae.tokenizer if isinstance(vae, AutoencoderTexTok) else latent_tokenizer(vae, transformer.dit)
        models = (transformer.dit, tokenizer, objective)
        if not transformer.dit.config.num_classes:
            return TextToImagePipeline(*models, prediction, plan, schedule)
        captions = {int(label): list(texts) for label, texts in self.config.captions.items()}
        return ClassToImagePipeline(*models, self.config.label_names, captions, prediction, plan, schedule)

    def __setattr__(self, name: str, value: Any) -> None:
        """Another part takes the old one's place; with a plan in new engines."""
        parts = {part: vars(self).get(part) for part in ("transformer", "vae", "scheduler")}
        if name in parts and parts[name] is not None and value is not parts[name]:
            old = _trained_with(parts["scheduler"])
            learn_sigma = self.pipeline.generator.config.learn_sigma
            if name == "scheduler" and (new := _trained_with(value, learn_sigma)) != old:
                raise InputError(f"this generator was trained as {' '.join(old)}, the scheduler is for {' '.join(new)}")
            if name != "scheduler":
                self.pipeline = self._assemble(self.pipeline.plan, **{**parts, name: value})
        super().__setattr__(name, value)

    @property
    def device(self) -> torch.device:
        return self.pipeline.device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves and casts the models; InputError for what a plan says otherwise: on which device, in which precision."""
        kwargs.pop("silence_dtype_warnings", None)
        if "torch_device" in kwargs:
            kwargs["device"] = kwargs.pop("torch_device")
        device, dtype = cast(Any, torch._C._nn._parse_to(*args, **kwargs))[:2]
        self.pipeline.to(device, dtype)
        return self

    def enable_vae_slicing(self) -> None:
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        self.vae.disable_tiling()

    def _no_offload(self, *args: Any, **kwargs: Any) -> None:
        """InputError: no part of the models is left behind."""
        raise InputError("these models are not offloaded: pipe.to(device), or a plan with memory_limit and split")

    enable_model_cpu_offload = enable_sequential_cpu_offload = enable_group_offload = _no_offload

    @property
    def labels(self) -> dict[str, int]:
        """Classes by name, as DiTPipeline's: of one that is called "tench, Tinca tinca" by either."""
        names = (
            (name.strip(), index) for index, all_names in enumerate(self.config.label_names) for name in all_names.split(",")
        )
        return dict(sorted(dict(names).items()))

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Classes of names, as DiTPipeline's. InputError for a name that no class has."""
        if not isinstance(self.pipeline, ClassToImagePipeline):
            raise InputError("this pipeline generates from captions: it has no classes")
        labels, names = self.labels, [label] if isinstance(label, str) else list(label)
        if unknown := [name for name in names if name not in labels]:
            raise InputError(f"no class {unknown[0]!r}; known: {', '.join(list(labels)[:8]) or 'none by name'}, ...")
        return [labels[name] for name in names]

    @property
    def guidance_scale(self) -> float:
        """Of the call under way, as are :attr:`num_timesteps` (evaluations) and :attr:`interrupt`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """A callback that sets ``pipe._interrupt = True`` ends the sampling: the tokens as they are then are decoded."""
        return self._interrupt

    # -- the call ----------------------------------------------------------------------------------------------------

    @_as_called_in_diffusers
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        *,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        """Pictures from captions, or from classes with or without captions for the decoder.

        Args:
            prompt, class_labels: one or several; a model by class decodes with ``prompt``, one for each label, if given.
                Labels may come in ``prompt``'s place, where DiTPipeline has them, and then by position what it has next:
                ``guidance_scale``, ``generator``, ``num_inference_steps``, ``output_type`` and ``return_dict``.
            height, width: S, or None.
            guidance_scale: as in diffusers, 1 and less is no guidance. None: DiTPipeline's 4 for what that runs, a generator
                by class over an autoencoder's latents, and no guidance for all others.
            negative_prompt: one, or one for each prompt: what guidance leads away from, for a generator that reads text.
            generator: one, or one for each picture, from which seeds are drawn; None draws them from torch's.
            latents: initial noise, (B, N, d) or (B, C, h, w), standard normal, in place of what the seeds give.
            output_type: "pil"; "np" (B, S, S, 3) float in [0, 1]; "pt" (B, 3, S, S) likewise; "latent" the tokens (B, N, d), or
                latents (B, C, h, w).
            callback_on_step_end: ``(pipe, step, timestep, {"latents": (B, N, d)})`` after each evaluation; the timestep as
                diffusers' schedulers count it, of a flow 1000 t. Latents that it returns in a mapping take the place of
                those shown, which are copies. With a callback a plan captures each evaluation alone, not the loop.
            callback_on_step_end_tensor_inputs: what is in the mapping, "latents" or nothing.
            options: further fields of :class:`~textok_fast.inference.SamplingOptions`, such as ``sampler``, or
                ``guided_channels``: DiTPipeline guides all, else it is as many as the generator's configuration says.

        Raises: InputError for conditions that the model does not take.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise InputError(f"output_type must be pil, np, pt or latent, got {output_type!r}")
        size = self.pipeline.tokenizer.config.image_size
        if (height or size, width or size) != (size, size):
            raise InputError(f"this pipeline's pictures are {size} x {size}, asked for {height or size} x {width or size}")
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if unknown := sorted(set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)):
            raise InputError(f"callbacks are shown latents, not {', '.join(unknown)}")
        if unknown := sorted(set(options) - {field.name for field in dataclasses.fields(SamplingOptions)}):
            known = ", ".join(sorted(field.name for field in dataclasses.fields(SamplingOptions)))
            raise InputError(f"unknown options {', '.join(unknown)}; known: {known}")
        wanted, run = self._conditions(prompt, class_labels, negative_prompt, num_images_per_prompt)
        options = {"sampler": _SAMPLER_OF[type(self.scheduler).__name__], **options}
        if guidance_scale is None:
            as_there = isinstance(self.pipeline, ClassToImagePipeline) and isinstance(self.vae, AutoencoderKL)
            guidance_scale = 4.0 if as_there else 1.0
        self._interrupt, self._guidance_scale, self._num_timesteps = False, max(guidance_scale, 1.0), num_inference_steps
        how = SamplingOptions(**{**options, "steps": num_inference_steps, "guidance_scale": self._guidance_scale})
        self.pipeline.decode_batch = 1 if self.vae.use_slicing else None
        with self.progress_bar(total=num_inference_steps) as bar:

            def progress(done: int, total: int) -> None:
                self._num_timesteps = bar.total = total
                bar.update(done - bar.n)

            def on_step(step: int, time: float, x: Tensor) -> Tensor:
                t = torch.tensor(1000 * time if self.pipeline.objective == "flow" else time)
                shown = dict.fromkeys(callback_on_step_end_tensor_inputs, x)
                changed = callback_on_step_end(self, step, t, shown)  # type: ignore[misc]
                x = (changed or {}).get("latents", x)
                if self._interrupt:
                    raise StopSampling(x)
                return x

            run |= {"noise": latents, "progress": progress, "on_step": None if callback_on_step_end is None else on_step}
            made = self.pipeline(wanted, seed=_seeds(generator, len(wanted)), options=how, output="uint8", **run)
        if output_type == "latent":
            images: Any = made.tokens
        elif output_type == "pil":
            from PIL import Image

            images = [Image.fromarray(picture) for picture in made.images.cpu().numpy()]
        else:
            images = made.images.float() / 255  # (B, S, S, 3)
            images = images.permute(0, 3, 1, 2) if output_type == "pt" else images.cpu().numpy()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _conditions(
        self, prompt: Any, class_labels: Any, negative_prompt: Any, copies: int
    ) -> tuple[list[Any], dict[str, Any]]:
        """What the pipeline is called with, ``copies`` of each: prompts or labels, and captions and negative prompts beside."""
        by_class = isinstance(self.pipeline, ClassToImagePipeline)
        prompts, labels, negatives = (
            [each] if isinstance(each, (str, int)) else each.tolist() if isinstance(each, Tensor) else each and list(each)
            for each in (prompt, class_labels, negative_prompt)
        )
        if by_class and labels is None and prompts and all(isinstance(each, int) for each in prompts):
            prompts, labels = None, prompts
        wanted = labels if by_class else prompts
        if wanted is None:
            raise InputError("this pipeline generates by class: give class_labels" if by_class else "give a prompt")
        if not by_class and labels is not None:
            raise InputError("this pipeline generates from captions: give prompt, not class_labels")
        run: dict[str, Any] = {}
        if by_class and prompts is not None:
            if len(prompts) != len(wanted):
                raise InputError(f"got {len(prompts)} prompts for {len(wanted)} class_labels")
            run["captions"] = [each for each in prompts for _ in range(copies)]
        if negatives is not None:
            negatives = negatives * len(wanted) if isinstance(negative_prompt, str) else negatives
            if len(negatives) != len(wanted):
                raise InputError(f"got {len(negatives)} negative prompts for {len(wanted)} pictures to make")
            run["negative_prompts"] = [each for each in negatives for _ in range(copies)]
        return [each for each in wanted for _ in range(copies)], run


def _autoencoder(tokenizer: TexTok | LatentTokenizer) -> Any:
    return tokenizer.vae if isinstance(tokenizer, LatentTokenizer) else AutoencoderTexTok.from_textok(tokenizer)


def _seeds(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[int]:
    """A seed for each picture; the same generators in the same state give the same ones."""
    if generator is not None and not isinstance(generator, torch.Generator):
        if len(generator) != count:
            raise InputError(f"got {len(generator)} generators for {count} pictures")
        return [_seeds(each, 1)[0] for each in generator]
    place = "cpu" if generator is None else generator.device
    drawn = torch.randint(0, 2**62, (count,), generator=generator, device=place)
    return [int(seed) for seed in drawn.tolist()]
