package rawlist

import (
	"bytes"
	"strconv"
	"testing"

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

// What is spliced is what protobuf itself makes of the object with its version, and so is the message around it.
func TestSplice(t *testing.T) {
	for name, p := range map[string]*corev1.Pod{
		"empty": {},
		"full": {ObjectMeta: metav1.ObjectMeta{Name: "n", Namespace: "ns", UID: "u", Generation: 3, Labels: map[string]string{"a": "b", "c": "d"},
			Annotations: map[string]string{"x": string(bytes.Repeat([]byte("y"), 300))}}, Spec: corev1.PodSpec{NodeName: "n1", Containers: []corev1.Container{{Name: "c"}}}},
		"has a version already": {ObjectMeta: metav1.ObjectMeta{Name: "n", ResourceVersion: "77"}},
	} {
		const version = 12345678
		s, ok := parse(storedPod(t, p, podKind), encodeTypeMeta(podKind))
		q := p.DeepCopy()
		q.ResourceVersion = strconv.Itoa(version)
		want := storedPod(t, q, podKind)
		if _, size := s.size(version); !ok || size != q.Size() {
			t.Errorf("%s: %v, size %d, want %d", name, ok, size, q.Size())
		}
		got, err := (&form{Form: Form{Kind: podKind}, typeMeta: encodeTypeMeta(podKind)}).one(item{stored: s, version: version})
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %v\n%x\n%x", name, err, got, want)
		}
	}
	other := storedPod(t, &corev1.Pod{}, schema.GroupVersionKind{Group: "g", Version: "v1", Kind: "Pod"})
	if _, ok := parse(other, encodeTypeMeta(podKind)); ok {
		t.Error("another version was taken for the one that is asked for")
	}
	if _, ok := parse([]byte(`{"kind":"Pod"}`), encodeTypeMeta(podKind)); ok {
		t.Error("JSON was taken for protobuf")
	}
}

// Whatever is stored, splicing ends, and makes as much as it says.
func FuzzSplice(f *testing.F) {
	f.Add(storedPod(f, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "n"}}, podKind), int64(1))
	f.Add([]byte("k8s\x00\x12\x02\x0a\x00"), int64(7))
	f.Fuzz(func(t *testing.T, b []byte, version int64) {
		s, ok := parse(b, encodeTypeMeta(podKind))
		if !ok {
			return
		}
		if _, size := s.size(version); len(s.append(nil, version)) != size {
			t.Fatalf("%d bytes, want %d", len(s.append(nil, version)), size)
		}
	})
}
