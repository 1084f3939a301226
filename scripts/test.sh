#!/usr/bin/env bash
# Runs the lints and the tests. Arguments go to pytest, for instance: scripts/test.sh tests/engine -k sampling
# With --slow as the first, the tests marked slow run alone; with --real MODEL, those on a released model.
if [ "${1:-}" = --real ]; then
  shift
  exec "$(dirname "${BASH_SOURCE[0]}")/real_model.sh" "$@"
fi
EXTRAS=test
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
.venv/bin/python -m ruff check .
.venv/bin/python scripts/lint_prose.py
.venv/bin/python scripts/lint_calls.py
if [ "${1:-}" = --slow ]; then
  shift
  set -- -m slow "$@"
fi
exec .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations=10 "$@"
