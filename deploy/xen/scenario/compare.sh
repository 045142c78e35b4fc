#!/usr/bin/env bash
# tier: self
# limit: 300
# long: figures for people
# Goal: figures beside those of `reference`.
# Method: the same job on the same disk.
# shellcheck source=deploy/xen/dom0.sh
. /xen-test/dom0.sh

load_frontend
start_daemon
attach_self d1 "raw:$raw_disk" xvda
compare xvda blktapd
ctl stats d1
ctl detach d1
wait_no_device /dev/xvda
