#!/usr/bin/env bash
# tier: self
# limit: 300
# Goal: domain 0's own write-back does not lock up against the daemon that it depends on.
# Method: a file system on /dev/xvda, which is a qcow2 image on another one; with most of the memory in use, more pages are made
# dirty than there is memory left, so that the kernel must write to the disk to get on; then what was written is read from the disk.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

left_mib=160
pieces=40   # of 8 MiB

load_frontend
mount_images
start_daemon
blktapd image create qcow2:/images/d1.qcow2 400M
attach_self d1 qcow2:/images/d1.qcow2 xvda
mkfs.ext4 -q -F /dev/xvda
mkdir -p /tmp/disk
mount -t ext4 /dev/xvda /tmp/disk
dd if=/dev/urandom of=/tmp/piece bs=1M count=8 2>/dev/null
# tmpfs is memory.
mkdir -p /tmp/memory
mount -t tmpfs -o size=2G memory /tmp/memory
available() { awk '$1 == "MemAvailable:" { print int($2 / 1024) }' /proc/meminfo; }
dd if=/dev/zero of=/tmp/memory/filler bs=1M count=$(($(available) - left_mib)) 2>/dev/null
step "$(available) MiB are available"
for number in $(seq "$pieces"); do
    cat /tmp/piece >"/tmp/disk/$number" || fail "write $number"
done
sync
step "written"
umount /tmp/memory
echo 3 >/proc/sys/vm/drop_caches
for number in 1 $((pieces / 2)) "$pieces"; do
    cmp /tmp/piece "/tmp/disk/$number" || fail "file $number is not what was written"
done
umount /tmp/disk
ctl detach d1
wait_no_device /dev/xvda
