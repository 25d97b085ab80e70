# Settings of the SLURM scripts, which source this file with REPOSITORY set. Submit from the repository's folder:
#   DATA_DIR=/data sbatch launch/slurm/full.sh
# IMAGE=FILE runs in an apptainer container (an .sif file); with CONTAINER=pyxis, if SLURM has pyxis, IMAGE is an image name.
# The image must have atlas installed; DATA_DIR, SAVE_DIR and this repository are mounted, and their paths may have no `,` or `:`.
# The other settings are those of launch/mmlu/common.sh. DRY_RUN=1 prints the commands.
set -euo pipefail

# Five minutes before the time limit SLURM sends SIGUSR1 to the processes that srun started, not to this shell
# (`--signal=USR1@300` without B:). Each process saves and exits with status 138, some earlier than others; with
# --kill-on-bad-exit=1 the first exit would make srun kill the others while they save. That flag is not needed either: a
# process that loses a peer exits by itself. So that a process that hangs does not hold the nodes, --wait=600 lets srun kill
# the remaining processes 600 seconds after the first exit.
LAUNCH=(srun --kill-on-bad-exit=0 --wait=600 --ntasks-per-node=1 --cpu-bind=none)

for name in DATA_DIR SAVE_DIR; do # a shell leaves ~ alone in NAME="~/folder"
  [[ "${!name:-}" != \~/* ]] || printf -v "$name" %s "$HOME/${!name#*/}"
done
TABLE=(python "$REPOSITORY/eval/evaluate_mmlu_predictions.py") # runs in this shell, on the first node only
if [ -n "${IMAGE:-}" ]; then
  for path in "$DATA_DIR" "$REPOSITORY" "${SAVE_DIR:-}"; do
    [[ "$path" != *[,:]* ]] || { echo "$path: no container can mount a path with , or : in its name; take another" >&2; exit 2; }
  done
  seen=$DATA_DIR:$DATA_DIR,$REPOSITORY:$REPOSITORY${SAVE_DIR:+,$SAVE_DIR:$SAVE_DIR}
  if [ "${CONTAINER:-apptainer}" = pyxis ]; then
    image=(--container-image="$IMAGE" --container-mounts="$seen")
    TABLE=(srun --nodes=1 --ntasks=1 "${image[@]}" "${TABLE[@]}")
  else
    image=(apptainer exec --nv --bind "$seen" "$IMAGE")
    TABLE=("${image[@]}" "${TABLE[@]}")
  fi
  LAUNCH+=("${image[@]}")
fi
printf -v ATLAS '%q ' "${LAUNCH[@]}" atlas # launch/mmlu/common.sh takes them apart again
printf -v table '%q ' "${TABLE[@]}"
export ATLAS SCORES=${SCORES:-$table}

# Process 0 requeues the job (atlas_jax/runtime/interrupts.py). A container has no scontrol: there this shell requeues the job
# when all processes have ended.
back_to_queue() {
  if [ "$1" -eq 138 ] && [ -n "${IMAGE:-}" ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
}
trap 'back_to_queue $?' EXIT
