package api

import (
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
)

// A binding made without a request is what one made by a request is: the same effect, the same admission (which gives the pod the zone of
// its node), the same refusals.
func TestBinderIsTheAPI(t *testing.T) {
	ctx := t.Context()
	client := admin(t)
	namespace := namespace(t, client)
	decorated := atomic.Int64{}
	binder, err := cluster.servers[0].Binder("test", func(ctx context.Context) context.Context { decorated.Add(1); return ctx })
	if err != nil {
		t.Fatal(err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	makeNode(t, client, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "bind-node", Labels: map[string]string{corev1.LabelTopologyZone: "z1"}}})
	var all []*corev1.Binding
	var version string // of the pod that was added last
	add := func(name string, edit func(*corev1.Pod), change func(*corev1.Binding)) {
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: namespace}, Spec: corev1.PodSpec{
			SchedulerName: "nobody", Containers: []corev1.Container{{Name: "c", Image: "i"}}}}
		if edit != nil {
			edit(pod)
		}
		pod, err := client.CoreV1().Pods(namespace).Create(ctx, pod, metav1.CreateOptions{})
		must(err)
		version = pod.ResourceVersion
		b := &corev1.Binding{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: pod.UID}, Target: corev1.ObjectReference{Kind: "Node", Name: "bind-node"}}
		if change != nil {
			change(b)
		}
		all = append(all, b)
	}
	for i := range 20 {
		add(fmt.Sprint("bind-", i), nil, nil)
		if i%2 == 0 { // as the scheduler does it: this is done without decoding the pod
			all[i].ResourceVersion = version
		}
	}
	add("bind-gated", func(p *corev1.Pod) { p.Spec.SchedulingGates = []corev1.PodSchedulingGate{{Name: "example.com/g"}} }, nil)
	add("bind-other", nil, func(b *corev1.Binding) { b.UID = "another" })
	add("bind-gone", nil, func(b *corev1.Binding) { b.Name = "bind-never-was" })
	add("bind-old", nil, func(b *corev1.Binding) { b.ResourceVersion = "1" })
	add("bind-gated-version", func(p *corev1.Pod) { p.Spec.SchedulingGates = []corev1.PodSchedulingGate{{Name: "example.com/g"}} },
		func(b *corev1.Binding) { b.ResourceVersion = version })
	add("bind-nowhere", nil, func(b *corev1.Binding) { b.Target.Name = "" })
	errs := make([]error, len(all))
	binder.Bind(ctx, all, func(i int, err error) { errs[i] = err })
	for i := range 20 {
		must(errs[i])
		pod, err := client.CoreV1().Pods(namespace).Get(ctx, all[i].Name, metav1.GetOptions{})
		must(err)
		if pod.Spec.NodeName != "bind-node" || pod.Labels[corev1.LabelTopologyZone] != "z1" {
			t.Errorf("%s: on %q, labels %v", pod.Name, pod.Spec.NodeName, pod.Labels)
		}
		first, err := client.CoreV1().Pods(namespace).Get(ctx, all[1].Name, metav1.GetOptions{}) // which was bound without its version
		must(err)
		pod.ObjectMeta, first.ObjectMeta = metav1.ObjectMeta{Labels: pod.Labels, Annotations: pod.Annotations}, metav1.ObjectMeta{Labels: first.Labels, Annotations: first.Annotations}
		for _, p := range []*corev1.Pod{pod, first} {
			p.Spec.Volumes, p.Spec.Containers = nil, nil // they have names of their own
			for j := range p.Status.Conditions {
				p.Status.Conditions[j].LastTransitionTime = metav1.Time{}
			}
		}
		if !equality.Semantic.DeepEqual(pod, first) {
			t.Errorf("bound with its version: %+v\nwithout: %+v", pod, first)
		}
	}
	for i := 20; i < len(all); i++ {
		want := client.CoreV1().Pods(namespace).Bind(ctx, all[i], metav1.CreateOptions{})
		if errs[i] == nil || want == nil || apierrors.ReasonForError(errs[i]) != apierrors.ReasonForError(want) {
			t.Errorf("%s: %v; by a request: %v", all[i].Name, errs[i], want)
		}
	}
	again := errs[0]
	binder.Bind(ctx, all[:1], func(_ int, err error) { again = err })
	if !apierrors.IsConflict(again) {
		t.Errorf("bound twice: %v", again)
	}
	if decorated.Load() == 0 {
		t.Error("the leader's term would not reach the store")
	}
}

// A binding is seen by who watches pods, at the server that made it and at others, as soon as it is made.
func TestBindingReachesWatchers(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	binder, err := cluster.servers[0].Binder("test", nil)
	if err != nil {
		t.Fatal(err)
	}
	makeNode(t, k, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "bind-watched"}})
	var watches []watch.Interface
	for _, s := range cluster.servers {
		w, err := client(t, cluster.as(s, "admin", "system:masters")).CoreV1().Pods(ns).Watch(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=bind-watched"})
		if err != nil {
			t.Fatal(err)
		}
		defer w.Stop()
		watches = append(watches, w)
	}
	var late []time.Duration
	for i := range 30 {
		pod, err := k.CoreV1().Pods(ns).Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("w-", i)}, Spec: corev1.PodSpec{
			SchedulerName: "nobody", Containers: []corev1.Container{{Name: "c", Image: "i"}}}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		b := &corev1.Binding{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: pod.Name, UID: pod.UID, ResourceVersion: pod.ResourceVersion}, Target: corev1.ObjectReference{Kind: "Node", Name: "bind-watched"}}
		began := time.Now()
		binder.Bind(ctx, []*corev1.Binding{b}, func(_ int, e error) { err = e })
		if err != nil {
			t.Fatal(err)
		}
		for s, w := range watches {
			select {
			case ev := <-w.ResultChan():
				p, ok := ev.Object.(*corev1.Pod)
				if !ok || ev.Type != watch.Added || p.Name != pod.Name || p.Spec.NodeName != "bind-watched" {
					t.Fatalf("%v of %v", ev.Type, ev.Object)
				}
			case <-time.After(5 * time.Second):
				t.Fatalf("server %d does not tell of %s", s, pod.Name)
			}
		}
		late = append(late, time.Since(began))
	}
	slices.Sort(late)
	t.Logf("from the binding until all %d watches tell: median %v, worst %v", len(watches), late[len(late)/2], late[len(late)-1])
	if m := late[len(late)/2]; m > 500*time.Millisecond {
		t.Errorf("the median is %v", m)
	}
}
