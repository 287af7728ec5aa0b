package placement

import (
	"fmt"
	"testing"

	v1 "k8s.io/api/core/v1"
)

// One pod with a claim that any node can satisfy, and one without.
func BenchmarkPlaceWithDevices(b *testing.B) {
	for _, nodes := range []int{500, 5000} {
		s := NewSnapshot()
		for i := range nodes {
			name := fmt.Sprintf("n%05d", i)
			s.SetNode(mkNode(name, "8", "16Gi"))
			s.SetResourceSlice(mkSlice(name, "gpu", 8))
		}
		s.SetDeviceClass(mkDeviceClass("gpu"))
		s.SetResourceClaim(mkDeviceClaim("c", exactly("gpu", 2)))
		for what, edit := range map[string]func(*v1.Pod){"plain": func(*v1.Pod) {}, "devices": claiming("c")} {
			b.Run(fmt.Sprintf("%s-%d", what, nodes), func(b *testing.B) {
				b.ReportAllocs()
				pod, r := mkPod("p", "1", "1Gi", edit), rnd()
				for b.Loop() {
					if d, err := s.Place(Request{Pod: pod}, r); err != nil || d.Node == "" {
						b.Fatal(d.Refusal, err)
					}
				}
			})
		}
	}
}
