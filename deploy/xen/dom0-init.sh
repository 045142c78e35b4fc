#!/bin/sh
# The first process of domain 0: brings up what Xen's tools need, runs /xen-test/run and switches the machine off.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mkdir -p /dev/pts /dev/shm /run/xen /run/lock /run/xenstored
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tracefs trace /sys/kernel/tracing
# Xen's scripts are written for bash, which opens these.
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
ln -s fd/1 /dev/stdout
ln -s fd/2 /dev/stderr

say() {
    read -r up _ </proc/uptime
    echo "[$up] dom0: $*"
}

say "$(uname -r) starts"
# What is loaded here serves every scenario. The two ends of block devices are loaded by the scenarios that want them.
for module in virtio_pci virtio_blk 9pnet_virtio 9p xen-evtchn xen-gntdev xen-gntalloc xen-privcmd xenfs loop ext4; do
    modprobe $module || say "module $module was not loaded"
done
ip link set lo up
mount -t xenfs xenfs /proc/xen || say "no xenfs: this is no Xen domain"
xenstored --pid-file /run/xenstored.pid || say "xenstored failed"
xen-init-dom0 || say "xen-init-dom0 failed"
xenconsoled --log=all --log-dir=/var/log/xen/console || say "xenconsoled failed"
if mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 share /mnt; then
    say "ready"
    bash /xen-test/run.sh
else
    say "the shared folder was not mounted"
fi
sync
say "done"
poweroff -f
