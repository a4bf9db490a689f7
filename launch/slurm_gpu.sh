#!/usr/bin/env bash
# Submits a Slurm job with one process for each GPU; they find each other.
#
#   launch/slurm_gpu.sh --nodes=2 --gpus_per_node=8 --time=24:00:00 [--partition=P] [--account=A]
#       [--cpus_per_gpu=8] [--name=robust_ft] [--program=train] [--dry_run] -- FLAGS
#
#   launch/slurm_gpu.sh --nodes=1 --gpus_per_node=4 --time=4:00:00 -- \
#       --gin_file=gin_configs/promot_rte.gin --gin.MODEL_DIR=/shared/run --xla_flags=gpu
#
# --xla_flags=gpu among FLAGS: see docs/howto/gpu.md.
# MODEL_DIR is on a file system that all nodes see, and so are this folder and the virtual
# environment (PYTHON, by default python3). Two minutes before its time is up the job saves, ends
# with status 75 and is queued again.

set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

nodes="" gpus_per_node="" time="" partition="" account="" cpus_per_gpu=8 name=robust_ft
read_flags "nodes gpus_per_node time partition account cpus_per_gpu name" "" "$@"
need_number --nodes "$nodes"
need_number --gpus_per_node "$gpus_per_node"
need_number --cpus_per_gpu "$cpus_per_gpu"
[[ "$time" =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] || die "--time=$time must be as in 24:00:00."

flags=$(printf '%q ' "${program_flags[@]}")
python=$(printf '%q' "${PYTHON:-python3}")
job="#!/usr/bin/env bash
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus_per_node
#SBATCH --gpus-per-node=$gpus_per_node
#SBATCH --cpus-per-task=$cpus_per_gpu
#SBATCH --time=$time
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=$name-%j.log
${partition:+#SBATCH --partition=$partition
}${account:+#SBATCH --account=$account
}
cd $(printf '%q' "$(dirname "$here")")
export JAX_PLATFORMS=cuda
status=0
srun --kill-on-bad-exit=0 $python -m robust_ft.$program $flags|| status=\$?
if ((status == 75)); then scontrol requeue \"\$SLURM_JOB_ID\"; fi
exit \$status"
if [[ -n "$dry_run" ]]; then
  echo "sbatch <<'JOB'"
  echo "$job"
  echo "JOB"
else
  command -v sbatch >/dev/null || die "There is no sbatch here; start this on a login node."
  sbatch <<<"$job"
fi
