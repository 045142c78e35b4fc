#!/usr/bin/env bash
# Sets blktapd up and shows it at work: installs packages, builds, starts the daemon, serves a raw image and a RAM disk to
# real clients, checks every byte that comes back, and leaves the daemon running.
#
#   deploy/quickstart.sh             the daemon in the background, as this user
#   deploy/quickstart.sh --system    installs the program and the systemd service, and starts that
#   deploy/quickstart.sh --stop      stops the daemon that an earlier run left in the background
#
# Options: --run-dir DIR      sockets (default: /run/blktapd for root, else $XDG_RUNTIME_DIR/blktapd)
#          --state-dir DIR    attachments and demonstration images (default: /var/lib/blktapd for root, else
#                             ~/.local/state/blktapd; DIR/state when --run-dir is given)
#          --metrics ADDR     where Prometheus may ask (default: 127.0.0.1:9680)
#          --binary FILE      use this program instead of building one
#          --no-packages      install nothing
# The first three are not for --system: the service reads /etc/blktapd/blktapd.toml.
#
# It may be run again: a daemon that runs is used, disks that are attached stay.

set -euo pipefail
# shellcheck source=deploy/paths.sh
. "$(dirname "${BASH_SOURCE[0]}")/paths.sh"

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

run_dir='' state_dir='' metrics='' binary='' packages=yes system='' stop=''
while [ $# -gt 0 ]; do
    case $1 in
    --run-dir | --state-dir | --metrics | --binary)
        [ $# -ge 2 ] || die "$1 needs a value; see --help"
        name=${1#--}
        printf -v "${name//-/_}" '%s' "$2"
        shift
        ;;
    --system) system=yes ;;
    --stop) stop=yes ;;
    --no-packages) packages='' ;;
    -h | --help) usage; exit ;;
    *) die "unknown option '$1'; see --help" ;;
    esac
    shift
done

is_root() { [ "$(id -u)" = 0 ]; }

# The service takes them from its configuration; a demonstration beside it would ask the wrong sockets.
[ -z "$system" ] || [ -z "$run_dir$state_dir$metrics" ] ||
    die "--system takes no --run-dir, --state-dir or --metrics: the service reads /etc/blktapd/blktapd.toml"
metrics=${metrics:-127.0.0.1:9680}

if [ -n "$run_dir" ]; then
    state_dir=${state_dir:-$run_dir/state}
elif is_root || [ -n "$system" ]; then
    run_dir=/run/blktapd state_dir=${state_dir:-/var/lib/blktapd}
else
    run_dir=${XDG_RUNTIME_DIR:-/tmp/blktapd-$(id -u)}/blktapd
    state_dir=${state_dir:-${XDG_STATE_HOME:-$HOME/.local/state}/blktapd}
fi
demo_dir=$state_dir/quickstart
pid_file=$run_dir/quickstart.pid
log_file=$demo_dir/blktapd.log
disk_size=256M

bold='' plain=''
[ -t 1 ] && bold=$'\e[1m' plain=$'\e[0m'
step=0
title() {
    step=$((step + 1))
    printf '\n%s%d. %s%s\n' "$bold" "$step" "$*" "$plain"
}
# Shows a command as the reader would type it, then runs it.
show() {
    printf '   $'
    local word
    for word in "$@"; do
        [ "$word" = "$blktapd" ] && word=blktapd
        [[ $word =~ ^[A-Za-z0-9_./:=,+@%-]+$ ]] || word="'$word'"
        printf ' %s' "$word"
    done
    printf '\n'
    "$@" 2>&1 | sed "s/^/     /" || die "the command above failed"
}
note() { printf '   %s\n' "$*"; }

export BLKTAPD_CTL=$run_dir/ctl.sock
ctl() { "$blktapd" ctl --timeout 30 "$@"; }

# ---- the daemon ----

# The daemon that an earlier run left, by its number, and only while that number still is this program.
our_daemon() {
    local pid
    pid=$(cat "$pid_file" 2>/dev/null) || return 1
    [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = blktapd ] && printf '%s' "$pid"
}

stop_daemon() {
    local pid waited=0
    if ! pid=$(our_daemon); then
        note "no daemon of an earlier run is in $run_dir"
        ! systemctl --quiet is-active blktapd.service 2>/dev/null || note "the service runs: systemctl stop blktapd ends it"
        return 0
    fi
    kill -TERM "$pid"
    while kill -0 "$pid" 2>/dev/null; do
        [ "$waited" -lt 600 ] || die "the daemon (process $pid) did not stop within a minute; its log is $log_file"
        waited=$((waited + 1))
        sleep 0.1
    done
    rm -f "$pid_file"
    note "the daemon (process $pid) has stopped"
}

build() {
    if [ -n "$binary" ]; then
        blktapd=$(realpath "$binary")
        [ -x "$blktapd" ] || die "--binary $binary: no such program"
        note "using $blktapd"
        return
    fi
    note "cargo build --release (minutes the first time)"
    (cd "$repo_dir" && cargo build --release --locked --quiet --bin blktapd) ||
        die "the build failed; what cargo said is above"
    blktapd=$target_dir/release/blktapd
    note "built $blktapd"
}

# So that the commands that are printed can be typed as they are.
link_program() {
    local link=/usr/local/bin/blktapd
    [ "$run_dir" = /run/blktapd ] && is_root || return 0
    if [ ! -e "$link" ] || [ -L "$link" ]; then
        ln -sfn "$blktapd" "$link"
        note "linked as $link"
    fi
}

start_in_background() {
    if ctl list >/dev/null 2>&1; then
        note "a daemon answers on $BLKTAPD_CTL already; using it (deploy/quickstart.sh --stop ends one of an earlier run)"
        return
    fi
    mkdir -p "$run_dir" "$demo_dir" || die "cannot make $run_dir and $demo_dir: run this as root or say --run-dir"
    [ -O "$run_dir" ] || die "$run_dir belongs to somebody else: say another --run-dir"
    local options=(--run-dir "$run_dir" --state-dir "$state_dir" --metrics "$metrics")
    setsid "$blktapd" serve "${options[@]}" \
        </dev/null >>"$log_file" 2>&1 &
    local pid=$! waited=0
    printf '%s\n' "$pid" >"$pid_file"
    until ctl list >/dev/null 2>&1; do
        if ! kill -0 "$pid" 2>/dev/null; then
            rm -f "$pid_file"
            tail -n 20 "$log_file" >&2
            die "the daemon ended at once; the end of its log $log_file is above. blktapd doctor checks the host"
        fi
        [ "$waited" -lt 300 ] || die "the daemon (process $pid) does not answer on $BLKTAPD_CTL after 30 s; see $log_file"
        waited=$((waited + 1))
        sleep 0.1
    done
    note "process $pid; its log is $log_file"
}

start_as_service() {
    is_root || die "--system installs a service: run it as root"
    [ -d /run/systemd/system ] || die "--system needs systemd as this machine's init, which it is not; leave the option out"
    ! our_daemon >/dev/null || die "a daemon of an earlier run has $run_dir: end it first (deploy/quickstart.sh --stop)"
    rm -f /usr/local/bin/blktapd
    install -m 755 "$blktapd" /usr/local/bin/blktapd
    install -D -m 644 "$repo_dir/deploy/systemd/blktapd.service" /etc/systemd/system/blktapd.service
    install -D -m 644 "$repo_dir/deploy/systemd/blktapd.socket" /etc/systemd/system/blktapd.socket
    install -D -m 644 "$repo_dir/deploy/systemd/blktapd.sysusers" /etc/sysusers.d/blktapd.conf
    install -D -m 644 "$repo_dir/deploy/systemd/blktapd.tmpfiles" /etc/tmpfiles.d/blktapd.conf
    [ -e /etc/blktapd/blktapd.toml ] ||
        install -D -m 644 "$repo_dir/deploy/blktapd.toml" /etc/blktapd/blktapd.toml
    systemd-sysusers /etc/sysusers.d/blktapd.conf
    systemd-tmpfiles --create /etc/tmpfiles.d/blktapd.conf
    systemctl daemon-reload
    systemctl enable --quiet blktapd.service
    systemctl restart blktapd.service ||
        die "the service did not start: systemctl status blktapd; journalctl -u blktapd"
    blktapd=/usr/local/bin/blktapd
    note "blktapd.service is running and starts with the machine"
}

# ---- what it shows ----

uri() { printf 'nbd+unix:///%s?socket=%s/nbd/%s.sock' "$1" "$run_dir" "$1"; }

digest() { sha256sum "$1" | cut -d ' ' -f 1; }

expect_same() {
    [ "$(digest "$1")" = "$(digest "$2")" ] || die "$2 differs from $1: what was read is not what was written"
}

make_images() {
    mkdir -p "$demo_dir"
    # The files of this checkout, as something real to keep on a disk.
    rm -rf "$demo_dir/files" "$demo_dir/filesystem.img"
    mkdir "$demo_dir/files"
    # Without what was built, which may lie in a folder of another name.
    tar -C "$repo_dir" --exclude-vcs --exclude=./target --exclude=".${target_dir#"$repo_dir"}" -cf - . |
        tar -C "$demo_dir/files" -xf -
    truncate -s "$disk_size" "$demo_dir/filesystem.img"
    mke2fs -q -t ext4 -L quickstart -d "$demo_dir/files" "$demo_dir/filesystem.img"
    rm -rf "$demo_dir/files"
    # Kept if it is there: it may be attached.
    [ -e "$demo_dir/disk.img" ] || truncate -s "$disk_size" "$demo_dir/disk.img"
    note "$demo_dir/filesystem.img: ext4 with the files of this checkout"
    note "$demo_dir/disk.img: $disk_size, raw"
}

copy_file_system() {
    local disk=$1 copy=$demo_dir/$1.copy
    show nbdcopy --flush "$demo_dir/filesystem.img" "$(uri "$disk")"
    rm -f "$copy"
    show nbdcopy "$(uri "$disk")" "$copy"
    expect_same "$demo_dir/filesystem.img" "$copy"
    e2fsck -fn "$copy" >"$copy.fsck" 2>&1 || die "e2fsck found faults in the copy of $disk: see $copy.fsck"
    note "read back from $disk: the same SHA-256 ($(digest "$copy" | cut -c 1-16)…), and e2fsck finds no fault"
    rm -f "$copy" "$copy.fsck"
}

# Runs fio against a disk (disk, then fio's options) and prints its report in JSON. fio writes messages to its standard
# output, so the report goes to a file.
fio_job() {
    local disk=$1 report=$demo_dir/fio.json
    shift
    fio --name="$disk" --ioengine=nbd --uri="$(uri "$disk")" --verify_state_save=0 --output-format=json --output="$report" \
        "$@" >"$demo_dir/fio.log" 2>&1 || { cat "$demo_dir/fio.log" >&2; die "fio failed on $disk"; }
    cat "$report"
}

verify_with_fio() {
    local report
    note "fio writes 64 MiB in random order, 4 to 64 KiB each, 16 in flight, and verifies every block by its checksum:"
    report=$(fio_job ram1 --rw=randwrite --bsrange=4k-64k --size=64M --iodepth=16 --verify=crc32c --do_verify=1 \
        --verify_fatal=1)
    jq -e '.jobs[0].error == 0' <<<"$report" >/dev/null || die "fio reports an error on ram1: $(jq -c '.jobs[0].error' <<<"$report")"
    jq -r '.jobs[0] | "     written \(.write.io_bytes / 1048576 | floor) MiB, verified \(.read.io_bytes / 1048576 | floor) MiB, errors \(.error)"' <<<"$report"
}

# Reads at random for some seconds and prints operations per second.
measured_iops() {
    fio_job d1 --rw=randread --bs=4k --iodepth=16 --time_based --runtime="$1" --randrepeat=0 |
        jq -r '.jobs[0].read.iops | round'
}

show_limit() {
    local limited free
    show "$blktapd" ctl qos d1 --iops 500
    limited=$(measured_iops 5)
    note "fio for 5 s: $limited operations/s of the 500 that are allowed"
    [ "$limited" -le 505 ] || die "the limit of 500 operations/s did not hold: fio got $limited"
    [ "$limited" -ge 495 ] || note "(fewer than allowed: is this machine busy?)"
    show "$blktapd" ctl qos d1 --iops 0
    free=$(measured_iops 2)
    note "fio for 2 s: $free operations/s without a limit, on the same disk, live"
}

show_scrape() {
    local address=$metrics
    curl -fsS --max-time 10 "http://$address/metrics" >"$demo_dir/metrics.txt" ||
        die "no metrics at http://$address/metrics: does another program use that address? Say --metrics ADDR"
    note "\$ curl http://$address/metrics"
    grep -E '^blktapd_disk_[a-z]+_(completed_total|bytes_total)\{.*disk="d1"' "$demo_dir/metrics.txt" | sed 's/^/     /'
    note "$(grep -vc '^#' "$demo_dir/metrics.txt") series in $(grep -c '^# TYPE' "$demo_dir/metrics.txt") families"
    promtool check metrics <"$demo_dir/metrics.txt" || die "promtool found the faults above in $demo_dir/metrics.txt"
    note "promtool check metrics: nothing to complain about"
}

show_next_steps() {
    local program=blktapd
    [ "$(command -v blktapd)" -ef "$blktapd" ] || program=$blktapd
    cat <<END

${bold}The daemon is running. To try next:${plain}
END
    [ "$run_dir" = /run/blktapd ] || echo "   export BLKTAPD_CTL=$BLKTAPD_CTL"
    cat <<END
   $program ctl list
   $program ctl top
   $program ctl attach mydisk raw:/path/to/disk.img --nbd
   $program ctl qos mydisk --iops 500 --bps 50M
   $program ctl move d1 0
   $program ctl detach d1
   curl --unix-socket $BLKTAPD_CTL http://localhost/v1/disks
   curl http://$metrics/metrics
   nbdinfo --list 'nbd+unix:///?socket=$run_dir/nbd.sock'
END
    if [ -n "$system" ]; then
        echo "   systemctl status blktapd; systemctl stop blktapd"
    elif our_daemon >/dev/null; then
        echo "   deploy/quickstart.sh --stop${run_dir_option:+ $run_dir_option}"
    fi
}

run_dir_option=''
[ "$run_dir" = /run/blktapd ] || run_dir_option="--run-dir $run_dir"

if [ -n "$stop" ]; then
    stop_daemon
    exit
fi

title "Packages"
if [ -n "$packages" ]; then "$repo_dir/deploy/install-deps.sh" run | sed 's/^/   /'; else note "left as they are"; fi

title "Build"
build

title "Start"
if [ -n "$system" ]; then
    start_as_service
else
    link_program
    start_in_background
fi

title "A raw image with room for a file system, and a RAM disk"
make_images
show "$blktapd" ctl attach d1 "raw:$demo_dir/disk.img" --nbd
show "$blktapd" ctl attach ram1 "ram:quickstart?size=$disk_size" --nbd
show "$blktapd" ctl list
show nbdinfo --size "$(uri d1)"

title "A real client copies a file system in and reads it back"
copy_file_system d1
copy_file_system ram1

title "Every block is checked under load"
verify_with_fio

title "A limit holds, and ends"
show_limit

title "What Prometheus sees"
show_scrape
show_next_steps
