package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"skein.io/skein/test/cputime"
	"skein.io/skein/test/peers"
)

const (
	block   = 250 // requests of one side before it is the other's turn
	settled = 40 * time.Second
)

// comparison is one run.
type comparison struct {
	config
	r     *report
	sides []*peers.Subject
	made  int // pods on each side
}

func (b *comparison) start(ctx context.Context) error {
	s, err := peers.StartSkein(ctx, b.skein, b.dir)
	if err != nil {
		return err
	}
	b.sides = []*peers.Subject{s}
	if b.apiserver != "" && !b.fast {
		p, err := peers.StartPeer(ctx, b.etcd, b.apiserver, b.dir)
		if err != nil {
			s.Stop()
			return err
		}
		b.sides = append(b.sides, p)
	}
	return nil
}

func (b *comparison) stop() {
	for _, s := range b.sides {
		s.Stop()
	}
}

func (b *comparison) wants(part string) bool {
	return b.only == "" || slices.Contains(strings.Split(b.only, ","), part)
}

func (b *comparison) all(ctx context.Context) error {
	for _, s := range b.sides {
		if err := s.Prepare(ctx, namespace); err != nil {
			return err
		}
	}
	for _, part := range []struct {
		name string
		do   func(context.Context) error
	}{{"idle", b.idle}, {"fill", b.fill}, {"requests", b.requests}, {"watches", b.watches}, {"delays", b.delays}, {"informers", b.informers}, {"held", b.held}, {"start", b.restarts}} {
		if b.fast && part.name == "delays" {
			continue
		}
		if part.name != "fill" && !b.wants(part.name) && !(part.name == "watches" && b.wants("events")) {
			continue
		}
		fmt.Fprintf(os.Stderr, "%s %s\n", time.Now().Format(time.TimeOnly), part.name)
		if err := part.do(ctx); err != nil {
			return err
		}
	}
	return nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

func (b *comparison) memory(what string) error {
	for _, s := range b.sides {
		m, err := peers.MemoryOf(s.Pids())
		if err != nil {
			return err
		}
		b.r.memory(what, s, m)
	}
	return nil
}

func (b *comparison) idle(ctx context.Context) error {
	if err := pause(ctx, settled); err != nil {
		return err
	}
	const d = 5 * time.Second
	before := make([]time.Duration, len(b.sides))
	for i, s := range b.sides {
		before[i], _ = cputime.Of(s.Pids()) // an error shows below
	}
	if err := pause(ctx, d); err != nil {
		return err
	}
	for i, s := range b.sides {
		now, err := cputime.Of(s.Pids())
		if err != nil {
			return err
		}
		b.r.put("idle: ms of CPU a second", s, float64((now-before[i]).Milliseconds())/d.Seconds())
	}
	return b.memory("idle")
}

// turns runs n requests of an operation on each side, a block at a time.
func (b *comparison) turns(ctx context.Context, op operation, first, n int) ([]cost, error) {
	costs := make([]cost, len(b.sides))
	ks := make([]*kubernetes.Clientset, len(b.sides))
	for i, s := range b.sides {
		var err error
		if ks[i], err = s.Client(op.media); err != nil {
			return nil, err
		}
	}
	size := block
	if strings.HasPrefix(op.name, "list") {
		size = 40
	}
	for at := 0; at < n; at += size {
		for i, s := range b.sides {
			c, err := run(ctx, s, ks[i], op, first+at, min(size, n-at))
			if err != nil {
				return nil, err
			}
			costs[i].add(c)
		}
	}
	return costs, nil
}

func (b *comparison) compare(ctx context.Context, op operation, first, n int) error {
	end := b.profile(op.name)
	costs, err := b.turns(ctx, op, first, n)
	end()
	if err != nil {
		return err
	}
	for i, s := range b.sides {
		b.r.cost(op.name, s, costs[i])
	}
	return nil
}

func (b *comparison) create(ctx context.Context, n int) ([]cost, error) {
	c, err := b.turns(ctx, create(b.made), 0, n)
	b.made += n
	return c, err
}

func (b *comparison) fill(ctx context.Context) error {
	if !b.wants("idle") { // both have just started, and Skein collects as one that starts for 20 s
		if err := pause(ctx, 25*time.Second); err != nil {
			return err
		}
	}
	if _, err := b.create(ctx, 2*block); err != nil { // warms both
		return err
	}
	n := b.pods - b.made
	if b.wants("watches") || b.wants("events") {
		n -= eventPods // so that what is measured with all pods is with so many
	}
	if n <= 0 { // few pods: what the watches make is enough
		return nil
	}
	if err := b.compare(ctx, create(b.made), 0, n); err != nil {
		return err
	}
	b.made += n
	return nil
}

func (b *comparison) requests(ctx context.Context) error {
	for _, op := range operations(b.made) {
		n := max(2000, b.pods/4)
		if strings.HasPrefix(op.name, "list") {
			n = 160
		}
		if _, err := b.turns(ctx, op, 0, n/10); err != nil { // warms both
			return err
		}
		if err := b.compare(ctx, op, 0, n); err != nil {
			return err
		}
	}
	return nil
}

// profile takes a profile of Skein's CPU, and one of what it allocates, and returns what waits for them.
func (b *comparison) profile(name string) (end func()) {
	if b.profiles == "" {
		return func() {}
	}
	file := filepath.Join(b.profiles, strings.NewReplacer(" ", "-", ",", "").Replace(name))
	cpu := fetchProfile(b.sides[0].Config, fmt.Sprint("/debug/pprof/profile?seconds=", b.seconds), file+".pprof")
	allocs := fetchProfile(b.sides[0].Config, fmt.Sprint("/debug/pprof/allocs?seconds=", b.seconds), file+".allocs.pprof")
	return func() { cpu(); allocs() }
}

func fetchProfile(cfg *rest.Config, what, file string) (wait func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := peers.Fetch(cfg, what, file); err != nil {
			fmt.Fprintln(os.Stderr, "profile:", err)
		}
	}()
	return func() { <-done }
}

// held is the memory with all pods and 50 watches of them, after the load.
func (b *comparison) held(ctx context.Context) error { return b.hold(ctx, "after the load") }

func (b *comparison) hold(ctx context.Context, when string) error {
	var ws []*watchers
	defer func() {
		for _, w := range ws {
			w.stop()
		}
	}()
	for _, s := range b.sides {
		k, err := s.Client(protobuf)
		if err != nil {
			return err
		}
		rv, err := revision(ctx, k)
		if err != nil {
			return err
		}
		ws = append(ws, watch(ctx, k, 50, func(int) metav1.ListOptions { return metav1.ListOptions{ResourceVersion: rv} }))
	}
	if err := pause(ctx, settled); err != nil {
		return err
	}
	if b.profiles != "" {
		fetchProfile(b.sides[0].Config, "/metrics", filepath.Join(b.profiles, "metrics.txt"))()
		fetchProfile(b.sides[0].Config, "/debug/pprof/heap?gc=1", filepath.Join(b.profiles, "heap.pprof"))()
		fetchProfile(b.sides[0].Config, "/debug/pprof/goroutine?debug=1", filepath.Join(b.profiles, "goroutines.txt"))()
	}
	return b.memory(fmt.Sprintf("%d pods, 50 watches, %s", b.made, when))
}

func revision(ctx context.Context, k *kubernetes.Clientset) (string, error) {
	l, err := k.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{Limit: 1})
	if err != nil {
		return "", err
	}
	return l.ResourceVersion, nil
}

// eventPods are created while the cost of an event is measured: some with watches and as many without, in turns, since one collection more or less of a side's
// memory is a fifth of what 500 of them show.
const (
	eventTurns = 3
	eventPods  = 2 * eventTurns * eventBlock
	eventBlock = 500
)

// watches measures what an event costs for a watch that gets it, and what watches cost a write that does not concern them.
func (b *comparison) watches(ctx context.Context) error {
	// An event costs a hundredth of a create, so of few watches it would be lost in the difference between two creates.
	const few = 200
	without, with := make([]time.Duration, len(b.sides)), make([]time.Duration, len(b.sides))
	for turn := range eventTurns {
		plain, err := b.create(ctx, eventBlock)
		if err != nil {
			return err
		}
		end := func() {}
		if turn == eventTurns-1 {
			end = b.profile("watch")
		}
		all, err := b.watched(ctx, few, eventBlock)
		end()
		if err != nil {
			return err
		}
		for i := range b.sides {
			without[i] += plain[i].cpu
			with[i] += all[i]
		}
	}
	for i, s := range b.sides {
		b.r.cost("watch event", s, cost{n: few * eventTurns * eventBlock, cpu: max(0, with[i]-without[i])})
	}
	if !b.wants("watches") {
		return nil
	}
	return b.byNode(ctx)
}

// open opens k watches on each side, of the nodes that node names.
func (b *comparison) open(ctx context.Context, k int, node func(int) string) (ws []*watchers, stop func(), err error) {
	stop = func() {
		for _, w := range ws {
			w.stop()
		}
	}
	for _, s := range b.sides {
		kc, err := s.Client(protobuf)
		if err == nil {
			var rv string
			if rv, err = revision(ctx, kc); err == nil {
				ws = append(ws, watch(ctx, kc, k, func(i int) metav1.ListOptions {
					return metav1.ListOptions{ResourceVersion: rv, FieldSelector: node(i)}
				}))
			}
		}
		if err != nil {
			stop()
			return nil, nil, err
		}
	}
	return ws, stop, pause(ctx, 3*time.Second)
}

// alive tells which watches were ended.
func (b *comparison) alive(ws []*watchers) error {
	for i, s := range b.sides {
		if w := ws[i]; w.ended.Load() > 0 {
			return fmt.Errorf("%s: %d watches were ended: %w", s.Name, w.ended.Load(), *w.err.Load())
		}
	}
	return nil
}

// watched is what n creates cost that k watches are told of.
func (b *comparison) watched(ctx context.Context, k, n int) ([]time.Duration, error) {
	ws, stop, err := b.open(ctx, k, func(int) string { return "" })
	if err != nil {
		return nil, err
	}
	defer stop()
	before := make([]time.Duration, len(b.sides))
	for i, s := range b.sides {
		before[i], _ = cputime.Of(s.Pids()) // an error shows below
	}
	if _, err := b.create(ctx, n); err != nil {
		return nil, err
	}
	for i, s := range b.sides {
		if err := ws[i].await(s.Name, time.Minute, func() bool { return ws[i].events.Load() >= int64(k*n) }); err != nil {
			return nil, err
		}
		if got := ws[i].events.Load(); got != int64(k*n) {
			return nil, fmt.Errorf("%s: %d events, want %d", s.Name, got, k*n)
		}
	}
	if err := pause(ctx, time.Second); err != nil { // what came after the last answer, too
		return nil, err
	}
	cpu := make([]time.Duration, len(b.sides))
	for i, s := range b.sides {
		now, err := cputime.Of(s.Pids())
		if err != nil {
			return nil, err
		}
		cpu[i] = now - before[i]
	}
	return cpu, b.alive(ws)
}

// informers starts 50 that all want everything at once.
func (b *comparison) informers(ctx context.Context) error {
	const n = 50
	yes := true
	if err := pause(ctx, 15*time.Second); err != nil { // what the watches before took is given back
		return err
	}
	for _, s := range b.sides {
		k, err := s.Client(protobuf)
		if err != nil {
			return err
		}
		if err := peers.ResetPeak(s.Pids()); err != nil {
			return err
		}
		before, err := cputime.Of(s.Pids())
		if err != nil {
			return err
		}
		began := time.Now()
		var end func()
		if s == b.sides[0] {
			end = b.profile("informers")
		}
		anonymous := peers.HighestAnonymous(s.Pids()[:1])
		w := watch(ctx, k, n, func(int) metav1.ListOptions {
			return metav1.ListOptions{SendInitialEvents: &yes, ResourceVersionMatch: metav1.ResourceVersionMatchNotOlderThan, AllowWatchBookmarks: true}
		})
		err = w.await(s.Name+": 50 informers", 10*time.Minute, func() bool { return w.synced.Load() == n })
		took := time.Since(began)
		if got := w.events.Load(); err == nil && got < int64(n*b.made) { // more: bookmarks of those who wait for the others
			err = fmt.Errorf("%s: %d initial events, want %d", s.Name, got, n*b.made)
		}
		w.stop()
		if end != nil {
			end()
		}
		if err != nil {
			return err
		}
		now, err := cputime.Of(s.Pids())
		if err != nil {
			return err
		}
		m, err := peers.MemoryOf(s.Pids()[:1])
		if err != nil {
			return err
		}
		b.r.put(informerPeak, s, m.Peak)
		b.r.put("50 informers at once: highest anonymous MB seen of the API's process", s, anonymous())
		b.r.put("50 informers at once: seconds", s, took.Seconds())
		b.r.put("50 informers at once: seconds of CPU", s, (now - before).Seconds())
	}
	return nil
}

const (
	informerPeak = "50 informers at once: peak resident MB of the API's process"
	startTime    = "start of the API's process on this store until ready, s"
)

func (b *comparison) restarts(ctx context.Context) error {
	for _, s := range b.sides {
		took, err := s.Restart(ctx)
		if err != nil {
			return fmt.Errorf("%s: %w", s.Name, err)
		}
		cpu, err := cputime.Of(s.Pids()[:1])
		if err != nil {
			return fmt.Errorf("%s: %w", s.Name, err)
		}
		b.r.put(startTime, s, took.Seconds())
		b.r.put("start: seconds of CPU of the API's process until ready", s, cpu.Seconds())
	}
	return b.hold(ctx, "after a start")
}
