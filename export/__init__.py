"""Trained models as deployable artifacts (installed as ``textok_fast.export``)."""

from textok_fast.export.onnx import OnnxCheck, export_decoder, export_encoder

__all__ = ["OnnxCheck", "export_decoder", "export_encoder"]
