package resourceclaim

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	resourceapi "k8s.io/api/resource/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/controller/controllertest"
)

func mkPod(name string, edit ...func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID(name), ResourceVersion: "1"}, Status: corev1.PodStatus{Phase: corev1.PodPending}}
	for _, fn := range edit {
		fn(p)
	}
	return p
}

func byTemplateNamed(names ...string) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		for _, n := range names {
			t := "tpl"
			p.Spec.ResourceClaims = append(p.Spec.ResourceClaims, corev1.PodResourceClaim{Name: n, ResourceClaimTemplateName: &t})
		}
	}
}

func byName(claim string) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		p.Spec.ResourceClaims = append(p.Spec.ResourceClaims, corev1.PodResourceClaim{Name: claim, ResourceClaimName: &claim})
	}
}

func told(podClaim, claim string) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		p.Status.ResourceClaimStatuses = append(p.Status.ResourceClaimStatuses, corev1.PodResourceClaimStatus{Name: podClaim, ResourceClaimName: &claim})
	}
}

func bound(p *corev1.Pod)  { p.Spec.NodeName = "node" }
func ended(p *corev1.Pod)  { p.Status.Phase = corev1.PodSucceeded }
func doomed(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{Time: time.Unix(1, 0)} }

func mkClaim(name string, edit ...func(*resourceapi.ResourceClaim)) *resourceapi.ResourceClaim {
	c := &resourceapi.ResourceClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID("claim-" + name), ResourceVersion: "1"}}
	for _, fn := range edit {
		fn(c)
	}
	return c
}

func allocated(c *resourceapi.ResourceClaim) {
	c.Status.Allocation = &resourceapi.AllocationResult{}
	c.Finalizers = []string{resourceapi.Finalizer}
}

func usedBy(names ...string) func(*resourceapi.ResourceClaim) {
	return func(c *resourceapi.ResourceClaim) {
		for _, n := range names {
			c.Status.ReservedFor = append(c.Status.ReservedFor, resourceapi.ResourceClaimConsumerReference{Resource: "pods", Name: n, UID: types.UID(n)})
		}
	}
}

func madeFor(pod, podClaim string) func(*resourceapi.ResourceClaim) {
	return func(c *resourceapi.ResourceClaim) {
		c.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: pod, UID: types.UID(pod), Controller: new(true)}}
		c.Annotations = map[string]string{resourceapi.PodResourceClaimAnnotation: podClaim}
	}
}

func deleted(c *resourceapi.ResourceClaim) { c.DeletionTimestamp = &metav1.Time{Time: time.Unix(1, 0)} }

// The cases are those of upstream's TestSyncHandler that are about claims.
func TestPlanClaim(t *testing.T) {
	foreign := func(c *resourceapi.ResourceClaim) {
		c.Status.ReservedFor = append(c.Status.ReservedFor, resourceapi.ResourceClaimConsumerReference{APIGroup: "x.io", Resource: "pods", Name: "gone", UID: "gone"})
	}
	locked := func(c *resourceapi.ResourceClaim) { c.Finalizers = []string{resourceapi.Finalizer} }
	for _, tc := range []struct {
		what  string
		claim *resourceapi.ResourceClaim
		owner *corev1.Pod
		want  string // drop, deallocate, unlock, remove
	}{
		{"free", mkClaim("c"), nil, "[] false false false"},
		{"in use", mkClaim("c", allocated, usedBy("a")), nil, "[] false false false"},
		{"one of two users is gone", mkClaim("c", allocated, usedBy("a", "gone")), nil, "[gone] false false false"},
		{"the last user is gone", mkClaim("c", allocated, usedBy("gone")), nil, "[gone] true true false"},
		{"both are gone", mkClaim("c", allocated, usedBy("gone", "gone")), nil, "[gone gone] true true false"},
		{"allocated by somebody else", mkClaim("c", allocated, usedBy("gone"), func(c *resourceapi.ResourceClaim) { c.Finalizers = nil }), nil, "[gone] false false false"},
		{"a user that is no pod", mkClaim("c", allocated, foreign), nil, "[] false false false"},
		{"a user that is no pod beside one", mkClaim("c", allocated, foreign, usedBy("gone")), nil, "[gone] false false false"},
		{"allocated, never used", mkClaim("c", allocated), nil, "[] false false false"},
		{"the same, to be deleted", mkClaim("c", allocated, deleted), nil, "[] true true false"},
		{"deallocated, to be deleted", mkClaim("c", locked, deleted), nil, "[] false true false"},
		{"in use, to be deleted", mkClaim("c", allocated, usedBy("a"), deleted), nil, "[] false false false"},
		{"its pod may run", mkClaim("c", madeFor("a", "x")), mkPod("a"), "[] false false false"},
		{"its pod has ended", mkClaim("c", madeFor("a", "x"), allocated, usedBy("gone")), mkPod("a", ended), "[gone] true true true"},
		{"its pod has ended, another uses it", mkClaim("c", madeFor("a", "x"), allocated, usedBy("b")), mkPod("a", ended), "[] false false false"},
		{"its pod was deleted before it had a node", mkClaim("c", madeFor("a", "x")), mkPod("a", doomed), "[] false false true"},
		{"its pod is ending on a node", mkClaim("c", madeFor("a", "x")), mkPod("a", doomed, bound), "[] false false false"},
		{"its pod was replaced", mkClaim("c", madeFor("a", "x")), mkPod("a", func(p *corev1.Pod) { p.UID = "new" }), "[] false false true"},
		{"its pod is not known", mkClaim("c", madeFor("a", "x")), nil, "[] false false false"},
	} {
		p := planClaim(tc.claim, func(r resourceapi.ResourceClaimConsumerReference) bool { return r.Name == "gone" }, tc.owner)
		var drop []string
		for _, r := range p.drop {
			drop = append(drop, r.Name)
		}
		if got := fmt.Sprint(drop, p.deallocate, p.unlock, p.remove); got != tc.want {
			t.Errorf("%s: %s, want %s", tc.what, got, tc.want)
		}
	}
}

func TestPlanPod(t *testing.T) {
	for _, tc := range []struct {
		what   string
		pod    *corev1.Pod
		claims []*resourceapi.ResourceClaim
		want   string // create | names | reserve
	}{
		{"no claims", mkPod("p"), nil, " | map[] | "},
		{"to be made", mkPod("p", byTemplateNamed("x", "y")), nil, "x y | map[] | "},
		{"made, not told", mkPod("p", byTemplateNamed("x", "y")), []*resourceapi.ResourceClaim{mkClaim("c", madeFor("p", "x"))}, "y | map[x:c] | "},
		{"made and told", mkPod("p", byTemplateNamed("x"), told("x", "c")), []*resourceapi.ResourceClaim{mkClaim("c", madeFor("p", "x"))}, " | map[] | "},
		{"deleted by somebody", mkPod("p", byTemplateNamed("x"), told("x", "c")), nil, "x | map[] | "},
		{"deleted, another has its name", mkPod("p", byTemplateNamed("x"), told("x", "c")), []*resourceapi.ResourceClaim{mkClaim("c", madeFor("q", "x"))}, "x | map[] | "},
		{"named, not there", mkPod("p", byName("c")), nil, " | map[] | "},
		{"named, bound by somebody else", mkPod("p", byName("c"), bound), []*resourceapi.ResourceClaim{mkClaim("c", allocated, usedBy("q"))}, " | map[] | c"},
		{"the same, not allocated", mkPod("p", byName("c"), bound), []*resourceapi.ResourceClaim{mkClaim("c")}, " | map[] | "},
		{"the same, not bound", mkPod("p", byName("c")), []*resourceapi.ResourceClaim{mkClaim("c", allocated)}, " | map[] | "},
		{"reserved", mkPod("p", byName("c"), bound), []*resourceapi.ResourceClaim{mkClaim("c", allocated, usedBy("p"))}, " | map[] | "},
		{"found to need none", mkPod("p", byTemplateNamed("x"), func(p *corev1.Pod) {
			p.Status.ResourceClaimStatuses = []corev1.PodResourceClaimStatus{{Name: "x"}}
		}), nil, " | map[] | "},
	} {
		var owned []*resourceapi.ResourceClaim
		for _, c := range tc.claims {
			if ownerOf(c) == tc.pod.UID {
				owned = append(owned, c)
			}
		}
		p, err := planPod(tc.pod, func(name string) *resourceapi.ResourceClaim {
			for _, c := range tc.claims {
				if c.Name == name {
					return c
				}
			}
			return nil
		}, owned)
		if err != nil {
			t.Errorf("%s: %v", tc.what, err)
		}
		var create, reserve []string
		for _, c := range p.create {
			create = append(create, c.Name)
		}
		for _, c := range p.reserve {
			reserve = append(reserve, c.Name)
		}
		if got := fmt.Sprint(strings.Join(create, " "), " | ", p.names, " | ", strings.Join(reserve, " ")); got != tc.want {
			t.Errorf("%s: %s, want %s", tc.what, got, tc.want)
		}
	}
	if _, err := planPod(mkPod("p", func(p *corev1.Pod) { p.Spec.ResourceClaims = []corev1.PodResourceClaim{{Name: "x"}} }), nil, nil); err == nil {
		t.Error("a claim of an unknown kind was taken")
	}
}

func TestNamesOfClaims(t *testing.T) {
	long := strings.Repeat("p", 80)
	for _, tc := range []struct{ pod, claim, want string }{
		{"p", "c", "p-c-"},
		{long, "c", strings.Repeat("p", 54) + "-"},
		{long, strings.Repeat("c", 20), strings.Repeat("p", 44) + "-" + strings.Repeat("c", 11)},
	} {
		c := newClaim(mkPod(tc.pod), tc.claim, &resourceapi.ResourceClaimTemplate{})
		if c.Name[:len(c.Name)-5] != tc.want || len(c.Name) > 62 {
			t.Errorf("%s, want %s and five characters", c.Name, tc.want)
		}
	}
}

func show(t *testing.T, client *fake.Clientset) string {
	t.Helper()
	time.Sleep(5 * time.Second) // virtual
	synctest.Wait()
	l, err := client.ResourceV1().ResourceClaims("ns").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, c := range l.Items {
		s := c.Name
		if of := c.Annotations[resourceapi.PodResourceClaimAnnotation]; of != "" {
			s = s[:len(s)-5] + of
		}
		if c.Status.Allocation != nil {
			s += " allocated"
		}
		for _, r := range c.Status.ReservedFor {
			s += " " + r.Name
		}
		out = append(out, s)
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

// The life of claims, with the API in between; at its end, and in every pause,
// nothing is written.
func TestClaimsOfAPod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		template := &resourceapi.ResourceClaimTemplate{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "tpl", ResourceVersion: "1"},
			Spec: resourceapi.ResourceClaimTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"l": "x"}}}}
		var objs []runtime.Object
		objs = append(objs, mkPod("p", byTemplateNamed("x", "y")), mkClaim("stale", allocated, usedBy("nobody")), mkClaim("kept", allocated))
		client := controllertest.NewClient(objs...)
		board := &Board{}
		rec := controllertest.Start(t, client, nil, func(d controller.Deps) controller.Controller { return New(d, board) })
		quiet := func() {
			t.Helper()
			client.ClearActions()
			time.Sleep(time.Hour)
			synctest.Wait()
			for _, a := range client.Actions() {
				if a.GetVerb() != "get" {
					t.Errorf("written while nothing changes: %v", a)
				}
			}
		}
		if got, want := show(t, client), "kept allocated, stale"; got != want {
			t.Errorf("without the template %s, want %s", got, want)
		}
		if e := controllertest.Events(rec); len(e) == 0 || !strings.Contains(e[0], `FailedResourceClaimCreation PodResourceClaim x: resource claim template "tpl"`) {
			t.Errorf("events %q", e)
		}
		if _, err := client.ResourceV1().ResourceClaimTemplates("ns").Create(t.Context(), template, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		if got, want := show(t, client), "kept allocated, p-x-x, p-y-y, stale"; got != want {
			t.Fatalf("with the template %s, want %s", got, want)
		}
		p, err := client.CoreV1().Pods("ns").Get(t.Context(), "p", metav1.GetOptions{})
		if err != nil || len(p.Status.ResourceClaimStatuses) != 2 {
			t.Fatalf("%+v %v", p.Status, err)
		}
		quiet()
		// Allocated and reserved by placement, then the pod ends.
		l, _ := client.ResourceV1().ResourceClaims("ns").List(t.Context(), metav1.ListOptions{LabelSelector: "l=x"})
		for i := range l.Items {
			c := &l.Items[i]
			allocated(c)
			if c, err = client.ResourceV1().ResourceClaims("ns").Update(t.Context(), c, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
			allocated(c)
			usedBy("p")(c)
			if _, err := client.ResourceV1().ResourceClaims("ns").UpdateStatus(t.Context(), c, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		if got, want := show(t, client), "kept allocated, p-x-x allocated p, p-y-y allocated p, stale"; got != want {
			t.Fatalf("in use %s, want %s", got, want)
		}
		if got := fmt.Sprint(board.Claims(), board.Creations()); got != "map[{false false }:1 {true false }:1 {true false resource_claim_template}:2] map[{true false}:2]" {
			t.Errorf("counted %s", got)
		}
		p.Status.Phase = corev1.PodSucceeded
		if _, err := client.CoreV1().Pods("ns").UpdateStatus(t.Context(), p, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		if got, want := show(t, client), "kept allocated, stale"; got != want {
			t.Errorf("after the pod ended %s, want %s", got, want)
		}
		quiet()
	})
}

// A claim whose creation got no answer is not made twice; where somebody else's has its name, it gets another one.
func TestClaimsAreMadeOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		template := &resourceapi.ResourceClaimTemplate{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "tpl", ResourceVersion: "1"}}
		pod := mkPod("p", byTemplateNamed("x", "y"))
		theirs := newClaim(pod, "y", template)
		theirs.Namespace, theirs.OwnerReferences, theirs.Annotations = "ns", nil, nil
		client := controllertest.NewClient(pod, template, theirs)
		lost := false
		client.PrependReactor("create", "resourceclaims", func(a k8stesting.Action) (bool, runtime.Object, error) {
			claim := a.(k8stesting.CreateAction).GetObject().(*resourceapi.ResourceClaim)
			if claim.GenerateName != "" && claim.Name == "" {
				claim.Name = claim.GenerateName + "abcde"
			}
			if claim.Annotations[resourceapi.PodResourceClaimAnnotation] != "x" || lost {
				return false, nil, nil
			}
			lost = true
			if err := client.Tracker().Create(a.GetResource(), claim, "ns"); err != nil {
				t.Error(err)
			}
			return true, nil, apierrors.NewTimeoutError("no answer", 0)
		})
		controllertest.Start(t, client, nil, func(d controller.Deps) controller.Controller { return New(d, nil) })
		got := strings.Split(show(t, client), ", ")
		if len(got) != 3 || !lost || !slices.Contains(got, "p-x-x") || !slices.Contains(got, theirs.Name) {
			t.Errorf("claims %q", got)
		}
		p, err := client.CoreV1().Pods("ns").Get(t.Context(), "p", metav1.GetOptions{})
		if err != nil || len(p.Status.ResourceClaimStatuses) != 2 {
			t.Fatalf("%+v %v", p.Status.ResourceClaimStatuses, err)
		}
		for _, s := range p.Status.ResourceClaimStatuses {
			if *s.ResourceClaimName == theirs.Name {
				t.Errorf("the pod was given somebody else's claim %s", theirs.Name)
			}
		}
	})
}
