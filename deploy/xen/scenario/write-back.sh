#!/usr/bin/env bash
# tier: self
# limit: 360
# pending: not seen to pass yet
# Goal: domain 0's own write-back does not lock up against the daemon that it depends on.
# Method: a file system on /dev/xvda, which is a qcow2 image on another one; more dirty pages than the kernel lets be are
# written, with most of the memory in use; what was written is read back from the disk.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

load_frontend
mount_images
start_daemon
blktapd image create qcow2:/images/d1.qcow2 800M
attach_self d1 qcow2:/images/d1.qcow2 xvda
mkfs.ext4 -q -F /dev/xvda
mkdir -p /tmp/disk
mount -t ext4 /dev/xvda /tmp/disk
# tmpfs is memory: about what is left but 256 MiB.
mkdir -p /tmp/memory
mount -t tmpfs -o size=2G memory /tmp/memory
available=$(awk '$1 == "MemAvailable:" { print int($2 / 1024) }' /proc/meminfo)
dd if=/dev/zero of=/tmp/memory/filler bs=1M count=$((available - 256)) 2>/dev/null
dd if=/dev/urandom of=/tmp/piece bs=1M count=8 2>/dev/null
for number in $(seq 64); do
    cat /tmp/piece >"/tmp/disk/$number" || fail "write $number"
done
sync
umount /tmp/memory
echo 3 >/proc/sys/vm/drop_caches
for number in 1 32 64; do cmp /tmp/piece /tmp/disk/$number || fail "file $number is not what was written"; done
umount /tmp/disk
ctl detach d1
wait_no_device /dev/xvda
