//go:build storetools

package tools

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// ctl runs etcdctl.
type ctl struct {
	t     *testing.T
	path  string
	flags []string
}

func (s *store) ctl(shard int, cert, key string) *ctl {
	return &ctl{s.t, tool(s.t, "etcdctl"), []string{"--endpoints", s.endpoints(shard), "--cacert", s.ca.path("ca.crt"), "--cert", cert, "--key", key, "--command-timeout", "20s"}}
}

func (c *ctl) command(args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	c.t.Cleanup(cancel)
	return exec.CommandContext(ctx, c.path, append(args, c.flags...)...)
}

// run returns both outputs of a command that has to succeed.
func (c *ctl) run(args ...string) string {
	c.t.Helper()
	return c.in("", args...)
}

func (c *ctl) in(stdin string, args ...string) string {
	c.t.Helper()
	cmd := c.command(args...)
	cmd.Stdin = strings.NewReader(stdin)
	b, err := cmd.CombinedOutput()
	if err != nil {
		c.t.Fatalf("etcdctl %q: %v\n%s", args, err, b)
	}
	return string(b)
}

// want runs a command whose output has to match a regular expression.
func (c *ctl) want(pattern string, args ...string) string {
	c.t.Helper()
	out := c.run(args...)
	if !regexp.MustCompile(`(?s)` + pattern).MatchString(out) {
		c.t.Errorf("etcdctl %q: %q does not match %q", args, out, pattern)
	}
	return out
}

// refused runs a command that has to fail with a message.
func (c *ctl) refused(message string, args ...string) {
	c.t.Helper()
	b, err := c.command(args...).CombinedOutput()
	if err == nil || !strings.Contains(string(b), message) {
		c.t.Errorf("etcdctl %q: %v, %q does not say %q", args, err, b, message)
	}
}

// background starts a command and returns its lines.
func (c *ctl) background(args ...string) (lines <-chan string, stop func()) {
	c.t.Helper()
	cmd := c.command(args...)
	out, err := cmd.StdoutPipe()
	must(c.t, err)
	must(c.t, cmd.Start())
	ch := make(chan string, 1000)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer close(ch)
		for s := bufio.NewScanner(out); s.Scan(); {
			ch <- s.Text()
		}
	}()
	stop = func() {
		_ = cmd.Process.Signal(os.Interrupt) // it may have ended
		<-done
		_ = cmd.Wait() // interrupted
	}
	return ch, stop
}

func (c *ctl) line(lines <-chan string, want string) {
	c.t.Helper()
	for {
		select {
		case l, ok := <-lines:
			if !ok {
				c.t.Fatalf("the command ended before it said %q", want)
			}
			if strings.Contains(l, want) {
				return
			}
		case <-time.After(20 * time.Second):
			c.t.Fatalf("the command does not say %q", want)
		}
	}
}

func TestEtcdctl(t *testing.T) {
	s := startStore(t)
	cert, key := s.ca.issue(t, "admin", "system:masters")
	c := s.ctl(0, cert, key)

	// Who may.
	ncert, nkey := s.ca.issue(t, "system:node:n1", "system:nodes")
	s.ctl(0, ncert, nkey).refused("system:masters", "get", "a")
	other := newAuthority(t)
	ocert, okey := other.issue(t, "admin", "system:masters")
	s.ctl(0, ocert, okey).refused("", "get", "a", "--command-timeout=2s")

	// Keys.
	c.want(`^OK\n$`, "put", "a", "1")
	c.want(`^OK\na\n1\n$`, "put", "a", "2", "--prev-kv")
	c.want(`^a\n2\n$`, "get", "a")
	c.want(`^a\n1\n$`, "get", "a", "--rev=2")
	for i := range 5 {
		c.run("put", fmt.Sprint("dir/", i), fmt.Sprint(9-i))
	}
	c.want(`^dir/0\n\ndir/1\n\ndir/2\n\n$`, "get", "dir/", "--prefix", "--keys-only", "--limit=3")
	c.want(`"Count" : 5`, "get", "dir/", "--prefix", "--count-only", "--write-out=fields")
	c.want(`^dir/4\n5\ndir/3\n6\n$`, "get", "dir/", "--prefix", "--sort-by=VALUE", "--order=ASCEND", "--limit=2")
	c.want(`dir/3.*dir/4`, "get", "dir/3", "--from-key", "--consistency=s")
	c.want(`^2\ndir/0\n9\ndir/1\n8\n$`, "del", "dir/0", "dir/2", "--range", "--prev-kv")
	c.want(`^3\n$`, "del", "dir/", "--prefix")
	c.want(`^0\n$`, "del", "none")
	if out := c.in("value(\"a\") = \"2\"\n\nput b won\nget a\n\nput b lost\n\n", "txn", "-i"); !strings.Contains(out, "SUCCESS") || !strings.Contains(out, "a\n2") {
		t.Errorf("txn -i: %s", out)
	}
	if out := c.in("mod(\"a\") = \"77\"\n\nput b x\n\ndel b\n\n", "txn"); !strings.Contains(out, "FAILURE") {
		t.Errorf("txn: %s", out)
	}
	c.want(`^$`, "get", "b")
	c.refused("kept by shard pods", "put", "/registry/pods/ns/x", "1")
	pods := s.ctl(1, cert, key)
	pods.want(`^OK`, "put", "/registry/pods/ns/x", "1")
	pods.refused("kept by shard system", "put", "a", "1")
	pods.want(`is healthy.*is healthy.*is healthy`, "endpoint", "health")

	// Watches.
	lines, stop := c.background("watch", "w", "--prefix", "--prev-kv", "--progress-notify")
	c.run("put", "marker", "x")
	until(t, "the watch", 20*time.Second, func() error { // there is no sign that it has begun
		c.run("put", "w/1", "first")
		select {
		case <-lines:
			return nil
		case <-time.After(100 * time.Millisecond):
			return fmt.Errorf("silent")
		}
	})
	c.run("put", "w/2", "second")
	c.line(lines, "second")
	c.run("del", "w/2")
	c.line(lines, "DELETE")
	stop()
	lines, stop = c.background("watch", "a", "--rev=1")
	c.line(lines, "1")
	c.line(lines, "2")
	stop()

	// Leases.
	id := regexp.MustCompile(`lease (\w+) granted`).FindStringSubmatch(c.want(`granted with TTL\(60s\)`, "lease", "grant", "60"))[1]
	c.run("put", "l/1", "x", "--lease="+id)
	c.want(`granted with TTL\(60s\), remaining\(\d+s\), attached keys\(\[l/1\]\)`, "lease", "timetolive", id, "--keys")
	c.want(id, "lease", "list")
	c.want(`keepalived with TTL\(60\)`, "lease", "keep-alive", "--once", id)
	lines, stop = c.background("lease", "keep-alive", id)
	c.line(lines, "keepalived")
	stop()
	c.want(`revoked`, "lease", "revoke", id)
	c.want(`^$`, "get", "l/1")
	c.refused("requested lease not found", "lease", "revoke", id)
	c.want(`already expired`, "lease", "timetolive", id)

	// Concurrency: a lock that is held, and an election.
	lines, stop = c.background("lock", "mutex")
	c.line(lines, "mutex/")
	c.want(`^`, "get", "mutex", "--prefix")
	stop()
	c.want(`held`, "lock", "mutex", "echo", "held")
	lines, stop = c.background("elect", "race", "me")
	c.line(lines, "me")
	seen, end := c.background("elect", "-l", "race")
	c.line(seen, "me")
	end()
	stop()

	// Members and endpoints.
	c.want(`started, n1, .*started, n2, .*started, n3, `, "member", "list")
	var status []struct {
		Endpoint string
		Status   struct {
			Header struct {
				MemberID uint64 `json:"member_id"`
			} `json:"header"`
			Leader      uint64
			DBSizeInUse int64 `json:"dbSizeInUse"`
		}
	}
	// etcdctl asks all members of the list for all but this.
	must(t, json.Unmarshal([]byte(c.run("endpoint", "status", "-w", "json")), &status))
	if len(status) != 3 {
		t.Fatalf("status: %+v", status)
	}
	leader, heir := status[0].Status.Leader, uint64(0)
	for _, x := range status {
		if x.Status.Leader != leader || x.Status.DBSizeInUse == 0 {
			t.Errorf("%+v", x)
		}
		if x.Status.Header.MemberID != leader {
			heir = x.Status.Header.MemberID
		}
	}
	one := *c
	one.flags = append([]string{"--endpoints", fmt.Sprintf("https://127.0.0.1:%d", s.nodes[1].etcd)}, c.flags[2:]...)
	one.want(`127.0.0.1.*127.0.0.1.*127.0.0.1`, "endpoint", "status", "--cluster")
	one.want(`healthy.*healthy.*healthy`, "endpoint", "health", "--cluster")
	until(t, "the same hashes", 20*time.Second, func() error {
		hashes := map[string]bool{}
		for _, l := range strings.Split(strings.TrimSpace(one.run("endpoint", "hashkv", "--cluster")), "\n") {
			_, h, _ := strings.Cut(l, ", ")
			hashes[h] = true
		}
		if len(hashes) != 1 {
			return fmt.Errorf("%v", hashes)
		}
		return nil
	})
	c.want(fmt.Sprintf("Leadership transferred from %x to %x", leader, heir), "move-leader", fmt.Sprintf("%x", heir))
	c.want(`OK`, "put", "a", "3")
	c.refused("the cluster's leader chooses the members", "member", "add", "n4", "--peer-urls=https://127.0.0.1:1")
	c.refused("the cluster's leader chooses the members", "member", "remove", fmt.Sprintf("%x", heir))
	c.refused("the cluster's leader chooses the members", "member", "update", fmt.Sprintf("%x", heir), "--peer-urls=https://127.0.0.1:1")
	c.refused("the cluster's leader chooses the members", "member", "promote", fmt.Sprintf("%x", heir))
	c.want(`Authentication Status: false`, "auth", "status")
	c.refused("no users and roles", "auth", "enable")
	c.want(`^$`, "user", "list")
	c.refused("no users and roles", "user", "add", "x", "--no-password")
	c.refused("no users and roles", "role", "add", "x")
	c.refused("nothing to prepare", "downgrade", "enable", "3.5.0")

	// Space.
	c.want(`^$`, "alarm", "list")
	c.want(`^$`, "alarm", "disarm")
	c.want(`compacted revision 5`, "compaction", "5", "--physical")
	c.refused("required revision has been compacted", "get", "a", "--rev=2")
	c.want(`Finished defragmenting.*Finished.*Finished`, "defrag", "--cluster")

	// A snapshot, which etcd's own tool takes for one of its own.
	dir := t.TempDir()
	snap := filepath.Join(dir, "snap.db")
	one.want(`Snapshot saved`, "snapshot", "save", snap)
	utl := func(want string, args ...string) {
		t.Helper()
		b, err := exec.Command(tool(t, "etcdutl"), args...).CombinedOutput()
		if err != nil || !strings.Contains(string(b), want) {
			t.Errorf("etcdutl %q: %v, %s", args, err, b)
		}
	}
	utl("HASH", "snapshot", "status", snap, "-w", "table")
	utl("restored", "snapshot", "restore", snap, "--data-dir", filepath.Join(dir, "restored"))
	utl("", "hashkv", snap)
	b, err := os.ReadFile(snap)
	must(t, err)
	b[len(b)/2] ^= 1
	must(t, os.WriteFile(snap, b, 0o600))
	if out, err := exec.Command(tool(t, "etcdutl"), "snapshot", "restore", snap, "--data-dir", filepath.Join(dir, "damaged")).CombinedOutput(); err == nil {
		t.Errorf("a damaged snapshot is restored: %s", out)
	}

	// To another store, and loads.
	dest := startStore(t)
	dcert, dkey := dest.ca.issue(t, "admin", "system:masters")
	lines, stop = c.background("make-mirror", "--prefix=a", "--dest-cacert", dest.ca.path("ca.crt"), "--dest-cert", dcert, "--dest-key", dkey, fmt.Sprintf("127.0.0.1:%d", dest.nodes[0].etcd))
	d := dest.ctl(0, dcert, dkey)
	until(t, "the mirror", 20*time.Second, func() error {
		if out := d.run("get", "a"); out != "a\n3\n" {
			return fmt.Errorf("%q", out)
		}
		return nil
	})
	stop()
	// It reads the memory of the process from a port of etcd's that is not gRPC.
	c.refused("process_resident_memory_bytes", "check", "datascale", "--load=s")
}

// etcdctl's own measurement, a minute long: it writes 150 keys a second, judges throughput and latency, and deletes them.
func TestCheckPerf(t *testing.T) {
	if os.Getenv("SKEIN_LONG") == "" {
		t.Skip("make check-perf-store")
	}
	s := startStore(t)
	cert, key := s.ca.issue(t, "admin", "system:masters")
	t.Log(s.ctl(0, cert, key).want("PASS: Throughput", "check", "perf", "--load", "s", "--auto-compact", "--auto-defrag"))
}
