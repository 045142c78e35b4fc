#!/usr/bin/env bash
# tier: self
# limit: 300
# Goal: a detach under load ends, with consent and by force, and leaves nothing behind, however often.
# Method: detach under reading and writing; then six quick attaches and detaches (a hundred with --long), alternating both kinds.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

load_frontend
start_daemon
before=$(footprint)
for kind in '' --force; do
    step "under load $kind"
    attach_self d1 "raw:$raw_disk" xvda
    fio --name=load --filename=/dev/xvda --ioengine=libaio --direct=1 --iodepth=32 --rw=randrw --bs=16k --size=64M \
        --time_based --runtime=15 >/dev/null 2>&1 &
    load=$!
    sleep 3
    # shellcheck disable=SC2086  # no word at all when it is empty
    ctl detach d1 $kind
    wait "$load" || true
    wait_no_device /dev/xvda
    wait_footprint "$before"
done
step "again and again"
rounds=6
[ -z "$long" ] || rounds=100
for round in $(seq "$rounds"); do
    attach_self d1 "raw:$raw_disk" xvda
    dd if=/dev/xvda of=/dev/null bs=64k count=4 iflag=direct 2>/dev/null
    if [ $((round % 2)) = 0 ]; then ctl detach d1; else ctl detach d1 --force; fi
    wait_no_device /dev/xvda
done
wait_footprint "$before"
