"""Run the command line with ``python -m onnxfuse``."""

import sys

from onnxfuse.cli import main

if __name__ == "__main__":
    sys.exit(main())
