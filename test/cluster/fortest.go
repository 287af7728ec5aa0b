package cluster

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"
)

// ForTest makes a laboratory with nodes n1, n2, ... for a test, and removes it with the test; when the test failed, it shows the end
// of each node's log first. With two segments the nodes take turns.
func ForTest(t testing.TB, nodes int, cfg Config) *Cluster {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("namespaces and cgroups need root")
	}
	ctx := context.Background() // outlives the test's own
	if err := Sweep(ctx); err != nil {
		t.Fatal(err)
	}
	c, err := New(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, n := range c.Nodes() {
				t.Logf("end of the log of %s:\n%s", n.Name(), tail(n.LogFile(), 8<<10))
			}
		}
		cctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		if err := c.Close(cctx); err != nil {
			t.Error(err)
		}
	})
	for i := range nodes {
		if _, err := c.AddNode(ctx, fmt.Sprintf("n%d", i+1), i%max(1, cfg.Segments)+1); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

func tail(path string, most int) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-most):])
}
