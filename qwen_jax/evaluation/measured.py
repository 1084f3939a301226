"""Figures that a calibration has measured so far, kept in a file so that an interrupted one goes on."""
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen_jax.atomic import replace_file
from qwen_jax.errors import UserError


class Measured:
    """Results of measurements by name, each computed once; with a file, also across interruptions.

    ``measured(name, measure)`` returns the result for a name, which must be JSON, and calls ``measure()`` if there is
    none yet. The file belongs to a subject: figures of another subject in it are dropped.
    """

    def __init__(self, path: Path | None = None, subject: Any = None, say: Callable[[str], None] = lambda _: None):
        """subject: JSON that says what is measured. say: called with a line of progress.

        Raises UserError for a file that could not be written.
        """
        self.path, self.subject, self.say = path, subject, say
        if path and not os.access(path.parent, os.W_OK):
            raise UserError(f"cannot write into {path.parent}: name another folder with --output")
        self.results: dict[str, Any] = {}
        if path and path.is_file():
            try:
                stored = json.loads(path.read_text())
                self.results = stored["results"] if stored["subject"] == json.loads(json.dumps(subject)) else {}
            except (OSError, ValueError, KeyError, TypeError):
                say(f"{path} is damaged and begins anew")
            if self.results:
                say(f"{len(self.results)} figures were measured before: {path}")

    def __call__(self, name: str, measure: Callable[[], Any]) -> Any:
        if name not in self.results:
            self.results[name] = measure()
            self._write()
        return self.results[name]

    def _write(self) -> None:
        if not self.path:
            return
        try:
            replace_file(self.path, json.dumps({"subject": self.subject, "results": self.results}).encode())
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; name another folder with --output") from None

    def finish(self) -> None:
        """Remove the file: its figures have become a result."""
        if self.path:
            self.path.unlink(missing_ok=True)
