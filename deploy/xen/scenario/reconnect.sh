#!/usr/bin/env bash
# tier: self
# limit: 240
# pending: not seen to pass yet
# Goal: a frontend that goes and comes again (another driver, a boot loader before the kernel, kexec) finds its disk each time, and
# a hundred connects leave nothing behind.
# Method: blkfront is unbound from the device and bound to it again, under reading in every tenth round.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

load_frontend
start_daemon
attach_self d1 "raw:$raw_disk" xvda
write_and_verify /dev/xvda
before=$(footprint)
for round in $(seq 100); do
    if [ $((round % 10)) = 0 ]; then
        dd if=/dev/xvda of=/dev/null bs=64k iflag=direct 2>/dev/null &
    fi
    echo vbd-51712 >/sys/bus/xen/drivers/vbd/unbind
    wait_no_device /dev/xvda
    wait || true
    echo vbd-51712 >/sys/bus/xen/drivers/vbd/bind
    wait_device /dev/xvda
done
verify_again /dev/xvda
note "after 100 connects: $(footprint); before: $before"
ctl detach d1
wait_no_device /dev/xvda
