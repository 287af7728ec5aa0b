package main

import (
	"fmt"
	"os"
	"runtime/debug"
	"strconv"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
)

// The client is plain gRPC with etcd's generated messages, the same for both
// systems: client and servers share the machine, so every microsecond of a heavier
// client would hide a difference between the servers.

// connections of one set of endpoints: as many of one system as of the other.
const connections = 9

// codec calls the messages' own generated methods.
type codec struct{}

type message interface {
	Size() int
	MarshalTo([]byte) (int, error)
	Unmarshal([]byte) error
}

// raw is a response that is not decoded.
type raw struct{ b []byte }

func (codec) Name() string { return "proto" }

func (codec) Marshal(v any) (mem.BufferSlice, error) {
	m, ok := v.(message)
	if !ok {
		return nil, fmt.Errorf("cannot marshal a %T", v)
	}
	b := make([]byte, m.Size())
	n, err := m.MarshalTo(b)
	return mem.BufferSlice{mem.SliceBuffer(b[:n])}, err
}

func (codec) Unmarshal(data mem.BufferSlice, v any) error {
	if r, ok := v.(*raw); ok {
		r.b = data.Materialize()
		return nil
	}
	m, ok := v.(message)
	if !ok {
		return fmt.Errorf("cannot unmarshal a %T", v)
	}
	b := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer b.Free()
	return m.Unmarshal(b.ReadOnlyData())
}

var _ encoding.CodecV2 = codec{}

// window of fixed size in bytes, for every stream and connection: gRPC would find one
// by pinging the servers under load.
const window = 16 << 20

func dial(addr string) (*grpc.ClientConn, error) {
	return grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithInitialWindowSize(window), grpc.WithInitialConnWindowSize(window),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(codec{}), grpc.MaxCallRecvMsgSize(1<<30)))
}

// lighten makes this process use less of the CPUs that it shares with the servers: its
// collector runs seldom, and the thread on which Go's runtime watches over system
// calls sleeps longer than 20 us, which otherwise takes a tenth of a CPU. It is called
// when the servers run, so that they do not inherit it.
func lighten() {
	debug.SetGCPercent(1000)
	ents, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return
	}
	monitor := 0 // the runtime starts it before any other thread
	for _, e := range ents {
		if n, err := strconv.Atoi(e.Name()); err == nil && n != os.Getpid() && (monitor == 0 || n < monitor) {
			monitor = n
		}
	}
	_ = os.WriteFile(fmt.Sprintf("/proc/%d/timerslack_ns", monitor), []byte("500000"), 0) // else the client is a little heavier
}

// target is what a cell runs against: keys under one or several prefixes, each with
// the connections to the servers that keep it.
type target struct {
	name    string
	cluster *cluster
	sets    []keyset
	revs    []map[string]int64 // by worker, what compare-and-swap expects
}

// expected outlasts the cells, as the keys do.
func (t *target) expected(worker int) map[string]int64 {
	for len(t.revs) <= worker {
		t.revs = append(t.revs, map[string]int64{})
	}
	return t.revs[worker]
}

type keyset struct {
	prefix string
	conns  []*grpc.ClientConn
}

// conn is another one for every number, going around the nodes: every worker meets
// the leader and the followers alike.
func (k keyset) conn(n int) *grpc.ClientConn { return k.conns[n%len(k.conns)] }

// connect makes a target of a cluster with keys under the given prefixes, prefix i
// being kept by shard i.
func connect(name string, c *cluster, prefixes []string) (*target, error) {
	t := &target{name: name, cluster: c}
	var all []*grpc.ClientConn
	for i, p := range prefixes {
		s := min(i, len(c.etcd)-1)
		if i > 0 && s == 0 { // one shard keeps all
			t.sets = append(t.sets, keyset{p, t.sets[0].conns})
			continue
		}
		k := keyset{prefix: p}
		n := connections
		if len(c.etcd) > 1 {
			n = max(nodes, connections/len(prefixes))
		}
		for j := range n {
			conn, err := dial(c.etcd[s][j%nodes])
			if err != nil {
				return nil, err
			}
			k.conns = append(k.conns, conn)
			all = append(all, conn)
		}
		t.sets = append(t.sets, k)
	}
	return t, nil
}

func (t *target) close() {
	for _, k := range t.sets {
		for _, c := range k.conns {
			_ = c.Close() // sets may share connections
		}
	}
}
