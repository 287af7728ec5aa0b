package etcdapi_test

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/internal/storetest"
)

// The differential tests send the same requests to upstream's etcd, which runs in
// this process with the settings of its defaults, and to a store of one node, both
// over gRPC, and compare answers and errors field by field.

// peer is one of the two systems.
type peer struct {
	kv      pb.KVClient
	watch   pb.WatchClient
	lease   pb.LeaseClient
	maint   pb.MaintenanceClient
	cluster pb.ClusterClient
	auth    pb.AuthClient
	conn    *grpc.ClientConn
}

func dialPeer(t *testing.T, addr string) *peer {
	t.Helper()
	c, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return &peer{pb.NewKVClient(c), pb.NewWatchClient(c), pb.NewLeaseClient(c), pb.NewMaintenanceClient(c), pb.NewClusterClient(c), pb.NewAuthClient(c), c}
}

// startEtcd runs upstream's etcd and returns its address.
func startEtcd(t *testing.T) string {
	t.Helper()
	cfg := embed.NewConfig()
	cfg.Dir = filepath.Join(t.TempDir(), "etcd")
	cfg.UnsafeNoFsync = true
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	anyPort := url.URL{Scheme: "http", Host: "127.0.0.1:0"}
	cfg.ListenClientUrls, cfg.ListenPeerUrls = []url.URL{anyPort}, []url.URL{anyPort}
	cfg.WatchProgressNotifyInterval = progressEvery
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	select {
	case <-e.Server.ReadyNotify():
	case <-time.After(30 * time.Second):
		t.Fatal("etcd is not ready")
	}
	return e.Clients[0].Addr().String()
}

// progressEvery is how often idle watches are told the revision, on both.
const progressEvery = 300 * time.Millisecond

// served makes a node serve etcd's API on free loopback ports.
func served(_ int, c *host.Config) {
	c.Etcd = host.EtcdConfig{Addresses: []string{"127.0.0.1"}}
	c.WatchProgress = progressEvery
}

func endpointOf(t testing.TB, n *storetest.Node, shard string) string {
	t.Helper()
	var addr string
	storetest.Until(t, "an endpoint", func() error {
		if a := n.Host().EtcdEndpoints(shard); len(a) > 0 {
			addr = a[0]
			return nil
		}
		return fmt.Errorf("none")
	})
	return addr
}

// differ holds the two.
type differ struct {
	t           *testing.T
	etcd, skein *peer
	ctx         context.Context
	seen        int
}

func newDiffer(t *testing.T) *differ {
	c := storetest.New(t, 1, served)
	c.Voters(1)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	return &differ{t: t, etcd: dialPeer(t, startEtcd(t)), skein: dialPeer(t, endpointOf(t, c.Nodes[0], storetest.Shard)), ctx: ctx}
}

type answer struct {
	resp string
	err  string
}

func (a answer) String() string {
	if a.err != "" {
		return "error " + a.err
	}
	return a.resp
}

type headed interface{ GetHeader() *pb.ResponseHeader }

// show prints a response without what tells the systems apart: who answered, and
// in which term of Raft. The revision stays.
func show(v any) string {
	if h, ok := v.(headed); ok && h.GetHeader() != nil {
		x := h.GetHeader()
		x.ClusterId, x.MemberId, x.RaftTerm = 0, 0, 0
	}
	return fmt.Sprint(v)
}

func showError(err error) string {
	s := status.Convert(err)
	return fmt.Sprintf("%s: %s", s.Code(), s.Message())
}

func ask[R any](ctx context.Context, f func(context.Context, *peer) (R, error), p *peer) answer {
	resp, err := f(ctx, p)
	if err != nil {
		return answer{err: showError(err)}
	}
	return answer{resp: show(resp)}
}

// same fails the test if the two answer differently.
func same[R any](d *differ, name string, f func(context.Context, *peer) (R, error)) {
	d.t.Helper()
	d.seen++
	a, b := ask(d.ctx, f, d.etcd), ask(d.ctx, f, d.skein)
	if a != b {
		d.t.Errorf("%s:\n  etcd  %.600s\n  skein %.600s", name, a, b)
	} else if os.Getenv("SKEIN_DIFF_SHOW") != "" {
		d.t.Logf("%s: %.200s", name, a)
	}
}

// differs is an accepted difference: why says the reason, both answers have to
// contain what is expected of them, so that it stays the difference that was meant.
func differs[R any](d *differ, name, why, etcd, skein string, f func(context.Context, *peer) (R, error)) {
	d.t.Helper()
	d.seen++
	a, b := ask(d.ctx, f, d.etcd), ask(d.ctx, f, d.skein)
	if !strings.Contains(a.String(), etcd) || !strings.Contains(b.String(), skein) || a == b {
		d.t.Errorf("%s (accepted: %s):\n  etcd  %.600s, want %s\n  skein %.600s, want %s", name, why, a, etcd, b, skein)
	}
}

func (d *differ) rng(name string, q *pb.RangeRequest) {
	d.t.Helper()
	same(d, name, func(ctx context.Context, p *peer) (*pb.RangeResponse, error) { return p.kv.Range(ctx, q) })
}

func (d *differ) put(name string, q *pb.PutRequest) {
	d.t.Helper()
	same(d, name, func(ctx context.Context, p *peer) (*pb.PutResponse, error) { return p.kv.Put(ctx, q) })
}

func (d *differ) del(name string, q *pb.DeleteRangeRequest) {
	d.t.Helper()
	same(d, name, func(ctx context.Context, p *peer) (*pb.DeleteRangeResponse, error) { return p.kv.DeleteRange(ctx, q) })
}

func (d *differ) txn(name string, q *pb.TxnRequest) {
	d.t.Helper()
	same(d, name, func(ctx context.Context, p *peer) (*pb.TxnResponse, error) { return p.kv.Txn(ctx, q) })
}

func (d *differ) compact(name string, q *pb.CompactionRequest) {
	d.t.Helper()
	same(d, name, func(ctx context.Context, p *peer) (*pb.CompactionResponse, error) { return p.kv.Compact(ctx, q) })
}

// end compares everything that there is: every key and all its history.
func (d *differ) end() {
	d.t.Helper()
	d.rng("all keys", &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})
	same(d, "hash of the history", func(ctx context.Context, p *peer) (*pb.HashKVResponse, error) {
		return p.maint.HashKV(ctx, &pb.HashKVRequest{})
	})
	d.t.Logf("%d requests answered alike, or differently for a reason", d.seen)
}

func opPut(key, value string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key), Value: []byte(value)}}}
}

func opRange(key, end string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(key), RangeEnd: []byte(end)}}}
}

func opDelete(key, end string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(key), RangeEnd: []byte(end), PrevKv: true}}}
}

func opTxn(q *pb.TxnRequest) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: q}}
}

func repeat(n int, f func(int) *pb.RequestOp) (ops []*pb.RequestOp) {
	for i := range n {
		ops = append(ops, f(i))
	}
	return ops
}

func valueIs(key, value string) *pb.Compare {
	return &pb.Compare{Key: []byte(key), Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: []byte(value)}}
}
