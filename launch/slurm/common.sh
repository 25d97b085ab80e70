# What the SLURM scripts share; sourced by them with REPOSITORY set. Submit from the repository's folder:
#   DATA_DIR=/data sbatch launch/slurm/full.sh
# IMAGE=FILE runs in a container: apptainer (an .sif), or with a SLURM that has pyxis, CONTAINER=pyxis and an image's name.
# It has atlas in it and sees DATA_DIR, SAVE_DIR and this repository; no spaces in their names. The other settings are
# those of launch/mmlu/common.sh. DRY_RUN=1 prints the commands.
set -euo pipefail

# Five minutes before the time is over SLURM sends SIGUSR1 to what srun started, not to this shell (`--signal=USR1@300`
# without B:). Each process saves and ends with 138, sooner or later than others, and with --kill-on-bad-exit=1 the first
# would have the rest killed while they save. Nor is that flag needed: a process whose peer is lost ends by itself. But
# one that hangs shall not keep the nodes: --wait=600 seconds after the first has ended, srun kills who is left.
LAUNCH=(srun --kill-on-bad-exit=0 --wait=600 --ntasks-per-node=1 --cpu-bind=none)

TABLE="python $REPOSITORY/eval/evaluate_mmlu_predictions.py" # in this shell, on the first node alone
if [ -n "${IMAGE:-}" ]; then
  seen=$DATA_DIR:$DATA_DIR,$REPOSITORY:$REPOSITORY${SAVE_DIR:+,$SAVE_DIR:$SAVE_DIR}
  if [ "${CONTAINER:-apptainer}" = pyxis ]; then
    image=(--container-image="$IMAGE" --container-mounts="$seen")
    TABLE="srun --nodes=1 --ntasks=1 ${image[*]} $TABLE"
  else
    image=(apptainer exec --nv --bind "$seen" "$IMAGE")
    TABLE="${image[*]} $TABLE"
  fi
  LAUNCH+=("${image[@]}")
fi
export ATLAS="${LAUNCH[*]} atlas" SCORES=${SCORES:-$TABLE}

# The first process puts the job back into the queue (atlas_jax/runtime/interrupts.py); in a container, which has no scontrol, this
# shell does, when all processes have ended.
back_to_queue() {
  if [ "$1" -eq 138 ] && [ -n "${IMAGE:-}" ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
}
trap 'back_to_queue $?' EXIT
