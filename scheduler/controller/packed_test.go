package controller

import (
	"fmt"
	"math/rand"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/apitesting/fuzzer"
	"k8s.io/apimachinery/pkg/api/equality"
	metafuzzer "k8s.io/apimachinery/pkg/apis/meta/fuzzer"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimeserializer "k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/randfill"
)

// randomPods fills pods with all kinds of things, and says its seed.
func randomPods(t *testing.T) (fill *randfill.Filler, rnd *rand.Rand) {
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	times := func(runtimeserializer.CodecFactory) []any {
		return []any{func(t *metav1.Time, c randfill.Continue) { // also none, and parts of seconds
			switch c.Intn(4) {
			case 0:
				*t = metav1.Time{}
			case 1:
				*t = metav1.Unix(c.Int63n(4e9)-1e9, c.Int63n(1e9))
			default:
				*t = metav1.Unix(c.Int63n(4e9)-1e9, 0)
			}
		}}
	}
	rnd = rand.New(rand.NewSource(seed))
	return fuzzer.FuzzerFor(fuzzer.MergeFuzzerFuncs(metafuzzer.Funcs, times), rand.NewSource(seed), scheme.Codecs), rnd
}

// wholeSeconds takes the parts of seconds from the times in volumes, which are held in protobuf: no object from the API has any there.
func wholeSeconds(volumes []corev1.Volume) {
	for i := range volumes {
		if e := volumes[i].Ephemeral; e != nil && e.VolumeClaimTemplate != nil {
			m := &e.VolumeClaimTemplate.ObjectMeta
			m.CreationTimestamp.Time = m.CreationTimestamp.Truncate(time.Second)
			if m.DeletionTimestamp != nil {
				m.DeletionTimestamp.Time = m.DeletionTimestamp.Truncate(time.Second)
			}
			for j := range m.ManagedFields {
				if t := m.ManagedFields[j].Time; t != nil {
					t.Time = t.Truncate(time.Second)
				}
			}
		}
	}
}

// A pod that is read from the view is the pod that came, but for what slim drops, whatever is in it: nothing is lost, and nothing
// is another's, now or when others have come.
func TestPackedPodIsThePod(t *testing.T) {
	fill, rnd := randomPods(t)
	s := &shares{}
	var held []any
	var wanted, templates []*corev1.Pod
	forms := 0
	for i := range 1500 {
		pod := &corev1.Pod{}
		if len(templates) == 0 || rnd.Intn(3) == 0 { // one like no other
			if fill.Fill(pod); rnd.Intn(2) == 0 {
				pod.TypeMeta = metav1.TypeMeta{}
			}
			templates = append(templates, pod.DeepCopy())
		} else { // one that shares with others
			pod = templates[rnd.Intn(len(templates))].DeepCopy()
			pod.Name, pod.ResourceVersion = fmt.Sprint("p", i), fmt.Sprint(i)
			if rnd.Intn(2) == 0 {
				o := &corev1.Pod{}
				fill.Fill(o)
				switch rnd.Intn(3) {
				case 0:
					pod.Spec = o.Spec
				case 1:
					pod.Status = o.Status
				case 2:
					pod.ObjectMeta = o.ObjectMeta
				}
			}
		}
		pod.ManagedFields = nil
		wholeSeconds(pod.Spec.Volumes)
		want := pod.DeepCopy()
		slim(want)
		got, err := s.strip(pod)
		if err != nil {
			t.Fatal(err)
		}
		if p, ok := got.(*packed); ok {
			forms++
			if built := p.build(); !equality.Semantic.DeepEqual(built, want) {
				t.Fatalf("pod %d was unpacked to\n%#v\nwant\n%#v", i, built, want)
			}
			agree(t, p, want)
		}
		if first := unpacked(got); !equality.Semantic.DeepEqual(first, want) {
			t.Fatalf("pod %d became\n%#v\nwant\n%#v", i, first, want)
		}
		if again, err := s.strip(got); err != nil || again != got {
			t.Fatalf("pod %d is not packed once: %v", i, err)
		}
		held, wanted = append(held, got), append(wanted, want)
	}
	for i := range held {
		p, ok := held[i].(*packed)
		if ok && !equality.Semantic.DeepEqual(p.build(), wanted[i]) {
			t.Fatalf("pod %d is another one now:\n%#v\nwant\n%#v", i, p.build(), wanted[i])
		}
	}
	if forms < 600 {
		t.Errorf("only %d of %d were packed", forms, len(held))
	}
}

// agree checks what indexes and the informer read of a packed pod without unpacking it.
func agree(t *testing.T, p *packed, want *corev1.Pod) {
	t.Helper()
	if p.GetNamespace() != want.Namespace || p.GetName() != want.Name || p.GetUID() != want.UID || p.GetResourceVersion() != want.ResourceVersion ||
		p.GetGenerateName() != want.GenerateName || p.GetGeneration() != want.Generation || !p.GetDeletionTimestamp().Equal(want.DeletionTimestamp) {
		t.Fatalf("a packed pod says other names: %v, want %v", p, want.ObjectMeta)
	}
	for name, index := range map[string]func(any) ([]string, error){IndexController: indexByController, IndexNode: indexByNode, IndexEnded: indexEnded, IndexClaim: indexByClaim} {
		a, err := index(p)
		b, err2 := index(want)
		if err != nil || err2 != nil || !equality.Semantic.DeepEqual(a, b) {
			t.Fatalf("index %s has %q (%v) of a packed pod, %q (%v) of the pod", name, a, err, b, err2)
		}
	}
}
