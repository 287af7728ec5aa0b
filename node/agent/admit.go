package agent

import (
	"fmt"
	"sort"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	resourcehelper "k8s.io/component-helpers/resource"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"

	"skein.io/skein/node/agent/lifecycle"
)

// admit decides once per pod whether it may run here: the scheduler decided on what it knew, and two schedulers in a row may
// have used the same room. It is called by one goroutine. false: not yet to be told.
func (a *Agent) admit(p *corev1.Pod, pods []*corev1.Pod) (*lifecycle.Verdict, bool) {
	if rec := a.cfg.Desired.Record(p.UID); rec != nil && (rec.Admitted || rec.Status != nil) {
		return nil, true
	}
	if p.DeletionTimestamp != nil || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed || p.Status.Phase == corev1.PodRunning {
		return nil, true // it ran here before, or never will
	}
	node := a.cfg.Desired.Node(a.cfg.NodeName)
	if node == nil {
		return nil, false
	}
	v := a.grants.admit(a, p, pods, node.Labels)
	if v != nil {
		v.Message = "Pod was rejected: " + v.Message
		a.containerEvent(p, "", corev1.EventTypeWarning, v.Reason, v.Message)
		a.cfg.Logger.Warn("pod rejected", "pod", lifecycle.PodDesc(p), "reason", v.Reason, "message", v.Message)
	}
	return v, true
}

// Fits checks a pod against a node that already runs others; nil: it fits. Pure.
func Fits(p *corev1.Pod, others []*corev1.Pod, labels map[string]string, allocatable corev1.ResourceList) *lifecycle.Verdict {
	if want := allocatable.Pods().Value(); int64(len(others)+1) > want {
		return &lifecycle.Verdict{Reason: "OutOfpods", Message: insufficient(corev1.ResourcePods, 1, int64(len(others)), want)}
	}
	if v := room(p, nil, others, allocatable); v != nil {
		return v
	}
	if v := portConflict(p, others); v != nil {
		return v
	}
	node := &corev1.Node{}
	node.Labels = labels
	ok, err := nodeaffinity.GetRequiredNodeAffinity(p).Match(node)
	if err != nil || !ok {
		return &lifecycle.Verdict{Reason: "NodeAffinity", Message: "Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector"}
	}
	if os := p.Spec.OS; os != nil && os.Name != corev1.Linux {
		return &lifecycle.Verdict{Reason: "PodOSNotSupported", Message: "Failed to admit pod as the OS field doesn't match node OS"}
	}
	return nil
}

// room checks that the pod's requests fit beside the others; of a pod that has some already only what it asks for beyond them.
func room(p, has *corev1.Pod, others []*corev1.Pod, allocatable corev1.ResourceList) *lifecycle.Verdict {
	used, granted := corev1.ResourceList{}, corev1.ResourceList{}
	if has != nil {
		granted = resourcehelper.PodRequests(has, resourcehelper.PodResourcesOptions{})
	}
	for _, o := range others {
		for n, q := range resourcehelper.PodRequests(o, resourcehelper.PodResourcesOptions{}) {
			sum := used[n]
			sum.Add(q)
			used[n] = sum
		}
	}
	req := resourcehelper.PodRequests(p, resourcehelper.PodResourcesOptions{})
	names := make([]string, 0, len(req))
	for n := range req {
		names = append(names, string(n))
	}
	sort.Strings(names) // cpu before memory before the rest: the reason is the same each time
	for _, n := range names {
		name := corev1.ResourceName(n)
		have, known := allocatable[name]
		want := req[name]
		if want.IsZero() || !known && !isNative(name) {
			continue // extended resources that the node does not know are not its business
		}
		r, u, h := amount(name, want), amount(name, used[name]), amount(name, have)
		if r+u > h && (has == nil || r > amount(name, granted[name])) {
			return &lifecycle.Verdict{Reason: "OutOf" + n, Message: insufficient(name, r, u, h)}
		}
	}
	return nil
}

func isNative(n corev1.ResourceName) bool {
	return n == corev1.ResourceCPU || n == corev1.ResourceMemory || n == corev1.ResourceEphemeralStorage
}

func amount(n corev1.ResourceName, q resource.Quantity) int64 {
	if n == corev1.ResourceCPU {
		return q.MilliValue()
	}
	return q.Value()
}

func insufficient(n corev1.ResourceName, requested, used, capacity int64) string {
	return fmt.Sprintf("Node didn't have enough resource: %s, requested: %d, used: %d, capacity: %d", n, requested, used, capacity)
}

type hostPort struct {
	proto corev1.Protocol
	port  int32
	ip    string
}

func hostPorts(p *corev1.Pod) []hostPort {
	var out []hostPort
	add := func(c *corev1.Container) {
		for _, port := range c.Ports {
			if port.HostPort > 0 {
				out = append(out, hostPort{port.Protocol, port.HostPort, port.HostIP})
			}
		}
	}
	for i := range p.Spec.Containers {
		add(&p.Spec.Containers[i])
	}
	for i := range p.Spec.InitContainers {
		if c := &p.Spec.InitContainers[i]; lifecycle.IsSidecar(c) {
			add(c)
		}
	}
	return out
}

func portConflict(p *corev1.Pod, others []*corev1.Pod) *lifecycle.Verdict {
	any := func(ip string) bool { return ip == "" || ip == "0.0.0.0" || ip == "::" }
	for _, want := range hostPorts(p) {
		for _, o := range others {
			for _, have := range hostPorts(o) {
				if have.port == want.port && have.proto == want.proto && (have.ip == want.ip || any(have.ip) || any(want.ip)) {
					return &lifecycle.Verdict{Reason: "NodePorts", Message: fmt.Sprintf("Predicate NodePorts failed: node(s) didn't have free ports for the requested pod ports (%s port %d is used by pod %s/%s)",
						want.proto, want.port, o.Namespace, o.Name)}
				}
			}
		}
	}
	return nil
}
