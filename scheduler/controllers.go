package scheduler

import (
	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/controller/cronjob"
	"skein.io/skein/scheduler/controller/daemonset"
	"skein.io/skein/scheduler/controller/deployment"
	"skein.io/skein/scheduler/controller/devicetaint"
	"skein.io/skein/scheduler/controller/disruption"
	"skein.io/skein/scheduler/controller/endpointmirror"
	"skein.io/skein/scheduler/controller/endpoints"
	"skein.io/skein/scheduler/controller/endpointslice"
	"skein.io/skein/scheduler/controller/ephemeralvolume"
	"skein.io/skein/scheduler/controller/garbage"
	"skein.io/skein/scheduler/controller/horizontalpodautoscaler"
	jobs "skein.io/skein/scheduler/controller/job"
	"skein.io/skein/scheduler/controller/namespace"
	"skein.io/skein/scheduler/controller/persistentvolume"
	"skein.io/skein/scheduler/controller/podgc"
	"skein.io/skein/scheduler/controller/quota"
	"skein.io/skein/scheduler/controller/replicaset"
	"skein.io/skein/scheduler/controller/serviceaccount"
	"skein.io/skein/scheduler/controller/statefulset"
	"skein.io/skein/scheduler/controller/ttl"
	"skein.io/skein/scheduler/controller/volumeexpand"
	"skein.io/skein/scheduler/controller/volumeprotection"
)

// Controllers lists everything that the leader runs beside placement. Adding
// one is one line here and one package.
func Controllers() []NewController {
	return []NewController{
		newNode,
		plain(podgc.New),
		plain(deployment.New),
		plain(replicaset.New),
		plain(replicaset.NewReplication),
		plain(statefulset.New),
		plain(daemonset.New),
		plain(jobs.New),
		plain(cronjob.New),
		plain(disruption.New),
		newAutoscaler,
		plain(endpointslice.New),
		plain(endpoints.New),
		plain(endpointmirror.New),
		newResourceClaim,
		plain(devicetaint.New),
		plain(serviceaccount.New),
		plain(quota.New),
		plain(ttl.New),
		plain(persistentvolume.New),
		plain(ephemeralvolume.New),
		plain(volumeexpand.New),
		plain(volumeprotection.NewClaims),
		plain(volumeprotection.NewVolumes),
		plain(volumeprotection.NewClasses),
		plain(namespace.New),
		plain(garbage.New),
	}
}

// newAutoscaler makes the controller of HorizontalPodAutoscalers.
func newAutoscaler(deps controller.Deps, cfg Config) controller.Controller {
	return horizontalpodautoscaler.New(deps, cfg.Autoscaling)
}

// plain adapts a controller that needs only the shared dependencies.
func plain(create func(controller.Deps) controller.Controller) NewController {
	return func(deps controller.Deps, _ Config) controller.Controller { return create(deps) }
}
