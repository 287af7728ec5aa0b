package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

const (
	nodes = 3
	// startTimeout bounds the start of a cluster, stopTimeout that of a process.
	startTimeout = 30 * time.Second
	stopTimeout  = 10 * time.Second
)

// cluster is three processes of one kind.
type cluster struct {
	name   string
	dir    string
	procs  []*exec.Cmd
	admin  []string   // of Skein: host:port of each process
	etcd   [][]string // by shard: host:port of each process
	shards []string
}

// freePorts returns the first of n ports of the loopback that follow each other and
// are free. They lie below those that the kernel gives to outgoing connections, which
// would take them before the processes do.
func freePorts(n int) (int, error) {
	const low, high = 12000, 31000
	for range 100 {
		base := low + rand.IntN(high-low-n)
		var all []net.Listener
		var err error
		for i := 0; i < n && err == nil; i++ {
			var l net.Listener
			if l, err = net.Listen("tcp", loopback(base+i)); err == nil {
				all = append(all, l)
			}
		}
		for _, l := range all {
			_ = l.Close()
		}
		if err == nil {
			return base, nil
		}
	}
	return 0, errors.New("no free ports on 127.0.0.1")
}

func loopback(port int) string { return fmt.Sprintf("127.0.0.1:%d", port) }

func (c *cluster) run(i int, bin string, args ...string) error {
	log, err := os.Create(filepath.Join(c.dir, fmt.Sprintf("n%d.log", i)))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(bin, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // nothing outlives the benchmark
	if err := cmd.Start(); err != nil {
		return err
	}
	c.procs = append(c.procs, cmd)
	return nil
}

func (c *cluster) pids() (out []int) {
	for _, p := range c.procs {
		out = append(out, p.Process.Pid)
	}
	return out
}

func (c *cluster) stop() {
	for _, p := range c.procs {
		_ = p.Process.Signal(syscall.SIGTERM)
	}
	for _, p := range c.procs {
		kill := time.AfterFunc(stopTimeout, func() { _ = p.Process.Kill() })
		_ = p.Wait() // how it ended does not matter any more
		kill.Stop()
	}
}

// startEtcd runs etcd as released, with its defaults, over plain sockets.
func startEtcd(ctx context.Context, bin, dir string) (*cluster, error) {
	c := &cluster{name: "etcd", dir: filepath.Join(dir, "etcd"), shards: []string{"etcd"}, etcd: [][]string{nil}}
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return nil, err
	}
	base, err := freePorts(2 * nodes)
	if err != nil {
		return nil, err
	}
	var initial []string
	for i := range nodes {
		initial = append(initial, fmt.Sprintf("n%d=http://%s", i, loopback(base+2*i+1)))
	}
	for i := range nodes {
		client, peer := loopback(base+2*i), loopback(base+2*i+1)
		err := c.run(i, bin, "--name", fmt.Sprintf("n%d", i), "--data-dir", filepath.Join(c.dir, fmt.Sprintf("n%d", i)), "--log-level", "error",
			"--listen-client-urls", "http://"+client, "--advertise-client-urls", "http://"+client,
			"--listen-peer-urls", "http://"+peer, "--initial-advertise-peer-urls", "http://"+peer,
			"--initial-cluster", strings.Join(initial, ","))
		if err != nil {
			return c, err
		}
		c.etcd[0] = append(c.etcd[0], client)
	}
	return c, c.ready(ctx)
}

// startSkein runs hosts of the store, makes all of them voters of every shard and
// spreads the leaders.
func startSkein(ctx context.Context, name, bin, dir string, extra []string) (*cluster, error) {
	c := &cluster{name: name, dir: filepath.Join(dir, name)}
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return nil, err
	}
	const ports = 10 // a node: raft, admin, and one for every shard
	base, err := freePorts(ports * nodes)
	if err != nil {
		return nil, err
	}
	var peers, ids []string
	for i := range nodes {
		ids = append(ids, uuid.NewString())
		peers = append(peers, fmt.Sprintf("n%d=%s=%s", i, ids[i], loopback(base+ports*i)))
	}
	for i := range nodes {
		p := base + ports*i
		args := append([]string{"--name", fmt.Sprintf("n%d", i), "--dir", filepath.Join(c.dir, fmt.Sprintf("n%d", i)), "--listen", loopback(p),
			"--peers", strings.Join(peers, ","), "--admin", loopback(p + 1), "--etcd", loopback(p + 2)}, extra...)
		if err := c.run(i, bin, args...); err != nil {
			return c, err
		}
		c.admin = append(c.admin, loopback(p+1))
	}
	if err := c.bootstrap(ctx, ids); err != nil {
		return c, err
	}
	for s := range c.shards {
		var eps []string
		for i := range nodes {
			eps = append(eps, loopback(base+ports*i+2+s))
		}
		c.etcd = append(c.etcd, eps)
	}
	return c, c.ready(ctx)
}

// call asks the admin endpoint of a node, until it answers without error.
func (c *cluster) call(ctx context.Context, node int, out any, path string, args ...string) error {
	q := url.Values{}
	for i := 0; i+1 < len(args); i += 2 {
		q.Set(args[i], args[i+1])
	}
	var last error
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+c.admin[node]+path+"?"+q.Encode(), nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err == nil {
			var b []byte
			b, err = io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			if err == nil && resp.StatusCode != http.StatusOK {
				err = fmt.Errorf("%s: %s", resp.Status, strings.TrimSpace(string(b)))
			}
			if err == nil && out != nil {
				err = json.Unmarshal(b, out)
			}
			if err == nil {
				return nil
			}
		}
		if ctx.Err() == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s of n%d: %w", path, node, errors.Join(ctx.Err(), last))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

type progress struct{ Ready bool }

type shardStatus struct {
	Shard   string
	Replica uint64
	Leader  struct{ Replica uint64 }
}

func (c *cluster) bootstrap(ctx context.Context, ids []string) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := c.call(ctx, 0, nil, "/bootstrap"); err != nil {
		return err
	}
	var status []shardStatus
	if err := c.call(ctx, 0, &status, "/status"); err != nil {
		return err
	}
	for n, s := range status {
		c.shards = append(c.shards, s.Shard)
		var replicas = []uint64{s.Replica}
		for i := 1; i < nodes; i++ {
			var id uint64
			if err := c.call(ctx, 0, &id, "/member/add", "shard", s.Shard, "node", ids[i]); err != nil {
				return err
			}
			r := fmt.Sprint(id)
			if err := c.call(ctx, i, nil, "/start-replica", "shard", s.Shard, "replica", r); err != nil {
				return err
			}
			for p := (progress{}); !p.Ready; {
				if err := c.call(ctx, 0, &p, "/progress", "shard", s.Shard, "node", ids[i]); err != nil {
					return err
				}
			}
			if err := c.call(ctx, 0, nil, "/member/promote", "shard", s.Shard, "replica", r, "node", ids[i]); err != nil {
				return err
			}
			replicas = append(replicas, id)
		}
		if n%nodes == 0 {
			continue
		}
		if err := c.call(ctx, 0, nil, "/transfer", "shard", s.Shard, "to", fmt.Sprint(replicas[n%nodes])); err != nil {
			return err
		}
	}
	return nil
}

// ready waits until every endpoint has answered a linearizable read.
func (c *cluster) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for shard, eps := range c.etcd {
		for _, ep := range eps {
			conn, err := dial(ep)
			if err != nil {
				return err
			}
			for err = errors.New("not asked yet"); err != nil; {
				if _, err = pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte(prefixes[shard%len(prefixes)])}); err != nil && ctx.Err() != nil {
					return errors.Join(fmt.Errorf("%s at %s does not answer: %w", c.name, ep, err), conn.Close())
				}
			}
			if err := conn.Close(); err != nil {
				return err
			}
		}
	}
	return nil
}
