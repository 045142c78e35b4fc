# Brings what the Xen test needs, from the distribution's packages only: sourced by `test`, never run.
#
# Programs are installed when they are missing. Xen, the kernel of its domains and busybox are downloaded and unpacked below
# the target folder, never installed: their installation would change how this machine boots, or replace its busybox.
#
# Wants: cache, say, die, cannot_run. Sets: unpacked (the folder of the unpacked packages), xen_release (like 4.17).
# shellcheck shell=bash disable=SC2154

# The program or file that shows that it is there, the package that has it.
xen_test_needs='
qemu-system-x86_64          qemu-system-x86
/usr/share/seabios/bios-256k.bin  seabios
cpio                        cpio
depmod                      kmod
modprobe                    kmod
xz                          xz-utils
zstd                        zstd
strip                       binutils
flock                       util-linux
losetup                     mount
blkdiscard                  util-linux
mke2fs                      e2fsprogs
e2fsck                      e2fsprogs
resize2fs                   e2fsprogs
fio                         fio
/usr/bin/python3            python3
'

missing_needs() {
    awk 'NF == 2' <<<"$xen_test_needs" | while read -r thing package; do
        case $thing in
        /*) [ -e "$thing" ] ;;
        *) command -v "$thing" >/dev/null ;;
        esac || printf '%s %s\n' "$thing" "$package"
    done
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo -n "$@"
    else
        return 1
    fi
}

apt_is_fresh=
apt_update() {
    [ -z "$apt_is_fresh" ] || return 0
    apt_is_fresh=yes
    say "refreshing the package lists"
    as_root apt-get -qq -o DPkg::Lock::Timeout=300 update >"$cache/apt.log" 2>&1 ||
        say "warning: apt-get update failed ($cache/apt.log); going on with the package lists that are there"
}

# Installs the programs that are missing, and looks again for each by name.
need_programs() {
    local missing packages suite
    missing=$(missing_needs)
    [ -n "$missing" ] || return 0
    command -v apt-get >/dev/null ||
        cannot_run "these are missing and there is no apt-get to install them: $(tr '\n' ';' <<<"$missing")"
    [ "$(id -u)" = 0 ] || command -v sudo >/dev/null ||
        cannot_run "these are missing, and installing them needs root or sudo: $(tr '\n' ';' <<<"$missing")"
    apt_update
    packages=$(awk '{ print $2 }' <<<"$missing" | sort -u)
    # A QEMU package of backports conflicts with the suite's others: ask for all of them from the suite.
    if grep -qx qemu-system-x86 <<<"$packages"; then
        suite=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
        packages=$(grep -vx qemu-system-x86 <<<"$packages")
        packages+=" qemu-utils/$suite qemu-system-common/$suite qemu-system-x86/$suite"
    fi
    say "installing: $(tr '\n' ' ' <<<"$packages")"
    # shellcheck disable=SC2086  # one word per package
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends --allow-downgrades \
        -o DPkg::Lock::Timeout=300 $packages </dev/null >"$cache/apt.log" 2>&1 ||
        cannot_run "apt-get could not install $(tr '\n' ' ' <<<"$packages"): $(grep '^E:' "$cache/apt.log" | head -n 1)"
    missing=$(missing_needs)
    [ -z "$missing" ] || cannot_run "still missing after the installation: $(tr '\n' ';' <<<"$missing")"
}

# ---- which packages ----

# "name version" of the candidates of packages; nothing for those that have none.
candidates() {
    apt-cache policy "$@" | awk '/^[^ ]/ { sub(/:$/, ""); name = $1 } $1 == "Candidate:" && $2 != "(none)" { print name, $2 }'
}

newest_xen() {
    apt-cache search --names-only '^xen-hypervisor-[0-9.]+-amd64$' | awk '{ print $1 }' |
        sed 's/^xen-hypervisor-//; s/-amd64$//' | sort -V | tail -n 1
}

# The newest kernel of the distribution, by its metapackage. The cloud and the real-time kernels cannot be domain 0.
newest_kernel() {
    local names
    names=$(apt-cache search --names-only '^linux-image-([0-9.]+-)?amd64$' | awk '{ print $1 }')
    # shellcheck disable=SC2086  # one word per package
    [ -z "$names" ] || candidates $names | sort -V -k 2,2 | awk 'END { print $1 }'
}

# Every package that some packages need, themselves included.
closure() {
    apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances "$@" |
        grep '^[a-z0-9]'
}

is_installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

# Prints "name version" of all packages to unpack. XEN_TEST_KERNEL names another metapackage of a kernel.
wanted_packages() {
    local kernel name names
    kernel=${XEN_TEST_KERNEL:-$(newest_kernel)}
    [ -n "$kernel" ] && [ -n "$xen_release" ] || return 1
    names="xen-hypervisor-$xen_release-amd64 xen-utils-$xen_release xen-utils-common xenstore-utils busybox-static"
    names+=" qemu-system-xen"
    # A metapackage names the image; from some release on the image names the package of its modules.
    names+=" $(closure "$kernel" | grep -E '^linux-(image|modules|binary)-[0-9].*-amd64$' | grep -vx "$kernel")"
    # Libraries that this machine has are taken from here.
    for name in $(closure "xen-utils-$xen_release" xenstore-utils qemu-system-xen | grep '^lib' | sort -u); do
        is_installed "$name" || names+=" $name"
    done
    # shellcheck disable=SC2086  # one word per package
    candidates $names
}

short_hash() { sha256sum | cut -c 1-12; }

# Downloads and unpacks the packages unless exactly these versions are there.
fetch_packages() {
    local list key new name
    { command -v apt-cache && command -v dpkg; } >/dev/null ||
        cannot_run "Xen is taken from Debian's packages, and there is no apt here"
    [ "$(dpkg --print-architecture)" = amd64 ] || cannot_run "only amd64 was prepared, and this is $(dpkg --print-architecture)"
    xen_release=$(newest_xen)
    if [ -z "$xen_release" ]; then
        apt_update
        xen_release=$(newest_xen)
    fi
    list=$(wanted_packages)
    [ -n "$list" ] ||
        cannot_run "the package lists have no xen-hypervisor-*-amd64 or no linux-image-*amd64 (apt-get update?)"
    key=$(short_hash <<<"$list")
    unpacked=$cache/packages-$key
    [ ! -e "$unpacked/complete" ] || return 0

    say "downloading: $(tr '\n' ';' <<<"$list")"
    new=$cache/packages.new
    rm -rf "$new"
    mkdir -p "$new/debs" "$new/root"
    if ! download_all "$new/debs" "$list"; then
        # The lists may name versions that the mirror has replaced.
        apt_update
        list=$(wanted_packages)
        unpacked=$cache/packages-$(short_hash <<<"$list")
        download_all "$new/debs" "$list" ||
            cannot_run "apt-get could not download the packages of Xen: $(grep '^E:' "$cache/apt.log" | head -n 1)"
    fi
    for name in "$new"/debs/*.deb; do
        dpkg -x "$name" "$new/root" || die "dpkg could not unpack $name"
    done
    rm -rf "$new/debs"
    printf '%s\n' "$list" >"$new/complete"
    rm -rf "$cache"/packages-*
    mv "$new" "$unpacked"
}

# $1 folder, $2 lines of "name version"
download_all() {
    local packages
    packages=$(awk '{ print $1 "=" $2 }' <<<"$2")
    # shellcheck disable=SC2086  # one word per package
    (cd "$1" && apt-get -q -o APT::Sandbox::User="$(id -un)" download $packages) >"$cache/apt.log" 2>&1
}
