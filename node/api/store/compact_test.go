package store

import (
	"context"
	"errors"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// kv is a store that has a revision and remembers compactions.
type kv struct {
	clientv3.KV
	rev       int64
	compacted []int64
	fail      error
}

func (k *kv) Get(context.Context, string, ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	return &clientv3.GetResponse{Header: &pb.ResponseHeader{Revision: k.rev}}, nil
}

func (k *kv) Compact(_ context.Context, rev int64, _ ...clientv3.CompactOption) (*clientv3.CompactResponse, error) {
	if k.fail != nil {
		return nil, k.fail
	}
	k.compacted = append(k.compacted, rev)
	return &clientv3.CompactResponse{}, nil
}

func TestCompaction(t *testing.T) {
	k, c, broken := &kv{}, compaction{}, errors.New("no leader")
	for i, step := range []struct {
		rev  int64 // now
		fail error
		want int64 // compacted to; zero: nothing
		err  error
	}{
		{rev: 10},                                 // the first look
		{rev: 10, want: 10},                       // everything is that old
		{rev: 10},                                 // nobody wrote
		{rev: 50},                                 // written since: not old enough
		{rev: 60, fail: broken, err: broken},      // kept for the next time
		{rev: 70, want: 50},                       // what was seen two looks ago
		{rev: 80, fail: rpctypes.ErrCompacted},    // somebody else did it
		{rev: 80, want: 80}, {rev: 80}, {rev: 80}, // idle
	} {
		k.rev, k.fail, k.compacted = step.rev, step.fail, nil
		next, err := c.advance(t.Context(), k, "/registry/x/")
		if !errors.Is(err, step.err) {
			t.Fatalf("step %d: %v", i, err)
		}
		c = next
		var got int64
		if len(k.compacted) == 1 {
			got = k.compacted[0]
		}
		if got != step.want || len(k.compacted) > 1 {
			t.Errorf("step %d: compacted %v, want %d", i, k.compacted, step.want)
		}
	}
}
