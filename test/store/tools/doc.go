// Package tools runs upstream's programs on the store: etcdctl and etcdutl, every
// command that applies, and a plain kube-apiserver. The store is three processes of
// skein-store, with mutual TLS. The Makefile builds the programs and names their
// directory in SKEIN_TOOLS; the tests have the tag storetools, as the programs take
// minutes to build for the first time.
package tools
