#!/usr/bin/env bash
# Sets everything up on this machine (CPU, NVIDIA GPU or TPU) and runs the main job.
#
#   bash launch/local.sh                                     trains and evaluates the tiny preset
#   bash launch/local.sh --config configs/sft.py:phi2-4e     any config, any override:
#   bash launch/local.sh --config configs/sft.py --config.training.max_steps=20 --workdir runs/try
#   bash launch/local.sh --dry-run ...                       prints what would run
#
# Environment: VENV (folder, default .venv), PYTHON (interpreter to create it with).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

arguments=()
for argument in "$@"; do
  case "$argument" in
    --dry-run) DRY_RUN=1 ;;
    -h | --help)
      usage launch/local.sh
      exit 0
      ;;
    *) arguments+=("$argument") ;;
  esac
done
[[ " ${arguments[*]:-} " == *" --config"[\ =]* ]] || arguments=(--config configs/sft.py "${arguments[@]}")

venv=${VENV:-.venv}
extra=$(accelerator_extra)
if [[ -n "$extra" ]]; then
  say "machine: an accelerator was found; jax is installed with the extra '$extra'"
else
  say "machine: no accelerator was found; jax is installed for the CPU"
fi
fill_environment "$venv" "$extra"
if [[ -z "$extra" ]]; then
  # XLA:CPU frees and takes its buffers at every step; glibc gives large ones back to the kernel each time, and the
  # page faults of getting them again cost a fifth of a small model's step.
  export MALLOC_ARENA_MAX=2 MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592
fi
run "$venv/bin/python" -m moe_vlm_jax.train "${arguments[@]}"
