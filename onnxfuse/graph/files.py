"""Reading and writing model files: clear refusals, external data, and no half-written result."""

import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import external_data_helper, inliner

from onnxfuse.errors import ModelError, OutputError
from onnxfuse.graph.branches import without_decided_ifs
from onnxfuse.graph.in_order import with_reads_in_order_reshaped
from onnxfuse.graph.slim import byte_size, save_apart
from onnxfuse.graph.standing import with_standing_weights_stored

__all__ = ["SourceModel", "check_output_path", "data_path", "read_model", "staged", "weight_files", "write_model"]

logger = logging.getLogger(__name__)

# A protobuf message, so a single-file model, can't be larger.
_LARGEST_FILE = 2**31 - 1
# Tensors smaller than this stay inside the model file when the weights go beside it.
_EXTERNAL_FROM = 1024


@dataclass(frozen=True)
class SourceModel:
    """A model with its weights in memory.

    Attributes:
        model: The model; nobody changes it.
        path: Where it was read from; None if it was given as an object.
        size_bytes: Size of the file with its external data, or of the object once serialised.
        sha256: Hash of the file, followed by the weights that lie beside it, if there are any; empty for an object.
    """

    model: onnx.ModelProto
    path: Path | None
    size_bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """The path, or a word for a model without one."""
        return str(self.path) if self.path else "the model object"


def read_model(source: str | os.PathLike[str] | onnx.ModelProto) -> SourceModel:
    """Read an ONNX model with its external data.

    Args:
        source: A path, or a model object (which is copied, so that later changes to it do no harm).

    Raises:
        ModelError: There is no such file, it is not ONNX, it is cut short, or its external data is missing.
    """
    if isinstance(source, onnx.ModelProto):
        model = onnx.ModelProto()
        model.CopyFrom(source)
        _check_has_graph(model, "the model object")
        if any(external_data_helper.uses_external_data(t) for t in _tensors(model.graph)):
            what = "the weights of the model object are in files, and it does not say in which folder"
            raise ModelError(what, where="the model object", mend="give its path, or load it with onnx.load")
        return SourceModel(_in_one_graph(model), None, source.ByteSize(), "")
    path = Path(source)
    data = _read_bytes(path)
    try:
        model = onnx.load_model_from_string(data)
    except DecodeError as error:
        what = "this is not an ONNX model, or it is cut short"
        mend = "check the file's size against its source and copy or export it again"
        raise ModelError(what, where=str(path), mend=mend) from error
    _check_has_graph(model, str(path))
    outside = [t for t in _tensors(model.graph) if external_data_helper.uses_external_data(t)]
    size = len(data) + _load_external_data(model, outside, path)
    digest = hashlib.sha256(data)
    for tensor in outside:
        digest.update(tensor.raw_data)
    return SourceModel(_in_one_graph(model), path, size, digest.hexdigest())


def weight_files(path: Path) -> list[Path]:
    """Return the files beside a model that its weights lie in; none if it can't be read."""
    try:
        model = onnx.load_model_from_string(_read_bytes(path))
    except (DecodeError, ModelError):
        return []
    tensors = (t for t in _tensors(model.graph) if external_data_helper.uses_external_data(t))
    return [path.parent / name for name in sorted({external_data_helper.ExternalDataInfo(t).location for t in tensors})]


def _in_one_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model in which nothing is written in a roundabout way that would hide what is coupled.

    Local functions are put in where they are called, branches where an If always takes them; weights that are computed
    from stored ones are stored, and what is picked in order is reshaped.
    """
    return with_reads_in_order_reshaped(with_standing_weights_stored(without_decided_ifs(_without_functions(model))))


def _without_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model with the functions that are local to it put in where they are called.

    A function that is called twice may have to become two, with other widths.
    """
    called = {(f.domain, f.name) for f in model.functions}
    if not any((node.domain, node.op_type) in called for node in model.graph.node):
        return model
    try:
        return inliner.inline_local_functions(model)
    except RuntimeError as error:
        logger.debug("local functions stay, which freezes what they touch: %s", error)
        return model


def check_output_path(path: str | os.PathLike[str], *, replaced: bool = True) -> Path:
    """Refuse early what could not be written in the end.

    Args:
        path: Where something is to be written.
        replaced: Whether what is there will be replaced as a whole: to a device that would put an end.

    Raises:
        OutputError: The folder does not exist or can't be written to, or the path is a folder, or a device or pipe that
            would be replaced.
    """
    target = Path(path)
    folder = target.parent
    mode = _mode_of(target)
    if stat.S_ISDIR(mode):
        what = "the output path is a folder"
        raise OutputError(what, where=str(target), mend="name a file, such as small.onnx")
    if replaced and mode and not stat.S_ISREG(mode):
        what = "the output path is a device or a pipe, which a file would replace"
        raise OutputError(what, where=str(target), mend="name a file, such as small.onnx")
    if not folder.is_dir():
        what = "the folder of the output file does not exist"
        raise OutputError(what, where=str(folder), mend="create it first, or choose another place")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        what = f"the folder of the output file can't be written to: {error.strerror or error}"
        raise OutputError(what, where=str(folder), mend="choose a folder that you may write to") from error
    return target


def _mode_of(target: Path) -> int:
    """Return what is at an output path, as `stat` tells it; 0 if nothing is.

    Raises:
        OutputError: No file can have such a name.
    """
    try:
        # ONNX and ONNX Runtime take paths as UTF-8, which not every name on a disk is.
        str(target).encode()
        return target.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except (OSError, ValueError) as error:
        what = f"the output path can't be used: {_said(error)}"
        raise OutputError(what, where=str(target), mend="choose another output path") from error


def _said(error: OSError | ValueError) -> str:
    """Return what an error says, without the path."""
    if isinstance(error, UnicodeError):
        return "its name is not UTF-8"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


@contextmanager
def staged(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside ``path``; move it into place when the block ends well, remove it otherwise.

    Files that start with the temporary name (external data) move along.

    Raises:
        OutputError: The result could not be moved into place.
    """
    target = check_output_path(path)
    with tempfile.TemporaryDirectory(prefix=".onnxfuse-", dir=target.parent) as folder:
        yield Path(folder) / target.name
        try:
            # The model goes last: while it is not there, nothing points to the data beside it.
            for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == target.name):
                file.replace(target.parent / file.name)
        except OSError as error:
            what = f"the result can't be moved into place: {error.strerror or error}"
            raise OutputError(what, where=str(target), mend="choose another output path") from error


def data_path(path: Path) -> Path:
    """Return where the weights of a model go that is too large for one file.

    Example:
        >>> data_path(Path("large.onnx")).name
        'large.onnx.data'
    """
    return path.with_name(path.name + ".data")


def write_model(model: onnx.ModelProto, path: Path, *, largest: int | None = None) -> int:
    """Write a model, with its weights beside it where one file can't hold them; return the bytes written.

    Args:
        model: The model; not changed.
        path: Where it goes.
        largest: How many bytes one file may hold; None for as many as the format allows.

    Raises:
        OutputError: The disk is full or the path can't be written.
    """
    beside = data_path(path)
    try:
        if byte_size(model) <= (_LARGEST_FILE if largest is None else largest):
            path.write_bytes(model.SerializeToString())
            return path.stat().st_size
        save_apart(model, path, beside, _EXTERNAL_FROM)
        return path.stat().st_size + beside.stat().st_size
    except OSError as error:
        what = f"the model can't be written: {error.strerror or error}"
        raise OutputError(what, where=str(path), mend="free some space or choose another output path") from error


def _read_bytes(path: Path) -> bytes:
    try:
        # ONNX and ONNX Runtime take paths as UTF-8, which not every name on a disk is.
        str(path).encode()
        mode = path.stat().st_mode
        data = path.read_bytes() if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else None
    except FileNotFoundError as error:
        what = "there is no such file"
        raise ModelError(what, where=str(path), mend="check the path") from error
    except IsADirectoryError as error:
        what = "this is a folder, not a model file"
        raise ModelError(what, where=str(path), mend="name the .onnx file inside it") from error
    except (OSError, ValueError) as error:
        what = f"the file can't be read: {_said(error)}"
        raise ModelError(what, where=str(path), mend="check its name and its permissions") from error
    if data is None:
        what = "this is a device or a pipe, and a model is read more than once"
        raise ModelError(what, where=str(path), mend="copy the model into a file first")
    if not data:
        what = "the file is empty"
        raise ModelError(what, where=str(path), mend="export the model again")
    return data


def _check_has_graph(model: onnx.ModelProto, where: str) -> None:
    # Many files that are not ONNX decode as a message of unknown fields; a model has a version and a graph.
    if not model.HasField("graph") or not model.ir_version or not model.graph.output:
        what = "this is not an ONNX model: it has no graph with outputs, or no IR version"
        raise ModelError(what, where=where, mend="give a .onnx file")


def _load_external_data(model: onnx.ModelProto, tensors: Sequence[onnx.TensorProto], path: Path) -> int:
    """Load the weights that lie beside the model; return the size of their files in bytes."""
    files = {external_data_helper.ExternalDataInfo(t).location for t in tensors}
    missing = sorted(name for name in files if not (path.parent / name).is_file())
    if missing:
        what = f"the model keeps weights in a file that is missing: {missing[0]!r}"
        raise ModelError(what, where=str(path), mend=f"put it beside the model, in {str(path.parent)!r}")
    size = sum((path.parent / name).stat().st_size for name in files)
    try:
        external_data_helper.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        what = f"the model's external data can't be read: {error}"
        raise ModelError(what, where=str(path), mend="export the model again") from error
    return size


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor stored in a graph and its subgraphs."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)
