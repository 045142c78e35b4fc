#!/usr/bin/env bash
# tier: pv
# limit: 300
# Goal: a guest that ends in the middle of its I/O leaves no grants, ports, nodes or open image, whatever attached its disk.
# Method: a guest with a disk of xl and one of ctl writes without end; xl destroy; once more with a guest that crashes itself,
# and once more with one that is paused, whose disk is then detached by force.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

mount_images
truncate -s 64M /images/a.raw /images/b.raw
start_daemon
before=$(footprint)

# What it does after it has written for a while comes from standard input.
busy_guest() {
    {
        cat <<'JOB'
wait_until "xvdb is there" test -b /dev/xvdb
for disk in xvda xvdb; do
    (while :; do dd if=/dev/zero of=/dev/$disk bs=64k oflag=direct 2>/dev/null; done) &
done
sleep 2
say "writing"
JOB
        cat
    } | create_guest "$1" pv 'vdev=xvda,access=rw,script=block-blktapd,target=raw:/images/a.raw'
    ctl attach b raw:/images/b.raw --domain "$guest_id" --vdev xvdb
    wait_guest "$1" writing
}
no_disks() { ! ctl --json list | grep -q '"name"'; }
nothing_is_left() {
    # What libxl did not write, libxl does not remove: that of ctl goes when the domain has gone.
    wait_footprint "$before"
    wait_until "no disk is left" no_disks
    blktapd image check raw:/images/a.raw
    blktapd image check raw:/images/b.raw
}

step "destroyed"
busy_guest g1 <<<'sleep 1000'
xl destroy g1
nothing_is_left

step "crashed"
busy_guest g2 <<<'echo c >/proc/sysrq-trigger'
is_crashed() { xl list g2 | awk 'NR == 2 { exit $5 !~ /c/ }'; }
wait_until "guest g2 has crashed" is_crashed
xl destroy g2
nothing_is_left

step "paused, detached by force"
busy_guest g3 <<<'sleep 1000'
xl pause g3
ctl detach b --force
xl destroy g3
nothing_is_left
