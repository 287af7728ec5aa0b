package host_test

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"skein.io/skein/consensus/etcdapi"
	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/internal/storetest"
	"skein.io/skein/consensus/space"
)

// systemShard is what a node says about the shard that the tests write to.
func systemShard(c *storetest.Cluster, node int) host.ShardStatus {
	for _, s := range c.Nodes[node].Host().Status() {
		if s.Shard == storetest.Shard {
			return s
		}
	}
	return host.ShardStatus{}
}

func hasAlarm(s host.ShardStatus, kind string) bool {
	for _, a := range s.Alarms {
		if a.Kind == kind {
			return true
		}
	}
	return false
}

// A shard that is full says so, on every node, and takes only what makes it
// smaller. When things have been deleted it goes on by itself, and its files
// become smaller on every node.
func TestQuota(t *testing.T) {
	const quota = 16 << 20
	c := storetest.New(t, 3, func(_ int, cfg *host.Config) {
		cfg.Space = space.Config{Quota: quota, Retention: 2 * time.Second, MinRetention: time.Second,
			DefragFree: 4 << 20, DefragRatio: 0.3, DefragInterval: 200 * time.Millisecond}
	})
	c.Voters(3)
	value := make([]byte, 256<<10)
	put := func(node, i int) error {
		_, _ = rand.Read(value)
		_, err := c.Nodes[node].Client().Put(ctx(t, 15*time.Second), fmt.Sprintf("/fill/%04d", i), string(value))
		return err
	}
	n := 0
	var err error
	for ; err == nil && n < 200; n++ {
		err = put(n%3, n)
	}
	var full *host.SpaceError
	if !errors.Is(err, rpctypes.ErrNoSpace) || !errors.As(err, &full) || full.Quota != quota || full.InUse < quota/10*9 {
		t.Fatalf("after %d puts: %v", n, err)
	}
	for _, want := range []string{"shard system", "the limit is 16.0 MiB", "delete"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in: %v", want, err)
		}
	}
	for node := range c.Nodes {
		c.Until("the alarm", func() error {
			if s := systemShard(c, node); !hasAlarm(s, "NOSPACE") {
				return fmt.Errorf("node %d: %v, %d in use", node, s.Alarms, s.SizeInUse)
			}
			return nil
		})
		cl := c.Nodes[node].Client()
		if err := put(node, n); !errors.Is(err, rpctypes.ErrNoSpace) {
			t.Errorf("node %d: a put: %v", node, err)
		}
		if _, err := cl.Grant(ctx(t, 5*time.Second), 60); !errors.Is(err, rpctypes.ErrNoSpace) {
			t.Errorf("node %d: a lease: %v", node, err)
		}
		txn := clientv3.OpTxn(nil, []clientv3.Op{clientv3.OpPut("/a", "b")}, nil)
		if _, err := cl.Do(ctx(t, 5*time.Second), txn); !errors.Is(err, rpctypes.ErrNoSpace) {
			t.Errorf("node %d: a transaction: %v", node, err)
		}
		if _, err := cl.KV.Get(ctx(t, 5*time.Second), "/fill/0000"); err != nil {
			t.Errorf("node %d: a read: %v", node, err)
		}
	}
	// Over the network it is etcd's own error.
	if _, err := overGRPC(t, c.Nodes[1].Host()).Put(ctx(t, 5*time.Second), "/a", "b"); err != rpctypes.ErrNoSpace {
		t.Errorf("a put over gRPC: %v", err)
	}
	// Disarmed by hand it comes again: nothing has been freed.
	alarms, err := c.Nodes[0].Client().AlarmList(ctx(t, 5*time.Second))
	if err != nil || len(alarms.Alarms) == 0 {
		t.Fatalf("alarm list: %v, %v", alarms, err)
	}
	if _, err := c.Nodes[1].Client().AlarmDisarm(ctx(t, 5*time.Second), &clientv3.AlarmMember{}); err != nil {
		t.Fatal(err)
	}
	for err = nil; err == nil && n < 300; n++ { // a page or two may differ between nodes
		err = put(2, n)
	}
	if !errors.Is(err, rpctypes.ErrNoSpace) {
		t.Errorf("after disarming: %v", err)
	}
	before := systemShard(c, 0).Size
	if r, err := c.Nodes[1].Client().Delete(ctx(t, 15*time.Second), "/fill/", clientv3.WithPrefix()); err != nil || r.Deleted == 0 {
		t.Fatalf("delete: %v, %v", r, err)
	}
	begin := time.Now()
	c.Until("room", func() error { return put(0, n) })
	t.Logf("%d MiB; it took %v to be able to write again", before>>20, time.Since(begin).Round(time.Millisecond))
	for node := range c.Nodes {
		c.Until("a smaller file", func() error {
			if s := systemShard(c, node); hasAlarm(s, "NOSPACE") || s.Size > before/2 || s.LastDefrag.End.IsZero() || s.LastCompaction.Revision == 0 {
				return fmt.Errorf("node %d: size %d, %d before; alarms %v; defragmented %+v, compacted %+v", node, s.Size, before, s.Alarms, s.LastDefrag, s.LastCompaction)
			}
			return nil
		})
		t.Logf("node %d: %+v", node, systemShard(c, node).LastDefrag)
	}
}

// overGRPC returns a client of a node's shard behind a socket.
func overGRPC(t *testing.T, h *host.Host) *clientv3.Client {
	t.Helper()
	r, ok := h.Replica(storetest.Shard)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil || !ok {
		t.Fatal(err, ok)
	}
	s := etcdapi.NewServer(r, etcdapi.ServerOptions{Shards: h.Shards(), Progress: time.Minute})
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	cl, err := clientv3.New(clientv3.Config{Endpoints: []string{l.Addr().String()}, Context: t.Context(), Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cl.Close(); s.Stop(); <-served })
	return cl
}

// Nothing that is younger than the retention is compacted, whoever leads and
// however often that changes; what is older goes.
func TestCompactionByAge(t *testing.T) {
	const retention = 2 * time.Second
	c := storetest.New(t, 3, func(_ int, cfg *host.Config) { cfg.Space = space.Config{Retention: retention} })
	c.Voters(3)
	type written struct {
		rev int64
		at  time.Time
	}
	var log []written
	compacted := func(rev int64) bool {
		_, err := c.Nodes[0].Client().KV.Get(ctx(t, 15*time.Second), "/k", clientv3.WithRev(rev))
		if err != nil && !errors.Is(err, rpctypes.ErrCompacted) {
			t.Fatal(err)
		}
		return err != nil
	}
	begin := time.Now()
	gone := 0
	for i := 0; time.Since(begin) < 3*retention || gone < 20; i++ {
		r, err := c.Nodes[i%3].Client().Put(ctx(t, 15*time.Second), "/k", fmt.Sprint(i))
		if err != nil {
			t.Fatal(err)
		}
		log = append(log, written{r.Header.Revision, time.Now()})
		if i%50 == 49 {
			_ = c.Nodes[c.Leader()].Host().TransferLeadership(ctx(t, 15*time.Second), storetest.Shard, 0)
		}
		for gone < len(log) && compacted(log[gone].rev) {
			gone++
			// The next write made this one's value old, so count from there on.
			if age := time.Since(log[gone-1].at); age < retention {
				t.Fatalf("revision %d is gone after %v", log[gone-1].rev, age)
			}
		}
		if time.Since(begin) > time.Minute {
			t.Fatalf("nothing is compacted: %d of %d", gone, len(log))
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Logf("%d of %d revisions compacted", gone, len(log))
	// A watch from there is told so, as upstream expects for 410 Gone.
	w := <-c.Nodes[1].Client().Watch(ctx(t, 15*time.Second), "/k", clientv3.WithRev(log[0].rev))
	if !errors.Is(w.Err(), rpctypes.ErrCompacted) || w.CompactRevision == 0 {
		t.Errorf("a watch from a compacted revision: %v", w.Err())
	}
}

// A replica whose data was changed under it is found, named, and not Ready.
func TestCorruptReplica(t *testing.T) {
	dirs := map[int]string{}
	c := storetest.New(t, 3, func(node int, cfg *host.Config) {
		dirs[node] = cfg.Dir
		cfg.Space = space.Config{Retention: 2 * time.Second, CheckInterval: 200 * time.Millisecond}
	})
	c.Voters(3)
	victim := (c.Leader() + 1) % 3
	put(t, c, 0, "/k", "unmistakable")
	replica := systemShard(c, victim).Replica
	c.Until("the victim has it", func() error {
		r, err := c.Nodes[victim].Client().KV.Get(ctx(t, 5*time.Second), "/k", clientv3.WithSerializable())
		if err == nil && len(r.Kvs) == 0 {
			err = errors.New("not yet")
		}
		return err
	})
	c.Nodes[victim].Stop()
	storetest.Spoil(t, filepath.Join(dirs[victim], fmt.Sprintf("shard-1-replica-%d", replica)), "unmistakable")
	c.Nodes[victim].Start()
	begin := time.Now()
	for i := 0; ; i++ {
		put(t, c, (victim+1)%3, "/other", fmt.Sprint(i))
		s := systemShard(c, victim)
		if hasAlarm(s, "CORRUPT") {
			if s.Alarms[0].Replica != replica || s.Ready {
				t.Errorf("alarms %v, ready %v; it was replica %d", s.Alarms, s.Ready, replica)
			}
			break
		}
		if time.Since(begin) > 30*time.Second {
			t.Fatal("nobody noticed")
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Logf("found after %v", time.Since(begin).Round(time.Millisecond))
	for node := range c.Nodes {
		if s := systemShard(c, node); node != victim && (!s.Ready || len(s.Alarms) > 1) {
			t.Errorf("node %d: ready %v, alarms %v", node, s.Ready, s.Alarms)
		}
	}
}

// A start deletes the databases of replicas that the log does not know, and
// nothing else.
func TestOrphans(t *testing.T) {
	var dir string
	c := storetest.New(t, 1, func(_ int, cfg *host.Config) { dir = cfg.Dir })
	c.Voters(1)
	put(t, c, 0, "/k", "v")
	c.Nodes[0].Stop()
	there := func(name string) bool {
		_, err := os.Stat(filepath.Join(dir, name))
		return err == nil
	}
	want := map[string]bool{"shard-1-replica-1": true, "shard-1-replica-7": false, "shard-2-replica-99": false, "shard-9-replica-1": true, "shard-1-replica-7x": true, "else": true}
	for name := range want {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	c.Nodes[0].Start()
	for name, want := range want {
		if there(name) != want {
			t.Errorf("%s is there: %v, want %v", name, !want, want)
		}
	}
	r, err := c.Nodes[0].Client().KV.Get(ctx(t, 15*time.Second), "/k")
	if err != nil || len(r.Kvs) != 1 {
		t.Errorf("%v, %v", r, err)
	}
}
