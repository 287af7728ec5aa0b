package api

import (
	"context"
	"errors"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/authentication/user"
)

func TestNodeLabels(t *testing.T) {
	n := nodeLabels{func(_ context.Context, node string, before, after map[string]string) error {
		if node == "n1" && before["v"] != "never" && after["v"] == "never" {
			return errors.New("it is the last one")
		}
		return nil
	}}
	labelled := func(v string) *corev1.Node {
		return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", Labels: map[string]string{"v": v}}}
	}
	for name, c := range map[string]struct {
		resource, sub, from, to string
		groups                  []string
		refused                 bool
	}{
		"unsafe":           {"nodes", "", "", "never", nil, true},
		"harmless":         {"nodes", "", "", "prefer", nil, false},
		"as it was":        {"nodes", "", "never", "never", nil, false},
		"status":           {"nodes", "status", "", "never", nil, false},
		"other resource":   {"pods", "", "", "never", nil, false},
		"the node's agent": {"nodes", "", "", "never", []string{user.NodesGroup}, false},
	} {
		a := admission.NewAttributesRecord(labelled(c.to), labelled(c.from), schema.GroupVersionKind{}, "", "n1",
			schema.GroupVersionResource{Version: "v1", Resource: c.resource}, c.sub, admission.Update, nil, false, &user.DefaultInfo{Groups: c.groups})
		err := n.Validate(t.Context(), a, nil)
		if (err != nil) != c.refused || (err != nil && !strings.Contains(err.Error(), "it is the last one")) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n.Handles(admission.Create) || !n.Handles(admission.Update) {
		t.Error("updates only")
	}
}
