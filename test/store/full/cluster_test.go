package full

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

const (
	nodes = 3
	// ports of a node: Raft, admin, and one for every shard.
	ports = 6
)

// node is a process of the store whose directory is a small file system.
type node struct {
	t     *testing.T
	name  string
	bin   string
	args  []string
	disk  *disk
	admin string
	etcd  *clientv3.Client

	mu     sync.Mutex // guards all below
	cmd    *exec.Cmd
	ended  chan struct{} // closed when cmd has
	stderr *tail
}

// tail keeps the beginning of what a process says: a panic begins with its reason.
type tail struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (w *tail) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.b.Len() < 1<<20 {
		w.b.Write(p)
	}
	return len(p), nil
}

func (w *tail) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.String()
}

// start runs the process, which must not be running.
func (n *node) start() {
	n.t.Helper()
	cmd := n.disk.command(n.bin, n.args...)
	err := &tail{}
	cmd.Stderr = err
	if e := cmd.Start(); e != nil {
		n.t.Fatal(e)
	}
	ended := make(chan struct{})
	n.mu.Lock()
	n.cmd, n.ended, n.stderr = cmd, ended, err
	n.mu.Unlock()
	go func() { _ = cmd.Wait(); close(ended) }()
}

// dead tells whether the process has ended, and what it said.
func (n *node) dead() (bool, string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	select {
	case <-n.ended:
		return true, n.stderr.String()
	default:
		return false, ""
	}
}

func (n *node) kill() {
	n.mu.Lock()
	cmd, ended := n.cmd, n.ended
	n.mu.Unlock()
	if cmd != nil {
		_ = cmd.Process.Kill()
		<-ended
	}
}

// disk is a file system of a size of its own, in a mount namespace that ends with
// the test, however that ends.
type disk struct {
	t      *testing.T
	holder *exec.Cmd
	at     string
}

func newDisk(t *testing.T, mib int) *disk {
	t.Helper()
	d := &disk{t: t, at: t.TempDir()}
	d.holder = exec.Command("unshare", "--mount", "--propagation", "slave", "sh", "-c",
		fmt.Sprintf("mount -t tmpfs -o size=%dm tmpfs %s && echo ready && exec cat", mib, d.at))
	d.holder.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if _, err := d.holder.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := d.holder.StdoutPipe()
	if err == nil {
		err = d.holder.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.holder.Process.Kill(); _ = d.holder.Wait() })
	if b := make([]byte, 5); true {
		if _, err := io.ReadFull(out, b); err != nil || string(b) != "ready" {
			t.Fatalf("cannot mount a file system: %q, %v", b, err)
		}
	}
	return d
}

// command runs inside the namespace.
func (d *disk) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command("nsenter", append([]string{fmt.Sprintf("--mount=/proc/%d/ns/mnt", d.holder.Process.Pid), "--", name}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// path of a file of the disk as seen from here.
func (d *disk) path(name string) string {
	return filepath.Join(fmt.Sprintf("/proc/%d/root", d.holder.Process.Pid), d.at, name)
}

// occupy takes all but so many bytes of what is free.
func (d *disk) occupy(but int64) {
	d.t.Helper()
	f, err := os.OpenFile(d.path("somebody-else"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	var fs syscall.Statfs_t
	if err := syscall.Fstatfs(int(f.Fd()), &fs); err != nil {
		d.t.Fatal(err)
	}
	block := make([]byte, 64<<10)
	for left := int64(fs.Bavail)*fs.Bsize - but; left > 0; {
		k, err := f.Write(block[:min(left, int64(len(block)))])
		left -= int64(k)
		if errors.Is(err, syscall.ENOSPC) {
			return
		}
		if err != nil {
			d.t.Fatal(err)
		}
	}
}

func (d *disk) free() {
	if err := os.Remove(d.path("somebody-else")); err != nil && !errors.Is(err, os.ErrNotExist) {
		d.t.Error(err)
	}
}

func (d *disk) resize(mib int) {
	d.t.Helper()
	if out, err := d.command("mount", "-o", fmt.Sprintf("remount,size=%dm", mib), d.at).CombinedOutput(); err != nil {
		d.t.Fatalf("remount: %v: %s", err, out)
	}
}

// cluster is three nodes, all voters of all shards.
type cluster struct {
	t     *testing.T
	nodes []*node
}

var build = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "skein-full")
	if err != nil {
		return "", err
	}
	bin := filepath.Join(dir, "skein-store")
	cmd := exec.Command("go", "build", "-tags", "grpcnotrace", "-o", bin, "skein.io/skein/test/store/cmd/skein-store")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build: %w: %s", err, out)
	}
	return bin, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if bin, err := build(); err == nil {
		_ = os.RemoveAll(filepath.Dir(bin))
	}
	os.Exit(code)
}

func newCluster(t *testing.T, mib int, extra ...string) *cluster {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	bin, err := build()
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{t: t}
	base := freePorts(t, nodes*ports)
	at := func(node, port int) string { return fmt.Sprintf("127.0.0.1:%d", base+node*ports+port) }
	var peers, ids []string
	for i := range nodes {
		ids = append(ids, uuid.NewString())
		peers = append(peers, fmt.Sprintf("n%d=%s=%s", i, ids[i], at(i, 0)))
	}
	for i := range nodes {
		n := &node{t: t, name: fmt.Sprintf("n%d", i), bin: bin, disk: newDisk(t, mib), admin: at(i, 1)}
		n.args = append([]string{"--name", n.name, "--dir", filepath.Join(n.disk.at, "store"), "--listen", at(i, 0),
			"--peers", strings.Join(peers, ","), "--admin", n.admin, "--etcd", at(i, 2)}, extra...)
		if n.etcd, err = clientv3.New(clientv3.Config{Endpoints: []string{at(i, 2)}, Context: t.Context(), Logger: zap.NewNop()}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = n.etcd.Close(); n.kill() })
		c.nodes = append(c.nodes, n)
		n.start()
	}
	c.bootstrap(ids)
	return c
}

func (c *cluster) bootstrap(ids []string) {
	c.t.Helper()
	c.call(0, nil, "/bootstrap")
	var shards []struct{ Shard string }
	c.call(0, &shards, "/status")
	for _, s := range shards {
		for i := 1; i < nodes; i++ {
			var id uint64
			c.call(0, &id, "/member/add", "shard", s.Shard, "node", ids[i])
			c.call(i, nil, "/start-replica", "shard", s.Shard, "replica", fmt.Sprint(id))
			for p := (struct{ Ready bool }{}); !p.Ready; {
				c.call(0, &p, "/progress", "shard", s.Shard, "node", ids[i])
			}
			c.call(0, nil, "/member/promote", "shard", s.Shard, "replica", fmt.Sprint(id), "node", ids[i])
		}
	}
}

// call asks the admin endpoint of a node until it answers.
func (c *cluster) call(node int, out any, path string, args ...string) {
	c.t.Helper()
	q := url.Values{}
	for i := 0; i+1 < len(args); i += 2 {
		q.Set(args[i], args[i+1])
	}
	var last string
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		resp, err := http.Get("http://" + c.nodes[node].admin + path + "?" + q.Encode())
		if err != nil {
			last = err.Error()
			continue
		}
		b, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if last = string(b); err != nil || resp.StatusCode != http.StatusOK {
			continue
		}
		if out != nil {
			if err := json.Unmarshal(b, out); err != nil {
				c.t.Fatal(err)
			}
		}
		return
	}
	c.t.Fatalf("%s of %s: %s", path, c.nodes[node].name, last)
}

func freePorts(t *testing.T, n int) int {
	t.Helper()
	for range 100 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		base, all := l.Addr().(*net.TCPAddr).Port, []net.Listener{l}
		for i := 1; i < n && err == nil; i++ {
			if l, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", base+i)); err == nil {
				all = append(all, l)
			}
		}
		for _, l := range all {
			_ = l.Close()
		}
		if err == nil {
			return base
		}
	}
	t.Fatal("no free ports on 127.0.0.1")
	return 0
}

// revive starts what has ended, and checks that it had said why.
func (c *cluster) revive() (n int) {
	c.t.Helper()
	for _, x := range c.nodes {
		dead, said := x.dead()
		if !dead {
			continue
		}
		n++
		if !strings.Contains(said, "no space left on device") {
			c.t.Errorf("%s ended without saying that the disk is full: %.2000s", x.name, said)
		}
		x.start()
	}
	return n
}

// whole waits until all nodes answer with the same data, and returns it: key to
// value. A node that has ended meanwhile is started again.
func (c *cluster) whole() map[string]string {
	c.t.Helper()
	var last error
	for end := time.Now().Add(60 * time.Second); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		c.revive()
		var data []map[string]string
		var hashes []string
		if last = c.read(&data, &hashes); last != nil {
			continue
		}
		if hashes[0] == hashes[1] && hashes[0] == hashes[2] {
			return data[0]
		}
		last = fmt.Errorf("hashes %v", hashes)
	}
	c.describe()
	c.t.Fatalf("the nodes do not come to the same state: %v", last)
	return nil
}

func (c *cluster) read(data *[]map[string]string, hashes *[]string) error {
	ctx, cancel := context.WithTimeout(c.t.Context(), 10*time.Second)
	defer cancel()
	// A linearizable read first, through each: it has caught up then.
	var rev int64
	for _, n := range c.nodes {
		r, err := n.etcd.Get(ctx, "/", clientv3.WithPrefix())
		if err != nil {
			return fmt.Errorf("%s: %w", n.name, err)
		}
		m := map[string]string{}
		for _, kv := range r.Kvs {
			m[string(kv.Key)] = string(kv.Value)
		}
		*data, rev = append(*data, m), r.Header.Revision
	}
	for _, n := range c.nodes {
		h, err := n.etcd.HashKV(ctx, n.etcd.Endpoints()[0], rev)
		if err != nil {
			return fmt.Errorf("%s: %w", n.name, err)
		}
		*hashes = append(*hashes, fmt.Sprintf("%x of (%d, %d]", h.Hash, h.CompactRevision, h.HashRevision))
	}
	return nil
}

// describe says what the nodes are doing.
func (c *cluster) describe() {
	c.t.Helper()
	for _, n := range c.nodes {
		dead, said := n.dead()
		c.t.Logf("%s: ended %v, said: %.3000s", n.name, dead, said)
		client := http.Client{Timeout: 2 * time.Second}
		if resp, err := client.Get("http://" + n.admin + "/status"); err == nil {
			b, _ := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			c.t.Logf("%s: %s", n.name, b)
		}
		if dir := os.Getenv("SKEIN_KEEP"); dir != "" {
			if resp, err := client.Get("http://" + n.admin + "/pprof/goroutine?debug=2"); err == nil {
				b, _ := io.ReadAll(resp.Body)
				_ = resp.Body.Close()
				_ = os.WriteFile(filepath.Join(dir, n.name+".goroutines"), b, 0o600)
			}
			_ = exec.Command("cp", "-r", n.disk.path("store"), filepath.Join(dir, n.name+".store")).Run()
		}
	}
}
