package daemon

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	authzv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcore "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/record"

	"skein.io/skein/consensus/members"
	"skein.io/skein/node/agent"
	"skein.io/skein/node/agent/server"
	"skein.io/skein/node/cri/logs"
)

// eventSource is the component that events of this node's pods come from: programs, the conformance tests among them, select them
// by the name of upstream's node agent.
const eventSource = "kubelet"

// runAgent runs this node's pods and the agent's own API.
func (n *node) runAgent(ctx context.Context) error {
	rt, err := n.runtime.dial(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	defer rt.Close(context.WithoutCancel(ctx))
	events := record.NewBroadcaster(record.WithContext(ctx))
	events.StartRecordingToSink(&typedcore.EventSinkImpl{Interface: n.client.CoreV1().Events("")})
	defer events.Shutdown()
	a, err := agent.New(agent.Config{
		NodeName: n.cfg.Name, NodeIPs: []netip.Addr{n.cfg.Address}, Client: n.client, Desired: n.desired,
		Runtime: rt, Images: rt.Images, StateDir: n.cfg.StateDir, CgroupRoot: n.cfg.CgroupRoot,
		ClusterDNS: []string{n.id.Cluster.DNS.String()}, ClusterDomain: n.id.Cluster.Domain,
		Recorder:     events.NewRecorder(scheme.Scheme, corev1.EventSource{Component: eventSource, Host: n.cfg.Name}),
		NetworkReady: n.net.Ready, Zone: n.cfg.Zone, Labels: n.cfg.Labels, FirstLabels: n.firstLabels(), Port: agentPort,
		Logger: n.log.With("part", "agent"),
	})
	if err != nil {
		return err
	}
	n.parts.set("agent", nil, "")
	n.agentOnce.Do(func() { close(n.agentUp) })
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.Run(ctx) })
	g.Go(func() error {
		s, err := server.New(server.Config{
			NodeName: n.cfg.Name, Pods: n.desired.Pods, Pod: n.desired.Pod, Runtime: rt, ReadLog: logs.Read,
			Authorize: newAuthorizer(n.client, n.cfg.Name).allowed, Healthy: n.desired.Health, Metrics: n.metrics,
			Extra:  map[string]http.Handler{"/skein/v1/": n.nodeHandler()},
			Logger: n.log.With("part", "agent-api"),
		})
		if err != nil {
			return err
		}
		return n.serveAgent(ctx, s)
	})
	return g.Wait()
}

// firstLabels are those that the node begins with; users change them with kubectl.
func (n *node) firstLabels() map[string]string {
	if n.cfg.Voter == "auto" {
		return nil
	}
	return map[string]string{members.Label: n.cfg.Voter}
}

// serveAgent listens on the agent's port. Clients may show a certificate of the cluster's CA; what they may do without
// or with one is the handler's business.
func (n *node) serveAgent(ctx context.Context, h http.Handler) error {
	l, err := net.Listen("tcp", netip.AddrPortFrom(n.cfg.Address, agentPort).String())
	if err != nil {
		return fmt.Errorf("agent port: %w", err)
	}
	return serve(ctx, &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second, TLSConfig: &tls.Config{
		MinVersion: tls.VersionTLS12, GetCertificate: n.id.ServerTLS().GetCertificate, ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: n.id.Pool(),
		// Exec, attach and port-forward upgrade the connection, which HTTP/2 cannot.
		NextProtos: []string{"http/1.1"},
	}}, l)
}

const (
	// authorizedFor and refusedFor are how long a decision is remembered, as upstream's kubelet (5 min and 30 s) but shorter.
	authorizedFor = time.Minute
	refusedFor    = 10 * time.Second
	maxDecisions  = 1024
)

// authorizer asks the cluster who may use this node's own API.
type authorizer struct {
	client kubernetes.Interface
	node   string

	mu   sync.Mutex // guards seen
	seen map[string]decision
}

type decision struct {
	allowed bool
	reason  string
	till    time.Time
}

func newAuthorizer(c kubernetes.Interface, node string) *authorizer {
	return &authorizer{client: c, node: node, seen: map[string]decision{}}
}

func (a *authorizer) allowed(ctx context.Context, u server.User, q server.Attributes) (bool, string, error) {
	key := fmt.Sprintf("%q %q %s %s", u.Name, u.Groups, q.Verb, q.Subresource)
	now := time.Now()
	a.mu.Lock()
	d, ok := a.seen[key]
	a.mu.Unlock()
	if ok && now.Before(d.till) {
		return d.allowed, d.reason, nil
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	r, err := a.client.AuthorizationV1().SubjectAccessReviews().Create(ctx, &authzv1.SubjectAccessReview{Spec: authzv1.SubjectAccessReviewSpec{
		User: u.Name, Groups: u.Groups,
		ResourceAttributes: &authzv1.ResourceAttributes{Verb: q.Verb, Version: "v1", Resource: "nodes", Subresource: q.Subresource, Name: a.node},
	}}, metav1.CreateOptions{})
	if err != nil {
		return false, "", err
	}
	d = decision{allowed: r.Status.Allowed, reason: r.Status.Reason, till: now.Add(refusedFor)}
	if d.allowed {
		d.till = now.Add(authorizedFor)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.seen) >= maxDecisions {
		clear(a.seen)
	}
	a.seen[key] = d
	return d.allowed, d.reason, nil
}
