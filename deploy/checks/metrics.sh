#!/usr/bin/env bash
# Goal: what Prometheus scrapes is well formed, and every metric and label that the dashboard and the alert rules ask for
# is in it.
# Method: start with the example configuration, serve one disk of each kind, let a client read and write, scrape, and compare names.
set -euo pipefail
# shellcheck source=deploy/checks/daemon.sh
. "$(dirname "${BASH_SOURCE[0]}")/daemon.sh"

# With every default of the example configuration written out, which shows that the daemon knows its keys.
sed -E 's/^#([a-z_]+ =)/\1/' "$repo_dir/deploy/blktapd.toml" >"$work/blktapd.toml"
start_daemon --config "$work/blktapd.toml" --ctl "$BLKTAPD_CTL" --state-dir "$work/state"
truncate -s 16M "$work/disk.img"
ctl attach file "raw:$work/disk.img" --nbd --iops 100000 --bps 1G --group tenant
ctl attach ram 'ram:check?size=16M' --nbd
head -c 16M /dev/urandom >"$work/data"
for disk in file ram; do
    nbdcopy --flush "$work/data" "$(uri "$disk")"
    nbdcopy "$(uri "$disk")" "$work/back"
    cmp "$work/data" "$work/back"
done

# Allocated bytes are asked of the store in the background: they are there some seconds after the first scrape.
for _ in $(seq 20); do
    scrape >"$work/scrape"
    grep -q '^blktapd_disk_allocated_bytes' "$work/scrape" && break
    sleep 1
done
promtool check metrics <"$work/scrape"
/usr/bin/python3 "$repo_dir/deploy/checks/metric_names.py" "$work/scrape" \
    "$repo_dir/deploy/grafana/blktapd.json" "$repo_dir/deploy/prometheus/blktapd.rules.yml"
curl -fsS --max-time 10 "http://$metrics/healthz" >/dev/null
