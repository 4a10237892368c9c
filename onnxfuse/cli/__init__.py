"""The command line: flags in, one result on stdout, everything else on stderr.

What is in here imports nothing but the standard library, so that `main` is there at once and an interrupt finds it in
charge while all the rest is imported.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn, TypeAlias

__all__ = ["EXIT_INTERRUPTED", "INTERRUPTED", "caught_signals", "main", "refusal_as_json"]

EXIT_INTERRUPTED = 130
INTERRUPTED = "interrupted; nothing was written"

Handler: TypeAlias = Callable[[int, FrameType | None], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name; None for those it was started with.

    Returns:
        The exit code: 0, or one that tells the kind of error (see `onnxfuse.errors`).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)

    def leave(_signal: int, _frame: FrameType | None) -> NoReturn:
        _leave(words)

    with caught_signals(leave):
        from onnxfuse.cli.app import run

        return run(words)


@contextmanager
def caught_signals(handler: Handler) -> Iterator[None]:
    """Have Ctrl-C and a request to end (a job's time limit) answered by a function, as far as this thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A job in the background inherits that Ctrl-C is ignored, which is to stay so; so is what is not Python's own.
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def refusal_as_json(what: str, where: str, mend: str, code: int) -> str:
    """Return an error as the one JSON object that a program waits for.

    Args:
        what: What is wrong.
        where: Where; empty if that is clear.
        mend: What to do about it; empty if there is nothing.
        code: The exit code.
    """
    entry = {"what": what, "where": where, "mend": mend, "exit_code": code}
    return json.dumps({"error": entry}, indent=2, ensure_ascii=False)


def _leave(words: Sequence[str]) -> NoReturn:
    """End the process on the spot: an exception that is raised in the middle of an import may get lost there.

    Nothing has been opened yet that would have to be closed.
    """
    with suppress(OSError):
        os.write(2, f"onnxfuse: {INTERRUPTED}\n".encode())
        if "--json" in words:
            os.write(1, f"{refusal_as_json(INTERRUPTED, '', '', EXIT_INTERRUPTED)}\n".encode())
    os._exit(EXIT_INTERRUPTED)
