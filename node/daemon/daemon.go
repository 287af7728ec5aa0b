// Package daemon is the composition root of a node: the only package that sees all the others. It enrols the node (founds
// a cluster, joins one, or resumes), starts the parts in the order in which they need each other, connects them by small
// adapters, and stops them in the reverse order.
//
// Contract: Run owns every goroutine that it starts and returns when all have ended. A part that cannot work at all ends
// Run with an error that names it; a part that has a bad moment says so in its health (see Status) and goes on trying.
// Order at start: preconditions of the machine, ports, identity, gossip, store, API front, container runtime, datapath, agent. Only
// package cmd calls Run, once a process.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	sdnotify "github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/component-base/metrics/legacyregistry"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/keyring"
	"skein.io/skein/consensus/members"
	"skein.io/skein/gossip/identity"
	"skein.io/skein/gossip/membership"
	"skein.io/skein/node/api/front"
	"skein.io/skein/node/api/lastknown"
	"skein.io/skein/node/desired"
	"skein.io/skein/scheduler"
	nodes "skein.io/skein/scheduler/controller/node"
	"skein.io/skein/scheduler/controller/resourceclaim"
)

// The ports of every node.
const (
	apiPort    = 6443
	gossipPort = membership.DefaultPort
	raftPort   = 7947
	agentPort  = 10250
)

// systemShard is the shard whose leader leads the cluster.
const systemShard = "system"

// dnsAddr is where every node's DNS server listens: a link-local address, so it means this node on each of them.
var dnsAddr = netip.MustParseAddrPort("169.254.20.10:53")

// node is one running node.
type node struct {
	cfg     Config
	id      *identity.Identity
	hostID  string
	notify  string // systemd's notification socket, "" without
	log     *slog.Logger
	started time.Time
	parts   parts
	disk    disk

	gossip  *membership.Membership
	host    *host.Host
	metrics *prometheus.Registry
	ring    *keyring.Holder // empty while this node holds no replica
	voters  *members.Manager
	api     apiServer
	front   *front.Front
	thin    *lastknown.Thin // answers reads while no replica is in reach
	minter  front.Minter
	desired *desired.Store
	client  *kubernetes.Clientset
	restCfg *rest.Config
	runtime *runtime
	net     *network
	leads   chan struct{} // gets a value when this node began to lead
	leaving chan struct{} // closed by leave
	// forgotten are the nodes from before a restore.
	forgotten forgotten
	claims    resourceclaim.Board
	inspector scheduler.Inspector // of the leader's decisions about pods
	zones     nodes.Board         // what the brake on evictions does while this node leads
	once      sync.Once           // guards leaving
	// agentBreak ends the agent before the node leaves.
	agentBreak breaker
	agentUp    chan struct{} // closed when the agent has its runtime
	agentOnce  sync.Once     // guards agentUp
	tagsMu     sync.Mutex    // orders changes of this node's gossip tags
}

// errLeft ends Run after `skein leave`.
var errLeft = errors.New("this node has left the cluster")

// Run starts the node and works until ctx ends.
func Run(ctx context.Context, cfg Config, in Intent) error {
	cfg.setDefaults()
	if err := cfg.Validate(); err != nil {
		return fmt.Errorf("this node cannot start:\n%w", err)
	}
	if len(in.Join) > 0 {
		if _, err := identity.ParseToken(in.Token); err != nil {
			return fmt.Errorf("join: %w", err)
		}
	}
	if err := preflight(ctx, cfg); err != nil {
		return err
	}
	if err := os.MkdirAll(cfg.StateDir, 0o755); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	unlock, err := lockState(cfg.StateDir)
	if err != nil {
		return err
	}
	defer unlock()
	if err := checkRestored(cfg.StateDir); err != nil {
		return err
	}
	// Upstream's API server would tell systemd that the service is ready, long before the node is.
	notify := os.Getenv("NOTIFY_SOCKET")
	os.Unsetenv("NOTIFY_SOCKET")
	bridgeLogs(cfg.Logger)
	if err := tuneRuntime(cfg.StateDir); err != nil {
		cfg.Logger.Debug("the runtime stays as it is", "error", err)
	}
	n := &node{cfg: cfg, notify: notify, log: cfg.Logger.With("node", cfg.Name), started: time.Now(), leaving: make(chan struct{}), agentBreak: newBreaker(), agentUp: make(chan struct{})}
	if err := n.enrol(ctx, in); err != nil {
		discardState(cfg.StateDir)
		return err
	}
	err = n.run(ctx)
	if errors.Is(err, errLeft) {
		return n.forget()
	}
	return err
}

// run starts the parts and waits for all of them.
func (n *node) run(ctx context.Context) (err error) {
	g, ctx := errgroup.WithContext(ctx)
	// What others stand on is closed by hand, after everything that stands on it has ended.
	closers := []func(){}
	defer func() {
		for i := len(closers) - 1; i >= 0; i-- {
			closers[i]()
		}
	}()
	start := func(name string, f func(ctx context.Context) error) {
		g.Go(func() error {
			if err := f(ctx); err != nil && ctx.Err() == nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			return nil
		})
	}
	fail := func(err error) error {
		g.Go(func() error { return err })
		return g.Wait()
	}

	if n.gossip, err = n.startGossip(); err != nil {
		return err
	}
	closers = append(closers, func() { n.logIf("stop gossip", n.gossip.Shutdown()) })
	n.prepareMinter()
	if n.host, err = n.startHost(); err != nil {
		return err
	}
	closers = append(closers, func() {
		legacyregistry.Registerer().Unregister(n.host)
		sctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		n.logIf("stop the store", n.host.Close(sctx))
	})
	localKey, err := n.id.LocalKey("desired state")
	if err != nil {
		return err
	}
	n.metrics = prometheus.NewRegistry()
	zones, claims := zoneMetrics{&n.zones}, claimMetrics{&n.claims}
	closers = append(closers, func() { legacyregistry.Registerer().Unregister(zones); legacyregistry.Registerer().Unregister(claims) })
	for _, r := range []prometheus.Registerer{n.metrics, legacyregistry.Registerer()} { // the second: the API's /metrics
		if err := errors.Join(r.Register(n.host), r.Register(zones), r.Register(claims)); err != nil {
			return fail(fmt.Errorf("metrics of the store, zones and claims: %w", err))
		}
	}
	if n.desired, err = desired.Open(filepath.Join(n.cfg.StateDir, "desired.db"), localKey, n.log); err != nil {
		return err
	}
	closers = append(closers, func() { n.logIf("close the desired state", n.desired.Close()) })
	if n.voters, err = n.newManager(); err != nil {
		return err
	}
	if n.front, err = n.newFront(); err != nil {
		return err
	}
	if n.restCfg, n.client, err = n.localClient(); err != nil {
		return fail(err)
	}
	start("disk", n.watchDisk)
	start("gossip", n.watchGossip)
	start("store", n.watchStore)
	start("generation", n.watchGeneration)
	start("API front", n.front.Run)
	start("API", n.runAPI)
	start("leadership", n.lead)
	start("certificate", n.renewCert)
	start("control socket", n.serveControl)
	start("desired state", func(ctx context.Context) error { return n.desired.Run(ctx, n.client, n.cfg.Name) })
	if n.runtime, err = n.newRuntime(); err != nil {
		return fail(err)
	}
	if n.net, err = n.newNetwork(); err != nil {
		return fail(err)
	}
	closers = append(closers, func() { n.logIf("close the datapath", n.net.Close()) })
	start("container runtime", n.runtime.Run)
	start("network", n.net.Run)
	start("DNS", n.runDNS)
	start("agent", func(ctx context.Context) error { return n.agentBreak.run(ctx, n.runAgent) })
	start("welcome", n.welcome)
	start("memory", n.trimMemory)
	start("leave", func(ctx context.Context) error {
		select {
		case <-n.leaving:
			return errLeft
		case <-ctx.Done():
			return nil
		}
	})
	return g.Wait()
}

// welcome tells whoever started the node that it works and how the next one joins.
func (n *node) welcome(ctx context.Context) error {
	if err := n.awaitReady(ctx); err != nil {
		return nil // ended before it was ready
	}
	if n.notify != "" {
		n.logIf("tell systemd that the node is ready", errors.Join(os.Setenv("NOTIFY_SOCKET", n.notify), ready()))
	}
	fmt.Fprintf(n.cfg.Out, "node %s is ready after %s (API %s)\n", n.cfg.Name, time.Since(n.started).Round(10*time.Millisecond), serverURL(n.cfg.Address))
	if line, err := n.firstJoinLine(ctx); err != nil {
		n.log.Warn("cannot make a join token", "err", err)
	} else if line != "" {
		fmt.Fprintf(n.cfg.Out, "\njoin another node with:\n\n  %s\n\n", line)
	} else {
		fmt.Fprintln(n.cfg.Out, "join another node with the line that 'skein token create' prints")
	}
	<-ctx.Done()
	return nil
}

func ready() error {
	_, err := sdnotify.SdNotify(true, sdnotify.SdNotifyReady)
	return err
}

// awaitReady waits until this node's Node object is Ready and what it says is true of this life: the object that an earlier one left
// on disk proves nothing.
func (n *node) awaitReady(ctx context.Context) error {
	changed, end := n.desired.Subscribe(desired.Nodes)
	defer end()
	for {
		if nodeReady(n.desired.Node(n.cfg.Name)) {
			break
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-n.agentUp:
	}
	for {
		if ok, _ := n.net.Ready(); ok {
			return nil
		}
		if !pause(ctx, 50*time.Millisecond) {
			return ctx.Err()
		}
	}
}

func (n *node) logIf(what string, err error) {
	if err != nil {
		n.log.Warn("cannot "+what, "err", err)
	}
}
