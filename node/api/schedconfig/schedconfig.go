// Package schedconfig reads kube-scheduler's configuration file (KubeSchedulerConfiguration,
// kubescheduler.config.k8s.io/v1) and makes placement's profiles of it.
//
// Decoding, defaults and validation are upstream's own. What such a file can say and Skein does not do is a fault, too:
// nothing in it is ignored. All faults are reported at once, each with the file and the field.
//
// It has no state; anybody may call it at any time. The daemon does when it starts.
package schedconfig

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/kubernetes/pkg/scheduler/apis/config"
	"k8s.io/kubernetes/pkg/scheduler/apis/config/scheme"
	"k8s.io/kubernetes/pkg/scheduler/apis/config/validation"
	"sigs.k8s.io/yaml"

	"skein.io/skein/scheduler/placement"
)

// Config is what a file says.
type Config struct {
	// Profiles place the pods that name them as their scheduler; one at least.
	Profiles []*placement.Profile
	// FirstBackoff and LongestBackoff bound the wait after a failed attempt.
	FirstBackoff, LongestBackoff time.Duration
}

// Load reads a file.
func Load(file string) (*Config, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("scheduler configuration: %w", err)
	}
	return Parse(file, data)
}

// Parse reads a file's content; file is for the faults.
func Parse(file string, data []byte) (*Config, error) {
	upstream, errs := Decode(data)
	var out *Config
	if upstream != nil {
		var more []error
		out, more = translate(upstream)
		errs = append(errs, more...)
	}
	if len(errs) == 0 {
		return out, nil
	}
	for i := range errs {
		errs[i] = fmt.Errorf("scheduler configuration %s: %w", file, errs[i])
	}
	return nil, errors.Join(errs...)
}

// Decode reads the file as upstream does and returns its faults; the configuration is nil if there is no reading it.
func Decode(data []byte) (*config.KubeSchedulerConfiguration, []error) {
	obj, kind, err := scheme.Codecs.UniversalDecoder().Decode(data, nil, nil)
	if err != nil {
		var strict interface{ Errors() []error }
		if errors.As(err, &strict) {
			return nil, strict.Errors()
		}
		return nil, []error{err}
	}
	cfg, ok := obj.(*config.KubeSchedulerConfiguration)
	if !ok {
		return nil, []error{fmt.Errorf("is a %s, not a KubeSchedulerConfiguration", kind)}
	}
	cfg.APIVersion = kind.GroupVersion().String()
	var errs []error
	if all := validation.ValidateKubeSchedulerConfiguration(cfg); all != nil {
		errs = append(errs, utilerrors.Flatten(all).Errors()...)
	}
	for _, name := range elsewhere(data) {
		errs = append(errs, field.Forbidden(field.NewPath(name), foreign[name]))
	}
	return cfg, errs
}

// foreign are the parts of the file that say how kube-scheduler's process runs, with what stands for them here.
var foreign = map[string]string{
	"parallelism":               "decisions are made one after the other",
	"leaderElection":            "the leader of the cluster places pods",
	"clientConnection":          "the scheduler runs inside of the API server's process",
	"healthzBindAddress":        "see 'skein status'",
	"metricsBindAddress":        "the API server serves all metrics",
	"enableProfiling":           "the node has its own switch for profiling",
	"enableContentionProfiling": "the node has its own switch for profiling",
	"delayCacheUntilActive":     "only the leader watches",
	"extenders":                 "extenders are not called",
}

// elsewhere finds them in the text: after decoding, their defaults cannot be told from what was written.
func elsewhere(data []byte) (out []string) {
	var top map[string]any
	if yaml.Unmarshal(data, &top) != nil {
		return nil // Decode has said so
	}
	for name := range foreign {
		if _, ok := top[name]; ok {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

func translate(cfg *config.KubeSchedulerConfiguration) (*Config, []error) {
	out := &Config{
		FirstBackoff:   time.Duration(cfg.PodInitialBackoffSeconds) * time.Second,
		LongestBackoff: time.Duration(cfg.PodMaxBackoffSeconds) * time.Second,
	}
	var faults field.ErrorList
	faults = append(faults, sampled(field.NewPath("percentageOfNodesToScore"), cfg.PercentageOfNodesToScore)...)
	for i := range cfg.Profiles {
		p, path := &cfg.Profiles[i], field.NewPath("profiles").Index(i)
		settings, more := profile(p, path)
		faults = append(faults, more...)
		made, err := placement.NewProfile(settings)
		if err != nil {
			faults = append(faults, field.Invalid(path, p.SchedulerName, strings.ReplaceAll(err.Error(), "\n", "; ")))
			continue
		}
		if len(more) > 0 {
			continue
		}
		out.Profiles = append(out.Profiles, made)
	}
	errs := make([]error, len(faults))
	for i, f := range faults {
		errs[i] = f
	}
	return out, errs
}

func sampled(path *field.Path, percent *int32) field.ErrorList {
	if percent == nil || *percent == 0 || *percent == 100 {
		return nil
	}
	return field.ErrorList{field.Invalid(path, *percent, "every node is scored: only 100 is possible")}
}

// profile translates one, whose defaults are filled in.
func profile(p *config.KubeSchedulerProfile, path *field.Path) (placement.Settings, field.ErrorList) {
	s := placement.DefaultSettings()
	s.Name = p.SchedulerName
	faults := sampled(path.Child("percentageOfNodesToScore"), p.PercentageOfNodesToScore)
	faults = append(faults, plugins(p.Plugins, &s, path.Child("plugins"))...)
	for i := range p.PluginConfig {
		at := path.Child("pluginConfig").Key(p.PluginConfig[i].Name).Child("args")
		faults = append(faults, arguments(p.PluginConfig[i].Args, &s, at)...)
	}
	return s, faults
}

// arguments translates those of one plugin. Upstream has validated them.
func arguments(args runtime.Object, s *placement.Settings, path *field.Path) (faults field.ErrorList) {
	switch a := args.(type) {
	case *config.DefaultPreemptionArgs:
		s.MinPreemptionPercent, s.MinPreemptionNodes = a.MinCandidateNodesPercentage, a.MinCandidateNodesAbsolute
	case *config.InterPodAffinityArgs:
		s.HardPodAffinityWeight, s.IgnorePreferredTermsOfExistingPods = a.HardPodAffinityWeight, a.IgnorePreferredTermsOfExistingPods
	case *config.NodeAffinityArgs:
		s.AddedAffinity = a.AddedAffinity
	case *config.NodeResourcesFitArgs:
		fit(a, s)
	case *config.NodeResourcesBalancedAllocationArgs:
		s.Balanced = nil
		for _, r := range a.Resources {
			s.Balanced = append(s.Balanced, v1.ResourceName(r.Name))
		}
	case *config.PodTopologySpreadArgs:
		if a.DefaultingType == config.ListDefaulting {
			s.Spread, s.SpreadNothing = a.DefaultConstraints, true
		}
	case *config.VolumeBindingArgs:
		if a.BindTimeoutSeconds != defaultBindTimeout {
			faults = append(faults, field.Invalid(path.Child("bindTimeoutSeconds"), a.BindTimeoutSeconds, fmt.Sprintf("is %d and cannot be changed", defaultBindTimeout)))
		}
		if len(a.Shape) > 0 {
			faults = append(faults, field.Forbidden(path.Child("shape"), "nodes are not scored by their storage's capacity (an alpha feature)"))
		}
	case *config.DynamicResourcesArgs:
		if t := a.FilterTimeout; t != nil && t.Duration != config.DynamicResourcesFilterTimeoutDefault {
			faults = append(faults, field.Invalid(path.Child("filterTimeout"), t.Duration.String(), "is 10s and cannot be changed"))
		}
		if t := a.BindingTimeout; t != nil && t.Duration != config.DynamicResourcesBindingTimeoutDefault {
			faults = append(faults, field.Invalid(path.Child("bindingTimeout"), t.Duration.String(), "is 10m0s and cannot be changed"))
		}
	default:
		faults = append(faults, field.Forbidden(path, "there is no such plugin here"))
	}
	return faults
}

const defaultBindTimeout = 600 // seconds

func fit(a *config.NodeResourcesFitArgs, s *placement.Settings) {
	s.IgnoredResources = nil
	for _, name := range a.IgnoredResources {
		s.IgnoredResources = append(s.IgnoredResources, v1.ResourceName(name))
	}
	s.IgnoredGroups = a.IgnoredResourceGroups
	if a.ScoringStrategy == nil {
		return
	}
	s.Strategy, s.Resources, s.Shape = placement.Strategy(a.ScoringStrategy.Type), nil, nil
	for _, r := range a.ScoringStrategy.Resources {
		s.Resources = append(s.Resources, placement.ResourceWeight{Name: v1.ResourceName(r.Name), Weight: r.Weight})
	}
	if curve := a.ScoringStrategy.RequestedToCapacityRatio; curve != nil {
		for _, p := range curve.Shape {
			s.Shape = append(s.Shape, placement.ShapePoint{Utilization: int64(p.Utilization), Score: int64(p.Score)})
		}
	}
}
