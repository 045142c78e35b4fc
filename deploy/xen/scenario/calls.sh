#!/usr/bin/env bash
# tier: self
# limit: 180
# Goal: at 32 requests in flight at most 0.15 notifications, 0.15 ioctls and 0.5 system calls per request.
# Method: 4 KiB random reads by fio; interrupts counted by blkfront's kernel, calls of all threads of the daemon by a histogram of the
# kernel's tracing.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

load_frontend
start_daemon
attach_self d1 "raw:$raw_disk" xvda
load() {
    fio --minimal --name=load --filename=/dev/xvda --ioengine=libaio --direct=1 --iodepth=32 --rw=randread --bs=4k --size=256M \
        --time_based --runtime="$1"
}
# Persistent grants are mapped by then.
load 5 >/dev/null
requests=$(completed_requests xvda) interrupts=$(frontend_interrupts)
count_calls
load 5 >/dev/null
counted_calls >/tmp/counts
requests=$(($(completed_requests xvda) - requests)) interrupts=$(($(frontend_interrupts) - interrupts))
echo "system call's number, count:"
sort -k 2,2nr /tmp/counts
calls=$(awk '{ sum += $2 } END { print sum + 0 }' /tmp/counts)
# ioctl is number 16 on x86-64.
ioctls=$(awk '$1 == 16 { sum += $2 } END { print sum + 0 }' /tmp/counts)
note "$requests requests: $interrupts notifications, $calls system calls, $ioctls ioctls"
[ "$requests" -gt 1000 ] || fail "only $requests requests: too few to count"
[ $((interrupts * 100)) -le $((requests * 15)) ] || fail "$interrupts notifications for $requests requests"
[ $((calls * 100)) -le $((requests * 50)) ] || fail "$calls system calls for $requests requests"
[ $((ioctls * 100)) -le $((requests * 15)) ] || fail "$ioctls ioctls for $requests requests"
ctl detach d1
wait_no_device /dev/xvda
