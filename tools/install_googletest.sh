#!/usr/bin/env bash
# Makes sure CMake will find googletest: the system's package or its sources.
set -eu
have() { ls -d /usr/src/googletest /usr/lib*/cmake/GTest /usr/lib/*/cmake/GTest \
              /usr/local/lib*/cmake/GTest "${GTest_DIR:-/nonexistent}" 2>/dev/null | grep -q .; }
have && exit 0
as_root=""
[ "$(id -u)" = 0 ] || as_root="sudo"
if command -v apt-get >/dev/null && { [ -z "$as_root" ] || command -v sudo >/dev/null; }; then
  echo "installing googletest (libgtest-dev)"
  $as_root apt-get update -qq && $as_root apt-get install -y -qq libgtest-dev >/dev/null
fi
have && exit 0
echo "googletest not found: install it (Debian: libgtest-dev, Fedora: gtest-devel) or set GTest_DIR" >&2
exit 1
