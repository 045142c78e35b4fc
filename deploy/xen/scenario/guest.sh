#!/usr/bin/env bash
# tier: pv
# limit: 360
# Goal: a PV guest whose disk is in its configuration makes a file system, mounts, writes, verifies, trims, sees its disk
# grow, and shuts down without delay. Linux's backend is not loaded.
# Method: xl create with the script; the guest says what it has done; the time from its last word to its end; what is left.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

mount_images
truncate -s 64M /images/g1.raw
start_daemon
before=$(footprint)
guest_cpus=2
{
    filesystem_job xvda
    cat <<'JOB'
wait_until "$disk has grown" grep -qx 196608 /sys/block/xvda/size
resize2fs $disk || fail "resize2fs"
say "grown"
JOB
    trim_job
} | create_guest g1 pv 'vdev=xvda,access=rw,script=block-blktapd,target=raw:/images/g1.raw'
front=$(frontend_of "$guest_id" xvda)
xl block-list g1
wait_guest g1 verified
xenstore-ls -f "$front"
wait_node "$front/multi-queue-num-queues" 2
wait_node "$front/feature-persistent" 1

step "resize"
disk_name=$(ctl --json list | grep -o '"name": *"[^"]*"' | cut -d '"' -f 4 | head -n 1)
ctl resize "$disk_name" 96M
wait_guest g1 grown
wait_guest g1 "trimmed and checked"

step "shutdown"
wait_guest g1 "done"
began=$SECONDS
wait_shut_down g1
note "the guest was down $((SECONDS - began)) s after its last word"
# What blkfront says when its backend has not answered for five seconds.
refused grep -q 'timeout closing device' /var/log/xen/console/guest-g1.log
xl destroy g1
wait_footprint "$before"
e2fsck -fn /images/g1.raw
