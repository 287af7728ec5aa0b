package oracle

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/tools/cache"
	resourceslicetracker "k8s.io/dynamic-resource-allocation/resourceslice/tracker"
	"k8s.io/klog/v2"
	fwk "k8s.io/kube-scheduler/framework"
	"k8s.io/kubernetes/pkg/scheduler/apis/config"
	schedcache "k8s.io/kubernetes/pkg/scheduler/backend/cache"
	"k8s.io/kubernetes/pkg/scheduler/framework"
	"k8s.io/kubernetes/pkg/scheduler/framework/plugins"
	"k8s.io/kubernetes/pkg/scheduler/framework/plugins/defaultpreemption"
	"k8s.io/kubernetes/pkg/scheduler/framework/plugins/dynamicresources"
	"k8s.io/kubernetes/pkg/scheduler/framework/plugins/names"
	"k8s.io/kubernetes/pkg/scheduler/framework/plugins/nodevolumelimits"
	frameworkruntime "k8s.io/kubernetes/pkg/scheduler/framework/runtime"
	"k8s.io/kubernetes/pkg/scheduler/metrics"
	"k8s.io/kubernetes/pkg/scheduler/util/assumecache"
)

// upstream is kube-scheduler's framework with one profile, fed from memory: its listers read stores that a case fills.
type upstream struct {
	ctx        context.Context
	factory    informers.SharedInformerFactory
	framework  framework.Framework
	preemption *defaultpreemption.DefaultPreemption
	devices    fwk.PostFilterPlugin // DynamicResources, which may give claims back
	current    *current

	dra            *draManager
	devicePlugin   fwk.Plugin // DynamicResources, whatever the profile asks it
	filtersDevices bool
	state          fwk.CycleState // of the last question
}

// current is the case at hand, as the plugins look at it.
type current struct {
	*schedcache.Snapshot
	nominated map[string][]fwk.PodInfo
}

func (c *current) NodeInfos() fwk.NodeInfoLister                                 { return c.Snapshot }
func (c *current) StorageInfos() fwk.StorageInfoLister                           { return c.Snapshot }
func (c *current) PodGroupStates() fwk.PodGroupStateLister                       { return c.Snapshot.PodGroupStates() }
func (c *current) DeleteNominatedPodIfExists(*v1.Pod)                            {}
func (c *current) NominatedPodsForNode(n string) []fwk.PodInfo                   { return c.nominated[n] }
func (c *current) AddNominatedPod(klog.Logger, fwk.PodInfo, *fwk.NominatingInfo) {}
func (c *current) UpdateNominatedPod(klog.Logger, *v1.Pod, fwk.PodInfo)          {}

// newUpstream makes the framework as scheduler.New does. It ends with ctx.
func newUpstream(ctx context.Context, profile *config.KubeSchedulerProfile) (*upstream, error) {
	metrics.Register()
	client := fake.NewSimpleClientset()
	u := &upstream{ctx: ctx, factory: informers.NewSharedInformerFactory(client, 0), current: &current{Snapshot: schedcache.NewEmptySnapshot()}}
	claims := assumecache.NewAssumeCache(klog.FromContext(ctx), nil, "ResourceClaim", "", nil)
	slicesOf, err := resourceslicetracker.StartTracker(ctx, resourceslicetracker.Options{SliceInformer: u.factory.Resource().V1().ResourceSlices(), KubeClient: client})
	if err != nil {
		return nil, err
	}
	u.dra = &draManager{DefaultDRAManager: dynamicresources.NewDRAManager(ctx, claims, slicesOf, u.factory), assumed: claims}
	u.dra.tracker.ResourceClaimTracker = u.dra.DefaultDRAManager.ResourceClaims()
	u.dra.answerWrites(client)
	registry := plugins.NewInTreeRegistry()
	keep := func(name string, note func(fwk.Plugin)) {
		inner := registry[name]
		registry[name] = func(ctx context.Context, args runtime.Object, h fwk.Handle) (fwk.Plugin, error) {
			p, err := inner(ctx, args, h)
			if err == nil {
				note(p)
			}
			return p, err
		}
	}
	keep(names.DefaultPreemption, func(p fwk.Plugin) { u.preemption = p.(*defaultpreemption.DefaultPreemption) })
	keep(names.DynamicResources, func(p fwk.Plugin) { u.devices, u.devicePlugin = p.(fwk.PostFilterPlugin), p })
	u.framework, err = frameworkruntime.NewFramework(ctx, registry, profile,
		frameworkruntime.WithClientSet(client),
		frameworkruntime.WithInformerFactory(u.factory),
		frameworkruntime.WithSharedDRAManager(u.dra),
		frameworkruntime.WithSharedCSIManager(nodevolumelimits.NewCSIManager(u.factory.Storage().V1().CSINodes().Lister())),
		frameworkruntime.WithSnapshotSharedLister(u.current),
		frameworkruntime.WithPodNominator(u.current),
		frameworkruntime.WithParallelism(1),
	)
	if err != nil {
		return nil, err
	}
	after := map[string]bool{}
	for _, p := range u.framework.ListPlugins().PostFilter.Enabled {
		after[p.Name] = true
	}
	if !after[names.DefaultPreemption] {
		u.preemption = nil
	}
	if !after[names.DynamicResources] {
		u.devices = nil
	}
	u.filtersDevices = slices.ContainsFunc(u.framework.ListPlugins().Filter.Enabled, func(p config.Plugin) bool { return p.Name == names.DynamicResources })
	return u, nil
}

// show makes the world the one that the plugins look at.
func (u *upstream) show(w *world) error {
	placed := make([]*v1.Pod, 0, len(w.Pods))
	nominated := map[string][]fwk.PodInfo{}
	for _, p := range w.Pods {
		switch {
		case p.Spec.NodeName != "":
			placed = append(placed, p)
		case p.Status.NominatedNodeName != "":
			info, err := framework.NewPodInfo(p)
			if err != nil {
				return err
			}
			nominated[p.Status.NominatedNodeName] = append(nominated[p.Status.NominatedNodeName], info)
		}
	}
	u.current.Snapshot, u.current.nominated = schedcache.NewSnapshot(placed, w.Nodes), nominated
	core, apps, storage := u.factory.Core().V1(), u.factory.Apps().V1(), u.factory.Storage().V1()
	for _, s := range []struct {
		store   cache.Indexer
		objects []any
	}{
		{core.Namespaces().Informer().GetIndexer(), anys(w.Namespaces)},
		{core.Services().Informer().GetIndexer(), anys(w.Services)},
		{core.ReplicationControllers().Informer().GetIndexer(), anys(w.Controllers)},
		{apps.ReplicaSets().Informer().GetIndexer(), anys(w.ReplicaSets)},
		{apps.StatefulSets().Informer().GetIndexer(), anys(w.StatefulSets)},
		{core.Nodes().Informer().GetIndexer(), anys(w.Nodes)},
		{core.PersistentVolumes().Informer().GetIndexer(), anys(w.Storage.Volumes)},
		{core.PersistentVolumeClaims().Informer().GetIndexer(), anys(w.Storage.Claims)},
		{storage.StorageClasses().Informer().GetIndexer(), anys(w.Storage.Classes)},
		{storage.CSINodes().Informer().GetIndexer(), anys(w.Storage.CSINodes)},
		{storage.CSIDrivers().Informer().GetIndexer(), anys(w.Storage.Drivers)},
		{storage.CSIStorageCapacities().Informer().GetIndexer(), anys(w.Storage.Capacities)},
		{storage.VolumeAttachments().Informer().GetIndexer(), anys(w.Storage.Attachments)},
	} {
		if err := s.store.Replace(s.objects, ""); err != nil {
			return err
		}
	}
	return u.showDevices(&w.Devices)
}

func anys[T any](in []T) []any {
	out := make([]any, len(in))
	for i := range in {
		out[i] = in[i]
	}
	return out
}

// answer is what is compared.
type answer struct {
	Nodes    map[string]nodeAnswer
	Message  string            // of a pod that fits nowhere
	Options  map[string]option // by node, of a pod that fits nowhere
	Eligible bool              // the pod may evict others
	Accepted string            // the entry of accepted.md that changed what upstream says
	Released map[string]bool   // claims of which one is given up, "" for none; nil if that was not asked
	Failed   string            // the whole attempt ended with this error of a node's devices
}

type nodeAnswer struct {
	Filter  string
	Reasons []string
	Evict   bool // evicting pods from the node could help
	Scores  map[string]int64
	Total   int64
}

type option struct {
	Victims    []string
	Violations int64
}

// ask runs one scheduling cycle up to the choice among equals, as schedulePod and Evaluator.Preempt do.
func (u *upstream) ask(w *world, pod *v1.Pod) (*answer, string, error) {
	state := framework.NewCycleState()
	u.state = state
	all, err := u.current.Snapshot.List()
	if err != nil {
		return nil, "", err
	}
	out := &answer{Nodes: map[string]nodeAnswer{}, Options: map[string]option{}}
	status := framework.NewDefaultNodeToStatus()
	pre, s, by := u.framework.RunPreFilterPlugins(u.ctx, state, pod)
	var feasible []fwk.NodeInfo
	wholeMessage := ""
	switch {
	case !s.IsSuccess() && !s.IsRejected():
		return nil, "", fmt.Errorf("prefilter: %w", s.AsError())
	case !s.IsSuccess():
		status.SetAbsentNodesStatus(s)
		wholeMessage = s.Message()
	default:
		if !pre.AllNodes() {
			status.SetAbsentNodesStatus(fwk.NewStatus(fwk.UnschedulableAndUnresolvable, fmt.Sprintf("node(s) didn't satisfy plugin(s) %v", slices.Sorted(maps.Keys(by)))).WithPlugin(slices.Sorted(maps.Keys(by))[0]))
		}
		for _, n := range all {
			if !pre.AllNodes() && !pre.NodeNames.Has(n.Node().Name) {
				continue
			}
			verdict := u.framework.RunFilterPluginsWithNominatedPods(u.ctx, state, pod, n)
			switch {
			case verdict.IsSuccess():
				feasible = append(feasible, n)
			case verdict.IsRejected():
				status.Set(n.Node().Name, verdict)
			case verdict.Plugin() == names.DynamicResources:
				out.Failed = verdict.AsError().Error()
				return out, "", nil
			default:
				return nil, "", fmt.Errorf("filter on %s: %w", n.Node().Name, verdict.AsError())
			}
		}
	}
	fits := map[string]bool{}
	for _, n := range feasible {
		fits[n.Node().Name] = true
	}
	for _, n := range all {
		if name := n.Node().Name; !fits[name] {
			v := status.Get(name)
			out.Nodes[name] = nodeAnswer{Filter: v.Plugin(), Reasons: v.Reasons(), Evict: v.Code() == fwk.Unschedulable}
		}
	}
	if len(feasible) > 0 {
		return out, "", u.score(state, pod, feasible, out)
	}
	var said []string
	if u.devices != nil {
		_, s := u.devices.PostFilter(u.ctx, state, pod, status)
		switch {
		case s.IsRejected():
			said = s.Reasons()
			if len(pod.Spec.ResourceClaims) > 0 || len(w.Devices.Classes) > 0 {
				out.Released = u.releases(state, pod)
			}
		case wholeMessage != "" && !s.IsSuccess():
			out.Accepted, said = "postfilter-not-found", []string{"no new claims to deallocate"}
		default:
			return nil, "", fmt.Errorf("DynamicResources' postfilter: %v", s)
		}
	}
	chosen, told, err := u.preempt(state, w, pod, status, out)
	if err != nil && strings.Contains(err.Error(), strconv.Quote(names.DynamicResources)) {
		out.Accepted = "device-error" // when evictions were tried; nothing is said then
		return out, "", nil
	}
	if err != nil {
		return nil, "", err
	}
	if told != "" {
		said = append(said, told)
	}
	if chosen != "" {
		said = nil
	}
	fit := &framework.FitError{Pod: pod, NumAllNodes: len(all), Diagnosis: framework.Diagnosis{NodeToStatus: status, PreFilterMsg: wholeMessage, PostFilterMsg: strings.Join(said, ", ")}}
	out.Message = fit.Error()
	return out, chosen, nil
}

func (u *upstream) score(state fwk.CycleState, pod *v1.Pod, feasible []fwk.NodeInfo, out *answer) error {
	if s := u.framework.RunPreScorePlugins(u.ctx, state, pod, feasible); !s.IsSuccess() {
		return fmt.Errorf("prescore: %w", s.AsError())
	}
	scores, s := u.framework.RunScorePlugins(u.ctx, state, pod, feasible)
	if !s.IsSuccess() {
		return fmt.Errorf("score: %w", s.AsError())
	}
	for _, n := range scores {
		a := nodeAnswer{Scores: map[string]int64{}, Total: n.TotalScore}
		for _, p := range n.Scores {
			if p.Score != 0 {
				a.Scores[p.Name] = p.Score
			}
		}
		out.Nodes[n.Name] = a
	}
	return nil
}

// preempt is Evaluator.Preempt without evicting anybody. It tries all nodes, not a random tenth of them.
func (u *upstream) preempt(state fwk.CycleState, w *world, pod *v1.Pod, status *framework.NodeToStatus, out *answer) (node, message string, err error) {
	if u.preemption == nil {
		return "", "", nil
	}
	ok, why := u.preemption.PodEligibleToPreemptOthers(u.ctx, pod, status.Get(pod.Status.NominatedNodeName))
	if out.Eligible = ok; !ok {
		return "", "preemption: " + why, nil
	}
	nodes, err := status.NodesForStatusCode(u.current.Snapshot, fwk.Unschedulable)
	if err != nil {
		return "", "", err
	}
	result := framework.NewDefaultNodeToStatus()
	if len(nodes) > 0 {
		candidates, tried, err := u.preemption.Evaluator.DryRunPreemption(u.ctx, state, pod, nodes, w.Budgets, 0, int32(len(nodes)))
		if err != nil {
			return "", "", err
		}
		result = tried
		for _, c := range candidates {
			o := option{Violations: c.Victims().NumPDBViolations}
			for _, victim := range c.Victims().Pods {
				o.Victims = append(o.Victims, victim.Namespace+"/"+victim.Name)
			}
			out.Options[c.Name()] = o
		}
		if len(candidates) > 0 {
			return u.preemption.Evaluator.SelectCandidate(u.ctx, candidates).Name(), "", nil
		}
	}
	result.SetAbsentNodesStatus(fwk.NewStatus(fwk.UnschedulableAndUnresolvable, "Preemption is not helpful for scheduling"))
	fit := &framework.FitError{Pod: pod, NumAllNodes: len(w.Nodes), Diagnosis: framework.Diagnosis{NodeToStatus: result}}
	return "", "preemption: " + fit.Error(), nil
}
