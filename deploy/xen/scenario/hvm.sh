#!/usr/bin/env bash
# tier: hvm
# limit: 600
# Goal: an HVM guest has one disk in two ways, and they agree: as an IDE disk of its device model, which is a client of the disk's NBD
# socket by the name that the script wrote, and by blkfront.
# Method: a guest that is told not to unplug its emulated disks writes in one way and reads in the other, and the other way round.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

mount_images
truncate -s 64M /images/h1.raw
start_daemon
before=$(footprint)
guest_line=xen_emul_unplug=unnecessary
create_guest h1 hvm 'vdev=xvda,access=rw,script=block-blktapd,target=raw:/images/h1.raw' <<'JOB'
modprobe sd_mod
modprobe ata_piix
for disk in sda xvda; do wait_until "$disk is there" test -b /dev/$disk; done
part=0
for pair in "sda xvda" "xvda sda"; do
    from=${pair% *} to=${pair#* }
    dd if=/dev/urandom of=/tmp/written bs=64k count=16 2>/dev/null
    dd if=/tmp/written of=/dev/$from bs=64k seek=$part oflag=direct conv=fsync 2>/dev/null || fail "write $from"
    dd if=/dev/$to of=/tmp/read bs=64k skip=$part count=16 iflag=direct 2>/dev/null || fail "read $to"
    cmp /tmp/written /tmp/read || fail "what $from wrote is not what $to reads"
    part=$((part + 16))
    say "$from to $to"
done
say "verified"
JOB
path=$(xenstore-read "$(backend_of "$guest_id" xvda vbd)/physical-device-path")
note "the device model has $path"
grep -o 'file=[^,]*' "/proc/$(xenstore-read "/local/domain/$guest_id/image/device-model-pid" || pidof xen-qemu-system-i386)/cmdline" || true
ctl list
wait_guest h1 verified
wait_shut_down h1
refused grep -q 'timeout closing device' /var/log/xen/console/guest-h1.log
xl destroy h1
wait_footprint "$before"
