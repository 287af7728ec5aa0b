package main

import (
	"fmt"

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

func dial(addr string) (*grpc.ClientConn, error) {
	return grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(codec{}), grpc.MaxCallRecvMsgSize(1<<30)))
}

// target is what a cell runs against: keys under one or several prefixes, each with
// the connections to the servers that keep it.
type target struct {
	name    string
	cluster *cluster
	sets    []keyset
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
