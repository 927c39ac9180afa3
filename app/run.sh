#!/usr/bin/env bash
# serve.py in the background: ./run.sh start [options of serve.py] | stop | status | logs [-f]
#
# `start` returns when the server answers, or says why it does not. `stop` ends the process that
# `start` has started, and no other one: the file serve.pid has its number and when it began.
set -u
cd "$(dirname "$0")/.." || exit 1
pid_file=app/serve.pid log=app/serve.log
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

began() { ps -o lstart= -p "$1" 2>/dev/null; }

running() {  # sets pid, if the process that was started is still there
  [ -f "$pid_file" ] || return 1
  { read -r pid && read -r since; } <"$pid_file" || return 1
  [ -n "$since" ] && [ "$(began "$pid" | xargs)" = "$since" ]
}

healthy() {  # asks at the address that the server has printed
  url=$(sed -n 's/^serving .* on \(http[^ ]*\) .*/\1/p' "$log" | head -n 1)
  [ -n "$url" ] || return 1
  url=${url/0.0.0.0/127.0.0.1}
  "$python" - "$url" <<'END' 2>/dev/null
import sys, urllib.request
urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sys.argv[1] + "health", timeout=5)
END
}

start() {
  if running; then echo "already running (process $pid); stop it first"; return 1; fi
  nohup "$python" serve.py "$@" >"$log" 2>&1 &
  pid=$!
  printf '%s\n%s\n' "$pid" "$(began "$pid" | xargs)" >"$pid_file"
  while running; do
    if healthy; then echo "started (process $pid): $url"; return 0; fi
    sleep 0.5
  done
  rm -f "$pid_file"
  echo "not started:" >&2
  tail -n 5 "$log" >&2
  return 1
}

stop() {
  if ! running; then rm -f "$pid_file"; echo "not running"; return 0; fi
  kill "$pid"
  for _ in $(seq 40); do running || break; sleep 0.25; done
  if running; then kill -9 "$pid"; fi
  rm -f "$pid_file"
  echo "stopped (process $pid)"
}

status() {
  if ! running; then echo "not running"; return 3; fi
  if healthy; then echo "running (process $pid): $url"; return 0; fi
  echo "running (process $pid), and does not answer yet"
  return 1
}

command=${1:-}
[ $# -gt 0 ] && shift
case "$command" in
  start) start "$@" ;;
  stop) stop ;;
  status) status ;;
  logs) [ -f "$log" ] || { echo "nothing was started yet: there is no $log"; exit 1; }
    tail -n 50 "$@" "$log" ;;
  *) echo "usage: run.sh start [options of serve.py] | stop | status | logs [-f]" >&2; exit 2 ;;
esac
