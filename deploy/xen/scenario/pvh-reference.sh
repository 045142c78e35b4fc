#!/usr/bin/env bash
# tier: pvh
# limit: 400
# long: it tests the emulator, not us
# Goal: a PVH guest works in the emulator at all.
# Method: as guest-reference does it.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

modprobe xen-blkback
before=$(footprint)
attach_loop "$raw_disk"
filesystem_job xvda | create_guest h1 pvh "phy:$loop_device,xvda,w"
wait_guest h1 verified
wait_shut_down h1
guest_log h1 | grep 'guest:'
xl destroy h1
wait_footprint "$before"
