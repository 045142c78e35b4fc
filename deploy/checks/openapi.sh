#!/usr/bin/env bash
# Goal: the server does what its OpenAPI description says, and no request makes it fail.
# Method: schemathesis makes requests from the description, right and wrong ones, and compares the answers with it. It
# speaks TCP only, so socat stands before the control socket. Afterwards the daemon still serves, and nothing panicked.
set -euo pipefail
# shellcheck source=deploy/checks/daemon.sh
. "$(dirname "${BASH_SOURCE[0]}")/daemon.sh"

# Whatever is made up as a path, no image of this machine is opened.
mkdir "$work/images"
truncate -s 1M "$work/images/disk.img"
printf '[images]\nallowed_dirs = ["%s"]\n' "$work/images" >"$work/blktapd.toml"
start_daemon --config "$work/blktapd.toml"
ctl attach witness 'null:?size=1M' --nbd

port=$(free_port)
socat "TCP-LISTEN:$port,bind=127.0.0.1,fork,reuseaddr" "UNIX-CONNECT:$BLKTAPD_CTL" &

# A body that fits the schema can still be refused (no such image, no frontend, a burst without its rate), so acceptance of
# all that fits is not asked for.
cd "$work" # schemathesis leaves its caches where it runs
schemathesis --config-file "$repo_dir/deploy/checks/schemathesis.toml" run "http://127.0.0.1:$port/v1/openapi.json" \
    --url "http://127.0.0.1:$port" --wait-for-schema 10 --checks all \
    --exclude-checks positive_data_acceptance --max-examples 40 \
    --generation-deterministic --request-timeout 20 --suppress-health-check all \
    --continue-on-failure --no-color

ctl list >/dev/null
! grep -i panicked "$work/daemon.log"
