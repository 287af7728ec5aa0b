package server

import (
	"context"
	"fmt"
	"net/http"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"skein.io/skein/node/agent/usage"
)

// usage answers /stats/usage: what the node and its pods use now, for the API's metrics.k8s.io.
func (s *Server) usage(w http.ResponseWriter, r *http.Request) {
	base, now, err := s.sampler.Window(r.Context())
	if err != nil {
		fail(w, fmt.Errorf("usage of node %s: %w", s.cfg.NodeName, err))
		return
	}
	writeJSON(w, usage.Rates(s.cfg.NodeName, base, now, s.cfg.Pods()))
}

// sample reads the counters of the machine and of all containers that run.
func (s *Server) sample(ctx context.Context) (usage.Sample, error) {
	running, err := s.cfg.Runtime.ListContainers(ctx, &runtimeapi.ContainerFilter{State: &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING}})
	if err != nil {
		return usage.Sample{}, fmt.Errorf("list containers: %w", err)
	}
	stats, err := s.cfg.Runtime.ListContainerStats(ctx, nil)
	if err != nil {
		return usage.Sample{}, fmt.Errorf("read what containers use: %w", err)
	}
	out := usage.Sample{At: timeNow(), Containers: map[string]usage.Container{}}
	byID := make(map[string]*runtimeapi.ContainerStats, len(stats))
	for _, st := range stats {
		byID[st.GetAttributes().GetId()] = st
	}
	for _, c := range running {
		st := byID[c.Id]
		cpu, memory := st.GetCpu().GetUsageCoreNanoSeconds(), st.GetMemory().GetWorkingSetBytes()
		if cpu == nil || memory == nil {
			continue // it ended meanwhile
		}
		out.Containers[c.Id] = usage.Container{PodUID: c.Labels[labelUID], Name: c.Labels[labelContainer],
			Started: time.Unix(0, c.CreatedAt), At: time.Unix(0, st.Cpu.Timestamp), CPU: cpu.Value, Memory: memory.Value}
	}
	if out.CPU, err = cpuTime("/proc/stat"); err != nil {
		return out, err
	}
	mem, err := meminfo("/proc/meminfo")
	if err != nil {
		return out, err
	}
	out.Memory = mem["MemTotal"] - mem["MemAvailable"]
	return out, nil
}
