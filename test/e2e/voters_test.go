package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/connrotation"

	"skein.io/skein/consensus/members"
	"skein.io/skein/node/client"
	"skein.io/skein/test/cluster"
)

// TestVoters has a cluster of five nodes in three zones look after its own voters, under writes: a dead one, a label, nodes that change
// their addresses one after the other, a leader that leaves.
func TestVoters(t *testing.T) {
	w := &world{lab: cluster.ForTest(t, 5, cluster.Config{}), conns: map[string]*connrotation.Dialer{}, kubes: map[string]*kubernetes.Clientset{}}
	defer func() {
		if t.Failed() {
			w.dump(t)
		}
	}()
	flags := func(zone string) []string { return []string{"--zone", zone, "--voter-replace-after", "6s"} }
	w.start(t, "n1", "", flags("z1")...)
	eventually(t, 30*time.Second, "the first node prints its join line", func() (err error) {
		w.token, err = w.joinToken("n1")
		return err
	})
	w.fetchAdmin(t, "n1")
	for i, zone := range []string{"z2", "z3", "z1", "z2"} {
		w.start(t, fmt.Sprintf("n%d", i+2), "n1", flags(zone)...)
	}
	t.Logf("a voter in each zone after %s", w.awaitVoters(t, "n2", "n1,n2,n3", "n4,n5"))
	if why := w.why(t, "n5", "n4"); !strings.Contains(why, "zone z1 has 1 of the 3 voters") {
		t.Errorf("n4: %q", why)
	}
	wr := w.write(t, "n2", "voters")

	// The leader dies, and is back later.
	must(t, w.node("n1").Kill(background))
	w.hangUp("n1")
	t.Logf("the dead voter was replaced after %s", w.awaitVoters(t, "n2", "n2,n3,n4", "n5"))
	must(t, w.node("n1").Start(background, nil))
	t.Logf("it is a spare %s after its return", w.awaitVoters(t, "n2", "n2,n3,n4", "n1,n5"))

	// A label that a user sets counts at once.
	w.label(t, "n3", "never")
	took := w.awaitVoters(t, "n2", "n1,n2,n4", "n5", "n2,n4,n5", "n1")
	t.Logf("without n3 after %s", took)
	w.label(t, "n3", "")
	t.Logf("z3 has its voter %s after the label has gone", w.awaitVoters(t, "n2", "n2,n3,n4", "n1,n5", "n3,n4,n5", "n1,n2", "n1,n2,n3", "n4,n5", "n1,n3,n5", "n2,n4"))

	// Voters change their addresses, one after the other. The writes go through a node that does not.
	voters := get(w.voters("n2"))(t)
	for _, v := range voters {
		if v == "n2" {
			continue
		}
		began := time.Now()
		w.move(t, v)
		eventually(t, 40*time.Second, v+" holds its replicas at its new address", func() error { return w.whole(v, "n2") })
		t.Logf("%s works at its new address after %s", v, time.Since(began))
	}

	// A leader leaves.
	leader := get(w.leader("n2"))(t)
	if leader == "n2" {
		leader = "n3"
	}
	began := time.Now()
	w.do(t, leader, "leave")
	t.Logf("%s left within %s", leader, time.Since(began))
	eventually(t, 40*time.Second, "three voters without it", func() error {
		for _, s := range w.shards("n2") {
			if len(s.Voters) != 3 || slices.Contains(s.Voters, leader) || slices.Contains(s.Spares, leader) {
				return fmt.Errorf("%+v", s)
			}
		}
		return nil
	})
	acked := wr.end()
	ctx, cancel := timeout(20 * time.Second)
	defer cancel()
	have := map[string]bool{}
	for _, m := range get(w.on("n2").CoreV1().ConfigMaps("default").List(ctx, metav1.ListOptions{LabelSelector: "load=voters"}))(t).Items {
		have[m.Name] = true
	}
	for _, name := range acked {
		if !have[name] {
			t.Errorf("the acknowledged write of %s is lost", name)
		}
	}
	t.Logf("%d acknowledged writes, %d that failed", len(acked), len(wr.errs))
}

func (w *world) shards(node string) []client.Shard {
	ctx, cancel := timeout(3 * time.Second)
	defer cancel()
	s, err := w.control(node).Status(ctx)
	if err != nil {
		return nil
	}
	return s.Shards
}

// awaitVoters waits until all shards have these voters and spares, or one of several pairs of them.
func (w *world) awaitVoters(t *testing.T, asks string, want ...string) time.Duration {
	t.Helper()
	return eventually(t, 60*time.Second, fmt.Sprintf("voters and spares %q", want), func() error {
		shards := w.shards(asks)
		if len(shards) != 3 {
			return fmt.Errorf("node %s tells of %d shards", asks, len(shards))
		}
		for _, s := range shards {
			ok := false
			for i := 0; i < len(want); i += 2 {
				ok = ok || strings.Join(s.Voters, ",") == want[i] && strings.Join(s.Spares, ",") == want[i+1]
			}
			if !ok {
				return fmt.Errorf("%+v", s)
			}
		}
		return nil
	})
}

// why is what the leader says of a node, asked anywhere.
func (w *world) why(t *testing.T, asks, node string) (why string) {
	t.Helper()
	eventually(t, 10*time.Second, "a word on "+node, func() error {
		ctx, cancel := timeout(3 * time.Second)
		defer cancel()
		s, err := w.control(asks).Status(ctx)
		if err != nil {
			return err
		}
		if s.Placement == nil {
			return fmt.Errorf("none: %s", s.PlacementError)
		}
		for _, n := range s.Placement.Nodes {
			if n.Node == node {
				why = n.Why
				return nil
			}
		}
		return fmt.Errorf("none in %+v", s.Placement)
	})
	return why
}

// label sets a node's label, or removes it, as kubectl does.
func (w *world) label(t *testing.T, node, value string) {
	t.Helper()
	v := "null"
	if value != "" {
		v = fmt.Sprintf("%q", value)
	}
	ctx, cancel := timeout(10 * time.Second)
	defer cancel()
	_, err := w.on("n2").CoreV1().Nodes().Patch(ctx, node, types.StrategicMergePatchType,
		fmt.Appendf(nil, `{"metadata":{"labels":{%q:%s}}}`, members.Label, v), metav1.PatchOptions{})
	must(t, err)
}

// move restarts a node's daemon with another address.
func (w *world) move(t *testing.T, node string) {
	t.Helper()
	must(t, w.node(node).KillDaemon(background))
	w.hangUp(node)
	was := w.node(node).IP()
	b := was.As4()
	b[3] += 100
	to := netip.AddrFrom4(b)
	ctx, cancel := timeout(10 * time.Second)
	defer cancel()
	route := strings.TrimSpace(get(w.node(node).Exec(ctx, "ip", "route", "show", "default"))(t))
	// The first address goes first: the kernel removes those of its network with it.
	script := fmt.Sprintf("set -e; ip addr del %s/24 dev eth0; ip addr add %s/24 dev eth0", was, to)
	if route != "" {
		script += "; ip route replace " + route
	}
	get(w.node(node).Exec(ctx, "sh", "-c", script))(t)
	must(t, w.node(node).Start(background, nil, skein(), "up", "--address", to.String(), "--voter-replace-after", "6s"))
}

// whole checks that a node holds caught-up replicas of all shards, and that another one says so too.
func (w *world) whole(node, asks string) error {
	shards := w.shards(node)
	if len(shards) != 3 {
		return fmt.Errorf("node %s tells of %d shards", node, len(shards))
	}
	if err := w.healthy(node); err != nil {
		return err
	}
	for _, s := range append(shards, w.shards(asks)...) {
		if s.Leader == "" || len(s.Voters) != 3 || (!slices.Contains(s.Voters, node) && !slices.Contains(s.Spares, node)) {
			return fmt.Errorf("%+v", s)
		}
	}
	return nil
}
