"""Compress trained ONNX files by fusing their channels with optimal transport.

`compress` makes a model smaller and proves the result in ONNX Runtime, `plan` only decides how much each part of it
would lose, `inspect` shows what can be compressed and why the rest can't, `validate` compares two models on the same
inputs.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

# What ONNX and its runtime need to start is only imported once a name is used, so the command line can begin before.
_HOMES = {
    "config": ("CompressionConfig", "Order", "Provider", "Scope"),
    "errors": ("OnnxFuseError",),
    "fusion.options": ("FusionOptions",),
    "pipeline": ("Compressed", "compress", "inspect", "plan", "validate"),
    "planning.files": ("Plan",),
    "plugins": ("load_plugins",),
    "report": ("CompressionReport", "InspectReport", "ValidationReport"),
}


# Type checkers read the imports above; a function that answers to any name would make them accept any.
if not TYPE_CHECKING:

    def __getattr__(name):
        for home, names in _HOMES.items():
            if name in names:
                found = getattr(import_module(f"{__name__}.{home}"), name)
                globals()[name] = found
                return found
        if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
            return import_module(f"{__name__}.{name}")
        what = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(what)


def __dir__() -> list[str]:
    """Return the names that are there, whether imported yet or not."""
    return sorted({*globals(), *__all__})
