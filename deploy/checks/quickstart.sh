#!/usr/bin/env bash
# Goal: the README's first command does what it says, twice, and leaves a daemon that answers.
# Method: run it in a folder of its own and on a free port, without installing anything; ask the daemon; stop it.
set -euo pipefail
# shellcheck source=deploy/checks/daemon.sh
. "$(dirname "${BASH_SOURCE[0]}")/daemon.sh"

metrics=127.0.0.1:$(free_port)
quickstart() {
    "$repo_dir/deploy/quickstart.sh" --run-dir "$run_dir" --binary "$blktapd" --metrics "$metrics" --no-packages "$@"
}
# The daemon that it starts is in a session of its own and has its own folder for RAM disks, so both need an end of theirs.
# (exit keeps the status for end_check.)
shm=${run_dir//-/%2D}
shm=/dev/shm/blktapd${shm//\//-}
trap 'status=$?; quickstart --stop >/dev/null || true; rm -rf "$shm"; (exit $status); end_check' EXIT

quickstart
first=$(cat "$run_dir/quickstart.pid")
echo "---- again ----"
quickstart
[ "$(cat "$run_dir/quickstart.pid")" = "$first" ] || die "the second run replaced the daemon of the first"

[ "$(ctl --json list | jq 'length')" -ge 2 ] || die "ctl list does not show the two disks: $(ctl --json list)"
grep -q '^blktapd_disk_' <<<"$(scrape)" || die "the scrape shows no disk"
quickstart --stop
! kill -0 "$first" 2>/dev/null || die "--stop left process $first running"
