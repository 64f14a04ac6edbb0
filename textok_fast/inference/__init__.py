"""How trained models are run: engines that run one as a plan says, and pipelines from conditions to pictures."""

from textok_fast.inference.autoencoder import AutoencoderEngine
from textok_fast.inference.engine import Engine
from textok_fast.inference.generator import GeneratorEngine, SamplingRun
from textok_fast.inference.memory import MemoryEstimate
from textok_fast.inference.packages import load_package, save_package
from textok_fast.inference.pipelines import (
    ClassToImagePipeline,
    GenerationOutput,
    GenerationPipeline,
    SamplingOptions,
    SuperResolutionPipeline,
    TextToImagePipeline,
    load_pipeline,
)
from textok_fast.inference.plan import Plan, StepCache
from textok_fast.inference.stream import Decoded, Encoded, decode_stream, encode_stream
from textok_fast.inference.tokenizer import TokenizerEngine

__all__ = [
    "AutoencoderEngine",
    "ClassToImagePipeline",
    "Decoded",
    "Encoded",
    "Engine",
    "GenerationOutput",
    "GenerationPipeline",
    "GeneratorEngine",
    "MemoryEstimate",
    "Plan",
    "SamplingOptions",
    "SamplingRun",
    "StepCache",
    "SuperResolutionPipeline",
    "TextToImagePipeline",
    "TokenizerEngine",
    "decode_stream",
    "encode_stream",
    "load_package",
    "load_pipeline",
    "save_package",
]
