#!/bin/bash
# run.sh COMMAND TOGETHER ALONE: runs the test command on packages that may run side by side, then on those that must not, and
# reports both. Up to three packages that failed run once more, alone: these tests use real clocks, disks and networks of a machine
# that may be busy. A package that failed once and then passed is named as FLAKY; one that fails twice fails the run.
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p out
failed=out/failed.$$
trap 'rm -f "$failed"' EXIT
{ [ -z "$2" ] || eval "env $1 $(echo $2)"; [ -z "$3" ] || eval "env $1 -p 1 $(echo $3)"; } | go run ./test/report -failed "$failed" && exit 0
mapfile -t again < "$failed"
[ ${#again[@]} -ge 1 ] && [ ${#again[@]} -le 3 ] || exit 1
echo; echo "once more, alone: ${again[*]}"
eval "env $1 -p 1 -count=1 ${again[*]}" | go run ./test/report || exit 1
printf 'FLAKY %s\n' "${again[@]}"
