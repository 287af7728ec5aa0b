package e2e

import (
	"context"
	"testing"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/connrotation"

	"skein.io/skein/test/cluster"
)

// TestCluster runs all scenarios on one cluster, in this order: each finds it healthy and leaves it so. The first forms it.
func TestCluster(t *testing.T) {
	w := &world{
		lab:   cluster.ForTest(t, 5, cluster.Config{}),
		conns: map[string]*connrotation.Dialer{}, kubes: map[string]*kubernetes.Clientset{},
	}
	if !w.step(t, "form", w.form) {
		return
	}
	for _, s := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"bad input", w.badInput},
		{"deploy", w.deploy},
	} {
		w.step(t, s.name, s.run)
	}
}

// step runs one scenario and, if it failed, shows the cluster as it was then.
func (w *world) step(t *testing.T, name string, run func(*testing.T)) bool {
	return t.Run(name, func(t *testing.T) {
		t.Cleanup(func() {
			if t.Failed() {
				w.dump(t)
			}
		})
		run(t)
	})
}

var background = context.Background()
