package statefulset

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/controller/history"
)

var t0 = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func newSet(replicas int32, edit ...func(*appsv1.StatefulSet)) *appsv1.StatefulSet {
	l := map[string]string{"app": "db"}
	set := &appsv1.StatefulSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "db", UID: "set-uid", Generation: 2, ResourceVersion: "5"},
		Spec: appsv1.StatefulSetSpec{
			Replicas: &replicas, ServiceName: "db", Selector: &metav1.LabelSelector{MatchLabels: l},
			PodManagementPolicy: appsv1.OrderedReadyPodManagement,
			UpdateStrategy: appsv1.StatefulSetUpdateStrategy{Type: appsv1.RollingUpdateStatefulSetStrategyType,
				RollingUpdate: &appsv1.RollingUpdateStatefulSetStrategy{Partition: new(int32)}},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: l},
				Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "i"}}},
			},
		},
	}
	for _, e := range edit {
		e(set)
	}
	return set
}

func parallelSet(s *appsv1.StatefulSet) { s.Spec.PodManagementPolicy = appsv1.ParallelPodManagement }
func from(n int32) func(*appsv1.StatefulSet) {
	return func(s *appsv1.StatefulSet) { s.Spec.Ordinals = &appsv1.StatefulSetOrdinals{Start: n} }
}
func partitioned(n int32) func(*appsv1.StatefulSet) {
	return func(s *appsv1.StatefulSet) { s.Spec.UpdateStrategy.RollingUpdate.Partition = &n }
}
func atMost(n string) func(*appsv1.StatefulSet) {
	return func(s *appsv1.StatefulSet) {
		v := intstr.Parse(n)
		s.Spec.UpdateStrategy.RollingUpdate.MaxUnavailable = &v
	}
}
func onDelete(s *appsv1.StatefulSet) {
	s.Spec.UpdateStrategy = appsv1.StatefulSetUpdateStrategy{Type: appsv1.OnDeleteStatefulSetStrategyType}
}
func claiming(deleted, scaled appsv1.PersistentVolumeClaimRetentionPolicyType) func(*appsv1.StatefulSet) {
	return func(s *appsv1.StatefulSet) {
		s.Spec.VolumeClaimTemplates = []corev1.PersistentVolumeClaim{{ObjectMeta: metav1.ObjectMeta{Name: "data"}}}
		s.Spec.PersistentVolumeClaimRetentionPolicy = &appsv1.StatefulSetPersistentVolumeClaimRetentionPolicy{WhenDeleted: deleted, WhenScaled: scaled}
	}
}

// pod is written as "0", "1!" (not ready), "2-" (being deleted), "3x" (failed),
// "4*" (of the new revision), in any combination.
func podOf(text string) *corev1.Pod {
	digits := strings.TrimRight(text, "!-x*?")
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "db-" + digits, UID: types.UID("uid-" + digits),
			Labels:          map[string]string{"app": "db", appsv1.StatefulSetPodNameLabel: "db-" + digits, appsv1.PodIndexLabel: digits, appsv1.StatefulSetRevisionLabel: "old"},
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(newSet(0), kind)}},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: metav1.NewTime(t0.Add(-time.Minute))}}},
	}
	for _, mark := range strings.TrimPrefix(text, digits) {
		switch mark {
		case '!':
			p.Status.Conditions[0].Status = corev1.ConditionFalse
		case '?':
			p.Status = corev1.PodStatus{Phase: corev1.PodPending}
		case '-':
			p.DeletionTimestamp = &metav1.Time{Time: t0}
		case 'x':
			p.Status = corev1.PodStatus{Phase: corev1.PodFailed}
		case '*':
			p.Labels[appsv1.StatefulSetRevisionLabel] = "new"
		}
	}
	return p
}

func podsOf(text string) (pods []*corev1.Pod) {
	for _, f := range strings.Fields(text) {
		pods = append(pods, podOf(f))
	}
	return pods
}

func inputOf(set *appsv1.StatefulSet, pods []*corev1.Pod) input {
	return input{set: set, pods: pods, claims: map[string]*corev1.PersistentVolumeClaim{}, now: t0,
		current: revision{"old", &set.Spec.Template}, update: revision{"new", &set.Spec.Template}}
}

func text(s step) string {
	var out []string
	for _, p := range s.create {
		out = append(out, "+"+strings.TrimPrefix(p.Name, "db-")+map[string]string{"old": "", "new": "*"}[revisionOf(p)])
	}
	for _, p := range s.remove {
		out = append(out, "-"+strings.TrimPrefix(p.Name, "db-"))
	}
	return strings.Join(out, " ")
}

func TestPlan(t *testing.T) {
	for _, tc := range []struct {
		what string
		set  *appsv1.StatefulSet
		pods string
		want string
	}{
		{"the first", newSet(3), "", "+0*"},
		{"the next, once the first is ready", newSet(3), "0*", "+1*"},
		{"not before", newSet(3), "0*!", ""},
		{"not while one ends", newSet(3), "0*- 1*", ""},
		{"all at once", newSet(3, parallelSet), "", "+0* +1* +2*"},
		{"a gap is filled first", newSet(4), "0* 2*", "+1*"},
		{"ordinals start elsewhere", newSet(2, from(5)), "5*", "+6*"},
		{"what is below the start goes", newSet(2, from(1)), "0* 1* 2*", "-0"},
		{"a failed one is replaced", newSet(2), "0*x 1*", "-0"},
		{"but once", newSet(2), "0*x- 1*", ""},
		{"scaling down: the last first", newSet(1), "0* 1* 2*", "-2"},
		{"one by one", newSet(1), "0* 1* 2*-", ""},
		{"not while a lower one is down", newSet(1), "0*! 1* 2*", ""},
		{"the broken one may go, nothing else", newSet(1), "0* 1*! 2*", "-2"},
		{"of two broken ones the lower first", newSet(1), "0* 1*! 2*!", ""},
		{"all at once, down", newSet(1, parallelSet), "0*! 1* 2*", "-1 -2"},
		{"a rollout starts at the end", newSet(3), "0 1 2", "-2"},
		{"and waits for it", newSet(3), "0 1 2*!", ""},
		{"and goes on", newSet(3), "0 1 2*", "-1"},
		{"down to the partition", newSet(3, partitioned(2)), "0 1 2*", ""},
		{"a partition beyond the end", newSet(3, partitioned(9)), "0 1 2", ""},
		{"below the partition the old revision comes back", newSet(3, partitioned(2)), "0 2*", "+1"},
		{"above, the new", newSet(3, partitioned(1)), "0", "+1*"},
		{"two at a time", newSet(4, atMost("2")), "0 1 2 3", "-3 -2"},
		{"two at a time, one is down", newSet(4, parallelSet, atMost("2")), "0 1! 2 3*", "-2 -1"},
		{"a share is rounded down", newSet(5, atMost("50%")), "0 1 2 3 4", "-4 -3"},
		{"but not to none", newSet(3, atMost("1%")), "0 1 2", "-2"},
		{"on deletion only", newSet(2, onDelete), "0 1", ""},
		{"scaling goes before rolling", newSet(1), "0 1", "-1"},
		{"others of like names are left alone", newSet(1), "0* 01 007", ""},
		{"none", newSet(0), "", ""},
		{"down to none", newSet(0), "0 1", "-1"},
	} {
		t.Run(tc.what, func(t *testing.T) {
			s := plan(inputOf(tc.set, podsOf(tc.pods)))
			got := strings.Fields(text(s))
			want := strings.Fields(tc.want)
			slices.Sort(got)
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("got %v, want %v", got, want)
			}
		})
	}
	gone := newSet(3)
	gone.DeletionTimestamp = &metav1.Time{Time: t0}
	if s := plan(inputOf(gone, nil)); text(s) != "" {
		t.Errorf("a set that is being deleted does %q", text(s))
	}
	slow := newSet(2)
	slow.Spec.MinReadySeconds = 90
	if s := plan(inputOf(slow, podsOf("0*"))); text(s) != "" || s.again != 30*time.Second {
		t.Errorf("a pod that is ready for 60 of 90 s: %q, again in %v", text(s), s.again)
	}
}

func TestNewPod(t *testing.T) {
	set := newSet(3, claiming("Retain", "Retain"))
	set.Spec.Template.Spec.Volumes = []corev1.Volume{{Name: "data"}, {Name: "tmp"}}
	s := plan(inputOf(set, podsOf("0* 1*")))
	pod := s.create[0]
	if pod.Name != "db-2" || pod.Spec.Hostname != "db-2" || pod.Spec.Subdomain != "db" || pod.Labels["apps.kubernetes.io/pod-index"] != "2" ||
		pod.Labels["statefulset.kubernetes.io/pod-name"] != "db-2" || pod.Labels["controller-revision-hash"] != "new" || set.Spec.Template.Labels["controller-revision-hash"] != "" {
		t.Errorf("pod %+v", pod)
	}
	if v := pod.Spec.Volumes; len(v) != 2 || v[0].PersistentVolumeClaim.ClaimName != "data-db-2" || v[1].Name != "tmp" {
		t.Errorf("volumes %+v", v)
	}
	if len(s.claims) != 1 || s.claims[0].Name != "data-db-2" || s.claims[0].Labels["app"] != "db" || s.claims[0].OwnerReferences != nil {
		t.Errorf("claims %+v", s.claims)
	}
}

func TestOwnersOfClaims(t *testing.T) {
	other := metav1.OwnerReference{APIVersion: "v1", Kind: "ConfigMap", Name: "x", UID: "x"}
	boss := metav1.OwnerReference{APIVersion: "v1", Kind: "Other", Name: "x", UID: "x", Controller: new(true)}
	formerPod := metav1.OwnerReference{APIVersion: "v1", Kind: "Pod", Name: "db-1", UID: "former"}
	const retain, drop = appsv1.RetainPersistentVolumeClaimRetentionPolicyType, appsv1.DeletePersistentVolumeClaimRetentionPolicyType
	setRef, podRef := *metav1.NewControllerRef(newSet(0), kind), *metav1.NewControllerRef(podOf("1"), podKind)
	for _, tc := range []struct {
		what            string
		deleted, scaled appsv1.PersistentVolumeClaimRetentionPolicyType
		replicas        int32
		have, want      []metav1.OwnerReference
	}{
		{"retain", retain, retain, 2, []metav1.OwnerReference{other}, []metav1.OwnerReference{other}},
		{"retain again", retain, retain, 2, []metav1.OwnerReference{other, setRef}, []metav1.OwnerReference{other}},
		{"with the set", drop, retain, 2, []metav1.OwnerReference{other}, []metav1.OwnerReference{other, setRef}},
		{"with the set, scaled down", drop, retain, 1, nil, []metav1.OwnerReference{setRef}},
		{"when scaled, not yet", retain, drop, 2, nil, nil},
		{"when scaled", retain, drop, 1, nil, []metav1.OwnerReference{podRef}},
		{"both, not yet", drop, drop, 2, []metav1.OwnerReference{podRef}, []metav1.OwnerReference{setRef}},
		{"both, scaled", drop, drop, 1, []metav1.OwnerReference{setRef}, []metav1.OwnerReference{podRef}},
		{"another's", drop, drop, 2, []metav1.OwnerReference{boss}, []metav1.OwnerReference{boss}},
		{"of a pod that is gone", drop, drop, 2, []metav1.OwnerReference{formerPod}, []metav1.OwnerReference{formerPod}},
	} {
		set := newSet(tc.replicas, claiming(tc.deleted, tc.scaled))
		got := owners(&corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{OwnerReferences: tc.have}}, set, podOf("1"), 1)
		if fmt.Sprint(refs(got)) != fmt.Sprint(refs(tc.want)) {
			t.Errorf("%s: %v, want %v", tc.what, refs(got), refs(tc.want))
		}
	}
	set := newSet(2, claiming(retain, drop))
	in := inputOf(set, podsOf("0*"))
	in.claims["data-db-1"] = &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Name: "data-db-1", OwnerReferences: []metav1.OwnerReference{formerPod}}}
	if s := plan(in); text(s) != "" || s.again == 0 {
		t.Errorf("with a claim that is about to go: %q, again in %v", text(s), s.again)
	}
}

func refs(rs []metav1.OwnerReference) (out []string) {
	for _, r := range rs {
		out = append(out, r.Kind+"/"+string(r.UID))
	}
	return out
}

// TestRandomHistories plays plan against a world in which pods become ready,
// fail, vanish and end at random, while the set is scaled and rolled out.
func TestRandomHistories(t *testing.T) {
	for seed := range uint64(300) {
		if err := play(seed); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
}

func play(seed uint64) error {
	rnd := rand.New(rand.NewPCG(seed, 1))
	edits := []func(*appsv1.StatefulSet){from(rnd.Int32N(3)), partitioned(rnd.Int32N(3))}
	limit := 1
	if rnd.IntN(2) == 0 {
		limit = 1 + rnd.IntN(3)
		edits = append(edits, parallelSet, atMost(fmt.Sprint(limit)))
	}
	set := newSet(rnd.Int32N(6), edits...)
	pods := map[string]*corev1.Pod{}
	rev := 1
	in := func() input {
		i := inputOf(set, nil)
		for _, p := range pods {
			i.pods = append(i.pods, p)
		}
		i.current, i.update = revision{set.Status.CurrentRevision, &set.Spec.Template}, revision{fmt.Sprint("r", rev), &set.Spec.Template}
		if i.current.name == "" {
			i.current.name = i.update.name
		}
		return i
	}
	tick := func(quiet bool) error {
		i := in()
		s := plan(i)
		if set.Spec.PodManagementPolicy == appsv1.OrderedReadyPodManagement && len(s.create)+len(s.remove) > 1 {
			return fmt.Errorf("%d creations and %d deletions in one ordered step", len(s.create), len(s.remove))
		}
		down, rolled := 0, 0
		for _, p := range pods {
			if at, _ := ordinal(set, p.Name); inRange(set, at) && (p.DeletionTimestamp != nil || p.Status.Phase != corev1.PodRunning || p.Status.Conditions[0].Status != corev1.ConditionTrue) {
				down++
			}
		}
		for _, p := range s.remove {
			if at, _ := ordinal(set, p.Name); inRange(set, at) && p.Status.Phase == corev1.PodRunning && p.Status.Conditions[0].Status == corev1.ConditionTrue {
				rolled++
			}
		}
		if rolled > 0 && rolled+down > limit {
			return fmt.Errorf("takes down %d of the pods that work while %d do not, allowed are %d", rolled, down, limit)
		}
		for _, p := range s.create {
			at, _ := ordinal(set, p.Name)
			if pods[p.Name] != nil {
				return fmt.Errorf("a second %s", p.Name)
			}
			for o := start(set); set.Spec.PodManagementPolicy == appsv1.OrderedReadyPodManagement && o < at; o++ {
				if q := pods[podName(set, o)]; q == nil || q.DeletionTimestamp != nil || q.Status.Phase != corev1.PodRunning || q.Status.Conditions[0].Status != corev1.ConditionTrue {
					return fmt.Errorf("%s is created before %s is ready", p.Name, podName(set, o))
				}
			}
			made := podOf(strings.TrimPrefix(p.Name, "db-") + "?")
			made.Labels = p.Labels
			pods[p.Name] = made
		}
		for _, p := range s.remove {
			p.DeletionTimestamp = &metav1.Time{Time: t0}
		}
		set.Status = newStatus(i, s, nil)
		for n, p := range pods {
			switch {
			case p.DeletionTimestamp != nil && (quiet || rnd.IntN(2) == 0):
				delete(pods, n)
			case p.Status.Phase == corev1.PodPending && (quiet || rnd.IntN(2) == 0):
				p.Status = podOf("0").Status
			case quiet:
				if p.Status.Phase == corev1.PodRunning {
					p.Status = podOf("0").Status
				}
			case rnd.IntN(20) == 0:
				p.Status = podOf("0!").Status
			case rnd.IntN(30) == 0:
				p.Status = podOf("0x").Status
			case rnd.IntN(30) == 0:
				delete(pods, n)
			}
		}
		return nil
	}
	for range 200 {
		switch rnd.IntN(12) {
		case 0:
			n := rnd.Int32N(6)
			set.Spec.Replicas = &n
		case 1:
			rev++
		}
		if err := tick(false); err != nil {
			return err
		}
	}
	for range 100 {
		if err := tick(true); err != nil {
			return err
		}
	}
	if len(pods) != int(*set.Spec.Replicas) {
		return fmt.Errorf("%d pods in the end, want %d", len(pods), *set.Spec.Replicas)
	}
	for _, p := range pods {
		at, _ := ordinal(set, p.Name)
		if at-start(set) >= partition(set) && revisionOf(p) != fmt.Sprint("r", rev) {
			return fmt.Errorf("%s has revision %s in the end, want r%d", p.Name, revisionOf(p), rev)
		}
	}
	if s := plan(in()); text(s) != "" {
		return fmt.Errorf("does %q though all is done", text(s))
	}
	return nil
}

func firstName(set *appsv1.StatefulSet) string {
	return history.Name(set.Name, history.Hash(&set.Spec.Template, nil))
}

// A set of any size makes so many pods a step, and no more while too many have no node.
func TestALargeSetGrowsInBoundedSteps(t *testing.T) {
	set, rev := newSet(1000000, parallelSet), revision{"r", nil}
	in := input{set: set, now: t0}
	rev.template = &set.Spec.Template
	in.current, in.update = rev, rev
	if got := plan(in).create; len(got) != burst || got[0].Name != "db-0" || got[burst-1].Name != fmt.Sprintf("db-%d", burst-1) {
		t.Errorf("%d pods in the first step", len(got))
	}
	for i := range controller.MaxWaiting - 7 {
		in.pods = append(in.pods, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: fmt.Sprintf("db-%d", i)}, Status: corev1.PodStatus{Phase: corev1.PodPending}})
	}
	if got := plan(in).create; len(got) != 7 {
		t.Errorf("%d pods beside %d that wait", len(got), len(in.pods))
	}
}
