"""A model and a plan become an engine, with the model's own call."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar, overload, runtime_checkable

from torch import nn

from textok_fast.errors import InputError
from textok_fast.inference.autoencoder import AutoencoderEngine
from textok_fast.inference.generator import GeneratorEngine
from textok_fast.inference.plan import Plan
from textok_fast.inference.tokenizer import TokenizerEngine
from textok_fast.modeling.autoencoder import LatentTokenizer, is_autoencoder
from textok_fast.modeling.dit import DiT
from textok_fast.modeling.tokenizer import TexTok


@runtime_checkable
class PeerTokenizer(Protocol):
    """A tokenizer behind another library's calls, which go through ``tokenizer``."""

    tokenizer: Any

    def around(self, tokenizer: Any) -> Any:
        """The same calls around another tokenizer, or an engine of one."""


Peer = TypeVar("Peer", bound=PeerTokenizer)


@overload
def Engine(model: DiT, plan: Plan | None = None) -> GeneratorEngine: ...
@overload
def Engine(model: TexTok, plan: Plan | None = None) -> TokenizerEngine: ...
@overload
def Engine(model: LatentTokenizer, plan: Plan | None = None) -> LatentTokenizer: ...
@overload
def Engine(model: Peer, plan: Plan | None = None) -> Peer: ...
@overload
def Engine(model: nn.Module, plan: Plan | None = None) -> Any: ...


def Engine(model: Any, plan: Plan | None = None) -> Any:
    """Runs ``model`` as ``plan`` says: a :class:`GeneratorEngine` for a DiT, a :class:`TokenizerEngine` for a TexTok, an
    :class:`AutoencoderEngine` for diffusers' AutoencoderKL, a :class:`LatentTokenizer` around one for a LatentTokenizer.

    Of a tokenizer behind a peer's calls (:func:`textok_fast.interop.load`) it is the same calls around its tokenizer's engine.

    The model stays as it was. Without a plan it is :meth:`Plan.automatic` for the device that the model lies on.

    Raises: InputError for another kind of model, and for a plan that this machine cannot run.
    """
    if isinstance(model, PeerTokenizer):
        if not isinstance(model.tokenizer, TexTok):
            raise InputError(f"this {type(model).__name__} runs by an engine already: give the one around the model")
        return model.around(Engine(model.tokenizer, plan))
    if not isinstance(model, (DiT, TexTok, LatentTokenizer)) and not is_autoencoder(model):
        raise InputError(f"an engine runs a DiT, a TexTok or diffusers' AutoencoderKL, got {type(model).__name__}")
    chosen = Plan.automatic(next(model.parameters()).device) if plan is None else plan
    if isinstance(model, DiT):
        return GeneratorEngine(model, chosen)
    if isinstance(model, TexTok):
        return TokenizerEngine(model, chosen)
    if isinstance(model, LatentTokenizer):
        return LatentTokenizer(AutoencoderEngine(model.vae, chosen), model.config.image_size)
    return AutoencoderEngine(model, chosen)
