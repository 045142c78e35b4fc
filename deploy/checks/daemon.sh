# A daemon of its own for a check: sourced, never run. Everything is in a new folder and on a free port; the daemon and
# the folder go when the script ends. Tests the release build; BLKTAPD_BINARY names another.
# shellcheck shell=bash

# shellcheck source=deploy/paths.sh
. "$(dirname "${BASH_SOURCE[0]}")/../paths.sh"

blktapd=${BLKTAPD_BINARY:-$target_dir/release/blktapd}
[ -x "$blktapd" ] || die "$blktapd is not built: cargo build --release --bin blktapd"

# Short, because a socket's path holds 107 bytes.
work=$(mktemp -d /tmp/blktapd.XXXXXX)
run_dir=$work/run
# RAM disks need tmpfs, which /tmp need not be.
ram_dir=$(mktemp -d /dev/shm/blktapd.XXXXXX)
export BLKTAPD_CTL=$run_dir/ctl.sock
daemon_pid=''

free_port() { /usr/bin/python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

end_check() {
    local status=$?
    set +e
    # shellcheck disable=SC2046  # one word per job
    kill $(jobs -p) 2>/dev/null
    wait
    if [ "$status" -ne 0 ] && [ -s "$work/daemon.log" ]; then
        echo "the end of the daemon's log:"
        tail -n 40 "$work/daemon.log"
    fi
    rm -rf "$work" "$ram_dir"
    exit "$status"
}
trap end_check EXIT

ctl() { "$blktapd" ctl --timeout 20 "$@"; }

# Starts the daemon with further options of `serve` and waits until it answers.
start_daemon() {
    metrics=127.0.0.1:$(free_port)
    "$blktapd" serve --run-dir "$run_dir" --ram-dir "$ram_dir" --ram-limit 256M --metrics "$metrics" "$@" >"$work/daemon.log" 2>&1 </dev/null &
    daemon_pid=$!
    local tries=0
    until ctl list >/dev/null 2>&1; do
        kill -0 "$daemon_pid" 2>/dev/null || die "the daemon ended instead of starting"
        [ "$tries" -lt 300 ] || die "the daemon does not answer after 30 s"
        tries=$((tries + 1))
        sleep 0.1
    done
}

# shellcheck disable=SC2034  # for the scripts that source this file
scrape() { curl -fsS --max-time 10 "http://$metrics/metrics"; }

uri() { printf 'nbd+unix:///%s?socket=%s/nbd/%s.sock' "$1" "$run_dir" "$1"; }
