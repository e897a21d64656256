#!/usr/bin/env bash
# Runs a config on a TPU cluster of Google Kubernetes Engine, as a workload of xpk.
#
#   bash launch/tpu_gke.sh --cluster tpus --zone us-west4-a --workload stage3 --type v5litepod-256 [--slices 2] -- \
#       --config configs/stage3.py:phi2-4e --workdir shared/runs/stage3 --config.mesh.expert=4
#   bash launch/tpu_gke.sh delete --cluster tpus --zone us-west4-a --workload stage3
#   --dry-run                         prints what would run
#
# What follows '--' goes to python -m moe_vlm_jax.train in every pod; the same workload goes on where it stopped.
# The pods need a shared folder for workdir, data and checkpoints: attach one to the cluster with 'xpk storage', and
# give its mount point with --shared; it becomes the folder shared/ of the project. Also: --project, --image (a base
# image with Python 3.11 or newer; default python:3.12), --restarts (of a workload whose pods were taken away; default 10).
# Needs: xpk, gcloud and kubectl, logged in. See docs/pods.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

action=create cluster='' zone='' workload='' type='' slices=1 shared='' image=python:3.12 restarts=10
project='' arguments=()
while (($#)); do
  case "$1" in
    create | delete) action=$1 ;;
    --cluster | --zone | --workload | --type | --slices | --shared | --image | --restarts | --project)
      [[ $# -ge 2 && "$2" != --* ]] || fail "$1 needs a value; see --help."
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    --dry-run) DRY_RUN=1 ;;
    -h | --help)
      usage launch/tpu_gke.sh
      exit 0
      ;;
    --)
      shift
      arguments=("$@")
      break
      ;;
    *) fail "unknown argument '$1'; see --help, and put the arguments of the training after '--'." ;;
  esac
  shift
done
[[ -n "$cluster" && -n "$zone" && -n "$workload" ]] || fail "needs --cluster, --zone and --workload; see --help."
if [[ "$action" == create ]]; then
  [[ -n "$type" ]] || fail "needs --type, a TPU type like v5litepod-256; see --help."
  ((${#arguments[@]})) || fail "needs the arguments of the training after '--', at least --config and --workdir."
  [[ "$slices" =~ ^[1-9][0-9]*$ ]] || fail "--slices '$slices' must be a number of slices, at least 1."
  [[ "$restarts" =~ ^[0-9]+$ ]] || fail "--restarts '$restarts' must be a number."
  [[ -n "$shared" ]] || say "note: without --shared the pods share no folder, and a workload of several pods needs one" >&2
fi
if [[ "${DRY_RUN:-0}" != 1 ]] && ! command -v xpk >/dev/null 2>&1; then
  fail "xpk was not found; install it (pip install xpk), or use --dry-run."
fi

place=(--cluster "$cluster" --workload "$workload" --zone "$zone")
[[ -z "$project" ]] || place+=(--project "$project")
if [[ "$action" == delete ]]; then
  run xpk workload delete "${place[@]}"
  exit 0
fi
printf -v quoted ' %q' "${arguments[@]}"
command="bash launch/local.sh$quoted"
[[ -z "$shared" ]] || command="ln -sfn $(printf '%q' "$shared") shared && $command"
# TPU_NAME lets local.sh take the chips that Kubernetes shows under /dev/vfio for a TPU.
run xpk workload create "${place[@]}" --tpu-type "$type" --num-slices "$slices" --base-docker-image "$image" \
  --script-dir . --max-restarts "$restarts" --command "export TPU_NAME=$(printf '%q' "$workload") && $command"
