"""Every exception of onnxfuse: each says *what* is wrong, *where*, and the *mend*.

An exception's class decides the exit code of the command line, so a pipeline can tell a typo from a broken model
without reading the text.
"""

from typing import ClassVar

__all__ = [
    "CompressionError",
    "ConfigError",
    "DataError",
    "InvariantError",
    "ModelError",
    "OnnxFuseError",
    "OutputError",
    "PluginError",
    "ProofError",
    "ProviderError",
    "RegistryError",
    "RuntimeFailedError",
    "SolverError",
    "UnsupportedGraphError",
]


class OnnxFuseError(Exception):
    """Base of every error that onnxfuse raises on purpose.

    Args:
        what: What is wrong, in one sentence without a final stop.
        where: The file, node, group, option or array it is about; empty when there is no such place.
        mend: What the reader can do about it; empty when nothing can be done.

    Example:
        >>> print(OnnxFuseError("the ratio is 1.5", where="--ratio", mend="give a number from 0 up to but not 1"))
        the ratio is 1.5
          at:   --ratio
          mend: give a number from 0 up to but not 1
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        """Keep the three parts apart, so that callers can show them as they like."""
        super().__init__(what)
        self.what = what
        self.where = where
        self.mend = mend

    def __str__(self) -> str:
        """Return the three parts, one a line."""
        lines = [self.what]
        if self.where:
            lines.append(f"  at:   {self.where}")
        if self.mend:
            lines.append(f"  mend: {self.mend}")
        return "\n".join(lines)


class ConfigError(OnnxFuseError, ValueError):
    """An option has a value that it can't have."""

    exit_code = 2


class RegistryError(OnnxFuseError, KeyError):
    """A name is not in a registry, or is there already."""

    exit_code = 2


class ModelError(OnnxFuseError, ValueError):
    """The model can't be read, or is not valid ONNX."""

    exit_code = 3


class UnsupportedGraphError(OnnxFuseError):
    """The model is valid, but nothing in it can be compressed as asked."""

    exit_code = 4


class DataError(OnnxFuseError, ValueError):
    """Calibration or validation data does not fit the model."""

    exit_code = 5


class ProviderError(OnnxFuseError, RuntimeError):
    """The execution provider that was asked for is not really there."""

    exit_code = 6


class RuntimeFailedError(OnnxFuseError, RuntimeError):
    """ONNX Runtime could not load or run a model."""

    exit_code = 7


class ProofError(OnnxFuseError):
    """The compressed model failed its proof, so it was not written."""

    exit_code = 8


class OutputError(OnnxFuseError, OSError):
    """A result can't be written where it was asked for."""

    exit_code = 9


class SolverError(OnnxFuseError, ArithmeticError):
    """A numerical solver did not converge, or gave numbers that are not finite."""

    exit_code = 10


class CompressionError(OnnxFuseError, RuntimeError):
    """Compression failed between the plan and the written file."""

    exit_code = 11


class PluginError(OnnxFuseError, ImportError):
    """Another package offers something to onnxfuse that can't be used."""

    exit_code = 12


class InvariantError(OnnxFuseError, AssertionError):
    """Something that onnxfuse guarantees does not hold: a defect of onnxfuse, please report it."""

    exit_code = 70
