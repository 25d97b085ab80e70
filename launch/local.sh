#!/usr/bin/env bash
# Starts N processes of a command on this machine, as if each were a host: each has its share of the GPUs, and each line of
# output begins with the number of its process.
#   launch/local.sh -n 2 -- atlas train --task qa ...
#   ATLAS="launch/local.sh -n 2 -- atlas" launch/mmlu/full.sh
# The exit status is that of the first process that fails; the others are killed five seconds later, so that they can log why
# they end. Signals are forwarded to all processes, which then may take as long as they need to save. PORT=12345 sets the port
# of the coordinator, DRY_RUN=1 prints the commands. The GPUs are those of CUDA_VISIBLE_DEVICES, else all that `nvidia-smi`
# lists; with JAX_PLATFORMS=cpu none.
set -euo pipefail

usage="usage: launch/local.sh -n N -- COMMAND..."
[ "${1:-}" = -n ] && [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] && [ "${3:-}" = -- ] && [ $# -gt 3 ] || { echo "$usage" >&2; exit 2; }
count=$2
shift 3
PORT=${PORT:-$(python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')}

gpus=()
if [[ "${CUDA_VISIBLE_DEVICES:-}" != -1 && "${JAX_PLATFORMS:-}" != cpu* ]]; then # -1 hides all GPUs, as an empty list does
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
  else
    mapfile -t gpus < <(nvidia-smi -L 2>/dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p')
  fi
fi
if [ $((${#gpus[@]} % count)) -ne 0 ]; then
  remedy="choose some with CUDA_VISIBLE_DEVICES, or none with JAX_PLATFORMS=cpu"
  echo "launch/local.sh -n $count: does not divide the number of GPUs, ${#gpus[@]}; $remedy" >&2
  exit 2
fi
each=$((${#gpus[@]} / count))

run() { # starts, or prints, process number $i
  local command=("$@" --coordinator "127.0.0.1:$PORT" --num_processes "$count" --process_id "$i") IFS=,
  [ "$each" = 0 ] || command=(env CUDA_VISIBLE_DEVICES="${gpus[*]:i*each:each}" "${command[@]}")
  if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${command[@]}"
    echo
  else
    exec "${command[@]}"
  fi
}

pids=()
set -m # each process has its own process group: Ctrl-C reaches it only once, forwarded by the trap below
for ((i = 0; i < count; i++)); do
  if [ -n "${DRY_RUN:-}" ]; then
    run "$@"
  else
    run "$@" </dev/null > >(trap '' INT TERM USR1 HUP; exec sed -u "s/^/[$i] /") 2>&1 &
    pids+=($!)
  fi
done
set +m
signalled= # set when a signal has been forwarded
for signal in INT TERM USR1 HUP; do
  # shellcheck disable=SC2064 # $signal is to be expanded now
  trap "signalled=1; kill -$signal \"\${pids[@]}\" 2>/dev/null || true" $signal
done

status=0
end= # time, in seconds of this shell, at which the remaining processes are killed
while [ ${#pids[@]} -gt 0 ]; do
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null && continue
    code=0
    wait "${pids[i]}" || code=$?
    unset "pids[i]"
    if [ "$code" -ne 0 ] && [ "$status" -eq 0 ]; then
      status=$code
      end=$((SECONDS + ${GRACE:-5}))
    fi
  done
  if [ -n "$end" ] && [ -z "$signalled" ] && [ "$SECONDS" -ge "$end" ]; then
    kill -KILL "${pids[@]}" 2>/dev/null || true
  fi
  sleep 0.1 &
  wait $! || true # a signal interrupts `wait`
done
wait # for the `sed` processes to write the last lines
exit "$status"
