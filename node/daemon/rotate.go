package daemon

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/keyring"
	"skein.io/skein/node/api/store"
	"skein.io/skein/node/client"
	"skein.io/skein/node/keys"
)

// resealPause is the wait after each value that is sealed anew: at most 500 writes a second, which leaves a small cluster room.
const resealPause = 2 * time.Millisecond

// keyStore is the record and the sealed keys in the store.
type keyStore struct{ kv clientv3.KV }

// Read implements keys.Store.
func (s keyStore) Read(ctx context.Context) (*keys.Record, int64, error) {
	r, err := s.kv.Get(ctx, keys.StoreKey)
	if err != nil {
		return nil, 0, fmt.Errorf("record of the cluster's keys: %w", err)
	}
	if len(r.Kvs) == 0 {
		return nil, 0, nil
	}
	x, err := keys.Decode(r.Kvs[0].Value)
	return &x, r.Kvs[0].ModRevision, err
}

// Write implements keys.Store.
func (s keyStore) Write(ctx context.Context, x keys.Record, revision int64) (int64, error) {
	r, err := s.kv.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(keys.StoreKey), "=", revision)).
		Then(clientv3.OpPut(keys.StoreKey, string(x.Encode()))).Commit()
	if err != nil {
		return 0, fmt.Errorf("record of the cluster's keys: %w", err)
	}
	if !r.Succeeded {
		return 0, keys.ErrConflict
	}
	return r.Header.Revision, nil
}

// KeysSealedBy implements keys.Store.
func (s keyStore) KeysSealedBy(ctx context.Context) (string, error) {
	r, err := s.kv.Get(ctx, keysKey)
	if err != nil {
		return "", fmt.Errorf("cluster keys: %w", err)
	}
	if len(r.Kvs) == 0 {
		return "", errNoKeys
	}
	id, _ := keyring.SealedBy(r.Kvs[0].Value)
	return id, nil
}

// SealKeys implements keys.Store.
func (s keyStore) SealKeys(ctx context.Context, ring keyring.Ring) error {
	r, err := s.kv.Get(ctx, keysKey)
	if err != nil {
		return fmt.Errorf("cluster keys: %w", err)
	}
	if len(r.Kvs) == 0 {
		return errNoKeys
	}
	k, err := openKeys(r.Kvs[0].Value, ring)
	if err != nil {
		return err
	}
	b, err := k.seal(ring)
	if err != nil {
		return err
	}
	t, err := s.kv.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(keysKey), "=", r.Kvs[0].ModRevision)).Then(clientv3.OpPut(keysKey, string(b))).Commit()
	if err == nil && !t.Succeeded {
		err = keys.ErrConflict
	}
	return err
}

// watchKeys sends a value after the record may have changed, until ctx ends.
func watchKeys(ctx context.Context, w clientv3.Watcher, changed chan<- struct{}) {
	for ctx.Err() == nil {
		wctx, cancel := context.WithCancel(ctx)
		for range w.Watch(wctx, keys.StoreKey) { // ends with an error, or with the replica
			select {
			case changed <- struct{}{}:
			default:
			}
		}
		cancel()
		pause(ctx, time.Second)
	}
}

// follower makes this node's ring follow the store's record.
func (n *node) follower(clients shardClients, changed <-chan struct{}) *keys.Follower {
	s := keyStore{clients.system().KV}
	return keys.NewFollower(keys.FollowerConfig{
		Holder: n.ring, Fetch: n.fetchKey, Changed: changed, Logger: n.log.With("part", "keys"),
		Read: func(ctx context.Context) (*keys.Record, error) {
			r, _, err := s.Read(ctx)
			return r, err
		},
		Compacted: func(ctx context.Context, shard string, revision int64) (bool, error) {
			c, ok := n.host.Client(shard)
			if !ok || revision <= 1 { // no copy, or nothing was before
				return true, nil
			}
			// A key that exists nowhere, at the revision before, from this node's own copy.
			_, err := c.KV.Get(ctx, keys.StoreKey+"/none", clientv3.WithSerializable(), clientv3.WithRev(revision-1))
			switch {
			case errors.Is(err, rpctypes.ErrCompacted):
				return true, nil
			case errors.Is(err, rpctypes.ErrFutureRev): // this replica lags
				return false, nil
			}
			return false, err
		},
	})
}

// followKeys follows until ctx ends.
func (n *node) followKeys(ctx context.Context, clients shardClients) {
	changed := make(chan struct{}, 1)
	var wg sync.WaitGroup
	wg.Go(func() { watchKeys(ctx, clients.system().Watcher, changed) })
	n.follower(clients, changed).Run(ctx)
	wg.Wait()
}

// runKeys carries rotations of the keys out; only the leader runs it.
func (n *node) runKeys(ctx context.Context, term uint64) error {
	c, ok := n.host.Client(systemShard)
	if !ok {
		return nil // it leads no more
	}
	ctx = host.WithTerm(ctx, term)
	changed := make(chan struct{}, 1)
	m, err := keys.New(keys.Config{Holder: n.ring, Store: keyStore{c.KV}, Replicas: keyReplicas{n}, Values: keyValues{n}, Changed: changed,
		Settle: n.cfg.KeySettle, Logger: n.log.With("part", "keys")})
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { watchKeys(ctx, c.Watcher, changed); return nil })
	g.Go(func() error { m.Run(ctx); return nil })
	return g.Wait()
}

// keyReplicas reaches the other replicas.
type keyReplicas struct{ n *node }

// List implements keys.Replicas.
func (k keyReplicas) List(ctx context.Context) ([]keys.Replica, error) { return k.n.replicaNodes(ctx) }

// Ask implements keys.Replicas.
func (k keyReplicas) Ask(ctx context.Context, r keys.Replica) (keys.Report, error) {
	return k.call(ctx, r, ringCall{})
}

// Give implements keys.Replicas.
func (k keyReplicas) Give(ctx context.Context, r keys.Replica, ring keyring.Ring) (keys.Report, error) {
	return k.call(ctx, r, ringCall{Ring: ring.Encode()})
}

func (k keyReplicas) call(ctx context.Context, r keys.Replica, q ringCall) (keys.Report, error) {
	if r.Self {
		ring, _ := k.n.ring.Ring()
		return keys.Report{Keys: ring.IDs(), Primary: ring.Primary()}, nil
	}
	m, ok := k.n.byHostID(r.ID)
	if !ok {
		return keys.Report{}, errors.New("gossip does not know it")
	}
	q.Version = ringVersion
	var a ringAnswer
	err := k.n.call(ctx, m, ringPath, q, &a)
	return a.Report, err
}

// keyValues is the stored data, as this node's API server sees it.
type keyValues struct{ n *node }

// Reseal implements keys.Values.
func (v keyValues) Reseal(ctx context.Context, progress func(int)) (keys.Usage, error) {
	return v.look(ctx, store.ResealOptions{Write: true, Pause: resealPause, Progress: func(_ store.Usage, n int) { progress(n) }})
}

// Count implements keys.Values.
func (v keyValues) Count(ctx context.Context, whole bool) (keys.Usage, error) {
	return v.look(ctx, store.ResealOptions{All: whole})
}

func (v keyValues) look(ctx context.Context, o store.ResealOptions) (keys.Usage, error) {
	srv, _, err := v.n.awaitAPI(ctx)
	if err != nil {
		return keys.Usage{}, err
	}
	u, _, err := srv.Reseal(ctx, o)
	if err != nil {
		return keys.Usage{}, err
	}
	out := keys.Usage{ByKey: u.ByKey, Plain: u.Plain, Stale: u.Stale, Whole: o.All, Revisions: map[string]int64{}}
	for _, s := range v.n.host.Shards().Shards() {
		if c, ok := v.n.host.Client(s.Name); ok && u.Revisions[c.Client] != 0 {
			out.Revisions[s.Name] = u.Revisions[c.Client]
		}
	}
	if o.All && len(out.Revisions) != len(u.Revisions) {
		return keys.Usage{}, errors.New("a replica was replaced while its values were counted")
	}
	return out, nil
}

// keyStoreHere is the record's place, on a node that holds a replica and its keys.
func (n *node) keyStoreHere(what string) (keyStore, error) {
	c, ok := n.host.Client(systemShard)
	if ring, _ := n.ring.Ring(); !ok || ring.Empty() {
		return keyStore{}, n.notHere(what)
	}
	return keyStore{c.KV}, nil
}

func (n *node) keysStatus(r *http.Request) (any, error) {
	s, err := n.keyStoreHere("see the cluster's keys")
	if err != nil {
		return nil, err
	}
	rec, _, err := s.Read(r.Context())
	if err != nil {
		return nil, err
	}
	if rec == nil {
		return nil, refusal(http.StatusServiceUnavailable, "%v", keys.ErrNoRecord)
	}
	out := client.Keys{Primary: rec.Primary, Keys: []client.Key{}, Replicas: []client.KeyReplica{}}
	ring, _ := n.ring.Ring()
	for _, k := range ring.Keys() {
		out.Keys = append(out.Keys, client.Key{ID: k.ID, Created: k.Created})
	}
	if x := rec.Rotation; x != nil {
		out.Rotation = &client.KeyRotation{ID: x.ID, Phase: string(x.Phase), From: x.From, To: x.To, Done: x.Done, Total: x.Total, Waits: x.Waits}
	}
	if x := rec.Last; x != nil {
		out.Last = &client.KeyRotation{ID: x.ID, From: x.From, To: x.To, Refused: x.Refused, Ended: &x.Ended, Done: x.Written}
	}
	members, err := n.replicaNodes(r.Context())
	if err != nil {
		return nil, err
	}
	out.Replicas = make([]client.KeyReplica, len(members))
	var wg sync.WaitGroup
	for i, m := range members {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(r.Context(), fetchTimeout)
			defer cancel()
			report, err := keyReplicas{n}.Ask(ctx, m)
			out.Replicas[i] = client.KeyReplica{Node: m.Node, Primary: report.Primary, Keys: report.Keys}
			if err != nil {
				out.Replicas[i].Error = err.Error()
			}
		})
	}
	wg.Wait()
	return out, nil
}

// rotateKeys asks the leader, through the record, for a new key.
func (n *node) rotateKeys(r *http.Request) (any, error) {
	var q client.RotateRequest
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	if err := d.Decode(&q); err != nil {
		return nil, refusal(http.StatusBadRequest, "rotation: %v", err)
	}
	s, err := n.keyStoreHere("rotate the cluster's keys")
	if err != nil {
		return nil, err
	}
	rec, revision, err := s.Read(r.Context())
	if err != nil {
		return nil, err
	}
	if rec == nil {
		return nil, refusal(http.StatusServiceUnavailable, "%v", keys.ErrNoRecord)
	}
	switch x := rec.Rotation; {
	case x == nil:
		rec.Rotation = &keys.Rotation{ID: rand.Text(), Phase: keys.Requested, Force: q.Force, Asked: time.Now().UTC().Truncate(time.Second)}
	case q.Force && !x.Force:
		x.Force = true
	default:
		why := ""
		if x.Waits != "" {
			why = "; it waits: " + x.Waits
		}
		return nil, refusal(http.StatusConflict, "a rotation is under way (%s, %d of %d values done)%s", x.Phase, x.Done, x.Total, why)
	}
	if _, err := s.Write(r.Context(), *rec, revision); errors.Is(err, keys.ErrConflict) {
		return nil, refusal(http.StatusConflict, "%v: try again", err)
	} else if err != nil {
		return nil, err
	}
	return client.KeyRotation{ID: rec.Rotation.ID, Phase: string(rec.Rotation.Phase)}, nil
}
