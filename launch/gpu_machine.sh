#!/usr/bin/env bash
# Runs one process on all GPUs of this machine, and starts it again when it was stopped and saved.
#
#   launch/gpu_machine.sh [--gpus=0,1] [--program=train] [--stops=0] [--dry_run] -- FLAGS
#
#   launch/gpu_machine.sh -- --gin_file=gin_configs/promot_rte.gin \
#       --gin_file=gin_configs/scale/mt5_xxl.gin --gin.MODEL_DIR=/data/run --xla_flags=gpu
#
# --xla_flags=gpu among FLAGS: see docs/howto/gpu.md.
# --gpus: which ones, by default all. --stops=N: start it again after up to N stops (status 75).
# Needs a virtual environment with `pip install -e '.[gpu]'` (PYTHON, by default python3).

set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

gpus="" stops=0
read_flags "gpus stops" "" "$@"
[[ "$stops" == 0 ]] || need_number --stops "$stops"
[[ -z "$gpus" || "$gpus" =~ ^[0-9]+(,[0-9]+)*$ ]] || die "--gpus=$gpus must be numbers, as in 0,1."
if [[ -z "$dry_run" ]] && ! command -v nvidia-smi >/dev/null; then
  die "There is no nvidia-smi here, hence no GPU driver; on a CPU, start robust_ft.$program itself."
fi

# Fails where jax has no GPU support, instead of training on the CPU.
command=(env JAX_PLATFORMS=cuda)
[[ -z "$gpus" ]] || command+=("CUDA_VISIBLE_DEVICES=$gpus")
command+=("${PYTHON:-python3}" -m "robust_ft.$program" --num_processes=1 "${program_flags[@]}")
cd "$here/.."
while true; do
  status=0
  run "${command[@]}" || status=$?
  ((status == 75 && stops > 0)) || exit "$status"
  stops=$((stops - 1))
done
