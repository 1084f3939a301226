#!/usr/bin/env bash
# Checks this project on an NVIDIA GPU in nine minutes at most: runs the tests marked gpu, then compares the kernels with
# cuDNN, with torch, and with the measured limits of the chip. Results go to $OUT (default: out) as gpu_check.json and
# gpu_check.md, also when a part fails. PYTHON names the Python to use (default: the repository's .venv if it exists, else
# python3); it needs jax with CUDA, flax, numpy and pytest. The script installs nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OUT="${OUT:-out}" PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false  # torch needs room beside jax
mkdir -p "$OUT"
[ -n "${PYTHON:-}" ] || { [ -x .venv/bin/python ] && PYTHON=.venv/bin/python || PYTHON=python3; }
exec "$PYTHON" scripts/gpu_check.py "$@"
