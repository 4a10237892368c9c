"""Real networks: each one is inspected, and is either compressed with a proof or refused in three plain lines."""

from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxfuse
from onnxfuse import OnnxFuseError
from onnxfuse.fusion.candidates import CANDIDATES
from onnxfuse.proof.samples import read_arrays
from tests.conftest import names_in

# These take longer than all the others together; the smaller ones of their kind stand for them.
SLOW = {
    "SINet_portrait": "large feature maps and few weights",
    "fns-candy": "large feature maps and few weights",
    "squeezenet_tensor_input": "many groups behind one output that saturates",
}
LARGEST = 3_000_000


def skip_reason(model: Path) -> str:
    """Return why a network is left out; empty if it is not."""
    if model.stat().st_size > LARGEST:
        return f"it is over {LARGEST / 1e6:.0f} MB, and would take long"
    return SLOW.get(model.stem, "")


def assert_explains(error: OnnxFuseError) -> None:
    """Assert that an error says what, where and the mend, each in a line, and is not called a defect."""
    lines = str(error).split("\n")
    assert [line[:8] for line in lines[1:]] == ["  at:   ", "  mend: "]
    assert error.what
    assert len(error.what) < 1000
    assert error.exit_code != 70


@pytest.mark.parametrize(
    "error", [OnnxFuseError("what", where="there"), OnnxFuseError("what", mend="this"), OnnxFuseError("what")]
)
def test_the_check_of_explanations_can_fail(error: OnnxFuseError) -> None:
    """The check of explanations can fail."""
    with pytest.raises(AssertionError):
        assert_explains(error)


def test_a_real_network(zoo_model: Path, tmp_path: Path) -> None:
    """A real network."""
    if reason := skip_reason(zoo_model):
        pytest.skip(f"{zoo_model.stem}: {reason}")
    found = onnxfuse.inspect(zoo_model, prove=False)
    assert found.cost.bytes >= zoo_model.stat().st_size
    assert 0 <= found.compressible_share <= 1
    output = tmp_path / "small.onnx"
    try:
        report = onnxfuse.compress(zoo_model, output, ratio=0.3, method="intra-fusion").report
    except OnnxFuseError as error:
        assert_explains(error)
        assert names_in(tmp_path) == []
        return
    assert names_in(tmp_path) == ["small.onnx"]
    assert report.after.parameters < report.before.parameters
    assert report.after.bytes == output.stat().st_size
    assert not [note for note in report.notes if "defect" in note]
    assert [o.name for o in onnx.load(output).graph.output] == [o.name for o in onnx.load(zoo_model).graph.output]


@pytest.mark.parametrize("name", ["cifar10_resnet20_folded", "tiny_vww_96", "stories260K_dynamo18", "yunet_n_dynamic"])
def test_a_budget_is_hit_on_a_real_network(zoo: Path, name: str) -> None:
    """A budget is hit within 1 % without data; half of the accuracy is no target here, only that all goes well."""
    model = zoo / "models" / f"{name}.onnx"
    if not model.is_file():
        pytest.skip(f"there is no {model}")
    report = onnxfuse.compress(model, target="macs=0.7", effort=0.1, provider="cpu").report
    assert report.after.macs / report.before.macs == pytest.approx(0.7, abs=0.01)
    methods = {g.method for g in report.groups if g.channels_after < g.channels_before}
    assert methods <= {"least-damage", *CANDIDATES}


def test_accuracy_agrees_with_what_is_known(zoo: Path) -> None:
    """Accuracy agrees with what is known."""
    model, data = zoo / "models" / "cifar10_resnet20_folded.onnx", zoo / "data" / "cifar10_test.npz"
    if not (model.is_file() and data.is_file()):
        pytest.skip(f"there is no {model} or no {data}")
    arrays = read_arrays(data)
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    images = ((arrays["images"] / 255 - mean) / deviation).transpose(0, 3, 1, 2).astype(np.float32)
    name = onnx.load(model).graph.input[0].name
    report = onnxfuse.validate(model, model, data={name: images, "labels": arrays["labels"]}, provider="cpu")
    assert report.accuracy is not None
    assert report.accuracy["original"] == 464 / 509
    assert report.accuracy["compressed"] == report.accuracy["original"]
