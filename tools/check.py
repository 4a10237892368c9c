#!/usr/bin/env python3
"""Run everything that must hold before a change goes in: ``python3 tools/check.py``.

Needs Python and pip, nothing else; the first run makes ``.venv`` in the checkout. It stops at the first check that
fails, with an exit status other than 0.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import environment

CHECKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("ruff: faults and style", ("-m", "ruff", "check")),
    ("ruff: layout", ("-m", "ruff", "format", "--check")),
    ("mypy: types", ("-m", "mypy")),
    ("import-linter: who may import whom", ("-c", "from importlinter.cli import lint_imports_command as main; main()")),
    ("docs/operators.md: as the rules say", ("tools/make_operator_table.py", "--check")),
    ("docs: examples", ("-m", "doctest", "CONTRIBUTING.md", "docs/architecture.md", "README.md")),
    ("models/: as the manifest says", ("tools/train_digits.py", "--verify")),
    ("pytest: tests and examples", ("-m", "pytest", "-n", "auto")),
)


def main() -> int:
    """Run the checks and return 0 if all pass."""
    try:
        python = environment.prepare(dev=True)
    except environment.SetupError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    for title, words in CHECKS:
        status = environment.run(title, [python, *words])
        if status:
            environment.say(f"\nfailed: {title}")
            return status
    environment.say("\nall checks passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
