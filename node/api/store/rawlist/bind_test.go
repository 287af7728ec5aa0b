package rawlist

import (
	"bytes"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/scheme"
)

var someBinding = Binding{UID: "u", Node: "n1", Labels: map[string]string{"topology.kubernetes.io/zone": "z", "b": "2"}, At: metav1.NewTime(time.Unix(1e9, 0))}

// What is no pod as it is stored today is left alone.
func TestBindLeavesTheRest(t *testing.T) {
	pod := podOn("")
	pod.UID = "u"
	whole := asStored(t, pod)
	if _, ok := Bind(whole, someBinding); !ok {
		t.Fatal("a plain pod is not bound")
	}
	edited := func(edit func(*corev1.Pod)) []byte {
		p := pod.DeepCopy()
		edit(p)
		return asStored(t, p)
	}
	for what, b := range map[string][]byte{
		"nothing": nil, "JSON": []byte(`{"kind":"Pod","spec":{"nodeName":""}}`), "half": whole[:len(whole)/2],
		"another kind": asStored(t, &corev1.Service{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Service"}}),
		"bound":        edited(func(p *corev1.Pod) { p.Spec.NodeName = "n2" }),
		"another pod":  edited(func(p *corev1.Pod) { p.UID = "v" }),
		"being deleted": edited(func(p *corev1.Pod) {
			now := metav1.Now()
			p.DeletionTimestamp = &now
		}),
		"gated": edited(func(p *corev1.Pod) { p.Spec.SchedulingGates = []corev1.PodSchedulingGate{{Name: "g"}} }),
		"scheduled": edited(func(p *corev1.Pod) {
			p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionTrue}}
		}),
		"nothing in it": asStored(t, &corev1.PodList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}}),
	} {
		if got, ok := Bind(b, someBinding); ok {
			t.Errorf("%s: %q", what, got)
		}
	}
	if b := storedPod(t, pod, podKind); !bytes.Equal(bytes.Clone(b), whole) {
		t.Error("the test stores pods in another way than upstream")
	}
}

// Whatever is stored: no panic, and what comes out decodes to what went in, bound.
func FuzzBind(f *testing.F) {
	pod := podOn("")
	pod.UID = "u"
	f.Add(asStored(f, pod))
	pod.Status.Conditions = []corev1.PodCondition{{Type: "Ready", Status: "False"}, {Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Message: "m"}, {Type: "Other"}}
	pod.Labels = map[string]string{"b": "1", "z": "3"}
	f.Add(asStored(f, pod))
	f.Add(asStored(f, podOn("n1")))
	f.Add([]byte("k8s\x00"))
	f.Fuzz(func(t *testing.T, stored []byte) {
		bound, ok := Bind(stored, someBinding)
		if !ok {
			return
		}
		decode := func(b []byte) *corev1.Pod {
			o, _, err := scheme.Codecs.UniversalDeserializer().Decode(b, nil, nil)
			if err != nil {
				return nil
			}
			p, _ := o.(*corev1.Pod)
			return p
		}
		was := decode(stored)
		if was == nil {
			return // what cannot be read was not written by an API, and is not readable now
		}
		is := decode(bound)
		if is == nil || is.Spec.NodeName != "n1" || is.Status.NominatedNodeName != "" || is.Name != was.Name || len(is.Spec.Containers) != len(was.Spec.Containers) {
			t.Fatalf("%+v\nbefore: %+v", is, was)
		}
		for k, v := range was.Labels {
			if _, ours := someBinding.Labels[k]; !ours && is.Labels[k] != v {
				t.Errorf("label %s: %q, before %q", k, is.Labels[k], v)
			}
		}
		for k, v := range someBinding.Labels {
			if is.Labels[k] != v {
				t.Errorf("label %s: %q, want %q", k, is.Labels[k], v)
			}
		}
		if _, again := Bind(bound, someBinding); again {
			t.Error("bound twice")
		}
	})
}
