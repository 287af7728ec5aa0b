package api

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/kubernetes/pkg/auth/nodeidentifier"
	"k8s.io/kubernetes/plugin/pkg/auth/authorizer/node"
	"k8s.io/kubernetes/plugin/pkg/auth/authorizer/rbac/bootstrappolicy"
)

// graphBehind makes upstream's node authorizer with a feed of its pods.
func graphBehind(f *podFeed) authorizer.Authorizer {
	none := informers.NewSharedInformerFactory(fake.NewClientset(), 0)
	g := node.NewGraph()
	node.AddGraphEventHandlers(g, none.Core().V1().Nodes(), podInformer{feed: f}, none.Core().V1().PersistentVolumes(), none.Storage().V1().VolumeAttachments(), nil, nil)
	return node.NewAuthorizer(g, nodeidentifier.NewDefaultNodeIdentifier(), bootstrappolicy.NodeRules())
}

// referring is a pod that refers to a few of few objects, in all the ways that the graph knows.
func referring(r *rand.Rand, name string) *corev1.Pod {
	some := func(kind string) string { return fmt.Sprint(kind, r.IntN(3)) }
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: some("ns"), Name: name, UID: types.UID(fmt.Sprint(r.Uint64()))},
		Spec: corev1.PodSpec{NodeName: some("node"), ServiceAccountName: some("sa")}}
	volume := func(v corev1.VolumeSource) {
		p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: "v", VolumeSource: v})
	}
	switch r.IntN(8) {
	case 0:
		volume(corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: some("s")}})
	case 1:
		volume(corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: some("c")}}})
	case 2:
		volume(corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: some("v")}})
	case 3:
		volume(corev1.VolumeSource{Ephemeral: &corev1.EphemeralVolumeSource{}})
	case 4:
		p.Spec.ResourceClaims = []corev1.PodResourceClaim{{Name: "r", ResourceClaimTemplateName: ptr("t")}}
		if r.IntN(2) == 0 {
			p.Status.ResourceClaimStatuses = []corev1.PodResourceClaimStatus{{Name: "r", ResourceClaimName: ptr(some("r"))}}
		}
	case 5:
		p.Status.ExtendedResourceClaimStatus = &corev1.PodExtendedResourceClaimStatus{ResourceClaimName: some("r")}
	case 6:
		p.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "m"}
	}
	return p
}

// To nodes it makes no difference that the graph knows one pod for many: they may do what they may if it knows all of them.
func TestPodFeedStandsForAll(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	all, few := newPodFeed(nil, true), newPodFeed(nil, false)
	want, graph := graphBehind(all), graphBehind(few)
	got := few.authorize(graph)
	pods := map[string]*corev1.Pod{} // by name
	allowed := 0
	for step := range 400 {
		name := fmt.Sprint("p", r.IntN(30))
		old := pods[name]
		do := func(f *podFeed) error { return nil }
		switch kind := r.IntN(6); {
		case kind == 0 && old != nil:
			delete(pods, name)
			do = func(f *podFeed) error { return f.Delete(old.DeepCopy()) }
		case kind == 1:
			var list []*corev1.Pod
			for n, p := range pods {
				if r.IntN(4) == 0 {
					delete(pods, n)
					continue
				}
				list = append(list, p)
			}
			do = func(f *podFeed) error {
				var out []any
				for _, p := range list {
					out = append(out, p.DeepCopy())
				}
				return f.Replace(out, "1")
			}
		default:
			p := referring(r, name)
			if old != nil { // names are of one namespace here
				p.Namespace = old.Namespace
			}
			pods[name] = p
			do = func(f *podFeed) error { return f.Update(p.DeepCopy()) }
		}
		for _, f := range []*podFeed{all, few} {
			if err := do(f); err != nil {
				t.Fatal(err)
			}
		}
		if len(few.seen) != len(pods) || len(few.byRefs) != len(few.groups)-len(few.free) || len(few.byRefs) > len(pods) {
			t.Fatalf("seed %d, step %d: %d pods are known of %d, %d groups, %d of them free, %d found", seed, step, len(few.seen), len(pods), len(few.groups), len(few.free), len(few.byRefs))
		}
		for range 200 {
			a := question(r)
			x, _, err := want.Authorize(t.Context(), a)
			y, _, err2 := got.Authorize(t.Context(), a)
			if x != y || err != nil || err2 != nil {
				t.Fatalf("seed %d, step %d: %s %s of %s %s/%s: %v %v, want %v %v", seed, step, a.GetUser().GetName(), a.GetVerb(), a.GetResource(), a.GetNamespace(), a.GetName(), y, err2, x, err)
			}
			if x == authorizer.DecisionAllow {
				allowed++
			}
		}
	}
	if allowed < 1000 {
		t.Errorf("only %d requests were allowed: the test says little", allowed)
	}
	if err := few.Replace(nil, "2"); err != nil || len(few.seen) != 0 || len(few.byRefs) != 0 || slices.ContainsFunc(few.groups, func(g podGroup) bool { return g != podGroup{} }) {
		t.Errorf("without pods: %v, %d pods, %d groups", err, len(few.seen), len(few.byRefs))
	}
}

// question is a request of a node about something that pods refer to, or about a pod.
func question(r *rand.Rand) authorizer.AttributesRecord {
	some := func(kind string) string { return fmt.Sprint(kind, r.IntN(3)) }
	a := authorizer.AttributesRecord{ResourceRequest: true, Verb: []string{"get", "list", "watch"}[r.IntN(3)], Namespace: some("ns"), APIVersion: "v1",
		User: &user.DefaultInfo{Name: "system:node:" + some("node"), Groups: []string{"system:nodes"}}}
	switch r.IntN(7) {
	case 0:
		a.Resource, a.Name = "pods", fmt.Sprint("p", r.IntN(30))
	case 1:
		a.Resource, a.Name = "secrets", some("s")
	case 2:
		a.Resource, a.Name = "configmaps", some("c")
	case 3:
		a.Resource, a.Name = "persistentvolumeclaims", some("v")
	case 4:
		a.Resource, a.Name = "persistentvolumeclaims", fmt.Sprint("p", r.IntN(30), "-v")
	case 5:
		a.APIGroup, a.Resource, a.Name = "resource.k8s.io", "resourceclaims", some("r")
	case 6:
		a.Resource, a.Subresource, a.Verb, a.Name = "serviceaccounts", "token", "create", some("sa")
	}
	if r.IntN(20) == 0 {
		a.Subresource = "status"
	}
	return a
}

// BenchmarkPodFeed is what 30,000 pods on 5,000 nodes take in the feed and in upstream's graph, told of all of them or of those that differ.
func BenchmarkPodFeed(b *testing.B) {
	for _, named := range []bool{true, false} {
		b.Run(map[bool]string{true: "all", false: "alike"}[named], func(b *testing.B) {
			for b.Loop() {
				before := heapInUse()
				f := newPodFeed(nil, named)
				graph := graphBehind(f)
				for i := range 30000 {
					p := simplePod(fmt.Sprint("pod-", i))
					p.Namespace, p.UID, p.Spec.NodeName, p.Spec.ServiceAccountName = "default", types.UID(fmt.Sprint("8c9e1a5c-6f2b-4d0e-9a3b-", i)), fmt.Sprint("node-", i%5000), "default"
					p.Spec.Volumes = []corev1.Volume{{Name: "token", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
						{ConfigMap: &corev1.ConfigMapProjection{LocalObjectReference: corev1.LocalObjectReference{Name: "kube-root-ca.crt"}}}}}}}}
					if err := f.Add(p); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(heapInUse()-before)/(1<<20), "MB")
				if d, _, _ := f.authorize(graph).Authorize(b.Context(), authorizer.AttributesRecord{User: &user.DefaultInfo{Name: "system:node:node-7", Groups: []string{"system:nodes"}},
					ResourceRequest: true, Verb: "get", Resource: "pods", Namespace: "default", Name: "pod-7"}); d != authorizer.DecisionAllow {
					b.Fatal(d)
				}
			}
		})
	}
}

func heapInUse() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
