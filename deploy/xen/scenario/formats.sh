#!/usr/bin/env bash
# tier: self
# limit: 360
# Goal: VHD and qcow2 disks, with an image below, work for blkfront as raw ones do.
# Method: images made by `blktapd image`, written and verified as /dev/xvda, then checked and compared offline.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

load_frontend
mount_images
start_daemon
for format in vhd qcow2; do
    step "$format"
    blktapd image create "$format:/images/base.$format" 64M
    attach_self d1 "$format:/images/base.$format" xvda
    write_and_verify /dev/xvda
    ctl detach d1
    wait_no_device /dev/xvda

    step "$format over another image"
    blktapd image snapshot "$format:/images/base.$format" "$format:/images/top.$format"
    attach_self d1 "$format:/images/top.$format" xvda
    verify_again /dev/xvda
    mkfs.ext4 -q -F /dev/xvda
    e2fsck -fn /dev/xvda
    ctl detach d1
    wait_no_device /dev/xvda
    blktapd image check "$format:/images/base.$format"
    blktapd image check "$format:/images/top.$format"
done
