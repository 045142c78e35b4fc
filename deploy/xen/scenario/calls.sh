#!/usr/bin/env bash
# tier: self
# limit: 240
# long: figures, which a busy machine changes
# Goal: at 32 requests in flight at most 0.15 notifications, 0.15 ioctls and 0.5 system calls per request of the ring.
# Method: 4 KiB random reads by fio; interrupts counted by blkfront's kernel, calls of all threads of the daemon by a histogram of the
# kernel's tracing. A RAM disk shows what the ring costs and is judged; the raw disk is only noted, because its requests come back one
# by one as the emulated disk completes them, and each return is a batch of its own.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

load_frontend
start_daemon
load() {
    fio --minimal --name=load --filename=/dev/xvda --ioengine=libaio --direct=1 --iodepth=32 --rw=randread --bs=4k --size=64M \
        --time_based --runtime="$1"
}
for image in 'ram:calls?size=64M' "raw:$raw_disk"; do
    kind=${image%%:*}
    attach_self d1 "$image" xvda
    # Persistent grants are mapped by then.
    load 4 >/dev/null
    requests=$(completed_requests xvda) interrupts=$(frontend_interrupts)
    count_calls
    load 4 >/dev/null
    counted_calls >/tmp/counts
    requests=$(($(completed_requests xvda) - requests)) interrupts=$(($(frontend_interrupts) - interrupts))
    step "$kind: system call's number, count"
    sort -k 2,2nr /tmp/counts
    # Numbers of x86-64: 16 is ioctl, 228 clock_gettime. The emulated processor has no steady counter, so that Linux must be called for
    # the time; elsewhere it is read without a call.
    calls=$(awk '$1 != 228 { sum += $2 } END { print sum + 0 }' /tmp/counts)
    ioctls=$(awk '$1 == 16 { sum += $2 } END { print sum + 0 }' /tmp/counts)
    clocks=$(awk '$1 == 228 { sum += $2 } END { print sum + 0 }' /tmp/counts)
    note "$kind: $requests requests: $interrupts notifications, $calls system calls ($ioctls of them ioctls), $clocks readings of the clock"
    [ "$requests" -gt 500 ] || fail "$kind: only $requests requests: too few to count"
    if [ "$kind" = ram ]; then
        [ $((interrupts * 100)) -le $((requests * 15)) ] || fail "$interrupts notifications for $requests requests"
        [ $((ioctls * 100)) -le $((requests * 15)) ] || fail "$ioctls ioctls for $requests requests"
        [ $((calls * 100)) -le $((requests * 50)) ] || fail "$calls system calls for $requests requests"
    fi
    ctl detach d1
    wait_no_device /dev/xvda
done
