package peers

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
)

// Options of the benchmarks beside upstream's programs, by where each goes. Profiled says what there is a profile for.
type Options struct {
	Skein, APIServer, Etcd *string // executables
	Dir, Out, Profiles     *string
	Profiled               string
}

// Flags declares their flags.
func (o Options) Flags() {
	Program(o.Skein, "skein", "Skein")
	Program(o.APIServer, "kube-apiserver", "upstream's API server; none: Skein alone")
	Program(o.Etcd, "etcd", "upstream's etcd")
	flag.StringVar(o.Dir, "dir", "", "where to keep data while it runs; default a temporary directory")
	flag.StringVar(o.Out, "o", "", "file for the report")
	flag.StringVar(o.Profiles, "profiles", "", "directory for profiles of Skein's CPU, one "+o.Profiled)
}

// Program declares the flag for an executable, which make puts into bin.
func Program(path *string, name, usage string) {
	flag.StringVar(path, name, filepath.Join("bin", name), usage)
}

// Main parses the flags and runs a benchmark of that name until it ends or is interrupted.
func Main(name string, bench func(context.Context) error) {
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := bench(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		os.Exit(1)
	}
}

// Ready checks who runs the benchmark, makes its directory if none was named, and the names of programs good in any directory. The
// function that it returns removes the directory that it made.
func Ready(name string, dir *string, programs ...*string) (remove func(), err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("namespaces and cgroups need root")
	}
	for _, p := range programs {
		if *p != "" {
			if *p, err = filepath.Abs(*p); err != nil {
				return nil, err
			}
		}
	}
	if *dir != "" {
		return func() {}, nil
	}
	if *dir, err = os.MkdirTemp("", name+"-"); err != nil {
		return nil, err
	}
	return func() { os.RemoveAll(*dir) }, nil
}
