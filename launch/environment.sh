#!/usr/bin/env bash
# Functions that the other scripts source: finding Python, choosing the jax extra, filling a virtual environment.
# DRY_RUN=1 prints the commands that would change something instead of running them.

say() { printf '%s\n' "$*"; }

# fail MESSAGE: ends the script; what was given to it is wrong.
fail() {
  say "error: $*" >&2
  exit 2
}

# usage SCRIPT: prints the comment at its head.
usage() { sed -n '1d; /^#SBATCH/q; /^#/!q; s/^# \{0,1\}//p' "$1"; }

# Prints a command as a shell would have to be given it.
shown() {
  local word line=''
  for word in "$@"; do
    [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  say "${line# }"
}

run() {
  if [[ "${DRY_RUN:-0}" == 1 ]]; then
    say "would run: $(shown "$@")"
  else
    "$@"
  fi
}

# Prints the first Python >= 3.11 that runs: $PYTHON, or the usual names. A version manager's shim may exist and
# still fail, so each one is started.
find_python() {
  local minimum=${1:-11} candidate
  for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13 python3.14}; do
    if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, $minimum))" >/dev/null 2>&1; then
      say "$candidate"
      return 0
    fi
  done
  return 1
}

# Prints the extra of pyproject.toml that brings jax for this machine's accelerator; nothing for a CPU.
accelerator_extra() {
  local driver
  if command -v nvidia-smi >/dev/null 2>&1 && driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null); then
    driver=${driver%%.*}
    if [[ "$driver" =~ ^[0-9]+$ ]] && ((driver < 580)); then
      say gpu-cuda12
    else
      say gpu
    fi
  elif compgen -G '/dev/accel*' >/dev/null || [[ -n "${TPU_NAME:-}" && -e /dev/vfio/0 ]]; then
    say tpu
  fi
}

# fill_environment FOLDER EXTRAS: creates the virtual environment and installs this project with its extras.
# A stamp of the requirement files makes a second call return at once.
fill_environment() {
  local folder=$1 extras=$2 python stamp spec="."
  [[ -n "$extras" ]] && spec=".[$extras]"
  stamp="$(cat requirements.txt pyproject.toml) $spec $PWD"
  if [[ -x "$folder/bin/python" && -f "$folder/installed" && "$(cat "$folder/installed")" == "$stamp" ]]; then
    say "environment: $folder is up to date"
    return 0
  fi
  if [[ ! -x "$folder/bin/python" ]]; then
    if ! python=$(find_python); then
      say "no Python 3.11 or newer was found; install one, or set PYTHON to its path." >&2
      return 1
    fi
    run "$python" -m venv "$folder"
  fi
  say "environment: installing $spec into $folder"
  run "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$spec"
  [[ "${DRY_RUN:-0}" == 1 ]] || printf '%s' "$stamp" >"$folder/installed"
}
