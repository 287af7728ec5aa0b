package api

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/rand"
)

// Patches of a status are done without what they cannot change. What comes of them, and what they are refused for, is what comes of upstream's whole way, which
// a patch that names the spec takes.
func TestStatusPatchesAreUpstreams(t *testing.T) {
	k := admin(t)
	ctx, ns := t.Context(), namespace(t, k)
	yes, no, seconds := true, false, int64(7)
	twins := [2]string{"lean", "full"}
	for _, name := range twins {
		p := simplePod(name)
		p.Labels, p.Annotations = map[string]string{"a": "b"}, map[string]string{"note": "x"}
		p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "ConfigMap", Name: "o", UID: "1", Controller: &yes}}
		p.Finalizers = []string{"example.com/stay"}
		p.Spec.TerminationGracePeriodSeconds, p.Spec.NodeSelector = &seconds, map[string]string{"x": "y"}
		p.Spec.AutomountServiceAccountToken = &no // its volume has a name of its own
		p.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}}
		if _, err := k.CoreV1().Pods(ns).Create(ctx, p, metav1.CreateOptions{FieldManager: "maker"}); err != nil {
			t.Fatal(err)
		}
		if _, err := k.CoreV1().Pods(ns).Patch(ctx, name, types.ApplyPatchType, []byte(`{"apiVersion":"v1","kind":"Pod","metadata":{"name":"`+name+`","labels":{"l":"m"}}}`),
			metav1.PatchOptions{FieldManager: "applier"}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_, _ = k.CoreV1().Pods(ns).Patch(context.WithoutCancel(ctx), name, types.MergePatchType, []byte(`{"metadata":{"finalizers":null}}`), metav1.PatchOptions{})
		})
	}
	plain := func(p *corev1.Pod) *corev1.Pod {
		p = p.DeepCopy()
		p.Name, p.UID, p.ResourceVersion, p.CreationTimestamp = "", "", "", metav1.Time{}
		for i := range p.ManagedFields {
			p.ManagedFields[i].Time = nil
		}
		slices.SortFunc(p.ManagedFields, func(a, b metav1.ManagedFieldsEntry) int { // their order is that of their times
			return strings.Compare(a.Manager+a.Subresource, b.Manager+b.Subresource)
		})
		return p
	}
	before, err := k.CoreV1().Pods(ns).Get(ctx, twins[0], metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, patch := range []string{
		`{"status":{"message":"m"}}`,
		`{"status":{"conditions":[{"type":"Ready","status":"True"},{"type":"PodScheduled","status":"True"}]}}`,
		`{"status":{"conditions":[{"type":"Ready","status":"False"}],"$setElementOrder/conditions":[{"type":"Ready"},{"type":"PodScheduled"}]}}`,
		`{"status":{"conditions":[{"type":"Ready","$patch":"delete"}]}}`,
		`{"status":{"phase":"Running","podIPs":[{"ip":"192.0.2.1"}],"containerStatuses":[{"name":"c","ready":true,"image":"i","imageID":"x"}]}}`,
		`{"metadata":{"uid":"UID"},"status":{"reason":"r"}}`,
		`{"metadata":{"uid":"5"},"status":{"reason":"s"}}`,
		`{"metadata":{"resourceVersion":"1"},"status":{"reason":"s"}}`,
		`{"metadata":{"annotations":{"note":"y","more":"z"}},"status":{"message":"n"}}`,
		`{"metadata":{"labels":{"a":null}}}`,
		`{"metadata":{"ownerReferences":null,"finalizers":null}}`,
		`{"metadata":{"managedFields":null},"status":{"message":"o"}}`,
		`{"metadata":{"managedFields":[{"manager":"x"}]},"status":{"message":"p"}}`,
		`{"metadata":{"name":"other"},"status":{"message":"q"}}`,
		`{"metadata":null,"status":{"message":"q"}}`,
		`{"metadata":1}`,
		`{"status":{"nonsense":1}}`,
		`{"nonsense":{}}`,
		`{"status":{"startTime":"yesterday"}}`,
		`{"status":{"phase":"Running","podIPs":[{"ip":"nonsense"}]}}`,
		`{"status":null}`,
		`{"status":{"$patch":"replace","message":"alone"}}`,
		`{}`,
		`{`,
	} {
		var got [2]*corev1.Pod
		var said [2]string
		for i, name := range twins {
			now, err := k.CoreV1().Pods(ns).Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			b := strings.ReplaceAll(patch, "UID", string(now.UID))
			if i == 1 && b != "{" {
				b = strings.Replace(strings.TrimSuffix(b, "}")+`,"spec":{}}`, "{,", "{", 1)
			}
			o, err := k.CoreV1().Pods(ns).Patch(ctx, name, types.StrategicMergePatchType, []byte(b), metav1.PatchOptions{FieldManager: "agent", FieldValidation: "Strict"}, "status")
			if err != nil {
				said[i] = strings.NewReplacer(name, "NAME", string(now.UID), "UID", " spec:map[]", "", "spec:map[] ", "").Replace(err.Error())
				continue
			}
			got[i] = plain(o)
		}
		switch {
		case said[0] != said[1]:
			t.Errorf("%s: %q, upstream's way %q", patch, said[0], said[1])
		case said[0] == "" && !equality.Semantic.DeepEqual(got[0], got[1]):
			a, _ := json.Marshal(got[0]) // shown
			b, _ := json.Marshal(got[1])
			t.Errorf("%s:\n%s, upstream's way\n%s", patch, a, b)
		}
	}
	after, err := k.CoreV1().Pods(ns).Get(ctx, twins[0], metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if !equality.Semantic.DeepEqual(before.Spec, after.Spec) || !equality.Semantic.DeepEqual(before.OwnerReferences, after.OwnerReferences) {
		t.Errorf("the spec is %v, was %v", after.Spec, before.Spec)
	}

	// An update of the status owns what it sets, and nothing of a spec that it sends along.
	after.Spec.NodeSelector, after.Status.Message = nil, rand.String(5)
	updated, err := k.CoreV1().Pods(ns).UpdateStatus(ctx, after, metav1.UpdateOptions{FieldManager: "updater"})
	if err != nil {
		t.Fatal(err)
	}
	if updated.Spec.NodeSelector["x"] != "y" || updated.Status.Message != after.Status.Message {
		t.Errorf("%v, %v", updated.Spec, updated.Status)
	}
	owned := ""
	for _, m := range updated.ManagedFields {
		if m.Manager == "updater" {
			owned += m.Subresource + string(m.FieldsV1.Raw)
		}
	}
	if owned != `status{"f:status":{"f:message":{}}}` {
		t.Errorf("the updater owns %q", owned)
	}
}
