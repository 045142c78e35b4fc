#!/usr/bin/env bash
# tier: self
# limit: 240
# Goal: a frontend that knows nothing but the first version of the protocol is served.
# Method: blkfront without persistent grants, with one queue, one page and as few segments as it can.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

load_frontend max_ring_page_order=0 max_indirect_segments=0 max_queues=1 feature_persistent=0
start_daemon
before=$(footprint)
attach_self d1 "raw:$raw_disk" xvda
front=$(frontend_of 0 xvda)
xenstore-exists "$front/ring-ref" || fail "there is no single ring-ref"
refused xenstore-exists "$front/multi-queue-num-queues"
write_and_verify /dev/xvda
grants=$(used_grants)
note "$grants grants in use by an idle disk"
ctl detach d1
wait_no_device /dev/xvda
wait_footprint "$before"
