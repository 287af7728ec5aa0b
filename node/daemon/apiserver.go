package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	clientv3kube "go.etcd.io/etcd/client/v3/kubernetes"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/keyring"
	"skein.io/skein/consensus/shard"
	"skein.io/skein/gossip/health"
	"skein.io/skein/gossip/identity"
	"skein.io/skein/gossip/membership"
	"skein.io/skein/node/api"
	"skein.io/skein/node/join"
)

// apiServer is the API that this node serves while it holds a replica of the store.
type apiServer struct {
	mu     sync.Mutex // guards the rest
	server *api.Server
	keys   clusterKeys
	wake   chan struct{} // closed and replaced when server changes
}

// get returns the server that is ready, if there is one, and a channel that closes when that changes.
func (a *apiServer) get() (*api.Server, clusterKeys, <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.wake == nil {
		a.wake = make(chan struct{})
	}
	return a.server, a.keys, a.wake
}

func (a *apiServer) put(s *api.Server, k clusterKeys) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.server, a.keys = s, k
	if a.wake != nil {
		close(a.wake)
	}
	a.wake = make(chan struct{})
}

// runAPI serves the API whenever this node holds a replica of every shard that has caught up, and keeps the node's role in
// its gossip tags true.
func (n *node) runAPI(ctx context.Context) error {
	changed, end := n.host.Subscribe()
	defer end()
	for ctx.Err() == nil {
		if clients, ok := n.shardClients(); ok && n.shardsReady() {
			if err := n.serveAPI(ctx, clients, changed); err != nil && ctx.Err() == nil {
				n.parts.set("api", err, "")
				n.log.Warn("the API ended; it is started again", "err", err)
				if !pause(ctx, time.Second) {
					return nil
				}
			}
			continue
		}
		n.parts.set("api", nil, "forwards to replicas")
		select {
		case <-ctx.Done():
		case <-changed:
		}
	}
	return nil
}

// shardClients are the in-process clients of this node's replicas, one a shard; false when it does not hold all.
type shardClients struct {
	table shard.Table
	of    map[shard.ID]*clientv3kube.Client
}

func (n *node) shardClients() (c shardClients, all bool) {
	c = shardClients{n.host.Shards(), map[shard.ID]*clientv3kube.Client{}}
	for _, s := range c.table.Shards() {
		client, ok := n.host.Client(s.Name)
		if !ok {
			return c, false
		}
		c.of[s.ID] = client
	}
	return c, true
}

// forKeys is the client of the shard that keeps all keys with a prefix. A kind whose objects were spread over shards could
// not be listed or watched, so a table that does it is an error of this version.
func (c shardClients) forKeys(prefix string) *clientv3kube.Client {
	s, err := c.table.ForRange(prefix, clientv3.GetPrefixRangeEnd(prefix))
	if err != nil {
		panic(fmt.Sprintf("the table of shards cuts the keys of a kind apart: %v", err))
	}
	return c.of[s.ID]
}

func (c shardClients) system() *clientv3kube.Client { return c.of[shard.System] }

// shardsReady tells whether this node's replicas of all shards have caught up and hear their leaders.
func (n *node) shardsReady() bool {
	for _, s := range n.host.Shards().Shards() {
		if !n.host.Ready(s.Name) {
			return false
		}
	}
	return true
}

// pause waits; false when ctx ended first.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// watchStore keeps the node's role in its gossip tags, and the health of its replicas, true, and sees to it that a node without a
// replica keeps no keys. All are looked at in memory
// only; not every change of a role comes with a notice.
func (n *node) watchStore(ctx context.Context) error {
	changed, end := n.host.Subscribe()
	defer end()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	defer func() { n.logIf("remember the last contact with the leaders", n.host.SaveContacts()) }()
	lost, saved := false, time.Now()
	for {
		n.announceRole()
		n.announceReady()
		n.dropRing()
		was := lost
		lost = slices.ContainsFunc(n.host.Status(), func(s host.ShardStatus) bool { return s.SinceContact > 3*time.Second })
		// For a recovery, should the machine not live to end in peace.
		n.noteSeen()
		if lost && !was || !lost && time.Since(saved) > time.Minute {
			saved = time.Now()
			n.logIf("remember when the desired state was the truth", n.desired.SaveSeen())
			n.logIf("remember the last contact with the leaders", n.host.SaveContacts())
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-tick.C:
		}
	}
}

func (n *node) announceRole() {
	role := string(host.RoleNone)
	var leads []string
	for _, s := range n.host.Status() {
		if s.Role == host.RoleLeader {
			leads = append(leads, s.Shard)
		}
		if s.Shard == systemShard && s.Role != host.RoleStarting {
			role = string(s.Role)
		}
		n.reportStore(s)
	}
	n.announce(map[string]string{membership.TagRole: role, tagLeads: strings.Join(leads, ",")})
}

// reportStore says how the replica of a shard is.
func (n *node) reportStore(s host.ShardStatus) {
	part := "store/" + s.Shard
	alarm := alarmOf(s)
	switch {
	case alarm != nil:
		n.parts.set(part, alarm, "")
	case s.Role == host.RoleNone:
		n.parts.set(part, nil, "no replica here")
	case !s.Ready && s.SinceContact > 5*time.Second:
		n.parts.set(part, fmt.Errorf("no leader heard of for %s: a majority of the voters cannot be reached", s.SinceContact.Round(time.Second)), "")
	case !s.Ready:
		n.parts.set(part, nil, "catching up")
	default:
		n.parts.set(part, nil, fmt.Sprintf("%s, revision %d, %d kB", s.Role, s.Revision, s.SizeInUse>>10))
	}
}

// alarmOf says what the alarms of a shard mean for this node; nil for nothing.
func alarmOf(s host.ShardStatus) error {
	for _, a := range s.Alarms {
		switch {
		case a.Kind == "NOSPACE":
			return fmt.Errorf("the shard is full: %.1f MiB are in use, the limit is %.1f MiB; only deletions are accepted until there is room", float64(s.SizeInUse)/(1<<20), float64(s.Quota)/(1<<20))
		case a.Kind == host.Corrupt && a.Replica == s.Replica:
			return errors.New("the data of this node's replica differs from that of the others: it is not used, and made anew from two others that agree; where there are none, take the node out of the cluster and let it join again")
		}
	}
	return nil
}

// serveAPI builds a server on the local replicas and runs it until ctx or one of them ends.
func (n *node) serveAPI(ctx context.Context, clients shardClients, changed <-chan struct{}) error {
	keys, err := n.clusterKeys(ctx, clients)
	if err != nil {
		return err
	}
	var agentCert minted
	cluster := n.id.Cluster
	joins, err := n.joinHandler(keys, clients.system().Client)
	if err != nil {
		return err
	}
	proxies, err := keys.authority.Derive("front proxy")
	if err != nil {
		return err
	}
	srv, err := api.New(ctx, api.Config{
		NodeName: n.cfg.Name, AdvertiseIP: n.cfg.Address, AdvertisePort: apiPort,
		Store:    clients.forKeys,
		ClientCA: keys.authority.CertPEM(), CAKey: keys.authority.Key, SAKey: keys.sa, Keys: apiKeys{n}, Sealed: n.cfg.Sealed, RuntimeConfig: n.cfg.RuntimeConfig, FrontProxyCA: proxies,
		KubeletClientCert: func() (*tls.Certificate, error) { return agentCert.agentClientCert(keys.authority, time.Now()) },
		ServiceCIDR:       cluster.ServiceCIDR, SecondServiceCIDR: cluster.ServiceCIDR6, DNSServiceIP: cluster.DNS, EvictionGrace: n.cfg.EvictionGrace,
		Replicas: n.replicaAddrs, NodeLabels: n.mayLabel, LastKnown: n.lastKnown,
		Why:    func(ctx context.Context, namespace, pod string) (any, error) { return n.why(ctx, namespace, pod) },
		Access: n.cfg.Access, Limits: n.cfg.Limits, RequestLog: n.cfg.RequestLog,
		Extra:       map[string]http.Handler{"/skein/v1/": n.controlHandler()},
		LongRunning: []string{backupPath},
		Public:      map[string]http.Handler{join.Path: joins, join.RenewPath: joins.Renewal()},
		Logger:      n.log.With("part", "api"),
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- srv.Run(ctx) }()
	wg.Go(func() { n.followKeys(ctx, clients) })
	began := time.Now()
	for ready := srv.Ready(); ; {
		select {
		case <-ready:
			ready = nil
			n.log.Info("the API serves", "after", time.Since(began).Round(time.Millisecond))
			n.parts.set("api", nil, "serves from the local replicas")
			n.api.put(srv, keys)
			n.announceReady()
			defer func() {
				n.api.put(nil, clusterKeys{})
				n.announceReady()
			}()
		case err := <-ended:
			if err == nil && ctx.Err() == nil {
				err = errors.New("the server ended by itself")
			}
			return err
		case <-changed:
			if now, ok := n.shardClients(); !ok || !maps.Equal(now.of, clients.of) { // a replica is gone, or another one
				cancel()
			}
		}
	}
}

// clusterKeys brings the key ring up to date and reads the keys from the store. The founding node puts them there first.
func (n *node) clusterKeys(ctx context.Context, clients shardClients) (clusterKeys, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	client := clients.system()
	f := foundingFile(n.cfg.StateDir)
	if k, _, pending, err := f.load(); err != nil {
		return clusterKeys{}, err
	} else if pending {
		ring, _ := n.ring.Ring()
		if err := f.finish(ctx, client.KV, k, ring); err != nil {
			return clusterKeys{}, err
		}
	}
	if _, err := n.follower(clients, nil).Sync(ctx); err != nil {
		return clusterKeys{}, err
	}
	ring, _ := n.ring.Ring()
	k, err := readKeys(ctx, client.KV, ring)
	if errors.Is(err, keyring.ErrUnknownKey) { // a rotation has not come that far, and this node was away when the old key went round
		if ferr := n.fetchSealing(ctx, client.KV); ferr != nil {
			return k, errors.Join(err, ferr)
		}
		ring, _ = n.ring.Ring()
		k, err = readKeys(ctx, client.KV, ring)
	}
	if err != nil {
		return k, err
	}
	k.authority.NodeTTL = n.cfg.CertTTL
	// The founder did not join through a token; its name is claimed here, so that nobody else gets it. Repeating it is harmless.
	hash, err := identity.KeyHash(n.id.Key.Public())
	if err != nil {
		return k, fmt.Errorf("node key: %w", err)
	}
	return k, join.NewTokenStore(client.KV, k.authority.Hash()).Enrol(ctx, join.Claim{Name: n.cfg.Name, KeyHash: hash})
}

// replicas are the members that serve the API now.
func (n *node) replicas() (out []membership.Member) {
	for _, m := range n.gossip.Members() {
		if m.Verdict == health.Alive && m.Tags[membership.TagReady] == "1" {
			out = append(out, m)
		}
	}
	return out
}

func (n *node) replicaAddrs() (out []netip.AddrPort) {
	for _, m := range n.replicas() {
		out = append(out, netip.AddrPortFrom(m.Addr, tagPort(m, membership.TagAPI, apiPort)))
	}
	return out
}
