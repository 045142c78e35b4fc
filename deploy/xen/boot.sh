# Boots the emulator and reads what came out: sourced by `test`, never run.
#
# Domain 0 runs run.sh, which writes one line per result to a file in a folder shared with this machine, and `end` as the
# last one. A boot that ends without that line is tried again, at most twice, unless a scenario had failed by then: emulated
# processors make a kernel fall over now and then, but a result is a result.
#
# Wants: xen_dir, cache, images, binary, environment, keep, long, head_of, passed, failed, say, die. Sets: passed, failed.
# shellcheck shell=bash disable=SC2154

emulator=
end_emulator() {
    [ -z "$emulator" ] || kill -KILL "$emulator" 2>/dev/null
    emulator=
}
trap end_emulator EXIT
trap 'exit 130' INT TERM

# Reasons for what is unusual here are in README.md, under "Why the flags are as they are".
# $1: folder of the run
start_emulator() {
    local xen_line dom0_line
    ln -sf "$images/vmlinux" "$1/vmlinux"
    xen_line="console=com1 com1=115200,8n1 dom0_mem=1536M,max:1536M dom0_max_vcpus=2 conring_size=1m"
    xen_line+=" loglvl=warning guest_loglvl=warning spec-ctrl=no xpti=no watchdog=0"
    dom0_line="console=hvc0 quiet mitigations=off nokaslr panic=5 rdinit=/init"
    # From within the folder: the loader takes blanks and commas in names for its own.
    (cd "$1" && exec qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot \
        -M q35 -accel tcg,thread=multi,tb-size=512 -cpu max,-smap,-xsave,-pku,-rdtscp -smp 2 -m 3G \
        -kernel "$images/xen" -append "$xen_line" -initrd "vmlinux $dom0_line,dom0.cpio" \
        -serial file:serial.log \
        -drive if=none,id=data,file=data.img,format=raw,cache=unsafe,discard=unmap \
        -device virtio-blk-pci,drive=data,serial=data \
        -drive if=none,id=images,file=images.img,format=raw,cache=unsafe,discard=unmap \
        -device virtio-blk-pci,drive=images,serial=images \
        -fsdev local,id=share,path=share,security_model=none -device virtio-9p-pci,fsdev=share,mount_tag=share) \
        9>&- </dev/null >"$1/emulator.log" 2>&1 &
    emulator=$!
}

# Adds what is under test to domain 0's RAM disk: an initial RAM disk may be several archives, one after the other.
# $1 folder of the run, $2 folder whose content becomes /xen-test in domain 0; $3: the tier, if it is one
pack_dom0() {
    local overlay=$1/overlay
    mkdir -p "$overlay"
    mv "$2" "$overlay/xen-test"
    if [ -e "$xen_dir/block-blktapd" ]; then
        mkdir -p "$overlay/etc/xen/scripts"
        cp "$xen_dir/block-blktapd" "$overlay/etc/xen/scripts/"
    fi
    pack "$overlay" "$1/overlay.cpio"
    cat "$images/dom0.cpio" "$1/overlay.cpio" >"$1/dom0.cpio"
    [ "${3:-}" != hvm ] || cat "$images/hvm.cpio" >>"$1/dom0.cpio"
    rm -rf "$overlay" "$1/overlay.cpio"
}

# $1 program, $2 folder, $3 its name there: copies it with its libraries to where run.sh expects both
add_under_test() {
    cp -L "$1" "$2/$3"
    # Debug information is most of a Rust program and nothing but load here; the symbols of backtraces stay.
    strip --strip-debug "$2/$3" 2>/dev/null
    add_libraries "$2" "$1" || die "the libraries of $1 could not be collected"
}

# The unit tests of the crate that a scenario names in its head, as one program: $1 scenario, $2 folder.
add_tests_of() {
    local crate program
    crate=$(head_of "$1" tests)
    [ -n "$crate" ] || return 0
    say "building the tests of $crate"
    program=$(cd "$repo_dir" && cargo test --package "$crate" --lib --locked --no-run --message-format=json 2>"$cache/tests.log" |
        sed -n "s/.*\"name\":\"${crate//-/_}\".*\"executable\":\"\([^\"]*\)\".*/\1/p")
    [ -x "$program" ] || die "the tests of $crate could not be built ($cache/tests.log)"
    add_under_test "$program" "$2" "$crate-tests"
}

# Boots until there is a result, at most three times. $1: folder of the run, $2: seconds that all of it may take on an idle
# machine; $3: called for each new line. How slow the machine is turns out when domain 0 is up, see run.sh.
# Status 0 when the result is whole, 1 when not.
boot() {
    local run=$1 each=$3 attempt lines began limit patience
    for attempt in 1 2 3; do
        rm -rf "$run/share" "$run/serial.log"
        mkdir -p "$run/share/log"
        truncate -s 0 "$run/data.img" "$run/images.img"
        truncate -s 1G "$run/data.img" "$run/images.img"
        lines=0 began=$SECONDS limit=900 patience=''
        start_emulator "$run"
        while kill -0 "$emulator" 2>/dev/null && [ $((SECONDS - began)) -lt "$limit" ] && ! has_ended "$run"; do
            sleep 0.5
            report_new_lines
            [ -z "$patience" ] || limit=$((120 + $2 * patience))
        done
        # It switches itself off after the last line.
        for _ in $(seq 20); do kill -0 "$emulator" 2>/dev/null && sleep 0.5; done
        { end_emulator; wait; } 2>/dev/null
        report_new_lines
        ! has_ended "$run" || return 0
        say "boot $attempt ended without a result after $((SECONDS - began)) s (of $limit); the end of $run/serial.log:"
        tail_of "$run/serial.log" 30
        tail_of "$run/emulator.log" 5
        grep -q '^FAILED ' "$run/share/results" 2>/dev/null && return 1
        cp "$run/serial.log" "$run/serial.$attempt.log"
    done
    return 1
}

has_ended() { [ "$(tail -n 1 "$1/share/results" 2>/dev/null)" = end ]; }

# Uses the variables of boot.
report_new_lines() {
    local line
    [ -e "$run/share/results" ] || return 0
    while IFS= read -r line; do
        lines=$((lines + 1))
        case $line in "patience "*) patience=${line#patience } ;; esac
        "$each" "$run" "$line"
    done < <(tail -n +$((lines + 1)) "$run/share/results")
}

tail_of() { [ ! -s "$1" ] || tail -n "$2" "$1" | tr -d '\r' | sed 's/^/    | /'; }

# ---- scenarios ----

declare -A result

# $1 folder of the run, $2 a line of the results
take_result() {
    local word name rest
    read -r word name rest <<<"$2"
    case $word in
    ok | FAILED)
        result[$name]=$word
        printf '%-9s %s%s\n' "$word" "$name" "${rest:+: $rest}"
        if [ "$word" = FAILED ]; then
            tail_of "$1/share/log/$name.log" 40
            tail_of "$1/share/log/$name.daemon.log" 20
        fi ;;
    patience) [ "$name" -le 2 ] || say "this machine is slow or busy: limits are $name times longer" ;;
    note) printf '%-9s %s: %s\n' '' "$name" "$rest" ;;
    esac
}

# $1 tier, then its scenarios
run_tier() {
    local tier=$1 run=$cache/run/$1 limit=30 began=$SECONDS name
    shift
    rm -rf "$run"
    mkdir -p "$run/payload/scenario"
    add_under_test "$binary" "$run/payload" blktapd
    cp "$xen_dir"/{run.sh,dom0.sh,compare.fio} "$run/payload/"
    [ -z "$long" ] || touch "$run/payload/long"
    for name in "$@"; do
        cp "$xen_dir/scenario/$name.sh" "$run/payload/scenario/"
        add_tests_of "$name" "$run/payload"
        printf '%s %s\n' "$name" "$(limit_of "$name")" >>"$run/payload/list"
        limit=$((limit + $(limit_of "$name")))
    done
    pack_dom0 "$run" "$run/payload" "$tier"

    say "---- $tier: $# scenarios"
    result=()
    boot "$run" "$limit" take_result
    for name in "$@"; do
        [ -n "${result[$name]:-}" ] || take_result "$run" "FAILED $name there is no result of it"
        if [ "${result[$name]}" = ok ]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
    done
    tidy "$run"
    say "---- $tier: $((SECONDS - began)) s"
}

# $1: folder of a run that is over
tidy() {
    rm -f "$1/dom0.cpio"
    [ -n "$keep" ] || rm -f "$1/data.img" "$1/images.img"
}

# ---- one program ----

# Runs a program in domain 0 with its arguments. Status: the program's.
run_program() {
    local run=$cache/run/program program=$1 status=125
    rm -rf "$run"
    mkdir -p "$run/payload"
    add_under_test "$program" "$run/payload" "$(basename "$program")"
    cp "$xen_dir/run.sh" "$run/payload/"
    # One word a line, quoted for the shell that reads them.
    printf '%q\n' env "${environment[@]}" "/xen-test/$(basename "$program")" "${@:2}" >"$run/payload/program"
    pack_dom0 "$run" "$run/payload"
    boot "$run" "${XEN_TEST_PROGRAM_SECONDS:-300}" : >&2
    cat "$run/share/log/program.log" 2>/dev/null
    status=$(sed -n 's/^status //p' "$run/share/results" 2>/dev/null)
    tidy "$run"
    [ -n "$status" ] || say "the emulator gave no result" >&2
    return "${status:-125}"
}
