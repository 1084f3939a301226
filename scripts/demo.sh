#!/usr/bin/env bash
# Runs the main job on real input: converts a checkpoint, loads it, screens card transactions, and prints time and memory.
#   scripts/demo.sh                                        the bundled model
#   MODEL=Qwen/Qwen2.5-0.5B-Instruct scripts/demo.sh       the same with a model from the hub
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
exec .venv/bin/python scripts/demo.py --model "${MODEL:-bundled}" "$@"
