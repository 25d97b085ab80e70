# What the SLURM scripts share; sourced by them. Submit from the repository's folder:
#   DATA_DIR=/data sbatch launch/slurm/full.sh
# IMAGE=FILE runs in a container: apptainer (an .sif), or with a SLURM that has pyxis, CONTAINER=pyxis and an image's name.
# The other settings are those of launch/mmlu/common.sh. DRY_RUN=1 prints the commands.
set -euo pipefail

# Five minutes before its time is over SLURM sends SIGUSR1: the run saves and goes back to the queue. As the batch step gets no
# signal of `--signal=USR1@300`, only srun's processes do, and no shell may be in between: `exec` below.
LAUNCH=(srun --kill-on-bad-exit=1 --ntasks-per-node=1)
if [ -n "${IMAGE:-}" ] && [ "${CONTAINER:-apptainer}" = pyxis ]; then
  LAUNCH+=(--container-image="$IMAGE" --container-mounts="$DATA_DIR:$DATA_DIR")
elif [ -n "${IMAGE:-}" ]; then
  LAUNCH+=(apptainer exec --nv --bind "$DATA_DIR" "$IMAGE")
fi
[ -z "${DRY_RUN:-}" ] || LAUNCH=(echo "${LAUNCH[@]}")
export ATLAS="${LAUNCH[*]} atlas"
[ -z "${DRY_RUN:-}" ] || export SCORES=echo
MMLU_SCRIPTS=${SLURM_SUBMIT_DIR:-$PWD}/launch/mmlu
