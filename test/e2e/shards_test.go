package e2e

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

	"skein.io/skein/node/client"
)

// shardsOf is what a node says of all shards, by name.
func (w *world) shardsOf(node string) (map[string]client.Shard, error) {
	ctx, cancel := timeout(3 * time.Second)
	defer cancel()
	s, err := w.control(node).Status(ctx)
	if err != nil {
		return nil, err
	}
	out := map[string]client.Shard{}
	for _, x := range s.Shards {
		out[x.Name] = x
	}
	return out, nil
}

// seen collects the names of what a watch reports as new.
type seen struct {
	mu    sync.Mutex // guards names
	names []string
}

func (s *seen) follow(wi watch.Interface, meta func(watch.Event) *metav1.ObjectMeta) (ended <-chan string) {
	end := make(chan string, 1)
	go func() {
		for e := range wi.ResultChan() {
			m := meta(e)
			if e.Type == watch.Error || m == nil {
				end <- fmt.Sprintf("%s: %v", e.Type, e.Object)
				return
			}
			if e.Type == watch.Added {
				s.mu.Lock()
				s.names = append(s.names, m.Name)
				s.mu.Unlock()
			}
		}
		end <- "the stream ended"
	}()
	return end
}

// has checks that every acknowledged name was reported once, in order; names in between that were not acknowledged may be there.
func (s *seen) has(acked []string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, once := 0, map[string]bool{}
	for _, n := range s.names {
		if once[n] {
			return fmt.Errorf("%s was reported twice", n)
		}
		once[n] = true
		if i < len(acked) && acked[i] == n {
			i++
		}
	}
	if i < len(acked) {
		return fmt.Errorf("%s was not reported in its turn (%d of %d were)", acked[i], i, len(acked))
	}
	return nil
}

// shardLeaders checks that every shard has its voters and that another node leads pods than the cluster; then kills the leader of pods under
// writes and watches of pods and of ConfigMaps, through a node that stays.
func (w *world) shardLeaders(t *testing.T) {
	var at map[string]client.Shard
	took := eventually(t, time.Minute, "three voters in each shard, and leaders on several nodes", func() error {
		var err error
		if at, err = w.shardsOf("n1"); err != nil {
			return err
		}
		for _, name := range []string{"system", "pods", "events"} {
			if s := at[name]; !slices.Equal(s.Voters, []string{"n1", "n2", "n3"}) || s.Leader == "" || !s.Ready {
				return fmt.Errorf("%+v", s)
			}
		}
		if at["pods"].Leader == at["system"].Leader {
			return fmt.Errorf("%s leads system and pods", at["pods"].Leader)
		}
		return nil
	})
	victim, leader := at["pods"].Leader, at["system"].Leader
	t.Logf("after %s %s leads system, %s pods, %s events", took, leader, victim, at["events"].Leader)
	eventually(t, 10*time.Second, "n4, which holds no replica, to know who leads pods", func() error { // it hears of it by gossip
		s, err := w.shardsOf("n4")
		if err == nil && (s["pods"].Leader != victim || s["pods"].Role != "none") {
			err = fmt.Errorf("it says %+v", s["pods"])
		}
		return err
	})

	ctx, cancel := context.WithCancel(background)
	defer cancel()
	core := w.on(leader).CoreV1()
	pods, maps := &seen{}, &seen{}
	load := func(prefix string) metav1.ListOptions { return metav1.ListOptions{LabelSelector: "load=" + prefix} }
	podsEnd := pods.follow(get(core.Pods("default").Watch(ctx, load("shard-pod")))(t), func(e watch.Event) *metav1.ObjectMeta {
		if p, ok := e.Object.(*corev1.Pod); ok {
			return &p.ObjectMeta
		}
		return nil
	})
	mapsEnd := maps.follow(get(core.ConfigMaps("default").Watch(ctx, load("shard-map")))(t), func(e watch.Event) *metav1.ObjectMeta {
		if m, ok := e.Object.(*corev1.ConfigMap); ok {
			return &m.ObjectMeta
		}
		return nil
	})
	defer func() {
		must(t, core.Pods("default").DeleteCollection(background, metav1.DeleteOptions{GracePeriodSeconds: new(int64)}, load("shard-pod")))
	}()
	podWrites := writeWith(t, "shard-pod", func(ctx context.Context, m metav1.ObjectMeta) error {
		_, err := core.Pods("default").Create(ctx, &corev1.Pod{ObjectMeta: m, Spec: corev1.PodSpec{
			NodeSelector: map[string]string{"no": "node"}, Containers: []corev1.Container{{Name: "c", Image: "none"}}}}, metav1.CreateOptions{})
		return err
	})
	mapWrites := w.write(t, leader, "shard-map")
	for _, wr := range []*writer{podWrites, mapWrites} {
		eventually(t, 20*time.Second, "writes", func() error {
			wr.mu.Lock()
			defer wr.mu.Unlock()
			if len(wr.acked) < 30 {
				return fmt.Errorf("%d writes, errors %v", len(wr.acked), wr.errs)
			}
			return nil
		})
	}
	must(t, w.node(victim).KillDaemon(background))
	w.hangUp(victim)
	died := time.Now()
	eventually(t, writeLimit, "a new leader of pods", func() error {
		s, err := w.shardsOf(leader)
		if err == nil && (s["pods"].Leader == "" || s["pods"].Leader == victim) {
			err = fmt.Errorf("it is %q", s["pods"].Leader)
		}
		return err
	})
	elected := time.Now()
	eventually(t, writeLimit, "a pod after the election", func() error {
		if _, ok := podWrites.after(elected); !ok {
			return fmt.Errorf("errors %v", tailOf(podWrites))
		}
		return nil
	})
	first, _ := podWrites.after(elected)
	t.Logf("a pod is written %s after the death of %s", first+elected.Sub(died), victim)
	if now := get(w.leader(leader))(t); now != leader {
		t.Errorf("the cluster is led by %s now, although %s did not die", now, leader)
	}
	ackedPods, ackedMaps := podWrites.end(), mapWrites.end()
	have := map[string]bool{}
	for _, p := range get(core.Pods("default").List(background, load("shard-pod")))(t).Items {
		have[p.Name] = true
	}
	for _, a := range ackedPods {
		if !have[a] {
			t.Errorf("pod %s was acknowledged and is lost", a)
		}
	}
	for what, s := range map[string]struct {
		*seen
		acked []string
		ended <-chan string
	}{"pods": {pods, ackedPods, podsEnd}, "ConfigMaps": {maps, ackedMaps, mapsEnd}} {
		eventually(t, 10*time.Second, "the watch of "+what+" to have reported all", func() error {
			select {
			case why := <-s.ended:
				t.Fatalf("the watch of %s: %s", what, why)
			default:
			}
			return s.has(s.acked)
		})
		t.Logf("%d acknowledged %s are there, and were each reported once and in order", len(s.acked), what)
	}
	cancel()
	t.Logf("%s is Ready again after %s", victim, w.powerOn(t, victim, leader))
}
