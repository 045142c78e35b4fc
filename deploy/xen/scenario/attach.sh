#!/usr/bin/env bash
# tier: self
# limit: 240
# Goal: a disk in domain 0 by our own command: written, verified, flushed, discarded, removed; nothing is left.
# Method: the raw disk as /dev/xvda; fio and blkdiscard; what was written is read from the raw disk without blktapd.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

load_frontend
start_daemon
before=$(footprint)
attach_self d1 "raw:$raw_disk" xvda
xenstore-ls -f "$(frontend_of 0 xvda)"
xenstore-ls -f "$(backend_of 0 xvda vbd3)"
[ "$(blockdev --getsize64 /dev/xvda)" = "$(blockdev --getsize64 "$raw_disk")" ] || fail "the sizes differ"

step "flush is offered and used"
grep -q 'write back' /sys/block/xvda/queue/write_cache || fail "blkfront sees no write cache, so it sends no flush"
write_and_verify /dev/xvda --fsync=16

step "discard"
[ "$(cat /sys/block/xvda/queue/discard_max_bytes)" -gt 0 ] || fail "blkfront sees no discard"
dd if=/dev/urandom of=/dev/xvda bs=1M seek=64 count=4 oflag=direct
blkdiscard --offset 64M --length 4M /dev/xvda
dd if=/dev/xvda bs=1M skip=64 count=4 iflag=direct | cmp -n 4194304 - /dev/zero || fail "discarded blocks are not zero"

ctl stats d1
ctl detach d1
wait_no_device /dev/xvda
wait_footprint "$before"
step "the raw disk itself"
verify_again "$raw_disk"
