#!/bin/sh
# Regenerates skein_bpfel.{go,o} from the C sources beside it, or with "check" fails if the committed ones differ.
# The object depends on the compiler's version, so that is pinned: clang-14 and llvm-strip-14 (Debian 12), libbpf-dev.
set -eu
cd "$(dirname "$0")"
for tool in clang-14 llvm-strip-14; do
	command -v "$tool" >/dev/null || { echo "generate.sh: $tool is missing: apt-get install clang-14 llvm-14 libbpf-dev" >&2; exit 2; }
done
out=.
if [ "${1:-}" = check ]; then
	out=$(mktemp -d)
	trap 'rm -rf "$out"' EXIT
fi
inc=$(ls -d /usr/include/*-linux-gnu | head -n 1)
GOPACKAGE=bpf go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel -output-dir "$out" \
	-no-global-types Skein skein.c -- -O2 -Wall -Werror -I"$inc" >/dev/null
sha256sum skein.c ./*.h | sed 's# \./# #' >"$out/sources.sha256"
[ "$out" = . ] && exit 0
for f in skein_bpfel.go skein_bpfel.o sources.sha256; do
	cmp "$f" "$out/$f" || { echo "generate.sh: $f does not match its sources: run datapath/bpf/generate.sh and commit" >&2; exit 1; }
done
