package schedconfig

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"skein.io/skein/scheduler/placement"
)

const head = "apiVersion: kubescheduler.config.k8s.io/v1\nkind: KubeSchedulerConfiguration\n"

func TestEmptyFileIsTheDefault(t *testing.T) {
	got, err := Parse("f", []byte(head))
	if err != nil {
		t.Fatal(err)
	}
	want := placement.DefaultSettings()
	want.Off, want.IgnoredGroups = map[placement.Filter]bool{}, nil
	if len(got.Profiles) != 1 || !reflect.DeepEqual(got.Profiles[0].Settings, want) {
		t.Errorf("%+v\nwant %+v", got.Profiles[0].Settings, want)
	}
	if got.FirstBackoff != time.Second || got.LongestBackoff != 10*time.Second {
		t.Errorf("back-off %s to %s", got.FirstBackoff, got.LongestBackoff)
	}
}

func TestProfiles(t *testing.T) {
	got, err := Parse("f", []byte(head+`
podInitialBackoffSeconds: 2
podMaxBackoffSeconds: 60
percentageOfNodesToScore: 100
profiles:
- schedulerName: one
  plugins:
    filter: {disabled: [{name: NodePorts}]}
    score: {enabled: [{name: ImageLocality, weight: 9}, {name: NodeAffinity}], disabled: [{name: TaintToleration}]}
- schedulerName: two
  plugins:
    preScore: {disabled: [{name: "*"}]}
    score: {disabled: [{name: "*"}]}
    postFilter: {disabled: [{name: "*"}]}
    multiPoint: {disabled: [{name: VolumeZone}]}
`))
	if err != nil {
		t.Fatal(err)
	}
	one, two := got.Profiles[0], got.Profiles[1]
	if w := (placement.Weights{NodeAffinity: 1, Spread: 2, InterPod: 2, Fit: 1, Balanced: 1, ImageLocality: 9, Devices: 2}); one.Weights != w {
		t.Errorf("weights %+v, want %+v", one.Weights, w)
	}
	if !reflect.DeepEqual(one.Off, map[placement.Filter]bool{placement.NodePorts: true}) || one.NoPreemption {
		t.Errorf("off %v, no preemption %v", one.Off, one.NoPreemption)
	}
	if two.Weights != (placement.Weights{}) || !two.NoPreemption || !two.Off[placement.VolumeZone] || len(two.Off) != 1 {
		t.Errorf("%+v", two.Settings)
	}
	if got.FirstBackoff != 2*time.Second || got.LongestBackoff != time.Minute {
		t.Errorf("back-off %s to %s", got.FirstBackoff, got.LongestBackoff)
	}
}

// Every fault is reported, with the file and the field.
func TestFaults(t *testing.T) {
	for _, tc := range []struct {
		name, text string
		want       []string
	}{
		{"no YAML", "a: [", []string{"yaml"}},
		{"another kind", "apiVersion: kubescheduler.config.k8s.io/v1\nkind: NodeAffinityArgs\n", []string{"not a KubeSchedulerConfiguration"}},
		{"unknown fields", head + "foo: 1\nprofiles: [{schedulerNam: x}]\n", []string{`unknown field "foo"`, `unknown field "profiles[0].schedulerNam"`}},
		{"upstream's own rules", head + "podInitialBackoffSeconds: -1\nprofiles: [{schedulerName: a}, {schedulerName: a}]\n",
			[]string{"podInitialBackoffSeconds: Invalid value: -1", "profiles[1].schedulerName: Duplicate value"}},
		{"what Skein has not", head + `
leaderElection: {leaderElect: true}
parallelism: 3
percentageOfNodesToScore: 30
extenders: [{urlPrefix: "http://x", filterVerb: f}]
profiles:
- schedulerName: a
  percentageOfNodesToScore: 7
  plugins:
    multiPoint: {enabled: [{name: Coscheduling}]}
    queueSort: {disabled: [{name: "*"}]}
    preFilter: {disabled: [{name: NodePorts}]}
  pluginConfig:
  - {name: VolumeBinding, args: {bindTimeoutSeconds: 5}}
`, []string{
			"extenders: Forbidden", "leaderElection: Forbidden", "parallelism: Forbidden", "percentageOfNodesToScore: Invalid value: 30",
			"profiles[0].percentageOfNodesToScore: Invalid value: 7", `profiles[0].plugins.multiPoint.enabled: Unsupported value: "Coscheduling"`,
			`profiles[0].plugins.queueSort: Invalid value: "PrioritySort": is always on`, `profiles[0].plugins.preFilter: Invalid value: "NodePorts"`,
			"profiles[0].pluginConfig[VolumeBinding].args.bindTimeoutSeconds: Invalid value: 5",
		}},
		{"arguments", head + `
profiles:
- pluginConfig:
  - {name: InterPodAffinity, args: {hardPodAffinityWeight: 101}}
  - {name: NodeResourcesFit, args: {scoringStrategy: {type: Fullest}}}
`, []string{"args.hardPodAffinityWeight: Invalid value: 101", `"Fullest"`}},
		{"arguments beside a plugin", head + `
profiles:
- plugins: {score: {enabled: [{name: NodeResourceFit}]}}
  pluginConfig:
  - {name: NodeResourcesFit, args: {scoringStrategy: {type: Fullest}}}
`, []string{`"NodeResourceFit"`, `"Fullest"`}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg, err := Parse("/etc/scheduler.yaml", []byte(tc.text))
			if err == nil {
				t.Fatalf("accepted: %+v", cfg)
			}
			for _, want := range tc.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("does not say %s:\n%v", want, err)
				}
			}
			for _, line := range strings.Split(err.Error(), "\n") {
				if len(line) > 0 && !strings.HasPrefix(line, "scheduler configuration /etc/scheduler.yaml: ") && !strings.HasPrefix(line, "\t") {
					t.Errorf("without the file: %s", line)
				}
			}
		})
	}
	if _, err := Load("/does/not/exist"); err == nil || !strings.Contains(err.Error(), "/does/not/exist") {
		t.Error(err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(head))
	f.Add([]byte(head + "profiles: [{schedulerName: a, plugins: {score: {disabled: [{name: '*'}]}}, pluginConfig: [{name: NodeResourcesFit, args: {scoringStrategy: {type: RequestedToCapacityRatio}}}]}]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		cfg, err := Parse("f", data)
		if (cfg == nil) != (err != nil) || err == nil && len(cfg.Profiles) == 0 {
			t.Fatalf("%+v, %v", cfg, err)
		}
	})
}
