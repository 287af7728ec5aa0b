#!/bin/bash
# build.sh OUT [suite]: the unmodified Kubernetes conformance suite (OUT/e2e.test, OUT/ginkgo) and, unless only the suite is asked for,
# the images that its tests name, from the Go module proxy and the distribution's packages, as an OCI layout (OUT/images)
# with a server for it (OUT/registry). Some minutes for the first time; later ones take seconds.
set -euo pipefail
mkdir -p "$1"; out=$(cd "$1" && pwd)
cd "$(dirname "$0")"
kube=v1.36.3 v=k8s.io/component-base/version
flags=(-tags grpcnotrace -ldflags "-s -w -X $v.gitVersion=$kube -X $v.gitMajor=1 -X $v.gitMinor=36 -X $v.gitTreeState=clean")
export CGO_ENABLED=0
go test -c "${flags[@]}" -o "$out/e2e.test" k8s.io/kubernetes/test/e2e
go build "${flags[@]}" -o "$out/ginkgo" github.com/onsi/ginkgo/v2/ginkgo
[ "${2:-all}" = all ] || exit 0
go build "${flags[@]}" -o "$out/registry" ./images
mkdir -p "$out/bin"
go build "${flags[@]}" -o "$out/bin/" k8s.io/kubernetes/test/images/agnhost k8s.io/kubernetes/test/images/nonewprivs k8s.io/sample-apiserver
go build "${flags[@]}" -o "$out/bin/etcd" go.etcd.io/etcd/server/v3

# The images, anew when a program, this script or its helper changed.
sum=$(cat "$out"/bin/* build.sh rootfs.sh | sha256sum)
[ "$(cat "$out/images.sum" 2>/dev/null)" != "$sum" ] || exit 0
k=$(go list -m -f '{{.Dir}}' k8s.io/kubernetes) B=$out/bin
rm -rf "$out/images" "$out/roots"; mkdir "$out/roots"; cd "$out/roots"
helper=$OLDPWD/rootfs.sh
"$helper" "$PWD/agnhost" libc6 libc-bin bash dash coreutils curl netcat-openbsd bind9-dnsutils iproute2 ca-certificates hostname grep sed gawk procps findutils
install -m 644 "$k"/test/images/agnhost/porter/localhost.{crt,key} agnhost/; mkdir -p agnhost/uploads; ln -sf agnhost agnhost/agnhost-2
"$helper" "$PWD/nginx" nginx-light dash coreutils libc-bin
"$helper" "$PWD/busybox" busybox-static bash-static; chmod 1777 busybox/tmp # every applet a link
for a in $(busybox/bin/busybox --list); do [ "$a" = busybox ] || ln -sf busybox "busybox/bin/$a"; done
ln -sf bash-static busybox/bin/sh # busybox 1.35's drops variables like data-1, which 1.37's, that the tests name, hands on
printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n' > busybox/etc/passwd
printf 'root:x:0:\nnogroup:x:65534:\n' > busybox/etc/group
printf '#include <unistd.h>\nint main(void) { for (;;) pause(); }\n' > pause.c; gcc -Os -static -o pause pause.c
printf 'NAME="Alpine Linux"\nID=alpine\n' > os-release # one test greps for it in the kitten image
add() { "$out/registry" add -layout "$out/images" -name "$@"; }
t=e2e-test-images
ag=(-rootfs agnhost -file "$B/agnhost:/agnhost" -entrypoint /agnhost -port 80/tcp -port 8080/tcp -port 8081/tcp -port 9376/tcp -port 5000/tcp)
pics() { for f in "$1.jpg" data.json; do echo "-file $k/test/images/$1/html/$f:/$f:644"; done; }
add pause:3.10.2 -file pause:/pause -entrypoint /pause -user 65535:65535
add $t/busybox:1.37.0-1 -rootfs busybox -cmd sh
add $t/agnhost:2.63.0 "${ag[@]}" -cmd pause
add $t/agnhost:2.55 "${ag[@]}" -cmd pause -env AGNHOST_TAG=2.55
add $t/nautilus:1.8 "${ag[@]}" -cmd test-webserver $(pics nautilus)
add $t/kitten:1.8 "${ag[@]}" -cmd test-webserver $(pics kitten) -file os-release:/etc/os-release:644
add $t/nginx:1.15-4 -rootfs nginx -entrypoint 'nginx,-g,daemon off;' -port 80/tcp
add $t/nginx:1.27-0 -rootfs nginx -entrypoint 'nginx,-g,daemon off;' -port 80/tcp -env V=new
add $t/glibc-dns-testing:2.0.0 -rootfs agnhost
add $t/nonewprivs:1.4 -rootfs busybox -file "$B/nonewprivs:/usr/local/bin/nnp:4755" -cmd nnp
add $t/nonroot:1.5 -rootfs busybox -user 1234 -cmd sh
add $t/sample-apiserver:1.29.2 -file "$B/sample-apiserver:/sample-apiserver" -entrypoint /sample-apiserver
add etcd:3.6.8-0 -file "$B/etcd:/usr/local/bin/etcd" -entrypoint /usr/local/bin/etcd
cd /; rm -rf "$out/roots"
echo "$sum" > "$out/images.sum"
