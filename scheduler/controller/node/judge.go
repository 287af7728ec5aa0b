package node

import (
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skein.io/skein/scheduler/controller"
)

// fate is what has become of a node.
type fate int

const (
	live fate = iota // its agent speaks for it
	lost             // it is dead or cut off
	left             // it has left the cluster and will not return as it was
)

// judgement is what the controller makes of one node; two equal ones call for
// the same acts.
type judgement struct {
	fate   fate
	ready  bool
	status corev1.ConditionStatus // of Ready, as it is or will be written; "" if it never was
	zone   string
	counts bool // towards the state of its zone
	since  time.Time
	byBeat bool // lost for want of heartbeats, not by gossip
	extra  bool // it has NoExecute taints of others: pods may have to go
}

// excludeFromDisruption keeps a node out of the count of its zone.
const excludeFromDisruption = "node.kubernetes.io/exclude-disruption"

// judge makes up its mind about one node. lastBeat is when a sign of life of
// a node that the failure detector does not know was last seen to change; zero
// says that it was lost before anything was seen here.
func judge(n *corev1.Node, verdict controller.NodeHealth, lastBeat time.Time, set Settings, now time.Time) judgement {
	j := judgement{zone: zoneOf(n)}
	ready := condition(n, corev1.NodeReady)
	if ready != nil {
		j.status = ready.Status
	}
	switch verdict.State {
	case controller.Dead:
		j.fate, j.since = lost, verdict.Since
	case controller.Left:
		j.fate, j.since = left, verdict.Since
	case controller.Unknown:
		grace := set.HeartbeatGrace
		if ready == nil {
			grace = set.StartupGrace
		}
		switch {
		case lastBeat.IsZero():
			j.fate, j.since, j.byBeat = lost, now, true
		case now.Sub(lastBeat) >= grace:
			j.fate, j.since, j.byBeat = lost, lastBeat.Add(grace), true
		}
	}
	if j.fate != live {
		j.status = corev1.ConditionUnknown
	}
	j.ready = j.status == corev1.ConditionTrue
	_, excluded := n.Labels[excludeFromDisruption]
	j.counts = !excluded && j.fate != left
	j.extra = slices.ContainsFunc(n.Spec.Taints, func(t corev1.Taint) bool { return t.Effect == corev1.TaintEffectNoExecute })
	return j
}

// evicts reports whether pods should be driven off by the node's readiness: it
// is lost, or its agent says that it is not ready. A node that gossip sees
// again but whose agent has not spoken yet keeps its pods.
func (j judgement) evicts() bool {
	return j.fate != live || j.status == corev1.ConditionFalse
}

// needsCare reports whether changes of the node's pods matter here.
func (j judgement) needsCare() bool { return j.fate != live || !j.ready || j.extra }

func condition(n *corev1.Node, kind corev1.NodeConditionType) *corev1.NodeCondition {
	for i := range n.Status.Conditions {
		if n.Status.Conditions[i].Type == kind {
			return &n.Status.Conditions[i]
		}
	}
	return nil
}

// What lostConditions writes.
const (
	reasonUnknown      = "NodeStatusUnknown"
	reasonNever        = "NodeStatusNeverUpdated"
	messageGossip      = "Gossip declared the node dead; its agent posts no status."
	messageLeft        = "The node has left the cluster."
	messageNoHeartbeat = "Kubelet stopped posting node status."
	messageNever       = "Kubelet never posted node status."
)

// agentConditions are those that only a node's agent can know.
var agentConditions = []corev1.NodeConditionType{
	corev1.NodeReady, corev1.NodeMemoryPressure, corev1.NodeDiskPressure, corev1.NodePIDPressure,
}

// lostConditions returns the conditions to be written about a node that does
// not speak for itself any more; none if that is said already.
func lostConditions(n *corev1.Node, j judgement, now time.Time) []corev1.NodeCondition {
	if j.fate == live {
		return nil
	}
	message := messageGossip
	switch {
	case j.byBeat:
		message = messageNoHeartbeat
	case j.fate == left:
		message = messageLeft
	}
	var out []corev1.NodeCondition
	for _, kind := range agentConditions {
		cond := corev1.NodeCondition{
			Type: kind, Status: corev1.ConditionUnknown, Reason: reasonNever, Message: messageNever,
			LastHeartbeatTime: n.CreationTimestamp, LastTransitionTime: metav1.NewTime(now),
		}
		if old := condition(n, kind); old != nil {
			if old.Status == corev1.ConditionUnknown {
				continue
			}
			cond.Reason, cond.Message, cond.LastHeartbeatTime = reasonUnknown, message, old.LastHeartbeatTime
		}
		out = append(out, cond)
	}
	return out
}

// pressureTaints are the conditions that keep new pods off a node while true.
var pressureTaints = map[corev1.NodeConditionType]string{
	corev1.NodeMemoryPressure:     corev1.TaintNodeMemoryPressure,
	corev1.NodeDiskPressure:       corev1.TaintNodeDiskPressure,
	corev1.NodePIDPressure:        corev1.TaintNodePIDPressure,
	corev1.NodeNetworkUnavailable: corev1.TaintNodeNetworkUnavailable,
}

// managed are the keys of the taints that this controller alone decides.
var managed = map[string]bool{
	corev1.TaintNodeNotReady: true, corev1.TaintNodeUnreachable: true, corev1.TaintNodeUnschedulable: true,
	corev1.TaintNodeMemoryPressure: true, corev1.TaintNodeDiskPressure: true,
	corev1.TaintNodePIDPressure: true, corev1.TaintNodeNetworkUnavailable: true,
}

// desiredTaints returns all taints that the node should have, in a stable
// order, and whether that differs from what it has. evict says that pods may
// be driven off it for its state.
func desiredTaints(n *corev1.Node, j judgement, evict bool, now time.Time) ([]corev1.Taint, bool) {
	var want []corev1.Taint
	for _, t := range n.Spec.Taints {
		if !managed[t.Key] {
			want = append(want, t)
		}
	}
	others := len(want)
	add := func(key string, effect corev1.TaintEffect) {
		t := corev1.Taint{Key: key, Effect: effect}
		if at := slices.IndexFunc(n.Spec.Taints, func(o corev1.Taint) bool { return o.MatchTaint(&t) }); at >= 0 {
			t = n.Spec.Taints[at]
		} else {
			added := metav1.NewTime(now)
			t.TimeAdded = &added
		}
		want = append(want, t)
	}
	if n.Spec.Unschedulable {
		add(corev1.TaintNodeUnschedulable, corev1.TaintEffectNoSchedule)
	}
	key := ""
	switch j.status {
	case corev1.ConditionUnknown:
		key = corev1.TaintNodeUnreachable
	case corev1.ConditionTrue:
	default: // false, or never said
		key = corev1.TaintNodeNotReady
	}
	if key != "" {
		add(key, corev1.TaintEffectNoSchedule)
		if evict && j.evicts() {
			add(key, corev1.TaintEffectNoExecute)
		}
	}
	for _, kind := range []corev1.NodeConditionType{
		corev1.NodeDiskPressure, corev1.NodeMemoryPressure, corev1.NodeNetworkUnavailable, corev1.NodePIDPressure,
	} {
		if cond := condition(n, kind); cond != nil && cond.Status == corev1.ConditionTrue && j.fate == live {
			add(pressureTaints[kind], corev1.TaintEffectNoSchedule)
		}
	}
	// The order of those that stay does not matter to anybody; only a
	// difference in what is there is worth a write.
	same := len(want) == len(n.Spec.Taints)
	for _, t := range want[others:] {
		same = same && slices.ContainsFunc(n.Spec.Taints, func(o corev1.Taint) bool { return o.MatchTaint(&t) })
	}
	return want, !same
}

// zoneOf names the node's zone by the well-known labels; "" if it has none.
func zoneOf(n *corev1.Node) string {
	region, zone := n.Labels[corev1.LabelTopologyRegion], n.Labels[corev1.LabelTopologyZone]
	if region == "" && zone == "" {
		return ""
	}
	return region + "/" + zone
}

func zoneName(zone string) string {
	if zone == "" {
		return "(none)"
	}
	return zone
}
