package etcdapi_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"skein.io/skein/consensus/etcdapi"
	"skein.io/skein/consensus/internal/storetest"
	"skein.io/skein/consensus/mvcc"
)

func one(t *testing.T) (*storetest.Cluster, *clientv3.Client, context.Context) {
	t.Helper()
	c := storetest.New(t, 1, fast)
	c.Voters(1)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return c, c.Nodes[0].Client().Client, ctx
}

func mustPut(t *testing.T, ctx context.Context, cl *clientv3.Client, key, value string) int64 {
	t.Helper()
	r, err := cl.Put(ctx, key, value)
	if err != nil {
		t.Fatal(err)
	}
	return r.Header.Revision
}

// collect reads n events.
func collect(t *testing.T, w clientv3.WatchChan, n int) (out []*clientv3.Event, responses int) {
	t.Helper()
	for len(out) < n {
		select {
		case r, ok := <-w:
			if !ok || r.Err() != nil {
				t.Fatalf("watch ended after %d events: %v", len(out), r.Err())
			}
			out = append(out, r.Events...)
			responses++
		case <-time.After(10 * time.Second):
			t.Fatalf("%d of %d events", len(out), n)
		}
	}
	return out, responses
}

func TestWatchOptions(t *testing.T) {
	_, cl, ctx := one(t)
	first := mustPut(t, ctx, cl, "/a", "1")
	all := cl.Watch(ctx, "/", clientv3.WithPrefix(), clientv3.WithPrevKV(), clientv3.WithRev(first))
	noPut := cl.Watch(ctx, "/", clientv3.WithPrefix(), clientv3.WithFilterPut())
	noDelete := cl.Watch(ctx, "/", clientv3.WithPrefix(), clientv3.WithFilterDelete())
	single := cl.Watch(ctx, "/b", clientv3.WithCreatedNotify())
	from := cl.Watch(ctx, "/b", clientv3.WithFromKey())
	if r := <-single; !r.Created {
		t.Fatalf("no creation is told: %+v", r)
	}
	mustPut(t, ctx, cl, "/a", "2")
	mustPut(t, ctx, cl, "/b", "3")
	if _, err := cl.Delete(ctx, "/a"); err != nil {
		t.Fatal(err)
	}
	mustPut(t, ctx, cl, "/c", "4")
	show := func(es []*clientv3.Event) string {
		var out []string
		for _, e := range es {
			s := fmt.Sprintf("%s %s=%s", e.Type, e.Kv.Key, e.Kv.Value)
			if e.PrevKv != nil {
				s += " was " + string(e.PrevKv.Value)
			}
			out = append(out, s)
		}
		return strings.Join(out, ", ")
	}
	for _, c := range []struct {
		name string
		w    clientv3.WatchChan
		n    int
		want string
	}{
		{"all", all, 5, "PUT /a=1, PUT /a=2 was 1, PUT /b=3, DELETE /a= was 2, PUT /c=4"},
		{"no puts", noPut, 1, "DELETE /a="},
		{"no deletes", noDelete, 3, "PUT /a=2, PUT /b=3, PUT /c=4"},
		{"single", single, 1, "PUT /b=3"},
		{"from", from, 2, "PUT /b=3, PUT /c=4"},
	} {
		es, _ := collect(t, c.w, c.n)
		if got := show(es); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

// A watch from a compacted revision is cancelled with that revision.
func TestWatchCompacted(t *testing.T) {
	_, cl, ctx := one(t)
	var last int64
	for i := range 10 {
		last = mustPut(t, ctx, cl, "/a", fmt.Sprint(i))
	}
	if _, err := cl.Compact(ctx, last-2, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	r := <-cl.Watch(ctx, "/a", clientv3.WithRev(2))
	if !r.Canceled || r.CompactRevision != last-2 || !errors.Is(r.Err(), rpctypes.ErrCompacted) {
		t.Errorf("%+v %v", r, r.Err())
	}
	es, _ := collect(t, cl.Watch(ctx, "/a", clientv3.WithRev(last-1)), 2)
	if string(es[1].Kv.Value) != "9" {
		t.Errorf("%v", es)
	}
	if _, err := cl.Compact(ctx, 2); !errors.Is(err, rpctypes.ErrCompacted) {
		t.Errorf("compact twice: %v", err)
	}
	if _, err := cl.KV.Get(ctx, "/a", clientv3.WithRev(2)); !errors.Is(err, rpctypes.ErrCompacted) {
		t.Errorf("read a compacted revision: %v", err)
	}
	if _, err := cl.KV.Get(ctx, "/a", clientv3.WithRev(last+5)); !errors.Is(err, rpctypes.ErrFutureRev) {
		t.Errorf("read the future: %v", err)
	}
}

// Progress is told on request and by itself, with the revision as of then, and
// never before the events up to it.
func TestWatchProgress(t *testing.T) {
	_, cl, ctx := one(t)
	w := cl.Watch(ctx, "/w/", clientv3.WithPrefix())
	auto := cl.Watch(clientv3.WithRequireLeader(ctx), "/w/", clientv3.WithPrefix(), clientv3.WithProgressNotify())
	mustPut(t, ctx, cl, "/w/1", "x")
	rev := mustPut(t, ctx, cl, "/other", "x")
	collect(t, w, 1)
	for told := false; !told; {
		if err := cl.RequestProgress(ctx); err != nil {
			t.Fatal(err)
		}
		select {
		case r := <-w:
			if told = r.IsProgressNotify() && r.Header.Revision >= rev; !told && r.Err() != nil {
				t.Fatal(r.Err())
			}
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			t.Fatal("no progress on request")
		}
	}
	collect(t, auto, 1)
	select {
	case r := <-auto:
		if !r.IsProgressNotify() || r.Header.Revision < rev {
			t.Errorf("%+v", r)
		}
	case <-time.After(5 * time.Second):
		t.Error("no progress by itself")
	}
}

// More than one response can carry arrives in fragments, whole.
func TestWatchFragments(t *testing.T) {
	_, cl, ctx := one(t)
	big := strings.Repeat("x", 1<<20)
	const n = 6
	for i := range n {
		mustPut(t, ctx, cl, fmt.Sprintf("/big/%d", i), big)
	}
	es, responses := collect(t, cl.Watch(ctx, "/big/", clientv3.WithPrefix(), clientv3.WithRev(2), clientv3.WithFragment()), n)
	t.Logf("%d MiB in %d responses to the caller", n, responses)
	for i, e := range es {
		if e.Type != mvccpb.PUT || string(e.Kv.Key) != fmt.Sprintf("/big/%d", i) || len(e.Kv.Value) != len(big) {
			t.Fatalf("event %d: %s", i, e.Kv.Key)
		}
	}
}

// Requests of every kind that are refused get etcd's errors.
func TestRefusals(t *testing.T) {
	_, cl, ctx := one(t)
	_, err := cl.Put(ctx, "", "x")
	if !errors.Is(err, rpctypes.ErrEmptyKey) {
		t.Errorf("empty key: %v", err)
	}
	if _, err := cl.Put(ctx, "/a", strings.Repeat("x", 2<<20)); !errors.Is(err, rpctypes.ErrRequestTooLarge) {
		t.Errorf("too large: %v", err)
	}
	if _, err := cl.Put(ctx, "/a", "x", clientv3.WithLease(12345)); !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		t.Errorf("unknown lease: %v", err)
	}
	if _, err := cl.Put(ctx, "/none", "", clientv3.WithIgnoreValue()); !errors.Is(err, rpctypes.ErrKeyNotFound) {
		t.Errorf("keep the value of nothing: %v", err)
	}
	if _, err := cl.Txn(ctx).Then(clientv3.OpPut("/a", "1"), clientv3.OpPut("/a", "2")).Commit(); !errors.Is(err, rpctypes.ErrDuplicateKey) {
		t.Errorf("a key twice: %v", err)
	}
	// A write with an impossible read in it changes nothing.
	_, err = cl.Txn(ctx).Then(clientv3.OpPut("/t", "1"), clientv3.OpGet("/t", clientv3.WithRev(1<<40))).Commit()
	if !errors.Is(err, rpctypes.ErrFutureRev) {
		t.Errorf("a read of the future in a write: %v", err)
	}
	if r, err := cl.KV.Get(ctx, "/t"); err != nil || len(r.Kvs) != 0 {
		t.Errorf("half a transaction: %v %v", r, err)
	}
	g, err := cl.Grant(ctx, 100)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cl.Grant(ctx, 1<<40); !errors.Is(err, rpctypes.ErrLeaseTTLTooLarge) {
		t.Errorf("an endless lease: %v", err)
	}
	if l, err := cl.Leases(ctx); err != nil || len(l.Leases) != 1 || l.Leases[0].ID != g.ID {
		t.Errorf("leases: %v %v", l, err)
	}
	if short, err := cl.Grant(ctx, 1); err != nil || short.TTL < 2 {
		t.Errorf("a lease shorter than an election: %+v %v", short, err)
	}
}

func TestMaintenance(t *testing.T) {
	c, cl, ctx := one(t)
	for i := range 20 {
		mustPut(t, ctx, cl, fmt.Sprintf("/a/%d", i), "x")
	}
	s, err := cl.Status(ctx, "")
	if err != nil || s.Leader != 1 || s.RaftAppliedIndex == 0 || s.DbSize == 0 || s.IsLearner || len(s.Errors) > 0 {
		t.Errorf("status: %+v %v", s, err)
	}
	m, err := cl.MemberList(ctx)
	if err != nil || len(m.Members) != 1 || m.Members[0].Name != c.Nodes[0].Name || m.Members[0].ID != s.Header.MemberId {
		t.Errorf("members: %+v %v", m, err)
	}
	a, err := cl.HashKV(ctx, "", 0)
	if err != nil || a.Hash == 0 {
		t.Errorf("hash: %+v %v", a, err)
	}
	r, err := cl.Maintenance.Snapshot(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	if _, err := io.Copy(&buf, r); err != nil {
		t.Fatal(err)
	}
	b := buf.Bytes()
	body, sum := b[:len(b)-sha256.Size], b[len(b)-sha256.Size:]
	if got := sha256.Sum256(body); !bytes.Equal(got[:], sum) || len(body)%4096 != 0 {
		t.Errorf("a snapshot of %d bytes with a wrong sum", len(body))
	}
	if _, err := cl.Defragment(ctx, ""); err != nil {
		t.Errorf("defragment: %v", err)
	}
	if v, err := cl.KV.Get(ctx, "/a/7"); err != nil || len(v.Kvs) != 1 {
		t.Errorf("after defragmenting: %v %v", v, err)
	}
}

// When the replica stops, its watches end at once, with an error that makes
// clients begin anew elsewhere, and requests fail.
func TestReplicaStops(t *testing.T) {
	c, cl, ctx := one(t)
	w := cl.Watch(ctx, "/a")
	mustPut(t, ctx, cl, "/a", "1")
	collect(t, w, 1)
	if err := c.Nodes[0].Host().StopReplica(ctx, storetest.Shard, 1, false); err != nil {
		t.Fatal(err)
	}
	select {
	case r, ok := <-w:
		if ok && r.Err() == nil {
			t.Errorf("%+v", r)
		}
	case <-time.After(5 * time.Second):
		t.Error("the watch goes on")
	}
	if _, err := cl.Put(ctx, "/a", "2"); err == nil {
		t.Error("a write on a stopped replica")
	}
	if _, err := cl.KV.Get(ctx, "/a", clientv3.WithSerializable()); err == nil {
		t.Error("a read on a stopped replica")
	}
	// It goes on where it was, with a new client.
	if err := c.Nodes[0].Host().StartReplica(ctx, storetest.Shard, 1); err != nil {
		t.Fatal(err)
	}
	if r, err := c.Nodes[0].Client().KV.Get(ctx, "/a"); err != nil || len(r.Kvs) != 1 || string(r.Kvs[0].Value) != "1" {
		t.Errorf("after a new start: %v %v", r, err)
	}
}

func TestErrorKeepsIdentity(t *testing.T) {
	err := etcdapi.Error(fmt.Errorf("shard: %w", mvcc.ErrFenced))
	if !errors.Is(err, mvcc.ErrFenced) || status.Code(err) != codes.FailedPrecondition {
		t.Errorf("%v %v", err, status.Code(err))
	}
	if err := etcdapi.Error(mvcc.ErrClosed); !errors.Is(err, rpctypes.ErrGRPCStopped) {
		t.Error(err)
	}
	if err := etcdapi.Error(errors.New("odd")); status.Code(err) != codes.Unknown {
		t.Error(err)
	}
	if etcdapi.Error(nil) != nil {
		t.Error("nil")
	}
}

// TestMassCancel ends very many watches of one client at once, under writes, as a node does that stops to lead: the client, which sends
// while nobody reads for it, and the server, which sends while nobody reads for it, must not wait for each other. All watches of a client
// share one stream, so that would be the end of all watches for ever.
func TestMassCancel(t *testing.T) {
	_, cl, ctx := one(t)
	for round := range 10 {
		wctx, cancel := context.WithCancel(ctx)
		for range 200 {
			w := cl.Watch(wctx, "/", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
			if r := <-w; !r.Created {
				t.Fatalf("no creation is told: %+v", r)
			}
			go func() { // ends with wctx
				for range w {
				}
			}()
		}
		for i := range 20 {
			mustPut(t, ctx, cl, "/a", fmt.Sprint(i))
		}
		cancel()
		nctx, end := context.WithTimeout(ctx, 5*time.Second)
		w := cl.Watch(nctx, "/b", clientv3.WithCreatedNotify())
		select {
		case r := <-w:
			if !r.Created {
				t.Fatalf("round %d: no new watch: %+v", round, r)
			}
		case <-time.After(5 * time.Second):
			t.Fatalf("round %d: no watch can be made any more", round)
		}
		mustPut(t, ctx, cl, "/b", "x")
		collect(t, w, 1)
		end()
	}
}
