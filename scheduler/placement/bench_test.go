package placement

import (
	"fmt"
	"runtime"
	"syscall"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// BenchmarkPlace plans pods one after the other on an ever fuller cluster and
// reports pods/s. Variants: plain pods, pods of a workload (spread over nodes
// and zones by default), pods with required anti-affinity to their peers.
func BenchmarkPlace(b *testing.B) {
	for _, nodes := range []int{500, 5000} {
		for _, kind := range []string{"plain", "workload", "antiaffinity", "hardspread"} {
			b.Run(fmt.Sprintf("nodes=%d/%s", nodes, kind), func(b *testing.B) { benchPlace(b, nodes, kind) })
		}
	}
}

func benchPlace(b *testing.B, nodes int, kind string) {
	s := NewSnapshot()
	for i := range nodes {
		s.SetNode(mkNode(fmt.Sprintf("node-%d", i), "32", "256Gi", zone(fmt.Sprintf("zone-%d", i%3))))
	}
	const perWorkload = 100
	r := rnd()
	b.ReportAllocs()
	b.ResetTimer()
	began := cpuTime(b)
	placed := 0
	for i := range b.N {
		app := fmt.Sprintf("app-%d", i/perWorkload)
		edit := []func(*v1.Pod){labelled("app", app)}
		switch kind {
		case "antiaffinity":
			edit = append(edit, antiAffinity(v1.LabelHostname, selectorOf("app", app)))
		case "hardspread":
			edit = append(edit, spreadOver(v1.LabelTopologyZone, 1, v1.DoNotSchedule, selectorOf("app", app)))
		}
		pod := mkPod(fmt.Sprintf("pod-%d", i), "10m", "16Mi", edit...)
		req := Request{Pod: pod}
		if kind == "workload" {
			req.Peers, _ = metav1.LabelSelectorAsSelector(selectorOf("app", app))
		}
		d, err := s.Place(req, r)
		if err != nil {
			b.Fatal(err)
		}
		if d.Node == "" {
			b.StopTimer() // full: empty it
			for _, info := range s.pods {
				s.RemovePod(info.pod.uid)
			}
			b.StartTimer()
			continue
		}
		s.SetPod(pod, d.Node)
		placed++
	}
	b.ReportMetric(float64(placed)/b.Elapsed().Seconds(), "pods/s")
	b.ReportMetric(float64((cpuTime(b)-began).Microseconds())/float64(b.N), "CPU-us/pod")
}

// cpuTime is what the process has used: on a busy machine the clock says little.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkRefuse is the cost of an attempt that fails on every node.
func BenchmarkRefuse(b *testing.B) {
	s := NewSnapshot()
	for i := range 500 {
		s.SetNode(mkNode(fmt.Sprintf("node-%d", i), "1", "1Gi"))
	}
	pod := mkPod("p", "2", "2Gi")
	r := rnd()
	b.ReportAllocs()
	for b.Loop() {
		if d, err := s.Place(Request{Pod: pod}, r); err != nil || d.Node != "" {
			b.Fatal(d, err)
		}
	}
}

// BenchmarkMemory is what a snapshot holds beside the objects: of 5,000 nodes
// and 30,000 pods, with the answers remembered for a few classes.
func BenchmarkMemory(b *testing.B) {
	var nodes []*v1.Node
	for i := range 5000 {
		nodes = append(nodes, mkNode(fmt.Sprintf("node-%d", i), "32", "256Gi", zone(fmt.Sprintf("zone-%d", i%3))))
	}
	var pods []*v1.Pod
	for i := range 30000 {
		pods = append(pods, mkPod(fmt.Sprintf("pod-%d", i), fmt.Sprintf("%dm", 10+i%8), "16Mi", labelled("app", fmt.Sprint("app-", i%300))))
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	s := cluster(nodes)
	r := rnd()
	for b.Loop() {
		for _, pod := range pods {
			if s.PodNode(pod.UID) != "" {
				continue
			}
			d, err := s.Place(Request{Pod: pod}, r)
			if err != nil || d.Node == "" {
				b.Fatal(d, err)
			}
			s.SetPod(pod, d.Node)
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/(1<<20), "MB")
	runtime.KeepAlive(pods)
	runtime.KeepAlive(s)
}
