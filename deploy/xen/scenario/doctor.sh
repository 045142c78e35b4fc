#!/usr/bin/env bash
# tier: self
# Goal: `blktapd doctor` finds domain 0 fit to serve disks, and says that it is a Xen domain.
# Method: run it on a folder of ext4, read its lines.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

mount_images
blktapd doctor /images >/tmp/doctor || fail "doctor: $(cat /tmp/doctor)"
cat /tmp/doctor
grep -i '^ *[a-z]* *Xen\b' /tmp/doctor | sed 's/  */ /g' | while read -r line; do note "$line"; done
grep -q 'gntdev and evtchn are there' /tmp/doctor || fail "doctor does not see the devices of Xen"
