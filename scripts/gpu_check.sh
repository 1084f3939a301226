#!/usr/bin/env bash
# Everything there is to know of this project on the NVIDIA GPU at hand, in nine minutes at most: the tests marked gpu,
# then the kernels against cuDNN and torch and against what the chip can do. Results go to $OUT (default: out) as
# gpu_check.json and gpu_check.md, whatever fails on the way. PYTHON names the Python to use (default: the repository's
# .venv if there is one, else python3); it needs jax with CUDA, flax, numpy and pytest, nothing has to be installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OUT="${OUT:-out}" PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false  # torch needs room beside jax
mkdir -p "$OUT"
[ -n "${PYTHON:-}" ] || { [ -x .venv/bin/python ] && PYTHON=.venv/bin/python || PYTHON=python3; }
exec "$PYTHON" scripts/gpu_check.py "$@"
