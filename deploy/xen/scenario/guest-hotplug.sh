#!/usr/bin/env bash
# tier: pv
# limit: 360
# Goal: disks are plugged into a running guest and out of it, by xl with the script and by our own command, with nothing left.
# Method: the guest writes and verifies each new disk, and waits until it is gone.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

mount_images
truncate -s 32M /images/g1.raw
blktapd image create qcow2:/images/hot.qcow2 32M
blktapd image create vhd:/images/hot.vhd 32M
start_daemon
create_guest g1 pv 'vdev=xvda,access=rw,script=block-blktapd,target=raw:/images/g1.raw' <<'JOB'
wait_until "xvda is there" test -b /dev/xvda
dd if=/dev/xvda of=/dev/null bs=64k count=16 iflag=direct 2>/dev/null || fail "read xvda"
say "ready"
for name in xvdb xvdc; do
    disk=/dev/$name
    wait_until "$disk is there" test -b $disk
    dd if=/dev/urandom of=/tmp/written bs=64k count=32 2>/dev/null
    dd if=/tmp/written of=$disk bs=64k oflag=direct conv=fsync 2>/dev/null || fail "write $disk"
    dd if=$disk of=/tmp/read bs=64k count=32 iflag=direct 2>/dev/null || fail "read $disk"
    cmp /tmp/written /tmp/read || fail "$disk: what was read is not what was written"
    say "$name verified"
    wait_until "$disk is gone" test ! -b $disk
    say "$name gone"
done
# It stays until it is asked to go: xvda belongs to what is counted.
sleep 10000
JOB
wait_guest g1 ready
before=$(footprint)

step "xl"
xl block-attach g1 'vdev=xvdb,access=rw,script=block-blktapd,target=qcow2:/images/hot.qcow2'
wait_guest g1 "xvdb verified"
began=$SECONDS
xl block-detach g1 xvdb
note "xl block-detach took $((SECONDS - began)) s"
wait_guest g1 "xvdb gone"
wait_footprint "$before"

step "ctl"
ctl attach hot vhd:/images/hot.vhd --domain "$guest_id" --vdev xvdc
wait_guest g1 "xvdc verified"
ctl detach hot
wait_guest g1 "xvdc gone"
wait_footprint "$before"

step "shutdown"
xl shutdown g1
wait_shut_down g1
refused grep -q 'timeout closing device' /var/log/xen/console/guest-g1.log
xl destroy g1
blktapd image check qcow2:/images/hot.qcow2
blktapd image check vhd:/images/hot.vhd
