#!/usr/bin/env bash
# Runs the tests of tests/real on a released model: a folder, or a hub id, which is fetched. Other arguments go to pytest.
#   scripts/real_model.sh FOLDER|ID [ARGUMENTS]      for instance Qwen/Qwen2.5-Coder-0.5B-Instruct
if [ $# = 0 ]; then
  echo "name a released model: a folder or a hub id, such as Qwen/Qwen2.5-Coder-0.5B-Instruct" >&2
  exit 2
fi
model=$1
shift
if [ -d "$model" ]; then model=$(cd "$model" && pwd); fi
EXTRAS=test
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
export QWEN_JAX_REAL_MODEL=$model
exec .venv/bin/python -m pytest -m real tests/real "$@"
