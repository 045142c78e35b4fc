#!/usr/bin/env bash
# tier: self
# Goal: a disk grows while it is in use.
# Method: a file as /dev/xvda, grown by ctl under load; the new end is written and verified.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

load_frontend
mount_images
truncate -s 64M /images/d1
start_daemon
attach_self d1 raw:/images/d1 xvda
write_and_verify /dev/xvda &
load=$!
ctl resize d1 96M
is_grown() { [ "$(blockdev --getsize64 /dev/xvda)" -eq $((96 << 20)) ]; }
wait_until "/dev/xvda has 96 MiB" is_grown
wait "$load"
write_and_verify /dev/xvda --offset=64M
verify_again /dev/xvda
ctl detach d1
wait_no_device /dev/xvda
