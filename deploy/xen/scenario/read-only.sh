#!/usr/bin/env bash
# tier: self
# Goal: a read-only disk is one to blkfront, and no write gets through.
# Method: attach read-only; write with and without blkfront's own check; compare the raw disk.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

load_frontend
start_daemon
dd if=/dev/urandom of="$raw_disk" bs=1M count=2 oflag=direct
sum=$(head -c 2097152 "$raw_disk" | md5sum)
attach_self d1 "raw:$raw_disk" xvda --read-only
[ "$(blockdev --getro /dev/xvda)" = 1 ] || fail "blkfront takes it for writable"
refused dd if=/dev/zero of=/dev/xvda bs=4k count=1 oflag=direct
# The kernel lets go of its own check; what comes then is for the backend to refuse.
if blockdev --setrw /dev/xvda; then
    refused dd if=/dev/zero of=/dev/xvda bs=4k count=1 oflag=direct
fi
[ "$(dd if=/dev/xvda bs=1M count=2 iflag=direct | md5sum)" = "$sum" ] || fail "what is read is not what is there"
ctl detach d1
wait_no_device /dev/xvda
[ "$(head -c 2097152 "$raw_disk" | md5sum)" = "$sum" ] || fail "the raw disk was changed"
