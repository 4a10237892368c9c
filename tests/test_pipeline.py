"""The Python API: models and arrays in, results out, nothing of the user's changed."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxfuse
from onnxfuse import CompressionConfig, FusionOptions, pipeline, stages
from onnxfuse.errors import (
    ConfigError,
    DataError,
    OutputError,
    ProofError,
    UnsupportedGraphError,
)
from onnxfuse.proof.drift import measure_drift
from tests.conftest import QUICK, AnyArray, MakeMlp, logits_of, names_in


def sizes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Return the shapes of the weights."""
    return {t.name: list(t.dims) for t in model.graph.initializer}


def test_a_model_object_is_not_changed(make_mlp: MakeMlp) -> None:
    """A model object is not changed."""
    model = make_mlp()
    before = model.SerializeToString(deterministic=True)
    result = onnxfuse.compress(model, ratio=0.5)
    assert model.SerializeToString(deterministic=True) == before
    assert result.model is not model
    assert sizes(result.model) == {"a": [8, 3], "b": [3, 4]}
    onnxfuse.inspect(model)
    onnxfuse.validate(model, result.model)
    assert model.SerializeToString(deterministic=True) == before


def test_nothing_is_written_without_an_output(
    make_mlp: MakeMlp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written without an output."""
    monkeypatch.chdir(tmp_path)
    result = onnxfuse.compress(make_mlp())
    assert names_in(tmp_path) == []
    assert result.report.output == ""
    assert result.report.model == "the model object"
    assert result.report.sha256 == ""


def test_save_writes_the_proven_model(make_mlp: MakeMlp, tmp_path: Path) -> None:
    """Save writes the proven model."""
    result = onnxfuse.compress(make_mlp(), tmp_path / "first.onnx")
    assert result.save(tmp_path / "second.onnx") == tmp_path / "second.onnx"
    assert result.save(str(tmp_path / "second.onnx")) == tmp_path / "second.onnx"
    first, second = ((tmp_path / name).read_bytes() for name in ("first.onnx", "second.onnx"))
    assert first == second == result.model.SerializeToString()
    with pytest.raises(OutputError, match="the folder of the output file does not exist"):
        result.save(tmp_path / "no" / "third.onnx")


def test_paths_may_be_strings(digits: Path) -> None:
    """Paths may be strings."""
    output = str(digits.with_name("small.onnx"))
    result = onnxfuse.compress(str(digits), output, effort=QUICK, prove=False)
    assert result.report.output == output
    assert Path(output).is_file()


def test_the_written_file_computes_what_the_report_says(digits: Path, models: Path) -> None:
    """The written file computes what the report says."""
    images = np.load(models / "digits_calibration.npz")["image"]
    output = digits.with_name("small.onnx")
    report = onnxfuse.compress(digits, output, calibration={"image": images}, effort=QUICK, provider="cpu").report
    y, z = (logits_of(p, images) for p in (digits, output))
    found = report.drift.outputs[0]
    assert found.max_abs == pytest.approx(np.abs(y - z).max(), rel=1e-3)
    assert found.mean_abs == pytest.approx(np.abs(y - z).mean(), rel=1e-3)
    assert found.top1_agreement == pytest.approx(np.mean(y.argmax(1) == z.argmax(1)), abs=0.005)
    assert report.drift.data == "256 samples from the arrays given"


def test_arrays_and_files_are_the_same_data(digits: Path, models: Path) -> None:
    """Arrays and files are the same data."""
    path = models / "digits_calibration.npz"
    arrays = {"image": np.load(path)["image"]}
    first, second = (onnxfuse.compress(digits, calibration=data, effort=QUICK, prove=False) for data in (path, arrays))
    assert first.model.SerializeToString() == second.model.SerializeToString()
    assert first.report.drift.outputs == second.report.drift.outputs


def test_validation_takes_arrays_with_labels(digits: Path, models: Path) -> None:
    """Validation takes arrays with labels."""
    arrays = dict(np.load(models / "digits_test.npz"))
    report = onnxfuse.validate(digits, models / "digits_folded.onnx", data=arrays)
    assert report.accuracy == pytest.approx({"original": 0.9978, "compressed": 0.9978}, abs=1e-4)
    assert report.drift.data == "450 samples from the arrays given"
    assert "labels" in arrays


def test_labels_need_scores(make_mlp: MakeMlp) -> None:
    """Labels need scores."""
    model = make_mlp()
    model.graph.node[2].op_type = "Max"
    del model.graph.node[2].input[1]
    del model.graph.initializer[1]
    onnx.checker.check_model(model)
    data: dict[str, AnyArray] = {"x": np.ones((4, 8), np.float32), "labels": np.zeros(4, np.int64)}
    assert onnxfuse.validate(model, model, data=data).accuracy is not None
    reduced = make_mlp()
    reduced.graph.node[2].op_type = "ReduceSum"
    del reduced.graph.node[2].input[1]
    del reduced.graph.initializer[1]
    del reduced.graph.output[0].type.tensor_type.shape.dim[:]
    reduced.graph.node[2].attribute.append(onnx.helper.make_attribute("keepdims", 0))
    with pytest.raises(DataError, match="which is not one row of scores for each sample") as caught:
        onnxfuse.validate(reduced, reduced, data=data)
    assert (caught.value.where, caught.value.mend) == ("y", "leave the labels out of the data")


def test_a_config_and_options_say_the_same(make_mlp: MakeMlp) -> None:
    """A config and options say the same."""
    config = CompressionConfig(ratio=0.5, method="prune", fusion=FusionOptions(importance="l2"))
    first = onnxfuse.compress(make_mlp(), config=config)
    second = onnxfuse.compress(make_mlp(), ratio=0.5, method="prune", importance="l2")
    assert first.model.SerializeToString() == second.model.SerializeToString()
    assert first.report.config == second.report.config


def test_a_config_and_options_together_are_refused(make_mlp: MakeMlp) -> None:
    """A config and options together are refused."""
    with pytest.raises(ConfigError) as caught:
        onnxfuse.compress(make_mlp(), config=CompressionConfig(), ratio=0.5, seed=1)
    assert str(caught.value) == (
        "options were given beside a config\n  at:   ratio, seed\n  mend: put everything into the config, or nothing"
    )


@pytest.mark.parametrize("call", ["inspect", "compress", "validate"])
def test_an_unknown_provider_is_a_config_error(make_mlp: MakeMlp, call: str) -> None:
    """An unknown provider is a config error."""
    models = [make_mlp()] * (2 if call == "validate" else 1)
    with pytest.raises(ConfigError) as caught:
        getattr(onnxfuse, call)(*models, provider="tpu")
    assert str(caught.value) == "there is no provider called 'tpu'\n  at:   --provider\n  mend: known: auto, cpu, cuda"


def test_progress_is_told_of_every_stage(make_mlp: MakeMlp) -> None:
    """Progress is told of every stage."""
    calls: list[tuple[str, int, int]] = []

    def note(stage: str, done: int, total: int) -> None:
        calls.append((stage, done, total))

    report = onnxfuse.compress(make_mlp(), progress=note).report
    assert list(dict.fromkeys(stage for stage, _, _ in calls)) == list(report.seconds)
    assert all(0 <= done <= total for _, done, total in calls)
    assert calls[-1] == ("prove", 1, 1)


def test_an_existing_output_is_replaced_only_after_the_proof(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An existing output is replaced only after the proof."""
    output = digits.with_name("small.onnx")
    output.write_bytes(b"old")

    def watched(*arguments: Any) -> Any:
        assert output.read_bytes() == b"old"
        return measure_drift(*arguments)

    monkeypatch.setattr(pipeline, "measure_drift", watched)
    result = onnxfuse.compress(digits, output, effort=QUICK, prove=False)
    assert output.read_bytes() == result.model.SerializeToString()


@pytest.mark.parametrize("kind", [ProofError("no"), KeyboardInterrupt(), MemoryError()])
def test_failure_during_the_proof_leaves_nothing(
    digits: Path, monkeypatch: pytest.MonkeyPatch, kind: BaseException
) -> None:
    """Failure during the proof leaves nothing."""

    def fail(*_arguments: object) -> None:
        raise kind

    monkeypatch.setattr(pipeline, "measure_drift", fail)
    with pytest.raises(type(kind)):
        onnxfuse.compress(digits, digits.with_name("small.onnx"), effort=QUICK, prove=False)
    assert names_in(digits.parent) == ["digits.onnx"]


def test_a_result_that_the_checker_rejects_is_not_written(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that the checker rejects is not written."""

    def broken(graph: Any, _edits: object, _dims: object) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(graph.model)
        relu = next(node for node in model.graph.node if node.op_type == "Relu")
        relu.attribute.append(onnx.helper.make_attribute("unheard_of", 1))
        return model

    monkeypatch.setattr(stages, "apply_edits", broken)
    with pytest.raises(ProofError, match="ONNX's checker rejects the compressed model: ") as caught:
        onnxfuse.compress(digits, digits.with_name("small.onnx"), method="prune", prove=False)
    assert caught.value.mend == "this is a defect of onnxfuse; please report it with the model"
    assert names_in(digits.parent) == ["digits.onnx"]


def test_an_output_through_another_name_of_the_input_is_refused(digits: Path) -> None:
    """An output through another name of the input is refused."""
    before = digits.read_bytes()
    os.link(digits, digits.with_name("other.onnx"))
    with pytest.raises(OutputError, match="the output is the input file"):
        onnxfuse.compress(digits, digits.with_name("other.onnx"))
    assert digits.read_bytes() == before


def test_no_outputs_to_compare_is_no_obstacle(make_mlp: MakeMlp) -> None:
    """No outputs to compare is no obstacle."""
    model = make_mlp()
    model.graph.node.append(onnx.helper.make_node("SequenceConstruct", ["y"], ["s"]))
    kind = onnx.helper.make_sequence_type_proto(onnx.helper.make_tensor_type_proto(1, ["n", 4]))
    model.graph.output[0].CopyFrom(onnx.helper.make_value_info("s", kind))
    result = onnxfuse.compress(model, ratio=0.5)
    assert result.report.drift.outputs == ()
    assert result.report.after.parameters < result.report.before.parameters


def test_a_scalar_input_is_fed_as_a_scalar(make_mlp: MakeMlp) -> None:
    """A scalar input is fed as a scalar."""
    model = make_mlp()
    model.graph.input.append(onnx.helper.make_tensor_value_info("factor", 1, []))
    model.graph.node[1].op_type = "Mul"
    model.graph.node[1].input.append("factor")
    assert sizes(onnxfuse.compress(model, ratio=0.5).model) == {"a": [8, 3], "b": [3, 4]}
    data = {"x": np.ones((3, 8), np.float32), "factor": np.array([0, 1, 2], np.float32)}
    report = onnxfuse.compress(model, ratio=0.5, calibration=data).report
    assert report.drift.samples == 3


def test_a_fixed_batch_is_kept(make_mlp: MakeMlp) -> None:
    """A fixed batch is kept."""
    data = {"x": np.ones((12, 8), np.float32)}
    report = onnxfuse.compress(make_mlp(batch=4), ratio=0.5, calibration=data).report
    assert report.drift.samples == 12
    assert onnxfuse.compress(make_mlp(batch=4), ratio=0.5).report.drift.samples >= 4


@pytest.mark.parametrize("weight", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_frozen(make_mlp: MakeMlp, weight: float) -> None:
    """Weights that are not finite are frozen."""
    model = make_mlp()
    broken = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    broken[2, 3] = weight
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(broken, "a"))
    reason = "weight 'a' has values that are NaN or infinite"
    assert [group.frozen for group in onnxfuse.inspect(model).groups] == [reason, "graph output 'y'"]
    with pytest.raises(UnsupportedGraphError, match=reason):
        onnxfuse.compress(model, ratio=0.5)


def test_one_channel_can_not_become_fewer(make_mlp: MakeMlp) -> None:
    """One channel cannot become fewer."""
    model = make_mlp()
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        cut = array[:, :1] if tensor.name == "a" else array[:1]
        tensor.CopyFrom(onnx.numpy_helper.from_array(cut.copy(), tensor.name))
    with pytest.raises(UnsupportedGraphError) as caught:
        onnxfuse.compress(model)
    assert caught.value.what == (
        "nothing can be compressed as asked: it has one channel (1 of 2 groups); graph output 'y' (1 of 2 groups)"
    )
