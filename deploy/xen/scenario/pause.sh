#!/usr/bin/env bash
# tier: self
# Goal: a paused disk holds its requests without an error, and goes on.
# Method: pause under a verifying load, see that no request completes, resume, see that all were right.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

load_frontend
start_daemon
attach_self d1 "raw:$raw_disk" xvda
write_and_verify /dev/xvda --loops=3 &
load=$!
sleep 3
ctl pause d1
sleep 1
requests=$(completed_requests xvda)
sleep 3
[ "$(completed_requests xvda)" = "$requests" ] || fail "requests were completed while the disk was paused"
kill -0 "$load" || fail "the load was over before the pause: the test shows nothing"
ctl resume d1
wait "$load"
ctl detach d1
wait_no_device /dev/xvda
