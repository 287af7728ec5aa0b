package placement

import (
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// affinityTerm is a parsed v1.PodAffinityTerm of one pod.
type affinityTerm struct {
	key               string // see termKey
	namespaces        []string
	namespaceSelector labels.Selector // matches nothing when the term has none
	selector          labels.Selector
	topologyKey       string
	weight            int64 // 0 for required terms
}

// selectsNamespaces reports whether the labels of namespaces decide.
func (t *affinityTerm) selectsNamespaces() bool { return !matchesNothing(t.namespaceSelector) }

// matches reports whether pod, whose namespace has the given labels, is one
// of those that the term speaks of.
func (t *affinityTerm) matches(pod who, namespace labels.Set) bool {
	in := false
	for _, ns := range t.namespaces {
		if ns == pod.namespace {
			in = true
			break
		}
	}
	if !in && !t.namespaceSelector.Matches(namespace) {
		return false
	}
	return t.selector.Matches(pod.labels)
}

// podTerms are all affinity terms of one pod.
type podTerms struct {
	required, requiredAnti, preferred, preferredAnti []affinityTerm
}

// noTerms is what pods without any have. Nobody changes it.
var noTerms = &podTerms{}

// each calls do for every term.
func (t *podTerms) each(do func(termKind, *affinityTerm)) {
	for kind, terms := range [...][]affinityTerm{needs: t.required, repels: t.requiredAnti, likes: t.preferred, dislikes: t.preferredAnti} {
		for i := range terms {
			do(termKind(kind), &terms[i])
		}
	}
}

// termsOf parses a pod's affinity and anti-affinity to other pods.
// matchLabelKeys need no care here: the API server merges them into the
// selector when the pod is created.
func termsOf(pod *v1.Pod) (*podTerms, error) {
	a := pod.Spec.Affinity
	if a == nil || a.PodAffinity == nil && a.PodAntiAffinity == nil {
		return noTerms, nil
	}
	out := &podTerms{}
	var err error
	if p := a.PodAffinity; p != nil {
		if out.required, err = requiredTerms(pod, p.RequiredDuringSchedulingIgnoredDuringExecution); err != nil {
			return out, err
		}
		if out.preferred, err = preferredTerms(pod, p.PreferredDuringSchedulingIgnoredDuringExecution); err != nil {
			return out, err
		}
	}
	if p := a.PodAntiAffinity; p != nil {
		if out.requiredAnti, err = requiredTerms(pod, p.RequiredDuringSchedulingIgnoredDuringExecution); err != nil {
			return out, err
		}
		if out.preferredAnti, err = preferredTerms(pod, p.PreferredDuringSchedulingIgnoredDuringExecution); err != nil {
			return out, err
		}
	}
	return out, nil
}

func requiredTerms(pod *v1.Pod, terms []v1.PodAffinityTerm) ([]affinityTerm, error) {
	out := make([]affinityTerm, 0, len(terms))
	for i := range terms {
		t, err := parseTerm(pod, &terms[i])
		if err != nil {
			return nil, err
		}
		out = append(out, t)
	}
	return out, nil
}

func preferredTerms(pod *v1.Pod, terms []v1.WeightedPodAffinityTerm) ([]affinityTerm, error) {
	out := make([]affinityTerm, 0, len(terms))
	for i := range terms {
		t, err := parseTerm(pod, &terms[i].PodAffinityTerm)
		if err != nil {
			return nil, err
		}
		t.weight = int64(terms[i].Weight)
		out = append(out, t)
	}
	return out, nil
}

func parseTerm(pod *v1.Pod, term *v1.PodAffinityTerm) (affinityTerm, error) {
	selector, err := metav1.LabelSelectorAsSelector(term.LabelSelector)
	if err != nil {
		return affinityTerm{}, err
	}
	nsSelector, err := metav1.LabelSelectorAsSelector(term.NamespaceSelector)
	if err != nil {
		return affinityTerm{}, err
	}
	namespaces := term.Namespaces
	if len(namespaces) == 0 && term.NamespaceSelector == nil {
		namespaces = []string{pod.Namespace}
	}
	out := affinityTerm{
		namespaces:        namespaces,
		namespaceSelector: nsSelector,
		selector:          selector,
		topologyKey:       term.TopologyKey,
	}
	out.key = termKey(&out)
	return out, nil
}
