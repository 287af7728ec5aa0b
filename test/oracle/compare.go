package oracle

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	v1 "k8s.io/api/core/v1"

	"skein.io/skein/scheduler/placement"
)

// judge asks both about a world. One judge serves one goroutine.
type judge struct {
	upstream []*upstream          // by profile
	ours     []*placement.Profile // likewise
	tally    tally
}

// tally says how often a rule had something to say: a comparison of nothing proves nothing.
type tally struct {
	Worlds, Pods, Nodes, Unfit, Evictions, Allocations int
	Refusals, Scores                                   map[string]int
	Accepted                                           map[string]int
}

func newJudge(ctx context.Context) (*judge, error) {
	j := &judge{tally: tally{Refusals: map[string]int{}, Scores: map[string]int{}, Accepted: map[string]int{}}}
	all, err := loadProfiles()
	if err != nil {
		return nil, err
	}
	for i := range all {
		u, err := newUpstream(ctx, &all[i].upstream)
		if err != nil {
			return nil, fmt.Errorf("profile %d: %w", i, err)
		}
		j.upstream, j.ours = append(j.upstream, u), append(j.ours, all[i].ours)
	}
	return j, nil
}

// compare returns every difference that accepted.md does not allow.
func (j *judge) compare(w *world) error {
	u, profile := j.upstream[w.Profile], j.ours[w.Profile]
	if err := u.show(w); err != nil {
		return err
	}
	s, err := reach(w, j.ours)
	if err != nil {
		return err
	}
	j.tally.Worlds++
	var errs []error
	for _, pod := range w.Asked {
		if err := j.comparePod(w, u, s, profile, pod); err != nil {
			errs = append(errs, fmt.Errorf("pod %s, profile %s: %w", pod.Name, profile.Name, err))
		}
	}
	return errors.Join(errs...)
}

func (j *judge) comparePod(w *world, u *upstream, s *placement.Snapshot, profile *placement.Profile, pod *v1.Pod) error {
	want, chosen, err := u.ask(w, pod)
	if err != nil {
		return fmt.Errorf("upstream: %w", err)
	}
	got, decision, err := askOurs(w, s, profile, pod)
	if err != nil {
		return fmt.Errorf("ours: %w", err)
	}
	if want.Failed != "" {
		return j.compareFailure(want, got)
	}
	j.count(want)
	if want.Accepted != "" {
		j.tally.Accepted[want.Accepted]++
	}
	if ignoredRefused(want) {
		j.tally.Accepted["device-ignored"]++
		return nil
	}
	var errs []error
	differ := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for _, name := range slices.Sorted(maps.Keys(want.Nodes)) {
		if g, u := got.Nodes[name], want.Nodes[name]; !sameNode(&g, &u) {
			differ("%s:\n  ours     %+v\n  upstream %+v", name, g, u)
		}
	}
	if len(got.Nodes) != len(want.Nodes) {
		differ("%d nodes, upstream %d", len(got.Nodes), len(want.Nodes))
	}
	if why := misplaced(want, &decision, pod); why != "" {
		differ("%s", why)
	}
	if len(errs) > 0 && spreadsByNothing(pod) && nominatedBeside(w, pod) {
		j.tally.Accepted["spread-empty-selector"]++
		return nil
	}
	if len(errs) == 0 && decision.Node != "" {
		if err := j.compareDevices(u, &decision, pod); err != nil {
			differ("%w", err)
		}
	}
	if len(errs) > 0 && laterFailure(w, pod) {
		j.tally.Accepted["device-failed-later"]++
		return nil
	}
	if decision.Node != "" || want.Message == "" {
		return errors.Join(errs...)
	}
	if err := compareRelease(want, &decision); err != nil {
		differ("%w", err)
	}
	before := len(errs)
	if want.Eligible && !reflect.DeepEqual(got.Options, want.Options) {
		differ("evictions:\n  ours     %v\n  upstream %v", got.Options, want.Options)
	}
	evict := ""
	if decision.Preempt != nil {
		evict = decision.Preempt.Node
	}
	if evict != chosen && (evict == "" || chosen == "" || harm(w, want.Options[evict]) != harm(w, want.Options[chosen])) {
		differ("evicts on %q, upstream on %q: %v", evict, chosen, want.Options)
	}
	if got.Message != want.Message {
		differ("message:\n  ours     %s\n  upstream %s", got.Message, want.Message)
	}
	if why := j.acceptedEviction(w, pod); why != "" && len(errs) > before {
		j.tally.Accepted[why]++
		errs = errs[:before]
	}
	return errors.Join(errs...)
}

// ignoredRefused is true if DynamicResources refused for a resource that is not its own, and NodeResourcesFit is told to ignore.
func ignoredRefused(want *answer) bool {
	for _, n := range want.Nodes {
		if n.Filter == string(placement.DynamicResources) && slices.Contains(n.Reasons, "cannot fit resource") {
			return true
		}
	}
	return strings.Contains(want.Message, "cannot fit resource") // when evictions were tried
}

// compareFailure looks for the error that ends upstream's attempt among what ours says of single nodes.
func (j *judge) compareFailure(want, got *answer) error {
	for _, n := range got.Nodes {
		for _, reason := range n.Reasons {
			if n.Filter == string(placement.DynamicResources) && strings.Contains(want.Failed, reason) {
				j.tally.Accepted["device-error"]++
				return nil
			}
		}
	}
	return fmt.Errorf("upstream fails: %s\nours %v", want.Failed, got.Nodes)
}

// sameNode compares what was said about one node. Upstream iterates over extended resources in random order.
func sameNode(a, b *nodeAnswer) bool {
	slices.Sort(a.Reasons)
	slices.Sort(b.Reasons)
	return a.Filter == b.Filter && slices.Equal(a.Reasons, b.Reasons) && a.Evict == b.Evict && a.Total == b.Total && maps.Equal(a.Scores, b.Scores)
}

// misplaced tells why a decision is not one that upstream could have made: one of the nodes with the highest total, or the
// nominated one if that is feasible.
func misplaced(want *answer, d *placement.Decision, pod *v1.Pod) string {
	var best []string
	top := int64(-1)
	for name, n := range want.Nodes {
		if n.Filter != "" {
			continue
		}
		if n.Total > top {
			best, top = nil, n.Total
		}
		if n.Total == top {
			best = append(best, name)
		}
	}
	if n, ok := want.Nodes[pod.Status.NominatedNodeName]; ok && n.Filter == "" {
		best = []string{pod.Status.NominatedNodeName}
	}
	slices.Sort(best)
	if len(best) == 0 && d.Node == "" || slices.Contains(best, d.Node) {
		return ""
	}
	return fmt.Sprintf("placed on %q, upstream on one of %v", d.Node, best)
}

// acceptedEviction names the entry of accepted.md that allows other evictions for this pod.
func (j *judge) acceptedEviction(w *world, pod *v1.Pod) string {
	if w.Profile == 0 && !slices.ContainsFunc(pod.Spec.TopologySpreadConstraints, func(c v1.TopologySpreadConstraint) bool { return c.WhenUnsatisfiable == v1.DoNotSchedule }) {
		return "" // nothing is counted in domains
	}
	if spreadsByNothing(pod) {
		return "spread-empty-selector"
	}
	for _, p := range w.Pods {
		if p.DeletionTimestamp != nil && p.Namespace == pod.Namespace {
			return "spread-terminating"
		}
	}
	return ""
}

func spreadsByNothing(pod *v1.Pod) bool {
	return slices.ContainsFunc(pod.Spec.TopologySpreadConstraints, func(c v1.TopologySpreadConstraint) bool {
		s := c.LabelSelector
		return c.WhenUnsatisfiable == v1.DoNotSchedule && s != nil && len(s.MatchLabels)+len(s.MatchExpressions) == 0 &&
			!slices.ContainsFunc(c.MatchLabelKeys, func(key string) bool { _, ok := pod.Labels[key]; return ok })
	})
}

func nominatedBeside(w *world, pod *v1.Pod) bool {
	return slices.ContainsFunc(w.Pods, func(p *v1.Pod) bool { return p.Spec.NodeName == "" && p.Namespace == pod.Namespace })
}

// harm is what upstream compares options by, so that equals can be told from others.
func harm(w *world, o option) string {
	byName := map[string]*v1.Pod{}
	for _, p := range w.Pods {
		byName[p.Namespace+"/"+p.Name] = p
	}
	var sum, top, first int64
	top = -1 << 62
	for _, name := range o.Victims {
		p := byName[name]
		priority := int64(0)
		if p.Spec.Priority != nil {
			priority = int64(*p.Spec.Priority)
		}
		sum += priority
		if started := p.Status.StartTime.Unix(); priority > top || priority == top && started < first {
			top, first = priority, started
		}
	}
	return fmt.Sprint(o.Violations, top, sum, len(o.Victims), first)
}

func (j *judge) count(a *answer) {
	j.tally.Pods++
	for _, n := range a.Nodes {
		j.tally.Nodes++
		if n.Filter != "" {
			j.tally.Refusals[n.Filter]++
		}
		for plugin := range n.Scores {
			j.tally.Scores[plugin]++
		}
	}
	if a.Message != "" {
		j.tally.Unfit++
	}
	j.tally.Evictions += len(a.Options)
}

func (t *tally) add(o *tally) {
	t.Worlds, t.Pods, t.Nodes, t.Unfit, t.Evictions = t.Worlds+o.Worlds, t.Pods+o.Pods, t.Nodes+o.Nodes, t.Unfit+o.Unfit, t.Evictions+o.Evictions
	t.Allocations += o.Allocations
	for _, m := range []struct{ to, from map[string]int }{{t.Refusals, o.Refusals}, {t.Scores, o.Scores}, {t.Accepted, o.Accepted}} {
		for k, v := range m.from {
			m.to[k] += v
		}
	}
}

func (t *tally) String() string {
	table := func(m map[string]int) string {
		keys := slices.SortedFunc(maps.Keys(m), func(a, b string) int { return cmp.Compare(m[b], m[a]) })
		var out []string
		for _, k := range keys {
			out = append(out, fmt.Sprintf("%s %d", k, m[k]))
		}
		return strings.Join(out, ", ")
	}
	return fmt.Sprintf("%d clusters, %d pods, %d verdicts on nodes; %d pods fit nowhere, %d evictions planned, %d claims allocated\nrefused by: %s\nscored above 0 by: %s\naccepted: %s",
		t.Worlds, t.Pods, t.Nodes, t.Unfit, t.Evictions, t.Allocations, table(t.Refusals), table(t.Scores), table(t.Accepted))
}
