"""Running models: on the provider that was asked for and no other, with errors in plain words."""

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import onnxfuse
from onnxfuse.config import Provider
from onnxfuse.errors import OutputError, ProviderError, RuntimeFailedError
from onnxfuse.proof import runtime
from onnxfuse.proof.runtime import Session, cuda_obstacle, has_cuda, runtime_version
from tests.conftest import Command, MakeMlp

CUDA_MEND = "install the libraries with `pip install 'onnxfuse[cuda]'` and a driver for the GPU, or use --provider cpu"


# What ONNX Runtime says where there is a driver and no GPU.
NO_DEVICE = (
    "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:154 std::conditional_t<THRW, void, Status> "
    "onnxruntime::CudaCall(ERRTYPE, const char*) CUDA failure 100: no CUDA-capable device is detected ; GPU=-1 ; "
    "hostname=vm ; line=355 ; expr=cudaSetDevice(info_.device_id); \n"
)
TOO_OLD = "CUDA failure 209: no kernel image is available for execution on the device ; GPU=0 ; hostname=vm"


class FakeSession:
    """A session of ONNX Runtime that says where it landed."""

    def __init__(self, _source: object, _options: object, providers: list[str], **_words: int) -> None:
        """Note what was asked for."""
        self.providers = providers

    def get_providers(self) -> list[str]:
        """Say that CUDA is not among them, whatever was asked for."""
        return [name for name in self.providers if "CUDA" not in name]

    def get_outputs(self) -> list[object]:
        """There are none."""
        return []


class OldGpu(FakeSession):
    """A session that is made on CUDA without a complaint, and can't run there."""

    def get_providers(self) -> list[str]:
        """Say what was asked for."""
        return self.providers

    def run(self, _names: object, _feeds: object) -> list[object]:
        """Fail on CUDA."""
        if any("CUDA" in name for name in self.providers):
            raise RuntimeError(TOO_OLD)
        return []


def refuse_cuda(_source: object, _options: object, providers: list[str], **_words: int) -> FakeSession:
    """Fail as ONNX Runtime does where a library is missing, but not on the CPU."""
    if any("CUDA" in name for name in providers):
        message = "libcublasLt.so.12: cannot open shared object file\nmore lines"
        raise RuntimeError(message)
    return FakeSession(_source, _options, providers)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Let every test find out anew what this machine can do, and leave nothing of what it made up."""
    cuda_obstacle.cache_clear()
    yield
    cuda_obstacle.cache_clear()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let it look as if nothing stood in the way of CUDA."""
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr("ctypes.CDLL", lambda _name: None)
    monkeypatch.setattr("onnxruntime.preload_dlls", lambda: None)


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let it look as if CUDA had been tried, and worked."""
    monkeypatch.setattr(runtime, "cuda_obstacle", lambda: "")


def test_the_cpu_is_always_there(make_mlp: MakeMlp) -> None:
    """The CPU is always there."""
    session = Session(make_mlp(), Provider.CPU)
    assert session.provider is Provider.CPU
    assert session.providers == ("CPUExecutionProvider",)
    assert session.output_names == ("y",)
    result = session.run({"x": np.ones((2, 8), np.float32)})
    assert result["y"].shape == (2, 4)


def test_auto_is_cuda_or_the_cpu(make_mlp: MakeMlp) -> None:
    """Auto is CUDA or the CPU."""
    assert Session(make_mlp(), Provider.AUTO).provider is (Provider.CUDA if has_cuda() else Provider.CPU)


def test_a_path_and_a_model_give_the_same(make_mlp: MakeMlp, tmp_path: Path) -> None:
    """A path and a model give the same."""
    onnx.save(make_mlp(), tmp_path / "m.onnx")
    feeds = {"x": np.arange(16, dtype=np.float32).reshape(2, 8)}
    first, second = (Session(m, Provider.CPU).run(feeds)["y"] for m in (make_mlp(), tmp_path / "m.onnx"))
    assert np.array_equal(first, second)


def test_a_model_over_the_limit_goes_through_a_file(make_mlp: MakeMlp, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model over the limit goes through a file, if there is room for one or a message can't hold it."""
    monkeypatch.setattr(runtime, "_LARGE", 10)
    feeds = {"x": np.ones((2, 8), np.float32)}
    wanted = Session(make_mlp(), Provider.CPU).run(feeds)["y"]
    assert wanted.shape == (2, 4)

    def full(*_: Any, **__: Any) -> int:
        what = "the disk is full"
        raise OutputError(what)

    monkeypatch.setattr(runtime, "write_model", full)
    assert np.array_equal(Session(make_mlp(), Provider.CPU).run(feeds)["y"], wanted)
    monkeypatch.setattr(runtime, "_LARGEST_MESSAGE", 10)
    with pytest.raises(OutputError):
        Session(make_mlp(), Provider.CPU)


def test_intermediate_values_survive_only_without_optimisation(make_mlp: MakeMlp) -> None:
    """Intermediate values survive only without optimisation."""
    model = make_mlp()
    model.graph.output.append(onnx.ValueInfoProto(name="r"))
    assert Session(model, Provider.CPU, optimise=False).output_names == ("y", "r")


def test_a_model_that_is_refused() -> None:
    """A model that is refused."""
    with pytest.raises(RuntimeFailedError) as caught:
        Session(onnx.ModelProto(), Provider.CPU, name="the model 'odd.onnx'")
    first, mend = str(caught.value).split("\n")
    assert first.startswith("ONNX Runtime refuses the model 'odd.onnx': ")
    assert mend == "  mend: check that it runs in ONNX Runtime as it is; onnxfuse needs that for its proof"


def test_inputs_that_do_not_fit(make_mlp: MakeMlp) -> None:
    """Inputs that do not fit."""
    session = Session(make_mlp(), Provider.CPU, name="the model 'a.onnx'")
    with pytest.raises(RuntimeFailedError) as caught:
        session.run({"x": np.ones((2, 9), np.float32)})
    assert caught.value.what.startswith("ONNX Runtime can't run the model 'a.onnx': ")
    assert "\n" not in caught.value.what
    assert caught.value.mend == "check that the inputs have the shapes and values that the model expects"


def test_nothing_is_printed_by_a_failure(make_mlp: MakeMlp, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is printed by a failure."""
    session = Session(make_mlp(), Provider.AUTO)
    with pytest.raises(RuntimeFailedError):
        session.run({"x": np.ones((2, 9), np.float32)})
    with pytest.raises(RuntimeFailedError):
        Session(onnx.ModelProto(), Provider.AUTO)
    assert capfd.readouterr() == ("", "")


def without_cuda(monkeypatch: pytest.MonkeyPatch) -> str:
    """Without CUDA."""
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    return "this build of ONNX Runtime has no CUDA"


def without_driver(monkeypatch: pytest.MonkeyPatch) -> str:
    """Without driver."""

    def missing(name: str) -> None:
        assert name == ("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        message = "no such library"
        raise OSError(message)

    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr("ctypes.CDLL", missing)
    return "there is no NVIDIA driver"


@pytest.mark.parametrize("lacking", [without_cuda, without_driver])
def test_what_is_lacking_for_cuda_is_said(
    make_mlp: MakeMlp, monkeypatch: pytest.MonkeyPatch, lacking: Callable[[pytest.MonkeyPatch], str]
) -> None:
    """What is lacking for CUDA is said."""
    why = lacking(monkeypatch)
    with pytest.raises(ProviderError) as caught:
        Session(make_mlp(), Provider.CUDA)
    assert str(caught.value) == (
        f"CUDA was asked for, but does not work here: {why}\n  at:   --provider cuda\n  mend: {CUDA_MEND}"
    )
    assert Session(make_mlp(), Provider.AUTO).provider is Provider.CPU
    assert not has_cuda()


@pytest.mark.usefixtures("driver")
def test_a_silent_fall_back_is_noticed(make_mlp: MakeMlp, monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent fall back is noticed."""
    monkeypatch.setattr("onnxruntime.InferenceSession", FakeSession)
    with pytest.raises(ProviderError, match="does not work here: ONNX Runtime fell back to the CPU, as") as caught:
        Session(make_mlp(), Provider.CUDA)
    assert caught.value.mend == CUDA_MEND
    assert Session(make_mlp(), Provider.AUTO).provider is Provider.CPU
    assert not has_cuda()


@pytest.mark.usefixtures("driver")
def test_a_refusal_of_cuda_is_passed_on(make_mlp: MakeMlp, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal of CUDA is passed on."""
    monkeypatch.setattr("onnxruntime.InferenceSession", refuse_cuda)
    with pytest.raises(ProviderError) as caught:
        Session(make_mlp(), Provider.CUDA)
    assert caught.value.what == (
        "CUDA was asked for, but does not work here: libcublasLt.so.12: cannot open shared object file"
    )
    assert Session(make_mlp(), Provider.AUTO).provider is Provider.CPU


@pytest.mark.usefixtures("driver")
def test_a_gpu_without_kernels_is_no_cuda(make_mlp: MakeMlp, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is too old gets a session and fails when it runs: that is found out before anything depends on it."""
    monkeypatch.setattr("onnxruntime.InferenceSession", OldGpu)
    with pytest.raises(ProviderError) as caught:
        Session(make_mlp(), Provider.CUDA)
    assert caught.value.what == (
        "CUDA was asked for, but does not work here: "
        "CUDA failure 209: no kernel image is available for execution on the device"
    )
    assert Session(make_mlp(), Provider.AUTO).provider is Provider.CPU


@pytest.mark.usefixtures("driver")
def test_a_refusal_is_not_printed_by_the_runtime(
    make_mlp: MakeMlp, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime's own second try prints to standard output, where only results go, and hides the reason."""
    original = vars(onnxruntime.InferenceSession)["_create_inference_session"]

    def create(self: Any, providers: list[str], *others: object) -> None:
        vars(self)["_fallback_providers"] = ["CPUExecutionProvider"]
        if "CUDAExecutionProvider" in providers:
            raise RuntimeError(NO_DEVICE)
        original(self, providers, *others)

    monkeypatch.setattr("onnxruntime.InferenceSession._create_inference_session", create)
    assert Session(make_mlp(), Provider.AUTO).provider is Provider.CPU
    with pytest.raises(ProviderError) as caught:
        Session(make_mlp(), Provider.CUDA)
    assert caught.value.what == (
        "CUDA was asked for, but does not work here: CUDA failure 100: no CUDA-capable device is detected"
    )
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("works")
def test_a_model_that_is_at_fault_itself_is_not_put_down_to_cuda() -> None:
    """What the CPU refuses as well says nothing of CUDA."""
    with pytest.raises(RuntimeFailedError, match="ONNX Runtime refuses the model"):
        Session(onnx.ModelProto(), Provider.CUDA)


@pytest.mark.usefixtures("works")
def test_a_run_that_fails_on_cuda_does_not_go_on_elsewhere(
    make_mlp: MakeMlp, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A session stays where it was made: one that moved on to the CPU in the middle of a run would not say so."""

    class Failing:
        """What the session is inside: it fails as CUDA does where it is at fault."""

        def is_webgpu_graph_capture_enabled(self) -> bool:
            return False

        def run(self, *_arguments: object) -> None:
            raise import_module("onnxruntime.capi.onnxruntime_pybind11_state").EPFail(TOO_OLD)

    monkeypatch.setattr("onnxruntime.InferenceSession.get_providers", lambda _self: ["CUDAExecutionProvider"])
    session = Session(make_mlp(), Provider.AUTO)
    monkeypatch.setattr(vars(session)["_session"], "_sess", Failing())
    with pytest.raises(RuntimeFailedError) as caught:
        session.run({"x": np.ones((2, 8), np.float32)})
    assert "CUDA failure 209: no kernel image" in caught.value.what
    assert caught.value.mend.endswith(", or use --provider cpu")
    assert capfd.readouterr() == ("", "")


def test_the_version_is_that_of_the_report(make_mlp: MakeMlp) -> None:
    """The version is that of the report."""
    versions = onnxfuse.inspect(make_mlp(), prove=False).versions
    assert runtime_version() in {versions.get("onnxruntime"), versions.get("onnxruntime-gpu")}


# With CUDA -----------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_cuda_is_used_when_asked_for(make_mlp: MakeMlp) -> None:
    """CUDA is used when asked for."""
    session = Session(make_mlp(), Provider.CUDA)
    assert session.provider is Provider.CUDA
    assert session.providers[0] == "CUDAExecutionProvider"


@pytest.mark.cuda
def test_cuda_and_the_cpu_agree(digits: Path, models: Path) -> None:
    """The same two models are as far apart on CUDA as on the CPU, but for rounding, TF32 included."""
    small = onnxfuse.compress(digits, provider="cuda", effort=0).model
    data = models / "digits_test.npz"
    cpu, cuda = (onnxfuse.validate(digits, small, data=data, provider=p) for p in ("cpu", "cuda"))
    assert (cpu.provider, cuda.provider) == ("cpu", "cuda")
    y, z = cpu.drift.outputs[0], cuda.drift.outputs[0]
    assert z.mean_abs == pytest.approx(y.mean_abs, rel=1e-2)
    assert z.cosine == pytest.approx(y.cosine, abs=1e-3)


@pytest.mark.cuda
def test_compress_and_validate_on_cuda(process: Command, digits: Path, models: Path) -> None:
    """Compress and validate on CUDA."""
    small = digits.with_name("small.onnx")
    compressed = process("compress", digits, "-o", small, "--provider", "cuda")
    assert (compressed.code, compressed.err) == (0, "")
    assert "run on cuda" in compressed.out
    words = ["validate", digits, small, "--data", models / "digits_test.npz", "--provider", "cuda"]
    validated = process(*words)
    assert (validated.code, validated.err) == (0, "")
    assert "original 99.78 %" in validated.out
