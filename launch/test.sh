#!/usr/bin/env bash
# Sets everything up and runs the checks: ruff, pyright, shellcheck and the tests.
#
#   bash launch/test.sh               everything
#   bash launch/test.sh --fast        without the tests marked slow
#   bash launch/test.sh --no-torch    without torch and OpenAI's client: only the tests that need neither (others are listed)
#   bash launch/test.sh --dry-run     prints what would run
#   bash launch/test.sh -- -k router  what follows '--' goes to pytest
#
# Environment: VENV (folder, default .venv-test), PYTHON (interpreter to create it with), WORKERS (test processes).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

extras=dev
pytest_arguments=()
while (($#)); do
  case "$1" in
    --fast) pytest_arguments+=(-m "not slow") ;;
    --no-torch) extras="test" ;;
    --dry-run) DRY_RUN=1 ;;
    --)
      shift
      pytest_arguments+=("$@")
      break
      ;;
    -h | --help)
      usage launch/test.sh
      exit 0
      ;;
    *)
      say "unknown argument '$1'; see --help, and put pytest's own after '--'." >&2
      exit 2
      ;;
  esac
  shift
done

timed() {
  local name=$1 start=$SECONDS
  shift
  "$@"
  say "time: $name $((SECONDS - start)) s"
}

venv=${VENV:-.venv-test}
timed setup fill_environment "$venv" "$extras"
bin=$venv/bin
# The tests compare with float32 references on the CPU; a GPU or TPU that is present is left alone.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# Two processes on two cores: more threads than that only get in each other's way.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [[ "$extras" == dev ]]; then
  timed ruff run "$bin/ruff" check .
  timed format run "$bin/ruff" format --check .
  timed pyright run "$bin/pyright" --pythonpath "$bin/python"
  timed shellcheck run "$bin/shellcheck" -x launch/*.sh launch/*.sbatch .ci/run
else
  # Test files that import torch or OpenAI's client, themselves or through a module of tests/.
  for package in torch openai; do
    pattern="^\s*(import|from) $package\b"
    while IFS= read -r module; do
      folder=$(dirname "$module") name=$(basename "$module" .py)
      pattern+="|^\s*from ${folder//\//\\.} import .*\b$name\b"
    done < <(grep -rlE --include='*.py' --exclude='*_test.py' "$pattern" tests)
    while IFS= read -r file; do
      say "not run here (needs $package): $file"
      pytest_arguments+=("--ignore=$file")
    done < <(grep -rlE --include='*_test.py' "$pattern" tests | sort)
  done
fi
timed pytest run "$bin/python" -m pytest -q -rs --durations=15 -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder "${pytest_arguments[@]}"
