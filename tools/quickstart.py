#!/usr/bin/env python3
"""Compress the example network and measure what is left of its accuracy: ``python3 tools/quickstart.py``.

Needs Python and pip, nothing else; the first run makes ``.venv`` in the checkout. The network is fitted on unlabelled
calibration images; the test images only measure the result.
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import environment

MODELS = Path("models")
RESULT = Path("build", "digits_small.onnx")
COMPRESS = (
    *("compress", MODELS / "digits_bn.onnx", "--output", RESULT, "--target", "macs=0.5"),
    *("--calibration", MODELS / "digits_calibration.npz"),
)
VALIDATE = ("validate", MODELS / "digits_bn.onnx", RESULT, "--data", MODELS / "digits_test.npz")


def main() -> int:
    """Run the two commands and return the exit status of the first that fails, or 0."""
    try:
        python = environment.prepare(dev=False)
    except environment.SetupError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    (environment.ROOT / RESULT.parent).mkdir(exist_ok=True)
    for words in (COMPRESS, VALIDATE):
        title = shlex.join(["onnxfuse", *map(str, words)])
        status = environment.run(title, [python, "-m", "onnxfuse", *words])
        if status:
            return status
    environment.say(f"\nThe smaller file is {environment.ROOT / RESULT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
