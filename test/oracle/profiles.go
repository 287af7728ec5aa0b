package oracle

import (
	"k8s.io/kubernetes/pkg/scheduler/apis/config"
	"k8s.io/kubernetes/pkg/scheduler/apis/config/latest"

	"skein.io/skein/scheduler/placement"
)

type profilePair struct {
	upstream config.KubeSchedulerProfile
	ours     *placement.Profile
}

// loadProfiles returns the profiles of worlds, the default one first.
func loadProfiles() ([]profilePair, error) {
	def, err := latest.Default()
	if err != nil {
		return nil, err
	}
	return []profilePair{{def.Profiles[0], placement.DefaultProfile()}}, nil
}
