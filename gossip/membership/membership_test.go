package membership

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"skein.io/skein/gossip/health"
	"skein.io/skein/gossip/identity"
)

// testNets gives each test a loopback /24 of its own, so that they can use the real port side by side, also with those of
// another run.
var testNets atomic.Uint32

type network struct {
	t   *testing.T
	net netip.Addr
	key []byte
}

func newNetwork(t *testing.T) *network {
	n := uint32(os.Getpid())<<6 + testNets.Add(1)
	key := sha256.Sum256([]byte(t.Name()))
	return &network{t: t, net: netip.AddrFrom4([4]byte{127, byte(64 + n>>8%128), byte(n), 0}), key: key[:]}
}

func (n *network) addr(host int) netip.Addr {
	b := n.net.As4()
	b[3] = byte(host)
	return netip.AddrFrom4(b)
}

func (n *network) at(host int) netip.AddrPort { return netip.AddrPortFrom(n.addr(host), DefaultPort) }

func (n *network) config(host int) Config {
	return Config{Name: fmt.Sprintf("n%d", host), Addr: n.addr(host), Key: n.key, Tags: map[string]string{TagID: fmt.Sprintf("id-%d", host)}}
}

func (n *network) start(cfg Config) *Membership {
	n.t.Helper()
	if testing.Verbose() {
		cfg.Logger = slog.New(slog.NewTextHandler(newTestWriter(n.t), &slog.HandlerOptions{Level: slog.LevelInfo})).With("on", cfg.Name)
	}
	m, err := Start(context.Background(), cfg)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { m.Shutdown() })
	return m
}

// cluster starts nodes 1 to size and waits until all know all.
func (n *network) cluster(size int, edit func(*Config)) []*Membership {
	n.t.Helper()
	var all []*Membership
	for host := 1; host <= size; host++ {
		cfg := n.config(host)
		if host > 1 {
			cfg.Seeds = []netip.AddrPort{n.at(1)}
		}
		if edit != nil {
			edit(&cfg)
		}
		all = append(all, n.start(cfg))
	}
	for _, m := range all {
		for host := 1; host <= size; host++ {
			n.await(m, host, health.Alive, 10*time.Second)
		}
	}
	return all
}

// await waits until m sees the verdict on a node.
func (n *network) await(m *Membership, host int, want health.Verdict, limit time.Duration) Member {
	n.t.Helper()
	var last Member
	ok := eventually(m, limit, func() bool {
		last, _ = m.Member(fmt.Sprintf("n%d", host))
		return last.Verdict == want
	})
	if !ok {
		n.t.Fatalf("after %s %s sees n%d as %s, want %s; members %+v", limit, m.cfg.Name, host, last.Verdict, want, m.Members())
	}
	return last
}

// eventually waits for something that shows in the members.
func eventually(m *Membership, limit time.Duration, what func() bool) bool {
	changes, cancel := m.Subscribe()
	defer cancel()
	deadline := time.After(limit)
	for {
		select {
		case <-changes:
			if what() {
				return true
			}
		case <-deadline:
			return what()
		}
	}
}

// testWriter logs to a test until that is over: serf resolves conflicts of names in goroutines that nobody can wait for.
type testWriter struct {
	mu sync.Mutex // guards t
	t  *testing.T // nil when it has ended
}

func newTestWriter(t *testing.T) *testWriter {
	w := &testWriter{t: t}
	t.Cleanup(func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.t = nil
	})
	return w
}

func (w *testWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.t != nil {
		w.t.Logf("%s", bytes.TrimSpace(b))
	}
	return len(b), nil
}

func TestMembersTagsAndLeave(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	all := n.cluster(3, nil)
	seen, _ := all[2].Member("n1")
	if seen.AddrPort() != n.at(1) || seen.Tags[TagID] != "id-1" || seen.Self || seen.Levels() != identity.OwnLevels() {
		t.Errorf("n3 sees n1 as %+v", seen)
	}
	if own, _ := all[2].Member("n3"); !own.Self || own.Verdict != health.Alive {
		t.Errorf("n3 sees itself as %+v", own)
	}
	since := seen.Since

	if err := all[0].SetTags(map[string]string{TagID: "id-1", TagRole: "leader"}); err != nil {
		t.Fatal(err)
	}
	if !eventually(all[2], 5*time.Second, func() bool { seen, _ = all[2].Member("n1"); return seen.Tags[TagRole] == "leader" }) {
		t.Fatalf("n3 never saw n1's new tag: %+v", seen)
	}
	if !seen.Since.Equal(since) || seen.Levels() != identity.OwnLevels() {
		t.Errorf("the new tag changed more: %+v", seen)
	}
	err := all[0].SetTags(map[string]string{"long": strings.Repeat("x", 600)})
	if err == nil || !strings.Contains(err.Error(), "at most 512") {
		t.Errorf("too long tags: %v", err)
	}
	if tags := all[0].Tags(); tags[TagRole] != "leader" {
		t.Errorf("refused tags replaced the good ones: %v", tags)
	}

	if err := all[1].Leave(context.Background()); err != nil {
		t.Fatal(err)
	}
	for _, m := range []*Membership{all[0], all[2]} {
		n.await(m, 2, health.Left, 5*time.Second)
	}
	all[1].Shutdown()
	if err := all[1].Err(); !errors.Is(err, ErrStopped) {
		t.Errorf("Err = %v", err)
	}
	if err := all[1].SetTags(nil); !errors.Is(err, ErrStopped) {
		t.Errorf("SetTags after the end: %v", err)
	}
	if err := all[1].Leave(context.Background()); !errors.Is(err, ErrStopped) {
		t.Errorf("Leave after the end: %v", err)
	}
	// Left must not turn into dead when the node stops answering.
	n.await(all[0], 2, health.Left, time.Second)
	if v := all[0].Verdicts(); !maps.Equal(v, map[string]health.Verdict{"n1": health.Alive, "n2": health.Left, "n3": health.Alive}) {
		t.Errorf("verdicts %v", v)
	}
}

func TestRTT(t *testing.T) {
	t.Parallel()
	all := newNetwork(t).cluster(2, nil)
	if rtt, ok := all[0].RTT("n1"); rtt != 0 || !ok {
		t.Errorf("RTT to itself: %v %t", rtt, ok)
	}
	if _, ok := all[0].RTT("nobody"); ok {
		t.Error("there is an RTT to nobody")
	}
	var rtt time.Duration
	for ok, deadline := false, time.Now().Add(10*time.Second); !ok; rtt, ok = all[0].RTT("n2") {
		if time.Now().After(deadline) {
			t.Fatal("no RTT after 10 s of probes")
		}
		time.Sleep(20 * time.Millisecond) // coordinates change without notice
	}
	if rtt <= 0 || rtt > 100*time.Millisecond {
		t.Errorf("RTT over loopback is %v", rtt)
	}
}

// The two ways in which a node can be away: crashed, and cut off. While it is, it is suspect, then dead; and it returns alone.
func TestPartitionAndHeal(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	var cut atomic.Bool
	all := n.cluster(3, func(c *Config) {
		own := c.Addr
		c.unreachable = func(to netip.AddrPort) bool { return cut.Load() && (own == n.addr(3)) != (to.Addr() == n.addr(3)) }
	})
	begin := time.Now()
	cut.Store(true)
	for _, m := range all[:2] {
		n.await(m, 3, health.Dead, 15*time.Second)
	}
	t.Logf("majority sees the cut-off node dead after %v", time.Since(begin))
	for host := 1; host <= 2; host++ {
		n.await(all[2], host, health.Dead, 15*time.Second)
	}
	t.Logf("the cut-off node sees all dead after %v", time.Since(begin))
	begin = time.Now()
	cut.Store(false)
	for _, m := range all {
		for host := 1; host <= 3; host++ {
			n.await(m, host, health.Alive, 15*time.Second)
		}
	}
	t.Logf("healed after %v", time.Since(begin))
}

// One node does not reach another directly, but the third does: nobody is dead, and who does not answer is suspect for the one.
func TestOneWayTroubleIsSuspicionOnly(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	var cut atomic.Bool
	all := n.cluster(3, func(c *Config) {
		own := c.Addr
		c.unreachable = func(to netip.AddrPort) bool { return cut.Load() && own == n.addr(1) && to.Addr() == n.addr(3) }
	})
	cut.Store(true)
	n.await(all[0], 3, health.Suspect, 10*time.Second)
	deadline := time.Now().Add(5 * time.Second)
	if eventually(all[0], time.Until(deadline), func() bool { m, _ := all[0].Member("n3"); return m.Verdict != health.Suspect }) {
		m, _ := all[0].Member("n3")
		t.Errorf("suspect became %s while the third node reached it", m.Verdict)
	}
	if m, _ := all[1].Member("n3"); m.Verdict != health.Alive {
		t.Errorf("n2, which reaches n3, sees it as %s", m.Verdict)
	}
	cut.Store(false)
	n.await(all[0], 3, health.Alive, 10*time.Second)
}

// A node that rebooted while it was cut off has seen everyone dead; so has everyone that rebooted since. They must meet again.
func TestMeetAgainAfterRebootsWhileApart(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	dirs := t.TempDir()
	var cut atomic.Bool
	withDir := func(c *Config) {
		own := c.Addr
		c.Dir = filepath.Join(dirs, c.Name)
		c.unreachable = func(to netip.AddrPort) bool { return cut.Load() && (own == n.addr(3)) != (to.Addr() == n.addr(3)) }
	}
	all := n.cluster(3, withDir)
	cut.Store(true)
	n.await(all[0], 3, health.Dead, 15*time.Second)
	n.await(all[1], 3, health.Dead, 15*time.Second)
	n.await(all[2], 1, health.Dead, 15*time.Second)
	n.await(all[2], 2, health.Dead, 15*time.Second)
	for i, m := range all {
		m.Shutdown()
		cfg := n.config(i + 1) // no seeds: only what is on disk
		withDir(&cfg)
		all[i] = n.start(cfg)
	}
	n.await(all[0], 2, health.Alive, 15*time.Second)
	if m, ok := all[2].Member("n1"); ok && m.Verdict == health.Alive {
		t.Fatal("the cut does not cut")
	}
	cut.Store(false)
	for _, m := range all {
		for host := 1; host <= 3; host++ {
			n.await(m, host, health.Alive, 20*time.Second)
		}
	}
}

func TestLeftNodeStaysAway(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	dirs := t.TempDir()
	all := n.cluster(2, func(c *Config) { c.Dir = filepath.Join(dirs, c.Name) })
	if err := all[1].Leave(context.Background()); err != nil {
		t.Fatal(err)
	}
	n.await(all[0], 2, health.Left, 5*time.Second)
	all[1].Shutdown()
	cfg := n.config(2)
	cfg.Dir = filepath.Join(dirs, cfg.Name)
	again := n.start(cfg)
	if eventually(again, 4*time.Second, func() bool { return len(again.Members()) > 1 }) {
		t.Errorf("a node that had left came back by itself: %+v", again.Members())
	}
	if _, err := again.Join([]string{n.at(1).String()}); err != nil {
		t.Fatal(err)
	}
	n.await(all[0], 2, health.Alive, 5*time.Second)
}

// A node that crashed may come back at once, at another address, and keeps its name.
func TestNodeMoves(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	all := n.cluster(3, nil)
	all[2].Shutdown() // no good-bye
	cfg := n.config(3)
	cfg.Addr, cfg.Seeds = n.addr(33), []netip.AddrPort{n.at(1)}
	moved := n.start(cfg)
	for _, m := range all[:2] {
		if !eventually(m, 20*time.Second, func() bool { x, _ := m.Member("n3"); return x.Verdict == health.Alive && x.Addr == n.addr(33) }) {
			t.Fatalf("%s never saw n3 at its new address: %+v", m.cfg.Name, m.Members())
		}
	}
	n.await(moved, 1, health.Alive, 10*time.Second)
	if err := moved.Err(); err != nil {
		t.Errorf("the moved node ended: %v", err)
	}
}

func TestNameConflict(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	told := make(chan string, 100)
	all := n.cluster(2, func(c *Config) {
		name := c.Name
		c.OnConflict = func(x Conflict) {
			told <- fmt.Sprintf("%s: %s %s %s %t", name, x.Name, x.Known.Addr(), x.Other.Addr(), x.Self)
		}
	})
	cfg := n.config(2) // a second n2
	cfg.Addr, cfg.Tags = n.addr(22), map[string]string{TagID: "another"}
	clone := n.start(cfg)
	_, err := clone.Join([]string{n.at(1).String()})
	if !errors.Is(err, ErrNameTaken) || !strings.Contains(err.Error(), "another name") {
		t.Errorf("the second n2 joined: %v", err)
	}
	// In the background it must not go on trying, but end.
	clone.Shutdown()
	cfg.Seeds = []netip.AddrPort{n.at(1)}
	clone = n.start(cfg)
	select {
	case <-clone.Done():
	case <-time.After(20 * time.Second):
		t.Fatal("the second n2 goes on")
	}
	if err := clone.Err(); !errors.Is(err, ErrNameTaken) {
		t.Errorf("it ended with %v", err)
	}
	for _, m := range all {
		if x, _ := m.Member("n2"); x.Addr != n.addr(2) || x.Verdict != health.Alive {
			t.Errorf("%s now sees n2 as %+v", m.cfg.Name, x)
		}
		if m.Err() != nil {
			t.Errorf("%s ended: %v", m.cfg.Name, m.Err())
		}
	}
	// The second n2 may have ended before n1's callback is called. n2 itself may be told as well.
	want, times := fmt.Sprintf("n1: n2 %s %s false", n.addr(2), n.addr(22)), 0
	for deadline := time.After(10 * time.Second); times == 0; {
		select {
		case x := <-told:
			if x == want {
				times++
			}
		case <-deadline:
			t.Fatalf("nobody told %q", want)
		}
	}
	for len(told) > 0 {
		if x := <-told; x == want {
			t.Errorf("told %q again", want)
		}
	}
}

// Two halves of a cluster met again, and in each there is an n2. The members vote, and who loses ends. (With one vote each, both
// may; whoever then starts first has the name.)
func TestVoteOnName(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	quick := func(c *Config) {
		c.retime = func(t *timing) { t.pushPullInterval, t.settle = 300*time.Millisecond, 0 }
	}
	all := n.cluster(4, quick)
	other := n.config(5)
	quick(&other)
	five := n.start(other)
	cfg := n.config(2)
	quick(&cfg)
	cfg.Addr, cfg.Tags, cfg.Seeds = n.addr(22), map[string]string{TagID: "another"}, []netip.AddrPort{n.at(5)}
	clone := n.start(cfg)
	n.await(clone, 5, health.Alive, 5*time.Second)
	if _, err := five.Join([]string{n.at(1).String()}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-clone.Done():
	case <-time.After(30 * time.Second):
		t.Fatal("the second n2 goes on")
	}
	if err := clone.Err(); !errors.Is(err, ErrNameTaken) {
		t.Errorf("it ended with %v", err)
	}
	if err := all[1].Err(); err != nil {
		t.Errorf("the first n2, which three others know, ended too: %v", err)
	}
	for host := 1; host <= 5; host++ {
		n.await(all[0], host, health.Alive, 5*time.Second)
	}
}

func TestIncompatibleLevelIsRefused(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	all := n.cluster(1, func(c *Config) { c.Levels = identity.Levels{Level: 3, Min: 2} })
	for _, c := range []struct {
		levels identity.Levels
		want   string // in the error; empty: welcome
	}{
		{identity.Levels{Level: 1, Min: 1}, "upgrade this side"},
		{identity.Levels{Level: 5, Min: 4}, "upgrade the other side"},
		{identity.Levels{Level: 2, Min: 1}, ""},
	} {
		cfg := n.config(2)
		cfg.Levels = c.levels
		m := n.start(cfg)
		_, err := m.Join([]string{n.at(1).String()})
		if c.want == "" {
			if err != nil {
				t.Errorf("level %v: %v", c.levels, err)
			}
			n.await(all[0], 2, health.Alive, 5*time.Second)
			continue
		}
		if !errors.Is(err, identity.ErrIncompatible) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("level %v: error %v, want %q", c.levels, err, c.want)
		}
		if x, ok := all[0].Member("n2"); ok {
			t.Errorf("level %v is a member: %+v", c.levels, x)
		}
		m.Shutdown()
	}
}

func TestOtherKeyIsRefused(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	all := n.cluster(1, nil)
	cfg := n.config(2)
	cfg.Key = make([]byte, 32)
	m := n.start(cfg)
	if _, err := m.Join([]string{n.at(1).String()}); err == nil || !strings.Contains(err.Error(), "another cluster") {
		t.Errorf("error %v", err)
	}
	if len(all[0].Members()) != 1 || len(m.Members()) != 1 {
		t.Errorf("nodes with different keys see each other: %v %v", all[0].Members(), m.Members())
	}
}

func TestStartRefuses(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	busy, err := net.Listen("tcp", n.at(1).String())
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	for _, c := range []struct {
		name string
		edit func(*Config)
		want []string
		is   error
	}{
		{"busy port", func(c *Config) {}, []string{"in use by another program", ":7946"}, ErrPortBusy},
		{"foreign address", func(c *Config) { c.Addr = netip.MustParseAddr("192.0.2.1") }, []string{"192.0.2.1 is not an address of this machine"}, nil},
		{"all at once", func(c *Config) {
			*c = Config{Name: "N", Key: []byte("short"), Profile: "wan", Seeds: make([]netip.AddrPort, 1), Tags: map[string]string{"t": strings.Repeat("x", 600)}}
		}, []string{"only a-z", "5 bytes instead of 32", "address", "lan or edge", "seed address", "at most 512"}, identity.ErrBadName},
		{"no parent", func(c *Config) { c.Addr, c.Dir = n.addr(2), filepath.Join(t.TempDir(), "a", "b") }, []string{"no such file"}, nil},
	} {
		cfg := n.config(1)
		c.edit(&cfg)
		m, err := Start(context.Background(), cfg)
		if err == nil {
			m.Shutdown()
			t.Errorf("%s: started", c.name)
			continue
		}
		for _, want := range c.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: error %q does not say %q", c.name, err, want)
			}
		}
		if c.is != nil && !errors.Is(err, c.is) {
			t.Errorf("%s: error %v is not %v", c.name, err, c.is)
		}
	}
}

func TestDamagedStateDoesNotKeepANodeFromStarting(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	dir := t.TempDir()
	for name, data := range map[string]string{peersFile: "{broken", snapshotFile: "alive: \nclock: many\n\x00\x01garbage\nnot-alive\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	n.cluster(1, nil)
	cfg := n.config(2)
	cfg.Dir, cfg.Seeds = dir, []netip.AddrPort{n.at(1)}
	n.await(n.start(cfg), 1, health.Alive, 10*time.Second)
}

func TestForget(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	all := n.cluster(3, nil)
	all[2].Shutdown()
	n.await(all[0], 3, health.Dead, 10*time.Second)
	n.await(all[1], 3, health.Dead, 10*time.Second)
	if err := all[0].Forget("n3"); err != nil {
		t.Fatal(err)
	}
	for _, m := range all[:2] {
		if !eventually(m, 10*time.Second, func() bool { _, ok := m.Member("n3"); return !ok }) {
			t.Errorf("%s still lists n3", m.cfg.Name)
		}
	}
	if err := all[0].Forget("n1"); err == nil {
		t.Error("a node forgot itself")
	}
}

func TestContextEndsMembership(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	ctx, cancel := context.WithCancel(context.Background())
	cfg := n.config(1)
	cfg.Seeds = []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:7946")} // answers nobody: a dial is under way
	m, err := Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	select {
	case <-m.Done():
	case <-time.After(2 * time.Second):
		t.Error("a dial that gets no answer holds up the end")
	}
	m.Shutdown()
	// The port is free again.
	again, err := Start(context.Background(), n.config(1))
	if err != nil {
		t.Fatal(err)
	}
	again.Shutdown()
}
