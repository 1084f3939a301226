#!/usr/bin/env bash
# Compares checkpoints with transformers: logits, greedy text, and the round trip through our format.
#   scripts/verify_release.sh [MODEL...]      default: Qwen/Qwen2.5-0.5B-Instruct; folders and hub ids
EXTRAS=test
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
exec .venv/bin/python scripts/verify_release.py "$@"
