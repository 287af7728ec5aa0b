package oracle

import (
	"bytes"
	"fmt"
	"slices"

	appsv1 "k8s.io/api/apps/v1"
	v1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	resourceapi "k8s.io/api/resource/v1"
	storagev1 "k8s.io/api/storage/v1"
	"sigs.k8s.io/yaml"
)

// world is a cluster, and the pods that ask for a node of it one after the other; nothing is placed between them.
type world struct {
	Seed    uint64 `json:"seed"`
	Profile int    `json:"profile"` // in profiles

	Namespaces   []*v1.Namespace                 `json:"namespaces,omitempty"`
	Nodes        []*v1.Node                      `json:"nodes,omitempty"`
	Pods         []*v1.Pod                       `json:"pods,omitempty"` // on nodes, or nominated to one
	Services     []*v1.Service                   `json:"services,omitempty"`
	Controllers  []*v1.ReplicationController     `json:"controllers,omitempty"`
	ReplicaSets  []*appsv1.ReplicaSet            `json:"replicaSets,omitempty"`
	StatefulSets []*appsv1.StatefulSet           `json:"statefulSets,omitempty"`
	Budgets      []*policyv1.PodDisruptionBudget `json:"budgets,omitempty"`

	Storage storage   `json:"storage"`
	Devices deviceSet `json:"devices"`

	Asked []*v1.Pod `json:"asked,omitempty"`
}

func (w *world) String() string {
	var b bytes.Buffer
	out, err := yaml.Marshal(w)
	if err != nil {
		return err.Error()
	}
	fmt.Fprintf(&b, "# seed %d, %d nodes, %d pods\n", w.Seed, len(w.Nodes), len(w.Pods))
	b.Write(out)
	return b.String()
}

// shrink takes things away as long as the world still fails, and returns the smallest that it finds in a bounded number
// of attempts.
func shrink(w *world, fails func(*world) bool) *world {
	attempts := 2000
	for again := true; again && attempts > 0; {
		again = false
		for _, cut := range []func(*world, int) bool{
			without(func(w *world) *[]*v1.Pod { return &w.Asked }),
			without(func(w *world) *[]*v1.Pod { return &w.Pods }),
			withoutNode,
			without(func(w *world) *[]*v1.Service { return &w.Services }),
			without(func(w *world) *[]*v1.ReplicationController { return &w.Controllers }),
			without(func(w *world) *[]*appsv1.ReplicaSet { return &w.ReplicaSets }),
			without(func(w *world) *[]*appsv1.StatefulSet { return &w.StatefulSets }),
			without(func(w *world) *[]*policyv1.PodDisruptionBudget { return &w.Budgets }),
			without(func(w *world) *[]*v1.Namespace { return &w.Namespaces }),
			without(func(w *world) *[]*v1.PersistentVolume { return &w.Storage.Volumes }),
			without(func(w *world) *[]*v1.PersistentVolumeClaim { return &w.Storage.Claims }),
			without(func(w *world) *[]*storagev1.CSINode { return &w.Storage.CSINodes }),
			without(func(w *world) *[]*resourceapi.ResourceClaim { return &w.Devices.Claims }),
			without(func(w *world) *[]*resourceapi.ResourceSlice { return &w.Devices.Slices }),
			without(func(w *world) *[]*resourceapi.DeviceClass { return &w.Devices.Classes }),
		} {
			for i := 0; attempts > 0; {
				smaller := *w
				if !cut(&smaller, i) {
					break
				}
				attempts--
				smaller.Storage = smaller.Storage.drop()
				if fails(&smaller) {
					w, again = &smaller, true
				} else {
					i++
				}
			}
		}
	}
	return w
}

func without[T any](field func(*world) *[]T) func(*world, int) bool {
	return func(w *world, i int) bool {
		list := field(w)
		if i >= len(*list) {
			return false
		}
		*list = slices.Delete(slices.Clone(*list), i, i+1)
		return true
	}
}

// withoutNode leaves one: without any, upstream answers before its plugins are asked.
func withoutNode(w *world, i int) bool {
	if i >= len(w.Nodes) || len(w.Nodes) == 1 {
		return false
	}
	name := w.Nodes[i].Name
	w.Nodes = slices.Delete(slices.Clone(w.Nodes), i, i+1)
	w.Pods = slices.DeleteFunc(slices.Clone(w.Pods), func(p *v1.Pod) bool { return p.Spec.NodeName == name || p.Status.NominatedNodeName == name })
	return true
}
