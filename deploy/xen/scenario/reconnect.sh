#!/usr/bin/env bash
# tier: self
# limit: 180
# Goal: a frontend that goes and comes again (another driver, a boot loader before the kernel, kexec) finds its disk each time, and
# many connects leave nothing behind.
# Method: blkfront is unbound from the device, every third time while it reads. Linux never connects a device again that it has
# closed, so the frontend's directory is then made anew, and holds a new device for Linux; ours is the same all the time. Blkfront is
# bound to it when the backend waits for it, as it does at the start of a kernel: it gives a device up that it finds closed. Ten
# rounds, or a hundred with --long.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

load_frontend
start_daemon
attach_self d1 "raw:$raw_disk" xvda
write_and_verify /dev/xvda
before=$(footprint)
front=$(frontend_of 0 xvda)
back=$(backend_of 0 xvda vbd3)
device=vbd-$(device_number xvda)

rounds=10
[ -z "$long" ] || rounds=100
for round in $(seq "$rounds"); do
    step "round $round"
    if [ $((round % 3)) = 0 ]; then
        dd if=/dev/xvda of=/dev/null bs=64k count=1000 iflag=direct 2>/dev/null &
        reader=$!
    fi
    echo "$device" >/sys/bus/xen/drivers/vbd/unbind
    [ $((round % 3)) != 0 ] || wait "$reader" || true
    wait_no_device /dev/xvda
    wait_node "$back/state" 6
    xenstore-rm "$front"
    wait_until "Linux has forgotten the device" is_gone "/sys/bus/xen/devices/$device"
    echo 0 >/sys/bus/xen/drivers_autoprobe
    xenstore-write "$front/backend" "$back" "$front/backend-id" 0 "$front/virtual-device" "$(device_number xvda)" \
        "$front/device-type" disk "$front/state" 1
    wait_node "$back/state" 2
    wait_until "Linux has found the device" test -e "/sys/bus/xen/devices/$device"
    echo 1 >/sys/bus/xen/drivers_autoprobe
    echo "$device" >/sys/bus/xen/drivers/vbd/bind
    wait_device /dev/xvda
done
verify_again /dev/xvda
note "after $rounds connects: $(footprint); before: $before"
ctl detach d1
wait_no_device /dev/xvda
