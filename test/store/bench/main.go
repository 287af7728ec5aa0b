// Command bench compares the store with etcd: three processes of each on this
// machine, the same client against both, cell by cell in turns (A B C, B C A, ...),
// so that what disturbs one disturbs the other. It prints ratios, so that numbers
// of different machines can be compared.
//
// "spread" is Skein with the keys over all its shards, as in a cluster; "one" is a
// single shard of it, "system". etcd has one log for all keys. Every system runs
// with its defaults, over plain sockets.
//
//	make bench-store                # all of it, into out/bench-store.md
//	make bench-store-fast           # a slice that takes about a minute, with loose bounds
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// prefixes of what is written: each in a shard of its own, where there are several.
var prefixes = []string{"/registry/configmaps/bench/", "/registry/pods/bench/", "/registry/events/bench/"}

const (
	valueSize = 1024
	// idleFor is how long a cluster rests before its memory counts as idle.
	idleFor = 12 * time.Second
	// restFor is how long it rests after those writes before it is measured once more:
	// what a burst of work leaves behind.
	restFor = 10 * time.Second
	// memoryWrites puts go over memoryKeys keys before memory is measured again.
	memoryWrites, memoryKeys = 100_000, 10_000
	// fastBound is what a cell of the slice for CI may not fall below. It finds what
	// is broken, not what is slow: neighbours of a CI machine are noisy.
	fastBound = 0.4
)

type options struct {
	etcd, skein, before, dir, out, workloads, clients, systems, skeinFlags, profiles string
	duration                                                                         time.Duration
	reps                                                                             int
	memory, fast                                                                     bool
}

func main() {
	var o options
	flag.StringVar(&o.etcd, "etcd", "bin/etcd", "executable of etcd")
	flag.StringVar(&o.skein, "skein", "bin/skein-store", "executable of the store")
	flag.StringVar(&o.before, "before", "", "executable of another version of the store, for the systems spread-before and one-before")
	flag.StringVar(&o.dir, "dir", "", "where the data goes (a temporary directory); its disk is what is measured")
	flag.StringVar(&o.out, "o", "", "write the report to this file as well")
	flag.StringVar(&o.workloads, "workloads", "put,cas,lrange,srange,list,watch,watch3", "what to run; watch3 is over three prefixes")
	flag.StringVar(&o.clients, "clients", "1,16,64,256", "how many clients at the same time")
	flag.StringVar(&o.systems, "systems", "etcd,spread,one", "what to compare; the first is the base")
	flag.StringVar(&o.skeinFlags, "skein-flags", "", "more flags for the store")
	flag.StringVar(&o.profiles, "profiles", "", "directory for profiles of Skein's processes in each cell, and of their memory")
	flag.DurationVar(&o.duration, "d", 1500*time.Millisecond, "how long a cell is measured")
	flag.IntVar(&o.reps, "reps", 5, "repetitions of each cell")
	flag.BoolVar(&o.memory, "memory", true, "measure memory, idle and after 100,000 writes")
	flag.BoolVar(&o.fast, "fast", false, fmt.Sprintf("a fast slice; fails if a ratio is below %.1f", fastBound))
	flag.Parse()
	if o.fast {
		o.workloads, o.clients, o.systems = "put,cas,lrange,watch3", "1,64", "etcd,spread"
		o.duration, o.reps, o.memory = time.Second, 3, false
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx, o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// systems under test by name; two names may share a cluster.
type lab struct {
	b        *bench
	clusters []*cluster
	targets  []*target
}

func (l *lab) close() {
	for _, t := range l.targets {
		t.close()
	}
	for _, c := range l.clusters {
		c.stop()
	}
}

func start(ctx context.Context, o options, dir string) (l *lab, err error) {
	l = &lab{b: &bench{value: make([]byte, valueSize), duration: o.duration, profiles: profiles{o.profiles}}}
	defer func() {
		if err != nil {
			l.close()
			l = nil
		}
	}()
	source := rand.NewChaCha8([32]byte{1})
	_, _ = source.Read(l.b.value) // never fails
	if l.b.disk, err = diskOf(dir); err != nil {
		return l, err
	}
	made := map[string]*cluster{}
	for _, name := range strings.Split(o.systems, ",") {
		kind, ps, bin := "skein", prefixes, o.skein
		switch name {
		case "etcd":
			kind = "etcd"
		case "spread":
		case "one":
			ps = prefixes[:1]
		case "spread-before":
			kind, bin = "skein-before", o.before
		case "one-before":
			kind, ps, bin = "skein-before", prefixes[:1], o.before
		default:
			return l, fmt.Errorf("unknown system %q", name)
		}
		c := made[kind]
		if c == nil {
			if kind == "etcd" {
				c, err = startEtcd(ctx, o.etcd, dir)
			} else {
				c, err = startSkein(ctx, kind, bin, dir, strings.Fields(o.skeinFlags))
			}
			if c != nil {
				l.clusters = append(l.clusters, c)
			}
			if err != nil {
				return l, fmt.Errorf("start %s: %w", kind, err)
			}
			made[kind] = c
		}
		t, err := connect(name, c, ps)
		if err != nil {
			return l, err
		}
		l.targets = append(l.targets, t)
	}
	return l, nil
}

func run(ctx context.Context, o options) (err error) {
	dir, err := os.MkdirTemp(o.dir, "bench-store-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	var sinks = []io.Writer{os.Stdout}
	if o.out != "" {
		f, err := os.Create(o.out)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, f.Close()) }()
		sinks = append(sinks, f)
	}
	rep := &report{w: io.MultiWriter(sinks...)}
	if err := rep.machine(dir); err != nil {
		return err
	}
	l, err := start(ctx, o, dir)
	if err != nil {
		return err
	}
	defer l.close()
	lighten()
	if o.memory {
		if err := l.memoryFirst(ctx, rep); err != nil {
			return err
		}
	}
	low, err := l.cells(ctx, o, rep)
	if err != nil {
		return err
	}
	if o.memory {
		if err := rep.memory("after all of the load above", l.clusters); err != nil {
			return err
		}
		rep.memoryTable()
	}
	if o.fast && low < fastBound {
		return fmt.Errorf("the lowest ratio is %.2f, at least %.1f is expected", low, fastBound)
	}
	return nil
}

// memoryFirst measures fresh clusters, idle and after writes.
func (l *lab) memoryFirst(ctx context.Context, rep *report) error {
	if err := rest(ctx, idleFor); err != nil {
		return err
	}
	if err := rep.idle(l.clusters); err != nil {
		return err
	}
	done := map[*cluster]bool{}
	for _, t := range l.targets {
		if done[t.cluster] {
			continue
		}
		done[t.cluster] = true
		key := func(k keyset, i int) []byte {
			return fmt.Appendf(nil, "%smemory/%d", k.prefix, i%(memoryKeys/len(t.sets)))
		}
		if err := l.b.fill(ctx, t, memoryWrites, key); err != nil {
			return err
		}
	}
	if err := rep.memory("after 100,000 writes", l.clusters); err != nil {
		return err
	}
	if err := l.b.profiles.memory(ctx, l.clusters, "memory"); err != nil {
		return err
	}
	if err := rest(ctx, restFor); err != nil {
		return err
	}
	return rep.memory(fmt.Sprintf("%.0f s later", restFor.Seconds()), l.clusters)
}

func rest(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// cells runs everything and returns the lowest ratio of the second system.
func (l *lab) cells(ctx context.Context, o options, rep *report) (low float64, err error) {
	for _, t := range l.targets {
		if err := l.b.fill(ctx, t, listed*len(t.sets), listKey); err != nil {
			return 0, err
		}
	}
	ops := l.b.ops()
	low = 1e9
	rep.head(l.targets)
	for _, w := range strings.Split(o.workloads, ",") {
		for _, c := range strings.Split(o.clients, ",") {
			n, err := strconv.Atoi(c)
			if err != nil {
				return 0, fmt.Errorf("clients: %w", err)
			}
			watch := strings.HasPrefix(w, "watch")
			if watch && n != 16 && !(o.fast && n == 64) {
				continue // the writers are not what is measured
			}
			if ops[w] == nil && !watch {
				return 0, fmt.Errorf("unknown workload %q", w)
			}
			results, err := l.cell(ctx, o, w, ops[w], n)
			if err != nil {
				return 0, fmt.Errorf("%s with %d clients: %w", w, n, err)
			}
			if r := rep.row(w, n, results); len(r) > 1 && r[1] > 0 {
				low = min(low, r[1])
			}
		}
	}
	return low, nil
}

// cell returns the results by target and repetition; none for a target that the
// workload does not suit.
func (l *lab) cell(ctx context.Context, o options, name string, do op, n int) ([][]result, error) {
	results := make([][]result, len(l.targets))
	for rep := range o.reps {
		for i := range l.targets {
			j := (i + rep) % len(l.targets) // another one goes first every time
			t := l.targets[j]
			r, ok, err := l.once(ctx, t, name, do, n)
			if err != nil {
				return nil, err
			}
			if ok {
				results[j] = append(results[j], r)
			}
		}
	}
	return results, nil
}

// once runs one cell against one target. The watched prefixes are as many for all
// systems: three, or one, which one shard keeps.
func (l *lab) once(ctx context.Context, t *target, name string, do op, n int) (r result, ok bool, err error) {
	switch name {
	case "watch":
		if spread := len(t.cluster.etcd) > 1 && len(t.sets) > 1; spread {
			return r, false, nil
		}
		r, err = l.b.watch(ctx, t, t.sets[:1], n)
	case "watch3":
		if len(t.sets) < len(prefixes) {
			return r, false, nil
		}
		r, err = l.b.watch(ctx, t, t.sets, n)
	default:
		r, err = l.b.closed(ctx, t, name, do, n)
	}
	if err == nil && (do == nil || name == "put" || name == "cas") {
		err = l.b.compact(ctx, t)
	}
	return r, true, err
}
