#!/usr/bin/env bash
# bash run.sh        set up, make the sample data, train on it, sum the run up
# bash run.sh test   set up, run the tests
# What is done already is not done again. Needs Python 3.11 or newer, on Linux or macOS.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
# What would lead to other folders, or to another Python's packages.
unset CDPATH PYTHONHOME PYTHONPATH PYTHONSAFEPATH PYTHONINSPECT
unset PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON PIP_USER
case "${1:-}" in
  '' | test) ;;
  *) echo "run.sh: '$*' is not known; see the top of run.sh" >&2; exit 2 ;;
esac
here=$0
while [ -L "$here" ]; do
  target=$(readlink "$here")
  [ "${target#/}" != "$target" ] || target=$(dirname -- "$here")/$target
  here=$target
done
cd -- "$(dirname -- "$here")"
py=.venv/bin/python

find_python() {
  for python in "$py" python3 python3.14 python3.13 python3.12 python3.11; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && return
  done
  echo "run.sh: no Python 3.11 or newer found; install one" >&2
  exit 1
}

wait_for_others() { # until none of them installs; the lock is descriptor 9's, until it is closed
  mkdir -p logs
  exec 9>>logs/.setup.lock
  "$python" -c 'if True:
    import fcntl, signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("run.sh: waiting for another run.sh, which installs", flush=True)
        fcntl.flock(9, fcntl.LOCK_EX)'
}

make_venv() {
  local clear=--clear
  if [ "$python" = "$py" ]; then
    "$py" -m pip --version >/dev/null 2>&1 && return
    clear= # what is in it is kept
  fi
  # Debian keeps the standard library's venv in a package of its own.
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "run.sh: $python cannot make virtual environments; trying apt-get install python3-venv"
    { apt-get update -qq && apt-get install -y -qq python3-venv; } ||
      { echo "run.sh: run 'sudo apt-get install python3-venv' and then this again" >&2; exit 1; }
  fi
  "$python" -m venv $clear .venv
}

install() { # of a requirements file, once for each of its versions
  local stamp=".venv/installed_${1//\//_}"
  cmp -s "$1" "$stamp" && return
  echo "run.sh: installing $1"
  "$py" -m pip install --quiet --no-user --disable-pip-version-check --requirement "$1"
  cp "$1" "$stamp"
}

find_python
wait_for_others
find_python # again: others may have made .venv
make_venv
install requirements.txt
if [ $# -gt 0 ]; then
  install lab/requirements.txt
  install tests/requirements.txt
fi
exec 9>&-
[ $# -gt 0 ] || exec "$py" records/sample.py
exec "$py" -m pytest -n auto "${@:2}"
