"""Trained models as deployable artifacts (installed as ``textok_fast.export``)."""

from textok_fast.export.artifacts import Exported, export, export_aoti, export_onnx
from textok_fast.export.directory import Manifest, Source
from textok_fast.export.runtime import load, refit

__all__ = [
    "Exported",
    "Manifest",
    "Source",
    "export",
    "export_aoti",
    "export_onnx",
    "load",
    "refit",
]
