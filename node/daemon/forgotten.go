package daemon

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"skein.io/skein/node/join"
)

// forgottenPrefix and a name mark the nodes of the cluster that a backup was made of. After the restore they are no members: their pods
// are replaced at once, their Node objects wait for them. A mark ends when a node joins under the name.
const forgottenPrefix = "/skein/forgotten/"

// forgotten are the names of such nodes, on the leader.
type forgotten struct {
	mu      sync.Mutex // guards the rest
	names   map[string]time.Time
	changed chan struct{} // closed and replaced with names
}

func (f *forgotten) set(names map[string]time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.names = names
	if f.changed != nil {
		close(f.changed)
	}
	f.changed = make(chan struct{})
}

// wait closes when the names change.
func (f *forgotten) wait() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.changed == nil {
		f.changed = make(chan struct{})
	}
	return f.changed
}

func (f *forgotten) get() map[string]time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.names
}

// readForgotten lists the marks whose name nobody has claimed, and those that are to be removed.
func readForgotten(ctx context.Context, kv clientv3.KV) (names, ended []string, err error) {
	marks, err := kv.Get(ctx, forgottenPrefix, clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil || len(marks.Kvs) == 0 {
		return nil, nil, err
	}
	claims, err := kv.Get(ctx, join.ClaimPrefix, clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		return nil, nil, err
	}
	claimed := map[string]bool{}
	for _, kv := range claims.Kvs {
		claimed[strings.TrimPrefix(string(kv.Key), join.ClaimPrefix)] = true
	}
	for _, kv := range marks.Kvs {
		if name := strings.TrimPrefix(string(kv.Key), forgottenPrefix); claimed[name] {
			ended = append(ended, name)
		} else {
			names = append(names, name)
		}
	}
	return names, ended, nil
}

// watchForgotten keeps the list while this node leads; it ends when there is none.
func (n *node) watchForgotten(ctx context.Context) error {
	changed, end := n.gossip.Subscribe() // a node that joins shows up there
	defer end()
	since := time.Now()
	defer n.forgotten.set(nil)
	for {
		names, err := n.lookForForgotten(ctx, since)
		if err == nil && names == 0 {
			return nil
		}
		if err != nil && ctx.Err() == nil {
			n.log.Debug("cannot list the nodes from before the restore", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-time.After(5 * time.Second):
		}
	}
}

func (n *node) lookForForgotten(ctx context.Context, since time.Time) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	c, ok := n.host.Client(systemShard)
	if !ok {
		return 0, fmt.Errorf("no replica of shard %s", systemShard)
	}
	names, ended, err := readForgotten(ctx, c.KV)
	if err != nil {
		return 0, err
	}
	set := map[string]time.Time{}
	for _, name := range names {
		set[name] = since
	}
	if !maps.Equal(set, n.forgotten.get()) {
		n.forgotten.set(set)
	}
	for _, name := range ended {
		if _, err := c.KV.Delete(ctx, forgottenPrefix+name); err != nil {
			return 0, err
		}
	}
	return len(names), nil
}
