#!/usr/bin/env bash
# tier: self
# limit: 180
# Goal: after the daemon was killed its disks are listed as awaiting-recovery, keep their image, and can be given up.
# Method: kill -9 with an idle disk; start again; list; try the image as another disk; detach by force.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

load_frontend
start_daemon
before=$(footprint)
attach_self d1 "raw:$raw_disk" xvda
write_and_verify /dev/xvda
back=$(backend_of 0 xvda vbd3)
kill -KILL "$daemon"
wait "$daemon" 2>/dev/null || true
start_daemon
ctl list
ctl show d1
ctl list | grep d1 | grep -q awaiting-recovery || fail "d1 is not listed as awaiting-recovery"
wait_node "$back/state" 4
wait_node "$(frontend_of 0 xvda)/state" 4
refused ctl attach d2 "raw:$raw_disk" --nbd
ctl detach d1 --force
wait_no_device /dev/xvda
wait_footprint "$before"
ctl attach d2 "raw:$raw_disk" --nbd
ctl detach d2
