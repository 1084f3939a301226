"""Report docstrings that do not say in their first words what a thing does or is, and words that hide who acts.

    python scripts/lint_prose.py [FILE or FOLDER ...]

A first sentence is a verb phrase or a noun phrase that is clear without the code (CONTRIBUTING.md). Exits with 1 when
anything is found.
"""

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPENINGS = re.compile(
    r"(Of|Those|These|Whose|What|Who|Which|That|As|Where|When|Whether|How|Why|Else|For|From|To|In|On|With|Until|By|It|Its|"
    r"They|Here|There|This|Is|Are|Has|Only|Also|Same|Open ones|Every one|One|Some)\b")
WORDS = re.compile(r"\b(nobody|whoever|whatever|somebody|so many|so much|so long|no one|everybody|anybody)\b", re.I)


def problems(path: Path) -> list[str]:
    """Return lines ``file:line: problem`` for the docstrings and comments of a file that break the rules."""
    if path == Path(__file__).resolve():  # it names the words
        return []
    source, found = path.read_text(), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None and (not text or OPENINGS.match(text)):
                found.append((getattr(node, "lineno", 1), f"docstring opens with {text[:40]!r}"))
            elif text and re.match(r"(Args|Attributes|Raises|Returns):", text):
                found.append((getattr(node, "lineno", 1), "docstring has no first sentence"))
    for number, line in enumerate(source.splitlines(), 1):
        if word := WORDS.search(line):
            found.append((number, f"{word[0]!r} hides who acts"))
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return [f"{shown}:{number}: {text}" for number, text in sorted(found)]


def report(problems: Callable[[Path], list[str]]) -> int:
    """Print every problem in the files and folders that the command line names; by default of the project's code.

    problems: returns the lines to print for one file. Returns the exit code: 1 when there are any.
    """
    names = sys.argv[1:] or [ROOT / name for name in ("qwen_jax", "kernels", "scripts")]
    places = [Path(name).resolve() for name in names]
    files = [file for place in places for file in (sorted(place.rglob("*.py")) if place.is_dir() else [place])]
    found = [line for file in files for line in problems(file)]
    print("\n".join(found) or "no problems")
    return bool(found)


if __name__ == "__main__":
    sys.exit(report(problems))
