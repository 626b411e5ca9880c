#!/usr/bin/env bash
# Train on several nodes under SLURM, with one torchrun per node and one process per GPU:
#     sbatch examples/slurm.sh RECIPE [CHANGES]
#SBATCH --job-name=sparsecut
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
# Five minutes before the time is up, every process gets SIGTERM. It finishes its step and writes a
# checkpoint. A job that is queued again resumes there: --resume starts anew only where there is no
# checkpoint.
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m sparsecut train "$@" --resume
