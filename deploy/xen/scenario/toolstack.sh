#!/usr/bin/env bash
# tier: self
# limit: 180
# Goal: a disk whose nodes a toolstack writes (Xen 4.19 and newer with backendtype=tap, XAPI) is served and removed.
# Method: the nodes by hand, the script called as libxl does, first with our parameters, then with the `aio:` of older ones.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

load_frontend
start_daemon
before=$(footprint)
for params in "raw:$raw_disk" "aio:$raw_disk" "aio:raw:$raw_disk"; do
    step "$params"
    back=$(backend_of 0 xvda vbd3)
    script=/etc/xen/scripts/block-blktapd
    write_nodes 0 xvda vbd3 w "$params" script "$script"
    wait_until "the backend is in state 2 or further" xenstore_state_from 2 "$back"
    XENBUS_PATH=$back XENBUS_TYPE=vbd3 XENBUS_BASE_PATH=backend "$script" add
    wait_node "$back/hotplug-status" connected
    wait_device /dev/xvda
    path=$(xenstore-read "$back/physical-device-path")
    [ -S "$path" ] || fail "physical-device-path is no socket: $path"
    write_and_verify /dev/xvda
    remove_nodes 0 xvda vbd3
    XENBUS_PATH=$back XENBUS_TYPE=vbd3 XENBUS_BASE_PATH=backend "$script" remove
    wait_no_device /dev/xvda
    wait_footprint "$before"
done
