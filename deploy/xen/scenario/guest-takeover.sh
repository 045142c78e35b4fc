#!/usr/bin/env bash
# tier: pv
# limit: 300
# Goal: with Linux's backend loaded the script takes a disk over from it, in the configuration and hot, while other disks stay
# with Linux's backend.
# Method: a guest with two processors (so that its frontend may have begun with several queues), one disk of each kind, and a
# third one plugged in while it runs.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

mount_images
truncate -s 32M /images/a.raw /images/c.raw
modprobe xen-blkback
start_daemon
before=$(footprint)
attach_loop "$raw_disk"
guest_cpus=2
create_guest g1 pv 'vdev=xvda,access=rw,script=block-blktapd,target=raw:/images/a.raw' "phy:$loop_device,xvdb,w" <<'JOB'
for name in xvda xvdb xvdc; do
    disk=/dev/$name
    wait_until "$disk is there" test -b $disk
    dd if=/dev/urandom of=/tmp/written bs=64k count=32 2>/dev/null
    dd if=/tmp/written of=$disk bs=64k oflag=direct conv=fsync 2>/dev/null || fail "write $disk"
    dd if=$disk of=/tmp/read bs=64k count=32 iflag=direct 2>/dev/null || fail "read $disk"
    cmp /tmp/written /tmp/read || fail "$disk: what was read is not what was written"
    say "$name verified"
done
JOB
wait_guest g1 "xvdb verified"
[ -e "/sys/bus/xen-backend/drivers/vbd/vbd-$guest_id-$(device_number xvdb)" ] || fail "Linux's backend lost its disk"
xl block-attach g1 'vdev=xvdc,access=rw,script=block-blktapd,target=raw:/images/c.raw'
wait_guest g1 "xvdc verified"
wait_shut_down g1
xl destroy g1
wait_footprint "$before"
