#!/usr/bin/env bash
# Goal: the files for systemd are accepted by systemd itself.
# Method: verify the units in a folder of their own, in which ExecStart names a program that exists; render sysusers and
# tmpfiles into an empty root. Needs no running systemd.
set -euo pipefail
# shellcheck source=deploy/paths.sh
. "$(dirname "${BASH_SOURCE[0]}")/../paths.sh"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The daemon is not installed on the machine of the test; everything else is verified as it ships.
for unit in "$repo_dir"/deploy/systemd/blktapd.{service,socket}; do
    sed 's:/usr/local/bin/blktapd:/bin/true:g' "$unit" >"$work/$(basename "$unit")"
done
# verify exits with 0 after mere warnings (an unknown key is one), so its output must be empty.
said=$(systemd-analyze verify --man=no "$work/blktapd.service" "$work/blktapd.socket" 2>&1) || { echo "$said"; exit 1; }
if grep -F "$work" <<<"$said" || grep -F blktapd <<<"$said"; then
    echo "systemd-analyze verify has something to say (above)"
    exit 1
fi

# The unit must stay hardened: systemd's own score of exposure, 0 (best) to 10.
systemd-analyze security --offline=true --threshold="${EXPOSURE_LIMIT:-50}" "$work/blktapd.service" |
    tail -n 1

mkdir -p "$work/root/etc"
systemd-sysusers --root="$work/root" "$repo_dir/deploy/systemd/blktapd.sysusers"
grep -q '^blktapd-ro:' "$work/root/etc/group" || { echo "sysusers made no group blktapd-ro"; exit 1; }
printf 'root:x:0:0::/:/bin/sh\n' >>"$work/root/etc/passwd"
printf 'root:x:0:\n' >>"$work/root/etc/group"
systemd-tmpfiles --root="$work/root" --create "$repo_dir/deploy/systemd/blktapd.tmpfiles"
[ -d "$work/root/run/blktapd" ] || { echo "tmpfiles made no /run/blktapd"; exit 1; }
echo "units, sysusers and tmpfiles are accepted"
