# Where things are: sourced by the scripts of this folder, never run.
#
# Sets: repo_dir (the checkout), target_dir (cargo's target folder, wherever the user put it), tools_dir (programs that
# no Debian package installs without side effects), and a PATH in which all of them are found.
# shellcheck shell=bash

repo_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Administrators' programs (mke2fs, losetup) are not on the PATH of ordinary users.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
# rustup puts cargo here and tells only login shells.
[ -d "${CARGO_HOME:-${HOME:-/nonexistent}/.cargo}/bin" ] && PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin

die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

command -v cargo >/dev/null ||
    die "cargo was not found: install Rust with rustup or your distribution, version $(
        sed -n 's/^rust-version = "\(.*\)"/\1/p' "$repo_dir/Cargo.toml") or newer, and run this again"

# cargo knows the folder from CARGO_TARGET_DIR or its configuration; --no-deps needs no network.
target_dir=$(cd "$repo_dir" && cargo metadata --no-deps --format-version 1 |
    sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')
[ -n "$target_dir" ] || die "cargo metadata did not name the target folder: is $repo_dir a whole checkout?"

# shellcheck disable=SC2034  # for the scripts that source this file
tools_dir=$target_dir/deploy-tools
PATH=$tools_dir/bin:$PATH
export PATH
