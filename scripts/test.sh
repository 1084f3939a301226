#!/usr/bin/env bash
# Runs the tests; arguments go to pytest (for instance: scripts/test.sh tests/engine -k sampling).
EXTRAS=test
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
.venv/bin/python -m ruff check .
exec .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --durations=10 "$@"
