#!/usr/bin/env bash
# tier: pv
# limit: 300
# Goal: a live snapshot under a guest that verifies what it reads is not noticed by it.
# Method: the guest writes numbered blocks and reads all of them back in rounds; overlays are put on its disk meanwhile.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

mount_images
blktapd image create qcow2:/images/g1.qcow2 32M
start_daemon
create_guest g1 pv 'vdev=xvda,access=rw,script=block-blktapd,target=qcow2:/images/g1.qcow2' <<'JOB'
wait_until "xvda is there" test -b /dev/xvda
for round in 1 2 3 4 5 6; do
    dd if=/dev/urandom of=/tmp/$round bs=64k count=32 2>/dev/null
    dd if=/tmp/$round of=/dev/xvda bs=64k seek=$((round * 32)) oflag=direct 2>/dev/null || fail "write $round"
    for old in $(seq $round); do
        dd if=/dev/xvda of=/tmp/read bs=64k skip=$((old * 32)) count=32 iflag=direct 2>/dev/null || fail "read $old"
        cmp /tmp/$old /tmp/read || fail "round $round: block $old is not what was written"
    done
    say "round $round"
done
say "verified"
JOB
disk_name=$(ctl --json list | grep -o '"name": *"[^"]*"' | cut -d '"' -f 4 | head -n 1)
for round in 1 3; do
    wait_guest g1 "round $round"
    ctl snapshot "$disk_name" "qcow2:/images/g1.$round.qcow2"
done
wait_guest g1 verified
wait_shut_down g1
xl destroy g1
for image in g1 g1.1 g1.3; do blktapd image check "qcow2:/images/$image.qcow2"; done
