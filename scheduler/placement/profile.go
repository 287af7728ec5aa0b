package placement

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	v1 "k8s.io/api/core/v1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
)

// Settings say how the pods of one schedulerName are placed. They are the
// parts of upstream's KubeSchedulerProfile that placement obeys; whoever reads
// a configuration file translates it into them.
type Settings struct {
	// Name is the schedulerName of the pods. Default: "default-scheduler".
	Name string
	// Off lists the filters that are not asked. Default: none.
	Off map[Filter]bool
	// NoPreemption says that no pod is evicted to make room. Default: false.
	NoPreemption bool
	// NoRelease says that no allocation of devices which nobody uses, and which
	// keeps a pod off other nodes, is given up. Default: false.
	NoRelease bool
	// Weights multiply the scores of the rules; a rule of weight 0 is not asked.
	// Default: those of upstream's default profile.
	Weights Weights

	// IgnoredResources are extended resources that are not compared with what
	// nodes have, IgnoredGroups whole prefixes of such (before the "/").
	IgnoredResources []v1.ResourceName
	IgnoredGroups    []string
	// Strategy is how NodeResourcesFit scores. Default: LeastAllocated.
	Strategy Strategy
	// Resources are those that the strategy weighs. Default: CPU and memory, equally.
	Resources []ResourceWeight
	// Shape is the curve of RequestedToCapacityRatio; utilisation strictly
	// ascending in 0..100, scores in 0..10. Required for that strategy.
	Shape []ShapePoint
	// Balanced are the resources that NodeResourcesBalancedAllocation compares.
	// Default: CPU and memory.
	Balanced []v1.ResourceName

	// AddedAffinity is demanded, or preferred, of nodes beside the pod's own
	// affinity. Default: none.
	AddedAffinity *v1.NodeAffinity
	// HardPodAffinityWeight is how much a node gains when a pod there requires to
	// be near the planned one, 0..100. Default: 1.
	HardPodAffinityWeight int32
	// IgnorePreferredTermsOfExistingPods leaves what running pods would like out
	// of the score of pods that say nothing themselves. Default: false.
	IgnorePreferredTermsOfExistingPods bool

	// Spread are the constraints of pods that have none. Nil: softly over nodes
	// (maxSkew 3) and zones (5), where a node without a zone is no fault.
	Spread []v1.TopologySpreadConstraint
	// SpreadNothing says that an empty Spread means just that.
	SpreadNothing bool

	// MinPreemptionNodes and MinPreemptionPercent say on how many nodes at least
	// eviction is tried, absolute and in percent of those that come into
	// question. Default: 100 and 10.
	MinPreemptionNodes, MinPreemptionPercent int32
}

// Weights of the scoring rules, each in 0..100.
type Weights struct {
	Taints, NodeAffinity, Spread, InterPod, Fit, Balanced, ImageLocality, Devices int64
}

// Strategy names a way in which NodeResourcesFit scores.
type Strategy string

// The strategies: prefer empty nodes, full nodes, or follow a curve.
const (
	LeastAllocated           Strategy = "LeastAllocated"
	MostAllocated            Strategy = "MostAllocated"
	RequestedToCapacityRatio Strategy = "RequestedToCapacityRatio"
)

// ResourceWeight is a resource and how much it counts among the others (1..100).
type ResourceWeight struct {
	Name   v1.ResourceName
	Weight int64
}

// ShapePoint says how a utilisation (percent) is scored (0..10).
type ShapePoint struct{ Utilization, Score int64 }

// DefaultSettings are those of upstream's default profile in v1.36.
func DefaultSettings() Settings {
	return Settings{
		Name:                  v1.DefaultSchedulerName,
		Weights:               Weights{Taints: 3, NodeAffinity: 2, Spread: 2, InterPod: 2, Fit: 1, Balanced: 1, ImageLocality: 1, Devices: 2},
		Strategy:              LeastAllocated,
		Resources:             []ResourceWeight{{v1.ResourceCPU, 1}, {v1.ResourceMemory, 1}},
		Balanced:              []v1.ResourceName{v1.ResourceCPU, v1.ResourceMemory},
		HardPodAffinityWeight: 1,
		MinPreemptionNodes:    100,
		MinPreemptionPercent:  10,
	}
}

// Profile is a set of Settings made ready for use. It is never changed, so any
// number of requests may share it.
type Profile struct {
	Settings
	ignored        map[v1.ResourceName]bool
	ignoredGroups  map[string]bool
	plainFit       bool // CPU and memory with equal weights, least allocated: the quick way
	plainBalanced  bool // CPU and memory only
	addedRequired  *nodeaffinity.NodeSelector
	addedPreferred *nodeaffinity.PreferredSchedulingTerms
	hardDefaults   []constraint // of pods that have no constraint; their selector is the request's
	softDefaults   []constraint
	systemSpread   bool
	curve          []ShapePoint // of Shape, scores stretched to 0..100
}

// defaultProfile places the pods of requests that name none.
var defaultProfile = func() *Profile {
	p, err := NewProfile(DefaultSettings())
	if err != nil {
		panic("placement: the default profile is invalid: " + err.Error())
	}
	return p
}()

// DefaultProfile is upstream's default profile.
func DefaultProfile() *Profile { return defaultProfile }

// NewProfile makes settings ready for use. It reports all their faults at once.
func NewProfile(s Settings) (*Profile, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	p := &Profile{Settings: s, ignored: map[v1.ResourceName]bool{}, ignoredGroups: map[string]bool{}}
	for _, name := range s.IgnoredResources {
		p.ignored[name] = true
	}
	for _, group := range s.IgnoredGroups {
		p.ignoredGroups[group] = true
	}
	p.plainFit = s.Strategy == LeastAllocated && len(s.Resources) == 2 && s.Resources[0].Weight == s.Resources[1].Weight &&
		isCPUAndMemory(s.Resources[0].Name, s.Resources[1].Name)
	p.plainBalanced = len(s.Balanced) == 2 && isCPUAndMemory(s.Balanced[0], s.Balanced[1])
	for _, point := range s.Shape {
		p.curve = append(p.curve, ShapePoint{point.Utilization, point.Score * maxScore / maxShapeScore})
	}
	if a := s.AddedAffinity; a != nil {
		// Validate has parsed both.
		if a.RequiredDuringSchedulingIgnoredDuringExecution != nil {
			p.addedRequired, _ = nodeaffinity.NewNodeSelector(a.RequiredDuringSchedulingIgnoredDuringExecution)
		}
		if len(a.PreferredDuringSchedulingIgnoredDuringExecution) > 0 {
			p.addedPreferred, _ = nodeaffinity.NewPreferredSchedulingTerms(a.PreferredDuringSchedulingIgnoredDuringExecution)
		}
	}
	if p.systemSpread = s.Spread == nil && !s.SpreadNothing; p.systemSpread {
		p.softDefaults = defaultSpread
	} else {
		p.hardDefaults, _ = constraintsOf(nil, s.Spread, v1.DoNotSchedule)
		p.softDefaults, _ = constraintsOf(nil, s.Spread, v1.ScheduleAnyway)
	}
	return p, nil
}

func isCPUAndMemory(a, b v1.ResourceName) bool {
	return a == v1.ResourceCPU && b == v1.ResourceMemory || a == v1.ResourceMemory && b == v1.ResourceCPU
}

const maxShapeScore = 10

// Validate reports all faults at once.
func (s Settings) Validate() error {
	var errs []error
	fault := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("profile %q: "+format, append([]any{s.Name}, args...)...))
	}
	if s.Name == "" {
		fault("a name is required")
	}
	for filter := range s.Off {
		if !slices.Contains(Filters(), filter) {
			fault("there is no filter %s", filter)
		}
	}
	for _, w := range s.Weights.named() {
		if w.weight < 0 || w.weight > math.MaxInt32 {
			fault("the weight of %s is %d, not in 0..%d", w.rule, w.weight, math.MaxInt32)
		}
	}
	switch s.Strategy {
	case LeastAllocated, MostAllocated:
	case RequestedToCapacityRatio:
		errs = append(errs, s.checkShape())
	default:
		fault("there is no scoring strategy %q", s.Strategy)
	}
	if len(s.Resources) == 0 {
		fault("the scoring strategy weighs no resource")
	}
	for _, r := range s.Resources {
		if r.Weight < 1 || r.Weight > 100 {
			fault("the weight of resource %s is %d, not in 1..100", r.Name, r.Weight)
		}
	}
	for _, group := range s.IgnoredGroups {
		if strings.Contains(group, "/") {
			fault("the ignored resource group %q contains a slash", group)
		}
	}
	if s.HardPodAffinityWeight < 0 || s.HardPodAffinityWeight > 100 {
		fault("hardPodAffinityWeight is %d, not in 0..100", s.HardPodAffinityWeight)
	}
	if s.MinPreemptionPercent < 0 || s.MinPreemptionPercent > 100 || s.MinPreemptionNodes < 0 || s.MinPreemptionPercent == 0 && s.MinPreemptionNodes == 0 {
		fault("preemption is to be tried on %d%% of the nodes and at least %d: one must be above 0, neither below, the first at most 100", s.MinPreemptionPercent, s.MinPreemptionNodes)
	}
	for i, c := range s.Spread {
		if c.LabelSelector != nil || c.TopologyKey == "" || c.MaxSkew < 1 {
			fault("default spread constraint %d must have a topologyKey, a maxSkew above 0 and no labelSelector", i)
		}
	}
	if a := s.AddedAffinity; a != nil {
		if a.RequiredDuringSchedulingIgnoredDuringExecution != nil {
			if _, err := nodeaffinity.NewNodeSelector(a.RequiredDuringSchedulingIgnoredDuringExecution); err != nil {
				fault("added affinity, required: %w", err)
			}
		}
		if _, err := nodeaffinity.NewPreferredSchedulingTerms(a.PreferredDuringSchedulingIgnoredDuringExecution); err != nil {
			fault("added affinity, preferred: %w", err)
		}
	}
	return errors.Join(errs...)
}

func (s *Settings) checkShape() error {
	if len(s.Shape) == 0 {
		return fmt.Errorf("profile %q: the strategy %s needs a shape", s.Name, RequestedToCapacityRatio)
	}
	for i, p := range s.Shape {
		if p.Utilization < 0 || p.Utilization > 100 || p.Score < 0 || p.Score > maxShapeScore || i > 0 && p.Utilization <= s.Shape[i-1].Utilization {
			return fmt.Errorf("profile %q: point %d of the shape (%d%%: %d) must have a utilisation above its predecessor's in 0..100 and a score in 0..%d",
				s.Name, i, p.Utilization, p.Score, maxShapeScore)
		}
	}
	return nil
}

type namedWeight struct {
	rule   string
	weight int64
}

func (w *Weights) named() []namedWeight {
	return []namedWeight{
		{string(TaintToleration), w.Taints}, {string(NodeAffinity), w.NodeAffinity}, {string(PodTopologySpread), w.Spread},
		{string(InterPodAffinity), w.InterPod}, {string(NodeResourcesFit), w.Fit},
		{"NodeResourcesBalancedAllocation", w.Balanced}, {"ImageLocality", w.ImageLocality}, {string(DynamicResources), w.Devices},
	}
}

// constraintsOf parses spread constraints of one kind; own are the labels of
// the pod that they are of.
func constraintsOf(own map[string]string, all []v1.TopologySpreadConstraint, action v1.UnsatisfiableConstraintAction) ([]constraint, error) {
	var out []constraint
	for i := range all {
		if all[i].WhenUnsatisfiable != action {
			continue
		}
		c, err := parseConstraint(own, &all[i])
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}
