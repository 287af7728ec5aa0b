package namespace

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/discovery"
)

// good is each condition when nothing is wrong, in upstream's words and order.
var good = []corev1.NamespaceCondition{
	{Type: corev1.NamespaceDeletionDiscoveryFailure, Reason: "ResourcesDiscovered", Message: "All resources successfully discovered"},
	{Type: corev1.NamespaceDeletionGVParsingFailure, Reason: "ParsedGroupVersions", Message: "All legacy kube types successfully parsed"},
	{Type: corev1.NamespaceDeletionContentFailure, Reason: "ContentDeleted", Message: "All content successfully deleted, may be waiting on finalization"},
	{Type: corev1.NamespaceContentRemaining, Reason: "ContentRemoved", Message: "All content successfully removed"},
	{Type: corev1.NamespaceFinalizersRemaining, Reason: "ContentHasNoFinalizers", Message: "All content-preserving finalizers finished"},
}

// judge returns the namespace's conditions after a sweep, and whether they differ from old.
func judge(old []corev1.NamespaceCondition, s sweep, now time.Time) ([]corev1.NamespaceCondition, bool) {
	out := slices.Clone(old)
	changed := false
	bad := s.faults()
	for _, c := range good {
		c.Status = corev1.ConditionFalse
		if b, ok := bad[c.Type]; ok {
			c.Status, c.Reason, c.Message = corev1.ConditionTrue, b.Reason, b.Message
		}
		c.LastTransitionTime = metav1.NewTime(now)
		i := slices.IndexFunc(out, func(o corev1.NamespaceCondition) bool { return o.Type == c.Type })
		switch {
		case i < 0:
			out, changed = append(out, c), true
		case out[i].Status != c.Status || out[i].Reason != c.Reason || out[i].Message != c.Message:
			if out[i].Status == c.Status {
				c.LastTransitionTime = out[i].LastTransitionTime
			}
			out[i], changed = c, true
		}
	}
	return out, changed
}

// faults says what is wrong, by condition.
func (s sweep) faults() map[corev1.NamespaceConditionType]corev1.NamespaceCondition {
	bad := map[corev1.NamespaceConditionType]corev1.NamespaceCondition{}
	set := func(t corev1.NamespaceConditionType, reason, msg string) {
		bad[t] = corev1.NamespaceCondition{Reason: reason, Message: msg}
	}
	if s.discoveryErr != nil {
		msg := s.discoveryErr.Error()
		var groups *discovery.ErrGroupDiscoveryFailed
		if errors.As(s.discoveryErr, &groups) {
			msg = fmt.Sprintf("Discovery failed for some groups, %d failing: %v", len(groups.Groups), s.discoveryErr)
		}
		set(corev1.NamespaceDeletionDiscoveryFailure, "DiscoveryFailed", msg)
	}
	if s.parseErr != nil {
		set(corev1.NamespaceDeletionGVParsingFailure, "GroupVersionParsingFailed", s.parseErr.Error())
	}
	if len(s.deleteErrs) > 0 {
		set(corev1.NamespaceDeletionContentFailure, "ContentDeletionFailed", fmt.Sprintf("Failed to delete all resource types, %d remaining: %s",
			len(s.deleteErrs), list(s.deleteErrs, func(e error) string { return e.Error() })))
	}
	finalizers := map[string]int{}
	for _, l := range s.left {
		for f, n := range l.finalizers {
			finalizers[f] += n
		}
	}
	if len(s.left) > 0 {
		set(corev1.NamespaceContentRemaining, "SomeResourcesRemain", "Some resources are remaining: "+list(s.left, func(l leftover) string {
			return fmt.Sprintf("%s.%s has %d resource instances", l.resource.Resource, l.resource.Group, l.count)
		}))
	}
	if len(finalizers) > 0 {
		set(corev1.NamespaceFinalizersRemaining, "SomeFinalizersRemain", "Some content in the namespace has finalizers remaining: "+
			list(slices.Collect(maps.Keys(finalizers)), func(f string) string { return fmt.Sprintf("%s in %d resource instances", f, finalizers[f]) }))
	}
	return bad
}

// list writes items down, sorted, so that the same content is the same text.
func list[T any](items []T, text func(T) string) string {
	var out []string
	for _, it := range items {
		out = append(out, text(it))
	}
	slices.SortFunc(out, cmp.Compare[string])
	return strings.Join(out, ", ")
}
