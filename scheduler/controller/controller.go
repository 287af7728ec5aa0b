// Package controller holds what every controller of the cluster shares: its
// dependencies, the one shared view that they all read, the bounded keyed
// queue that they all run on, the record of writes that the view may not show
// yet, and the rules of ownership by controller reference.
//
// Contract. A controller is level-triggered: what it does depends only on the
// view at the time of the call, never on which event woke it, so events may be
// merged, repeated or come in any order between kinds. Within one kind the
// view shows changes in the order of their resource versions. For one key at
// most one call of a controller's sync runs at a time; different keys run
// concurrently up to the controller's number of workers.
//
// Objects from the view are shared: nobody may change them.
//
// Each controller's package comment declares its inputs (kinds that it reads)
// and its outputs (what it writes). Only the scheduler's Run may call Run of a
// controller, and only while this node leads: the client in Deps must refuse
// writes of a deposed leader, controllers rely on it and check nothing.
package controller

import (
	"context"
	"errors"
	"log/slog"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/tools/record"
	"k8s.io/utils/clock"
)

// Controller is one control loop.
type Controller interface {
	// Name is the controller's name in logs and in errors, such as "replicaset".
	Name() string
	// Run works until ctx ends and returns when every goroutine that it started
	// has ended. It returns nil if ctx ended it, else what stopped it.
	Run(ctx context.Context) error
}

// HealthState is what the cluster's failure detector says of a node.
type HealthState int

// The states of a node. The zero value is a node that nobody has seen.
const (
	Unknown HealthState = iota
	Alive
	Suspect
	Dead
	Left
)

// String returns the state in lower case.
func (s HealthState) String() string {
	switch s {
	case Alive:
		return "alive"
	case Suspect:
		return "suspect"
	case Dead:
		return "dead"
	case Left:
		return "left"
	}
	return "unknown"
}

// NodeHealth is the failure detector's verdict on one node.
type NodeHealth struct {
	State HealthState
	// Since is when this node came to that verdict, by its own clock.
	Since time.Time
}

// Health tells which nodes live, as seen from this node.
type Health interface {
	// Verdicts returns the verdict on every known node by the node's name.
	Verdicts() map[string]NodeHealth
	// Subscribe returns a channel that gets a value after verdicts changed
	// (changes may be merged into one), and a function that ends it.
	Subscribe() (<-chan struct{}, func())
}

// Quota knows what counts towards a ResourceQuota.
type Quota interface {
	// Usage is how much of the quota's limits is used, as far as that can be told,
	// whatever the error. counted says that objects were counted that no watch
	// tells about, so that it has to be asked again after a while.
	Usage(ctx context.Context, q *corev1.ResourceQuota) (used corev1.ResourceList, counted bool, err error)
}

// Deps is what controllers are made of. All controllers of a leadership share
// one Deps, so that there is one decoded view of each kind.
type Deps struct {
	// Client writes, and reads what must be read from the store itself. Required.
	Client kubernetes.Interface
	// Metadata reads and deletes objects of any kind, names and owners only.
	// Needed by namespace and garbage.
	Metadata metadata.Interface
	// Dynamic reads and writes objects of any kind whole; optional, for
	// controllers of kinds that Client does not know.
	Dynamic dynamic.Interface
	// Factory is the shared view; NewFactory makes it. A controller's New asks it
	// for the kinds that it reads; whoever made it starts it after that. Required.
	Factory informers.SharedInformerFactory
	// Health is the failure detector. Needed by the node controller.
	Health Health
	// Quota works out the usage of quotas. Needed by quota, which rests without.
	Quota Quota
	// Recorder returns the recorder of events that names component as their
	// source; Events provides it. Required.
	Recorder func(component string) record.EventRecorder
	// Clock is the time; nil means the real one.
	Clock clock.WithTicker
	// Logger gets what an operator should know; nil discards.
	Logger *slog.Logger
	// RootCA is the cluster's CA certificate(s) in PEM, published in every
	// namespace for pods. Needed by serviceaccount.
	RootCA []byte
}

// WithDefaults returns d with its optional fields filled in.
func (d Deps) WithDefaults() Deps {
	if d.Clock == nil {
		d.Clock = clock.RealClock{}
	}
	if d.Logger == nil {
		d.Logger = slog.New(slog.DiscardHandler)
	}
	return d
}

// Validate reports every required field that is missing, at once.
func (d Deps) Validate() error {
	var errs []error
	if d.Client == nil {
		errs = append(errs, errors.New("controller: Deps.Client is required"))
	}
	if d.Factory == nil {
		errs = append(errs, errors.New("controller: Deps.Factory is required"))
	}
	if d.Recorder == nil {
		errs = append(errs, errors.New("controller: Deps.Recorder is required"))
	}
	return errors.Join(errs...)
}
