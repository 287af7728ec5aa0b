#!/bin/bash
# Installs what Skein and its tests need from the distribution, and nothing when all of it is there. The argument is the make
# target that it is for.
set -euo pipefail
[ "$(uname -s)" = Linux ] || { echo "Skein runs on Linux; this is $(uname -s)" >&2; exit 1; }
[ "$(id -u)" = 0 ] || { echo "root is needed: containers, eBPF and network namespaces (try: sudo make ${1:-demo})" >&2; exit 1; }
export PATH=$PATH:/usr/sbin:/sbin
need=()
command -v runc >/dev/null || need+=(runc)
command -v ip >/dev/null || need+=(iproute2)
command -v tc >/dev/null || need+=(iproute2)
command -v nft >/dev/null || need+=(nftables)        # the laboratory cuts nodes off with it
case ${1:-} in demo*) ;; *) command -v gcc >/dev/null || need+=(gcc libc6-dev) ;; esac # the race detector needs cgo
command -v go >/dev/null || { echo "Go is needed to build Skein: https://go.dev/dl (or add its bin directory to PATH)" >&2; exit 1; }
[ ${#need[@]} = 0 ] && exit 0
command -v apt-get >/dev/null || { echo "install ${need[*]} with this distribution's package manager" >&2; exit 1; }
echo "installing ${need[*]}"
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -yqq --no-install-recommends "${need[@]}" >/dev/null
