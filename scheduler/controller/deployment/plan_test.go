package deployment

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
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

	"skein.io/skein/scheduler/controller/history"
)

var t0 = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func deployment(replicas int32, surge, unavailable string) *appsv1.Deployment {
	l := map[string]string{"app": "web"}
	s, u := intstr.Parse(surge), intstr.Parse(unavailable)
	return &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "dep", Generation: 1, ResourceVersion: "5"},
		Spec: appsv1.DeploymentSpec{
			Replicas: &replicas,
			Selector: &metav1.LabelSelector{MatchLabels: l},
			Template: template("1"),
			Strategy: appsv1.DeploymentStrategy{Type: appsv1.RollingUpdateDeploymentStrategyType,
				RollingUpdate: &appsv1.RollingUpdateDeployment{MaxSurge: &s, MaxUnavailable: &u}},
			RevisionHistoryLimit:    new(int32(2)),
			ProgressDeadlineSeconds: new(int32(600)),
		},
	}
}

func recreate(d *appsv1.Deployment) *appsv1.Deployment {
	d.Spec.Strategy = appsv1.DeploymentStrategy{Type: appsv1.RecreateDeploymentStrategyType}
	return d
}

func template(version string) corev1.PodTemplateSpec {
	return corev1.PodTemplateSpec{
		ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "web"}},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "i:" + version}}},
	}
}

// rs makes a ReplicaSet of d for a template's version with so many pods wanted and available.
func rs(d *appsv1.Deployment, version string, wanted, available int32, desired int32) *appsv1.ReplicaSet {
	t := template(version)
	t.Labels = maps.Clone(t.Labels)
	t.Labels[appsv1.DefaultDeploymentUniqueLabelKey] = "h" + version
	surge, _ := limits(d)
	return &appsv1.ReplicaSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web-" + version, UID: types.UID("rs-" + version), Generation: 1,
			CreationTimestamp: metav1.NewTime(t0.Add(time.Duration(version[0]) * time.Minute)),
			Annotations:       map[string]string{annRevision: version, annDesired: fmt.Sprint(desired), annMax: fmt.Sprint(desired + surge)}},
		Spec:   appsv1.ReplicaSetSpec{Replicas: &wanted, Template: t},
		Status: appsv1.ReplicaSetStatus{Replicas: wanted, ReadyReplicas: available, AvailableReplicas: available, ObservedGeneration: 1, TerminatingReplicas: new(int32)},
	}
}

// text writes a step down: +name=size for a creation, name=size, -name.
func text(s step) string {
	var out []string
	if s.create != nil {
		out = append(out, fmt.Sprintf("+%s=%d", s.create.Spec.Template.Spec.Containers[0].Image, *s.create.Spec.Replicas))
	}
	for _, u := range s.update {
		if *u.old.Spec.Replicas != *u.cur.Spec.Replicas {
			out = append(out, fmt.Sprintf("%s=%d", u.cur.Name, *u.cur.Spec.Replicas))
		}
	}
	for _, r := range s.remove {
		out = append(out, "-"+r.Name)
	}
	return strings.Join(out, " ")
}

func TestPlanSteps(t *testing.T) {
	type sets = []*appsv1.ReplicaSet
	at := func(d *appsv1.Deployment, version string) *appsv1.Deployment {
		d.Spec.Template = template(version)
		return d
	}
	dep := deployment
	for _, tc := range []struct {
		what string
		d    *appsv1.Deployment
		sets func(d *appsv1.Deployment) sets
		pods map[types.UID][]*corev1.Pod
		want string
	}{
		{"first", dep(3, "1", "0"), func(d *appsv1.Deployment) sets { return nil }, nil, "+i:1=3"},
		{"settled", dep(3, "1", "0"), func(d *appsv1.Deployment) sets { return sets{rs(d, "1", 3, 3, 3)} }, nil, ""},
		{"new template, surge 1", at(dep(3, "1", "0"), "2"), func(d *appsv1.Deployment) sets { return sets{rs(d, "1", 3, 3, 3)} }, nil, "+i:2=1"},
		{"new template, no surge: empty set and old down", at(dep(4, "0", "25%"), "2"), func(d *appsv1.Deployment) sets { return sets{rs(d, "1", 4, 4, 4)} }, nil, "+i:2=0 web-1=3"},
		{"then old down", at(dep(4, "0", "25%"), "2"), func(d *appsv1.Deployment) sets { return sets{rs(d, "1", 4, 4, 4), rs(d, "2", 0, 0, 4)} }, nil, "web-1=3"},
		{"then new up", at(dep(4, "0", "25%"), "2"), func(d *appsv1.Deployment) sets { return sets{rs(d, "1", 3, 3, 4), rs(d, "2", 0, 0, 4)} }, nil, "web-2=1"},
		{"wait for the new pod", at(dep(3, "1", "0"), "2"), func(d *appsv1.Deployment) sets { return sets{rs(d, "1", 3, 3, 3), rs(d, "2", 1, 0, 3)} }, nil, ""},
		{"old one down", at(dep(3, "1", "0"), "2"), func(d *appsv1.Deployment) sets { return sets{rs(d, "1", 3, 3, 3), rs(d, "2", 1, 1, 3)} }, nil, "web-1=2"},
		{"a set that is about to shrink", at(dep(6, "2", "1"), "2"), func(d *appsv1.Deployment) sets { return sets{rs(d, "1", 4, 5, 6), rs(d, "2", 4, 2, 6)} }, nil, "web-1=3"},
		{"both round to zero: unavailable 1", at(dep(3, "0%", "25%"), "2"), func(d *appsv1.Deployment) sets { return sets{rs(d, "1", 3, 3, 3), rs(d, "2", 0, 0, 3)} }, nil, "web-1=2"},
		{"broken old pods go first", at(dep(10, "3", "2"), "3"), func(d *appsv1.Deployment) sets {
			return sets{rs(d, "1", 8, 8, 10), rs(d, "2", 5, 0, 10), rs(d, "3", 0, 0, 10)}
		}, nil, "web-2=0"},
		{"case 1 of upstream: a node fails in a stuck rollout", at(dep(10, "3", "2"), "2"), func(d *appsv1.Deployment) sets { return sets{rs(d, "1", 8, 7, 10), rs(d, "2", 5, 0, 10)} }, nil, ""},
		{"case 1 of upstream: and is rolled back", dep(10, "3", "2"), func(d *appsv1.Deployment) sets { return sets{rs(d, "1", 8, 7, 10), rs(d, "2", 5, 0, 10)} }, nil, "web-2=1"},
		{"scale up", dep(5, "1", "0"), func(d *appsv1.Deployment) sets { return sets{rs(d, "1", 3, 3, 3)} }, nil, "web-1=5"},
		{"scale to zero", dep(0, "1", "0"), func(d *appsv1.Deployment) sets { return sets{rs(d, "1", 3, 3, 3)} }, nil, "web-1=0"},
		{"scale and new template: scale first", at(dep(5, "1", "0"), "2"), func(d *appsv1.Deployment) sets { return sets{rs(d, "1", 3, 3, 3)} }, nil, "web-1=5"},
		{"scale up in mid-rollout, in proportion", at(dep(20, "5", "2"), "2"), func(d *appsv1.Deployment) sets { return sets{rs(d, "1", 8, 8, 10), rs(d, "2", 7, 5, 10)} }, nil, "web-1=13 web-2=12"},
		{"scale down in mid-rollout, in proportion", at(dep(5, "5", "2"), "2"), func(d *appsv1.Deployment) sets { return sets{rs(d, "1", 8, 8, 10), rs(d, "2", 7, 5, 10)} }, nil, "web-1=5 web-2=5"},
		{"scale to zero in mid-rollout", at(dep(0, "5", "2"), "2"), func(d *appsv1.Deployment) sets { return sets{rs(d, "1", 8, 8, 10), rs(d, "2", 7, 5, 10)} }, nil, "web-1=0 web-2=0"},
		{"paused: no new set", func() *appsv1.Deployment { d := at(dep(3, "1", "0"), "2"); d.Spec.Paused = true; return d }(), func(d *appsv1.Deployment) sets { return sets{rs(d, "1", 3, 3, 3)} }, nil, ""},
		{"paused: but scaled", func() *appsv1.Deployment { d := at(dep(6, "1", "0"), "2"); d.Spec.Paused = true; return d }(), func(d *appsv1.Deployment) sets { return sets{rs(d, "1", 3, 3, 3)} }, nil, "web-1=6"},
		{"recreate: old down first", recreate(at(dep(3, "1", "0"), "2")), func(d *appsv1.Deployment) sets { return sets{rs(d, "1", 3, 3, 3)} }, nil, "web-1=0"},
		{"recreate: old pods still end", recreate(at(dep(3, "1", "0"), "2")), func(d *appsv1.Deployment) sets { return sets{rs(d, "1", 0, 0, 3)} },
			map[types.UID][]*corev1.Pod{"rs-1": {{}}}, ""},
		{"recreate: old pods have ended", recreate(at(dep(3, "1", "0"), "2")), func(d *appsv1.Deployment) sets { return sets{rs(d, "1", 0, 0, 3)} },
			map[types.UID][]*corev1.Pod{"rs-1": {{Status: corev1.PodStatus{Phase: corev1.PodSucceeded}}}}, "+i:2=3"},
		{"recreate: scaled", recreate(dep(5, "1", "0")), func(d *appsv1.Deployment) sets { return sets{rs(d, "1", 3, 3, 3)} }, nil, "web-1=5"},
		{"deleted: nothing", func() *appsv1.Deployment {
			d := at(dep(3, "1", "0"), "2")
			d.DeletionTimestamp = &metav1.Time{Time: t0}
			return d
		}(), func(d *appsv1.Deployment) sets { return sets{rs(d, "1", 3, 3, 3)} }, nil, ""},
		{"history beyond the limit", func() *appsv1.Deployment {
			d := at(dep(3, "1", "0"), "9")
			d.Status = appsv1.DeploymentStatus{Replicas: 3, UpdatedReplicas: 3, AvailableReplicas: 3, ObservedGeneration: 1}
			return d
		}(), func(d *appsv1.Deployment) sets {
			return sets{rs(d, "3", 0, 0, 3), rs(d, "1", 0, 0, 3), rs(d, "2", 0, 0, 3), rs(d, "4", 0, 0, 3), rs(d, "9", 3, 3, 3)}
		}, nil, "-web-1 -web-2"},
	} {
		t.Run(tc.what, func(t *testing.T) {
			before := tc.d.DeepCopy()
			if got := text(plan(tc.d, tc.sets(tc.d), tc.pods, t0)); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
			if fmt.Sprintf("%v", before) != fmt.Sprintf("%v", tc.d) {
				t.Error("plan changed its argument")
			}
		})
	}
}

func TestRevisionsAndAnnotations(t *testing.T) {
	d := deployment(2, "1", "0")
	d.Annotations = map[string]string{"kubernetes.io/change-cause": "first", corev1.LastAppliedConfigAnnotation: "x"}
	s := plan(d, nil, nil, t0)
	if a := s.create.Annotations; a[annRevision] != "1" || a["kubernetes.io/change-cause"] != "first" || a[corev1.LastAppliedConfigAnnotation] != "" || a[annDesired] != "2" || a[annMax] != "3" {
		t.Errorf("annotations of the first set %v", a)
	}
	if got := s.deployment.Annotations[annRevision]; got != "1" {
		t.Errorf("the Deployment's revision %q", got)
	}
	if h := s.create.Labels[appsv1.DefaultDeploymentUniqueLabelKey]; h == "" || s.create.Name != "web-"+h || s.create.Spec.Selector.MatchLabels[appsv1.DefaultDeploymentUniqueLabelKey] != h || s.create.Spec.Template.Labels[appsv1.DefaultDeploymentUniqueLabelKey] != h {
		t.Errorf("the hash is not everywhere: %v", s.create)
	}
	// Going back to template 1: its set becomes revision 4 and remembers 1.
	old := []*appsv1.ReplicaSet{rs(d, "1", 0, 0, 2), rs(d, "2", 0, 0, 2), rs(d, "3", 2, 2, 2)}
	s = plan(d, old, nil, t0)
	if s.create != nil || len(s.update) != 1 {
		t.Fatalf("step %s", text(s))
	}
	if a := s.update[0].cur.Annotations; a[annRevision] != "4" || a[annHistory] != "1" {
		t.Errorf("annotations after going back %v", a)
	}
	if s.deployment.Annotations[annRevision] != "4" {
		t.Errorf("the Deployment's revision %q", s.deployment.Annotations[annRevision])
	}
}

func TestHistoryIsBounded(t *testing.T) {
	r := &appsv1.ReplicaSet{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{annRevision: "1"}}}
	for rev := int64(2); rev < 2000; rev++ {
		annotate(r, &appsv1.Deployment{}, rev)
	}
	h := r.Annotations[annHistory]
	if len(h) > maxHistory || !strings.HasSuffix(h, ",1997,1998") || strings.HasPrefix(h, ",") {
		t.Errorf("history of %d characters ends in %q", len(h), h[len(h)-20:])
	}
}

func TestHashAndName(t *testing.T) {
	a, b := template("1"), template("2")
	if history.Hash(&a, nil) == history.Hash(&b, nil) || history.Hash(&a, nil) == history.Hash(&a, new(int32(1))) || history.Hash(&a, nil) != history.Hash(&a, nil) {
		t.Error("the hash does not follow from template and collisions")
	}
	if n := history.Name(strings.Repeat("x", 253), "abc"); len(n) != 253 || !strings.HasSuffix(n, "-abc") {
		t.Errorf("name of %d characters: %s", len(n), n)
	}
}

func progressing(t *testing.T, s step) string {
	t.Helper()
	c := condition(&s.deployment.Status, appsv1.DeploymentProgressing)
	if c == nil {
		return "none"
	}
	return string(c.Status) + " " + c.Reason
}

func TestProgressAndDeadline(t *testing.T) {
	d := deployment(2, "1", "0")
	next := func(now time.Time, sets ...*appsv1.ReplicaSet) step {
		s := plan(d, sets, nil, now)
		d = s.deployment
		return s
	}
	if got := progressing(t, next(t0)); got != "True NewReplicaSetCreated" {
		t.Errorf("after creation %s", got)
	}
	s := next(t0.Add(time.Second), rs(d, "1", 2, 0, 2))
	if got := progressing(t, s); got != "True ReplicaSetUpdated" {
		t.Errorf("after the pods were made: %s", got)
	}
	if s.again != 601*time.Second {
		t.Errorf("looks at the deadline again in %v", s.again)
	}
	if got := progressing(t, next(t0.Add(601*time.Second), rs(d, "1", 2, 0, 2))); got != "True ReplicaSetUpdated" {
		t.Errorf("at the deadline: %s", got)
	}
	s = next(t0.Add(602*time.Second), rs(d, "1", 2, 0, 2))
	if got := progressing(t, s); got != "False ProgressDeadlineExceeded" || s.again != 0 {
		t.Errorf("past the deadline: %s, again in %v", got, s.again)
	}
	if c := condition(&d.Status, appsv1.DeploymentAvailable); c.Status != corev1.ConditionFalse || c.Reason != reasonTooFew {
		t.Errorf("available: %+v", c)
	}
	s = next(t0.Add(700*time.Second), rs(d, "1", 2, 2, 2))
	if got := progressing(t, s); got != "True NewReplicaSetAvailable" || s.again != 0 {
		t.Errorf("at the end: %s, again in %v", got, s.again)
	}
	// A pod lost later is no lack of progress.
	s = next(t0.Add(800*time.Second), rs(d, "1", 2, 1, 2))
	if got := progressing(t, s); got != "True NewReplicaSetAvailable" || s.again != 0 {
		t.Errorf("with a pod lost later: %s, again in %v", got, s.again)
	}
	d.Spec.Paused = true
	if got := progressing(t, next(t0.Add(900*time.Second), rs(d, "1", 2, 2, 2))); got != "Unknown DeploymentPaused" {
		t.Errorf("paused: %s", got)
	}
	d.Spec.Paused = false
	if got := progressing(t, next(t0.Add(5000*time.Second), rs(d, "1", 2, 1, 2))); got != "Unknown DeploymentResumed" {
		t.Errorf("resumed: %s", got)
	}
	d.Spec.ProgressDeadlineSeconds = nil
	if got := progressing(t, next(t0.Add(6000*time.Second), rs(d, "1", 2, 1, 2))); got != "none" {
		t.Errorf("without a deadline: %s", got)
	}
}

// A rollout is not judged by the outcome of the one before.
func TestProgressIsAboutTheRolloutOfNow(t *testing.T) {
	for _, reason := range []string{reasonAvailable, reasonTimedOut, reasonFoundNew} {
		for _, d := range []*appsv1.Deployment{deployment(2, "1", "0"), recreate(deployment(2, "1", "0"))} {
			d.Spec.Template = template("2")
			d.Status = appsv1.DeploymentStatus{Replicas: 2, UpdatedReplicas: 2, ObservedGeneration: 1, Conditions: []appsv1.DeploymentCondition{{
				Type: appsv1.DeploymentProgressing, Status: corev1.ConditionTrue, Reason: reason, Message: `ReplicaSet "web-1" was.`}}}
			next := func(now time.Time) step {
				s := plan(d, []*appsv1.ReplicaSet{rs(d, "1", 0, 0, 2), rs(d, "2", 2, 0, 2)}, nil, now)
				d = s.deployment
				return s
			}
			if s := next(t0); progressing(t, s) != "True FoundNewReplicaSet" || s.again == 0 {
				t.Errorf("%s, after %s: %s, again in %v", d.Spec.Strategy.Type, reason, progressing(t, s), s.again)
			}
			if s := next(t0.Add(601 * time.Second)); progressing(t, s) != "False ProgressDeadlineExceeded" {
				t.Errorf("%s, after %s and the deadline: %s", d.Spec.Strategy.Type, reason, progressing(t, s))
			}
		}
	}
}

func TestFailureIsPassedOn(t *testing.T) {
	d := deployment(2, "1", "0")
	r := rs(d, "1", 2, 0, 2)
	r.Status.Conditions = []appsv1.ReplicaSetCondition{{Type: appsv1.ReplicaSetReplicaFailure, Status: corev1.ConditionTrue, Reason: "FailedCreate", Message: "quota"}}
	s := plan(d, []*appsv1.ReplicaSet{r}, nil, t0)
	if c := condition(&s.deployment.Status, appsv1.DeploymentReplicaFailure); c == nil || c.Message != "quota" {
		t.Errorf("conditions %v", s.deployment.Status.Conditions)
	}
	r.Status.Conditions = nil
	s = plan(s.deployment, []*appsv1.ReplicaSet{r}, nil, t0)
	if c := condition(&s.deployment.Status, appsv1.DeploymentReplicaFailure); c != nil {
		t.Errorf("the failure stays: %v", c)
	}
	f, msg := createFailed(d, "web-x", errors.New("no"), t0)
	if c := condition(&f.Status, appsv1.DeploymentProgressing); c.Reason != reasonCreateError || c.Message != msg {
		t.Errorf("condition of a failed creation %+v", c)
	}
	if c := collided(collided(d)).Status.CollisionCount; *c != 2 {
		t.Errorf("collisions %d", *c)
	}
}

// Random strategies, edits and pod failures: the limits hold after each step,
// and every rollout ends when the pods are left alone.
func TestRolloutsKeepTheirLimits(t *testing.T) {
	for seed := range uint64(400) {
		rng := rand.New(rand.NewPCG(seed, 7))
		sim := newSim(rng)
		for range 60 {
			sim.edit()
			for range rng.IntN(6) {
				if err := sim.step(true); err != nil {
					t.Fatalf("seed %d: %v", seed, err)
				}
			}
		}
		sim.d.Spec.Paused = false
		settled := false
		for range 400 {
			before := sim.String()
			if err := sim.step(false); err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			if settled = before == sim.String(); settled {
				break
			}
		}
		if !settled || !complete(sim.d, &sim.d.Status) {
			t.Fatalf("seed %d: not complete: %s", seed, sim)
		}
		if len(sim.sets) > 1+int(*sim.d.Spec.RevisionHistoryLimit) {
			t.Fatalf("seed %d: %d sets are left", seed, len(sim.sets))
		}
	}
}

type sim struct {
	rng  *rand.Rand
	d    *appsv1.Deployment
	sets []*appsv1.ReplicaSet
	now  time.Time
	n    int
}

func (s *sim) String() string {
	b, err := json.Marshal([]any{s.d.Status, s.sets})
	if err != nil {
		return err.Error()
	}
	return string(b)
}

func newSim(rng *rand.Rand) *sim {
	s := []string{"0", "1", "25%", "3"}[rng.IntN(4)]
	u := []string{"0", "1", "25%", "3"}[rng.IntN(4)]
	return &sim{rng: rng, d: deployment(int32(rng.IntN(12)), s, u), now: t0}
}

func (s *sim) edit() {
	s.d.Generation++
	switch s.rng.IntN(5) {
	case 0:
		s.d.Spec.Replicas = new(int32(s.rng.IntN(15)))
	case 1, 2:
		s.d.Spec.Template = template(string(rune('1' + s.rng.IntN(8))))
	case 3:
		s.d.Spec.Paused = !s.d.Spec.Paused
	}
}

// step takes one step of the Deployment, then lets its sets and pods move.
func (s *sim) step(failures bool) error {
	s.now = s.now.Add(time.Second)
	surge, unavailable := limits(s.d)
	total, avail := sum(s.sets, wanted), sum(s.sets, lasting)
	// Scaling keeps proportions, not availability: what a user asks for is done at once.
	rolling := !s.d.Spec.Paused && !begin(s.d, s.sets, s.now).wasScaled()
	p := plan(s.d, s.sets, nil, s.now)
	s.d = p.deployment
	for _, u := range p.update {
		s.sets[slices.Index(s.sets, u.old)] = u.cur
		u.cur.Generation++
	}
	for _, r := range p.remove {
		if r.Status.Replicas > 0 {
			return fmt.Errorf("removed %s, which has pods", r.Name)
		}
		s.sets = slices.DeleteFunc(s.sets, func(x *appsv1.ReplicaSet) bool { return x.UID == r.UID })
	}
	if p.create != nil {
		s.n++
		p.create.UID = types.UID(fmt.Sprint("new-", s.n))
		p.create.CreationTimestamp = metav1.NewTime(s.now)
		s.sets = append(s.sets, p.create)
	}
	if err := s.check(rolling, total, avail, surge, unavailable); err != nil {
		return fmt.Errorf("%w: %s", err, text(p))
	}
	for _, r := range s.sets {
		s.movePods(r, failures)
	}
	return nil
}

// check holds what a step may do against the limits: it may raise the total to
// no more than the surge allows, and may take available pods away only down to
// the minimum.
func (s *sim) check(rolling bool, total, avail, surge, unavailable int32) error {
	now := sum(s.sets, wanted)
	if most := *s.d.Spec.Replicas + surge; now > total && now > most {
		return fmt.Errorf("%d pods wanted, before %d, at most %d", now, total, most)
	}
	left := sum(s.sets, lasting) // each set sheds pods that are not available first
	least := *s.d.Spec.Replicas - unavailable
	if rolling && left < avail && left < least {
		return fmt.Errorf("%d pods stay available of %d, at least %d must", left, avail, least)
	}
	return nil
}

func (s *sim) movePods(r *appsv1.ReplicaSet, failures bool) {
	if failures && s.rng.IntN(3) == 0 {
		return // the set's controller is late
	}
	st := &r.Status
	st.ObservedGeneration = r.Generation
	st.TerminatingReplicas = new(int32)
	st.AvailableReplicas = min(st.AvailableReplicas, *r.Spec.Replicas)
	st.Replicas = *r.Spec.Replicas
	if missing := st.Replicas - st.AvailableReplicas; missing > 0 {
		st.AvailableReplicas += s.rng.Int32N(missing) + 1
	}
	if failures && st.AvailableReplicas > 0 && s.rng.IntN(4) == 0 {
		st.AvailableReplicas--
	}
	st.ReadyReplicas = st.AvailableReplicas
}
