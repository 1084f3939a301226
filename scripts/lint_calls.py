"""Report calls with more than five positional arguments, and functions of more than sixty lines.

    python scripts/lint_calls.py [FILE or FOLDER ...]

A reader cannot tell what the sixth argument of a call is for: name it. `LONG` lists the functions that may be longer,
with the reason. Exits with 1 when anything is found.
"""

import ast
import sys
from pathlib import Path

from lint_prose import ROOT, report

MOST_ARGUMENTS, MOST_LINES = 5, 60
LONG: dict[str, str] = {}  # file:function, and why it stays whole
# Array constructors and tree functions, whose arguments are alike.
ALIKE = {"max", "min", "stack", "concatenate", "zip", "map", "print", "einsum", "chain", "join", "StructArray"}


def problems(path: Path) -> list[str]:
    """Return lines ``file:line: problem`` for the calls with too many arguments and the long functions of a file."""
    shown, found = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path, []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if len(node.args) > MOST_ARGUMENTS and name not in ALIKE:
                found.append((node.lineno, f"{name} is called with {len(node.args)} positional arguments"))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > MOST_LINES and f"{shown}:{node.name}" not in LONG:
                found.append((node.lineno, f"{node.name} has {lines} lines"))
    return [f"{shown}:{number}: {text}" for number, text in sorted(found)]


if __name__ == "__main__":
    sys.exit(report(problems))
