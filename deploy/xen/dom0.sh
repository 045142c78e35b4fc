# What scenarios are written with: sourced by each of them in domain 0, never run.
#
# A scenario is over at its first command that fails, or at `fail REASON`; then, as at its good end, what it started is
# ended: guests, disks, the daemon, mounts. `wait_until` is the one way to wait, and has no limit but the scenario's: a busy
# machine makes everything slower, and only what never comes is an error. Numbers for people go through `note`.
#
# From run.sh: scenario (the name), log_dir, notes, patience and long (see there).
# shellcheck shell=bash disable=SC2154

set -eEuo pipefail
trap 'fail "line $LINENO of ${BASH_SOURCE[0]##*/}: $BASH_COMMAND"' ERR
trap 'end_scenario' EXIT
# The scenario's time is over.
trap 'fail "its time is over, and still not: ${waiting_for:-the end of a command}"' TERM

# A guest that gets its job from a pipe is known to what follows.
shopt -s lastpipe
PATH=/xen-test:$PATH
# The first disk is raw data, 1 GiB; the second one gets a file system where a scenario wants image files.
# shellcheck disable=SC2034  # for scenarios
raw_disk=/dev/vda
images_disk=/dev/vdb
run_dir=/run/blktapd
export BLKTAPD_CTL=$run_dir/ctl.sock
daemon=
guests=()
attached_loops=()
waiting_for=

# The reason must come out also where output is caught, hence the file.
fail() {
    trap - ERR TERM
    echo "FAILED: $*" >>"$log_dir/$scenario.log"
    exit 1
}

step() { echo "---- $(cut -d ' ' -f 1 /proc/uptime): $*"; }

note() { echo "$*" >>"$notes"; }

# wait_until WHAT COMMAND...: until the command succeeds; a daemon that is gone fails it
wait_until() {
    local looks=0
    waiting_for=$1
    until "${@:2}" >/dev/null 2>&1; do
        [ -z "$daemon" ] || kill -0 "$daemon" || fail "the daemon is gone, and still not: $1"
        looks=$((looks + 1))
        [ "$looks" != 100 ] || { step "waits: $1"; show_states; }
        sleep 0.1
    done
    waiting_for=
}

# Fails when the command succeeds; its output goes to the log.
refused() { if "$@"; then fail "was not refused: $*"; fi; }

# The states of both ends of all disks.
show_states() { { xenstore-ls -f /local/domain/0/backend; xenstore-ls -f /local/domain; } 2>/dev/null | grep -E '/(vbd3?)/.*/(state|online) = ' | sort -u; }

end_scenario() {
    local status=$? guest loop_device
    trap - ERR EXIT
    set +e
    [ "$status" -eq 0 ] || { step "the end, status $status; XenStore and messages:"; xenstore-ls -f -p /local/domain/0/backend; xenstore-ls -f -p /local/domain/0/device; dmesg | tail -n 20; }
    for guest in "${guests[@]}"; do
        cp "/var/log/xen/console/guest-$guest.log" "$log_dir/$scenario.$guest.log" 2>/dev/null
        cp "/var/log/xen/qemu-dm-$guest.log" "$log_dir/$scenario.$guest.qemu.log" 2>/dev/null
        xl destroy "$guest" 2>/dev/null
    done
    if [ -n "$daemon" ] && kill -0 "$daemon" 2>/dev/null; then
        ctl --json list 2>/dev/null | grep -o '"name": *"[^"]*"' | cut -d '"' -f 4 |
            while read -r disk; do blktapd ctl --timeout 5 detach "$disk" --force; done
        kill "$daemon"
    fi
    remove_all_nodes
    modprobe -r xen-blkfront 2>/dev/null
    modprobe -r xen-blkback 2>/dev/null
    for loop_device in "${attached_loops[@]}"; do losetup -d "$loop_device"; done
    umount /images 2>/dev/null
    [ -z "$daemon" ] || { sleep 0.5; kill -KILL "$daemon" 2>/dev/null; }
    rm -rf "$run_dir" /tmp/state
    exit "$status"
}

# ---- the daemon ----

# Starts blktapd with further options of `serve` and waits until it answers.
start_daemon() {
    mkdir -p "$run_dir"
    blktapd serve --run-dir "$run_dir" --state-dir /tmp/state --metrics 127.0.0.1:9680 --ram-limit 256M "$@" \
        >>"$log_dir/$scenario.daemon.log" 2>&1 </dev/null &
    daemon=$!
    wait_until "the daemon answers" ctl list
}

# Its commands have 30 s on an idle machine; ctl takes at most 600.
ctl() { blktapd ctl --timeout $((patience < 20 ? 30 * patience : 600)) "$@"; }

metrics() { wget -q -O - http://127.0.0.1:9680/metrics; }

# An ext4 file system at /images, for image files.
mount_images() {
    mkdir -p /images
    mke2fs -q -F -t ext4 "$images_disk"
    mount -t ext4 "$images_disk" /images
}

# ---- devices of domain 0 ----

# load_frontend [OPTION=VALUE...]: domain 0's own blkfront, with options of the module
load_frontend() {
    echo 1 >/sys/bus/xen/drivers_autoprobe
    modprobe -r xen-blkfront 2>/dev/null || true
    modprobe xen-blkfront "$@"
}

device_number() {
    local letter
    printf -v letter %d "'${1#xvd}"
    echo $((51712 + 16 * (letter - 97)))
}

frontend_of() { echo "/local/domain/$1/device/vbd/$(device_number "$2")"; }

# DOMAIN VDEV KIND
backend_of() { echo "/local/domain/0/backend/$3/$1/$(device_number "$2")"; }

# Attaches a disk to domain 0: NAME IMAGE VDEV, then options of `ctl attach`.
attach_self() {
    ctl attach "$1" "$2" --domain 0 --vdev "$3" "${@:4}"
    wait_device "/dev/$3"
}

has_size() { [ -b "$1" ] && [ "$(blockdev --getsize64 "$1")" -gt 0 ]; }
wait_device() { wait_until "$1 is there" has_size "$1"; }
is_gone() { [ ! -e "$1" ]; }
wait_no_device() { wait_until "$1 is gone" is_gone "$1"; }

node_is() { [ "$(xenstore-read "$1" 2>/dev/null)" = "$2" ]; }
wait_node() { wait_until "$1 is $2 (it is $(xenstore-read "$1" 2>/dev/null || echo absent))" node_is "$1" "$2"; }
# LEAST BACKEND: it has come so far
xenstore_state_from() { [ "$(xenstore-read "$2/state" 2>/dev/null || echo 0)" -ge "$1" ]; }
no_node() { ! xenstore-exists "$1"; }

# Both ends of a disk as a toolstack writes them: DOMAIN VDEV KIND MODE PARAMS [KEY VALUE...] (more keys of the backend)
write_nodes() {
    local domain=$1 front back pairs=()
    front=$(frontend_of "$1" "$2")
    back=$(backend_of "$1" "$2" "$3")
    # Nodes take after the permissions of the folder in which they are made.
    xenstore-write "$back" '' "$front" ''
    xenstore-chmod "$back" n0 "r$domain"
    xenstore-chmod "$front" "n$domain" r0
    set -- frontend "$front" frontend-id "$domain" online 1 removable 0 bootable 1 dev "$2" type "$3" mode "$4" \
        device-type disk params "$5" state 1 "${@:6}"
    while [ $# -gt 1 ]; do
        pairs+=("$back/$1" "$2")
        shift 2
    done
    set -- backend "$back" backend-id 0 virtual-device "${front##*/}" device-type disk state 1
    while [ $# -gt 1 ]; do
        pairs+=("$front/$1" "$2")
        shift 2
    done
    # One call is one transaction. It must be: a backend that finds no state of the frontend takes its domain for dead.
    xenstore-write "${pairs[@]}"
}

# DOMAIN VDEV KIND: asks for the removal as a toolstack does, waits for it, removes the nodes
remove_nodes() {
    local back
    back=$(backend_of "$1" "$2" "$3")
    xenstore-write "$back/online" 0 "$back/state" 5
    wait_node "$back/state" 6
    xenstore-rm "$(frontend_of "$1" "$2")" "$back"
}

# What a scenario that failed has left of domain 0's own disks.
remove_all_nodes() {
    local back
    for back in $(xenstore-ls -f /local/domain/0/backend | sed -n 's,^\(/local/domain/0/backend/[a-z0-9]*/0/[0-9]*\)/state = .*,\1,p'); do
        xenstore-write "$back/online" 0 "$back/state" 5
        sleep 1
        xenstore-rm "$back"
    done
    xenstore-rm /local/domain/0/device/vbd
} 2>/dev/null

# ---- what may be left behind ----

# Grants that are in use by somebody, by the hypervisor's own count: the entries that it prints, some time after it was asked.
used_grants() {
    local log=
    xl dmesg -c >/dev/null
    xl debug-keys g
    until [[ $log = *'gnttab_usage_print_all ] done'* ]]; do log+=$(xl dmesg -c)$'\n'; done
    grep -c '\[0x[0-9a-f]*\]  ' <<<"$log" || true
}

bound_ports() { lsevtchn 0 | grep -c Interdomain || true; }

# Without the folders of kinds and domains, which nobody removes.
disk_nodes() {
    { xenstore-ls -f /local/domain/0/backend; xenstore-ls -f /local/domain/0/device; } 2>/dev/null |
        grep -cE '^/local/domain/0/(backend/[a-z0-9]+/[0-9]+|device/vbd)/[0-9]' || true
}

footprint() { echo "$(used_grants) grants in use, $(bound_ports) bound ports, $(disk_nodes) nodes"; }

# Sets now.
footprint_is() {
    now=$(footprint)
    [ "$now" = "$1" ]
}

# wait_footprint BEFORE: nothing was left behind since
wait_footprint() {
    local looks=0
    until footprint_is "$1"; do
        waiting_for="the end of what was left behind: $now; before: $1"
        looks=$((looks + 1))
        [ "$looks" != 10 ] || step "waits: $waiting_for"
        sleep 0.5
    done
    waiting_for=
}

# ---- load ----

# Random writes of all sizes, read back and compared; the arguments are options of fio that say what is written.
verified_writes() {
    fio --name=verify "$@" --direct=1 --iodepth=16 --rw=randwrite --bsrange=4k-128k --size=24M --randrepeat=1 \
        --verify=crc32c --verify_fatal=1 --verify_state_save=0 --allow_mounted_write=1
}

# DEVICE or FILE, then further options of fio
write_and_verify() { verified_writes --ioengine=libaio --filename="$1" "${@:2}"; }

# The same content again, only read: the arguments of the call that wrote it
verify_again() { write_and_verify "$@" --verify_only=1; }

# Requests that the disk of a kernel's block device has completed: NAME like xvda; reads and writes
completed_requests() { awk '{ print $1 + $5 }' "/sys/block/$1/stat"; }

# Interrupts that blkfront got in domain 0, all disks and CPUs.
frontend_interrupts() {
    awk '/blkif/ { for (i = 2; i <= NF && $i ~ /^[0-9]+$/; i++) sum += $i } END { print sum + 0 }' /proc/interrupts
}

# Runs the job of compare.fio, section by section, on a block device of domain 0 and notes figures: NAME LABEL
compare() {
    local section requests interrupts out
    for section in read-4k-qd1 read-4k-qd32 write-4k-qd32 read-1m-qd4; do
        requests=$(completed_requests "$1") interrupts=$(frontend_interrupts)
        out=$(fio --minimal --filename="/dev/$1" --section="$section" /xen-test/compare.fio)
        requests=$(($(completed_requests "$1") - requests)) interrupts=$(($(frontend_interrupts) - interrupts))
        note "$2: $(awk -F ';' -v n="$requests" -v i="$interrupts" \
            '{ printf "%s: %d operations/s, %d MB/s, %.2f interrupts per request", $3, $8 + $49, ($7 + $48) / 1024, i / (n ? n : 1) }' <<<"$out")"
    done
}

# System calls of the daemon since `count_calls`, by the kernel's own histogram; they cost nothing in the daemon.
calls_of=/sys/kernel/tracing/events/raw_syscalls/sys_enter
calls_by=hist:keys=common_pid,id:size=4096
count_calls() { echo "$calls_by" >$calls_of/trigger; }

# Prints a line "NUMBER COUNT" for each system call that threads of the daemon made, and stops counting.
counted_calls() {
    cp $calls_of/hist /tmp/calls
    echo "!$calls_by" >$calls_of/trigger
    # Lines look like: { common_pid:  123, id:  16 } hitcount:  45
    awk -v threads="$(cd "/proc/$daemon/task" && echo *)" '
        BEGIN { split(threads, t, " "); for (i in t) ours[t[i]] = 1 }
        /hitcount:/ { gsub(/[{},]/, " "); if ($2 in ours) calls[$4] += $6 }
        END { for (id in calls) print id, calls[id] }' /tmp/calls
}

# ---- the reference: Linux's own backend ----

# A loop device over a file or block device: FILE; the device is in $loop_device.
attach_loop() {
    loop_device=$(losetup --find --show --direct-io=on "$1")
    attached_loops+=("$loop_device")
}

# The number of a block device as blkback reads it: DEVICE
device_hex() { printf '%x:%x' "0x$(stat -L -c %t "$1")" "0x$(stat -L -c %T "$1")"; }

# Serves a block device to domain 0 by blkback: DEVICE VDEV
attach_by_blkback() {
    modprobe xen-blkback
    write_nodes 0 "$2" vbd w "$1" physical-device "$(device_hex "$1")" hotplug-status connected
    wait_device "/dev/$2"
}

# ---- guests ----

# Starts a guest that runs the job on standard input (see guest-init.sh): NAME TYPE [DISK...], the type is pv, pvh or hvm; disks are
# written as for xl.
# guest_line adds words to its kernel's command line, guest_cpus sets its processors.
create_guest() {
    local name=$1 type=$2 disks='' disk
    shift 2
    for disk in "$@"; do disks+="'$disk',"; done
    mkdir -p "/tmp/$name"
    cat >"/tmp/$name/job"
    { cat /boot/guest.cpio; (cd "/tmp/$name" && echo job | cpio -o -H newc 2>/dev/null); } >"/tmp/$name.cpio"
    cat >"/tmp/$name.cfg" <<CONFIG
name = "$name"
type = "$type"
kernel = "/boot/vmlinuz"
ramdisk = "/tmp/$name.cpio"
memory = 256
vcpus = ${guest_cpus:-1}
extra = "console=hvc0 loglevel=6 mitigations=off rdinit=/init ${guest_line:-}"
disk = [$disks]
on_poweroff = "preserve"
on_crash = "preserve"
# Emulated processors report the intercept of RDTSCP wrongly.
tsc_mode = "native"
# Of the device model of HVM guests nothing is wanted but the disks.
vga = "none"
vnc = 0
nographic = 1
CONFIG
    rm -f "/var/log/xen/console/guest-$name.log"
    guests+=("$name")
    # -e: no process stays to watch the guest; scenarios do that.
    xl create -e -q "/tmp/$name.cfg"
    # shellcheck disable=SC2034  # for scenarios
    guest_id=$(xl domid "$name")
}

guest_log() { cat "/var/log/xen/console/guest-$1.log"; }
guest_said() { grep -qs "guest: $2" "/var/log/xen/console/guest-$1.log"; }

# wait_guest NAME WORDS: until the guest says them, or says that it failed
wait_guest() {
    wait_until "guest $1 says '$2'" guest_said_or_failed "$1" "$2"
    guest_said "$1" "$2" || fail "guest $1: $(guest_log "$1" | grep -E 'guest: FAILED|Kernel panic' | tail -n 1)"
}
guest_said_or_failed() { guest_said "$1" "$2" || guest_failed "$1"; }
guest_failed() { grep -qsE 'guest: FAILED|Kernel panic' "/var/log/xen/console/guest-$1.log"; }

# Its kernel has ended, and it waits to be destroyed.
is_shut_down() { xl list "$1" | awk 'NR == 2 { exit $5 !~ /s/ }'; }
wait_shut_down() { wait_until "guest $1 is shut down" is_shut_down "$1"; }

is_no_domain() { ! xl domid "$1"; }

# A guest's job on a new disk of its: DEVICE; makes a file system, writes, reads back from the disk, trims, checks.
filesystem_job() {
    cat <<JOB
disk=/dev/$1
JOB
    cat <<'JOB'
wait_until "$disk is there" test -b $disk
modprobe ext4
mkfs.ext4 -q -F $disk || fail "mkfs.ext4"
mount -t ext4 $disk /disk || fail "mount"
dd if=/dev/urandom of=/disk/a bs=64k count=128 conv=fsync 2>/dev/null || fail "write"
sum=$(md5sum </disk/a)
umount /disk || fail "umount"
echo 3 >/proc/sys/vm/drop_caches
mount -t ext4 $disk /disk || fail "second mount"
[ "$(md5sum </disk/a)" = "$sum" ] || fail "what was read is not what was written"
say "verified"
JOB
}

# And the trim, for backends that offer it.
trim_job() {
    cat <<'JOB'
rm /disk/a
sync
fstrim -v /disk || fail "fstrim"
umount /disk
e2fsck -fn $disk || fail "e2fsck"
say "trimmed and checked"
JOB
}
