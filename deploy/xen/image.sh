# Builds what the Xen test boots: sourced by `test`, never run.
#
# Initial RAM disks, of domain 0 and of the guests, what domain 0 needs beyond its own for HVM guests, and the kernel as an ELF
# image. They hold what the packages and this machine have; what is under test is added at each boot (boot.sh).
#
# Wants: xen_dir, cache, unpacked, xen_release, say, die, short_hash. Sets: images (the folder), kernel_release.
# shellcheck shell=bash disable=SC2154

dom0_modules="virtio_pci virtio_blk 9pnet_virtio 9p xen-evtchn xen-gntdev xen-gntalloc xen-privcmd xenfs
    xen-blkback xen-blkfront loop ext4"
# The last two are for the emulated disks of HVM guests.
guest_modules="xen-blkfront ext4 ata_piix sd_mod"
# ext4 asks for it by name on older kernels; newer ones have it built in or do without.
optional_modules=crc32c_generic

dom0_host_programs="bash fio mke2fs e2fsck resize2fs blkdiscard blockdev losetup flock stat readlink timeout cmp"
guest_host_programs="mke2fs e2fsck resize2fs blkdiscard"

build_images() {
    local key new
    # Files of this machine go into the images, so their packages' versions belong to the key.
    key=$({ cat "$unpacked/complete" "$xen_dir"/{image.sh,dom0-init.sh,guest-init.sh,vmlinux.py}
        dpkg-query -W -f '${Package} ${Version}\n' libc6 bash fio e2fsprogs util-linux coreutils diffutils mount; } | short_hash)
    images=$cache/images-$key
    kernel_release=$(basename "$(echo "$unpacked"/root/{,usr/}lib/modules/* | tr ' ' '\n' | grep -v '\*' | head -n 1)")
    [ ! -e "$images/complete" ] || return 0

    say "building the images: Xen $xen_release, Linux $kernel_release"
    new=$cache/images.new
    rm -rf "$new"
    mkdir -p "$new"
    # A subshell, so that the first step that fails ends the building.
    (set -e; build_all "$new") || die "the images could not be built in $new"
    touch "$new/complete"
    rm -rf "$cache"/images-*
    mv "$new" "$images"
}

# $1: folder of the images
build_all() {
    local root=$unpacked/root xen_bin name
    xen_bin=$root/usr/lib/xen-$xen_release/bin
    # Modules were moved below /usr; their tools look for /lib.
    [ -d "$root/lib/modules" ] || ln -s usr/lib "$root/lib"
    depmod -b "$root" "$kernel_release"

    gzip -dc "$root/boot/xen-$xen_release-amd64.gz" >"$1/xen"
    cp "$root/boot/vmlinuz-$kernel_release" "$1/vmlinuz"
    /usr/bin/python3 "$xen_dir/vmlinux.py" "$1/vmlinuz" "$1/vmlinux"

    local guest=$1/guest
    skeleton "$guest" "$xen_dir/guest-init.sh"
    # shellcheck disable=SC2086  # one word per module or program
    {
        add_modules "$guest" $guest_modules
        for name in $guest_host_programs; do add_program "$guest" /usr/sbin "$(command -v "$name")"; done
    }
    ln -s mke2fs "$guest/usr/sbin/mkfs.ext4"
    pack "$guest" "$1/guest.cpio"

    local dom0=$1/dom0
    skeleton "$dom0" "$xen_dir/dom0-init.sh"
    # shellcheck disable=SC2086
    {
        add_modules "$dom0" $dom0_modules
        for name in $dom0_host_programs; do add_program "$dom0" /usr/sbin "$(type -P "$name")"; done
    }
    ln -s mke2fs "$dom0/usr/sbin/mkfs.ext4"
    # Scripts ask for it here.
    ln -sf ../usr/sbin/bash "$dom0/bin/bash"
    add_xen "$dom0" "$xen_bin"
    mkdir -p "$dom0/boot"
    cp "$1/vmlinuz" "$1/guest.cpio" "$dom0/boot/"
    pack "$dom0" "$1/dom0.cpio"

    # What only HVM guests need: the device model and the firmware.
    local hvm=$1/hvm
    mkdir -p "$hvm/usr/lib/xen-$xen_release/boot" "$hvm/usr/share/seabios" "$hvm/usr/share/qemu/keymaps"
    add_program "$hvm" /usr/libexec "$root/usr/libexec/xen-qemu-system-i386"
    cp "$root/usr/lib/xen-$xen_release/boot/hvmloader" "$hvm/usr/lib/xen-$xen_release/boot/"
    cp /usr/share/seabios/bios-256k.bin "$hvm/usr/share/seabios/"
    cp /usr/share/qemu/{linuxboot,linuxboot_dma,kvmvapic}.bin "$hvm/usr/share/qemu/"
    cp /usr/share/qemu/keymaps/en-us "$hvm/usr/share/qemu/keymaps/"
    pack "$hvm" "$1/hvm.cpio"
    rm -rf "$guest" "$dom0" "$hvm"
}

# $1 root, $2 its /init: folders, busybox under all its names
skeleton() {
    local busybox name
    mkdir -p "$1"/{bin,dev,etc,lib,lib64,mnt,proc,root,run,sys,tmp,usr/bin,usr/sbin,usr/lib,var/log,var/lib}
    ln -s usr/sbin "$1/sbin"
    ln -s ../run "$1/var/run"
    ln -s ../run/lock "$1/var/lock"
    busybox=$(find "$unpacked/root/bin" "$unpacked/root/usr/bin" -name busybox -type f 2>/dev/null | head -n 1)
    cp "$busybox" "$1/bin/busybox"
    for name in $("$busybox" --list); do
        [ -e "$1/bin/$name" ] || ln -s busybox "$1/bin/$name"
    done
    # The kernel calls this one by its path.
    ln -s ../../bin/busybox "$1/usr/sbin/modprobe"
    echo root:x:0:0:root:/root:/bin/sh >"$1/etc/passwd"
    echo root:x:0: >"$1/etc/group"
    cp "$2" "$1/init"
    chmod 755 "$1/init"
}

# $1 root, then names of modules: with all that they need, unpacked, so that nobody unpacks them in the emulator
add_modules() {
    local root=$1 to=$1/lib/modules/$kernel_release name file
    shift
    mkdir -p "$to"
    for name in "$@" $optional_modules; do
        modprobe -d "$unpacked/root" -S "$kernel_release" --show-depends "$name" 2>/dev/null >"$to/needs" || {
            [[ " $optional_modules " = *" $name "* ]] && continue
            say "the kernel $kernel_release has no module $name"
            return 1
        }
        awk '$1 == "insmod" { print $2 }' "$to/needs" | while read -r file; do
            case $file in
            *.xz) xz -dc "$file" >"$to/$(basename "$file" .xz)" ;;
            *.zst) zstd -dcq "$file" >"$to/$(basename "$file" .zst)" ;;
            *) cp "$file" "$to/" ;;
            esac
        done
    done
    rm "$to/needs"
    cp "$unpacked/root/lib/modules/$kernel_release"/modules.{builtin,builtin.modinfo,order} "$to/"
    depmod -b "$root" "$kernel_release"
}

# $1 root, $2 folder in it, then programs: with the libraries that they load at their start
add_program() {
    local root=$1 to=$2 file
    shift 2
    mkdir -p "$root$to"
    for file in "$@"; do
        cp -L --remove-destination "$file" "$root$to/"
        add_libraries "$root" "$file"
    done
}

# $1 root, $2 program: copies the libraries that the program loads, and fails if one is not there
add_libraries() {
    local path=$unpacked/root library missing
    path=$path/usr/lib/x86_64-linux-gnu:$path/lib/x86_64-linux-gnu:$path/usr/lib/xen-$xen_release/lib
    mkdir -p "$1/lib/x86_64-linux-gnu" "$1/lib64"
    missing=$(LD_LIBRARY_PATH=$path ldd "$2" 2>/dev/null | awk '/not found/ { print $1 }')
    [ -z "$missing" ] || { say "$2 needs libraries that are not there: $missing"; return 1; }
    # A static program has none: ldd then fails, and that is all right.
    { LD_LIBRARY_PATH=$path ldd "$2" 2>/dev/null || true; } |
        awk '$2 == "=>" { print $3 } $1 ~ /^\// { print $1 }' | while read -r library; do
        case $library in
        */ld-linux*) cp -Ln "$library" "$1/lib64/" ;;
        *) cp -Ln "$library" "$1/lib/x86_64-linux-gnu/" ;;
        esac
    done
}

# $1 root, $2 folder of Xen's programs
add_xen() {
    local root=$unpacked/root in=/usr/lib/xen-$xen_release/bin name
    add_program "$1" "$in" "$2"/{xl,xenstored,xenconsoled,xenconsole,xen-init-dom0,xenstore-control,lsevtchn,libxl-save-helper}
    for name in xl xenstored xenconsoled xen-init-dom0 xenstore-control lsevtchn; do
        ln -s "$in/$name" "$1/usr/sbin/$name"
    done
    add_program "$1" /usr/bin "$root/usr/bin/xenstore"
    for name in read write ls list rm exists chmod watch; do
        ln -s xenstore "$1/usr/bin/xenstore-$name"
    done
    # The C library loads it when a thread is cancelled, which xl does.
    cp -Ln /lib/x86_64-linux-gnu/libgcc_s.so.1 "$1/lib/x86_64-linux-gnu/"
    mkdir -p "$1/etc/xen/scripts" "$1/var/lib/xen" "$1/var/lib/xenstored" "$1/var/log/xen/console"
    cp "$root"/etc/xen/scripts/* "$1/etc/xen/scripts/"
    echo 'autoballoon="off"' >"$1/etc/xen/xl.conf"
}

# $1 root, $2 archive
pack() { (cd "$1" && find . -print0 | cpio --quiet -0 -o -H newc -R 0:0) >"$2"; }
