#!/usr/bin/env bash
# A Ray head on this machine: cluster/local.sh start [GPUS] | stop | status
#
# GPUS is a number, 0 for none; without it the head takes all that Ray finds. RPG_PORT and RPG_DASHBOARD_PORT set ports.
set -euo pipefail

port=${RPG_PORT:-6379}
dashboard=${RPG_DASHBOARD_PORT:-8265}
state=${XDG_STATE_HOME:-$HOME/.local/state}/rpg
pid_file=$state/head-$port.pid
log=$state/head-$port.log
# Whoever reaches a head without a token can run code on it.
export RAY_AUTH_MODE=token

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -x $here/.venv/bin/ray ]]; then
    # Jobs run the `python` that is found first, which has to be the one beside `ray`.
    PATH=$here/.venv/bin:$PATH
fi

fail() {
    echo "cluster/local.sh: error: $*" >&2
    exit 2
}

head_pid() {
    local pid
    pid=$(cat "$pid_file" 2>/dev/null) || return 1
    # The system may have given the number to another program since, so the command line is compared.
    tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -q -- "start --head --block --port=$port " || return 1
    echo "$pid"
}

answers() {
    python - "$dashboard" <<'PYTHON' 2>/dev/null
import sys
import urllib.request

urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/api/gcs_healthz", timeout=2)
PYTHON
}

start() {
    local gpus=${1-}
    [[ $gpus =~ ^[0-9]*$ ]] || fail "start: expected a number of GPUs, got '$gpus'"
    command -v ray >/dev/null || fail "no 'ray' here: run make setup first"
    ! head_pid >/dev/null || fail "a head is running already: cluster/local.sh status"
    mkdir -p "$state"
    [[ -s $HOME/.ray/auth_token ]] || ray get-auth-token --generate >/dev/null 2>&1
    # The head gets a session of its own, so that `stop` ends only this head's processes.
    setsid ray start --head --block --port="$port" --dashboard-port="$dashboard" \
        --dashboard-agent-listen-port=0 --disable-usage-stats ${gpus:+--num-gpus="$gpus"} \
        </dev/null >"$log" 2>&1 &
    local pid=$!
    echo "$pid" >"$pid_file"
    for _ in {1..120}; do
        kill -0 "$pid" 2>/dev/null || fail "the head ended at once: $log"
        if answers; then
            echo "Ray is running. In shells that use it:"
            echo "  export RAY_AUTH_MODE=token RAY_ADDRESS=http://127.0.0.1:$dashboard"
            echo "  ray job submit --working-dir . -- python -m ray_jobs.pipeline configs/digits.yaml"
            return
        fi
        sleep 0.5
    done
    stop
    fail "the head did not answer within a minute: $log"
}

stop() {
    local pid
    pid=$(head_pid) || { echo "no head is running"; return; }
    kill -TERM "$pid"
    for _ in {1..50}; do
        pgrep --session "$pid" >/dev/null || break
        sleep 0.2
    done
    pkill -KILL --session "$pid" || true
    rm -f "$pid_file"
    echo "stopped"
}

status() {
    local text
    head_pid >/dev/null || { echo "no head is running"; return 1; }
    # A head knows its own resources only some seconds after it answers.
    for _ in {1..10}; do
        text=$(ray status --address="127.0.0.1:$port") || return
        [[ $text == "No cluster status"* ]] || break
        sleep 1
    done
    echo "$text"
}

case ${1-} in
    start) start "${2-}" ;;
    stop) stop ;;
    status) status ;;
    *) fail "expected start [GPUS], stop or status" ;;
esac
