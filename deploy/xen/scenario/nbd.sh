#!/usr/bin/env bash
# tier: self
# limit: 240
# Goal: blktapd runs in a Xen domain at all: io_uring, O_DIRECT on a paravirtual disk, RAM disks, its sockets.
# Method: a raw disk and a RAM disk over NBD, written and verified by fio; then the raw disk is read without blktapd.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

over_nbd() { verified_writes --ioengine=nbd --uri="nbd+unix:///$1?socket=$run_dir/nbd/$1.sock"; }

start_daemon
ctl attach raw "raw:$raw_disk" --nbd
ctl attach ram 'ram:test?size=64M' --nbd
for disk in raw ram; do
    step "$disk"
    over_nbd "$disk"
done
ctl list
ctl detach raw
ctl detach ram
step "the raw disk itself"
verify_again "$raw_disk"
