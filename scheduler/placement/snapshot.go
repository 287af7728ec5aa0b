package placement

import (
	"cmp"
	"maps"
	"slices"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
)

// Snapshot is the scheduler's picture of the cluster: its nodes, the pods
// that hold resources on them (bound, or assumed to be bound soon), and the
// sums that decisions read. See the package comment for who may use it.
type Snapshot struct {
	nodes      map[string]*node       // also of nodes not (or no longer) known that still hold pods
	order      []*node                // the known ones, by name
	pods       map[types.UID]*podInfo // all that hold resources
	namespaces map[string]labels.Set
	images     map[string]*imageState
	lost       map[string]bool
	nominated  map[types.UID]*podInfo // pods that wait for evicted ones to go
	counts     counterCache
	groups     groups
	topologies topologies
	devices    devices
	slots      slotPool
	storage    storage
	slotOf     []int32       // parallel to order
	waited     []int32       // by slot: pods nominated there
	versions   []uint64      // by slot: changes with everything that a node alone says to a pod
	imagesGen  uint64        // changes with what images are worth
	priorities map[int32]int // of the pods that hold resources
	classes    classCache
	buffers    buffers
	options    []option // memory of the last plan, to be used again
}

// node is one node with the sums over its pods.
type node struct {
	name string
	slot int      // index in arrays by node; kept while the node is in the map
	obj  *v1.Node // nil while only pods name it
	lost bool     // declared dead by the failure detector

	alloc       Resources
	allocPods   int64
	features    featureSet
	hardTaints  []v1.Taint // NoSchedule and NoExecute
	softTaints  []v1.Taint // PreferNoSchedule
	images      map[string]*imageState
	used        Resources
	scoreCPU    int64 // thousandths of a core, with the scoring amounts for silent containers
	scoreMemory int64 // bytes, likewise
	pods        []*podInfo
	ports       map[hostPort]int // how many pods hold it
	nominated   []*podInfo       // pods not here yet, for which others were evicted
}

// podInfo is a pod with what decisions need of it, computed once.
type podInfo struct {
	pod         presence
	node        *node
	index       int // in node.pods
	request     Resources
	scoreCPU    int64      // thousandths of a core, see scored
	scoreMemory int64      // bytes, likewise
	scoreOther  *Resources // the rest of it; request for most pods
	ports       []hostPort
	terms       *podTerms // noTerms for most pods
}

// imageState is one image name and the nodes that have it.
type imageState struct {
	size  int64 // bytes, as the first node said
	nodes int
}

// NewSnapshot returns an empty cluster.
func NewSnapshot() *Snapshot {
	return &Snapshot{
		nodes:      map[string]*node{},
		pods:       map[types.UID]*podInfo{},
		namespaces: map[string]labels.Set{},
		images:     map[string]*imageState{},
		lost:       map[string]bool{},
		nominated:  map[types.UID]*podInfo{},
		priorities: map[int32]int{},
		counts:     newCounterCache(),
		devices:    newDevices(),
		storage:    newStorage(),
		groups:     newGroups(),
		topologies: topologies{byKey: map[string]*topology{}},
		classes:    newClassCache(),
	}
}

// NumNodes is the number of nodes that decisions choose from.
func (s *Snapshot) NumNodes() int { return len(s.order) }

// NumPods is the number of pods that hold resources.
func (s *Snapshot) NumPods() int { return len(s.pods) }

// HasNode reports whether name is a node to choose from.
func (s *Snapshot) HasNode(name string) bool {
	n := s.nodes[name]
	return n != nil && n.obj != nil
}

// SetNode adds a node or replaces what was known of it.
func (s *Snapshot) SetNode(obj *v1.Node) {
	n := s.ensureNode(obj.Name)
	if n.obj == nil {
		at, _ := slices.BinarySearchFunc(s.order, n.name, func(o *node, name string) int { return cmp.Compare(o.name, name) })
		s.order = slices.Insert(s.order, at, n)
		s.slotOf = slices.Insert(s.slotOf, at, int32(n.slot))
		s.imagesChange()
	}
	n.obj = obj
	s.touch(n)
	s.topologies.node(n, len(s.order))
	n.lost = s.lost[n.name]
	n.alloc = resourcesOf(obj.Status.Allocatable)
	n.allocPods = obj.Status.Allocatable.Pods().Value()
	n.features = declaredBy(obj)
	n.hardTaints, n.softTaints = nil, nil
	for _, t := range obj.Spec.Taints {
		if t.Effect == v1.TaintEffectPreferNoSchedule {
			n.softTaints = append(n.softTaints, t)
		} else {
			n.hardTaints = append(n.hardTaints, t)
		}
	}
	s.setImages(n, obj.Status.Images)
}

// KeepNode takes the newest version of a node that differs in nothing that
// decisions read, so that no older one is held beside it.
func (s *Snapshot) KeepNode(obj *v1.Node) {
	if n := s.nodes[obj.Name]; n != nil && n.obj != nil {
		n.obj = obj
	}
}

// RemoveNode takes a node out of the choice. Its pods stay known until they
// are removed themselves, because their events come by another watch.
func (s *Snapshot) RemoveNode(name string) {
	n := s.nodes[name]
	if n == nil || n.obj == nil {
		return
	}
	at, found := slices.BinarySearchFunc(s.order, name, func(o *node, name string) int { return cmp.Compare(o.name, name) })
	if !found {
		panic("placement: node " + name + " is known but not in order")
	}
	s.order = slices.Delete(s.order, at, at+1)
	s.slotOf = slices.Delete(s.slotOf, at, at+1)
	s.setImages(n, nil)
	s.imagesChange()
	n.obj = nil
	s.touch(n)
	s.topologies.node(n, len(s.order))
	s.dropIfUnused(n)
}

// SetLost names all nodes that the failure detector holds for dead. It
// returns the nodes that have come back since the last call, in no order.
func (s *Snapshot) SetLost(names map[string]bool) (returned []string) {
	for name := range s.lost {
		if !names[name] {
			returned = append(returned, name)
		}
	}
	s.lost = make(map[string]bool, len(names))
	for name, dead := range names {
		if dead {
			s.lost[name] = true
		}
	}
	for _, n := range s.order {
		if lost := s.lost[n.name]; lost != n.lost {
			n.lost = lost
			s.touch(n)
		}
	}
	return returned
}

// SetNamespace records the labels of a namespace, which namespace selectors
// of affinity terms are matched with.
func (s *Snapshot) SetNamespace(name string, set map[string]string) {
	if old, known := s.namespaces[name]; known && maps.Equal(old, set) {
		return
	}
	s.namespaces[name] = set
	s.counts.namespaceChanged()
}

// RemoveNamespace forgets the labels of a namespace.
func (s *Snapshot) RemoveNamespace(name string) {
	delete(s.namespaces, name)
	s.counts.namespaceChanged()
}

// SetPod says that a pod holds its resources on the named node, which need
// not be in its specification yet (a pod assumed to be bound). It replaces
// what was said before of a pod with the same UID. A pod whose affinity
// cannot be parsed takes its place without its terms: the API server lets no
// such pod in, and the resources count in any case.
func (s *Snapshot) SetPod(pod *v1.Pod, nodeName string) {
	s.RemovePod(pod.UID)
	info, err := newPodInfo(pod, true)
	if err != nil {
		info.terms = noTerms
	}
	s.attach(info, s.ensureNode(nodeName))
}

// RemovePod takes a pod off its node; unknown UIDs are ignored.
func (s *Snapshot) RemovePod(uid types.UID) {
	info := s.pods[uid]
	if info == nil {
		return
	}
	n := info.node
	s.detach(info)
	s.dropIfUnused(n)
}

// PodNode returns the node that the pod holds resources on, "" for none.
func (s *Snapshot) PodNode(uid types.UID) string {
	if info := s.pods[uid]; info != nil {
		return info.node.name
	}
	return ""
}

// Stays reports whether the pod holds resources on a node and does not end.
func (s *Snapshot) Stays(uid types.UID) bool {
	info := s.pods[uid]
	return info != nil && !info.pod.ending
}

func newPodInfo(pod *v1.Pod, placed bool) (*podInfo, error) {
	list := podRequests(pod, placed)
	info := &podInfo{pod: presenceOf(pod), request: resourcesOf(list), ports: hostPortsOf(pod)}
	forScore := scored(pod, placed, list)
	cpu, memory := forScore[v1.ResourceCPU], forScore[v1.ResourceMemory]
	info.scoreCPU, info.scoreMemory, info.scoreOther = cpu.MilliValue(), memory.Value(), &info.request
	if !placed && pod.Spec.Resources != nil {
		other := resourcesOf(forScore)
		info.scoreOther = &other
	}
	var err error
	info.terms, err = termsOf(pod)
	return info, err
}

func (s *Snapshot) attach(info *podInfo, n *node) {
	info.node, info.index = n, len(n.pods)
	n.pods = append(n.pods, info)
	n.sum(info, 1)
	s.groups.join(info, n.slot, 1)
	s.pods[info.pod.uid] = info
	s.countPod(&info.pod, n.slot, 1)
	s.priorities[info.pod.priority]++
	s.storage.use(&info.pod, 1)
	s.touch(n)
}

func (s *Snapshot) detach(info *podInfo) {
	n := info.node
	last := len(n.pods) - 1
	n.pods[info.index] = n.pods[last]
	n.pods[info.index].index = info.index
	n.pods[last] = nil
	n.pods = n.pods[:last]
	n.sum(info, -1)
	s.groups.join(info, n.slot, -1)
	delete(s.pods, info.pod.uid)
	s.countPod(&info.pod, n.slot, -1)
	if p := info.pod.priority; s.priorities[p] > 1 {
		s.priorities[p]--
	} else {
		delete(s.priorities, p)
	}
	s.storage.use(&info.pod, -1)
	s.touch(n)
}

// touch makes what was known of a node's answers void.
func (s *Snapshot) touch(n *node) { s.versions[n.slot]++ }

// imagesChange makes what images are worth void, if there are any.
func (s *Snapshot) imagesChange() {
	if len(s.images) > 0 {
		s.imagesGen++
	}
}

// sum adds sign times what a pod takes.
func (n *node) sum(info *podInfo, sign int64) {
	n.used.add(&info.request, sign)
	n.scoreCPU += sign * info.scoreCPU
	n.scoreMemory += sign * info.scoreMemory
	for _, p := range info.ports {
		if n.ports == nil {
			n.ports = map[hostPort]int{}
		}
		n.ports[p] += int(sign)
		if n.ports[p] == 0 {
			delete(n.ports, p)
		}
	}
}

func (s *Snapshot) ensureNode(name string) *node {
	n := s.nodes[name]
	if n == nil {
		n = &node{name: name, slot: s.slots.take()}
		s.nodes[name] = n
		for n.slot >= len(s.versions) {
			s.versions, s.waited = append(s.versions, 0), append(s.waited, 0)
		}
		s.touch(n)
	}
	return n
}

func (s *Snapshot) dropIfUnused(n *node) {
	if n.obj == nil && len(n.pods) == 0 && len(n.nominated) == 0 {
		delete(s.nodes, n.name)
		s.slots.give(n.slot)
	}
}

func (s *Snapshot) setImages(n *node, images []v1.ContainerImage) {
	if sameImages(n.images, images) {
		return
	}
	defer s.imagesChange() // when there are some, and
	s.imagesChange()       // when there were
	for name, state := range n.images {
		if state.nodes--; state.nodes == 0 {
			delete(s.images, name)
		}
	}
	n.images = nil
	for i := range images {
		for _, name := range images[i].Names {
			if _, dup := n.images[name]; dup {
				continue
			}
			state := s.images[name]
			if state == nil {
				state = &imageState{size: images[i].SizeBytes}
				s.images[name] = state
			}
			state.nodes++
			if n.images == nil {
				n.images = make(map[string]*imageState, len(images))
			}
			n.images[name] = state
		}
	}
}

// sameImages reports whether a node that has some images still has those.
func sameImages(have map[string]*imageState, images []v1.ContainerImage) bool {
	names := 0
	for i := range images {
		for _, name := range images[i].Names {
			if _, ok := have[name]; !ok {
				return false
			}
			names++
		}
	}
	return names == len(have) // a name given twice makes a difference where there is none
}

// slotPool hands out small numbers and takes them back.
type slotPool struct {
	next int
	free []int
}

func (p *slotPool) take() int {
	if k := len(p.free); k > 0 {
		slot := p.free[k-1]
		p.free = p.free[:k-1]
		return slot
	}
	p.next++
	return p.next - 1
}

func (p *slotPool) give(slot int) { p.free = append(p.free, slot) }
