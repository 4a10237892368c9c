"""Every kind of bad input: the exact message, the exit code, nothing written, nothing changed."""

import hashlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxfuse import OnnxFuseError, errors, pipeline
from onnxfuse.errors import ProofError
from onnxfuse.proof.runtime import has_cuda
from tests.conftest import QUICK, Command, MakeMlp, Outcome


def contents(folder: Path) -> dict[str, str]:
    """Return the hash of every file in a folder and below, and the names of the folders."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def assert_refused(outcome: Outcome, code: int, message: str, before: Mapping[str, str], folder: Path) -> None:
    """Assert that a run gave one message on stderr, an exit code, and left the folder as it was."""
    assert outcome.err == f"onnxfuse: {message}\n"
    assert outcome.out == ""
    assert outcome.code == code
    assert contents(folder) == before


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(0, "", "onnxfuse: no\n"),
        Outcome(2, "", "onnxfuse: yes\n"),
        Outcome(2, "", "Traceback\nonnxfuse: no\n"),
        Outcome(2, "a table", "onnxfuse: no\n"),
    ],
)
def test_the_check_for_refusals_can_fail(outcome: Outcome, tmp_path: Path) -> None:
    """The check for refusals can fail."""
    with pytest.raises(AssertionError):
        assert_refused(outcome, 2, "no", {}, tmp_path)


def test_the_check_for_refusals_sees_files(tmp_path: Path) -> None:
    """The check for refusals sees files."""
    assert_refused(Outcome(2, "", "onnxfuse: no\n"), 2, "no", {}, tmp_path)
    (tmp_path / "left.over").write_text("")
    with pytest.raises(AssertionError):
        assert_refused(Outcome(2, "", "onnxfuse: no\n"), 2, "no", {}, tmp_path)


@pytest.fixture
def place(digits: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the example network and all sorts of bad files; it is the current one."""
    folder = digits.parent
    monkeypatch.chdir(folder)
    model = digits.read_bytes()
    (folder / "text.onnx").write_text("this is a text\n")
    (folder / "picture.onnx").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\x06\0\0\0")
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "half.onnx").write_bytes(model[: len(model) // 2])
    (folder / "folder").mkdir()
    loaded = onnx.load(digits)
    onnx.save_model(loaded, "outside.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    (folder / "weights.bin").unlink()
    return folder


def write_samples(folder: Path) -> None:
    """Write samples files that do not fit the example network, whose input is image (n, 1, 8, 8), float32."""
    np.savez(folder / "key.npz", picture=np.zeros((4, 1, 8, 8), np.float32))
    np.savez(folder / "extra.npz", image=np.zeros((4, 1, 8, 8), np.float32), other=np.zeros(4))
    np.savez(folder / "shape.npz", image=np.zeros((4, 1, 9, 8), np.float32))
    np.savez(folder / "rank.npz", image=np.zeros((4, 8), np.float32))
    np.savez(folder / "integers.npz", image=np.zeros((4, 1, 8, 8), np.int32))
    np.savez(folder / "none.npz", image=np.zeros((0, 1, 8, 8), np.float32))
    np.savez(folder / "scalar.npz", image=np.float32(1))
    np.savez(folder / "nan.npz", image=np.full((4, 1, 8, 8), np.nan, np.float32))
    np.savez(folder / "no_arrays.npz")
    np.savez(folder / "pickle.npz", image=np.array([{}], object))
    (folder / "words.npz").write_text("image\n")
    (folder / "zero.npz").write_bytes(b"")
    (folder / "zip.npz").write_bytes(b"PK\x03\x04 and then nothing")
    with zipfile.ZipFile(folder / "member.npz", "w") as archive:
        archive.writestr("image", "not an array")
    np.savez_compressed(folder / "good.npz", image=np.arange(256, dtype=np.float32).reshape(4, 1, 8, 8))
    damaged = bytearray((folder / "good.npz").read_bytes())
    damaged[120:180] = bytes(60)
    (folder / "damaged.npz").write_bytes(damaged)
    # The same archive, as if it were encrypted or packed in a way that nobody knows: what it says of its one member at
    # the front and at the end.
    for name, offset, number in (("encrypted", 6, 1), ("packed", 8, 99)):
        changed = bytearray((folder / "good.npz").read_bytes())
        for start in (0, changed.index(b"PK\x01\x02") + 2):
            changed[start + offset : start + offset + 2] = number.to_bytes(2, "little")
        (folder / f"{name}.npz").write_bytes(changed)


NOT_ONNX = (
    "this is not an ONNX model, or it is cut short\n  at:   {}\n"
    "  mend: check the file's size against its source and copy or export it again"
)

MODELS = {
    "missing.onnx": "there is no such file\n  at:   missing.onnx\n  mend: check the path",
    "folder": "this is a folder, not a model file\n  at:   folder\n  mend: name the .onnx file inside it",
    "text.onnx": NOT_ONNX.format("text.onnx"),
    "picture.onnx": NOT_ONNX.format("picture.onnx"),
    "half.onnx": NOT_ONNX.format("half.onnx"),
    "empty.onnx": "the file is empty\n  at:   empty.onnx\n  mend: export the model again",
    "outside.onnx": "the model keeps weights in a file that is missing: 'weights.bin'\n  at:   outside.onnx\n"
    "  mend: put it beside the model, in '.'",
}


@pytest.mark.parametrize("name", MODELS)
def test_bad_models(cli: Command, place: Path, name: str) -> None:
    """Bad models."""
    before = contents(place)
    assert_refused(cli("compress", name, "-o", "small.onnx"), 3, MODELS[name], before, place)
    assert_refused(cli("inspect", name), 3, MODELS[name], before, place)
    assert_refused(cli("validate", "digits.onnx", name), 3, MODELS[name], before, place)
    assert_refused(cli("validate", name, "digits.onnx"), 3, MODELS[name], before, place)


RATIO = "the ratio is {}\n  at:   --ratio\n  mend: give the share of channels to remove: 0 or more, and less than 1"

OPTIONS = {
    ("--ratio", "1.5"): RATIO.format("1.5"),
    ("--ratio", "1"): RATIO.format("1.0"),
    ("--ratio", "-0.1"): RATIO.format("-0.1"),
    ("--ratio=-0.1",): RATIO.format("-0.1"),
    ("--ratio", "nan"): RATIO.format("nan"),
    ("--ratio", "inf"): RATIO.format("inf"),
    ("--seed", "-1"): "the seed is -1\n  at:   --seed\n  mend: give a whole number from 0 on",
    ("--p", "0.5"): "the order of the norm is 0.5\n  at:   --p\n  mend: give a number from 1 on, or inf",
    ("--p", "nan"): "the order of the norm is nan\n  at:   --p\n  mend: give a number from 1 on, or inf",
    ("--regularisation", "0"): "the regularisation is 0.0\n  at:   --regularisation\n"
    "  mend: give a finite number above 0, such as 0.05",
    ("--only", "/no/*"): "no group's name fits '/no/*'\n  at:   --only\n"
    "  mend: `onnxfuse inspect` lists the names of the groups",
    ("--skip", "/no/*"): "no group's name fits '/no/*'\n  at:   --skip\n"
    "  mend: `onnxfuse inspect` lists the names of the groups",
    ("--only", "/fc/Gemm", "--skip", "nothing"): "no group's name fits 'nothing'\n  at:   --skip\n"
    "  mend: `onnxfuse inspect` lists the names of the groups",
    ("--scope", "most"): 'Invalid value "most" for --scope. Choose from: "all", "hidden".\n'
    "  mend: `onnxfuse COMMAND --help` shows every flag",
    ("--ratio", "half"): 'Invalid value for --ratio: unable to convert "half" into float.\n'
    "  mend: `onnxfuse COMMAND --help` shows every flag",
    ("--rato", "0.5"): "Unknown option: --rato. Did you mean --ratio?\n"
    "  mend: `onnxfuse COMMAND --help` shows every flag",
}


@pytest.mark.parametrize("words", OPTIONS, ids=" ".join)
def test_bad_options(cli: Command, place: Path, words: tuple[str, ...]) -> None:
    """Bad options."""
    before = contents(place)
    assert_refused(cli("compress", "digits.onnx", "-o", "small.onnx", *words), 2, OPTIONS[words], before, place)


NAMES = {
    ("--method", "intrafusion"): "there is no method called 'intrafusion'\n  at:   --method\n"
    "  mend: did you mean 'intra-fusion'? Known: ",
    ("--importance", "l3"): "there is no importance called 'l3'\n  at:   --importance\n  mend: ",
    ("--transport-target", "centre"): "there is no target called 'centre'\n  at:   --transport-target\n  mend: ",
    ("--source-mass", "equal"): "there is no mass called 'equal'\n  at:   --source-mass\n  mend: ",
    ("--target-mass", "equal"): "there is no mass called 'equal'\n  at:   --target-mass\n  mend: ",
    ("--solver", "exakt"): "there is no solver called 'exakt'\n  at:   --solver\n  mend: did you mean 'exact'? Known: ",
}


@pytest.mark.parametrize("words", NAMES, ids=" ".join)
def test_unknown_names(cli: Command, place: Path, words: tuple[str, str]) -> None:
    """Unknown names."""
    before = contents(place)
    outcome = cli("compress", "digits.onnx", "-o", "small.onnx", *words)
    assert outcome.err.startswith(f"onnxfuse: {NAMES[words]}")
    assert outcome.err.count("\n") == 3
    assert (outcome.code, outcome.out) == (2, "")
    assert contents(place) == before


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["compress", "digits.onnx"], 'Command "compress" parameter --output requires an argument.'),
        (["compress", "-o", "small.onnx"], 'Command "compress" parameter MODEL requires an argument.'),
        (["shrink"], 'Unknown command "shrink". Available commands: inspect, compress, plan, methods, validate.'),
    ],
)
def test_bad_usage(cli: Command, place: Path, words: list[str], what: str) -> None:
    """Bad usage."""
    before = contents(place)
    message = f"{what}\n  mend: `onnxfuse COMMAND --help` shows every flag"
    assert_refused(cli(*words), 2, message, before, place)


def test_flags_before_the_command(cli: Command, place: Path) -> None:
    """A flag in front of the command is taken for a command; the mend says where it goes."""
    before = contents(place)
    what = 'Unknown command "-v". Available commands: inspect, compress, plan, methods, validate.'
    message = f"{what}\n  mend: flags come behind the command, as in `onnxfuse COMMAND MODEL -v`"
    assert_refused(cli("-v", "compress", "digits.onnx", "-o", "small.onnx"), 2, message, before, place)


NOT_ARRAYS = (
    "this is not an .npz file of plain arrays, or it is damaged\n  at:   {}\n"
    "  mend: write it with numpy.savez(path, input_name=array)"
)

SAMPLES = {
    "missing.npz": "there is no such samples file\n  at:   missing.npz\n  mend: check the path",
    "folder": "there are no pictures in this folder\n  at:   folder\n"
    "  mend: known endings: .bmp, .gif, .jpeg, .jpg, .png, .ppm, .tif, .tiff, .webp",
    "key.npz": "there is no array called 'image'\n  at:   key.npz\n"
    "  mend: name the arrays like the model's inputs: image",
    "extra.npz": "there is an unknown array called 'other'\n  at:   extra.npz\n"
    "  mend: name the arrays like the model's inputs: image",
    "no_arrays.npz": "there is no array called 'image'\n  at:   no_arrays.npz\n"
    "  mend: name the arrays like the model's inputs: image",
    "shape.npz": "'image' has shape (4, 1, 9, 8), but the model takes ?x1x8x8\n  at:   shape.npz\n"
    "  mend: prepare the samples as the model expects them",
    "rank.npz": "'image' has shape (4, 8), which fits no batch of ?x1x8x8\n  at:   rank.npz\n"
    "  mend: the first axis runs over samples, the others are the model's",
    "integers.npz": "'image' is of type int32, but the model takes float32\n  at:   integers.npz\n"
    "  mend: store it with .astype(numpy.float32)",
    "none.npz": "'image' has shape (0, 1, 8, 8), so it holds no samples\n  at:   none.npz\n"
    "  mend: the first axis of every array runs over samples, at least one",
    "scalar.npz": "'image' has shape (), so it holds no samples\n  at:   scalar.npz\n"
    "  mend: the first axis of every array runs over samples, at least one",
    "words.npz": NOT_ARRAYS.format("words.npz"),
    "zero.npz": NOT_ARRAYS.format("zero.npz"),
    "zip.npz": NOT_ARRAYS.format("zip.npz"),
    "pickle.npz": NOT_ARRAYS.format("pickle.npz"),
    "member.npz": NOT_ARRAYS.format("member.npz"),
    "damaged.npz": NOT_ARRAYS.format("damaged.npz"),
    "encrypted.npz": NOT_ARRAYS.format("encrypted.npz"),
    "packed.npz": NOT_ARRAYS.format("packed.npz"),
    "digits.onnx": NOT_ARRAYS.format("digits.onnx"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_bad_samples(cli: Command, place: Path, name: str) -> None:
    """Bad samples."""
    write_samples(place)
    before = contents(place)
    words = ["compress", "digits.onnx", "-o", "small.onnx", "--calibration", name]
    assert_refused(cli(*words), 5, SAMPLES[name], before, place)
    assert_refused(cli("validate", "digits.onnx", "digits.onnx", "--data", name), 5, SAMPLES[name], before, place)


def test_samples_that_make_no_finite_output(cli: Command, place: Path) -> None:
    """Samples of which none is finite, and finite ones that make no finite output."""
    write_samples(place)
    np.savez(place / "huge.npz", image=np.full((128, 1, 8, 8), 3e38, np.float32))
    before = contents(place)
    message = (
        "every one of the 4 samples has values that are NaN or infinite\n"
        "  at:   'image' of sample 0, at (0, 0, 0): nan\n"
        "  mend: look where the samples were prepared: a division by zero, a logarithm of 0, or numbers never filled in"
    )
    words = ["compress", "digits.onnx", "-o", "small.onnx", "--no-prove", "--calibration"]
    assert_refused(cli(*words, "nan.npz"), 5, message, before, place)
    message = (
        "the original model's output has no finite value on these inputs, so nothing can be compared\n"
        "  at:   output 'logits'\n  mend: check the samples, and that the original model runs well on them"
    )
    assert_refused(cli(*words, "huge.npz", "--method", "prune"), 5, message, before, place)


def test_bad_labels(cli: Command, place: Path) -> None:
    """Bad labels."""
    np.savez(place / "labels.npz", image=np.zeros((4, 1, 8, 8), np.float32), labels=np.zeros(3, np.int64))
    before = contents(place)
    message = (
        "the labels have shape (3,) and type int64\n  at:   labels\n"
        "  mend: they must be whole numbers, one for each of the 4 samples"
    )
    assert_refused(cli("validate", "digits.onnx", "digits.onnx", "--data", "labels.npz"), 5, message, before, place)


OUTPUTS = {
    ("-o", "no/small.onnx"): "the folder of the output file does not exist\n  at:   no\n"
    "  mend: create it first, or choose another place",
    ("-o", "folder"): "the output path is a folder\n  at:   folder\n  mend: name a file, such as small.onnx",
    ("-o", "digits.onnx"): "the output is the input file, which onnxfuse never changes\n  at:   digits.onnx\n"
    "  mend: choose another output path",
    ("-o", "folder/../digits.onnx"): "the output is the input file, which onnxfuse never changes\n"
    f"  at:   {Path('folder/../digits.onnx')}\n  mend: choose another output path",
    ("-o", "small.onnx", "--report", "no/report.json"): "the folder of the output file does not exist\n  at:   no\n"
    "  mend: create it first, or choose another place",
    ("-o", "small.onnx", "--report", "digits.onnx"): "the report and the model are the same file\n"
    "  at:   digits.onnx\n  mend: choose another path for --report",
    ("-o", "small.onnx", "--report", "./small.onnx"): "the report and the output are the same file\n"
    "  at:   small.onnx\n  mend: choose another path for --report",
    ("-o", "s.onnx", "--calibration", "good.npz", "--report", "good.npz"): "the report and the calibration file are "
    "the same file\n  at:   good.npz\n  mend: choose another path for --report",
    ("-o", "good.npz", "--calibration", "good.npz"): "the output is the calibration file, which onnxfuse never changes"
    "\n  at:   good.npz\n  mend: choose another output path",
}


@pytest.mark.parametrize("words", OUTPUTS, ids=" ".join)
def test_bad_outputs(cli: Command, place: Path, words: tuple[str, ...]) -> None:
    """Bad outputs."""
    write_samples(place)
    before = contents(place)
    assert_refused(cli("compress", "digits.onnx", *words), 9, OUTPUTS[words], before, place)


READ_AS_WELL = {
    ("compress", "-o", "w.bin"): "the output is a file with the model's weights, which onnxfuse never changes\n"
    "  at:   w.bin\n  mend: choose another output path",
    ("compress", "-o", "s.onnx", "--report", "w.bin"): "the report and a file with the model's weights are the same "
    "file\n  at:   w.bin\n  mend: choose another path for --report",
    ("compress", "-o", "p.json", "--plan", "p.json"): "the output is the plan, which onnxfuse never changes\n"
    "  at:   p.json\n  mend: choose another output path",
    ("compress", "-o", "s.onnx", "--plan", "p.json", "--report", "p.json"): "the report and the plan are the same file"
    "\n  at:   p.json\n  mend: choose another path for --report",
    ("plan", "-o", "w.bin"): "the plan and a file with the model's weights are the same file\n  at:   w.bin\n"
    "  mend: choose another path for --output",
    ("plan", "-o", "m.onnx"): "the plan and the model are the same file\n  at:   m.onnx\n"
    "  mend: choose another path for --output",
}


@pytest.mark.parametrize("words", READ_AS_WELL, ids=" ".join)
def test_files_that_are_read_beside_the_model_are_not_written_over(
    cli: Command, place: Path, words: tuple[str, ...]
) -> None:
    """Weights that lie beside a model, and a plan, are as much the user's as the model itself."""
    loaded = onnx.load("digits.onnx")
    onnx.save_model(loaded, "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    if "--plan" in words:
        assert cli("plan", "m.onnx", "-o", "p.json", "--method", "prune").code == 0
    before = contents(place)
    assert_refused(cli(words[0], "m.onnx", *words[1:]), 9, READ_AS_WELL[words], before, place)


def test_weights_beside_the_output_are_not_those_of_the_input(cli: Command, place: Path) -> None:
    """Where a large result would have its weights, there may be those of the input."""
    loaded = onnx.load("digits.onnx")
    onnx.save_model(loaded, "m.onnx", save_as_external_data=True, location="s.onnx.data", size_threshold=0)
    before = contents(place)
    message = "the file of weights beside the output is a file with the model's weights, which onnxfuse never changes\n"
    message += "  at:   s.onnx.data\n  mend: choose another output path"
    assert_refused(cli("compress", "m.onnx", "-o", "s.onnx"), 9, message, before, place)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0,
    reason="the superuser may write everywhere, and Windows has no modes",
)
def test_a_folder_without_write_permission(cli: Command, place: Path) -> None:
    """A folder without write permission."""
    before = contents(place)
    (place / "folder").chmod(0o500)
    message = (
        "the folder of the output file can't be written to: Permission denied\n  at:   folder\n"
        "  mend: choose a folder that you may write to"
    )
    assert_refused(cli("compress", "digits.onnx", "-o", "folder/small.onnx"), 9, message, before, place)


def test_a_folder_that_refuses_new_files(cli: Command, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that refuses new files."""

    def refuse(**_options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("onnxfuse.graph.files.tempfile.TemporaryFile", refuse)
    before = contents(place)
    message = (
        "the folder of the output file can't be written to: Permission denied\n  at:   folder\n"
        "  mend: choose a folder that you may write to"
    )
    assert_refused(cli("compress", "digits.onnx", "-o", "folder/small.onnx"), 9, message, before, place)


def test_a_full_disk(cli: Command, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk."""

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    before = contents(place)
    outcome = cli("compress", "digits.onnx", "-o", "small.onnx", "--no-prove", "--effort", QUICK)
    assert outcome.code == 9
    assert outcome.err.startswith("onnxfuse: the model can't be written: No space left on device\n  at:   ")
    assert outcome.err.endswith("\n  mend: free some space or choose another output path\n")
    assert contents(place) == before


NOTHING = "`onnxfuse inspect` lists every group with its reason; widen --scope, --only or --skip if they exclude it"


def test_nothing_left_to_compress(cli: Command, place: Path) -> None:
    """Nothing left to compress."""
    before = contents(place)
    message = (
        "nothing can be compressed as asked: it fits no pattern of --only (5 of 6 groups); "
        f"graph output 'logits' (1 of 6 groups)\n  at:   digits.onnx\n  mend: {NOTHING}"
    )
    outcome = cli("compress", "digits.onnx", "-o", "small.onnx", "--only", "/fc/Gemm")
    assert_refused(outcome, 4, message, before, place)


def test_no_network_at_all(cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network at all."""
    monkeypatch.chdir(tmp_path)
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[n, 4] x) => (float[n, 4] y) { y = Relu (x) }'
    onnx.save(onnx.parser.parse_model(text), "relu.onnx")
    before = contents(tmp_path)
    message = (
        "there is nothing to compress: no Conv, Gemm or MatMul with constant weights makes channels\n"
        "  at:   relu.onnx\n  mend: onnxfuse compresses neural networks"
    )
    assert_refused(cli("compress", "relu.onnx", "-o", "small.onnx"), 4, message, before, tmp_path)


def test_weights_that_are_fed(cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are graph inputs can't be compressed, and the message names one."""
    monkeypatch.chdir(tmp_path)
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 4] x, float[4, 3] kernel) => (float[n, 3] y) { y = MatMul (x, kernel) }"""
    onnx.save(onnx.parser.parse_model(text), "fed.onnx")
    before = contents(tmp_path)
    message = (
        "there is nothing to compress: weights such as 'kernel' are not stored but given as graph inputs\n"
        "  at:   fed.onnx\n  mend: store the weights in the model"
    )
    assert_refused(cli("compress", "fed.onnx", "-o", "small.onnx"), 4, message, before, tmp_path)


def test_long_names_do_not_flood_the_message(cli: Command, make_mlp: MakeMlp, tmp_path: Path) -> None:
    """Long names do not flood the message."""
    model = make_mlp()
    model.graph.node[1].op_type = "Abs"
    model.graph.node[1].name = "layer;" * 100
    model.graph.node[1].domain = "somebody"
    model.opset_import.add(domain="somebody", version=1)
    onnx.save(model, tmp_path / "m.onnx")
    outcome = cli("inspect", tmp_path / "m.onnx")
    assert outcome.code == 0
    with pytest.raises(OnnxFuseError) as caught:
        pipeline.compress(tmp_path / "m.onnx", calibration={"x": np.zeros((1, 8), np.float32)}, prove=False)
    assert len(caught.value.what) < 400


@pytest.mark.skipif(has_cuda(), reason="CUDA works here, so it can't be refused")
def test_cuda_without_cuda(process: Command, cli: Command, place: Path) -> None:
    """CUDA without CUDA."""
    before = contents(place)
    outcome = process("compress", "digits.onnx", "-o", "s.onnx", "--provider", "cuda", cwd=place)
    start = "onnxfuse: CUDA was asked for, but does not work here: "
    assert outcome.err.startswith(start)
    assert outcome.err.count("\n") == 3
    assert outcome.err.endswith(
        "\n  at:   --provider cuda\n"
        "  mend: install the libraries with `pip install 'onnxfuse[cuda]'` and a driver for the GPU, "
        "or use --provider cpu\n"
    )
    assert (outcome.code, outcome.out) == (6, "")
    assert cli("inspect", "digits.onnx", "--provider", "cuda") == outcome
    assert cli("validate", "digits.onnx", "digits.onnx", "--provider", "cuda") == outcome
    assert contents(place) == before


def test_a_failed_proof_writes_nothing(cli: Command, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed proof writes nothing."""

    def fail(*_arguments: object) -> None:
        what = "the output has 3 values that are not finite"
        raise ProofError(what, where="output 'logits'", mend="a lower ratio")

    monkeypatch.setattr(pipeline, "measure_drift", fail)
    (place / "small.onnx").write_bytes(b"an earlier result")
    before = contents(place)
    message = "the output has 3 values that are not finite\n  at:   output 'logits'\n  mend: a lower ratio"
    outcome = cli("compress", "digits.onnx", "-o", "small.onnx", "--effort", QUICK)
    assert_refused(outcome, 8, message, before, place)


def test_a_model_that_onnx_runtime_refuses(cli: Command, make_mlp: MakeMlp, tmp_path: Path) -> None:
    """A model that ONNX Runtime refuses."""
    model = make_mlp()
    model.graph.node[1].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "m.onnx")
    before = contents(tmp_path)
    outcome = cli("compress", tmp_path / "m.onnx", "-o", tmp_path / "s.onnx")
    assert outcome.code == 7
    assert outcome.err.startswith(f"onnxfuse: ONNX Runtime refuses the original model '{tmp_path / 'm.onnx'}': ")
    assert outcome.err.endswith(
        "\n  mend: check that it runs in ONNX Runtime as it is; onnxfuse needs that for its proof\n"
    )
    assert outcome.out == ""
    assert contents(tmp_path) == before


def test_a_node_that_is_not_as_its_operator_says(cli: Command, make_mlp: MakeMlp, tmp_path: Path) -> None:
    """A node that is not as its operator says."""
    model = make_mlp()
    model.graph.node[1].attribute.append(onnx.helper.make_attribute("unheard_of", 1))
    onnx.save(model, tmp_path / "m.onnx")
    inspected = cli("inspect", tmp_path / "m.onnx")
    assert (inspected.code, inspected.err) == (0, "")
    assert "note: shapes are inferred only, the model was not run: ONNX Runtime refuses" in inspected.out
    assert cli("compress", tmp_path / "m.onnx", "-o", tmp_path / "s.onnx").code == 7


def test_models_that_do_not_belong_together(cli: Command, make_mlp: MakeMlp, tmp_path: Path) -> None:
    """Models that do not belong together."""
    model = make_mlp()
    onnx.save(model, tmp_path / "m.onnx")
    model.graph.node[2].output[0] = model.graph.output[0].name = "other"
    onnx.save(model, tmp_path / "other.onnx")
    before = contents(tmp_path)
    message = (
        f"the outputs are called 'other', in the original 'y'\n  at:   the model '{tmp_path / 'other.onnx'}'\n"
        "  mend: compare a model with one that was made from it"
    )
    assert_refused(cli("validate", tmp_path / "m.onnx", tmp_path / "other.onnx"), 8, message, before, tmp_path)


REAL = {
    "compress half.onnx -o s.onnx": 3,
    "compress digits.onnx -o s.onnx --ratio 1.5": 2,
    "compress digits.onnx -o s.onnx --calibration half.onnx": 5,
    "compress digits.onnx -o s.onnx --report digits.onnx": 9,
}


@pytest.mark.parametrize("line", REAL)
def test_real_processes_refuse_cleanly(process: Command, place: Path, line: str) -> None:
    """Real processes refuse cleanly."""
    before = contents(place)
    outcome = process(*line.split(), cwd=place)
    assert outcome.code == REAL[line]
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert [line[:8] for line in lines] == ["onnxfuse", "  at:   ", "  mend: "]
    assert contents(place) == before


def test_exit_codes_differ_by_kind() -> None:
    """Exit codes differ by kind."""
    kinds = [getattr(errors, name) for name in errors.__all__]
    codes = {kind.__name__: kind.exit_code for kind in kinds}
    assert codes.pop("ConfigError") == codes.pop("RegistryError") == 2
    assert len(set(codes.values())) == len(codes)
    assert 0 not in codes.values()


def test_errors_say_only_what_they_know() -> None:
    """Errors say only what they know."""
    assert str(OnnxFuseError("a", where="b", mend="c")) == "a\n  at:   b\n  mend: c"
    assert str(OnnxFuseError("a", mend="c")) == "a\n  mend: c"
    assert str(OnnxFuseError("a")) == "a"


def test_disk_is_clean_after_a_refused_model_object(make_mlp: MakeMlp, tmp_path: Path) -> None:
    """Disk is clean after a refused model object."""
    with pytest.raises(errors.UnsupportedGraphError):
        pipeline.compress(make_mlp(), tmp_path / "s.onnx", skip=("*",))
    assert list(tmp_path.iterdir()) == []
