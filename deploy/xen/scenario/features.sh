#!/usr/bin/env bash
# tier: self
# limit: 360
# Goal: rings of 16 pages, several queues, requests of 1 MiB in one piece and persistent grants are in use, not only offered.
# Method: blkfront with the options that ask for them; its nodes; its counts of requests; grants that stay in use when
# nothing is in flight.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

load_frontend max_ring_page_order=4 max_indirect_segments=256 max_queues=2
start_daemon
before=$(footprint)
attach_self d1 "raw:$raw_disk" xvda
front=$(frontend_of 0 xvda)
xenstore-ls -f "$front"
wait_node "$front/ring-page-order" 4
wait_node "$front/multi-queue-num-queues" 2
wait_node "$front/feature-persistent" 1
for queue in 0 1; do
    xenstore-exists "$front/queue-$queue/ring-ref15" || fail "queue $queue has no ring of 16 pages"
    xenstore-exists "$front/queue-$queue/event-channel" || fail "queue $queue has no event channel"
done

step "both queues at once"
fio --name=both --filename=/dev/xvda --ioengine=libaio --direct=1 --iodepth=64 --numjobs=2 --cpus_allowed=0-1 \
    --cpus_allowed_policy=split --rw=randwrite --bs=4k --size=32M --offset_increment=64M --verify=crc32c --verify_fatal=1 \
    --verify_state_save=0

step "persistent grants: two rings of 16 pages are 32; the rest is data that stays mapped"
grants=$(used_grants)
note "$grants grants in use by an idle disk"
[ "$grants" -gt 64 ] || fail "an idle disk has $grants grants in use: none of data"

step "requests of 1 MiB"
[ "$(cat /sys/block/xvda/queue/max_segments)" -ge 256 ] || fail "blkfront sees $(cat /sys/block/xvda/queue/max_segments) segments"
requests=$(completed_requests xvda)
dd if=/dev/zero of=/dev/xvda bs=1M count=32 seek=256 oflag=direct
requests=$(($(completed_requests xvda) - requests))
[ "$requests" -eq 32 ] || fail "32 writes of 1 MiB were $requests requests"
write_and_verify /dev/xvda --bsrange=512k-1m

step "metrics"
ctl guests
metrics >/tmp/metrics
metric() { awk -v name="blktapd_guest_$1{" 'index($1, name) == 1 { print int($2) }' /tmp/metrics; }
[ "$(metric rings)" = 2 ] || fail "blktapd_guest_rings is '$(metric rings)'"
for name in indirect_requests_total segments_mapped_total persistent_pages; do
    note "blktapd_guest_$name is $(metric $name)"
    [ "$(metric $name)" -gt 0 ] || fail "blktapd_guest_$name is '$(metric $name)'"
done
ctl detach d1
wait_no_device /dev/xvda
wait_footprint "$before"
