#!/usr/bin/env bash
# tier: self
# limit: 180
# pending: the counting of system calls by tracefs does not work in this kernel
# Goal: at 32 requests in flight at most 0.15 notifications, 0.15 ioctls and 0.5 system calls per request.
# Method: 4 KiB random reads by fio; interrupts counted by blkfront's kernel, calls by a histogram of the kernel's tracing.
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
mapfile -t calls < <(counted_calls)
requests=$(($(completed_requests xvda) - requests)) interrupts=$(($(frontend_interrupts) - interrupts))
note "$requests requests: $interrupts notifications, ${calls[0]} system calls, ${calls[1]} ioctls"
[ "$requests" -gt 1000 ] || fail "only $requests requests: too few to count"
[ $((interrupts * 100)) -le $((requests * 15)) ] || fail "$interrupts notifications for $requests requests"
[ $((calls[0] * 100)) -le $((requests * 50)) ] || fail "${calls[0]} system calls for $requests requests"
[ $((calls[1] * 100)) -le $((requests * 15)) ] || fail "${calls[1]} ioctls for $requests requests"
ctl detach d1
wait_no_device /dev/xvda
