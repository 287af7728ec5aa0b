// Command apibench compares what the Kubernetes API costs on Skein with what it costs on upstream: one daemon of Skein, with all
// that is in it, against kube-apiserver and etcd, side by side and in turns, so that whatever else the machine does
// hits both. What counts is CPU time and memory of their processes, not the speed of a loaded machine.
//
// It needs root (Skein runs on a machine made of namespaces) and leaves nothing behind.
package main

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

type config struct {
	skein, apiserver, etcd string // executables
	dir, out, profiles     string
	pods, seconds          int
	fast                   bool
	only                   string
}

func main() {
	var c config
	bin := func(name string) string { return filepath.Join("bin", name) }
	flag.StringVar(&c.skein, "skein", bin("skein"), "Skein")
	flag.StringVar(&c.apiserver, "kube-apiserver", bin("kube-apiserver"), "upstream's API server; none: Skein alone")
	flag.StringVar(&c.etcd, "etcd", bin("etcd"), "upstream's etcd")
	flag.StringVar(&c.dir, "dir", "", "where to keep data while it runs; default a temporary directory")
	flag.StringVar(&c.out, "o", "", "file for the report")
	flag.StringVar(&c.profiles, "profiles", "", "directory for profiles of Skein's CPU, one an operation")
	flag.IntVar(&c.seconds, "seconds", 8, "how long a profile takes")
	flag.IntVar(&c.pods, "pods", 10000, "pods to fill the stores with")
	flag.BoolVar(&c.fast, "fast", false, "Skein alone, a few pods, and fail on memory and on the cost of watches that are not concerned")
	flag.StringVar(&c.only, "only", "", "only these parts: idle,requests,watches,informers,start,thin")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := bench(ctx, c); err != nil {
		fmt.Fprintln(os.Stderr, "apibench:", err)
		os.Exit(1)
	}
}

func bench(ctx context.Context, c config) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("namespaces and cgroups need root")
	}
	if c.dir == "" {
		if c.dir, err = os.MkdirTemp("", "apibench-"); err != nil {
			return err
		}
		defer os.RemoveAll(c.dir)
	}
	for _, p := range []*string{&c.skein, &c.apiserver, &c.etcd} {
		if *p != "" {
			if *p, err = filepath.Abs(*p); err != nil {
				return err
			}
		}
	}
	b := &comparison{config: c, r: &report{}}
	if err := b.start(ctx); err != nil {
		return err
	}
	defer b.stop()
	if err := b.all(ctx); err != nil {
		return err
	}
	text := b.r.text(c)
	fmt.Print(text)
	if c.out != "" {
		if err := os.WriteFile(c.out, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return b.r.verdict(c)
}
