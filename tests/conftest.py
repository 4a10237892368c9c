"""Fixtures that every test may use: models in a folder of their own, the command line, and the zoo of real networks."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import pytest
from hypothesis import settings
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from threadpoolctl import threadpool_limits

from onnxfuse.cli import main
from onnxfuse.proof.runtime import cuda_obstacle

# How long an example takes says nothing on a machine that other work is running on too.
settings.register_profile("onnxfuse", deadline=None)
settings.load_profile("onnxfuse")

# A process that takes so many seconds hangs; how long one takes on a busy machine says nothing.
HANGS = 900
# An effort with which a compression goes all its way, with few steps: for tests of anything but how well it fits.
QUICK = 0.02
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Outcome:
    """What a run of the command line gave.

    Attributes:
        code: Its exit code.
        out: Standard output.
        err: Standard error.
    """

    code: int
    out: str
    err: str


AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Command: TypeAlias = Callable[..., Outcome]
MakeMlp: TypeAlias = Callable[..., onnx.ModelProto]


def logits_of(path: Path, images: AnyArray) -> AnyArray:
    """Run a classifier in ONNX's own evaluator, so that no part of onnxfuse takes part."""
    outputs = ReferenceEvaluator(onnx.load(path)).run(None, {"image": images})
    assert isinstance(outputs, list)
    return np.asarray(outputs[0])


def names_in(folder: Path) -> list[str]:
    """Return the sorted names of what is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def zoo_folder() -> Path:
    """Return the folder with real networks; it need not be there."""
    return Path(os.environ.get("ONNXFUSE_ZOO") or _ROOT.parent / "shared").resolve()


@pytest.fixture(scope="session", autouse=True)
def _threads_do_not_wait_for_each_other() -> Iterator[None]:
    """Give linear algebra one thread where several workers share the cores; waiting took a fifth of the time."""
    with threadpool_limits(limits=1) if "PYTEST_XDIST_WORKER" in os.environ else nullcontext():
        yield


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Skip tests marked ``cuda`` where CUDA does not work, and say why."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    obstacle = cuda_obstacle() if marked else ""
    for item in marked if obstacle else ():
        item.add_marker(pytest.mark.skip(reason=f"needs CUDA, which does not work here: {obstacle}"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test of every network in the zoo, or one that is skipped where there is no zoo."""
    if "zoo_model" in metafunc.fixturenames:
        files = sorted((zoo_folder() / "models").glob("*.onnx"))
        missing = pytest.mark.skip(reason=f"there are no networks in {zoo_folder() / 'models'} (see ONNXFUSE_ZOO)")
        cases = [pytest.param(file, id=file.stem) for file in files] or [pytest.param(None, marks=missing)]
        metafunc.parametrize("zoo_model", cases)


@pytest.fixture(scope="session")
def zoo() -> Path:
    """The folder with real networks and data."""
    folder = zoo_folder()
    if not (folder / "models").is_dir():
        pytest.skip(f"there is no folder {folder / 'models'} (see ONNXFUSE_ZOO)")
    return folder


@pytest.fixture
def models() -> Path:
    """The folder of the example networks; tests must not write there."""
    return _ROOT / "models"


@pytest.fixture
def digits(models: Path, tmp_path: Path) -> Path:
    """A copy of the example network, in a folder without anything else."""
    folder = tmp_path / "work"
    folder.mkdir()
    return Path(shutil.copy(models / "digits_bn.onnx", folder / "digits.onnx"))


@pytest.fixture
def make_mlp() -> MakeMlp:
    """Make a perceptron x (n, 8) -> MatMul 6 -> Relu -> MatMul 4 -> y, with weights ``a`` and ``b``."""

    def make(
        dtype: int = TensorProto.FLOAT, *, batch: int | str = "n", names: Sequence[str] = ("first", "second")
    ) -> onnx.ModelProto:
        rng = np.random.default_rng(0)
        kind = helper.tensor_dtype_to_np_dtype(dtype)
        weights = {"a": rng.normal(size=(8, 6)).astype(kind), "b": rng.normal(size=(6, 4)).astype(kind)}
        nodes = [
            helper.make_node("MatMul", ["x", "a"], ["h"], name=names[0]),
            helper.make_node("Relu", ["h"], ["r"], name="relu"),
            helper.make_node("MatMul", ["r", "b"], ["y"], name=names[1]),
        ]
        x = helper.make_tensor_value_info("x", dtype, [batch, 8])
        y = helper.make_tensor_value_info("y", dtype, [batch, 4])
        stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
        graph = helper.make_graph(nodes, "mlp", [x], [y], stored)
        return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])

    return make


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Command:
    """Run the command line inside this process; both streams are read below Python, where libraries write too."""

    def run(*words: object) -> Outcome:
        capfd.readouterr()
        code = main([str(word) for word in words])
        streams = capfd.readouterr()
        return Outcome(code, streams.out, streams.err)

    return run


@pytest.fixture
def process(tmp_path: Path) -> Command:
    """Run the command line as a user does, in a process of its own whose streams are pipes."""

    def run(*words: object, cwd: Path | None = None) -> Outcome:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("COLUMNS", "FORCE_COLOR", "TTY_"))}
        done = subprocess.run(
            [sys.executable, "-m", "onnxfuse", *map(str, words)],
            cwd=cwd or tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=HANGS,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run
