#!/usr/bin/env bash
# A worker's side of pod.py, which copies this file to every worker and calls it through ssh:
#   worker.sh setup DIGEST | launch | status | log LINE | stop SECONDS
# Every call may be repeated. Each ends with a line "@pod HOST STATE", which pod.py counts.
set -euo pipefail

report() { echo "@pod $HOSTNAME $*"; }

# The run holds the lock as long as it lives, whatever becomes of the shell that started it. A look shares the lock with
# other looks, so that none of them takes another for the run.
running() { ! flock --shared --nonblock lock true; }

state() {
  if running; then
    echo running
  elif [[ -f ended ]]; then
    echo "ended $(<ended)"
  elif [[ -f pid ]]; then
    echo lost # launched, but neither running nor ended: the machine went down
  elif [[ -f installed ]]; then
    echo "set up"
  else
    echo new
  fi
}

setup() {
  local digest=$1
  if [[ -f secrets.env ]]; then chmod 600 secrets.env; fi
  if [[ -f installed && $(<installed) == "$digest" ]]; then return; fi
  if running; then
    echo "the run is using the files of another job; stop it first" >&2
    return 1
  fi
  echo "$digest  job.tar.gz" | sha256sum --check --quiet
  rm -rf installed ended pid files venv
  mkdir files
  tar --extract --gzip --file job.tar.gz --directory files
  # The image's own Python may be older than JAX allows; uv brings one.
  export PATH="$HOME/.local/bin:$PATH"
  if ! command -v uv >/dev/null; then curl -LsSf https://astral.sh/uv/install.sh | sh; fi
  uv venv --quiet --python 3.12 venv
  (cd files && uv pip install --quiet --python ../venv/bin/python --requirement .pod/requirements.txt)
  echo "$digest" >installed
}

launch() {
  if [[ ! -f installed ]]; then
    echo "not set up" >&2
    return 1
  fi
  if running; then return; fi
  rm -f ended pid
  # In a session of its own, so that the run outlives this connection.
  setsid --fork bash "$PWD/worker.sh" run </dev/null >>log 2>&1
  for _ in {1..100}; do
    if running || [[ -f ended ]]; then return; fi
    sleep 0.1
  done
  echo "the run has not started within 10 s" >&2
  return 1
}

# The run itself, in the background: what it says goes to the log, its exit status to the file "ended".
run() {
  local child code=0
  exec 9>lock
  flock --timeout 5 9 || return 0 # somebody else has launched it meanwhile
  if [[ -f secrets.env ]]; then
    set -a
    # shellcheck source=/dev/null
    source ./secrets.env
    set +a
  fi
  (cd files && PATH="$PWD/../venv/bin:$PATH" exec bash .pod/command.sh) &
  child=$!
  echo "$child" >pid
  # A machine that shuts down sends SIGTERM to all of its processes: the run saves, and this shell stays to write down how it ended.
  trap : TERM INT HUP
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
  wait "$child" || code=$?
  echo "$code" >ended
}

log() {
  local line=$1
  touch log
  if running && [[ -f pid ]]; then
    tail --lines="+$line" --follow=name --sleep-interval=0.5 --pid="$(<pid)" log
    flock --shared --timeout 10 lock true || true
  else
    tail --lines="+$line" log
  fi
}

stop() {
  local seconds=$1
  if ! running || [[ ! -f pid ]]; then return; fi
  kill -TERM "$(<pid)" 2>/dev/null || true
  if flock --shared --timeout "$seconds" lock true; then return; fi
  echo "still running after $seconds s; killed" >&2
  kill -KILL "$(<pid)" 2>/dev/null || true
  flock --shared --timeout 10 lock true
}

main() {
  local action=$1
  cd "$(dirname "${BASH_SOURCE[0]}")"
  umask 077
  if [[ $action != run ]]; then trap 'code=$?; if ((code)); then report "failed with status $code"; fi' EXIT; fi
  case $action in
    run) run ;;
    setup) setup "$2" ;;
    launch) launch ;;
    status) ;;
    log) log "$2" ;;
    stop) stop "$2" ;;
    *)
      echo "unknown action: $action" >&2
      return 2
      ;;
  esac
  if [[ $action != run ]]; then report "$(state)"; fi
}

# On one line, so that bash has read the whole file before it is replaced by a newer one.
main "$@"; exit
