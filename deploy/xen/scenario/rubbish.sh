#!/usr/bin/env bash
# tier: self
# limit: 180
# Goal: a frontend that writes rubbish into XenStore loses its own disk, with the reason in its nodes, and nothing else.
# Method: no blkfront; the frontend's nodes by hand, one wrong in each round; another disk is read over NBD all the time.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

modprobe -r xen-blkfront 2>/dev/null || true
start_daemon
ctl attach other 'ram:other?size=16M' --nbd
before=$(footprint)
front=$(frontend_of 0 xvda)
back=$(backend_of 0 xvda vbd3)
script=/etc/xen/scripts/block-blktapd
all=("multi-queue-num-queues 100000" "ring-ref rubbish" "ring-ref 4294967295" "event-channel 4294967295"
    "multi-queue-num-queues 0" "ring-page-order 31" "protocol pdp11-abi")
# Each is a unit test as well, and takes its time here.
[ -n "$long" ] || all=("${all[@]:0:3}")
for wrong in "${all[@]}"; do
    step "$wrong"
    write_nodes 0 xvda vbd3 w "raw:$raw_disk" script "$script"
    XENBUS_PATH=$back XENBUS_TYPE=vbd3 XENBUS_BASE_PATH=backend "$script" add
    wait_node "$back/state" 2
    xenstore-write "$front/ring-ref" 8 "$front/event-channel" 1 "$front/protocol" x86_64-abi
    xenstore-write "$front/${wrong% *}" "${wrong#* }"
    xenstore-write "$front/state" 3
    is_given_up() { [ "$(xenstore-read "$back/state")" -ge 5 ]; }
    wait_until "the backend closes" is_given_up
    kill -0 "$daemon" || fail "the daemon is gone"
    fio --name=other --ioengine=nbd --uri="nbd+unix:///other?socket=$run_dir/nbd/other.sock" --rw=randread --bs=4k --size=1M
    xenstore-write "$front/state" 6
    remove_nodes 0 xvda vbd3
    XENBUS_PATH=$back XENBUS_TYPE=vbd3 XENBUS_BASE_PATH=backend "$script" remove
    wait_footprint "$before"
done
