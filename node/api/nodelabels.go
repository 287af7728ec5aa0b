package api

import (
	"context"
	"slices"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/authentication/user"
)

// nodeLabels asks Config.NodeLabels about changed labels of Nodes. What a node says of itself passes: its agent must not be
// held up by it.
type nodeLabels struct {
	allowed func(ctx context.Context, node string, before, after map[string]string) error
}

var _ admission.ValidationInterface = nodeLabels{}

func (nodeLabels) Handles(op admission.Operation) bool { return op == admission.Update }

func (n nodeLabels) Validate(ctx context.Context, a admission.Attributes, _ admission.ObjectInterfaces) error {
	r := a.GetResource()
	if r.Group != "" || r.Resource != "nodes" || a.GetSubresource() != "" || slices.Contains(a.GetUserInfo().GetGroups(), user.NodesGroup) {
		return nil
	}
	before, err := meta.Accessor(a.GetOldObject())
	if err != nil {
		return admission.NewForbidden(a, err)
	}
	after, err := meta.Accessor(a.GetObject())
	if err != nil {
		return admission.NewForbidden(a, err)
	}
	if err := n.allowed(ctx, a.GetName(), before.GetLabels(), after.GetLabels()); err != nil {
		return admission.NewForbidden(a, err)
	}
	return nil
}
