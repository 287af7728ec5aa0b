package deployment

import (
	"fmt"
	"maps"
	"strconv"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skein.io/skein/scheduler/controller/history"
)

// Annotations of ReplicaSets (the first of Deployments, too) that kubectl
// rollout reads.
const (
	annRevision = "deployment.kubernetes.io/revision"
	annHistory  = "deployment.kubernetes.io/revision-history"
	annDesired  = "deployment.kubernetes.io/desired-replicas"
	annMax      = "deployment.kubernetes.io/max-replicas"
)

// maxHistory bounds the revision-history annotation, in characters (about 100 revisions).
const maxHistory = 2000

// notInherited are the annotations of a Deployment that its sets do not get.
var notInherited = map[string]bool{
	corev1.LastAppliedConfigAnnotation: true,
	annRevision:                        true,
	annHistory:                         true,
	annDesired:                         true,
	annMax:                             true,
	appsv1.DeprecatedRollbackTo:        true,
}

// revision returns the set's revision; 0 if it has none.
func revision(rs *appsv1.ReplicaSet) int64 {
	n, err := strconv.ParseInt(rs.Annotations[annRevision], 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// count reads an annotation that holds a number of pods.
func count(rs *appsv1.ReplicaSet, ann string) (int32, bool) {
	n, err := strconv.ParseInt(rs.Annotations[ann], 10, 32)
	if err != nil || n < 0 {
		return 0, false
	}
	return int32(n), true
}

// nextRevision is one more than any old set's.
func (r *rollout) nextRevision() int64 {
	top := int64(0)
	for _, rs := range r.old {
		top = max(top, revision(rs))
	}
	return top + 1
}

// syncRevision keeps the new set's annotations true, if it exists, and copies
// its revision to the Deployment.
func (r *rollout) syncRevision() {
	if r.new == nil {
		return
	}
	r.new.Spec.MinReadySeconds = r.d.Spec.MinReadySeconds
	annotate(r.new, r.d, r.nextRevision())
	r.setRevision(r.new.Annotations[annRevision])
	if hasDeadline(r.d) && !r.rolloutKnown() {
		r.noteProgress(&r.d.Status, reasonFoundNew, fmt.Sprintf("Found new replica set %q", r.new.Name))
	}
}

func (r *rollout) setRevision(rev string) {
	if r.d.Annotations == nil {
		r.d.Annotations = map[string]string{}
	}
	r.d.Annotations[annRevision] = rev
}

// annotate copies d's annotations (such as the change cause) to its new set,
// and raises the set's revision to rev. A set that is used again keeps its
// earlier revisions in its history.
func annotate(rs *appsv1.ReplicaSet, d *appsv1.Deployment, rev int64) {
	for k, v := range d.Annotations {
		if !notInherited[k] {
			rs.Annotations[k] = v
		}
	}
	text, had := rs.Annotations[annRevision]
	was, err := strconv.ParseInt(text, 10, 64)
	if text != "" && err != nil || was >= rev {
		return // someone else's text, or older sets are gone and it is the greatest anyway
	}
	rs.Annotations[annRevision] = strconv.FormatInt(rev, 10)
	if !had {
		return
	}
	history := text
	if h := rs.Annotations[annHistory]; h != "" {
		history = h + "," + text
	}
	for len(history) > maxHistory {
		_, rest, found := strings.Cut(history, ",")
		if !found {
			return
		}
		history = rest
	}
	rs.Annotations[annHistory] = history
}

// ensureNew makes the set for the Deployment's template if there is none.
func (r *rollout) ensureNew() {
	if r.new != nil {
		return
	}
	d := r.d
	template := *d.Spec.Template.DeepCopy()
	hash := history.Hash(&template, d.Status.CollisionCount)
	template.Labels = maps.Clone(template.Labels)
	if template.Labels == nil {
		template.Labels = map[string]string{}
	}
	template.Labels[appsv1.DefaultDeploymentUniqueLabelKey] = hash
	selector := d.Spec.Selector.DeepCopy()
	if selector.MatchLabels == nil {
		selector.MatchLabels = map[string]string{}
	}
	selector.MatchLabels[appsv1.DefaultDeploymentUniqueLabelKey] = hash
	r.new = &appsv1.ReplicaSet{
		ObjectMeta: metav1.ObjectMeta{
			Namespace:       d.Namespace,
			Name:            history.Name(d.Name, hash),
			Labels:          maps.Clone(template.Labels),
			Annotations:     map[string]string{},
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(d, kind)},
		},
		Spec: appsv1.ReplicaSetSpec{
			Replicas:        new(int32),
			MinReadySeconds: d.Spec.MinReadySeconds,
			Selector:        selector,
			Template:        template,
		},
	}
	annotate(r.new, d, r.nextRevision())
	r.setScale(r.new, r.newSize())
	r.setRevision(r.new.Annotations[annRevision])
	if hasDeadline(d) {
		r.noteProgress(&d.Status, reasonCreated, fmt.Sprintf("Created new replica set %q", r.new.Name))
	}
	r.out.create = r.new
}

// sameTemplate compares templates without the label that carries the hash.
func sameTemplate(a, b *corev1.PodTemplateSpec) bool {
	x, y := *a, *b
	x.Labels, y.Labels = withoutHash(a.Labels), withoutHash(b.Labels)
	return equality.Semantic.DeepEqual(&x, &y)
}

func withoutHash(l map[string]string) map[string]string {
	if _, ok := l[appsv1.DefaultDeploymentUniqueLabelKey]; !ok {
		return l
	}
	l = maps.Clone(l)
	delete(l, appsv1.DefaultDeploymentUniqueLabelKey)
	return l
}
