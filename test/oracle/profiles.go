package oracle

import (
	"errors"

	"k8s.io/kubernetes/pkg/scheduler/apis/config"

	"skein.io/skein/node/api/schedconfig"
	"skein.io/skein/scheduler/placement"
)

type profilePair struct {
	upstream config.KubeSchedulerProfile
	ours     *placement.Profile
}

const packed = 1 // the profile of that name, which weighs an extended resource

// configuration is read by both, each in its own way. The first profile is the default one; the others turn everything that a
// profile can turn.
const configuration = `
apiVersion: kubescheduler.config.k8s.io/v1
kind: KubeSchedulerConfiguration
profiles:
- schedulerName: default-scheduler
- schedulerName: packed
  plugins:
    score:
      enabled:
      - name: NodeResourcesFit
        weight: 7
      - name: ImageLocality
      disabled:
      - name: PodTopologySpread
  pluginConfig:
  - name: NodeResourcesFit
    args:
      ignoredResources: [other.org/fpga]
      ignoredResourceGroups: [example.com]
      scoringStrategy:
        type: MostAllocated
        resources:
        - {name: cpu, weight: 3}
        - {name: memory, weight: 1}
        - {name: example.com/gpu, weight: 5}
        - {name: deviceclass.resource.kubernetes.io/card, weight: 4}
        - {name: ephemeral-storage, weight: 2}
  - name: NodeResourcesBalancedAllocation
    args:
      resources:
      - {name: cpu, weight: 1}
      - {name: memory, weight: 1}
      - {name: example.com/gpu, weight: 1}
      - {name: ephemeral-storage, weight: 1}
  - name: InterPodAffinity
    args: {hardPodAffinityWeight: 40, ignorePreferredTermsOfExistingPods: true}
- schedulerName: curved
  pluginConfig:
  - name: NodeResourcesFit
    args:
      scoringStrategy:
        type: RequestedToCapacityRatio
        resources:
        - {name: memory, weight: 2}
        - {name: hugepages-2Mi, weight: 1}
        - {name: cpu, weight: 1}
        requestedToCapacityRatio:
          shape:
          - {utilization: 10, score: 0}
          - {utilization: 70, score: 10}
          - {utilization: 100, score: 3}
  - name: NodeResourcesBalancedAllocation
    args:
      resources:
      - {name: memory, weight: 1}
  - name: NodeAffinity
    args:
      addedAffinity:
        requiredDuringSchedulingIgnoredDuringExecution:
          nodeSelectorTerms:
          - matchExpressions:
            - {key: disk, operator: NotIn, values: [hdd]}
        preferredDuringSchedulingIgnoredDuringExecution:
        - weight: 30
          preference:
            matchExpressions:
            - {key: topology.kubernetes.io/zone, operator: In, values: [east]}
  - name: InterPodAffinity
    args: {hardPodAffinityWeight: 0}
- schedulerName: spread
  plugins:
    multiPoint:
      disabled:
      - name: ImageLocality
      - name: NodeResourcesBalancedAllocation
      enabled:
      - name: TaintToleration
        weight: 11
  pluginConfig:
  - name: PodTopologySpread
    args:
      defaultingType: List
      defaultConstraints:
      - {maxSkew: 1, topologyKey: topology.kubernetes.io/zone, whenUnsatisfiable: DoNotSchedule}
      - {maxSkew: 2, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: ScheduleAnyway}
      - {maxSkew: 1, topologyKey: disk, whenUnsatisfiable: ScheduleAnyway}
  - name: NodeResourcesFit
    args:
      scoringStrategy:
        type: LeastAllocated
        resources:
        - {name: memory, weight: 100}
        - {name: cpu, weight: 1}
- schedulerName: calm
  plugins:
    postFilter: {disabled: [{name: DefaultPreemption}]}
- schedulerName: bare
  plugins:
    preScore: {disabled: [{name: "*"}]}
    score:
      disabled: [{name: "*"}]
      enabled: [{name: ImageLocality, weight: 2}]
    postFilter: {disabled: [{name: "*"}]}
    multiPoint:
      disabled: [{name: NodePorts}, {name: TaintToleration}, {name: PodTopologySpread}]
  pluginConfig:
  - name: PodTopologySpread
    args: {defaultingType: List}
`

// loadProfiles returns the profiles of worlds, the default one first.
func loadProfiles() ([]profilePair, error) {
	theirs, errs := schedconfig.Decode([]byte(configuration))
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	ours, err := schedconfig.Parse("configuration", []byte(configuration))
	if err != nil {
		return nil, err
	}
	out := make([]profilePair, len(theirs.Profiles))
	for i := range out {
		out[i] = profilePair{theirs.Profiles[i], ours.Profiles[i]}
	}
	out[0].ours = placement.DefaultProfile() // which must be what the file says, too
	return out, nil
}
