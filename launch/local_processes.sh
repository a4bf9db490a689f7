#!/usr/bin/env bash
# Runs two processes on this machine's CPU as one run, to try what several hosts would do.
#
#   launch/local_processes.sh [--processes=2] [--program=train] [--dry_run] -- FLAGS
#
#   launch/local_processes.sh -- --gin_file=gin_configs/promot_rte.gin --gin.MODEL_DIR=/tmp/run
#
# Each process's output goes to LOGS/process_<i>.log (--logs=LOGS, by default a new folder); process
# 0's is shown too. Ctrl-C or SIGTERM: all save and end with status 75; run it again to go on.

set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

processes=2 logs=""
read_flags "processes logs" "" "$@"
need_number --processes "$processes"

python=${PYTHON:-python3}
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
if [[ -z "$dry_run" ]]; then
  logs=${logs:-$(mktemp -d)}
  mkdir -p "$logs"
fi
cd "$here/.."
children=()
for ((i = 0; i < processes; i++)); do
  command=(env JAX_PLATFORMS=cpu "$python" -m "robust_ft.$program" "${program_flags[@]}"
    "--coordinator_address=localhost:$port" "--num_processes=$processes" "--process_id=$i")
  if [[ -n "$dry_run" ]]; then
    run "${command[@]}"
  elif ((i == 0)); then
    "${command[@]}" > >(tee "$logs/process_0.log") 2>&1 &
    children+=($!)
  else
    "${command[@]}" >"$logs/process_$i.log" 2>&1 &
    children+=($!)
  fi
done
[[ -z "$dry_run" ]] || exit 0

trap 'kill -TERM "${children[@]}" 2>/dev/null' INT TERM
status=0
for child in "${children[@]}"; do
  # A signal ends the wait but not the child.
  while true; do
    code=0
    wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  ((status != 0)) || status=$code
done
echo "Outputs: $logs"
exit "$status"
