package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"skein.io/skein/node/cri/cgroup"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "die" { // for TestSweep: make a laboratory and leave it
		c, err := New(context.Background(), Config{Name: os.Args[2]})
		if err == nil {
			_, err = c.AddNode(context.Background(), "a", 0)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if os.Geteuid() != 0 {
		fmt.Println("SKIP: namespaces need root")
		return
	}
	if err := Sweep(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func lab(t *testing.T, cfg Config, nodes ...int) *Cluster {
	t.Helper()
	c, err := New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := c.Close(ctx); err != nil {
			t.Error(err)
		}
		left(t, c.Name(), c.Dir())
	})
	for i, seg := range nodes {
		if _, err := c.AddNode(t.Context(), string(rune('a'+i)), seg); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// left complains about anything of a laboratory that is still there.
func left(t *testing.T, name, dir string) {
	t.Helper()
	if there, err := cgroup.Exists("/skein/" + name); err != nil || there {
		t.Errorf("cgroup of lab %s left: %v, %v", name, there, err)
	}
	for _, pattern := range []string{"/run/netns/sk-" + name + "-*", registryDir + "/" + name + ".*", dir} {
		if found, _ := filepath.Glob(pattern); len(found) > 0 {
			t.Errorf("left: %v", found)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), dir) || strings.Contains(string(mounts), "sk-"+name) {
		t.Errorf("mounts of lab %s left", name)
	}
}

// reach needs no server: a closed port of a reachable address refuses, an unreachable one does not answer.
func reach(t *testing.T, from *Node, to netip.Addr) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 400*time.Millisecond)
	defer cancel()
	_, err := from.Exec(ctx, "bash", "-c", fmt.Sprintf("exec 3<>/dev/tcp/%s/9", to))
	if err == nil {
		t.Fatalf("port 9 of %s is open", to)
	}
	return strings.Contains(err.Error(), "refused")
}

func TestForTest(t *testing.T) {
	var name, dir string
	t.Run("inner", func(t *testing.T) {
		c := ForTest(t, 2, Config{Segments: 2})
		name, dir = c.Name(), c.Dir()
		if n := c.Nodes(); len(n) != 2 || n[0].Segment() != 1 || n[1].Segment() != 2 || !n[1].On() {
			t.Errorf("nodes %v", n)
		}
	})
	left(t, name, dir)
}

func TestNodesAreMachines(t *testing.T) {
	c := lab(t, Config{}, 1, 1)
	a, b := c.Node("a"), c.Node("b")
	if a.IP() == b.IP() || a.Cgroup() == b.Cgroup() || a.Netns() == b.Netns() {
		t.Errorf("nodes share something: %v %v", a, b)
	}
	if !reach(t, a, b.IP()) {
		t.Error("a does not reach b")
	}
	out, err := a.Exec(t.Context(), "sh", "-c", `hostname 2>/dev/null || cat /proc/sys/kernel/hostname; cat /proc/self/cgroup; echo "$SKEIN_NAME $SKEIN_ADDRESS $SKEIN_CGROUP_ROOT"; readlink /proc/self/ns/mnt; pwd`)
	if err != nil {
		t.Fatal(err)
	}
	self, _ := os.Readlink("/proc/self/ns/mnt")
	wd, _ := os.Getwd()
	for want, ok := range map[string]bool{
		"a\n":                          strings.HasPrefix(out, "a\n"),
		"its cgroup, in every one":     strings.Count(out, ":"+a.Cgroup()+"/lab\n") == len(hierarchies(t)),
		"its settings":                 strings.Contains(out, fmt.Sprintf("a %s %s\n", a.IP(), a.Cgroup())),
		"a mount namespace of its own": !strings.Contains(out, self),
		"the caller's directory":       strings.HasSuffix(out, wd+"\n"),
	} {
		if !ok {
			t.Errorf("not %s:\n%s", want, out)
		}
	}
	// What a node mounts or puts into its private directories, no other one sees.
	if _, err := a.Exec(t.Context(), "sh", "-c", `touch /var/lib/cni/x /run/skein/x && mkdir "$SKEIN_STATE_DIR/m" && mount -t tmpfs x "$SKEIN_STATE_DIR/m" && touch "$SKEIN_STATE_DIR/m/x"`); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"/var/lib/cni/x", "/run/skein/x", a.StateDir() + "/m/x"} {
		if _, err := b.Exec(t.Context(), "test", "-e", p); err == nil {
			t.Errorf("b sees %s of a", p)
		}
		if _, err := os.Stat(p); err == nil {
			t.Errorf("the host sees %s of a", p)
		}
	}
}

func hierarchies(t *testing.T) []cgroup.Hierarchy {
	t.Helper()
	hs, err := cgroup.Hierarchies()
	if err != nil {
		t.Fatal(err)
	}
	return hs
}

func TestPartition(t *testing.T) {
	c := lab(t, Config{}, 1, 1, 1)
	a, b, d := c.Node("a"), c.Node("b"), c.Node("c")
	check := func(when string, ab, ad, bd bool) {
		t.Helper()
		for _, p := range []struct {
			x, y *Node
			want bool
		}{{a, b, ab}, {b, a, ab}, {a, d, ad}, {d, a, ad}, {b, d, bd}} {
			got := reach(t, p.x, p.y.IP())
			for try := 0; p.want && !got && try < 10; try++ { // the kernel remembers a neighbour that was away for a while
				got = reach(t, p.x, p.y.IP())
			}
			if got != p.want {
				t.Errorf("%s: %s reaches %s: %v, want %v", when, p.x.Name(), p.y.Name(), got, p.want)
			}
		}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check("at first", true, true, true)
	must(c.Cut(t.Context(), "b", "a"))
	check("a | b", false, true, true)
	must(c.Partition(t.Context(), []string{"a"}, []string{"b", "c"}))
	check("a | b c", false, false, true)
	// A cut outlives the reboot of a node.
	must(b.Kill(t.Context()))
	must(b.Start(t.Context(), nil, "true"))
	check("a | b c after a reboot", false, false, true)
	must(c.Heal(t.Context()))
	check("healed", true, true, true)
	must(a.Link(t.Context(), false))
	check("cable out", false, false, true)
	must(c.Heal(t.Context()))
	check("healed again", true, true, true)
	if err := c.Cut(t.Context(), "a", "x"); err == nil {
		t.Error("a node that is not there was cut")
	}
}

func TestTwoSegments(t *testing.T) {
	c := lab(t, Config{Segments: 2}, 1, 2)
	a, b := c.Node("a"), c.Node("b")
	if a.IP().As4()[2] == b.IP().As4()[2] {
		t.Errorf("same subnet: %s, %s", a.IP(), b.IP())
	}
	if !reach(t, a, b.IP()) {
		t.Error("not routed")
	}
	if err := c.Cut(t.Context(), "a", "b"); err != nil {
		t.Fatal(err)
	}
	if reach(t, a, b.IP()) {
		t.Error("routed through a cut")
	}
}

// TestDaemonLife runs a shell as the daemon.
func TestDaemonLife(t *testing.T) {
	c := lab(t, Config{}, 1)
	a := c.Node("a")
	// Like the real one it leaves a process behind that outlives it.
	const script = `echo "life with $EXTRA"; echo x >> "$SKEIN_STATE_DIR/lives"; sleep 1000 & trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.05; done`
	start := func(argv ...string) {
		t.Helper()
		want := strings.Count(read(t, a.LogFile()), "up\n") + 1
		if err := a.Start(t.Context(), []string{"EXTRA=more"}, argv...); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the daemon to be up", func() bool { return strings.Count(read(t, a.LogFile()), "up\n") == want })
	}
	start("bash", "-c", script)
	pids := func() int {
		t.Helper()
		p, err := cgroup.Pids(a.Cgroup() + "/" + daemonLeaf)
		if err != nil {
			t.Fatal(err)
		}
		return len(p)
	}
	if err := a.Start(t.Context(), nil); err == nil {
		t.Error("a second daemon was started")
	}
	if err := a.KillDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	if a.Running() || !a.On() {
		t.Errorf("running %v, on %v after a crash", a.Running(), a.On())
	}
	waitFor(t, "only the child to be left", func() bool { return pids() == 1 || pids() == 2 })
	start()
	if err := a.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := a.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if err := a.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if log := read(t, a.LogFile()); !strings.Contains(log, "bye") || strings.Count(log, "life with more") != 2 {
		t.Errorf("log:\n%s", log)
	}
	start()
	if err := a.Freeze(); err != nil {
		t.Fatal(err)
	}
	if err := a.Thaw(); err != nil {
		t.Fatal(err)
	}
	if err := a.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if there, _ := cgroup.Exists(a.Cgroup()); there || a.On() || a.Running() {
		t.Errorf("after a power cut: cgroup %v, on %v, running %v", there, a.On(), a.Running())
	}
	if _, err := a.Exec(t.Context(), "true"); !errors.Is(err, ErrOff) {
		t.Errorf("command in a node that is off: %v", err)
	}
	start() // boots it
	if lives := read(t, a.StateDir()+"/lives"); strings.Count(lives, "x") != 4 {
		t.Errorf("the disk did not survive: %q", lives)
	}
	if err := a.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := a.Wipe(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(a.StateDir()); err == nil {
		t.Error("the disk survived wiping")
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return string(b)
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited 10 s for %s", what)
		}
	}
}

// TestSweep lets a process die with a laboratory, next to one that lives.
func TestSweep(t *testing.T) {
	living := lab(t, Config{}, 1)
	name := "z" + living.Name()[:5]
	out, err := exec.Command("/proc/self/exe", "die", name).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if there, _ := cgroup.Exists("/skein/" + name + "/a"); !there {
		t.Fatal("the laboratory went with its process; this test means to leave it")
	}
	if err := Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	left(t, name, filepath.Join(defaultParent(), name))
	if _, err := living.Node("a").Exec(t.Context(), "true"); err != nil {
		t.Errorf("the living one was swept: %v", err)
	}
}

func TestPersistent(t *testing.T) {
	c, err := New(t.Context(), Config{Persistent: true})
	if err != nil {
		t.Fatal(err)
	}
	name := c.Name()
	if _, err := c.AddNode(t.Context(), "a", 0); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(name); !errors.Is(err, ErrBusy) {
		t.Errorf("opened twice: %v", err)
	}
	v, err := View(name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.Node("a").Exec(t.Context(), "true"); err != nil {
		t.Error(err)
	}
	if err := v.Node("a").Kill(t.Context()); !errors.Is(err, errView) {
		t.Errorf("a look killed: %v", err)
	}
	c.Release()
	if err := Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	c2, err := Open(name)
	if err != nil {
		t.Fatal(err)
	}
	if !c2.Node("a").On() {
		t.Error("it did not live on")
	}
	if err := c2.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.children = nil
	left(t, name, c.Dir())
}

// This machine reaches a node over the link, which is gone when Close returns: the next laboratory of the name makes it again.
func TestHostLink(t *testing.T) {
	cfg := Config{Name: "hostlink", Subnet: netip.MustParsePrefix("10.97.0.0/16"), HostLink: true}
	for range 2 {
		c, err := New(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		n, err := c.AddNode(t.Context(), "a", 0)
		if err == nil {
			var conn net.Conn
			// Nothing listens: a refusal is an answer.
			if conn, err = net.DialTimeout("tcp", net.JoinHostPort(n.IP().String(), "1"), 5*time.Second); err == nil {
				conn.Close()
			} else if errors.Is(err, syscall.ECONNREFUSED) {
				err = nil
			}
		}
		if err := errors.Join(err, c.Close(t.Context())); err != nil {
			t.Fatal(err)
		}
		if _, err := net.InterfaceByName(c.st.hostLink()); err == nil {
			t.Fatal("the link is left")
		}
	}
}

func TestConfigReportsAllFaults(t *testing.T) {
	err := Config{Name: "NO", Dir: "x", Segments: 3}.Validate()
	for _, want := range []string{"name", "directory", "segments", "subnet"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v does not name the %s", err, want)
		}
	}
}

// FuzzDecodeState: whatever the registry file holds, nothing beyond a laboratory's own names can come out of it.
func FuzzDecodeState(f *testing.F) {
	f.Add([]byte(`{"version":1,"name":"x","dir":"/tmp/x","segments":1,"subnet":"10.99.0.0/16","nodes":[{"name":"a","index":1,"segment":1,"ip":"10.99.1.11"}]}`))
	f.Add([]byte(`{"version":1,"name":"x","dir":"/","segments":1,"subnet":"10.99.0.0/16"}`))
	f.Add([]byte(`{"version":1,"name":"x","dir":"/tmp/x","segments":1,"subnet":"10.99.0.0/16","nodes":[null,{"name":"../a"}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := decodeState("x", b)
		if err != nil {
			return
		}
		if s.Dir == "/" || !filepath.IsAbs(s.Dir) || s.cgroup() != "/skein/x" {
			t.Errorf("accepted %+v", s)
		}
		for _, n := range s.Nodes {
			if strings.ContainsAny(n.Name, "/.") || n.Name == "" {
				t.Errorf("accepted node %q", n.Name)
			}
		}
		_ = s.nftRules()
	})
}
