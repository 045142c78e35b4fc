#!/usr/bin/env bash
# tier: pvh
# limit: 400
# Goal: a PVH guest works with our disk.
# Method: as guest does it: a file system, a trim, a shutdown.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

mount_images
truncate -s 64M /images/h1.raw
start_daemon
before=$(footprint)
{ filesystem_job xvda; trim_job; } | create_guest h1 pvh 'vdev=xvda,access=rw,script=block-blktapd,target=raw:/images/h1.raw'
wait_guest h1 "trimmed and checked"
wait_shut_down h1
refused grep -q 'timeout closing device' /var/log/xen/console/guest-h1.log
xl destroy h1
wait_footprint "$before"
