"""How trained models are run: pipelines from conditions to pictures."""

from textok_fast.inference.pipelines import (
    ClassToImagePipeline,
    GenerationOutput,
    GenerationPipeline,
    SamplingOptions,
    TextToImagePipeline,
    load_pipeline,
)

__all__ = [
    "ClassToImagePipeline",
    "GenerationOutput",
    "GenerationPipeline",
    "SamplingOptions",
    "TextToImagePipeline",
    "load_pipeline",
]
