// Package e2e drives clusters of the real executables through what their users and their machines do to them. Each node is a
// machine in namespaces (package test/cluster); nothing of Skein runs in the test's own process.
//
// The executables are those in bin/ (`make build`), or in the directory that $SKEIN_BIN names. The tests share one cluster and
// its history, so they run in the order of TestCluster's table; -run TestCluster/NAME runs one of them on a cluster that was only formed.
package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"skein.io/skein/test/cluster"
	"skein.io/skein/test/images/bundle"
)

// roleEnv makes the test's executable a client or server inside a node instead.
const roleEnv = "SKEIN_E2E_ROLE"

// bin is where the executables are; archives are the images that every node gets.
var (
	bin      string
	archives bundle.Paths
)

func TestMain(m *testing.M) {
	if role := os.Getenv(roleEnv); role != "" {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
		defer stop()
		roles[role](ctx, os.Args[1:])
		return
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	if os.Geteuid() != 0 {
		fmt.Println("SKIP: nodes need root")
		return 0
	}
	bin = os.Getenv("SKEIN_BIN")
	if bin == "" {
		bin = "../../bin"
	}
	var err error
	if bin, err = filepath.Abs(bin); err != nil {
		return fail(err)
	}
	for _, name := range []string{"skein", "skein-helper"} {
		if _, err := os.Stat(filepath.Join(bin, name)); err != nil {
			return fail(fmt.Errorf("%w: run `make build` first, or set SKEIN_BIN", err))
		}
	}
	ctx := context.Background()
	if err := cluster.Sweep(ctx); err != nil {
		return fail(err)
	}
	dir, err := os.MkdirTemp("", "skein-e2e-")
	if err != nil {
		return fail(err)
	}
	defer os.RemoveAll(dir)
	if archives, err = bundle.Build(ctx, bundle.Config{Out: dir}); err != nil {
		return fail(err)
	}
	return m.Run()
}

// roles are what the test's executable does inside a node.
var roles = map[string]func(context.Context, []string){
	"probe":  probeRole,
	"listen": listenRole,
	"hold":   holdRole,
}

// shot is one request of a prober.
type shot struct {
	At   time.Time     `json:"at"` // when it began
	Took time.Duration `json:"took"`
	Err  string        `json:"err,omitempty"`
	Body string        `json:"body,omitempty"`
}

// probeRole fetches URL over a new connection each time, every INTERVAL, until told to end; at most TIMEOUT for each.
func probeRole(ctx context.Context, args []string) {
	interval, err1 := time.ParseDuration(args[1])
	timeout, err2 := time.ParseDuration(args[2])
	if err1 != nil || err2 != nil {
		fmt.Fprintln(os.Stderr, err1, err2)
		os.Exit(2)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: timeout}
	out := json.NewEncoder(os.Stdout)
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		s := shot{At: time.Now()}
		s.Body, s.Err = fetch(client, args[0])
		s.Took = time.Since(s.At)
		if ctx.Err() != nil || out.Encode(s) != nil {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func fetch(c *http.Client, url string) (body, failure string) {
	res, err := c.Get(url)
	if err != nil {
		return "", err.Error()
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return "", err.Error()
	}
	if res.StatusCode != http.StatusOK {
		return string(b), res.Status
	}
	return string(b), ""
}

// listenRole takes a port until told to end.
func listenRole(ctx context.Context, args []string) {
	l, err := net.Listen("tcp", args[0])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	defer l.Close()
	fmt.Println("listening")
	<-ctx.Done()
}

// holdRole keeps one connection open and sends a line over it every 50 ms; it prints the answers, and ends when one fails to come.
func holdRole(ctx context.Context, args []string) {
	c, err := net.DialTimeout("tcp", args[0], 5*time.Second)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	defer c.Close()
	buf := make([]byte, 4096)
	for i := 0; ctx.Err() == nil; i++ {
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := fmt.Fprintf(c, "%d\n", i); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		n, err := c.Read(buf)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		if _, err := os.Stdout.Write(buf[:n]); err != nil {
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
}
