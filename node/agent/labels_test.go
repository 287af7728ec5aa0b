package agent

import (
	"maps"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// A user's change of a label outlives restarts of the node; a changed setting of the node counts again.
func TestFirstLabels(t *testing.T) {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n", Labels: map[string]string{"own": "1"}, Annotations: map[string]string{}}}
	own := map[string]string{"own": "1"}
	apply := func(first map[string]string) (changes int) {
		l, a := metaChange(n, own, first)
		for _, x := range []struct {
			to   map[string]string
			from map[string]any
		}{{n.Labels, l}, {n.Annotations, a}} {
			for k, v := range x.from {
				if v == nil {
					delete(x.to, k)
				} else {
					x.to[k] = v.(string)
				}
			}
		}
		return len(l) + len(a)
	}
	want := func(what string, labels map[string]string) {
		t.Helper()
		if !maps.Equal(n.Labels, labels) {
			t.Fatalf("%s: %v, want %v", what, n.Labels, labels)
		}
	}
	if apply(nil) != 0 {
		t.Error("nothing to do, but something was done")
	}
	never := map[string]string{"voter": "never"}
	apply(never)
	want("the first start", map[string]string{"own": "1", "voter": "never"})
	if apply(never) != 0 {
		t.Error("a second start changes something")
	}
	n.Labels["voter"] = "prefer" // kubectl label
	if apply(never) != 0 {
		t.Error("a restart overrules the user")
	}
	n.Labels["own"] = "2"
	apply(map[string]string{"voter": "prefer", "x": "y"})
	want("another setting", map[string]string{"own": "1", "voter": "prefer", "x": "y"})
	apply(nil)
	want("no setting", map[string]string{"own": "1"})
	n.Annotations[annFirstLabels] = "{nonsense"
	apply(never)
	want("a broken annotation", map[string]string{"own": "1", "voter": "never"})
}
