#!/usr/bin/env bash
# Installs what blktapd needs on a Debian machine that has Rust.
#
#   deploy/install-deps.sh run     to build the daemon, start it and try it with real clients
#   deploy/install-deps.sh test    the above, and all that the tests need (the default)
#   deploy/install-deps.sh list    prints the packages and installs nothing
#
# Nothing is installed when every program is there already, so it is cheap to run again. No service is started. Works as
# root or through sudo.

set -euo pipefail
# shellcheck source=deploy/paths.sh
. "$(dirname "${BASH_SOURCE[0]}")/paths.sh"

# The one list: when it is needed, the program or file that shows that it is there, the Debian package that has it.
# A name with a slash is a file, `pc:NAME` a pkg-config module; everything else is a program. `cc` does not bring the C
# library's headers along when recommended packages are left out, so they have a line of their own; nor does nbdinfo bring
# file, without which it prints rubbish.
needs='
run   cc                        gcc
run   /usr/include/stdio.h      libc6-dev
run   git                       git
run   pkg-config                pkg-config
run   pc:openssl                libssl-dev
run   curl                      curl
run   jq                        jq
run   mke2fs                    e2fsprogs
run   e2fsck                    e2fsprogs
run   nbdinfo                   libnbd-bin
run   nbdcopy                   libnbd-bin
run   file                      file
run   fio                       fio
test  qemu-img                  qemu-utils
test  qemu-io                   qemu-utils
test  cryptsetup                cryptsetup-bin
test  qemu-nbd                  qemu-utils
test  qemu-storage-daemon       qemu-system-common
test  qemu-system-x86_64        qemu-system-x86
test  nbdkit                    nbdkit
test  nbdsh                     python3-libnbd
test  certtool                  gnutls-bin
test  psktool                   gnutls-bin
test  openssl                   openssl
test  capsh                     libcap2-bin
test  losetup                   mount
test  ps                        procps
test  socat                     socat
test  shellcheck                shellcheck
test  systemd-analyze           systemd
test  systemd-socket-activate   systemd
test  systemd-sysusers          systemd
test  systemd-tmpfiles          systemd
test  /usr/bin/python3          python3
test  /usr/lib/python3/dist-packages/nbd.py  python3-libnbd
'
# Debian splits the venv module from Python and names it after the version.
venv_package=python3-venv
schemathesis_version=4.32.5

mode=${1:-test}
case $mode in
run | test) ;;
list) ;;
*) die "unknown mode '$mode': expected run, test or list" ;;
esac

say() { printf '%s\n' "$*"; }

present() {
    case $1 in
    pc:*) pkg-config --exists "${1#pc:}" 2>/dev/null ;;
    */*) [ -e "$1" ] ;;
    *) command -v "$1" >/dev/null ;;
    esac
}

# Lines of the list that the mode asks for, as "thing package".
wanted() { awk -v mode="$mode" 'NF == 3 && ($1 == "run" || mode != "run") { print $2, $3 }' <<<"$needs"; }

missing_things() {
    wanted | while read -r thing package; do
        present "$thing" || printf '%s %s\n' "$thing" "$package"
    done
}

can_be_root() { [ "$(id -u)" = 0 ] || command -v sudo >/dev/null; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

apt_is_fresh=
apt_update() {
    [ -z "$apt_is_fresh" ] || return 0
    command -v apt-get >/dev/null ||
        die "apt-get was not found: on another system than Debian install these yourself: $(missing_things | tr '\n' ';')"
    apt_is_fresh=yes
    # Without root the package lists that are there must do.
    can_be_root || return 0
    say "refreshing the package lists"
    as_root apt-get -qq -o DPkg::Lock::Timeout=300 update ||
        say "warning: apt-get update failed; going on with the package lists that are there" >&2
}

apt_install() {
    can_be_root || die "packages are missing, and this is neither root nor a machine with sudo; as root, run:
  apt-get install --no-install-recommends $*"
    apt_update
    say "installing: $*"
    local log
    log=$(mktemp)
    if ! as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends --allow-downgrades \
        -o DPkg::Lock::Timeout=300 "$@" </dev/null >"$log" 2>&1; then
        tail -n 30 "$log" >&2
        rm -f "$log"
        die "apt-get could not install: $*
What apt said is above. Repair it (often: apt-get update, or dpkg --configure -a), then run this again."
    fi
    rm -f "$log"
}

install_packages() {
    local packages suite qemu
    packages=$(missing_things | awk '{ print $2 }' | sort -u)
    [ -n "$packages" ] || return 0
    # A QEMU package of backports conflicts with the suite's others: ask for all of them from the suite.
    if grep -q '^qemu-' <<<"$packages"; then
        suite=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
        qemu=$(wanted | awk '$2 ~ /^qemu-/ { print $2 }' | sort -u)
        [ -n "$suite" ] && qemu=$(awk -v suite="$suite" '{ print $1 "/" suite }' <<<"$qemu")
        packages=$(grep -v '^qemu-' <<<"$packages" || true)$'\n'$qemu
    fi
    # shellcheck disable=SC2086  # one word per package
    apt_install $packages
}

# promtool has a package of its own on newer releases; before, it comes with the server, whose package would start one.
install_promtool() {
    present promtool && return
    apt_update
    if [ -n "$(apt-cache madison promtool 2>/dev/null)" ]; then
        apt_install promtool
        return
    fi
    say "unpacking promtool into $tools_dir (Debian's prometheus package is not installed)"
    local work
    work=$(mktemp -d)
    (cd "$work" && apt-get -qq -o APT::Sandbox::User=root download prometheus) ||
        die "apt-get could not download the package prometheus, which has promtool"
    mkdir -p "$tools_dir/bin"
    dpkg-deb --fsys-tarfile "$work"/prometheus_*.deb | tar -x -C "$work" ./usr/bin/promtool
    mv "$work/usr/bin/promtool" "$tools_dir/bin/promtool"
    rm -rf "$work"
}

# The API test comes from PyPI. A system's Python may refuse pip, hence a venv; it sees the system's packages because
# libnbd's Python module is one of them.
install_schemathesis() {
    local venv=$tools_dir/venv
    if [ "$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("schemathesis"))' 2>/dev/null)" != "$schemathesis_version" ]; then
        /usr/bin/python3 -c 'import ensurepip, venv' 2>/dev/null || apt_install "$venv_package"
        say "installing schemathesis $schemathesis_version into $venv"
        rm -rf "$venv"
        /usr/bin/python3 -m venv --system-site-packages "$venv" || die "python3 could not make a venv in $venv"
        "$venv/bin/pip" install --quiet --disable-pip-version-check "schemathesis==$schemathesis_version" ||
            die "pip could not install schemathesis $schemathesis_version into $venv: is the package index reachable?"
    fi
    mkdir -p "$tools_dir/bin"
    ln -sf ../venv/bin/schemathesis "$tools_dir/bin/schemathesis"
}

# True when version $1 is at least $2.
at_least() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$2" ]; }

check_rust() {
    local have want component
    have=$(rustc --version | awk '{ print $2 }')
    want=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$repo_dir/Cargo.toml")
    at_least "$have" "$want" || die "Rust $have is too old: blktapd needs $want or newer (rustup update stable)"
    [ "$mode" = test ] || return 0
    for component in fmt clippy; do
        cargo "$component" --version >/dev/null 2>&1 && continue
        command -v rustup >/dev/null && rustup component add "${component/fmt/rustfmt}" && continue
        die "cargo $component is missing: rustup component add ${component/fmt/rustfmt}"
    done
}

if [ "$mode" = list ]; then
    { wanted | awk '{ print $2 }'; echo "$venv_package"; echo 'promtool (or prometheus, unpacked)'; } | sort -u
    exit
fi

install_packages
install_promtool
[ "$mode" = run ] || install_schemathesis
check_rust

absent=$({ missing_things; present promtool || echo 'promtool prometheus'
    [ "$mode" = run ] || present schemathesis || echo 'schemathesis PyPI'; } |
    awk '{ printf "  %s (of %s)\n", $1, $2 }')
[ -z "$absent" ] || die "still missing after the installation:
$absent"
say "all that '$mode' needs is there"
