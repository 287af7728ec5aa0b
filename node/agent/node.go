package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"sort"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"skein.io/skein/node/agent/machine"
	"skein.io/skein/node/desired"
)

const (
	// nodePeriod is how often the node's state is read. It is written only when it changed.
	nodePeriod = 10 * time.Second
	// nodeStarting applies until the node was Ready once; it begins with nodeFirst and doubles.
	nodeStarting = 500 * time.Millisecond
	nodeFirst    = 50 * time.Millisecond
	// nodeRetry is the pause after a failed write.
	nodeRetry = 2 * time.Second
	// imagesPeriod is how often the image list is read.
	imagesPeriod = time.Minute
	// maxNodeImages bounds the images in the Node object, as kubelet's nodeStatusMaxImages.
	maxNodeImages = 50
)

func defaultReserved() corev1.ResourceList {
	return corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("100Mi")}
}

// capacityOnce holds what does not change while the process lives.
var memoryTotal = sync.OnceValue(func() int64 { return machine.Read().MemoryTotal })

func (a *Agent) memoryCapacity() int64 { return memoryTotal() }

func (a *Agent) capacity() corev1.ResourceList {
	c := corev1.ResourceList{
		corev1.ResourceCPU:    *resource.NewQuantity(int64(runtime.NumCPU()), resource.DecimalSI),
		corev1.ResourceMemory: *resource.NewQuantity(a.memoryCapacity(), resource.BinarySI),
		corev1.ResourcePods:   *resource.NewQuantity(int64(a.cfg.MaxPods), resource.DecimalSI),
	}
	if d, err := machine.Disk(a.cfg.StateDir); err == nil {
		c[corev1.ResourceEphemeralStorage] = *resource.NewQuantity(d.Total, resource.BinarySI)
	}
	return c
}

// allocatable is the capacity without what is reserved.
func (a *Agent) allocatable() corev1.ResourceList {
	c := a.capacity()
	for n, q := range a.cfg.Reserved {
		if have, ok := c[n]; ok {
			have.Sub(q)
			if have.Sign() < 0 {
				have = *resource.NewQuantity(0, have.Format)
			}
			c[n] = have
		}
	}
	return c
}

// nodeReporter keeps the Node object true.
type nodeReporter struct {
	a *Agent
	// known is the last version that the API answered, with its images, which desired leaves out.
	known    *corev1.Node
	pressure machine.Pressure
	images   []corev1.ContainerImage
	imagesAt time.Time
	version  string
	ready    bool
}

// reportNode registers the node and keeps its status true until ctx ends. An idle node is not written.
func (a *Agent) reportNode(ctx context.Context) {
	r := &nodeReporter{a: a}
	changes, cancel := a.cfg.Desired.Subscribe(desired.Nodes)
	defer cancel()
	timer := time.NewTimer(0)
	defer timer.Stop()
	var last *corev1.Node
	starting := nodeFirst
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
			last = nil
		case <-changes:
			// Somebody wrote a Node; only one of ours that differs is looked at before its time.
			if n := a.cfg.Desired.Node(a.cfg.NodeName); n == last {
				continue
			}
		}
		last = a.cfg.Desired.Node(a.cfg.NodeName)
		next := nodePeriod
		if err := r.report(ctx); err != nil {
			if ctx.Err() != nil {
				return
			}
			a.cfg.Logger.Warn("node status not written, tried again", "node", a.cfg.NodeName, "err", err)
			next = nodeRetry
		} else if !r.ready {
			next = starting
			starting = min(2*starting, nodeStarting)
		}
		timer.Reset(next)
	}
}

func (r *nodeReporter) report(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	status := r.status(ctx)
	if err := r.load(ctx, &status); err != nil {
		return err
	}
	if err := r.patchMeta(ctx); err != nil {
		return err
	}
	return r.patchStatus(ctx, status)
}

// load makes sure that known is the newest version, and creates the Node when there is none.
func (r *nodeReporter) load(ctx context.Context, status *corev1.NodeStatus) error {
	name := r.a.cfg.NodeName
	if d := r.a.cfg.Desired.Node(name); r.known != nil && d != nil && r.known.UID == d.UID {
		if c, err := resourceversion.CompareResourceVersion(d.ResourceVersion, r.known.ResourceVersion); err == nil && c > 0 {
			n := d.DeepCopy()
			n.Status.Images = r.known.Status.Images
			r.known = n
		}
		return nil
	}
	if r.known != nil && r.a.cfg.Desired.Node(name) != nil {
		r.known = nil // another object of this name
	}
	if r.known != nil && (!r.a.cfg.Desired.Synced(desired.Nodes) || time.Since(r.known.CreationTimestamp.Time) < nodePeriod) {
		return nil // the watch is behind
	}
	n, err := r.a.cfg.Client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		fresh := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: r.labels()}, Status: *status}
		if first := r.a.cfg.FirstLabels; len(first) > 0 {
			maps.Copy(fresh.Labels, first)
			fresh.Annotations = map[string]string{annFirstLabels: encodeLabels(first)}
		}
		fresh.Status.Conditions = mergeConditions(nil, status.Conditions, metav1.Now().Rfc3339Copy())
		if n, err = r.a.cfg.Client.CoreV1().Nodes().Create(ctx, fresh, metav1.CreateOptions{}); apierrors.IsAlreadyExists(err) {
			n, err = r.a.cfg.Client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
		}
	}
	if err != nil {
		return fmt.Errorf("register node %s: %w", name, err)
	}
	r.known = n
	r.event(corev1.EventTypeNormal, "Starting", "Starting kubelet.")
	return nil
}

func (r *nodeReporter) event(kind, reason, message string) {
	ref := &corev1.ObjectReference{Kind: "Node", APIVersion: "v1", Name: r.a.cfg.NodeName, UID: types.UID(r.a.cfg.NodeName)}
	r.a.cfg.Recorder.Event(ref, kind, reason, message)
}

// labels are those that the node itself owns.
func (r *nodeReporter) labels() map[string]string {
	l := map[string]string{corev1.LabelHostname: r.a.cfg.NodeName, corev1.LabelOSStable: runtime.GOOS, corev1.LabelArchStable: runtime.GOARCH,
		"beta.kubernetes.io/os": runtime.GOOS, "beta.kubernetes.io/arch": runtime.GOARCH}
	maps.Copy(l, r.a.cfg.Labels)
	if r.a.cfg.Zone != "" {
		l[corev1.LabelTopologyZone] = r.a.cfg.Zone
	}
	return l
}

// annFirstLabels remembers the labels that the node last began with (FirstLabels), as JSON.
const annFirstLabels = "skein.io/first-labels"

func encodeLabels(l map[string]string) string {
	b, err := json.Marshal(l) // sorted by key
	if err != nil {
		panic(err) // plain strings only
	}
	return string(b)
}

// metaChange is what to change about the labels and annotations of a Node; nil values remove.
func metaChange(node *corev1.Node, own, first map[string]string) (labels, annotations map[string]any) {
	labels, annotations = map[string]any{}, map[string]any{}
	for k, v := range own {
		if node.Labels[k] != v {
			labels[k] = v
		}
	}
	before := map[string]string{}
	if a := node.Annotations[annFirstLabels]; a != "" && json.Unmarshal([]byte(a), &before) != nil {
		clear(before) // somebody's own text: as if there had been none
	}
	if maps.Equal(before, first) {
		return labels, annotations
	}
	for k := range before {
		if _, still := first[k]; !still && own[k] == "" {
			labels[k] = nil
		}
	}
	for k, v := range first {
		labels[k] = v
	}
	annotations[annFirstLabels] = nil
	if len(first) > 0 {
		annotations[annFirstLabels] = encodeLabels(first)
	}
	return labels, annotations
}

// patchMeta sets the node's own labels where they differ.
func (r *nodeReporter) patchMeta(ctx context.Context) error {
	labels, annotations := metaChange(r.known, r.labels(), r.a.cfg.FirstLabels)
	if len(labels)+len(annotations) == 0 {
		return nil
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"labels": labels, "annotations": annotations}})
	if err != nil {
		return err
	}
	n, err := r.a.cfg.Client.CoreV1().Nodes().Patch(ctx, r.known.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{})
	if err != nil {
		return fmt.Errorf("label node %s: %w", r.known.Name, err)
	}
	r.known = n
	return nil
}

func (r *nodeReporter) patchStatus(ctx context.Context, want corev1.NodeStatus) error {
	have := r.known.Status
	next := have.DeepCopy()
	next.Capacity, next.Allocatable = withExtended(have.Capacity, want.Capacity), withExtended(have.Capacity, want.Allocatable)
	next.Addresses = want.Addresses
	next.NodeInfo, next.DaemonEndpoints = want.NodeInfo, want.DaemonEndpoints
	if r.images != nil {
		next.Images = want.Images
	}
	next.Phase = ""
	next.Conditions = mergeConditions(have.Conditions, want.Conditions, metav1.Now().Rfc3339Copy())
	if apiequality.Semantic.DeepEqual(have, *next) {
		return nil
	}
	before, err1 := json.Marshal(corev1.Node{Status: have})
	after, err2 := json.Marshal(corev1.Node{Status: *next})
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	patch, err := strategicpatch.CreateTwoWayMergePatch(before, after, corev1.Node{})
	if err != nil || string(patch) == "{}" {
		return err
	}
	n, err := r.a.cfg.Client.CoreV1().Nodes().Patch(ctx, r.known.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	if err != nil {
		if apierrors.IsNotFound(err) {
			r.known = nil
		}
		return fmt.Errorf("patch status of node %s: %w", r.a.cfg.NodeName, err)
	}
	r.known = n
	return nil
}

// withExtended adds to what the node has by itself the extended resources that others announced in its status, all of which can be
// used (as kubelet's setters do).
func withExtended(have, own corev1.ResourceList) corev1.ResourceList {
	out := own.DeepCopy()
	for name, q := range have {
		if _, mine := own[name]; !mine && isExtended(name) {
			out[name] = q.DeepCopy()
		}
	}
	return out
}

// isExtended: the name has a domain, and not Kubernetes' own.
func isExtended(name corev1.ResourceName) bool {
	return strings.Contains(string(name), "/") && !strings.Contains(string(name), corev1.ResourceDefaultNamespacePrefix)
}

// mergeConditions puts the node's own conditions among those of others. An unchanged one keeps all its times: a heartbeat
// would be a write.
func mergeConditions(have, want []corev1.NodeCondition, now metav1.Time) []corev1.NodeCondition {
	out := append([]corev1.NodeCondition(nil), have...)
	for _, w := range want {
		found := false
		for i := range out {
			o := &out[i]
			if o.Type != w.Type {
				continue
			}
			found = true
			if o.Status == w.Status && o.Reason == w.Reason && o.Message == w.Message {
				break
			}
			w.LastHeartbeatTime, w.LastTransitionTime = now, now
			if o.Status == w.Status {
				w.LastTransitionTime = o.LastTransitionTime
			}
			*o = w
		}
		if !found {
			w.LastHeartbeatTime, w.LastTransitionTime = now, now
			out = append(out, w)
		}
	}
	return out
}

// status reads the node's state.
func (r *nodeReporter) status(ctx context.Context) corev1.NodeStatus {
	cfg := &r.a.cfg
	ready, reason := r.runtimeReady(ctx)
	reading := machine.Read()
	disk, err := machine.Disk(cfg.StateDir)
	if err != nil {
		cfg.Logger.Warn("disk not read", "err", err)
	}
	r.pressure = machine.Judge(r.pressure, reading, disk, time.Now())
	s := corev1.NodeStatus{
		Capacity:        r.a.capacity(),
		Allocatable:     r.a.allocatable(),
		NodeInfo:        machine.Info(),
		DaemonEndpoints: corev1.NodeDaemonEndpoints{KubeletEndpoint: corev1.DaemonEndpoint{Port: int32(cfg.Port)}},
		Images:          r.imageList(ctx),
		Conditions: []corev1.NodeCondition{
			condition(corev1.NodeMemoryPressure, r.pressure.Memory.On, "KubeletHasInsufficientMemory", "kubelet has insufficient memory available", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
			condition(corev1.NodeDiskPressure, r.pressure.Disk.On, "KubeletHasDiskPressure", "kubelet has disk pressure", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
			condition(corev1.NodePIDPressure, r.pressure.PIDs.On, "KubeletHasInsufficientPID", "kubelet has insufficient PID available", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
			condition(corev1.NodeReady, ready, "KubeletReady", "kubelet is posting ready status", "KubeletNotReady", reason),
		},
	}
	s.NodeInfo.ContainerRuntimeVersion = r.version
	s.NodeInfo.Architecture, s.NodeInfo.OperatingSystem = runtime.GOARCH, runtime.GOOS
	for _, ip := range cfg.NodeIPs {
		s.Addresses = append(s.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: ip.String()})
	}
	s.Addresses = append(s.Addresses, corev1.NodeAddress{Type: corev1.NodeHostName, Address: cfg.NodeName})
	if ready != r.ready {
		r.ready = ready
		if ready {
			r.event(corev1.EventTypeNormal, "NodeReady", fmt.Sprintf("Node %s status is now: NodeReady", cfg.NodeName))
		} else {
			r.event(corev1.EventTypeNormal, "NodeNotReady", fmt.Sprintf("Node %s status is now: NodeNotReady", cfg.NodeName))
		}
	}
	return s
}

func condition(t corev1.NodeConditionType, on bool, onReason, onMessage, offReason, offMessage string) corev1.NodeCondition {
	if on {
		return corev1.NodeCondition{Type: t, Status: corev1.ConditionTrue, Reason: onReason, Message: onMessage}
	}
	return corev1.NodeCondition{Type: t, Status: corev1.ConditionFalse, Reason: offReason, Message: offMessage}
}

// runtimeReady asks the container runtime, and the network.
func (r *nodeReporter) runtimeReady(ctx context.Context) (bool, string) {
	if r.version == "" {
		v, err := r.a.cfg.Runtime.Version(ctx, "v1")
		if err != nil {
			return false, "container runtime is down: " + message(err)
		}
		r.version = v.GetRuntimeName() + "://" + v.GetRuntimeVersion()
	}
	st, err := r.a.cfg.Runtime.Status(ctx, false)
	if err != nil {
		return false, "container runtime is down: " + message(err)
	}
	for _, c := range st.GetStatus().GetConditions() {
		if c.Status {
			continue
		}
		switch c.Type {
		case runtimeapi.RuntimeReady:
			return false, fmt.Sprintf("container runtime not ready: RuntimeReady=false reason:%s message:%s", c.Reason, c.Message)
		case runtimeapi.NetworkReady:
			return false, fmt.Sprintf("container runtime network not ready: NetworkReady=false reason:%s message:%s", c.Reason, c.Message)
		}
	}
	if ok, why := r.a.cfg.NetworkReady(); !ok {
		return false, "network is not ready: " + why
	}
	return true, ""
}

// imageList is the bounded list of images, the largest first, as kubelet's.
func (r *nodeReporter) imageList(ctx context.Context) []corev1.ContainerImage {
	if time.Since(r.imagesAt) < imagesPeriod {
		return r.images
	}
	list, err := r.a.cfg.Images.ListImages(ctx, nil)
	if err != nil {
		return r.images
	}
	r.imagesAt = time.Now()
	out := make([]corev1.ContainerImage, 0, len(list))
	for _, im := range list {
		names := append(append([]string(nil), im.RepoDigests...), im.RepoTags...)
		if len(names) == 0 {
			continue
		}
		sort.Strings(names)
		out = append(out, corev1.ContainerImage{Names: names[:min(len(names), 5)], SizeBytes: int64(im.Size)})
	}
	sort.Slice(out, func(i, j int) bool {
		if out[i].SizeBytes != out[j].SizeBytes {
			return out[i].SizeBytes > out[j].SizeBytes
		}
		return out[i].Names[0] < out[j].Names[0]
	})
	r.images = out[:min(len(out), maxNodeImages)]
	return r.images
}
