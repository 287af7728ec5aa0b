package scheduler

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/record"

	"skein.io/skein/scheduler/controller/controllertest"
	"skein.io/skein/scheduler/placement"
)

// A pod is placed by the profile that it names, and told of under that name; a name that no profile has is somebody else's.
func TestProfiles(t *testing.T) {
	settings := placement.DefaultSettings()
	settings.Name, settings.Off = "careless", map[placement.Filter]bool{placement.NodeUnschedulable: true}
	careless, err := placement.NewProfile(settings)
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		by := func(name string) func(*v1.Pod) { return func(p *v1.Pod) { p.Spec.SchedulerName = name } }
		client := newClient(nil, testNode("a", "4", func(n *v1.Node) { n.Spec.Unschedulable = true }))
		recorders := map[string]*record.FakeRecorder{}
		placing(t, client, newHealth(), func(cfg *Config) {
			cfg.Profiles = []*placement.Profile{careless, placement.DefaultProfile()}
			cfg.Recorder = func(component string) record.EventRecorder {
				recorders[component] = record.NewFakeRecorder(100)
				return recorders[component]
			}
		})
		create(t, client, testPod("bold", "1", by("careless")), testPod("plain", "1"), testPod("foreign", "1", by("other")))
		settle(time.Second)
		for pod, want := range map[string]string{"bold": "a", "plain": "", "foreign": ""} {
			if n := get(t, client, pod).Spec.NodeName; n != want {
				t.Errorf("%s is on %q, want %q", pod, n, want)
			}
		}
		if podCondition(get(t, client, "foreign"), v1.PodScheduled) != nil {
			t.Error("somebody else's pod was judged")
		}
		for name, want := range map[string]string{"careless": "Normal Scheduled", "default-scheduler": "Warning FailedScheduling"} {
			if events := controllertest.Events(recorders[name]); len(events) != 1 || !strings.HasPrefix(events[0], want) {
				t.Errorf("%s told %q, want one %s", name, events, want)
			}
		}
	})
	err = Config{Profiles: []*placement.Profile{careless, placement.DefaultProfile(), careless}}.Validate()
	if err == nil || !strings.Contains(err.Error(), `two of the Profiles are named "careless"`) {
		t.Error(err)
	}
}
