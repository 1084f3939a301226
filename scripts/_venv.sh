# Makes or reuses .venv and installs this repository into it with the extras named in $EXTRAS. The scripts of this folder
# source it. It can run again at any time, also after an interruption: a stamp is written when everything is installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "Python 3.11 or newer with venv is needed (set PYTHON to its path)" >&2
  exit 2
}

install_into_venv() {
  local extras="${EXTRAS:-}" stamp
  stamp=".venv/.installed-$(echo "$extras" | tr ',' '-')-$(cksum < pyproject.toml | tr ' ' '-')"
  if [ -e "$stamp" ] && .venv/bin/python -c 'import qwen_jax, qwen_kernels' 2>/dev/null; then
    return
  fi
  if ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
    echo "making .venv" >&2
    rm -rf .venv
    "$(find_python)" -m venv .venv
  fi
  echo "installing qwen-jax${extras:+ with $extras} into .venv (a few minutes the first time)" >&2
  # torch is installed first, so that no other package's looser requirement chooses its version.
  case ",$extras," in *,test,*) .venv/bin/python -m pip install --quiet "$(sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)" ;; esac
  .venv/bin/python -m pip install --quiet --editable ".${extras:+[$extras]}"
  touch "$stamp"
}

install_into_venv
