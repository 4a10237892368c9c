#!/usr/bin/env python3
"""Make the environment that the project runs in: ``.venv`` in the checkout, by the standard library alone.

``quickstart.py`` and ``check.py`` call this first; run by itself, it only makes the environment. An environment that
is there and was made from the same ``pyproject.toml`` by the same Python is used as it is.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
OLDEST_PYTHON = (3, 11)
# Dependency groups came with this version of pip.
OLDEST_PIP = "pip>=25.1"
# What the environment depends on; the version in the package is part of the installed metadata.
_SOURCES = ("pyproject.toml", "onnxfuse/__init__.py")
_NO_PIP = """\
This Python can neither put pip into a new environment (the module ensurepip is missing) nor lend its own (pip 22.3 or
newer). On Debian and Ubuntu, `sudo apt install python3-venv` mends that; then run this command again."""


class SetupError(Exception):
    """The environment can't be made; the message says what to do."""


def say(line: str) -> None:
    """Write one line to standard output at once, before what the programs called here write."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def python() -> Path:
    """Return the Python of the environment."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def prepare(*, dev: bool) -> Path:
    """Make the environment, or bring it up to date.

    Args:
        dev: Whether the tools of development are needed too.

    Returns:
        The Python to run things with.

    Raises:
        SetupError: It can't be made; the message says what to do.
    """
    if sys.version_info[:2] < OLDEST_PYTHON:
        what = f"onnxfuse needs Python {'.'.join(map(str, OLDEST_PYTHON))} or newer; this is {sys.version.split()[0]}."
        raise SetupError(what)
    wanted = {"sources": _digest(), "python": sys.version, "dev": dev}
    found = _read_stamp()
    if python().exists() and found in (wanted, {**wanted, "dev": True}):
        return python()
    _stamp().unlink(missing_ok=True)
    steps = [
        ("updating pip", _update_pip),
        ("installing onnxfuse and what it needs (some hundred megabytes the first time)", _install),
    ]
    if Path(sys.prefix).resolve() != VENV.resolve():
        # The environment that this very program runs in can't be made anew, only brought up to date.
        steps.insert(0, (f"making {VENV}", _make_venv))
    if dev:
        steps.append(("installing the development tools", _install_dev))
    for number, (title, step) in enumerate(steps, start=1):
        start = time.monotonic()
        say(f"[{number}/{len(steps)}] {title} ...")
        step()
        say(f"      done in {time.monotonic() - start:.0f} s")
    _stamp().write_text(json.dumps(wanted), encoding="utf-8")
    return python()


def run(title: str, command: Sequence[str | Path]) -> int:
    """Show a command's title, run it in the checkout, and return its exit status."""
    say(f"\n== {title}")
    return subprocess.run(list(map(str, command)), cwd=ROOT, check=False).returncode


def _stamp() -> Path:
    return VENV / "onnxfuse-environment.json"


def _digest() -> str:
    content = b"\0".join((ROOT / name).read_bytes() for name in _SOURCES)
    return hashlib.sha256(content).hexdigest()


def _read_stamp() -> object:
    try:
        return json.loads(_stamp().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _make_venv() -> None:
    # An environment left half made, or made by another Python, is made anew; nothing in it is anyone's work.
    arguments = ["--clear", str(VENV)]
    if importlib.util.find_spec("ensurepip") is not None:
        _call([sys.executable, "-m", "venv", *arguments])
        return
    # Debian keeps ensurepip in a package of its own; a pip outside can serve the environment instead.
    _call([sys.executable, "-m", "venv", "--without-pip", *arguments])
    try:
        _call([sys.executable, "-m", "pip", "--python", str(python()), "install", "--quiet", "pip"])
    except SetupError as error:
        what = f"{error}\n\n{_NO_PIP}"
        raise SetupError(what) from None


def _update_pip() -> None:
    _pip("install", "--upgrade", OLDEST_PIP)


def _install() -> None:
    _pip("install", "--editable", ".")


def _install_dev() -> None:
    _pip("install", "--group", "dev")


def _pip(*arguments: str) -> None:
    _call([str(python()), "-m", "pip", arguments[0], "--quiet", "--disable-pip-version-check", *arguments[1:]])


def _call(command: Sequence[str]) -> None:
    # A user's setting to install outside of environments would defeat this one.
    environment = {**os.environ, "PIP_USER": "0"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        what = f"this command failed with exit status {done.returncode}: {' '.join(command)}\n{done.stdout.strip()}"
        raise SetupError(what)


def main() -> int:
    """Make the environment with the development tools, and say where it is."""
    try:
        say(f"ready: {prepare(dev=True)}")
    except SetupError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
