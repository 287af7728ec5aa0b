package rawlist

import (
	"bytes"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

var podKind = schema.GroupVersionKind{Version: "v1", Kind: "Pod"}

func storedPod(t testing.TB, p *corev1.Pod, k schema.GroupVersionKind) []byte {
	t.Helper()
	raw, err := p.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	b, err := (&runtime.Unknown{TypeMeta: runtime.TypeMeta{APIVersion: k.GroupVersion().String(), Kind: k.Kind}, Raw: raw}).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return append(bytes.Clone(magic), b...)
}

// What is spliced is what protobuf itself makes of the object with its version.
func TestSplice(t *testing.T) {
	for name, p := range map[string]*corev1.Pod{
		"empty": {},
		"full": {ObjectMeta: metav1.ObjectMeta{Name: "n", Namespace: "ns", UID: "u", Generation: 3, Labels: map[string]string{"a": "b", "c": "d"},
			Annotations: map[string]string{"x": string(bytes.Repeat([]byte("y"), 300))}}, Spec: corev1.PodSpec{NodeName: "n1", Containers: []corev1.Container{{Name: "c"}}}},
		"has a version already": {ObjectMeta: metav1.ObjectMeta{Name: "n", ResourceVersion: "77"}},
	} {
		got, ok := appendStored(nil, storedPod(t, p, podKind), encodeTypeMeta(podKind), 12345678)
		q := p.DeepCopy()
		q.ResourceVersion = "12345678"
		raw, err := q.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		want := protowire.AppendBytes(protowire.AppendTag(nil, 2, protowire.BytesType), raw)
		if !ok || !bytes.Equal(got, want) {
			t.Errorf("%s: %v\n%x\n%x", name, ok, got, want)
		}
	}
	other := storedPod(t, &corev1.Pod{}, schema.GroupVersionKind{Group: "g", Version: "v1", Kind: "Pod"})
	if items, ok := appendStored([]byte("before"), other, encodeTypeMeta(podKind), 1); ok || string(items) != "before" {
		t.Error("another version was taken for the one that is asked for")
	}
	if _, ok := appendStored(nil, []byte(`{"kind":"Pod"}`), encodeTypeMeta(podKind), 1); ok {
		t.Error("JSON was taken for protobuf")
	}
}

// Whatever is stored, splicing ends, and what it makes can be read.
func FuzzSplice(f *testing.F) {
	f.Add(storedPod(f, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "n"}}, podKind), int64(1))
	f.Add([]byte("k8s\x00\x12\x02\x0a\x00"), int64(7))
	f.Fuzz(func(t *testing.T, stored []byte, rev int64) {
		got, ok := appendStored(nil, stored, encodeTypeMeta(podKind), rev)
		if !ok {
			if len(got) != 0 {
				t.Fatal("something was appended")
			}
			return
		}
		n, typ, l := protowire.ConsumeTag(got)
		if l < 0 || n != 2 || typ != protowire.BytesType {
			t.Fatalf("%x", got)
		}
		if v, m := protowire.ConsumeBytes(got[l:]); m < 0 || l+m != len(got) || len(v) == 0 {
			t.Fatalf("%x", got)
		}
	})
}
