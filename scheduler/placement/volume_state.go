package placement

import (
	"slices"

	v1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
	volumehelpers "k8s.io/component-helpers/storage/volume"
)

// storage is what a snapshot knows of volumes: objects as the API has them,
// and over them the claims and volumes as decisions that are under way will
// make them. A cluster without claims pays nothing for it.
type storage struct {
	claims  map[string]*v1.PersistentVolumeClaim // by namespace/name
	volumes map[string]*volumeInfo
	byClass map[string]map[string]*volumeInfo // class -> name
	// What decisions made of claims and volumes, until the API shows a newer version.
	assumedClaims map[string]*v1.PersistentVolumeClaim

	classes     map[string]*storagev1.StorageClass
	csiNodes    map[string]*storagev1.CSINode
	drivers     map[string]*storagev1.CSIDriver
	capacities  map[string]*storagev1.CSIStorageCapacity          // by namespace/name
	attachments map[string]map[string]*storagev1.VolumeAttachment // node -> name

	// users counts the pods that hold resources and use a claim.
	users map[string]int
}

// volumeInfo is a volume with what decisions need of it, computed once.
type volumeInfo struct {
	obj     *v1.PersistentVolume
	assumed *v1.PersistentVolume // as a decision made it; nil: as obj
	// affinity is nil if any node can reach the volume.
	affinity *nodeaffinity.LazyErrorNodeSelector
	// hosts are the values of the host name label that the affinity demands, nil
	// if it does not: local volumes need not be tried on other nodes.
	hosts map[string]bool
}

func newStorage() storage {
	return storage{
		claims:        map[string]*v1.PersistentVolumeClaim{},
		volumes:       map[string]*volumeInfo{},
		byClass:       map[string]map[string]*volumeInfo{},
		assumedClaims: map[string]*v1.PersistentVolumeClaim{},
		classes:       map[string]*storagev1.StorageClass{},
		csiNodes:      map[string]*storagev1.CSINode{},
		drivers:       map[string]*storagev1.CSIDriver{},
		capacities:    map[string]*storagev1.CSIStorageCapacity{},
		attachments:   map[string]map[string]*storagev1.VolumeAttachment{},
		users:         map[string]int{},
	}
}

// current is the volume as the decisions so far leave it.
func (v *volumeInfo) current() *v1.PersistentVolume {
	if v.assumed != nil {
		return v.assumed
	}
	return v.obj
}

// SetClaim records a claim as the API has it; what was assumed of it is over.
func (s *Snapshot) SetClaim(claim *v1.PersistentVolumeClaim) {
	key := claim.Namespace + "/" + claim.Name
	s.storage.claims[key] = claim
	delete(s.storage.assumedClaims, key)
}

// RemoveClaim forgets a claim.
func (s *Snapshot) RemoveClaim(namespace, name string) {
	delete(s.storage.claims, namespace+"/"+name)
	delete(s.storage.assumedClaims, namespace+"/"+name)
}

// SetVolume records a volume as the API has it; what was assumed of it is over.
func (s *Snapshot) SetVolume(volume *v1.PersistentVolume) {
	s.RemoveVolume(volume.Name)
	info := &volumeInfo{obj: volume}
	if a := volume.Spec.NodeAffinity; a != nil && a.Required != nil {
		info.affinity = nodeaffinity.NewLazyErrorNodeSelector(a.Required)
		info.hosts = hostsOf(a.Required)
	}
	s.storage.volumes[volume.Name] = info
	class := volumehelpers.GetPersistentVolumeClass(volume)
	if s.storage.byClass[class] == nil {
		s.storage.byClass[class] = map[string]*volumeInfo{}
	}
	s.storage.byClass[class][volume.Name] = info
}

// RemoveVolume forgets a volume.
func (s *Snapshot) RemoveVolume(name string) {
	info := s.storage.volumes[name]
	if info == nil {
		return
	}
	delete(s.storage.volumes, name)
	class := volumehelpers.GetPersistentVolumeClass(info.obj)
	delete(s.storage.byClass[class], name)
	if len(s.storage.byClass[class]) == 0 {
		delete(s.storage.byClass, class)
	}
}

// hostsOf returns the host names that a selector leaves, nil if one of its
// terms leaves them open.
func hostsOf(selector *v1.NodeSelector) map[string]bool {
	hosts := map[string]bool{}
	for i := range selector.NodeSelectorTerms {
		at := slices.IndexFunc(selector.NodeSelectorTerms[i].MatchExpressions, func(r v1.NodeSelectorRequirement) bool {
			return r.Key == v1.LabelHostname && r.Operator == v1.NodeSelectorOpIn
		})
		if at < 0 {
			return nil
		}
		for _, value := range selector.NodeSelectorTerms[i].MatchExpressions[at].Values {
			hosts[value] = true
		}
	}
	return hosts
}

// SetStorageClass records a class.
func (s *Snapshot) SetStorageClass(class *storagev1.StorageClass) {
	s.storage.classes[class.Name] = class
}

// RemoveStorageClass forgets a class.
func (s *Snapshot) RemoveStorageClass(name string) { delete(s.storage.classes, name) }

// SetCSINode records which drivers a node has, and how many volumes of each it takes.
func (s *Snapshot) SetCSINode(node *storagev1.CSINode) { s.storage.csiNodes[node.Name] = node }

// RemoveCSINode forgets what drivers a node has.
func (s *Snapshot) RemoveCSINode(name string) { delete(s.storage.csiNodes, name) }

// SetCSIDriver records a driver.
func (s *Snapshot) SetCSIDriver(driver *storagev1.CSIDriver) { s.storage.drivers[driver.Name] = driver }

// RemoveCSIDriver forgets a driver.
func (s *Snapshot) RemoveCSIDriver(name string) { delete(s.storage.drivers, name) }

// SetStorageCapacity records how much can still be provisioned somewhere.
func (s *Snapshot) SetStorageCapacity(capacity *storagev1.CSIStorageCapacity) {
	s.storage.capacities[capacity.Namespace+"/"+capacity.Name] = capacity
}

// RemoveStorageCapacity forgets it.
func (s *Snapshot) RemoveStorageCapacity(namespace, name string) {
	delete(s.storage.capacities, namespace+"/"+name)
}

// SetAttachment records that a volume is attached to a node, or is to be.
func (s *Snapshot) SetAttachment(a *storagev1.VolumeAttachment) {
	// The node of an attachment is immutable.
	of := s.storage.attachments[a.Spec.NodeName]
	if of == nil {
		of = map[string]*storagev1.VolumeAttachment{}
		s.storage.attachments[a.Spec.NodeName] = of
	}
	of[a.Name] = a
}

// RemoveAttachment forgets an attachment.
func (s *Snapshot) RemoveAttachment(a *storagev1.VolumeAttachment) {
	delete(s.storage.attachments[a.Spec.NodeName], a.Name)
	if len(s.storage.attachments[a.Spec.NodeName]) == 0 {
		delete(s.storage.attachments, a.Spec.NodeName)
	}
}

// use counts delta users of each claim of the pod.
func (st *storage) use(pod *presence, delta int) {
	for i := range pod.volumes {
		if c := pod.volumes[i].PersistentVolumeClaim; c != nil {
			key := pod.namespace + "/" + c.ClaimName
			if st.users[key] += delta; st.users[key] == 0 {
				delete(st.users, key)
			}
		}
	}
}

// claim returns a claim as the decisions so far leave it, nil if there is none.
func (st *storage) claim(key string) *v1.PersistentVolumeClaim {
	if c := st.assumedClaims[key]; c != nil {
		return c
	}
	return st.claims[key]
}

// volume returns a volume as the decisions so far leave it, nil if there is none.
func (st *storage) volume(name string) *v1.PersistentVolume {
	if v := st.volumes[name]; v != nil {
		return v.current()
	}
	return nil
}

// VolumeClaim is one volume of a pod that stands for a claim.
type VolumeClaim struct {
	Name      string // of the claim, in the pod's namespace
	Ephemeral bool   // the claim is made for this pod
}

// VolumeClaims returns the claims that a pod uses, in the order of its volumes.
func VolumeClaims(pod *v1.Pod) []VolumeClaim { return volumeClaims(pod.Name, pod.Spec.Volumes) }

func volumeClaims(pod string, volumes []v1.Volume) []VolumeClaim {
	var out []VolumeClaim
	for i := range volumes {
		switch v := &volumes[i]; {
		case v.PersistentVolumeClaim != nil:
			out = append(out, VolumeClaim{Name: v.PersistentVolumeClaim.ClaimName})
		case v.Ephemeral != nil:
			out = append(out, VolumeClaim{Name: pod + "-" + v.Name, Ephemeral: true})
		}
	}
	return out
}

// UsesClaim reports whether a pod uses the claim of that name and namespace.
func UsesClaim(pod *v1.Pod, namespace, name string) bool {
	if pod.Namespace != namespace || len(pod.Spec.Volumes) == 0 {
		return false
	}
	return slices.ContainsFunc(VolumeClaims(pod), func(c VolumeClaim) bool { return c.Name == name })
}
