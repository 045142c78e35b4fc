#!/usr/bin/env bash
# Runs the tests: installs what they need, then one stage after the other, each within its own time.
#
#   deploy/test.sh                 all stages
#   deploy/test.sh clippy unit     these stages only
#   deploy/test.sh --list          the stages and their budgets
#
# A stage that fails or overruns its budget is stopped with all that it started, its log's end is shown, and the next one
# runs. The last line counts: every test of cargo, and one for every other stage. Logs stay in the target folder.
#
# A stage may end with status 77: it cannot run here, for the reason in the last line of its log; it counts as skipped.

set -uo pipefail
# shellcheck source=deploy/paths.sh
. "$(dirname "${BASH_SOURCE[0]}")/paths.sh"
cd "$repo_dir" || exit 1
self=$repo_dir/deploy/$(basename "${BASH_SOURCE[0]}")

# Stage and budget in seconds. Budgets are for two slow cores and an empty target folder; together they stay below the
# hour and a half that a run of CI may take.
stages='
packages   360
fmt         30
shell       30
systemd     30
rules       30
licences    30
clippy     360
build      480
unit       720
integration 720
docs       120
release    420
service     90
metrics     60
openapi    120
quickstart 120
xen       1680
'

export CARGO_TERM_COLOR=never CARGO_INCREMENTAL=0 RUST_BACKTRACE=0

skip() {
    echo "$*"
    exit 77
}

# ---- the stages ----

stage_packages() { deploy/install-deps.sh test; }

stage_fmt() { cargo fmt --all --check -- --color never; }

stage_shell() {
    # shellcheck disable=SC2046  # our paths have no blanks
    shellcheck -x $(find deploy .ci -name '*.sh') .ci/run deploy/xen/test deploy/xen/block-blktapd
    find deploy -name '*.py' -print0 | xargs -0 -r -n 1 /usr/bin/python3 -c 'import ast, sys; ast.parse(open(sys.argv[1]).read())'
}

stage_systemd() { deploy/checks/systemd.sh; }

stage_rules() {
    promtool check rules deploy/prometheus/blktapd.rules.yml
    promtool test rules deploy/prometheus/blktapd_test.yml
    local alert
    awk '$2 == "alert:" { print $3 }' deploy/prometheus/blktapd.rules.yml | while read -r alert; do
        grep -qx "## $alert" deploy/runbook.md || { echo "deploy/runbook.md has no section $alert"; exit 1; }
        grep -q "runbook_url: runbook.md#${alert,,}$" deploy/prometheus/blktapd.rules.yml ||
            { echo "alert $alert does not point to its section of the runbook"; exit 1; }
    done
    /usr/bin/python3 deploy/checks/dashboard.py deploy/grafana/blktapd.json
}

stage_licences() {
    command -v cargo-deny >/dev/null || skip "cargo-deny is not installed: licences were not checked (cargo install cargo-deny)"
    cargo deny --locked check bans licenses sources
}

stage_clippy() { cargo clippy --workspace --all-targets --locked -- -D warnings; }

stage_build() { cargo test --workspace --all-targets --locked --no-run; }

stage_unit() {
    cargo test --workspace --locked --no-fail-fast --lib --bins
    cargo test --workspace --locked --no-fail-fast --doc
}

stage_integration() {
    # cargo takes it for an error when no crate has such tests.
    compgen -G '*/tests/*.rs' >/dev/null || skip "no crate has integration tests"
    cargo test --workspace --locked --no-fail-fast --test '*'
}

stage_docs() { RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps --locked; }

stage_release() { cargo build --release --locked --bin blktapd; }

stage_service() {
    /usr/bin/python3 deploy/checks/service.py "${BLKTAPD_BINARY:-$target_dir/release/blktapd}" deploy/systemd/blktapd.service
}

stage_metrics() { deploy/checks/metrics.sh; }

stage_openapi() { deploy/checks/openapi.sh; }

stage_xen() { BLKTAPD_BINARY=${BLKTAPD_BINARY:-$target_dir/release/blktapd} deploy/xen/test --tier self --tier pv; }

stage_quickstart() { deploy/checks/quickstart.sh; }

# ---- the runner ----

if [ "${1:-}" = --stage ]; then
    set -e
    "stage_$2"
    exit
fi

budget_of() { awk -v name="$1" '$1 == name { print $2 }' <<<"$stages"; }

if [ "${1:-}" = --list ]; then
    awk 'NF == 2 { printf "%-12s %4d s\n", $1, $2 }' <<<"$stages"
    exit
fi

if [ $# -eq 0 ]; then
    mapfile -t chosen < <(awk 'NF == 2 { print $1 }' <<<"$stages")
else
    chosen=("$@")
fi
for name in "${chosen[@]}"; do
    [ -n "$(budget_of "$name")" ] || die "no stage is called '$name'; deploy/test.sh --list shows them"
done

log_dir=$target_dir/test-logs
mkdir -p "$log_dir" || die "cannot write logs to $log_dir"

group=
# `timeout` leads a process group of its own; whatever a stage left in it goes with the stage.
end_group() {
    [ -n "$group" ] && kill -KILL -- "-$group" 2>/dev/null
    group=
}
trap 'end_group; exit 130' INT TERM

passed=0 failed=0 skipped=0

# Prints "passed failed ignored" summed over the result lines of cargo test in a log; nothing when there are none.
cargo_counts() {
    sed -n 's/^test result: .* \([0-9]*\) passed; \([0-9]*\) failed; \([0-9]*\) ignored.*/\1 \2 \3/p' "$1" |
        awk '{ p += $1; f += $2; i += $3 } END { if (NR) print p, f, i }'
}

run_stage() {
    local name=$1 budget log began took status p f i verdict
    budget=$(budget_of "$name")
    log=$log_dir/$name.log
    began=$SECONDS
    printf '%-12s ' "$name"
    timeout --kill-after=10 "$budget" bash "$self" --stage "$name" >"$log" 2>&1 </dev/null &
    group=$!
    wait "$group"
    status=$?
    end_group
    took=$((SECONDS - began))

    p=0 f=0 i=0
    # A stage of cargo counts its tests, even if it ran none; every other stage is one test.
    read -r p f i < <(cargo_counts "$log") || { p=0 f=0 i=0; [ "$status" -ne 0 ] || p=1; }
    case $status in
    0) verdict=ok ;;
    77) verdict="skipped: $(tail -n 1 "$log")"; i=$((i + 1)) ;;
    124 | 137) verdict="FAILED: still running after its $budget s"; f=$((f + 1)) ;;
    *) verdict="FAILED (status $status)"; [ "$f" -gt 0 ] || f=1 ;;
    esac
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + i))

    printf '%4d s  %4d passed  %s\n' "$took" "$p" "$verdict"
    if [ "$f" -gt 0 ]; then
        # cargo's errors and the output of failed tests stand in the middle.
        grep -E '^(test .* FAILED|error(\[E[0-9]+\])?:)' "$log" | sort -u | head -n 40 | sed 's/^/    | /'
        sed -n '/^---- .* stdout ----$/,/^failures:$/p' "$log" | head -n 100 | sed 's/^/    | /'
        echo "    | ... the end of $log:"
        tail -n 60 "$log" | sed 's/^/    | /'
    fi
}

for name in "${chosen[@]}"; do
    run_stage "$name"
done

echo
if [ "$skipped" -gt 0 ]; then
    echo "$passed passed, $failed failed, $skipped skipped"
else
    echo "$passed passed, $failed failed"
fi
[ "$failed" -eq 0 ]
