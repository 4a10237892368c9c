"""Compress trained ONNX files by fusing their channels with optimal transport.

`compress` makes a model smaller and proves the result in ONNX Runtime, `plan` only decides how much each part of it
would lose, `inspect` shows what can be compressed and why the rest can't, `validate` compares two models on the same
inputs.
"""

from onnxfuse.config import CompressionConfig, Order, Provider, Scope
from onnxfuse.errors import OnnxFuseError
from onnxfuse.fusion.options import FusionOptions
from onnxfuse.pipeline import Compressed, compress, inspect, plan, validate
from onnxfuse.planning.files import Plan
from onnxfuse.plugins import load_plugins
from onnxfuse.report import CompressionReport, InspectReport, ValidationReport

__all__ = [
    "Compressed",
    "CompressionConfig",
    "CompressionReport",
    "FusionOptions",
    "InspectReport",
    "OnnxFuseError",
    "Order",
    "Plan",
    "Provider",
    "Scope",
    "ValidationReport",
    "compress",
    "inspect",
    "load_plugins",
    "plan",
    "validate",
]

__version__ = "0.1.0"
