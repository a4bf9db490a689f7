#!/usr/bin/env bash
# Runs on all workers of a Cloud TPU, which it asks for (queued resources) where it is not there.
#
#   launch/tpu_vm.sh --name=NAME --zone=ZONE --type=v5litepod-16 [--project=P] [--spot]
#       [--nfs=HOST:/SHARE] [--program=train] [--delete] [--dry_run] -- FLAGS
#
#   launch/tpu_vm.sh --name=promot --zone=us-west4-a --type=v5litepod-16 --nfs=10.0.0.2:/share -- \
#       --gin_file=gin_configs/promot_rte.gin --gin.MODEL_DIR=/mnt/shared/run --xla_flags=tpu
#
# With several workers MODEL_DIR is on a file system that all of them see: --nfs mounts one as
# /mnt/shared. Start the same command again to go on after a preemption. --delete gives the TPU back
# at the end. Needs gcloud, logged in.

set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

name="" zone="" type="" project="" spot="" nfs="" delete=""
read_flags "name zone type project nfs" "spot delete" "$@"
[[ "$name" =~ ^[a-z][-a-z0-9]*$ ]] || die "--name=$name must be small letters, digits and dashes."
[[ "$zone" =~ ^[a-z]+-[a-z]+[0-9]-[a-z]$ ]] || die "--zone=$zone must be as in us-west4-a."
[[ -z "$nfs" || "$nfs" =~ ^[^:]+:/ ]] || die "--nfs=$nfs must be HOST:/SHARE."
case "$type" in
  v4-*) runtime="tpu-ubuntu2204-base" ;;
  v5litepod-*) runtime="v2-alpha-tpuv5-lite" ;;
  v5p-*) runtime="v2-alpha-tpuv5" ;;
  v6e-*) runtime="v2-alpha-tpuv6e" ;;
  *) die "--type=$type must be v4-N, v5litepod-N, v5p-N or v6e-N." ;;
esac
[[ -n "$dry_run" ]] || command -v gcloud >/dev/null || die "There is no gcloud here; install it."

where=("--zone=$zone" ${project:+"--project=$project"})
tpu=(gcloud compute tpus)
state() {
  "${tpu[@]}" queued-resources describe "$name" "${where[@]}" --format='value(state.state)'
}
on_all_workers() {
  run "${tpu[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"
}

# 1. The TPU, when it is our turn.
if [[ -n "$dry_run" ]] || ! state >/dev/null 2>&1; then
  run "${tpu[@]}" queued-resources create "$name" "--node-id=$name" "${where[@]}" \
    "--accelerator-type=$type" "--runtime-version=$runtime" ${spot:+--spot}
fi
while [[ -z "$dry_run" ]]; do
  case "$(state)" in
    ACTIVE) break ;;
    FAILED | SUSPENDED) die "The request for '$name' is $(state); delete it and ask again." ;;
    *) echo "Waiting for $type in $zone." && sleep 30 ;;
  esac
done

# 2. The program, on all workers.
archive=robust_ft.tar.gz
if [[ -z "$dry_run" ]]; then
  folder=$(mktemp -d)
  trap 'rm -r "$folder"' EXIT
  archive=$folder/$archive
fi
run tar --create --gzip --exclude=.git --exclude=.venv --file="$archive" \
  --directory="$(dirname "$here")" .
run "${tpu[@]}" tpu-vm scp "$archive" "$name:robust_ft.tar.gz" "${where[@]}" --worker=all
setup="mkdir -p robust_ft && tar -xzf robust_ft.tar.gz -C robust_ft && cd robust_ft"
setup+=" && python3 -m venv .venv && .venv/bin/pip install -q -c requirements.lock -e '.[tpu]'"
if [[ -n "$nfs" ]]; then
  setup+=" && sudo apt-get install -qy nfs-common && sudo mkdir -p /mnt/shared"
  setup+=" && (mountpoint -q /mnt/shared || sudo mount $(printf '%q' "$nfs") /mnt/shared)"
fi
on_all_workers "$setup"

# 3. The run.
status=0
on_all_workers "cd robust_ft && .venv/bin/python -m robust_ft.$program $(printf '%q ' "${program_flags[@]}")" ||
  status=$?
if [[ -n "$delete" ]]; then
  run "${tpu[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
fi
exit "$status"
