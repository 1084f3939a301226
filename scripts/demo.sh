#!/usr/bin/env bash
# The main job, end to end on real input: convert a checkpoint, load it, screen card transactions, print what it took.
#   scripts/demo.sh                                        the bundled model
#   MODEL=Qwen/Qwen2.5-0.5B-Instruct scripts/demo.sh       the same with a model from the hub
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
exec .venv/bin/python scripts/demo.py --model "${MODEL:-bundled}" "$@"
