#!/bin/sh
# The first process of a guest: runs /job, which the scenario wrote, and switches the guest off. What the job says goes to the
# guest's console, which domain 0 logs; see `create_guest` in dom0.sh.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
mkdir -p /disk

# Lines that scenarios wait for.
say() {
    read -r up _ </proc/uptime
    echo "guest: $* [$up]"
}

fail() {
    say "FAILED: $*"
    poweroff -f
}

# wait_until WHAT COMMAND...: the scenario outside has a limit
wait_until() {
    say "waits: $1"
    shift
    until "$@" >/dev/null 2>&1; do sleep 0.2; done
}

# What Xen's tools start when they ask for a shutdown.
cat >/usr/sbin/poweroff.asked <<'SCRIPT'
#!/bin/sh
echo "guest: asked to shut down"
umount -a -t ext4
/bin/busybox poweroff -f
SCRIPT
chmod 755 /usr/sbin/poweroff.asked
echo /usr/sbin/poweroff.asked >/proc/sys/kernel/poweroff_cmd

# What the kernel says until the end shows on the console, such as a disk that does not close in time.
dmesg -n 7
say "starts: $(uname -r)"
modprobe xen-blkfront || fail "xen-blkfront was not loaded"
# shellcheck source=/dev/null
. /job
say "done"
poweroff -f
