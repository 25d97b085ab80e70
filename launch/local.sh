#!/usr/bin/env bash
# Several processes on this machine, as if each were a host; their lines are numbered.
#   launch/local.sh -n 2 -- atlas train --task qa ...
# When one fails the others are killed, and its status is that of the script. Ctrl-C, SIGTERM and SIGUSR1 go to all.
# PORT=12345 chooses the port, DRY_RUN=1 prints the commands.
set -euo pipefail

usage="usage: launch/local.sh -n N -- COMMAND..."
[ "${1:-}" = -n ] && [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] && [ "${3:-}" = -- ] && [ $# -gt 3 ] || { echo "$usage" >&2; exit 2; }
count=$2
shift 3
PORT=${PORT:-$(python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')}

commands=()
for ((i = 0; i < count; i++)); do
  commands+=("$(printf '%q ' "$@" --coordinator "127.0.0.1:$PORT" --num_processes "$count" --process_id "$i")")
done
if [ -n "${DRY_RUN:-}" ]; then
  printf '%s\n' "${commands[@]}"
  exit
fi

pids=()
for ((i = 0; i < count; i++)); do
  (trap - INT TERM USR1; eval "exec ${commands[i]}") > >(trap '' INT TERM USR1; exec sed -u "s/^/[$i] /") 2>&1 &
  pids+=($!)
done
for signal in INT TERM USR1; do
  # shellcheck disable=SC2064 # the signal of now
  trap "kill -$signal \${pids[*]} 2>/dev/null || true" $signal
done

status=0
left=$count
while [ "$left" -gt 0 ]; do
  code=0
  wait -n "${pids[@]}" 2>/dev/null || code=$?
  running=0
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then running=$((running + 1)); fi
  done
  [ "$running" -lt "$left" ] || continue # a signal woke us
  left=$running
  if [ "$code" -ne 0 ] && [ "$code" -ne 127 ] && [ "$status" -eq 0 ]; then
    status=$code
    sleep "${GRACE:-5}" # to say why they end, too
    kill -KILL "${pids[@]}" 2>/dev/null || true
  fi
done
wait
exit "$status"
