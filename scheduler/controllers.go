package scheduler

import (
	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/controller/deployment"
	"skein.io/skein/scheduler/controller/endpointslice"
	"skein.io/skein/scheduler/controller/replicaset"
	"skein.io/skein/scheduler/controller/serviceaccount"
)

// Controllers lists everything that the leader runs beside placement. Adding
// one is one line here and one package.
func Controllers() []NewController {
	return []NewController{
		newNode,
		plain(deployment.New),
		plain(endpointslice.New),
		plain(replicaset.New),
		plain(serviceaccount.New),
	}
}

// plain adapts a controller that needs only the shared dependencies.
func plain(create func(controller.Deps) controller.Controller) NewController {
	return func(deps controller.Deps, _ Config) controller.Controller { return create(deps) }
}
