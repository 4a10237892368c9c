"""The part of the proof that needs no run: ONNX's own checker, shapes included."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx

from onnxfuse.errors import ProofError

__all__ = ["check_structure"]

_STDOUT = 1
_CHECKER_ERRORS = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError)


def check_structure(path: Path, original: Path | onnx.ModelProto) -> str:
    """Let ONNX's full check pass over a written model.

    Args:
        path: The compressed model.
        original: What it was made from.

    Returns:
        Empty if the check passes; what it complains of if the original fails it just the same, as models with operators
        outside the standard do.

    Raises:
        ProofError: The compressed model fails, and the original does not.
    """
    problem = _problem(path)
    if not problem:
        return ""
    if _problem(original):
        return f"ONNX's checker rejects the original too: {problem}"
    what = f"ONNX's checker rejects the compressed model: {problem}"
    raise ProofError(what, where=str(path), mend="this is a defect of onnxfuse; please report it with the model")


def _problem(model: Path | onnx.ModelProto) -> str:
    try:
        with _no_output():
            onnx.checker.check_model(model, full_check=True)
    except _CHECKER_ERRORS as error:
        return str(error).strip().splitlines()[0]
    return ""


@contextmanager
def _no_output() -> Iterator[None]:
    """Keep what the checker prints by itself, past Python, off standard output: a word on experimental operators."""
    if sys.stdout is not None:
        sys.stdout.flush()
    try:
        stdout = os.dup(_STDOUT)
    except OSError:  # There is no standard output, so nothing can get onto it.
        yield
        return
    try:
        with Path(os.devnull).open("wb") as sink:
            os.dup2(sink.fileno(), _STDOUT)
        yield
    finally:
        os.dup2(stdout, _STDOUT)
        os.close(stdout)
