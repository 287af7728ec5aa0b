package schedconfig

import (
	"maps"
	"slices"

	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/kubernetes/pkg/scheduler/apis/config"
	plugin "k8s.io/kubernetes/pkg/scheduler/framework/plugins/names"

	"skein.io/skein/scheduler/placement"
)

// scores are the plugins that score, with where their weight goes.
var scores = map[string]func(*placement.Weights) *int64{
	plugin.TaintToleration:                 func(w *placement.Weights) *int64 { return &w.Taints },
	plugin.NodeAffinity:                    func(w *placement.Weights) *int64 { return &w.NodeAffinity },
	plugin.PodTopologySpread:               func(w *placement.Weights) *int64 { return &w.Spread },
	plugin.InterPodAffinity:                func(w *placement.Weights) *int64 { return &w.InterPod },
	plugin.NodeResourcesFit:                func(w *placement.Weights) *int64 { return &w.Fit },
	plugin.NodeResourcesBalancedAllocation: func(w *placement.Weights) *int64 { return &w.Balanced },
	plugin.ImageLocality:                   func(w *placement.Weights) *int64 { return &w.ImageLocality },
	plugin.DynamicResources:                func(w *placement.Weights) *int64 { return &w.Devices },
}

// always are plugins that cannot be left out: the queue's order, gates and the binding are not a profile's matter here.
var always = []string{plugin.PrioritySort, plugin.SchedulingGates, plugin.DefaultBinder}

// unprepared are plugins without a preFilter (or preScore) of their own: those points say nothing about them.
var unprepared = sets.New(plugin.NodeUnschedulable, plugin.NodeName, plugin.TaintToleration+"/filter", plugin.ImageLocality)

// known are all plugins that exist here.
var known = func() sets.Set[string] {
	out := sets.New(always...).Insert(plugin.DefaultPreemption)
	for _, f := range placement.Filters() {
		out.Insert(string(f))
	}
	for name := range scores {
		out.Insert(name)
	}
	return out
}()

// plugins says which filters and scores are on. As in upstream's framework, what is said at an extension point goes before
// multiPoint, into which the defaults have been merged.
func plugins(p *config.Plugins, s *placement.Settings, path *field.Path) (faults field.ErrorList) {
	points := map[string]*config.PluginSet{
		"multiPoint": &p.MultiPoint, "preEnqueue": &p.PreEnqueue, "queueSort": &p.QueueSort, "preFilter": &p.PreFilter, "filter": &p.Filter,
		"postFilter": &p.PostFilter, "preScore": &p.PreScore, "score": &p.Score, "reserve": &p.Reserve, "permit": &p.Permit, "preBind": &p.PreBind,
		"bind": &p.Bind, "postBind": &p.PostBind, "placementGenerate": &p.PlacementGenerate, "placementScore": &p.PlacementScore,
	}
	for _, point := range slices.Sorted(maps.Keys(points)) {
		faults = append(faults, unknown(points[point], path.Child(point))...)
	}
	filters, preFilters := enabled(p, &p.Filter), enabled(p, &p.PreFilter)
	s.Off = map[placement.Filter]bool{}
	for _, f := range placement.Filters() {
		if _, on := filters[string(f)]; !on {
			s.Off[f] = true
		} else if _, prepared := preFilters[string(f)]; !prepared && !unprepared.HasAny(string(f), string(f)+"/filter") {
			faults = append(faults, field.Invalid(path.Child("preFilter"), string(f), "cannot be off while the plugin's filter is on"))
		}
	}
	scoring, preScores := enabled(p, &p.Score), enabled(p, &p.PreScore)
	for name, weight := range scores {
		to := weight(&s.Weights)
		if *to = 0; scoring[name] == nil {
			continue
		}
		if preScores[name] == nil && !unprepared.Has(name) {
			faults = append(faults, field.Invalid(path.Child("preScore"), name, "cannot be off while the plugin's score is on"))
		}
		// Upstream takes no weight for 1: a plugin is disabled, not weighed with nothing.
		*to = max(int64(*scoring[name]), 1)
	}
	after := enabled(p, &p.PostFilter)
	s.NoPreemption, s.NoRelease = after[plugin.DefaultPreemption] == nil, after[plugin.DynamicResources] == nil
	for _, fixed := range []struct {
		point string
		set   *config.PluginSet
		name  string
	}{{"queueSort", &p.QueueSort, plugin.PrioritySort}, {"bind", &p.Bind, plugin.DefaultBinder}, {"preEnqueue", &p.PreEnqueue, plugin.SchedulingGates}} {
		if enabled(p, fixed.set)[fixed.name] == nil {
			faults = append(faults, field.Invalid(path.Child(fixed.point), fixed.name, "is always on"))
		}
	}
	return faults
}

// unknown reports plugins that do not exist here; "*" stands for all.
func unknown(set *config.PluginSet, path *field.Path) (faults field.ErrorList) {
	check := func(list []config.Plugin, path *field.Path) {
		for _, p := range list { // with the defaults before it: an index would not be that in the file
			if p.Name != "*" && !known.Has(p.Name) {
				faults = append(faults, field.NotSupported(path, p.Name, sets.List(known)))
			}
		}
	}
	check(set.Enabled, path.Child("enabled"))
	check(set.Disabled, path.Child("disabled"))
	return faults
}

// enabled returns the plugins that are on at a point, with their weights.
func enabled(p *config.Plugins, point *config.PluginSet) map[string]*int32 {
	out := map[string]*int32{}
	off := sets.New[string]()
	for _, d := range point.Disabled {
		off.Insert(d.Name)
	}
	if !off.Has("*") {
		for i := range p.MultiPoint.Enabled {
			if e := &p.MultiPoint.Enabled[i]; !off.Has(e.Name) {
				out[e.Name] = &e.Weight
			}
		}
	}
	for i := range point.Enabled {
		out[point.Enabled[i].Name] = &point.Enabled[i].Weight
	}
	return out
}
