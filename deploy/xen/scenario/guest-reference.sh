#!/usr/bin/env bash
# tier: pv
# limit: 240
# long: it tests the emulator, not us
# Goal: a PV guest works in the emulator at all: what fails in the other scenarios is then ours.
# Method: the guest's disk is a loop device that Linux's own backend serves; a file system, a trim, a shutdown.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

modprobe xen-blkback
before=$(footprint)
attach_loop "$raw_disk"
{ filesystem_job xvda; trim_job; } | create_guest g1 pv "phy:$loop_device,xvda,w"
wait_guest g1 "trimmed and checked"
wait_shut_down g1
guest_log g1 | grep 'guest:'
refused grep -q 'timeout closing device' /var/log/xen/console/guest-g1.log
xl destroy g1
wait_footprint "$before"
