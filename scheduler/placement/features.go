package placement

import (
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/version"
	"k8s.io/component-helpers/nodedeclaredfeatures"
	"k8s.io/component-helpers/nodedeclaredfeatures/types"
)

// featureSet are features of an agent that a node declares in its status, as
// far as Kubernetes knows them.
type featureSet = nodedeclaredfeatures.FeatureSet

// featuresSince is the release of Kubernetes whose rules hold: a feature that
// every node of this release has is not asked for any more.
var featuresSince = version.MajorMinor(1, 36)

func declaredBy(n *v1.Node) featureSet {
	return nodedeclaredfeatures.DefaultFramework.TryMap(n.Status.DeclaredFeatures)
}

// featuresOf infers from the specification what the pod's node must have.
func featuresOf(pod *v1.Pod) featureSet {
	want, err := nodedeclaredfeatures.DefaultFramework.InferForPodScheduling(&types.PodInfo{Spec: &pod.Spec}, featuresSince)
	if err != nil {
		panic("placement: " + err.Error()) // only without a version
	}
	return want
}

func (p *plan) tryFeatures(n *node) verdict {
	if p.class.features.IsEmpty() {
		return verdict{}
	}
	if has, err := p.class.features.IsSubset(n.features); err != nil || !has {
		return refused(NodeDeclaredFeatures, reasonFeatures)
	}
	return verdict{}
}
