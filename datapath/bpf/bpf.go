// Package bpf holds Skein's kernel programs: C sources, the object compiled from them (committed, so that building Skein
// needs no C compiler) and the Go code that embeds it. It has no behaviour of its own; datapath/loader is its only user.
//
// skein.c includes maps.h (tables), pick.h (choice of a back end), sock.h (socket hooks) and nat.h (device hooks).
// generate.sh rebuilds the object; "generate.sh check" and the package's test show that it belongs to the sources.
package bpf

//go:generate ./generate.sh
