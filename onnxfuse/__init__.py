"""Compress trained ONNX files by fusing their channels with optimal transport."""

__version__ = "0.1.0"
