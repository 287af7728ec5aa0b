package api

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
)

func addrs(s ...string) []netip.AddrPort {
	var out []netip.AddrPort
	for _, a := range s {
		out = append(out, netip.MustParseAddrPort(a))
	}
	return out
}

func show(slices []*discoveryv1.EndpointSlice) string {
	var b strings.Builder
	for _, s := range slices {
		fmt.Fprintf(&b, "%s/%s:%d[", s.Name, s.AddressType, *s.Ports[0].Port)
		for _, e := range s.Endpoints {
			b.WriteString(e.Addresses[0] + " ")
		}
		b.WriteString("] ")
	}
	return b.String()
}

func TestKubernetesSlices(t *testing.T) {
	for _, tc := range []struct {
		name, want string
		replicas   []netip.AddrPort
	}{
		{"one", "kubernetes/IPv4:6443[10.0.0.1 ] ", addrs("10.0.0.1:6443")},
		{"three, in any order", "kubernetes/IPv4:6443[10.0.0.1 10.0.0.2 10.0.0.3 ] ", addrs("10.0.0.3:6443", "10.0.0.1:6443", "10.0.0.2:6443")},
		{"twice the same", "kubernetes/IPv4:6443[10.0.0.1 ] ", addrs("10.0.0.1:6443", "10.0.0.1:6443")},
		{"two ports", "kubernetes/IPv4:6443[10.0.0.1 ] kubernetes-4-7443/IPv4:7443[10.0.0.2 ] ", addrs("10.0.0.2:7443", "10.0.0.1:6443")},
		{"two families", "kubernetes/IPv4:6443[10.0.0.1 ] kubernetes-6-6443/IPv6:6443[fd00::1 ] ", addrs("[fd00::1]:6443", "10.0.0.1:6443")},
		{"IPv6 only", "kubernetes/IPv6:6443[fd00::1 ] ", addrs("[fd00::1]:6443")},
	} {
		if got := show(kubernetesSlices(sortedReplicas(tc.replicas))); got != tc.want {
			t.Errorf("%s: %s\nwant %s", tc.name, got, tc.want)
		}
	}
}

func TestReconcileKubernetes(t *testing.T) {
	ctx := t.Context()
	cfg := &Config{}
	cfg.setDefaults()
	// Left over from a time with another port, and one of somebody else's Service.
	k := fake.NewClientset(
		&discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "kubernetes-4-1", Labels: map[string]string{discoveryv1.LabelServiceName: "kubernetes"}}},
		&discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web", Labels: map[string]string{discoveryv1.LabelServiceName: "web"}}})
	check := func(want string) {
		t.Helper()
		l, err := k.DiscoveryV1().EndpointSlices("default").List(ctx, metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=kubernetes"})
		if err != nil {
			t.Fatal(err)
		}
		var ours []*discoveryv1.EndpointSlice
		for i := range l.Items {
			ours = append(ours, &l.Items[i])
		}
		if got := show(ours); got != want {
			t.Errorf("slices %s, want %s", got, want)
		}
		e, err := k.CoreV1().Endpoints("default").Get(ctx, "kubernetes", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var ips []string
		for _, s := range e.Subsets {
			for _, a := range s.Addresses {
				ips = append(ips, a.IP)
			}
		}
		for _, ip := range ips {
			if !strings.Contains(want, ip) {
				t.Errorf("endpoints %v, want those of %s", ips, want)
			}
		}
		if _, err := k.DiscoveryV1().EndpointSlices("default").Get(ctx, "web", metav1.GetOptions{}); err != nil {
			t.Error(err)
		}
	}
	writes := func() int {
		n := 0
		for _, a := range k.Actions() {
			if !slices.Contains([]string{"get", "list", "watch"}, a.GetVerb()) {
				n++
			}
		}
		return n
	}
	for _, step := range []struct {
		replicas []netip.AddrPort
		want     string
		writes   int
	}{
		{addrs("10.0.0.1:6443"), "kubernetes/IPv4:6443[10.0.0.1 ] ", 5}, // two Services, Endpoints, a slice made and one removed
		{addrs("10.0.0.1:6443"), "kubernetes/IPv4:6443[10.0.0.1 ] ", 0},
		{addrs("10.0.0.1:6443", "10.0.0.2:6443"), "kubernetes/IPv4:6443[10.0.0.1 10.0.0.2 ] ", 2},
		{addrs("[fd00::1]:6443"), "kubernetes/IPv6:6443[fd00::1 ] ", 3}, // another family: the slice is made anew
	} {
		k.ClearActions()
		if err := reconcileKubernetes(ctx, k, cfg, step.replicas); err != nil {
			t.Fatal(err)
		}
		check(step.want)
		if n := writes(); n != step.writes {
			t.Errorf("%v: %d writes, want %d: %v", step.replicas, n, step.writes, k.Actions())
		}
	}
}

// recorder is the graph's side of the feed.
type recorder struct {
	mu  sync.Mutex
	log []string
}

func (r *recorder) add(s string, o any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := o.(*corev1.Pod)
	r.log = append(r.log, s+" "+p.Name+"@"+p.Spec.NodeName)
}
func (r *recorder) OnAdd(o any, _ bool)  { r.add("add", o) }
func (r *recorder) OnUpdate(_, o any)    { r.add("update", o) }
func (r *recorder) OnDelete(o any)       { r.add("delete", o) }
func (r *recorder) take() (out []string) { out, r.log = r.log, nil; return out }

func TestPodFeed(t *testing.T) {
	pod := func(name, uid, node string) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: name, UID: types.UID(uid)}, Spec: corev1.PodSpec{NodeName: node}}
	}
	f, r := newPodFeed(fake.NewClientset(), true), &recorder{}
	if _, err := f.AddEventHandler(r); err != nil {
		t.Fatal(err)
	}
	if f.HasSynced() {
		t.Fatal("synced before the first list")
	}
	changed := pod("a", "1", "n1")
	changed.Status.Phase = corev1.PodRunning
	debugged := changed.DeepCopy()
	debugged.Spec.EphemeralContainers = []corev1.EphemeralContainer{{EphemeralContainerCommon: corev1.EphemeralContainerCommon{
		EnvFrom: []corev1.EnvFromSource{{SecretRef: &corev1.SecretEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "s"}}}}}}}
	claimed := debugged.DeepCopy()
	claimed.Spec.ResourceClaims = []corev1.PodResourceClaim{{Name: "c", ResourceClaimTemplateName: ptr("t")}}
	claimed.Status.ResourceClaimStatuses = []corev1.PodResourceClaimStatus{{Name: "c", ResourceClaimName: ptr("c-1")}}
	for i, step := range []struct {
		do   func() error
		want string
	}{
		{func() error { return f.Replace([]any{pod("a", "1", "n1"), pod("b", "1", "n2")}, "1") }, "add a@n1,add b@n2"},
		{func() error { return f.Update(changed) }, ""}, // nothing that the graph reads
		{func() error { return f.Update(debugged) }, "add a@n1"},
		{func() error { return f.Update(claimed) }, "add a@n1"},
		{func() error { return f.Update(pod("b", "2", "n3")) }, "add b@n3"}, // another pod of that name
		{func() error { return f.Delete(pod("b", "2", "")) }, "delete b@n3"},
		{func() error { return f.Replace([]any{pod("c", "1", "n1")}, "2") }, "add c@n1,delete a@n1"},
	} {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(r.take(), ","); got != step.want {
			t.Errorf("step %d: %q, want %q", i, got, step.want)
		}
	}
	if !f.HasSynced() {
		t.Fatal("not synced after two lists")
	}
	if err := f.Add(&corev1.Node{}); err == nil {
		t.Error("took a node for a pod")
	}
}
