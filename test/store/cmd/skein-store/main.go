// Command skein-store is one node of the store and nothing else: a host in a
// process of its own, without gossip, API or agent. Benchmarks, fault tests and
// etcd's own tools run against it.
//
// What gossip does in a node, a file does here: --peers names it, one
// NAME=NODEHOSTID=ADDRESS[=IP:PORT of its first etcd endpoint] a line (or comma), read again when it changes. The
// process finds its own NodeHostID under its name. Membership is changed through
// the admin port; see admin.go.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/space"
)

// As the daemon's.
const (
	trimAfter = 10 * time.Second
	trimEvery = time.Minute
)

// closeTimeout bounds the handing over of leaderships at the end.
const closeTimeout = 5 * time.Second

type options struct {
	name, dir, listen, peers, etcd, admin, log string
	etcdCA, etcdCert, etcdKey                  string

	broken   string
	fence    bool
	progress time.Duration
	quota    int64

	rtt       time.Duration
	snapshots uint64
}

func main() {
	var o options
	flag.StringVar(&o.name, "name", "", "name of this node")
	flag.StringVar(&o.dir, "dir", "", "directory of the store")
	flag.StringVar(&o.listen, "listen", "127.0.0.1:0", "address of the Raft transport")
	flag.StringVar(&o.peers, "peers", "", "file of NAME=NODEHOSTID=ADDRESS, or the list itself")
	flag.StringVar(&o.etcd, "etcd", "", "IP:PORT of the first shard's etcd endpoint; the others follow it")
	flag.StringVar(&o.etcdCA, "etcd-ca", "", "file with the CA of etcd's clients; without it the endpoints are plaintext")
	flag.StringVar(&o.etcdCert, "etcd-cert", "", "file with the endpoints' certificate")
	flag.StringVar(&o.etcdKey, "etcd-key", "", "file with its key")
	flag.StringVar(&o.admin, "admin", "", "HOST:PORT of the admin endpoint")
	flag.StringVar(&o.log, "log", "", "log to stderr from this level on (debug, info, warn, error)")
	flag.DurationVar(&o.rtt, "rtt", 0, "unit of Raft's clock (0: the host's default)")
	flag.Uint64Var(&o.snapshots, "snapshot-entries", 0, "entries between two snapshots (0: the host's default); half of them are kept")
	flag.StringVar(&o.broken, "broken", "", "for tests of tests, break a promise: "+brokenModes())
	flag.BoolVar(&o.fence, "fence-writer", false, "while leading the cluster, and for a while after, write the term to every shard")
	flag.DurationVar(&o.progress, "progress", 0, "how often idle watches are told the revision (0: the host's default)")
	flag.Int64Var(&o.quota, "quota", 0, "bytes that a shard may have in use (0: the host's default)")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "skein-store:", err)
		os.Exit(1)
	}
}

func logger(level, name string) (*slog.Logger, error) {
	if level == "" {
		return nil, nil
	}
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, err
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: l})).With("node", name), nil
}

func run(ctx context.Context, o options) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	log, err := logger(o.log, o.name)
	if err != nil {
		return err
	}
	ps, err := openPeers(o.peers)
	if err != nil {
		return err
	}
	defer ps.close()
	id, ok := ps.id(o.name)
	if !ok {
		return fmt.Errorf("node %q is not among the peers", o.name)
	}
	etcd, err := o.etcdConfig(ps)
	if err != nil {
		return err
	}
	if err := host.Tune(host.Pace{}); err != nil {
		fmt.Fprintln(os.Stderr, "skein-store: tune the runtime:", err)
	}
	h, err := host.New(host.Config{
		Etcd:     etcd,
		NodeName: o.name, NodeHostID: id, Dir: o.dir, ListenAddr: o.listen,
		Resolve: ps.resolve, Peers: ps.ids, Name: ps.name,
		RTT: o.rtt, SnapshotEntries: o.snapshots, CompactionOverhead: o.snapshots / 2, Logger: log,
		WatchProgress: o.progress, Space: space.Config{Quota: o.quota},
		OnRemoved: func(r host.Removed) {
			ctx, cancel := context.WithTimeout(ctx, time.Minute)
			defer cancel()
			if err := r.Clear(ctx); err != nil {
				fmt.Fprintln(os.Stderr, "skein-store: clear a removed replica:", err)
			}
		},
	})
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { trim(ctx) })
	err = serve(ctx, h, o)
	stop()
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	if cerr := h.Close(ctx); err == nil {
		err = cerr
	}
	return err
}

// trim gives back what only the start used, and now and then what was read of files, as the
// daemon does.
func trim(ctx context.Context) {
	for after := trimAfter; ; after = trimEvery {
		select {
		case <-time.After(after):
		case <-ctx.Done():
			return
		}
		if err := host.TrimMapped(); err != nil {
			fmt.Fprintln(os.Stderr, "skein-store: give memory back:", err)
		}
	}
}

// serve runs the endpoints until ctx ends or one of them fails.
func serve(ctx context.Context, h *host.Host, o options) error {
	if o.broken != "" {
		b, err := serveBroken(h, o)
		if err != nil {
			return err
		}
		defer b.close()
	}
	var f *fenceWriter
	if o.fence {
		f = startFenceWriter(h)
		defer f.close()
	}
	failed := make(chan error, 1)
	if o.admin != "" {
		a, err := serveAdmin(h, o.admin, f, failed)
		if err != nil {
			return err
		}
		defer a.Close()
	}
	fmt.Printf("ready %s %s\n", h.NodeHostID(), h.Addr())
	select {
	case <-ctx.Done():
		return nil
	case err := <-failed:
		return err
	}
}
