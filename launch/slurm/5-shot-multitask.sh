#!/usr/bin/env bash
# MMLU, 5-shot-multitask, on 8 nodes of 8 GPUs. Settings: launch/slurm/common.sh. Arguments are passed on to atlas.
#SBATCH --job-name=atlas-5-shot-multitask
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# SLURM runs a copy of this file elsewhere, so the repository is the folder in which `sbatch` was called.
REPOSITORY=${SLURM_SUBMIT_DIR:-$PWD}
[ -d "$REPOSITORY/launch/slurm" ] || { echo "$REPOSITORY: no launch/slurm; submit from the repository's folder" >&2; exit 2; }
# shellcheck source=launch/slurm/common.sh
source "$REPOSITORY/launch/slurm/common.sh"
# shellcheck source=launch/mmlu/5-shot-multitask.sh
source "$REPOSITORY/launch/mmlu/5-shot-multitask.sh"
