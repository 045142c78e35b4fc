#!/usr/bin/env bash
# tier: self
# limit: 300
# Goal: a live snapshot under a disk that verifies what it reads is not noticed, and holds what was there.
# Method: a qcow2 disk with known content in its second half; fio writes and verifies in the first half while three overlays
# are put on top of each other.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

load_frontend
mount_images
start_daemon
blktapd image create qcow2:/images/d1.qcow2 128M
attach_self d1 qcow2:/images/d1.qcow2 xvda
write_and_verify /dev/xvda --offset=64M
write_and_verify /dev/xvda --loops=4 &
load=$!
for number in 1 2 3; do
    sleep 2
    ctl snapshot d1 "qcow2:/images/d1.$number.qcow2"
done
wait "$load"
verify_again /dev/xvda --offset=64M
ctl detach d1
wait_no_device /dev/xvda
for image in d1 d1.1 d1.2 d1.3; do blktapd image check "qcow2:/images/$image.qcow2"; done
