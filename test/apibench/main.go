// Command apibench compares what the Kubernetes API costs on Skein with what it costs on upstream: one daemon of Skein, with all
// that is in it, against kube-apiserver and etcd, side by side and in turns, so that whatever else the machine does
// hits both. What counts is CPU time and memory of their processes, not the speed of a loaded machine.
//
// It needs root (Skein runs on a machine made of namespaces) and leaves nothing behind.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"

	"skein.io/skein/test/peers"
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
	peers.Options{Skein: &c.skein, APIServer: &c.apiserver, Etcd: &c.etcd, Dir: &c.dir, Out: &c.out, Profiles: &c.profiles, Profiled: "an operation"}.Flags()
	flag.IntVar(&c.seconds, "seconds", 8, "how long a profile takes")
	flag.IntVar(&c.pods, "pods", 10000, "pods to fill the stores with")
	flag.BoolVar(&c.fast, "fast", false, "Skein alone, a few pods, and fail on memory and on the cost of watches that are not concerned")
	flag.StringVar(&c.only, "only", "", "only these parts: idle,requests,watches (events: those that concern the watchers, alone),delays,informers,start,thin")
	peers.Main("apibench", func(ctx context.Context) error { return bench(ctx, c) })
}

func bench(ctx context.Context, c config) (err error) {
	remove, err := peers.Ready("apibench", &c.dir, &c.skein, &c.apiserver, &c.etcd)
	if err != nil {
		return err
	}
	defer remove()
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
