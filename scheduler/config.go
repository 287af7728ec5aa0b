package scheduler

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/tools/record"
	"k8s.io/utils/clock"

	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/controller/horizontalpodautoscaler"
	"skein.io/skein/scheduler/controller/node"
	"skein.io/skein/scheduler/controller/resourceclaim"
	"skein.io/skein/scheduler/placement"
	"skein.io/skein/scheduler/queue"
)

// Health is the failure detector that placement and the node controller obey.
type Health = controller.Health

// NodeHealth is its verdict on one node.
type NodeHealth = controller.NodeHealth

// The states of a node that a verdict can name.
const (
	Unknown = controller.Unknown
	Alive   = controller.Alive
	Suspect = controller.Suspect
	Dead    = controller.Dead
	Left    = controller.Left
)

// Config is what one leadership's scheduler and controllers are made of.
type Config struct {
	// Client reads and writes the API with the leader's term. Required.
	Client kubernetes.Interface
	// Metadata reads and deletes objects of any kind, names and owners only.
	// Required unless Controllers leaves out those that need it (garbage).
	Metadata metadata.Interface
	// Dynamic is handed to controllers; may be nil.
	Dynamic dynamic.Interface
	// Factory is the shared view, not started. Nil: one is made from Client. It
	// serves one Run only.
	Factory informers.SharedInformerFactory
	// Health is the failure detector. Required.
	Health Health
	// PodCIDR is the range from which every node gets a /24 (IPv4) or /64 (IPv6)
	// for its pods. Required.
	PodCIDR netip.Prefix
	// RootCA is the cluster's CA in PEM, published in every namespace.
	RootCA []byte
	// Quota makes what works out the usage of quotas, from the shared view. Nil:
	// the status of quotas is not kept.
	Quota func(informers.SharedInformerFactory) controller.Quota
	// Autoscaling is what autoscalers read and scale; see horizontalpodautoscaler.NewWorld. Nil: they are left alone.
	Autoscaling horizontalpodautoscaler.World
	// Inspector is made to answer questions while Run works. Nil: nobody asks.
	Inspector *Inspector
	// Binder binds pods, with the leader's term. Nil: by requests of Client.
	Binder Binder
	// Events creates events, with the leader's term. Nil: by requests of Client.
	Events controller.EventCreator
	// BindWorkers is how many batches of bindings, and other writes, are under way
	// at once. Default 32.
	BindWorkers int
	// Batch is how many pods are planned on one state of the cluster before the
	// decisions are carried out. Default 128.
	Batch int
	// Seed starts the random choice between equally good nodes. 0: from the clock.
	Seed uint64
	// Profiles place the pods that name one of them as their scheduler; others
	// are left alone. Nil: upstream's default profile.
	Profiles []*placement.Profile
	// Queue holds the waiting times; zero fields are defaults.
	Queue queue.Config
	// Node holds the settings of the node lifecycle; zero fields are defaults.
	Node node.Settings
	// Claims counts claims of dynamic resources; nil for none.
	Claims *resourceclaim.Board
	// Controllers makes the controllers to run beside placement. Nil: all of
	// [Controllers].
	Controllers []NewController
	// Recorder makes recorders of events. Nil: they are written through Client.
	Recorder func(component string) record.EventRecorder
	// Clock is the time; nil means the real one.
	Clock clock.WithTicker
	// Logger gets what an operator should know; nil discards.
	Logger *slog.Logger
}

// DefaultConfig returns the documented defaults of the optional fields.
func DefaultConfig() Config {
	return Config{BindWorkers: 32, Batch: 128, Queue: queue.DefaultConfig(), Node: node.DefaultSettings()}
}

func (c *Config) setDefaults() {
	d := DefaultConfig()
	c.BindWorkers = cmp.Or(c.BindWorkers, d.BindWorkers)
	c.Batch = cmp.Or(c.Batch, d.Batch)
	if c.Factory == nil && c.Client != nil {
		c.Factory = controller.NewFactory(c.Client)
	}
	if c.Binder == nil && c.Client != nil {
		c.Binder = requests{c.Client, 32}
	}
	if c.Clock == nil {
		c.Clock = clock.RealClock{}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Seed == 0 {
		c.Seed = uint64(time.Now().UnixNano())
	}
	if c.Profiles == nil {
		c.Profiles = []*placement.Profile{placement.DefaultProfile()}
	}
	if c.Controllers == nil {
		c.Controllers = Controllers()
	}
}

// Validate reports all faults of the configuration at once.
func (c Config) Validate() error {
	var errs []error
	if c.Client == nil {
		errs = append(errs, errors.New("scheduler: Client is required"))
	}
	if c.Health == nil {
		errs = append(errs, errors.New("scheduler: Health is required"))
	}
	if c.Metadata == nil && c.Controllers == nil {
		errs = append(errs, errors.New("scheduler: Metadata is required"))
	}
	if !c.PodCIDR.IsValid() {
		errs = append(errs, errors.New("scheduler: PodCIDR is required"))
	}
	if c.BindWorkers < 0 {
		errs = append(errs, fmt.Errorf("scheduler: BindWorkers is negative: %d", c.BindWorkers))
	}
	if c.Batch < 0 {
		errs = append(errs, fmt.Errorf("scheduler: Batch is negative: %d", c.Batch))
	}
	names := map[string]bool{}
	for _, p := range c.Profiles {
		if names[p.Name] {
			errs = append(errs, fmt.Errorf("scheduler: two of the Profiles are named %q", p.Name))
		}
		names[p.Name] = true
	}
	return errors.Join(append(errs, c.Queue.Validate(), c.Node.Validate())...)
}
