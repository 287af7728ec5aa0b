package oracle

import (
	"math/rand/v2"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"skein.io/skein/scheduler/placement"
)

// snapshotOf shows the world to placement, as the scheduler's watches do.
func snapshotOf(w *world) *placement.Snapshot {
	s := placement.NewSnapshot()
	for _, ns := range w.Namespaces {
		s.SetNamespace(ns.Name, ns.Labels)
	}
	for _, n := range w.Nodes {
		s.SetNode(n)
	}
	setStorage(s, &w.Storage)
	setDevices(s, &w.Devices)
	for _, p := range w.Pods {
		if p.Spec.NodeName != "" {
			s.SetPod(p, p.Spec.NodeName)
		} else {
			s.Nominate(p, p.Status.NominatedNodeName)
		}
	}
	return s
}

func setStorage(s *placement.Snapshot, st *storage) {
	for _, o := range st.Classes {
		s.SetStorageClass(o)
	}
	for _, o := range st.Drivers {
		s.SetCSIDriver(o)
	}
	for _, o := range st.CSINodes {
		s.SetCSINode(o)
	}
	for _, o := range st.Capacities {
		s.SetStorageCapacity(o)
	}
	for _, o := range st.Volumes {
		s.SetVolume(o)
	}
	for _, o := range st.Claims {
		s.SetClaim(o)
	}
	for _, o := range st.Attachments {
		s.SetAttachment(o)
	}
}

func setDevices(s *placement.Snapshot, set *deviceSet) {
	for _, o := range set.Slices {
		s.SetResourceSlice(o)
	}
	for _, o := range set.Claims {
		s.SetResourceClaim(o)
	}
	for _, o := range set.Classes {
		s.SetDeviceClass(o)
	}
}

func removeDevices(s *placement.Snapshot, set *deviceSet) {
	for _, o := range set.Classes {
		s.RemoveDeviceClass(o.Name)
	}
	for _, o := range set.Claims {
		s.RemoveResourceClaim(o)
	}
	for _, o := range set.Slices {
		s.RemoveResourceSlice(o.Name)
	}
}

func removeStorage(s *placement.Snapshot, st *storage) {
	for _, o := range st.Claims {
		s.RemoveClaim(o.Namespace, o.Name)
	}
	for _, o := range st.Volumes {
		s.RemoveVolume(o.Name)
	}
	for _, o := range st.Classes {
		s.RemoveStorageClass(o.Name)
	}
	for _, o := range st.Drivers {
		s.RemoveCSIDriver(o.Name)
	}
	for _, o := range st.CSINodes {
		s.RemoveCSINode(o.Name)
	}
	for _, o := range st.Capacities {
		s.RemoveStorageCapacity(o.Namespace, o.Name)
	}
	for _, o := range st.Attachments {
		s.RemoveAttachment(o)
	}
}

// reach returns a snapshot of the world. Every other one is reached by changes from that of the seed before, after questions
// have been asked there, as a scheduler's snapshot is: whatever placement keeps between decisions must follow.
func reach(w *world, profiles []*placement.Profile) (*placement.Snapshot, error) {
	if w.Seed%2 == 0 {
		return snapshotOf(w), nil
	}
	before := generate(w.Seed-1, len(profiles))
	s := snapshotOf(before)
	for _, pod := range append(before.Asked, w.Asked...) {
		for _, profile := range profiles[:2] {
			if _, err := s.Place(requestOf(before, profile, pod), rand.New(rand.NewPCG(w.Seed, 1))); err != nil {
				return nil, err
			}
		}
	}
	change(s, before, w)
	return s, nil
}

// change tells the snapshot what became different, in an order that watches could bring it in.
func change(s *placement.Snapshot, from, to *world) {
	nodes, pods, spaces := map[string]bool{}, map[types.UID]bool{}, map[string]bool{}
	for _, n := range to.Nodes {
		nodes[n.Name] = true
	}
	for _, p := range to.Pods {
		pods[p.UID] = true
	}
	for i, n := range to.Nodes {
		if i%2 == 0 {
			s.SetNode(n)
		}
	}
	for _, p := range from.Pods {
		if !pods[p.UID] {
			s.RemovePod(p.UID)
		}
		s.Unnominate(p.UID)
	}
	removeStorage(s, &from.Storage)
	setStorage(s, &to.Storage)
	removeDevices(s, &from.Devices)
	setDevices(s, &to.Devices)
	for _, n := range from.Nodes {
		if !nodes[n.Name] {
			s.RemoveNode(n.Name)
		}
	}
	for _, ns := range to.Namespaces {
		spaces[ns.Name] = true
		s.SetNamespace(ns.Name, ns.Labels)
	}
	for _, ns := range from.Namespaces {
		if !spaces[ns.Name] {
			s.RemoveNamespace(ns.Name)
		}
	}
	for _, p := range to.Pods {
		if p.Spec.NodeName != "" {
			s.SetPod(p, p.Spec.NodeName)
		} else {
			s.RemovePod(p.UID)
			s.Nominate(p, p.Status.NominatedNodeName)
		}
	}
	for i, n := range to.Nodes {
		if i%2 == 1 {
			s.SetNode(n)
		}
	}
}

// workload is what the scheduler's view finds for a pod.
func workload(w *world, pod *v1.Pod) *metav1.LabelSelector {
	owner := metav1.GetControllerOfNoCopy(pod)
	if owner == nil {
		return nil
	}
	switch owner.APIVersion + "/" + owner.Kind {
	case "apps/v1/ReplicaSet":
		for _, o := range w.ReplicaSets {
			if o.Namespace == pod.Namespace && o.Name == owner.Name {
				return o.Spec.Selector
			}
		}
	case "apps/v1/StatefulSet":
		for _, o := range w.StatefulSets {
			if o.Namespace == pod.Namespace && o.Name == owner.Name {
				return o.Spec.Selector
			}
		}
	case "v1/ReplicationController":
		for _, o := range w.Controllers {
			if o.Namespace == pod.Namespace && o.Name == owner.Name {
				return &metav1.LabelSelector{MatchLabels: o.Spec.Selector}
			}
		}
	}
	return nil
}

func requestOf(w *world, profile *placement.Profile, pod *v1.Pod) placement.Request {
	var services []*v1.Service
	for _, s := range w.Services {
		if s.Namespace == pod.Namespace {
			services = append(services, s)
		}
	}
	return placement.Request{Pod: pod, Profile: profile, Peers: placement.DefaultSelector(pod, services, workload(w, pod)), Budgets: w.Budgets, Now: time.Now()}
}

// askOurs puts the same question to placement. chosen is the node on which others would be evicted.
func askOurs(w *world, s *placement.Snapshot, profile *placement.Profile, pod *v1.Pod) (out *answer, d placement.Decision, err error) {
	req := requestOf(w, profile, pod)
	out = &answer{Nodes: map[string]nodeAnswer{}, Options: map[string]option{}, Eligible: true}
	explained, err := s.Explain(req)
	if err != nil {
		return nil, d, err
	}
	for _, e := range explained {
		a := nodeAnswer{Filter: string(e.Filter), Reasons: e.Reasons, Evict: e.EvictionMayHelp, Scores: scoresOf(&e.Scores)}
		if a.Filter == "" {
			a.Total = e.Scores.Total()
		} else {
			a.Scores = nil
		}
		out.Nodes[e.Node] = a
	}
	if d, err = s.Place(req, rand.New(rand.NewPCG(w.Seed, 0))); err != nil || d.Refusal == nil {
		return out, d, err
	}
	out.Message = d.Refusal.Error()
	if !profile.NoPreemption {
		for _, p := range s.Preemptions(req) {
			o := option{Violations: int64(p.Violations)}
			for _, victim := range p.Victims {
				o.Victims = append(o.Victims, victim.Namespace+"/"+victim.Name)
			}
			out.Options[p.Node] = o
		}
	}
	return out, d, nil
}

func scoresOf(s *placement.Scores) map[string]int64 {
	out := map[string]int64{}
	for name, score := range map[string]int64{
		"TaintToleration": s.Taints, "NodeAffinity": s.NodeAffinity, "PodTopologySpread": s.Spread, "InterPodAffinity": s.InterPod,
		"NodeResourcesFit": s.Fit, "NodeResourcesBalancedAllocation": s.Balanced, "ImageLocality": s.ImageLocality, "DynamicResources": s.Devices,
	} {
		if score != 0 {
			out[name] = score
		}
	}
	return out
}
