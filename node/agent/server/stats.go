package server

import (
	"bufio"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/common/expfmt"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	statsapi "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
)

// summary answers /stats/summary, the form that metrics-server and others read.
func (s *Server) summary(w http.ResponseWriter, r *http.Request) {
	boxes, err := s.cfg.Runtime.ListPodSandboxStats(r.Context(), nil)
	if err != nil {
		fail(w, err)
		return
	}
	out := statsapi.Summary{Node: nodeStats(s.cfg.NodeName), Pods: []statsapi.PodStats{}}
	for _, b := range boxes {
		out.Pods = append(out.Pods, podStats(b))
	}
	writeJSON(w, out)
}

func podStats(b *runtimeapi.PodSandboxStats) statsapi.PodStats {
	m := b.GetAttributes().GetMetadata()
	p := statsapi.PodStats{PodRef: statsapi.PodReference{Name: m.GetName(), Namespace: m.GetNamespace(), UID: m.GetUid()},
		CPU: cpuStats(b.GetLinux().GetCpu()), Memory: memoryStats(b.GetLinux().GetMemory())}
	if n := b.GetLinux().GetNetwork().GetDefaultInterface(); n != nil {
		i := statsapi.InterfaceStats{Name: n.GetName(), RxBytes: value(n.GetRxBytes()), TxBytes: value(n.GetTxBytes())}
		p.Network = &statsapi.NetworkStats{Time: metav1.Now(), InterfaceStats: i, Interfaces: []statsapi.InterfaceStats{i}}
	}
	if n := b.GetLinux().GetProcess().GetProcessCount(); n != nil {
		p.ProcessStats = &statsapi.ProcessStats{ProcessCount: value(n)}
	}
	for _, c := range b.GetLinux().GetContainers() {
		p.Containers = append(p.Containers, statsapi.ContainerStats{Name: c.GetAttributes().GetMetadata().GetName(),
			CPU: cpuStats(c.GetCpu()), Memory: memoryStats(c.GetMemory())})
	}
	return p
}

func value(v *runtimeapi.UInt64Value) *uint64 {
	if v == nil {
		return nil
	}
	return &v.Value
}

func cpuStats(c *runtimeapi.CpuUsage) *statsapi.CPUStats {
	if c == nil {
		return nil
	}
	return &statsapi.CPUStats{Time: metav1.NewTime(time.Unix(0, c.Timestamp)), UsageCoreNanoSeconds: value(c.UsageCoreNanoSeconds), UsageNanoCores: value(c.UsageNanoCores)}
}

func memoryStats(m *runtimeapi.MemoryUsage) *statsapi.MemoryStats {
	if m == nil {
		return nil
	}
	return &statsapi.MemoryStats{Time: metav1.NewTime(time.Unix(0, m.Timestamp)), WorkingSetBytes: value(m.WorkingSetBytes), AvailableBytes: value(m.AvailableBytes),
		UsageBytes: value(m.UsageBytes), RSSBytes: value(m.RssBytes), PageFaults: value(m.PageFaults), MajorPageFaults: value(m.MajorPageFaults)}
}

// nodeStats reads the machine's own counters.
func nodeStats(name string) statsapi.NodeStats {
	now := metav1.Now()
	n := statsapi.NodeStats{NodeName: name}
	if mem, err := meminfo("/proc/meminfo"); err == nil {
		avail, total := mem["MemAvailable"], mem["MemTotal"]
		used := total - avail
		n.Memory = &statsapi.MemoryStats{Time: now, AvailableBytes: &avail, WorkingSetBytes: &used, UsageBytes: &used}
	}
	if ns, err := cpuTime("/proc/stat"); err == nil {
		n.CPU = &statsapi.CPUStats{Time: now, UsageCoreNanoSeconds: &ns}
	}
	return n
}

// meminfo reads /proc/meminfo into bytes.
func meminfo(path string) (map[string]uint64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	m := map[string]uint64{}
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if k, rest, ok := strings.Cut(sc.Text(), ":"); ok {
			if fs := strings.Fields(rest); len(fs) > 0 {
				if v, err := strconv.ParseUint(fs[0], 10, 64); err == nil {
					m[k] = v << 10
				}
			}
		}
	}
	return m, nil
}

// cpuTime is the time in ns that all CPUs were busy since boot: user, nice, system, irq, softirq and steal of proc(5).
func cpuTime(path string) (uint64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	line, _, _ := strings.Cut(string(b), "\n")
	fs := strings.Fields(line)
	if len(fs) < 9 || fs[0] != "cpu" {
		return 0, fmt.Errorf("%s: unexpected first line %q", path, line)
	}
	var ticks uint64
	for _, i := range []int{1, 2, 3, 6, 7, 8} {
		v, err := strconv.ParseUint(fs[i], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", path, err)
		}
		ticks += v
	}
	return ticks * uint64(time.Second/100), nil // USER_HZ is 100 on every Linux that Go supports
}

// metrics answers /metrics in the text form of Prometheus: each pod's CPU and memory.
func (s *Server) metrics(w http.ResponseWriter, r *http.Request) {
	boxes, err := s.cfg.Runtime.ListPodSandboxStats(r.Context(), nil)
	if err != nil {
		fail(w, err)
		return
	}
	w.Header().Set("Content-Type", "text/plain; version=0.0.4")
	fmt.Fprintf(w, "# TYPE skein_agent_pods gauge\nskein_agent_pods %d\n# TYPE pod_cpu_usage_seconds_total counter\n# TYPE pod_memory_working_set_bytes gauge\n", len(s.cfg.Pods()))
	for _, b := range boxes {
		m := b.GetAttributes().GetMetadata()
		l := fmt.Sprintf("{namespace=%q,pod=%q}", m.GetNamespace(), m.GetName())
		if c := b.GetLinux().GetCpu().GetUsageCoreNanoSeconds(); c != nil {
			fmt.Fprintf(w, "pod_cpu_usage_seconds_total%s %f\n", l, float64(c.Value)/1e9)
		}
		if c := b.GetLinux().GetMemory().GetWorkingSetBytes(); c != nil {
			fmt.Fprintf(w, "pod_memory_working_set_bytes%s %d\n", l, c.Value)
		}
	}
	if s.cfg.Metrics == nil {
		return
	}
	more, err := s.cfg.Metrics.Gather()
	if err != nil {
		s.cfg.Logger.Warn("some metrics are missing", "err", err)
	}
	for _, m := range more {
		if _, err := expfmt.MetricFamilyToText(w, m); err != nil {
			return // the client went away
		}
	}
}
