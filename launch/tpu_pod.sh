#!/usr/bin/env bash
# Runs a config on a Cloud TPU pod slice: a queued resource, this project on every worker, one command on all of them.
#
#   bash launch/tpu_pod.sh create --name pod --zone us-west4-a --type v5litepod-16 [--spot]
#   bash launch/tpu_pod.sh train  --name pod --zone us-west4-a --nfs 10.0.0.2:/share -- \
#       --config configs/stage3.py:phi2-4e --workdir shared/runs/stage3 --config.mesh.expert=4
#   bash launch/tpu_pod.sh delete --name pod --zone us-west4-a
#   bash launch/tpu_pod.sh all ...    the three in turn; the slice is deleted whatever becomes of the run
#   --dry-run                         prints what would run
#
# What follows '--' goes to python -m moe_vlm_jax.train on every worker; the same 'train' goes on where it stopped.
# --nfs SERVER:/EXPORT is mounted on every worker as the folder shared/ of the project: the workdir, data and
# checkpoints belong there. Also: --project, --version (runtime of the TPU VMs; by default the type's own).
# Needs: gcloud, logged in. See docs/pods.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

action='' name='' zone='' type='' version='' nfs='' project='' spot=0 arguments=()
while (($#)); do
  case "$1" in
    create | train | delete | all) action=$1 ;;
    --name | --zone | --type | --version | --nfs | --project)
      [[ $# -ge 2 && "$2" != --* ]] || fail "$1 needs a value; see --help."
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    --spot) spot=1 ;;
    --dry-run) DRY_RUN=1 ;;
    -h | --help)
      usage launch/tpu_pod.sh
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
[[ -n "$action" ]] || fail "say what to do: create, train, delete or all; see --help."
[[ -n "$name" && -n "$zone" ]] || fail "$action needs --name and --zone; see --help."
if [[ "$action" == create || "$action" == all ]]; then
  [[ -n "$type" ]] || fail "$action needs --type, an accelerator type like v5litepod-16 or v4-32; see --help."
fi
if [[ "$action" == train || "$action" == all ]]; then
  ((${#arguments[@]})) || fail "$action needs the arguments of the training after '--', at least --config and --workdir."
  [[ "$nfs" == '' || "$nfs" == *:/* ]] || fail "--nfs '$nfs' must be SERVER:/EXPORT, like 10.0.0.2:/share."
  [[ -n "$nfs" ]] || say "note: without --nfs the workers share no folder, and a slice of several workers needs one" >&2
fi
if [[ "${DRY_RUN:-0}" != 1 ]] && ! command -v gcloud >/dev/null 2>&1; then
  fail "gcloud was not found; install the Google Cloud CLI and log in, or use --dry-run."
fi

place=(--zone "$zone")
[[ -z "$project" ]] || place+=(--project "$project")
queued=(gcloud compute tpus queued-resources)
vm=(gcloud compute tpus tpu-vm)

# Prints the runtime that Google names for a type.
runtime_of() {
  case "$1" in
    v5litepod-*) say v2-alpha-tpuv5-lite ;;
    v5p-*) say v2-alpha-tpuv5 ;;
    v6e-*) say v2-alpha-tpuv6e ;;
    *) say tpu-ubuntu2204-base ;;
  esac
}

create() {
  local request=("${place[@]}" --accelerator-type "$type" --runtime-version "${version:-$(runtime_of "$type")}")
  ((!spot)) || request+=(--spot)
  run "${queued[@]}" create "$name" --node-id "$name" "${request[@]}"
  say "waiting until $name is active (Google queues the request; this may take minutes or days)"
  if [[ "${DRY_RUN:-0}" == 1 ]]; then
    run "${queued[@]}" describe "$name" "${place[@]}" --format 'value(state.state)'
    return
  fi
  local state=''
  while [[ "$state" != ACTIVE ]]; do
    state=$("${queued[@]}" describe "$name" "${place[@]}" --format 'value(state.state)')
    case "$state" in
      FAILED | SUSPENDED | SUSPENDING | DELETING)
        say "error: the request for $name is $state; see '${queued[*]} describe $name ${place[*]}'." >&2
        return 1
        ;;
      ACTIVE) ;;
      *) sleep "${POLL_SECONDS:-30}" ;;
    esac
  done
}

# everywhere COMMAND: runs a command on every worker at the same time; fails when it fails on one.
everywhere() { run "${vm[@]}" ssh "$name" "${place[@]}" --worker all --command "$1"; }

# What a fresh worker lacks: a Python that is new enough, and the shared folder.
prepare_command() {
  local prepare='set -e; tar -xzf moe_vlm_jax.tar.gz -C moe_vlm_jax'
  prepare+='; command -v python3.11 python3.12 >/dev/null'
  prepare+=' || { sudo apt-get update -q && sudo apt-get install -qy python3.11 python3.11-venv; }'
  if [[ -n "$nfs" ]]; then
    prepare+='; command -v mount.nfs >/dev/null || { sudo apt-get update -q && sudo apt-get install -qy nfs-common; }'
    prepare+="; mkdir -p moe_vlm_jax/shared; mountpoint -q moe_vlm_jax/shared"
    prepare+=" || sudo mount -t nfs $(printf '%q' "$nfs") moe_vlm_jax/shared"
  fi
  say "$prepare"
}

train() {
  local archive quoted
  archive=$(mktemp -d)/moe_vlm_jax.tar.gz
  # Only what the run needs: no environments, runs or history.
  run tar -czf "$archive" pyproject.toml requirements.txt README.md LICENSE moe_vlm_jax configs launch
  everywhere 'mkdir -p moe_vlm_jax'
  run "${vm[@]}" scp "$archive" "$name:moe_vlm_jax.tar.gz" "${place[@]}" --worker all
  rm -rf "$(dirname "$archive")"
  everywhere "$(prepare_command)"
  printf -v quoted ' %q' "${arguments[@]}"
  # local.sh finds the TPU, installs jax for it, and starts the training, which finds the other workers.
  everywhere "cd moe_vlm_jax && bash launch/local.sh$quoted"
}

delete() { run "${queued[@]}" delete "$name" "${place[@]}" --force --quiet; }

case "$action" in
  create) create ;;
  train) train ;;
  delete) delete ;;
  all)
    trap delete EXIT
    create
    train
    ;;
esac
