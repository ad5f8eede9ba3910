#!/usr/bin/env bash
# bash run.sh        set up, make the sample data, train on it, sum the run up
# bash run.sh test   set up, run the tests
# What is done already is not done again. Needs Python 3.11 or newer, on Linux or macOS.
set -euo pipefail
cd "$(dirname "$0")"
py=.venv/bin/python

make_venv() {
  [ -f .venv/made ] && return
  local candidate python=""
  for candidate in python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
  [ -n "$python" ] || { echo "run.sh: no Python 3.11 or newer found; install one" >&2; exit 1; }
  # Debian keeps the standard library's venv in a package of its own.
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "run.sh: $python cannot make virtual environments; trying apt-get install python3-venv"
    { apt-get update -qq && apt-get install -y -qq python3-venv; } ||
      { echo "run.sh: run 'sudo apt-get install python3-venv' and then this again" >&2; exit 1; }
  fi
  "$python" -m venv --clear .venv
  touch .venv/made
}

install() { # of a requirements file, once for each of its versions
  local stamp=".venv/installed_${1//\//_}"
  cmp -s "$1" "$stamp" && return
  echo "run.sh: installing $1"
  "$py" -m pip install --quiet --disable-pip-version-check --requirement "$1"
  cp "$1" "$stamp"
}

make_venv
install requirements.txt
if [ "${1:-}" = test ]; then
  install tests/requirements.txt
  exec "$py" -m pytest -n auto "${@:2}"
fi
[ $# -eq 0 ] || { echo "run.sh: '$*' is not known; see the top of run.sh" >&2; exit 1; }

# glibc keeps what is freed, on large pages, instead of asking Linux for it again in each step.
malloc=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-$malloc}
"$py" data/prepare.py --sample
inputs=$(cat train_gpt.py data/sample.env data/datasets/sample_sp1024/manifest.json | cksum)
if [ "$(cat logs/sample/finished 2>/dev/null)" = "$inputs" ]; then
  echo "run.sh: the sample run is finished; remove logs/sample to train again"
else
  rm -rf logs/sample logs/sample.txt
  CONFIG=data/sample.env RUN_ID=sample OUT_DIR=logs "$py" train_gpt.py
  echo "$inputs" > logs/sample/finished
fi
"$py" records/summary.py logs/sample
