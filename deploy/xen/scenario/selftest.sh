#!/usr/bin/env bash
# tier: self
# limit: 240
# tests: ring-bridge
# Goal: what the memory of guests and their events rest on holds on the real devices: rings of many pages, batches of copies with bad
# ones among them, refused mappings, persistent mappings, I/O straight into mapped pages, a thousand connects that leave nothing.
# Method: the tests of ring-bridge that need Xen; domain 0 grants pages and offers ports to itself.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

before=$(footprint)
BLKTAPD_TEST_DISK=$raw_disk ring-bridge-tests xen_selftest --ignored --nocapture --test-threads=1 >/tmp/selftest 2>&1 || {
    cat /tmp/selftest
    fail "$(grep -E '^test result|panicked' /tmp/selftest | head -n 1)"
}
cat /tmp/selftest
note "$(grep '^test result' /tmp/selftest)"
wait_footprint "$before"
