package e2e

import (
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/connrotation"

	"skein.io/skein/test/cluster"
)

// TestClients runs the programs that people bring along on a cluster of three replicas and n4, which holds none, then takes replicas
// away under them.
func TestClients(t *testing.T) {
	w := &world{
		lab:   cluster.ForTest(t, 4, cluster.Config{}),
		conns: map[string]*connrotation.Dialer{}, kubes: map[string]*kubernetes.Clientset{},
	}
	defer func() {
		if t.Failed() {
			w.dump(t)
		}
	}()
	w.formClients(t)
	t.Run("at once", func(t *testing.T) {
		t.Run("kubectl", func(t *testing.T) { t.Parallel(); w.kubectl(t, "n4") })
		t.Run("helm", func(t *testing.T) { t.Parallel(); w.newSession(t, "n4", "helm", helmChart).run(t, helmChecks) })
	})
	t.Run("manager", w.manager)
	t.Run("informers", w.informers)
	t.Run("streams", w.streams)
	t.Run("cut off", w.cutOff)
}

// formClients makes the cluster, and an administrator's kubeconfig for each node.
func (w *world) formClients(t *testing.T) {
	w.start(t, "n1", "")
	eventually(t, 30*time.Second, "the first node prints its join line", func() error {
		var err error
		w.token, err = w.joinToken("n1")
		return err
	})
	w.fetchAdmin(t, "n1")
	w.start(t, "n2", "n1")
	w.start(t, "n3", "n1")
	w.start(t, "n4", "n1", "--voter=never")
	for _, n := range []string{"n1", "n2", "n3", "n4"} {
		w.awaitReady(t, n, "n1", 30*time.Second)
		conf := w.do(t, "n1", "kubeconfig", "--server", "https://"+w.node(n).IP().String()+":6443")
		must(t, os.WriteFile(w.kubeconfig(n), []byte(conf), 0o600))
		w.loadImages(t, n)
	}
	eventually(t, 30*time.Second, "three voters", func() error {
		v, err := w.voters("n1")
		if err == nil && !slices.Equal(v, []string{"n1", "n2", "n3"}) {
			err = fmt.Errorf("voters are %v", v)
		}
		return err
	})
}
