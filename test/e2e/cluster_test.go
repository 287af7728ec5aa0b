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
	defer func() {
		if t.Failed() {
			w.dump(t)
		}
	}()
	w.form(t)
	for _, s := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"bad input", w.badInput},
		{"deploy", w.deploy},
		{"rollout", w.rollout},
		{"verbs", w.verbs},
		{"pods", w.pods},
		{"workloads", w.workloads},
		{"volumes", w.volumes},
		{"autoscale", w.autoscale},
		{"why", w.whyThere},
		{"crash", w.crash},
		{"sealed", w.sealed},
		{"shard leaders", w.shardLeaders},
		{"leader kill", w.leaderKill},
		{"failover", w.failover},
		{"node kill", w.nodeKill},
		{"no leader", w.noLeader},
		{"partition", w.partition},
		{"reboot", w.reboot},
		{"leave", w.leave},
	} {
		if !w.step(t, s.name, s.run) {
			return // the others would begin with what it left
		}
	}
}

// step runs one scenario, which begins with a settled cluster and must leave one.
func (w *world) step(t *testing.T, name string, run func(*testing.T)) bool {
	return t.Run(name, func(t *testing.T) {
		w.settled(t, "n1")
		run(t)
		w.settled(t, "n1")
	})
}

var background = context.Background()
