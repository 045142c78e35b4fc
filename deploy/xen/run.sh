#!/bin/bash
# Runs in domain 0: the scenarios of /xen-test/list one after the other, or the one program of /xen-test/program. Results
# go to the folder that is shared with the machine outside, a line each: `ok NAME (SECONDS s)`, `FAILED NAME REASON`,
# `note NAME TEXT`; `end` is the last one.

export LD_LIBRARY_PATH=/xen-test/lib/x86_64-linux-gnu
results=/mnt/results
report() {
    echo "$*" >>$results
    echo "result: $*"
}

# How slow the emulator is today: an idle machine is here after 9 s. Every limit is so many times longer.
read -r patience _ </proc/uptime
patience=$((${patience%.*} / 8 + 1))
long=
[ ! -e /xen-test/long ] || long=yes
export patience long
report "patience $patience"

if [ -e /xen-test/program ]; then
    mapfile -t words </xen-test/program
    eval "${words[*]}" >/mnt/log/program.log 2>&1
    report "status $?"
    report end
    exit
fi

# What the kernel complained about since the last call.
complaints() {
    dmesg -c | grep -E 'BUG|WARNING:|Oops|segfault|general protection|blkfront|blkback|xenbus' |
        sed 's/^\[ *[0-9.]*\] //' | sort | uniq -c | sort -rn | head -n 12
}
dmesg -c >/dev/null

while read -r name limit; do
    log=/mnt/log/$name.log
    began=$SECONDS
    # The notes of a scenario go to a file, so that a line of them is never torn by another writer.
    export scenario=$name notes=/tmp/$name.notes log_dir=/mnt/log
    : >"$notes"
    timeout --kill-after=$((30 * patience)) $((limit * patience)) bash /xen-test/scenario/"$name".sh >>"$log" 2>&1 </dev/null
    status=$?
    while IFS= read -r line; do report "note $name $line"; done <"$notes"
    complaints >/tmp/complaints
    { echo "---- the kernel:"; cat /tmp/complaints; } >>"$log"
    grep -E 'BUG|WARNING:|Oops|segfault|general protection' /tmp/complaints |
        while IFS= read -r line; do report "note $name kernel: $line"; done
    reason=$(grep '^FAILED: ' "$log" | head -n 1 | sed 's/^FAILED: //')
    case $status in
    0) report "ok $name ($((SECONDS - began)) s)" ;;
    124 | 137) report "FAILED $name after $((limit * patience)) s: ${reason:-it did not say why}" ;;
    *) report "FAILED $name $reason" ;;
    esac
done </xen-test/list
report end
