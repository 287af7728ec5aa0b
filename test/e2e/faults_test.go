package e2e

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skein.io/skein/node/client"
)

const (
	// healLimit is the most that traffic may suffer from the loss of a node: the design says 2-4 s; the rest is for a busy machine.
	healLimit = 7 * time.Second
	// writeLimit is the same for writes after the loss of the leader.
	writeLimit = 7 * time.Second
)

// powerOff kills a whole node.
func (w *world) powerOff(t testing.TB, node string) {
	t.Helper()
	must(t, w.node(node).Kill(background))
	w.hangUp(node)
}

// powerOn starts it again and waits until it is Ready in the eyes of another.
func (w *world) powerOn(t testing.TB, node, asks string) time.Duration {
	t.Helper()
	began := time.Now()
	must(t, w.node(node).Start(background, nil))
	eventually(t, 40*time.Second, node+" works", func() error { return w.healthy(node) })
	w.awaitReady(t, node, asks, 40*time.Second)
	return time.Since(began)
}

// healthy checks that every part of a node says that it is well, and that it sees all nodes that run.
func (w *world) healthy(node string) error {
	ctx, cancel := timeout(3 * time.Second)
	defer cancel()
	s, err := w.control(node).Status(ctx)
	if err != nil {
		return err
	}
	agent := false
	for _, p := range s.Parts {
		agent = agent || p.Name == "agent"
		if !p.Healthy {
			return fmt.Errorf("on %s the %s is not well: %s", node, p.Name, p.Message)
		}
	}
	if !agent {
		return fmt.Errorf("on %s the agent has not started", node)
	}
	ms, err := w.control(node).Members(ctx)
	if err != nil {
		return err
	}
	for _, n := range w.others() {
		if !slices.ContainsFunc(ms, func(m client.Member) bool { return m.Name == n && m.Status == "alive" }) {
			return fmt.Errorf("%s does not see %s alive: %+v", node, n, ms)
		}
	}
	return nil
}

// settled waits until all nodes are Ready, three voters are there and the web pods serve: how each scenario begins.
func (w *world) settled(t testing.TB, asks string) {
	t.Helper()
	for _, n := range w.others() {
		eventually(t, 40*time.Second, n+" works", func() error { return w.healthy(n) })
		w.awaitReady(t, n, asks, 40*time.Second)
	}
	eventually(t, 40*time.Second, "a leader and three voters", func() error {
		if _, err := w.leader(asks); err != nil {
			return err
		}
		v, err := w.voters(asks)
		if err == nil && len(v) != 3 {
			err = fmt.Errorf("voters are %v", v)
		}
		return err
	})
	if !w.deployed {
		w.apply(t, asks, webYAML)
		w.deployed = true
	}
	w.awaitPods(t, asks, "app=web", 6, 60*time.Second)
}

// writer makes one ConfigMap after the other through a node.
type writer struct {
	stop func()
	done sync.WaitGroup

	mu    sync.Mutex // guards the rest
	acked []string
	times []time.Time
	errs  []string
}

func (w *world) write(t testing.TB, through, prefix string) *writer {
	t.Helper()
	maps := w.on(through).CoreV1().ConfigMaps("default")
	return writeWith(t, prefix, func(ctx context.Context, m metav1.ObjectMeta) error {
		_, err := maps.Create(ctx, &corev1.ConfigMap{ObjectMeta: m}, metav1.CreateOptions{})
		return err
	})
}

// writeWith makes one object after the other.
func writeWith(t testing.TB, prefix string, create func(context.Context, metav1.ObjectMeta) error) *writer {
	ctx, cancel := context.WithCancel(background)
	wr := &writer{stop: cancel}
	t.Cleanup(cancel)
	wr.done.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			name := fmt.Sprintf("%s-%d", prefix, i)
			rctx, end := context.WithTimeout(ctx, 2*time.Second)
			err := create(rctx, metav1.ObjectMeta{Name: name, Labels: map[string]string{"load": prefix}})
			end()
			wr.mu.Lock()
			if err == nil {
				wr.acked, wr.times = append(wr.acked, name), append(wr.times, time.Now())
			} else if ctx.Err() == nil {
				wr.errs = append(wr.errs, err.Error())
			}
			wr.mu.Unlock()
			select {
			case <-ctx.Done():
			case <-time.After(10 * time.Millisecond):
			}
		}
	})
	return wr
}

// after is when the first write that was acknowledged later than a moment by enough to have been sent after it was.
func (wr *writer) after(since time.Time) (time.Duration, bool) {
	wr.mu.Lock()
	defer wr.mu.Unlock()
	for _, at := range wr.times {
		if at.After(since) {
			return at.Sub(since), true
		}
	}
	return 0, false
}

func (wr *writer) end() []string {
	wr.stop()
	wr.done.Wait()
	return wr.acked
}

// leaderKill kills the leader's daemon, then another leader's whole machine, under writes through two other nodes: one that has a replica
// and one that forwards.
func (w *world) leaderKill(t *testing.T) {
	for _, whole := range []bool{false, true} {
		name := "daemon"
		if whole {
			name = "machine"
		}
		t.Run(name, func(t *testing.T) {
			w.settled(t, "n1")
			leader := get(w.leader("n1"))(t)
			voters := get(w.voters("n1"))(t)
			var through string
			for _, v := range voters {
				if v != leader {
					through = v
				}
			}
			writers := map[string]*writer{through: w.write(t, through, name+"-"+through), "n4": w.write(t, "n4", name+"-n4")}
			for n, wr := range writers {
				eventually(t, 20*time.Second, "writes through "+n, func() error {
					wr.mu.Lock()
					defer wr.mu.Unlock()
					if len(wr.acked) < 100 {
						return fmt.Errorf("%d writes, errors %v", len(wr.acked), wr.errs)
					}
					return nil
				})
			}
			if whole {
				w.powerOff(t, leader)
			} else {
				must(t, w.node(leader).KillDaemon(background))
				w.hangUp(leader)
			}
			died := time.Now()
			// A write may have been committed by the old leader and acknowledged a moment later: the first that counts began after.
			eventually(t, writeLimit, "a new leader", func() error {
				l, err := w.leader(through)
				if err == nil && l == leader {
					err = fmt.Errorf("it is still %s", l)
				}
				return err
			})
			elected := time.Now()
			for n, wr := range writers {
				eventually(t, writeLimit, "a write through "+n+" after the election", func() error {
					if _, ok := wr.after(elected); !ok {
						return fmt.Errorf("errors %v", tailOf(wr))
					}
					return nil
				})
				took, _ := wr.after(elected)
				took += elected.Sub(died)
				t.Logf("first write through %s %s after the death of the leader %s", n, took, leader)
				if took > writeLimit {
					t.Errorf("that is too late")
				}
			}
			for n, wr := range writers {
				acked := wr.end()
				have := map[string]bool{}
				for _, asked := range []string{through, "n5"} {
					l := get(w.on(asked).CoreV1().ConfigMaps("default").List(background, metav1.ListOptions{LabelSelector: "load=" + name + "-" + n}))(t)
					for _, m := range l.Items {
						have[m.Name] = true
					}
					lost := 0
					for _, a := range acked {
						if !have[a] {
							lost++
						}
					}
					if lost > 0 {
						t.Errorf("%d of %d acknowledged writes through %s are lost, as %s sees it", lost, len(acked), n, asked)
					}
					clear(have)
				}
				t.Logf("%d acknowledged writes through %s are all there", len(acked), n)
			}
			t.Logf("%s is Ready again after %s", leader, w.powerOn(t, leader, through))
		})
	}
}

func tailOf(wr *writer) []string {
	wr.mu.Lock()
	defer wr.mu.Unlock()
	return wr.errs[max(0, len(wr.errs)-3):]
}

// probeAll sends requests from several nodes, and waits until each has been answered often.
func (w *world) probeAll(t testing.TB, url string, nodes ...string) map[string]*prober {
	t.Helper()
	out := map[string]*prober{}
	for _, n := range nodes {
		out[n] = w.probe(t, n, url, 20*time.Millisecond)
	}
	for n, p := range out {
		eventually(t, 20*time.Second, "requests from "+n, func() error {
			if all := p.all(); len(all) < 20 || len(failed(all)) > 0 {
				return fmt.Errorf("%d requests, failed: %v", len(all), failed(all))
			}
			return nil
		})
	}
	return out
}

// healAll waits until requests from all nodes have worked for two seconds, and gives the time from since to the last failure.
func healAll(t testing.TB, probers map[string]*prober, since time.Time, limit time.Duration) time.Duration {
	t.Helper()
	var worst time.Duration
	for n, p := range probers {
		eventually(t, limit+5*time.Second, "requests from "+n+" work", func() error {
			all := p.all()
			for _, s := range slices.Backward(all) {
				if s.Err != "" {
					return fmt.Errorf("%s after %s", s.Err, s.At.Sub(since))
				}
				if s.At.Before(since) {
					break
				}
				if time.Since(s.At) > 2*time.Second {
					return nil
				}
			}
			return fmt.Errorf("too few requests")
		})
		h := healed(p.all(), since)
		worst = max(worst, h)
		t.Logf("from %s: the last of %d failed requests ended after %s", n, len(failed(p.all())), h)
		if h > limit {
			t.Errorf("that is more than %s", limit)
		}
	}
	return worst
}

// nodeKill cuts the power of a node that does not lead.
func (w *world) nodeKill(t *testing.T) {
	leader := get(w.leader("n1"))(t)
	victim := "n2"
	if leader == victim {
		victim = "n3"
	}
	probers := w.probeAll(t, webURL, w.others(victim)...)
	w.powerOff(t, victim)
	died := time.Now()
	healAll(t, probers, died, healLimit)
	eventually(t, 20*time.Second, victim+" is NotReady", func() error { return w.nodeReady(victim, leader, false) })
	pods, _ := w.awaitPods(t, leader, "app=web", 6, 60*time.Second)
	t.Logf("6 pods Ready again %s after the kill", time.Since(died))
	for _, p := range pods {
		if p.Spec.NodeName == victim {
			t.Errorf("pod %s is still counted on the dead node", p.Name)
		}
	}
	t.Logf("%s is Ready again after %s", victim, w.powerOn(t, victim, leader))
	for n, p := range probers {
		for _, s := range failed(p.stop()) {
			if s.At.Sub(died) > healLimit {
				t.Errorf("request from %s failed %s after the kill: %s", n, s.At.Sub(died), s.Err)
				break
			}
		}
	}
	// What it ran before is elsewhere now, and must not run twice.
	eventually(t, 30*time.Second, "no web process on "+victim, func() error {
		if n := w.processes(t, victim, "app"); len(n) > 0 {
			return fmt.Errorf("processes %v", n)
		}
		return nil
	})
	w.settled(t, leader)
}

// noLeader stops the leader and another voter at once, so that nobody can decide anything: the endpoints on both leave the datapath of
// the survivors all the same, and return with the nodes.
func (w *world) noLeader(t *testing.T) {
	w.spread(t)
	leader := get(w.leader("n1"))(t)
	var other, third string
	for _, v := range get(w.voters("n1"))(t) {
		switch {
		case v == leader:
		case other == "":
			other = v
		default:
			third = v
		}
	}
	before, _ := w.awaitPods(t, "n1", "app=web", 6, time.Second)
	survivors := w.others(leader, other)
	probers := w.probeAll(t, webURL, survivors...)
	must(t, w.node(leader).Freeze())
	must(t, w.node(other).Freeze())
	died := time.Now()
	thaw := sync.OnceFunc(func() {
		must(t, w.node(leader).Thaw())
		must(t, w.node(other).Thaw())
	})
	defer thaw()
	healAll(t, probers, died, healLimit)
	for n, p := range probers {
		for _, s := range p.all() {
			if at := field(s.Body, "node"); time.Since(s.At) < time.Second && (at == leader || at == other) {
				t.Errorf("%s still asks %s", n, at)
			}
		}
	}
	ctx, cancel := timeout(2 * time.Second)
	defer cancel()
	if _, err := w.on(third).CoreV1().ConfigMaps("default").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "minority"}}, metav1.CreateOptions{}); err == nil {
		t.Error("a write worked without a majority: the test shows nothing")
	}
	thaw()
	back := time.Now()
	for n, p := range probers {
		eventually(t, 20*time.Second, "the endpoints of both return on "+n, func() error {
			seen := map[string]bool{}
			for _, s := range p.all() {
				if s.At.After(back) {
					seen[field(s.Body, "node")] = true
				}
			}
			if !seen[leader] || !seen[other] {
				return fmt.Errorf("only %v", seen)
			}
			return nil
		})
	}
	t.Logf("endpoints back after %s", time.Since(back))
	w.settled(t, third)
	same(t, before, get(w.podsReady(third, "app=web", 6))(t))
}

// spread makes sure that each node runs a web pod.
func (w *world) spread(t testing.TB) {
	t.Helper()
	on := map[string]bool{}
	for _, p := range get(w.podsReady("n1", "app=web", 6))(t) {
		on[p.Spec.NodeName] = true
	}
	if len(on) == 5 {
		return
	}
	w.do(t, "n1", "rollout", "restart", "deployment/web")
	w.do(t, "n1", "rollout", "status", "deployment/web", "--timeout=60s")
}

// same checks that the pods are the same, on the same nodes, and that no container was started anew.
func same(t testing.TB, before, after []corev1.Pod) {
	t.Helper()
	lives := func(ps []corev1.Pod) (out []string) {
		for _, p := range ps {
			id := ""
			for _, c := range p.Status.ContainerStatuses {
				id += fmt.Sprintf(" %s restarts=%d", c.ContainerID, c.RestartCount)
			}
			out = append(out, fmt.Sprintf("%s %s on %s%s", p.Name, p.UID, p.Spec.NodeName, id))
		}
		slices.Sort(out)
		return out
	}
	b, a := lives(before), lives(after)
	if !slices.Equal(a, b) {
		t.Errorf("pods changed from\n%s\nto\n%s", strings.Join(b, "\n"), strings.Join(a, "\n"))
	}
}

// partition cuts the leader off from all others for longer than it takes to notice and shorter than the eviction grace.
func (w *world) partition(t *testing.T) {
	old := get(w.leader("n1"))(t)
	rest := w.others(old)
	asks := rest[0]
	before := get(w.podsReady(asks, "app=web", 6))(t)
	probers := w.probeAll(t, webURL, rest...)
	must(t, w.lab.Partition(background, []string{old}, rest))
	defer func() { must(t, w.lab.Heal(background)) }()
	cut := time.Now()
	make := func(node, name string) error {
		ctx, cancel := timeout(2 * time.Second)
		defer cancel()
		_, err := w.on(node).CoreV1().ConfigMaps("default").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		return err
	}
	i := 0
	took := eventually(t, writeLimit, "the majority writes", func() error {
		i++
		return make(asks, fmt.Sprintf("majority-%d", i))
	})
	t.Logf("the majority writes again after %s", took)
	err := make(old, "minority")
	if err == nil {
		t.Errorf("the minority, %s, accepted a write", old)
	}
	t.Logf("the minority refuses: %v", err)
	healAll(t, probers, cut, healLimit)
	eventually(t, 10*time.Second, old+" is NotReady", func() error { return w.nodeReady(old, asks, false) })
	must(t, w.lab.Heal(background))
	t.Logf("healed after %s; %s is Ready after %s more", time.Since(cut), old, w.awaitReady(t, old, asks, 20*time.Second))
	for _, n := range []string{old, asks} {
		ctx, cancel := timeout(5 * time.Second)
		l := get(w.on(n).CoreV1().ConfigMaps("default").List(ctx, metav1.ListOptions{}))(t)
		cancel()
		names := map[string]bool{}
		for _, m := range l.Items {
			names[m.Name] = true
		}
		if !names[fmt.Sprintf("majority-%d", i)] || names["minority"] {
			t.Errorf("on %s: the majority's write there: %v, the minority's: %v", n, names[fmt.Sprintf("majority-%d", i)], names["minority"])
		}
	}
	w.settled(t, asks)
	same(t, before, get(w.podsReady(asks, "app=web", 6))(t))
}
