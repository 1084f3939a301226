"""Read the pages of documentation: their blocks of code and the commands in them; run a page.

A block of ``bash``, ``sh``, ``console`` or ``python`` runs in its page's order, unless its first line has a mark:

    ```bash no-run: needs a GPU
    ```python slow: compiles 8-bit programs
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import io
import itertools
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md",
         *sorted((ROOT / "docs").rglob("*.md"))]
SHELL, CONSOLE = ("bash", "sh", "console"), "console"
_FENCE = re.compile(r"^(`{3,})([^`\n]*)\n(.*?)^\1\s*$", re.MULTILINE | re.DOTALL)
_INFO = re.compile(r"^(?P<language>\S*)(?: (?P<mark>no-run|slow): (?P<reason>\S.*))?$")
SECONDS = 240  # time limit of a block


@dataclass(frozen=True)
class Block:
    """A block of code of a page. ``mark`` is "no-run", "slow" or None."""

    page: Path
    line: int
    info: str
    text: str

    @property
    def language(self) -> str:
        return self._parts["language"]

    @property
    def mark(self) -> str | None:
        return self._parts["mark"]

    @property
    def _parts(self) -> dict[str, str | None]:
        found = _INFO.match(self.info)
        return found.groupdict() if found else {"language": self.info.split()[0], "mark": None, "reason": None}

    @property
    def well_marked(self) -> bool:
        """Return whether the block's first line is a language, or a language, a mark and a reason."""
        return _INFO.match(self.info) is not None

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Return the blocks of code of a page, in order."""
    text = page.read_text()
    return [Block(page, text.count("\n", 0, found.start()) + 1, found[2].strip(), found[3])
            for found in _FENCE.finditer(text)]


def prose(page: Path) -> str:
    """Return the text of a page without its blocks."""
    return _FENCE.sub("", page.read_text())


def code_spans(page: Path) -> list[str]:
    """Return the texts between backticks in a page's running text."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def commands(block: Block) -> list[str]:
    """Return the commands of a shell block: continued lines joined, without comments and a console's answers."""
    lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
    if block.language == CONSOLE or any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def words_of(command: str) -> list[str] | None:
    """Return the words after ``qwen-jax`` in a line of shell, or None if the line does not call it."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars="|&;<>()")
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # the quote is closed on a later line
        return None
    parts = [(separates, list(part)) for separates, part in
             itertools.groupby(words, lambda word: set(word) <= set("|&;<>()"))]
    for (separates, part), (_, after) in zip(parts, [*parts[1:], (True, [""])]):
        part = list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), part))
        if not separates and part[:1] == ["qwen-jax"]:
            return part[1:-1] if part[-1] == "2" and after[0].startswith(">") else part[1:]  # the 2 of 2>
    return None


class Failure(Exception):
    """A block failed, or its output differs from the page."""


class Reader:
    """Runs the blocks of a page in order, in one folder, with free ports in place of 8000 and 8001.

    Args:
      folder: an empty folder.
      environment: the environment of every process.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder, self._environment = folder, environment
        self._names: dict[str, object] = {"__name__": "__docs__"}
        self._runner = asyncio.Runner()
        self._groups: list[int] = []
        self._ports = {"8000": _free_port(), "8001": _free_port()}
        for name in ("configs", "scripts"):  # pages are read in the repository's folder
            (folder / name).symlink_to(ROOT / name)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_) -> None:
        self._runner.close()
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            for group in self._groups:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal_number)

    def run(self, block: Block) -> None:
        """Run a block; raise `Failure` if it fails."""
        text = re.sub(r"\b800[01]\b", lambda found: self._ports[found[0]], block.text)
        if block.language == "python":
            self._python(block, text)
        else:
            self._shell(Block(block.page, block.line, block.info, text))

    def _python(self, block: Block, text: str) -> None:
        output = io.StringIO()
        try:
            with contextlib.chdir(self._folder), contextlib.redirect_stdout(output):
                # Leading empty lines give tracebacks the line numbers of the page.
                code = compile("\n" * block.line + text, block.where, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
                result = eval(code, self._names)
                if result is not None:
                    self._runner.run(result)
        except Exception:
            raise Failure(f"{block.where} fails:\n{block.text}\n{output.getvalue()}{traceback.format_exc()}") from None

    def _shell(self, block: Block) -> None:
        script = block.text
        if block.language == CONSOLE or "\n$ " in f"\n{script}":
            for command, answer in _dialogue(block.text):
                output = self._bash(block, command)
                if answer and not re.fullmatch(re.escape(answer.strip()).replace(re.escape("..."), r"[\s\S]*"),
                                               output.strip()):
                    raise Failure(f"{block.where}: `{command}` does not print what the page says:\n{output}")
        else:
            self._bash(block, _in_background(script))

    def _bash(self, block: Block, script: str) -> str:
        output = self._folder / ".output"
        with output.open("w") as file:
            process = subprocess.Popen(["bash", "-euo", "pipefail", "-c", script], cwd=self._folder, text=True,
                                       env=self._environment, stdout=file, stderr=subprocess.STDOUT,
                                       stdin=subprocess.DEVNULL, start_new_session=True)
            self._groups.append(process.pid)
            try:
                code = process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                code = f"none within {SECONDS} s"
        if code != 0:
            log = self._folder / "server.log"
            raise Failure(f"{block.where} fails (exit code {code}):\n{block.text}\n{output.read_text()}"
                          + (f"\nthe server's log:\n{log.read_text()}" if log.exists() else ""))
        return output.read_text()


def environment(cache: str) -> dict[str, str]:
    """Return the environment for a page's processes: this Python's programs come first, and the hub is offline."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "QWEN_JAX_CACHE": cache, "JAX_PLATFORMS": "cpu"}


def _dialogue(text: str) -> Iterator[tuple[str, str]]:
    """Yield the commands of a console block and their answers."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, answer = re.sub(r"\\\n\s*", "", part).partition("\n")
        yield command, answer


def _in_background(script: str) -> str:
    """Change a script so that its servers run in the background and the script waits until they are ready."""
    lines = []
    for line in re.sub(r"\\\n\s*", "", script).splitlines():
        words = words_of(line)
        if words and words[0] == "serve":
            from qwen_jax.cli import _parser

            port = _parser().parse_args(words).port
            command = line.split(" #")[0].rstrip().rstrip("&")
            line = (f"{command} > server.log 2>&1 &\n"
                    f"until curl -sf localhost:{port}/ready > /dev/null; do kill -0 $!; sleep 0.2; done")
        lines.append(line)
    return "\n".join(lines)


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])
