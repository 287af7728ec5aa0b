// Command schedbench compares Skein's scheduler with upstream's: one daemon of Skein, with all that is in it, against kube-apiserver, etcd and
// kube-scheduler, side by side and in turns, on the workloads of upstream's scheduler_perf. Nodes are made by hand: they are objects
// whose Leases this program renews, as their agents would. Pods are created through the API, and count when a watch shows them bound.
//
// It needs root (Skein runs on a machine made of namespaces) and leaves nothing behind.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"

	"skein.io/skein/test/peers"
)

type config struct {
	skein, apiserver, etcd, scheduler string // executables
	dir, out, profiles                string
	only                              string
	small, large                      int // nodes
	pods, rounds                      int
	crowd                             int // pods for the measure of memory
	fast                              bool
}

func main() {
	var c config
	peers.Options{Skein: &c.skein, APIServer: &c.apiserver, Etcd: &c.etcd, Dir: &c.dir, Out: &c.out, Profiles: &c.profiles, Profiled: "a workload"}.Flags()
	peers.Program(&c.scheduler, "kube-scheduler", "upstream's scheduler")
	flag.StringVar(&c.only, "only", "", "only these parts: the workloads "+names()+", and api,latency,memory")
	flag.IntVar(&c.small, "small", 500, "nodes of the first half of the run")
	flag.IntVar(&c.large, "large", 5000, "nodes of the second half; 0: no second half")
	flag.IntVar(&c.pods, "pods", 2000, "pods of a workload")
	flag.IntVar(&c.rounds, "rounds", 2, "turns of each side")
	flag.IntVar(&c.crowd, "crowd", 30000, "pods for the measure of memory")
	flag.BoolVar(&c.fast, "fast", false, "Skein alone on few nodes, and fail if it is slow")
	peers.Main("schedbench", func(ctx context.Context) error { return bench(ctx, c) })
}

func bench(ctx context.Context, c config) (err error) {
	if c.fast {
		c.apiserver, c.large, c.rounds, c.small, c.pods = "", 0, 1, 200, 600
	}
	remove, err := peers.Ready("schedbench", &c.dir, &c.skein, &c.apiserver, &c.etcd, &c.scheduler)
	if err != nil {
		return err
	}
	defer remove()
	r := &run{config: c, r: &report{}}
	if err := r.start(ctx); err != nil {
		return err
	}
	defer r.stop()
	err = r.all(ctx)
	text := r.r.text()
	fmt.Print(text)
	if c.out != "" {
		err = errors.Join(err, os.WriteFile(c.out, []byte(text), 0o644))
	}
	if err != nil {
		return err
	}
	return r.r.verdict(c)
}
