package rawlist

import (
	"bytes"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/client-go/kubernetes/scheme"
)

// asStored is an object as the store has it.
func asStored(t testing.TB, o runtime.Object) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := protobuf.NewSerializer(scheme.Scheme, scheme.Scheme).Encode(o, &b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func podOn(node string) *corev1.Pod {
	return &corev1.Pod{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}, ObjectMeta: metav1.ObjectMeta{Name: "p", Labels: map[string]string{"a": "b"}},
		Spec: corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "c", Image: "i"}}}, Status: corev1.PodStatus{NominatedNodeName: "other"}}
}

func TestPodNode(t *testing.T) {
	for _, want := range []string{"", "n1", "a-node.with.a.longer-name"} {
		if got, ok := PodNode(asStored(t, podOn(want))); !ok || got != want {
			t.Errorf("%q, %v, want %q", got, ok, want)
		}
	}
	whole := asStored(t, podOn("n1"))
	for what, b := range map[string][]byte{
		"nothing": nil, "JSON": []byte(`{"kind":"Pod","spec":{"nodeName":"n1"}}`), "half": whole[:len(whole)/2],
		"another kind": asStored(t, &corev1.Service{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Service"}}),
	} {
		if got, ok := PodNode(b); ok {
			t.Errorf("%s: %q", what, got)
		}
	}
}

// Whatever is stored: no panic, and where it says something, decoding says the same.
func FuzzPodNode(f *testing.F) {
	f.Add(asStored(f, podOn("n1")))
	f.Add(asStored(f, podOn("")))
	f.Add([]byte("k8s\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, ok := PodNode(b)
		o, _, err := scheme.Codecs.UniversalDeserializer().Decode(b, nil, nil)
		if p, is := o.(*corev1.Pod); ok && err == nil && is && p.Spec.NodeName != got {
			t.Errorf("%q, decoded %q", got, p.Spec.NodeName)
		}
	})
}
