// Package resourcemetrics serves metrics.k8s.io/v1beta1, what metrics-server is elsewhere: how much CPU and memory nodes and pods use.
//
// Nothing is collected until somebody asks. Then the agents of the nodes concerned are asked, at most [atOnce] of them at a time, and each at most once every [fresh],
// however many requests there are; the agents measure (package node/agent/usage). A node that does not answer within [patience] is left out, as
// are pods that have not run for long enough to have a rate.
//
// Group gives the storages for the API's router. They may serve any number of requests at once.
package resourcemetrics

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apiserver/pkg/registry/rest"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/client-go/kubernetes"
	"k8s.io/metrics/pkg/apis/metrics"
	"k8s.io/metrics/pkg/apis/metrics/install"
	metricsv1beta1 "k8s.io/metrics/pkg/apis/metrics/v1beta1"

	"skein.io/skein/node/agent/usage"
)

const (
	// fresh is how long an agent's answer serves other requests.
	fresh = 3 * time.Second
	// patience is how long an agent may take. It measures for a second when nobody has asked it lately.
	patience = 5 * time.Second
	// atOnce bounds the agents that are asked at a time.
	atOnce = 64
	// pageSize is how many pods are read from the store at once.
	pageSize = 500
)

// GroupVersion is what is served, and its place in discovery; both as in metrics-server's APIService.
var GroupVersion = metricsv1beta1.SchemeGroupVersion

// Priority of the group, and of the version within it, in discovery.
const Priority = 100

var (
	scheme = runtime.NewScheme()
	codecs = serializer.NewCodecFactory(scheme)
)

func init() {
	install.Install(scheme)
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
}

// Config of a Group.
type Config struct {
	// Client reads Nodes and Pods. Required.
	Client kubernetes.Interface
	// Transport gives the connections to the agent of a node. Required.
	Transport func(node string) http.RoundTripper
	// Logger gets which nodes do not answer; nil discards.
	Logger *slog.Logger
}

// Group gives the storages of the group.
func Group(cfg Config) genericapiserver.APIGroupInfo {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	info := genericapiserver.NewDefaultAPIGroupInfo(metrics.GroupName, scheme, metav1.ParameterCodec, codecs)
	c := &collector{cfg: cfg, answers: map[string]*answer{}}
	info.VersionedResourcesStorageMap[GroupVersion.Version] = map[string]rest.Storage{"nodes": newNodes(c), "pods": newPods(c)}
	return info
}

// kind is what the API asks of a storage about the kind that it serves.
type kind struct {
	name       string
	namespaced bool
	one, list  func() runtime.Object
}

func (k *kind) New() runtime.Object     { return k.one() }
func (k *kind) NewList() runtime.Object { return k.list() }
func (k *kind) Destroy()                {}
func (k *kind) NamespaceScoped() bool   { return k.namespaced }
func (k *kind) Kind() string            { return k.name }
func (k *kind) GetSingularName() string { return "" }

// storage is all that the API may ask of one.
type storage interface {
	rest.Scoper
	rest.Lister
	rest.Getter
	rest.KindProvider
	rest.SingularNameProvider
}

var _, _ storage = (*nodes)(nil), (*pods)(nil)

// collector asks agents.
type collector struct {
	cfg Config

	mu      sync.Mutex // guards answers
	answers map[string]*answer
}

// answer of one agent; it is under way until done is closed.
type answer struct {
	done   chan struct{}
	at     time.Time
	report usage.Report
	err    error
}

// stale says that an answer helps nobody who asks now.
func (a *answer) stale(now time.Time) bool {
	select {
	case <-a.done:
		return now.Sub(a.at) >= fresh
	default:
		return false
	}
}

// collect asks the agents of all these nodes and hands each report to use, one at a time.
func (c *collector) collect(ctx context.Context, nodes []*corev1.Node, use func(*corev1.Node, usage.Report)) {
	var wg sync.WaitGroup
	var mu sync.Mutex // guards use
	turns := make(chan struct{}, atOnce)
	for _, n := range nodes {
		turns <- struct{}{}
		if ctx.Err() != nil {
			break // nobody waits for the rest
		}
		wg.Go(func() {
			defer func() { <-turns }()
			r, err := c.ask(ctx, n)
			if err != nil {
				if ctx.Err() == nil {
					c.cfg.Logger.Debug("a node does not say what it uses", "node", n.Name, "err", err)
				}
				return
			}
			mu.Lock()
			defer mu.Unlock()
			use(n, r)
		})
	}
	wg.Wait()
}

// ask gives what the agent of a node answers, or answered just now.
func (c *collector) ask(ctx context.Context, n *corev1.Node) (usage.Report, error) {
	a := c.answer(n)
	select {
	case <-a.done:
		return a.report, a.err
	case <-ctx.Done():
		return usage.Report{}, ctx.Err()
	}
}

// answer finds the newest answer of a node, or asks for one, which goes on when the request ends: others may wait for it.
func (c *collector) answer(n *corev1.Node) *answer {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if a := c.answers[n.Name]; a != nil && !a.stale(now) {
		return a
	}
	for name, a := range c.answers { // those that nobody asks about any more
		if a.stale(now) {
			delete(c.answers, name)
		}
	}
	a := &answer{done: make(chan struct{})}
	c.answers[n.Name] = a
	go func() { // ends within patience
		defer close(a.done)
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		a.report, a.err = fetch(ctx, c.cfg.Transport(n.Name), n)
		a.at = time.Now()
	}()
	return a
}

// allNodes are those that can be expected to answer, and nil for what the control plane holds for lost.
func (c *collector) allNodes(ctx context.Context, opts metav1.ListOptions) ([]*corev1.Node, error) {
	list, err := c.cfg.Client.CoreV1().Nodes().List(ctx, opts)
	if err != nil {
		return nil, fmt.Errorf("list nodes: %w", err)
	}
	var out []*corev1.Node
	for i := range list.Items {
		if answers(&list.Items[i]) {
			out = append(out, &list.Items[i])
		}
	}
	return out, nil
}

// answers says that asking the node's agent is not a waste of time.
func answers(n *corev1.Node) bool {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady && c.Status == corev1.ConditionUnknown {
			return false
		}
	}
	return true
}

// notFound is the answer about what has no metrics, in metrics-server's words.
func notFound(resource, name string) error {
	return apierrors.NewNotFound(metrics.Resource(resource), name)
}
