package openapi

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/managedfields"
	"k8s.io/client-go/kubernetes/scheme"
)

// Whose a field is, is what upstream makes of it, however many managers an object has; and the objects that are compared stay as they are.
func TestManagersAsUpstream(t *testing.T) {
	docs, err := Load(nil)
	if err != nil {
		t.Fatal(err)
	}
	types, gv := NewTypes(docs), corev1.SchemeGroupVersion
	manager := func(c managedfields.TypeConverter) *managedfields.FieldManager {
		m, err := managedfields.NewDefaultFieldManager(c, scheme.Scheme, scheme.Scheme, scheme.Scheme, gv.WithKind("ConfigMap"), gv, "", nil)
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	upstream := types.of(gv)
	if upstream.err != nil || upstream.TypeConverter == nil {
		t.Fatal(upstream.err)
	}
	run := func(m *managedfields.FieldManager) (out []runtime.Object) {
		live := runtime.Object(&corev1.ConfigMap{})
		for i := range 6 {
			next := live.DeepCopyObject().(*corev1.ConfigMap)
			next.TypeMeta = metav1.TypeMeta{Kind: "ConfigMap", APIVersion: "v1"}
			next.Name, next.Namespace = "a", "b"
			if next.Data == nil {
				next.Data = map[string]string{}
			}
			next.Data[fmt.Sprint("k", i%4)] = fmt.Sprint(i)
			delete(next.Data, fmt.Sprint("k", (i+2)%4))
			before := live.DeepCopyObject()
			got, err := m.Update(live, next, fmt.Sprint("m", i%3))
			if err != nil {
				t.Fatal(err)
			}
			if !equality.Semantic.DeepEqual(before, live) {
				t.Errorf("the live object was changed: %v, was %v", live, before)
			}
			for j := range got.(*corev1.ConfigMap).ManagedFields {
				got.(*corev1.ConfigMap).ManagedFields[j].Time = nil
			}
			out = append(out, got.DeepCopyObject())
			live = got
		}
		return out
	}
	got, want := run(manager(types.For(gv))), run(manager(upstream.TypeConverter))
	for i := range want {
		if !equality.Semantic.DeepEqual(got[i], want[i]) {
			t.Errorf("update %d: %v\nwant %v", i, got[i], want[i])
		}
	}
	if n := len(want[5].(*corev1.ConfigMap).ManagedFields); n < 2 {
		t.Errorf("%d managers at the end: this test sees nothing", n)
	}
}
