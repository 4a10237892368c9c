"""Running models in ONNX Runtime, on the provider that was asked for and no other.

ONNX Runtime lists CUDA wherever its GPU build is installed, and falls back to the CPU in silence where CUDA does not
work. So a session's own list of providers is read after it was made. This is the only module that imports onnxruntime.
"""

import ctypes
import io
import logging
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from glob import escape
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np
import onnx
import onnxruntime as ort

from onnxfuse.config import Provider
from onnxfuse.errors import OutputError, ProviderError, RuntimeFailedError
from onnxfuse.graph.files import write_model
from onnxfuse.graph.slim import byte_size
from onnxfuse.graph.unsigned import with_unsigned_weights

__all__ = ["Feeds", "Session", "bytes_overflow", "cuda_obstacle", "has_cuda", "runtime_version"]

logger = logging.getLogger(__name__)

Feeds: TypeAlias = Mapping[str, np.ndarray[Any, np.dtype[Any]]]

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_FELL_BACK = "ONNX Runtime fell back to the CPU, as it does where a library of CUDA is missing"
# What matters in messages that begin with places in the sources of ONNX Runtime.
_CUDA_FAILURE = re.compile(r"CU[A-Z]+ failure -?[0-9]+:[^;\n]*")
_FATAL_ONLY, _WARNINGS = 4, 2
# Models of more bytes are given to the runtime as files.
_LARGE = 2**27
_LARGEST_MESSAGE = 2**31 - 1


class Session:
    """A model loaded into ONNX Runtime.

    Args:
        model: A model or the path of one.
        provider: Where it is to run.
        optimise: Whether ONNX Runtime may optimise the graph; every intermediate value survives only if not.
        name: What messages call the model.

    Raises:
        ProviderError: CUDA was asked for and does not work.
        RuntimeFailedError: ONNX Runtime refuses the model.

    Attributes:
        provider: ``cuda`` or ``cpu``: where it really runs.
        providers: The session's own list of providers.
    """

    def __init__(
        self, model: onnx.ModelProto | Path, provider: Provider, *, optimise: bool = True, name: str = "the model"
    ) -> None:
        """Load the model and check where it landed."""
        self.name = name
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
        # Waiting threads sleep instead of spinning: on a busy machine spinning makes runs ten times slower.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if not isinstance(model, Path) and bytes_overflow():
            model = with_unsigned_weights(model)
        is_large = _size(model) > _LARGE
        # An arena keeps what values took, casts of large weights included, and asks for more than it needs.
        options.enable_cpu_mem_arena = optimise and not is_large
        if isinstance(model, Path):
            self._session = _open(str(model), options, provider, name)
        elif is_large:
            self._session = _open_large(model, options, provider, name)
        else:
            self._session = _open(model.SerializeToString(), options, provider, name)
        self.providers = tuple(self._session.get_providers())
        self.provider = Provider.CUDA if _CUDA in self.providers else Provider.CPU
        if provider is Provider.CUDA and self.provider is not Provider.CUDA:
            _refuse_cuda(_FELL_BACK)
        self.output_names = tuple(o.name for o in self._session.get_outputs())

    def run(self, feeds: Feeds) -> dict[str, Any]:
        """Run the model once; return its outputs by name (arrays, or lists for sequences).

        Raises:
            RuntimeFailedError: The run failed.
        """
        try:
            with _failures():
                results = self._session.run(None, dict(feeds))
        except RuntimeFailedError as error:
            what = f"ONNX Runtime can't run {self.name}: {error.what}"
            mend = "check that the inputs have the shapes and values that the model expects"
            mend += ", or use --provider cpu" if self.provider is Provider.CUDA else ""
            raise RuntimeFailedError(what, mend=mend) from error
        return dict(zip(self.output_names, results, strict=True))


def has_cuda() -> bool:
    """Return whether ONNX Runtime can really run a model on CUDA here."""
    return not cuda_obstacle()


@cache
def cuda_obstacle() -> str:
    """Return why no model can run on CUDA here; empty if a small one did. What a machine can do is found out once."""
    if _CUDA not in ort.get_available_providers():
        return "this build of ONNX Runtime has no CUDA"
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver"
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        # Finds the CUDA libraries that pip installs, where there are any.
        ort.preload_dlls()
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    try:
        session = _load(_tiny_model().SerializeToString(), options, [_CUDA, _CPU])
        if _CUDA not in session.get_providers():
            return _FELL_BACK
        # A GPU that is too old for the build gets its session, and fails here.
        with _failures():
            session.run(None, {"x": np.ones(1, np.float32)})
    except RuntimeFailedError as error:
        return error.what
    return ""


@cache
def bytes_overflow() -> bool:
    """Return whether products of unsigned and signed bytes overflow in ONNX Runtime here: without VNNI they do."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (uint8[1, 4] x) => (int32[1, 1] y) <int8[4, 1] w = {127, 127, 127, 127}> { y = MatMulInteger(x, w) }"""
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    session = _load(onnx.parser.parse_model(text).SerializeToString(), options, [_CPU])
    found = session.run(None, {"x": np.full((1, 4), 255, np.uint8)})[0]
    return bool(np.asarray(found).item() != 4 * 255 * 127)


def runtime_version() -> str:
    """Return ONNX Runtime's version."""
    return str(ort.__version__)


def _open_large(
    model: onnx.ModelProto, options: ort.SessionOptions, provider: Provider, name: str
) -> ort.InferenceSession:
    """Open a model by way of a file, which is mapped; a message would be copied twice before its weights are there."""
    # Some systems don't remove what is mapped.
    with tempfile.TemporaryDirectory(prefix="onnxfuse-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "model.onnx"
        try:
            write_model(model, path, largest=_LARGE)
        except OutputError:
            if byte_size(model) > _LARGEST_MESSAGE:
                raise
            # There is less room for files than in memory.
            return _open(model.SerializeToString(), options, provider, name)
        return _open(str(path), options, provider, name)


def _size(model: onnx.ModelProto | Path) -> int:
    """Return how many bytes a model has, those beside a file that go by its name included; 0 if it is not there."""
    if isinstance(model, Path):
        return sum(file.stat().st_size for file in model.parent.glob(f"{escape(model.name)}*") if file.is_file())
    return byte_size(model)


def _open(source: str | bytes, options: ort.SessionOptions, provider: Provider, name: str) -> ort.InferenceSession:
    obstacle = "" if provider is Provider.CPU else cuda_obstacle()
    if provider is Provider.CUDA and obstacle:
        _refuse_cuda(obstacle)
    refused = ""
    if provider is not Provider.CPU and not obstacle:
        try:
            return _load(source, options, [_CUDA, _CPU])
        except RuntimeFailedError as error:
            # The model may be at fault, or too large for the GPU: the CPU tells.
            refused = error.what
            logger.debug("CUDA refuses %s: %s", name, refused)
    try:
        session = _load(source, options, [_CPU])
    except RuntimeFailedError as error:
        what = f"ONNX Runtime refuses {name}: {error.what}"
        mend = "check that it runs in ONNX Runtime as it is; onnxfuse needs that for its proof"
        raise RuntimeFailedError(what, mend=mend) from error
    if provider is Provider.CUDA:
        _refuse_cuda(refused)
    return session


def _load(source: str | bytes, options: ort.SessionOptions, providers: list[str]) -> ort.InferenceSession:
    """Load a model without ONNX Runtime's complaints on the terminal, and without a second try on the CPU.

    Its own second try would hide why the first one failed, and print it to standard output.

    Raises:
        RuntimeFailedError: It was refused; the error says no more than why.
    """
    ort.set_default_logger_severity(_FATAL_ONLY)
    try:
        with _failures():
            return ort.InferenceSession(source, options, providers=providers, enable_fallback=0)
    finally:
        ort.set_default_logger_severity(_WARNINGS)


@contextmanager
def _failures() -> Iterator[None]:
    """Turn whatever ONNX Runtime raises into one kind of error, with the part that matters."""
    try:
        yield
    except Exception as error:
        raise RuntimeFailedError(_told(error)) from error


def _refuse_cuda(why: str) -> NoReturn:
    what = f"CUDA was asked for, but does not work here: {why}"
    mend = "install the libraries with `pip install 'onnxfuse[cuda]'` and a driver for the GPU, or use --provider cpu"
    raise ProviderError(what, where="--provider cuda", mend=mend)


def _told(error: Exception) -> str:
    """Return the first line of what an error says, or what CUDA says if that is in it."""
    text = str(error).strip()
    found = _CUDA_FAILURE.search(text)
    if found:
        return found[0].strip()
    return text.splitlines()[0] if text else type(error).__name__


def _tiny_model() -> onnx.ModelProto:
    return onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 13]> tiny (float[1] x) => (float[1] y) { y = Relu(x) }'
    )
