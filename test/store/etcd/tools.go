//go:build tools

// Package etcd builds upstream's etcd, etcdctl and etcdutl with the versions of
// the libraries that upstream releases them with. They are the peer of the
// benchmarks and the tools that the store has to satisfy; nothing of them is in
// Skein's own executables. It is a module of its own so that Skein's choice of
// versions does not change them.
//
//	cd test/store/etcd && go build -o ../../../bin/etcd go.etcd.io/etcd/server/v3
package etcd

import (
	_ "go.etcd.io/etcd/etcdctl/v3"
	_ "go.etcd.io/etcd/etcdutl/v3"
	_ "go.etcd.io/etcd/server/v3"
)
