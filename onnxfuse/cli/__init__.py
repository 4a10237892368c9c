"""The command line: flags in, one result on stdout, everything else on stderr."""

from onnxfuse.cli.app import main

__all__ = ["main"]
