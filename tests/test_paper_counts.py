"""The sizes of the paper's networks before and after are the paper's (its table 9, and counts by its released code)."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import onnx
import pytest

import onnxfuse
from tests.networks import INPUT_NAME, resnet18, vgg11

RESNET18_PARAMETERS = 11_178_762
VGG11_PARAMETERS = 9_231_114
Builder: TypeAlias = Callable[[], onnx.ModelProto]

AFTER: dict[Builder, dict[float, int]] = {
    resnet18: {0.4: 4_012_288, 0.5: 2_800_010, 0.6: 1_778_572, 0.7: 998_702, 0.8: 445_168},
    vgg11: {0.4: 3_317_837, 0.5: 2_311_562, 0.6: 1_468_846, 0.7: 825_685, 0.8: 368_305},
}
BEFORE: dict[Builder, int] = {resnet18: RESNET18_PARAMETERS, vgg11: VGG11_PARAMETERS}
CASES = [(build, ratio) for build, counts in AFTER.items() for ratio in counts]


def size_after(model: onnx.ModelProto, ratio: float, method: str) -> tuple[int, int]:
    """Compress all groups and return the numbers of parameters before and after."""
    # One sample of the proof's own kind: it is not the drift that is looked at here.
    image = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    result = onnxfuse.compress(model, ratio=ratio, method=method, provider="cpu", calibration={INPUT_NAME: image})
    report = result.report
    return report.before.parameters, report.after.parameters


@pytest.fixture(scope="module")
def models() -> dict[Builder, onnx.ModelProto]:
    """Build each network once."""
    return {build: build() for build in AFTER}


@pytest.mark.parametrize(("build", "ratio"), CASES, ids=[f"{build.__name__}-{ratio}" for build, ratio in CASES])
def test_pruned_size_is_the_papers(models: dict[Builder, onnx.ModelProto], build: Builder, ratio: float) -> None:
    """Dropping channels leaves as many parameters as the paper says."""
    assert size_after(models[build], ratio, "prune") == (BEFORE[build], AFTER[build][ratio])


def test_fused_size_is_the_pruned_size(models: dict[Builder, onnx.ModelProto]) -> None:
    """So does fusing them."""
    assert size_after(models[vgg11], 0.5, "intra-fusion") == (VGG11_PARAMETERS, AFTER[vgg11][0.5])


@pytest.mark.parametrize(("build", "groups"), [(resnet18, 12), (vgg11, 8)], ids=["resnet18", "vgg11"])
def test_the_paper_counts_as_many_groups(models: dict[Builder, onnx.ModelProto], build: Builder, groups: int) -> None:
    """The paper numbers its groups so; the classifier's outputs are one more, which is frozen."""
    found = onnxfuse.inspect(models[build]).groups
    assert sum(group.frozen is None for group in found) == groups
    assert sum(group.frozen is not None for group in found) == 1
