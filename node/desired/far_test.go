package desired

import (
	"fmt"
	"math/rand"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/apitesting/fuzzer"
	"k8s.io/apimachinery/pkg/api/equality"
	metafuzzer "k8s.io/apimachinery/pkg/apis/meta/fuzzer"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/scheme"
)

func farNode(i int) *corev1.Node {
	name := fmt.Sprintf("node-%04d", i)
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID(fmt.Sprintf("5f7a6c2e-0000-0000-0000-%012d", i)), ResourceVersion: fmt.Sprint(1000 + i), Labels: map[string]string{
			corev1.LabelHostname: name, corev1.LabelTopologyZone: fmt.Sprint("zone-", i%3), corev1.LabelOSStable: "linux", corev1.LabelArchStable: "amd64"}},
		Spec: corev1.NodeSpec{PodCIDR: fmt.Sprintf("10.%d.%d.0/24", i/256, i%256)},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
			{Type: corev1.NodeInternalIP, Address: fmt.Sprintf("192.168.%d.%d", i/256, i%256)}, {Type: corev1.NodeHostName, Address: name}}},
	}
}

// Whatever is in another node, what the store gives for it is what it held, and its labels are those; its own node is one
// and the same until it changes, also if the store knew it before it knew that it is its own.
func TestFarNodes(t *testing.T) {
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	fill := fuzzer.FuzzerFor(metafuzzer.Funcs, rand.NewSource(seed), scheme.Codecs)
	path := filepath.Join(t.TempDir(), "desired.db")
	s := mustOpen(t, path)
	s.is("none")
	want := map[string]*corev1.Node{}
	for i := range 500 {
		n := &corev1.Node{}
		fill.Fill(n)
		n.TypeMeta, n.Namespace, n.Name = metav1.TypeMeta{}, "", fmt.Sprint("n", i)
		if err := s.nodes.Add(n); err != nil {
			t.Fatal(err)
		}
		want[n.Name] = n.DeepCopy() // stripped
	}
	if err := s.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	again := mustOpen(t, path)
	for _, s := range []*Store{s, again} {
		all := s.Nodes()
		if len(all) != len(want) {
			t.Fatalf("%d nodes of %d", len(all), len(want))
		}
		for _, n := range all {
			w := want[n.Name]
			if !equality.Semantic.DeepEqual(n, w) || !equality.Semantic.DeepEqual(s.Node(n.Name), w) {
				t.Fatalf("%s is\n%#v\nwant\n%#v", n.Name, n, w)
			}
			if !same(s.nodes.items[n.Name], w) && w.ResourceVersion != "" {
				t.Fatalf("%s is not known to be the same", n.Name)
			}
			for k, v := range w.Labels {
				if got := s.NodeLabel(n.Name, k); got != v {
					t.Fatalf("%s has label %q=%q, want %q", n.Name, k, got, v)
				}
			}
			if s.NodeLabel(n.Name, "no such label") != "" || !s.HasNode(n.Name) {
				t.Fatalf("%s has a label that it does not have, or is not there", n.Name)
			}
		}
		if s.HasNode("gone") || s.NodeLabel("gone", "a") != "" || s.Node("gone") != nil {
			t.Error("there is a node that nobody has")
		}
	}
	again.is("n3")
	if a := again.Node("n3"); a != again.Node("n3") || !equality.Semantic.DeepEqual(a.Labels, want["n3"].Labels) {
		t.Error("its own node is made anew each time")
	}
}

// How much of the heap another node takes.
func BenchmarkNodes(b *testing.B) {
	s := newStore(nil)
	s.is("me")
	for _, far := range []bool{false, true} {
		b.Run(map[bool]string{false: "as it comes", true: "in the store"}[far], func(b *testing.B) {
			all := make([]held, b.N)
			var before, after runtime.MemStats
			bytes := make([][]byte, b.N)
			for i := range bytes {
				bytes[i], _ = farNode(i).Marshal()
			}
			runtime.GC()
			runtime.ReadMemStats(&before)
			for i := range all {
				n := &corev1.Node{}
				if err := n.Unmarshal(bytes[i]); err != nil {
					b.Fatal(err)
				}
				if all[i] = n; far {
					all[i] = s.keep(n)
				}
			}
			runtime.GC()
			runtime.ReadMemStats(&after)
			b.ReportMetric(float64(int64(after.HeapAlloc-before.HeapAlloc))/float64(b.N), "heap-B/node")
			runtime.KeepAlive(all)
			runtime.KeepAlive(bytes)
		})
	}
}
