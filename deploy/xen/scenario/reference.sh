#!/usr/bin/env bash
# tier: self
# limit: 300
# long: figures for people
# Goal: figures of Linux's own backend to compare ours with, and the proof that domain 0 can attach disks to itself and that
# nothing is left when one is removed.
# Method: blkback on a loop device over the raw disk, blkfront in the same domain; the job of compare.fio; removal; grants,
# ports and nodes are counted before and after.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

load_frontend
modprobe xen-blkback
before=$(footprint)
attach_loop "$raw_disk"
attach_by_blkback "$loop_device" xvda
step "connected: $(footprint)"
[ "$(footprint)" != "$before" ] || fail "the count of grants and ports does not see a connected disk: $before"
write_and_verify /dev/xvda
compare xvda blkback
remove_nodes 0 xvda vbd
wait_no_device /dev/xvda
wait_footprint "$before"
