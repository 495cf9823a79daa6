#!/usr/bin/env bash
# Runs a googletest binary's tests in two processes at once, half of them in each:
#
#   tests/run_gtest.sh BINARY [its arguments]
set -euo pipefail
log=$(mktemp)
export GTEST_BRIEF=1 GTEST_TOTAL_SHARDS=2
GTEST_SHARD_INDEX=1 "$@" >"$log" 2>&1 &
other=$!
trap 'kill $other 2>/dev/null || true; rm -f "$log"' EXIT
status=0
GTEST_SHARD_INDEX=0 "$@" || status=1
wait $other || status=1
cat "$log"
exit $status
