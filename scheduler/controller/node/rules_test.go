package node

import (
	"fmt"
	"net/netip"
	"reflect"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skein.io/skein/scheduler/controller"
)

func TestPaceOf(t *testing.T) {
	free, dark, slow, stop := Pace{}, Pace{Every: 10 * time.Second}, Pace{Every: 100 * time.Second}, Pace{Stop: true}
	for _, tc := range []struct {
		name  string
		zones map[string]ZoneCount
		want  map[string]Pace
	}{
		{"nothing", nil, map[string]Pace{}},
		{"one of three", map[string]ZoneCount{"": {2, 1}}, map[string]Pace{"": free}},
		{"two of three: few may always be lost", map[string]ZoneCount{"": {1, 2}}, map[string]Pace{"": free}},
		{"two of five", map[string]ZoneCount{"": {3, 2}}, map[string]Pace{"": free}},
		{"three of five: a partition", map[string]ZoneCount{"": {2, 3}}, map[string]Pace{"": stop}},
		{"three of six: below the fraction", map[string]ZoneCount{"": {3, 3}}, map[string]Pace{"": free}},
		{"large zone goes on slowly", map[string]ZoneCount{"": {20, 31}}, map[string]Pace{"": slow}},
		{"just not large", map[string]ZoneCount{"": {20, 30}}, map[string]Pace{"": stop}},
		{"a dark zone among live ones", map[string]ZoneCount{"a": {0, 5}, "b": {5, 0}}, map[string]Pace{"a": dark, "b": free}},
		{"one node a zone, one lost", map[string]ZoneCount{"a": {0, 1}, "b": {1, 0}, "c": {1, 0}}, map[string]Pace{"a": dark, "b": free, "c": free}},
		{"everything lost: the fault is here", map[string]ZoneCount{"a": {0, 2}, "b": {0, 1}}, map[string]Pace{"a": stop, "b": stop}},
		{"the only node", map[string]ZoneCount{"": {0, 1}}, map[string]Pace{"": stop}},
		{"partition beside a healthy zone", map[string]ZoneCount{"a": {1, 4}, "b": {5, 0}}, map[string]Pace{"a": stop, "b": free}},
	} {
		if got := PaceOf(tc.zones, Settings{}); !reflect.DeepEqual(got, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
}

func TestBrakeTakesGrantsBack(t *testing.T) {
	b := newBrake(DefaultSettings())
	now := time.Unix(1000, 0)
	b.set(map[string]ZoneCount{"z": {4, 1}}, now)
	if ok, _ := b.allow("z", "n1", now); !ok {
		t.Fatal("the loss of one of five must be free")
	}
	if changed := b.set(map[string]ZoneCount{"z": {2, 3}}, now); len(changed) != 1 || changed[0] != "z" {
		t.Fatalf("changed %v", changed)
	}
	if ok, wait := b.allow("z", "n1", now); ok || wait != 0 {
		t.Errorf("allowed %v, wait %v under a partition", ok, wait)
	}
	if changed := b.set(map[string]ZoneCount{"z": {2, 3}}, now); len(changed) != 0 {
		t.Errorf("the same count changed %v", changed)
	}
	b.set(map[string]ZoneCount{"z": {4, 1}}, now)
	if ok, _ := b.allow("z", "n1", now); !ok {
		t.Error("not allowed when the zone is back")
	}
}

func TestGrantsFromBeforeAStopDoNotSkipThePace(t *testing.T) {
	b := newBrake(DefaultSettings())
	now := time.Unix(1000, 0)
	b.set(map[string]ZoneCount{"z": {4, 2}, "y": {1, 0}}, now)
	b.allow("z", "n1", now)
	b.allow("z", "n2", now)
	b.set(map[string]ZoneCount{"z": {1, 5}, "y": {1, 0}}, now) // stop
	b.set(map[string]ZoneCount{"z": {0, 6}, "y": {1, 0}}, now) // dark
	later := now.Add(time.Hour)
	if ok, _ := b.allow("z", "n1", later); !ok {
		t.Error("the first must go at once")
	}
	if ok, _ := b.allow("z", "n2", later); ok {
		t.Error("the second skipped the pace")
	}
}

// The nodes of a zone are found lost one after the other: those that were let through before it was dark wait for their turn.
func TestADarkZoneTakesGrantsBack(t *testing.T) {
	b := newBrake(DefaultSettings())
	now := time.Unix(1000, 0)
	for lost := 1; lost <= 3; lost++ {
		b.set(map[string]ZoneCount{"a": {3 - lost, lost}, "b": {2, 0}}, now)
		b.allow("a", fmt.Sprintf("n%d", lost), now)
	}
	through := 0
	for i := range 31 {
		now = now.Add(time.Second)
		before := through
		for _, n := range []string{"n1", "n2", "n3"} {
			if had := b.has(n); !had {
				if ok, _ := b.allow("a", n, now); ok {
					through++
				}
			}
		}
		if through-before > 1 || through > (i+1)/10 {
			t.Fatalf("%d nodes after %d s", through, i+1)
		}
	}
	if through != 3 {
		t.Errorf("%d nodes after 31 s", through)
	}
}

func TestBrakePacesADarkZone(t *testing.T) {
	b := newBrake(DefaultSettings())
	now := time.Unix(1000, 0)
	b.set(map[string]ZoneCount{"a": {0, 3}, "b": {3, 0}}, now)
	if ok, _ := b.allow("a", "n1", now); !ok {
		t.Error("the first must go at once")
	}
	if ok, wait := b.allow("a", "n2", now.Add(4*time.Second)); ok || wait != 6*time.Second {
		t.Errorf("second: allowed %v, wait %v", ok, wait)
	}
	if ok, _ := b.allow("a", "n1", now.Add(5*time.Second)); !ok {
		t.Error("a grant stands")
	}
	if ok, _ := b.allow("a", "n2", now.Add(10*time.Second)); !ok {
		t.Error("the second must go after the pace")
	}
}

func TestAllocator(t *testing.T) {
	a := newAllocator(netip.MustParsePrefix("10.244.0.0/16"))
	if a.total != 256 {
		t.Fatalf("%d networks, want 256", a.total)
	}
	a.take("old", []netip.Prefix{netip.MustParsePrefix("10.244.0.0/24")})
	if clash := a.take("twin", []netip.Prefix{netip.MustParsePrefix("10.244.0.0/24")}); len(clash) != 1 || clash[0] != "old" {
		t.Errorf("clash %v", clash)
	}
	a.take("wide", []netip.Prefix{netip.MustParsePrefix("10.244.2.0/23")}) // covers .2 and .3
	seen := map[netip.Prefix]bool{}
	for i := range 256 - 3 {
		name := fmt.Sprintf("n%d", i)
		p, err := a.allocate(name)
		if err != nil {
			t.Fatalf("%d: %v", i, err)
		}
		if again, _ := a.allocate(name); again != p {
			t.Errorf("%s got %s, then %s", name, p, again)
		}
		if seen[p] || p.Overlaps(netip.MustParsePrefix("10.244.2.0/23")) || p.Overlaps(netip.MustParsePrefix("10.244.0.0/24")) || p.Bits() != 24 {
			t.Errorf("%s is taken", p)
		}
		seen[p] = true
	}
	if p, err := a.allocate("more"); err == nil {
		t.Fatalf("got %s of a full range", p)
	}
	a.release("n7")
	if _, err := a.allocate("more"); err != nil {
		t.Errorf("after a release: %v", err)
	}
}

func TestAllocatorRestsFreedNetworks(t *testing.T) {
	a := newAllocator(netip.MustParsePrefix("10.0.0.0/22"))
	first, _ := a.allocate("a")
	a.release("a")
	if second, _ := a.allocate("b"); second == first {
		t.Errorf("%s was given again at once", second)
	}
	six := newAllocator(netip.MustParsePrefix("fd00:10::/56"))
	p, err := six.allocate("a")
	q, err2 := six.allocate("b")
	if err != nil || err2 != nil || p.String() != "fd00:10::/64" || q.String() != "fd00:10:0:1::/64" {
		t.Errorf("%v %v %v %v", p, q, err, err2)
	}
}

func seconds(n int64) *int64 { return &n }

func TestEvictAt(t *testing.T) {
	t0 := time.Unix(1000, 0)
	unreachable := corev1.Taint{Key: corev1.TaintNodeUnreachable, Effect: corev1.TaintEffectNoExecute}
	other := corev1.Taint{Key: "example.com/x", Value: "v", Effect: corev1.TaintEffectNoExecute}
	noSchedule := corev1.Taint{Key: "example.com/y", Effect: corev1.TaintEffectNoSchedule}
	exists := func(key string, s *int64) corev1.Toleration {
		return corev1.Toleration{Key: key, Operator: corev1.TolerationOpExists, TolerationSeconds: s}
	}
	for _, tc := range []struct {
		name        string
		tolerations []corev1.Toleration
		taints      []corev1.Taint
		want        time.Duration // after t0; -1: stays
	}{
		{"no taint", nil, nil, -1},
		{"only NoSchedule", nil, []corev1.Taint{noSchedule}, -1},
		{"untolerated goes at once", nil, []corev1.Taint{unreachable}, 0},
		{"tolerated for 10 s", []corev1.Toleration{exists(corev1.TaintNodeUnreachable, seconds(10))}, []corev1.Taint{unreachable}, 10 * time.Second},
		{"tolerated for ever", []corev1.Toleration{exists(corev1.TaintNodeUnreachable, nil)}, []corev1.Taint{unreachable}, -1},
		{"everything for ever", []corev1.Toleration{exists("", nil)}, []corev1.Taint{unreachable, other}, -1},
		{"zero and less", []corev1.Toleration{exists(corev1.TaintNodeUnreachable, seconds(-5))}, []corev1.Taint{unreachable}, 0},
		{"the shortest decides", []corev1.Toleration{exists(corev1.TaintNodeUnreachable, seconds(300)), exists("example.com/x", seconds(20))}, []corev1.Taint{unreachable, other}, 20 * time.Second},
		{"one of two untolerated", []corev1.Toleration{exists(corev1.TaintNodeUnreachable, seconds(300))}, []corev1.Taint{unreachable, other}, 0},
		{"value must match", []corev1.Toleration{{Key: "example.com/x", Value: "w"}}, []corev1.Taint{other}, 0},
		{"value matches", []corev1.Toleration{{Key: "example.com/x", Value: "v"}}, []corev1.Taint{other}, -1},
		{"effect must match", []corev1.Toleration{{Key: "example.com/x", Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoSchedule}}, []corev1.Taint{other}, 0},
	} {
		at, due := EvictAt(tc.tolerations, tc.taints, func(*corev1.Taint) time.Time { return t0 })
		got := time.Duration(-1)
		if due {
			got = at.Sub(t0)
		}
		if got != tc.want {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
}

func ready(status corev1.ConditionStatus) corev1.NodeCondition {
	return corev1.NodeCondition{Type: corev1.NodeReady, Status: status}
}

func TestJudgeAndTaints(t *testing.T) {
	now := time.Unix(5000, 0)
	long := now.Add(-time.Hour)
	taintKeys := func(taints []corev1.Taint) (out []string) {
		for _, x := range taints {
			out = append(out, x.Key+":"+string(x.Effect))
		}
		return out
	}
	const (
		nr, un = corev1.TaintNodeNotReady, corev1.TaintNodeUnreachable
		ns, ne = ":NoSchedule", ":NoExecute"
	)
	for _, tc := range []struct {
		name    string
		conds   []corev1.NodeCondition
		state   controller.HealthState
		beat    time.Time
		cordon  bool
		evict   bool
		fate    fate
		evicts  bool
		taints  []string
		written int // conditions
	}{
		{name: "alive and ready", conds: []corev1.NodeCondition{ready("True")}, state: controller.Alive},
		{name: "suspect still speaks for itself", conds: []corev1.NodeCondition{ready("True")}, state: controller.Suspect},
		{name: "alive, never reported", state: controller.Alive, taints: []string{nr + ns}},
		{name: "alive, not ready", conds: []corev1.NodeCondition{ready("False")}, state: controller.Alive, evict: true, evicts: true, taints: []string{nr + ns, nr + ne}},
		{name: "back, its agent has not spoken yet", conds: []corev1.NodeCondition{ready("Unknown")}, state: controller.Alive, evict: true, taints: []string{un + ns}},
		{name: "dead", conds: []corev1.NodeCondition{ready("True")}, state: controller.Dead, evict: true, fate: lost, evicts: true, taints: []string{un + ns, un + ne}, written: 4},
		{name: "dead, braked", conds: []corev1.NodeCondition{ready("True")}, state: controller.Dead, fate: lost, evicts: true, taints: []string{un + ns}, written: 4},
		{name: "dead, said already", conds: []corev1.NodeCondition{ready("Unknown"), {Type: corev1.NodeMemoryPressure, Status: "Unknown"}, {Type: corev1.NodeDiskPressure, Status: "Unknown"}, {Type: corev1.NodePIDPressure, Status: "Unknown"}}, state: controller.Dead, evict: true, fate: lost, evicts: true, taints: []string{un + ns, un + ne}},
		{name: "left", conds: []corev1.NodeCondition{ready("True")}, state: controller.Left, evict: true, fate: left, evicts: true, taints: []string{un + ns, un + ne}, written: 4},
		{name: "unknown to gossip, fresh heartbeat", conds: []corev1.NodeCondition{ready("True")}, beat: now.Add(-49 * time.Second)},
		{name: "unknown to gossip, stale", conds: []corev1.NodeCondition{ready("True")}, beat: now.Add(-50 * time.Second), evict: true, fate: lost, evicts: true, taints: []string{un + ns, un + ne}, written: 4},
		{name: "unknown to gossip, never reported, young", beat: now.Add(-55 * time.Second), taints: []string{nr + ns}},
		{name: "cordoned and under pressure", conds: []corev1.NodeCondition{ready("True"), {Type: corev1.NodeMemoryPressure, Status: "True"}, {Type: corev1.NodePIDPressure, Status: "True"}}, state: controller.Alive, cordon: true,
			taints: []string{corev1.TaintNodeUnschedulable + ns, corev1.TaintNodeMemoryPressure + ns, corev1.TaintNodePIDPressure + ns}},
	} {
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}, Spec: corev1.NodeSpec{Unschedulable: tc.cordon}, Status: corev1.NodeStatus{Conditions: tc.conds}}
		beat := tc.beat
		if beat.IsZero() {
			beat = long
		}
		j := judge(n, controller.NodeHealth{State: tc.state, Since: long}, beat, DefaultSettings(), now)
		if j.fate != tc.fate || j.evicts() != tc.evicts {
			t.Errorf("%s: fate %v evicts %v, want %v %v", tc.name, j.fate, j.evicts(), tc.fate, tc.evicts)
		}
		got, changed := desiredTaints(n, j, tc.evict, now)
		if !reflect.DeepEqual(taintKeys(got), tc.taints) || changed != (len(tc.taints) > 0) {
			t.Errorf("%s: taints %v changed %v, want %v", tc.name, taintKeys(got), changed, tc.taints)
		}
		if cs := lostConditions(n, j, now); len(cs) != tc.written {
			t.Errorf("%s: %d conditions written, want %d: %v", tc.name, len(cs), tc.written, cs)
		}
		n.Spec.Taints = append([]corev1.Taint{{Key: "example.com/own", Effect: corev1.TaintEffectNoSchedule}}, got...)
		if again, changed := desiredTaints(n, j, tc.evict, now.Add(time.Hour)); changed {
			t.Errorf("%s: written again: %v", tc.name, again)
		} else if len(again) != len(got)+1 || again[0].Key != "example.com/own" {
			t.Errorf("%s: somebody's own taint was touched: %v", tc.name, again)
		}
	}
}

func TestSettingsReportAllFaults(t *testing.T) {
	if err := (Settings{}).Validate(); err != nil {
		t.Errorf("defaults: %v", err)
	}
	err := Settings{CheckEvery: -1, UnhealthyFraction: 2, Workers: -1}.Validate()
	if err == nil || len(err.(interface{ Unwrap() []error }).Unwrap()) != 3 {
		t.Errorf("want three faults, got %v", err)
	}
}
