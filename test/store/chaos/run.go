package chaos

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"skein.io/skein/test/store/chaos/history"
)

// scenario is a cluster, its traffic and what goes wrong.
type scenario struct {
	members, spares int
	args            []string // of the processes
	traffic         traffic
	edit            func(*traffic) // changes the default traffic
	faults          []string
	length          time.Duration
}

// verdict of a run.
type verdict struct {
	violations   []history.Violation
	ops, unknown int
	// refused as etcd refuses (no space, no such lease), and too late for a compaction.
	refused, compacted int
	watches, leases    int
	groups, linear     int
	revisions          int64
	fenced             int // writes of deposed leaders that were refused
	fenceWrites        int
	steps              int
}

func (v verdict) String() string {
	return fmt.Sprintf("%d faults, %d requests (%d without an answer, %d refused, %d compacted), %d revisions, %d watches, %d leases; porcupine: %d operations in %d groups; "+
		"fence: %d writes seen, %d refused; %d violations", v.steps, v.ops, v.unknown, v.refused, v.compacted, v.revisions, v.watches, v.leases, v.linear, v.groups,
		v.fenceWrites, v.fenced, len(v.violations))
}

// defaultTraffic is what every scenario begins with.
func defaultTraffic() traffic {
	return traffic{clients: 4, groups: 4, pause: 6 * time.Millisecond, leases: 1, roamers: 2, slow: 0,
		compact: 1200 * time.Millisecond, padding: 200}
}

// run a scenario. An error means that the cluster could not even finish.
func run(t testing.TB, bin string, sc scenario, seed int64) (v verdict, err error) {
	t.Helper()
	w := newWorld(t, bin, sc.members, sc.spares, sc.args...)
	l := startLoad(w, sc.traffic, seed)
	steps := schedule(seed, sc.faults, sc.length)
	err = w.torture(t.Context(), steps)
	healed := w.hist.Now()
	close(l.stop)
	l.users.Wait()
	if err == nil {
		err = w.settle(l)
		t.Logf("at rest %v after the last fault", (w.hist.Now() - healed).Round(time.Millisecond))
	}
	l.end()
	l.wg.Wait()
	if err != nil {
		return v, err
	}
	for _, n := range w.nodes {
		t.Logf("disk of %s: %+v", n.name, n.disk.Stats())
	}
	v = judge(w, healed)
	v.steps = len(steps)
	return v, nil
}

// settle waits until the healthy cluster has come to rest: every node serves,
// every watch has caught up, every lease that should has ended, and all replicas
// hold the same.
func (w *world) settle(l *load) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, n := range w.nodes {
		if !n.spare {
			if err := until(ctx, "readiness of "+n.name, n.ready); err != nil {
				w.t.Log(n.autopsy())
				return err
			}
		}
	}
	for _, s := range shardNames {
		if err := until(ctx, "end of leases", func(ctx context.Context) error { return w.leasesEnded(ctx, s) }); err != nil {
			w.t.Log(err) // the judge decides whether it is too late
		}
		if err := w.compareReplicas(ctx, l, s); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) leasesEnded(ctx context.Context, shard string) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	for _, n := range w.nodes {
		if n.spare {
			continue
		}
		r, err := pb.NewLeaseClient(n.conn(shard)).LeaseLeases(ctx, &pb.LeaseLeasesRequest{})
		if err != nil {
			return err
		}
		if len(r.Leases) > 0 {
			return fmt.Errorf("%s has %d leases", n.name, len(r.Leases))
		}
		return nil
	}
	return nil
}

// compareReplicas reads everything on every member at one revision, and compares
// the hashes of it.
func (w *world) compareReplicas(ctx context.Context, l *load, shard string) error {
	p := prefixes[shard]
	var rev int64
	for _, n := range w.nodes { // a linearizable read on each
		if n.spare {
			continue
		}
		err := until(ctx, n.name+" serves "+shard, func(ctx context.Context) error {
			op := n.do(ctx, &history.Op{Client: 9000, Shard: shard, Then: []history.Step{{Key: p, End: prefixEnd(p)}}})
			if op.Outcome != history.Done {
				return errors.New(op.Err)
			}
			rev = max(rev, op.Rev)
			return nil
		})
		if err != nil {
			return err
		}
	}
	type hash struct {
		hash    uint32
		compact int64
	}
	err := until(ctx, "equal replicas of "+shard, func(ctx context.Context) error {
		seen := map[hash]string{}
		for _, n := range w.nodes {
			if n.spare {
				continue
			}
			h, err := pb.NewMaintenanceClient(n.conn(shard)).HashKV(ctx, &pb.HashKVRequest{Revision: rev})
			if err != nil {
				return err
			}
			seen[hash{h.Hash, h.CompactRevision}] += n.name + " "
		}
		if len(seen) != 1 {
			return fmt.Errorf("%w at revision %d: %v", errDiverged, rev, seen)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, n := range w.nodes {
		if n.spare {
			continue
		}
		op := n.do(ctx, &history.Op{Client: 9001, Shard: shard, Serializable: true, Then: []history.Step{{Key: p, End: prefixEnd(p), Rev: rev}}})
		if op.Outcome != history.Done {
			return fmt.Errorf("%s does not serve %s: %s", n.name, shard, op.Err)
		}
	}
	// What the judge shall know about has to be in the watches.
	for _, m := range l.mains {
		if m.shard != shard || m.n.spare {
			continue
		}
		err := until(ctx, fmt.Sprintf("watch on %s of %s", m.n.name, shard), func(context.Context) error {
			if got := m.seen.Load(); got < rev {
				return fmt.Errorf("it is at revision %d, not %d", got, rev)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

var errDiverged = errors.New("replicas differ")

// judge the history of a world, whose traffic has ended.
func judge(w *world, healed time.Duration) verdict {
	v := verdict{ops: len(w.hist.Ops), watches: len(w.hist.Watches), leases: len(w.hist.Leases)}
	for _, o := range w.hist.Ops {
		switch o.Outcome {
		case history.Unknown:
			v.unknown++
		case history.Refused:
			v.refused++
		case history.Compacted:
			v.compacted++
		}
		v.revisions = max(v.revisions, o.Rev)
	}
	v.violations = history.Check(w.hist, history.Options{Healed: healed})
	var bad []history.Violation
	v.groups, v.linear, bad = history.Linearizable(w.hist, 30*time.Second)
	v.violations = append(v.violations, bad...)
	bad, v.fenceWrites = fenceTerms(w.hist)
	v.violations = append(v.violations, bad...)
	for _, n := range w.nodes {
		var c map[string]int64
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		if n.admin(ctx, "/fence", nil, &c) == nil {
			v.fenced += int(c["refused"])
		}
		cancel()
	}
	return v
}
