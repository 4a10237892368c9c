"""Reading and writing model files: what is read, what is refused, and that no half-written file is ever seen."""

import errno
import hashlib
import os
import stat
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxfuse
from onnxfuse.errors import DataError, ModelError, OutputError
from onnxfuse.graph import files
from onnxfuse.graph.files import check_output_path, read_model, staged, write_model
from tests.conftest import QUICK, MakeMlp, names_in


def save_outside(model: onnx.ModelProto, path: Path) -> None:
    """Save a model with its weights beside it, in weights.bin."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    onnx.save_model(copy, path, save_as_external_data=True, location="weights.bin", size_threshold=0)


def test_a_file_is_read_with_its_size_and_hash(digits: Path) -> None:
    """A file is read with its size and hash."""
    source = read_model(digits)
    data = digits.read_bytes()
    assert source.model.SerializeToString() == data
    assert (source.path, source.size_bytes, source.name) == (digits, len(data), str(digits))
    assert source.sha256 == hashlib.sha256(data).hexdigest()
    assert read_model(str(digits)) == source


def test_the_hash_covers_weights_beside_the_file(digits: Path, tmp_path: Path) -> None:
    """The hash tells models apart whose files are the same and whose weights, beside them, are not."""
    (tmp_path / "outside").mkdir()
    path = tmp_path / "outside" / "m.onnx"
    save_outside(onnx.load(digits), path)
    before, weights = read_model(path), path.with_name("weights.bin")
    data = bytearray(weights.read_bytes())
    assert before == read_model(path)
    data[5] ^= 1
    weights.write_bytes(data)
    after = read_model(path)
    assert after.sha256 != before.sha256
    weights.write_bytes(data + b"nothing reads this")
    assert read_model(path).sha256 == after.sha256


def test_an_object_is_copied(make_mlp: MakeMlp) -> None:
    """An object is copied."""
    model = make_mlp()
    source = read_model(model)
    model.graph.node[0].name = "changed later"
    assert source.model.graph.node[0].name == "first"
    assert (source.path, source.sha256, source.name) == (None, "", "the model object")
    assert source.size_bytes == len(make_mlp().SerializeToString())


def test_weights_beside_the_model_are_read(make_mlp: MakeMlp, tmp_path: Path) -> None:
    """Weights beside the model are read."""
    model = make_mlp()
    save_outside(model, tmp_path / "m.onnx")
    source = read_model(tmp_path / "m.onnx")
    assert [t.raw_data for t in source.model.graph.initializer] == [t.raw_data for t in model.graph.initializer]
    assert source.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())


def test_weights_of_nodes_and_subgraphs_are_looked_for_too(tmp_path: Path) -> None:
    """Weights of nodes and subgraphs are looked for too."""
    tensor = numpy_helper.from_array(np.ones(4, np.float32), "w")
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["y"], value=tensor)],
        "inner",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
    )
    outer = helper.make_graph(
        [helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)],
        "outer",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [4])],
    )
    model = helper.make_model(outer, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    for branch in model.graph.node[0].attribute:
        stored = branch.g.node[0].attribute[0].t
        stored.data_location = TensorProto.EXTERNAL
        stored.external_data.add(key="location", value="gone.bin")
        stored.ClearField("raw_data")
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"a file that is missing: 'gone\.bin'"):
        read_model(tmp_path / "m.onnx")


def test_a_cut_weights_file_is_refused(make_mlp: MakeMlp, tmp_path: Path) -> None:
    """A cut weights file is refused."""
    save_outside(make_mlp(), tmp_path / "m.onnx")
    (tmp_path / "weights.bin").write_bytes(b"cut")
    with pytest.raises(ModelError, match="external data can't be read") as caught:
        read_model(tmp_path / "m.onnx")
    assert (caught.value.where, caught.value.mend) == (str(tmp_path / "m.onnx"), "export the model again")


def test_an_object_whose_weights_are_in_files_is_refused(make_mlp: MakeMlp, tmp_path: Path) -> None:
    """An object whose weights are in files is refused."""
    save_outside(make_mlp(), tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    with pytest.raises(ModelError) as caught:
        read_model(model)
    assert str(caught.value) == (
        "the weights of the model object are in files, and it does not say in which folder\n"
        "  at:   the model object\n  mend: give its path, or load it with onnx.load"
    )


@pytest.mark.parametrize("field", ["graph", "ir_version", "output"])
def test_messages_that_are_no_model_are_refused(make_mlp: MakeMlp, tmp_path: Path, field: str) -> None:
    """Messages that are no model are refused."""
    model = make_mlp()
    (model.graph if field == "output" else model).ClearField(field)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    for source in (model, tmp_path / "m.onnx"):
        with pytest.raises(
            ModelError, match="this is not an ONNX model: it has no graph with outputs, or no IR version"
        ):
            read_model(source)


def test_a_file_without_read_permission(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without read permission."""

    def refuse(_path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ModelError) as caught:
        read_model(digits)
    assert str(caught.value) == (
        f"the file can't be read: Permission denied\n  at:   {digits}\n  mend: check its name and its permissions"
    )


def test_a_staged_file_appears_only_at_the_end(tmp_path: Path) -> None:
    """A staged file appears only at the end."""
    target = tmp_path / "out.onnx"
    target.write_bytes(b"old")
    with staged(target) as temporary:
        temporary.write_bytes(b"new")
        assert target.read_bytes() == b"old"
        assert temporary.parent.parent == tmp_path  # on the same disk, so that the move is one step
    assert target.read_bytes() == b"new"
    assert names_in(tmp_path) == ["out.onnx"]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_staged_file_vanishes_on_failure(tmp_path: Path, kind: type[BaseException]) -> None:
    """A staged file vanishes on failure."""
    target = tmp_path / "out.onnx"
    target.write_bytes(b"old")

    def fail() -> None:
        with staged(target) as temporary:
            temporary.write_bytes(b"new")
            raise kind

    with pytest.raises(kind):
        fail()
    assert target.read_bytes() == b"old"
    assert names_in(tmp_path) == ["out.onnx"]


def test_data_beside_a_staged_file_moves_along_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data beside a staged file moves along first."""
    moved: list[str] = []
    replace = Path.replace

    def noted(self: Path, target: Path) -> Path:
        moved.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", noted)
    with staged(tmp_path / "a.onnx") as temporary:
        temporary.write_bytes(b"model")
        temporary.with_name("z.data").write_bytes(b"data")
    assert moved == ["z.data", "a.onnx"]
    assert names_in(tmp_path) == ["a.onnx", "z.data"]


def test_a_failed_move_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed move is an output error."""

    def refuse(_self: Path, _target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputError) as caught, staged(tmp_path / "a.onnx") as temporary:
        temporary.write_bytes(b"model")
    assert str(caught.value) == (
        f"the result can't be moved into place: Permission denied\n  at:   {tmp_path / 'a.onnx'}\n"
        "  mend: choose another output path"
    )
    assert names_in(tmp_path) == []


def test_a_relative_output_path_is_taken_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative output path is taken from the current folder."""
    monkeypatch.chdir(tmp_path)
    assert check_output_path("small.onnx") == Path("small.onnx")
    with staged("small.onnx") as temporary:
        temporary.write_bytes(b"model")
    assert names_in(tmp_path) == ["small.onnx"]


NO_NAMES = {
    "too long": ("a" * 300, os.strerror(errno.ENAMETOOLONG)),
    "not UTF-8": ("\udcff.onnx", "its name is not UTF-8"),
    "a zero byte": ("a\0b", "embedded null byte"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other rules for names")
@pytest.mark.parametrize("kind", NO_NAMES)
def test_names_that_no_file_can_have(make_mlp: MakeMlp, tmp_path: Path, kind: str) -> None:
    """Names that no file can have, or that ONNX can't take, are refused everywhere, before any work is done."""
    name, why = NO_NAMES[kind]
    path = tmp_path / name
    with pytest.raises(OutputError) as wrong_output:
        onnxfuse.compress(make_mlp(), path)
    assert str(wrong_output.value) == (
        f"the output path can't be used: {why}\n  at:   {path}\n  mend: choose another output path"
    )
    with pytest.raises(ModelError) as wrong_model:
        onnxfuse.inspect(path)
    assert wrong_model.value.what in {f"the file can't be read: {why}", "there is no such file"}
    for data in (path, str(path)):
        with pytest.raises(DataError):
            onnxfuse.compress(make_mlp(), calibration=data)
        with pytest.raises(DataError):
            onnxfuse.validate(make_mlp(), make_mlp(), data=data)
    assert names_in(tmp_path) == []


def test_a_name_of_full_length_can_be_written(make_mlp: MakeMlp, tmp_path: Path) -> None:
    """A name of full length can be written: the temporary name is not longer."""
    onnxfuse.compress(make_mlp(), tmp_path / f"{'a' * 250}.onnx", provider="cpu")
    assert names_in(tmp_path) == [f"{'a' * 250}.onnx"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes with a name")
def test_pipes_and_devices_are_neither_read_nor_replaced(make_mlp: MakeMlp, tmp_path: Path) -> None:
    """Pipes and devices are neither read nor replaced: a run as root would end /dev/null for everybody."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(OutputError) as wrong_output:
        onnxfuse.compress(make_mlp(), path, provider="cpu")
    assert str(wrong_output.value) == (
        f"the output path is a device or a pipe, which a file would replace\n  at:   {path}\n"
        "  mend: name a file, such as small.onnx"
    )
    with pytest.raises(ModelError) as wrong_model:
        onnxfuse.inspect(path)
    assert str(wrong_model.value) == (
        f"this is a device or a pipe, and a model is read more than once\n  at:   {path}\n"
        "  mend: copy the model into a file first"
    )
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_a_model_too_large_for_one_file_gets_its_weights_beside_it(
    make_mlp: MakeMlp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model too large for one file gets its weights beside it."""
    monkeypatch.setattr(files, "_LARGEST_FILE", 100)
    monkeypatch.setattr(files, "_EXTERNAL_FROM", 0)
    model = make_mlp()
    before = model.SerializeToString()
    with staged(tmp_path / "out.onnx") as temporary:
        size = write_model(model, temporary)
    assert model.SerializeToString() == before
    assert names_in(tmp_path) == ["out.onnx", "out.onnx.data"]
    assert size == sum(file.stat().st_size for file in tmp_path.iterdir())
    again = read_model(tmp_path / "out.onnx").model
    assert [t.raw_data for t in again.graph.initializer] == [t.raw_data for t in model.graph.initializer]


def test_a_large_model_goes_all_the_way(make_mlp: MakeMlp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large model goes all the way."""
    monkeypatch.setattr(files, "_LARGEST_FILE", 100)
    monkeypatch.setattr(files, "_EXTERNAL_FROM", 0)
    result = onnxfuse.compress(make_mlp(), tmp_path / "out.onnx", ratio=0.5)
    assert names_in(tmp_path) == ["out.onnx", "out.onnx.data"]
    assert result.report.after.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    report = onnxfuse.validate(result.model, tmp_path / "out.onnx")
    assert report.drift.outputs[0].max_abs == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no modes")
def test_the_result_has_the_mode_of_a_new_file(digits: Path) -> None:
    """The result has the mode of a new file."""
    plain = digits.with_name("plain")
    plain.write_bytes(b"")
    onnxfuse.compress(digits, digits.with_name("small.onnx"), effort=QUICK, prove=False)
    assert digits.with_name("small.onnx").stat().st_mode == plain.stat().st_mode


def test_local_functions_are_put_in_where_they_are_called(tmp_path: Path) -> None:
    """A function that is called twice, with a convolution of its own each time, is compressed at both places."""
    model = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        net (float[n, 2, 6, 6] x) => (float[n, 3, 6, 6] y) {
            h = local.layer <groups: int = 1> (x, v)
            i = local.layer <groups: int = 1> (h, w)
            y = Conv <kernel_shape = [1, 1]> (i, last)
        }
        <domain: "local", opset_import: ["" : 17]>
        layer <groups> (a, f) => (b) {
            c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group: int = @groups> (a, f)
            b = Relu (c)
        }
        """
    )
    rng = np.random.default_rng(0)
    for name, shape in {"v": (8, 2, 3, 3), "w": (6, 8, 3, 3), "last": (3, 6, 1, 1)}.items():
        array = rng.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    result = onnxfuse.compress(path, method="prune", ratio=0.5, provider="cpu")
    assert [(g.channels_before, g.channels_after) for g in result.report.groups] == [(8, 4), (6, 3), (3, 3)]
    assert len(result.model.functions) == 0
    assert read_model(path).size_bytes == path.stat().st_size
    unused = onnx.ModelProto()
    unused.CopyFrom(result.model)
    unused.functions.extend(model.functions)
    assert read_model(unused).model.functions == unused.functions
