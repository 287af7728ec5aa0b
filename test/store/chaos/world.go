package chaos

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"skein.io/skein/consensus/host"
	"skein.io/skein/test/cluster"
	"skein.io/skein/test/store/chaos/clock"
	"skein.io/skein/test/store/chaos/disk"
	"skein.io/skein/test/store/chaos/history"
)

const (
	raftPort  = "7947"
	adminPort = "7949"
	etcdPort  = 7950
	// patience bounds what a healthy cluster has to do.
	patience = 60 * time.Second
)

// shardNames by the index of their port, with the keys that the test uses.
var shardNames = []string{"system", "pods", "events"}

var prefixes = map[string]string{"system": "/chaos/", "pods": "/registry/pods/chaos/", "events": "/registry/events/chaos/"}

// prefixEnd is the end of the range of all keys with a prefix.
func prefixEnd(p string) string { return p[:len(p)-1] + string(p[len(p)-1]+1) }

// world is a cluster of processes, each in a network and on a disk of its own.
type world struct {
	t     testing.TB
	lab   *cluster.Cluster
	nodes []*node
	hist  *history.History
	peers string
	bin   string
	args  []string
}

// node is a process of the world.
type node struct {
	w     *world
	name  string
	id    string
	lab   *cluster.Node
	disk  *disk.Disk
	life  atomic.Int64       // counts the processes
	clock *clock.Clock       // of the present process; nil before the first jump
	conns []*grpc.ClientConn // by shard
	http  *http.Client
	spare bool // not a member at the start
}

// newWorld starts members processes that form a cluster, and spares that are none.
func newWorld(t testing.TB, bin string, members, spares int, args ...string) *world {
	t.Helper()
	w := &world{t: t, hist: history.New(), bin: bin, args: args}
	for _, p := range prefixes {
		w.hist.Background[p+"fence/leader"] = true
	}
	w.lab = cluster.ForTest(t, members+spares, cluster.Config{})
	w.peers = filepath.Join(w.lab.Dir(), "peers")
	t.Cleanup(func() {
		for _, n := range w.nodes {
			n.close()
			if t.Failed() {
				t.Log(lastWords(n.lab.LogFile()))
			}
		}
	})
	for i, ln := range w.lab.Nodes() {
		n := &node{w: w, name: ln.Name(), id: uuid.NewString(), lab: ln, spare: i >= members}
		w.nodes = append(w.nodes, n)
		if err := n.prepare(); err != nil {
			t.Fatal(err)
		}
		n.disk.SetUnordered(i%2 == 1) // some disks promise no more than they have to
	}
	w.writePeers(nil)
	for _, n := range w.nodes {
		if err := n.start(); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := w.form(ctx); err != nil {
		t.Fatal(err)
	}
	return w
}

// lastWords is how the processes of a log died of themselves.
func lastWords(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(string(b), "\n")
	var out strings.Builder
	for i, l := range lines {
		for _, sign := range []string{"panic:", "fatal error:", "level=ERROR", "DATA RACE", "skein-store: "} {
			if strings.Contains(l, sign) {
				fmt.Fprintf(&out, "%s line %d:\n%s\n", path, i+1, strings.Join(lines[i:min(len(lines), i+60)], "\n"))
				break
			}
		}
	}
	return out.String()
}

// prepare gives the node its disk and its connections.
func (n *node) prepare() (err error) {
	if n.disk, err = disk.New(filepath.Join(n.lab.Dir(), "disk")); err != nil {
		return err
	}
	if err := n.disk.Mount(n.lab.Holder(), n.lab.StateDir()); err != nil {
		return err
	}
	dial := func(ctx context.Context, _, addr string) (net.Conn, error) {
		return n.w.lab.DialContext(ctx, "tcp", addr)
	}
	n.http = &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}, Timeout: 20 * time.Second}
	for i := range shardNames {
		c, err := grpc.NewClient("passthrough:///"+n.addr(etcdPort+i), grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return dial(ctx, "tcp", addr) }),
			grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.5, MaxDelay: 300 * time.Millisecond},
				MinConnectTimeout: time.Second}),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(1<<30)))
		if err != nil {
			return err
		}
		n.conns = append(n.conns, c)
	}
	return nil
}

func (n *node) addr(port int) string { return fmt.Sprintf("%s:%d", n.lab.IP(), port) }

func (n *node) close() {
	for _, c := range n.conns {
		_ = c.Close()
	}
	if n.clock != nil {
		_ = n.clock.Close()
	}
}

// writePeers tells every node where the others are; those in hidden look dead.
func (w *world) writePeers(hidden map[string]bool) {
	var b strings.Builder
	for _, n := range w.nodes {
		addr := n.lab.IP().String() + ":" + raftPort
		if hidden[n.name] {
			addr = ""
		}
		fmt.Fprintf(&b, "%s=%s=%s\n", n.name, n.id, addr)
	}
	if err := os.WriteFile(w.peers, []byte(b.String()), 0o644); err != nil {
		w.t.Fatal(err)
	}
}

// start the node's process.
func (n *node) start() error {
	args := append([]string{n.w.bin, "-name", n.name, "-dir", filepath.Join(n.lab.StateDir(), "store"), "-peers", n.w.peers,
		"-listen", n.lab.IP().String() + ":" + raftPort, "-admin", n.lab.IP().String() + ":" + adminPort,
		"-etcd", n.addr(etcdPort), "-log", "info", "-progress", "500ms", "-fence-writer"}, n.w.args...)
	n.life.Add(1)
	if n.clock != nil {
		_ = n.clock.Close()
		n.clock = nil
	}
	for _, c := range n.conns {
		c.ResetConnectBackoff()
	}
	return n.lab.Start(n.w.t.Context(), []string{"GOMAXPROCS=2", "GOTRACEBACK=all", "GORACE=halt_on_error=1"}, args...)
}

// kill -9.
func (n *node) kill() error {
	if !n.lab.Running() {
		return nil
	}
	_ = n.lab.Signal(syscall.SIGCONT) // a stopped process would die as well; this one's threads end sooner
	return n.lab.KillDaemon(context.Background())
}

// powerCut kills the process and takes back what it had not synchronised.
func (n *node) powerCut(seed int64) error {
	if err := n.kill(); err != nil {
		return err
	}
	if err := n.disk.Unmount(n.lab.Holder(), n.lab.StateDir()); err != nil {
		return err
	}
	writes, names, err := n.disk.PowerCut(seed)
	if err != nil {
		return err
	}
	n.w.t.Logf("  %s lost %d writes and %d names", n.name, writes, names)
	return n.disk.Mount(n.lab.Holder(), n.lab.StateDir())
}

// jump moves the wall clock of the process.
func (n *node) jump(off time.Duration) (err error) {
	if n.clock == nil {
		if n.clock, err = clock.Take(n.lab.Pid()); err != nil {
			return err
		}
	}
	return n.clock.Set(off)
}

// admin calls the admin port.
func (n *node) admin(ctx context.Context, path string, args url.Values, out any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+n.lab.IP().String()+":"+adminPort+path+"?"+args.Encode(), nil)
	if err != nil {
		return err
	}
	resp, err := n.http.Do(req)
	if err != nil {
		return fmt.Errorf("node %s: %w", n.name, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(resp.Body)
		return fmt.Errorf("node %s: %s: %s", n.name, path, strings.TrimSpace(string(b)))
	}
	if out == nil {
		return nil
	}
	return json.NewDecoder(resp.Body).Decode(out)
}

// status of a node's shard; what it does not know is zero.
func (n *node) status(ctx context.Context, shard string) (host.ShardStatus, error) {
	var all []host.ShardStatus
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if err := n.admin(ctx, "/status", nil, &all); err != nil {
		return host.ShardStatus{}, err
	}
	for _, s := range all {
		if s.Shard == shard {
			return s, nil
		}
	}
	return host.ShardStatus{}, fmt.Errorf("node %s has no shard %s", n.name, shard)
}

// leader of a shard, as most recently elected; nil if nobody leads.
func (w *world) leader(ctx context.Context, shard string) *node {
	var best *node
	var term uint64
	for _, n := range w.nodes {
		if s, err := n.status(ctx, shard); err == nil && s.Role == host.RoleLeader && s.Term >= term {
			best, term = n, s.Term
		}
	}
	return best
}

// until retries f on a healthy cluster.
func until(ctx context.Context, what string, f func(context.Context) error) error {
	for {
		err := f(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", what, errors.Join(err, ctx.Err()))
		case <-time.After(30 * time.Millisecond):
		}
	}
}

// form makes the members one cluster.
func (w *world) form(ctx context.Context) error {
	first := w.nodes[0]
	if err := until(ctx, "bootstrap", func(ctx context.Context) error { return first.admin(ctx, "/bootstrap", nil, nil) }); err != nil {
		return err
	}
	for _, s := range shardNames {
		for _, n := range w.nodes[1:] {
			if n.spare {
				continue
			}
			if err := w.addVoter(ctx, s, n); err != nil {
				return err
			}
		}
	}
	for _, n := range w.nodes {
		if !n.spare {
			if err := until(ctx, "readiness", n.ready); err != nil {
				return err
			}
		}
	}
	return nil
}

// ready fails unless the node serves all shards.
func (n *node) ready(ctx context.Context) error {
	for _, s := range shardNames {
		if err := n.linearize(ctx, s); err != nil { // readiness needs a first read, and the client a connection
			return err
		}
		if st, err := n.status(ctx, s); err != nil || !st.Ready {
			return errors.Join(err, fmt.Errorf("%s is not ready for %s", n.name, s))
		}
	}
	return nil
}

// addVoter adds a replica, starts it and promotes it.
func (w *world) addVoter(ctx context.Context, shard string, n *node) error {
	var id uint64
	err := until(ctx, "add "+n.name+" to "+shard, func(ctx context.Context) error {
		l := w.leader(ctx, shard)
		if l == nil {
			return errors.New("no leader")
		}
		return l.admin(ctx, "/member/add", url.Values{"shard": {shard}, "node": {n.id}}, &id)
	})
	if err != nil {
		return err
	}
	q := url.Values{"shard": {shard}, "replica": {fmt.Sprint(id)}}
	if err := until(ctx, "start "+n.name, func(ctx context.Context) error { return n.admin(ctx, "/start-replica", q, nil) }); err != nil {
		return err
	}
	q.Set("node", n.id)
	return until(ctx, "promote "+n.name, func(ctx context.Context) error {
		l := w.leader(ctx, shard)
		if l == nil {
			return errors.New("no leader")
		}
		st, err := l.status(ctx, shard)
		if err != nil {
			return err
		}
		for _, v := range st.Voters {
			if v.Replica == id {
				return nil
			}
		}
		var p, own host.Progress
		for _, x := range []struct {
			id  string
			out *host.Progress
		}{{n.id, &p}, {l.id, &own}} {
			if err := l.admin(ctx, "/progress", url.Values{"shard": {shard}, "node": {x.id}}, x.out); err != nil {
				return err
			}
		}
		if p.Applied+1000 < own.Applied {
			return fmt.Errorf("%s is at %d of %d", n.name, p.Applied, own.Applied)
		}
		return l.admin(ctx, "/member/promote", q, nil)
	})
}

// removeVoter ends a node's membership in a shard.
func (w *world) removeVoter(ctx context.Context, shard string, n *node) error {
	return until(ctx, "remove "+n.name+" from "+shard, func(ctx context.Context) error {
		l := w.leader(ctx, shard)
		if l == nil {
			return errors.New("no leader")
		}
		st, err := l.status(ctx, shard)
		if err != nil {
			return err
		}
		for _, v := range append(st.Voters, st.NonVoters...) {
			if v.NodeHostID == n.id {
				if err := l.admin(ctx, "/member/remove", url.Values{"shard": {shard}, "replica": {fmt.Sprint(v.Replica)}, "node": {n.id}}, nil); err != nil {
					return err
				}
				return errors.New("removed, to be seen")
			}
		}
		return nil
	})
}
