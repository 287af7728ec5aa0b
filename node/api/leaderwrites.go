package api

import (
	"context"
	"fmt"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/authentication/user"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/client-go/kubernetes"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
)

// writesAtOnce is how many writes of a batch are under way at once. They share an entry of the store's log (which holds up to 256) with those of other
// batches. Each needs a goroutine, whose stack grows with its first write.
const writesAtOnce = 64

// leaderWrites carries out what the leader writes by the thousand (bindings, events) as the API does, without a request for each: the same
// admission with the same webhooks and policies, the same validation, the same storage. What a request has besides - authentication and
// authorization of this process itself, priority and fairness, encoding, the record of who manages which field - decides nothing here.
// If requests are recorded (audit), requests are made, so that these are, too.
type leaderWrites struct {
	server   *Server
	admit    admission.Interface
	scope    admission.ObjectInterfaces
	user     user.Info
	decorate func(context.Context) context.Context
	requests kubernetes.Interface // set: requests are made
}

func (s *Server) leaderWrites(userAgent string, decorate func(context.Context) context.Context) (leaderWrites, error) {
	d := leaderWrites{server: s, admit: s.build.generic.AdmissionControl, scope: admission.NewObjectInterfacesFromScheme(legacyscheme.Scheme), decorate: decorate,
		user: &user.DefaultInfo{Name: user.APIServerUser, Groups: []string{user.SystemPrivilegedGroup, user.AllAuthenticated}}}
	if s.cfg.Access.Audit.Policy == "" {
		return d, nil
	}
	client, err := kubernetes.NewForConfig(s.Loopback(userAgent, decorate))
	if err != nil {
		return d, fmt.Errorf("client of the leader: %w", err)
	}
	d.requests = client
	return d, nil
}

// each calls do for 0..n-1, some at once.
func (d *leaderWrites) each(ctx context.Context, n int, do func(ctx context.Context, i int)) {
	if d.decorate != nil {
		ctx = d.decorate(ctx)
	}
	ctx, cancel := context.WithCancel(apirequest.WithUser(ctx, d.user))
	defer cancel()
	defer context.AfterFunc(d.server.requests, cancel)()
	next := make(chan int)
	var wg sync.WaitGroup
	for range min(writesAtOnce, n) {
		wg.Go(func() {
			for i := range next {
				do(ctx, i)
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
}

// enter bounds a write as a request is bounded, and makes it one of the core group's.
func (d *leaderWrites) enter(ctx context.Context, namespace, name, resource, subresource string) (context.Context, func()) {
	ctx, cancel := context.WithTimeout(ctx, d.server.build.generic.RequestTimeout)
	ctx = apirequest.WithRequestInfo(ctx, &apirequest.RequestInfo{IsResourceRequest: true, Verb: "create", APIPrefix: "api",
		APIVersion: corev1.SchemeGroupVersion.Version, Namespace: namespace, Name: name, Resource: resource, Subresource: subresource})
	return apirequest.WithNamespace(ctx, namespace), cancel
}

// creation lets admission change an object that is to be created, and tells who validates it.
func (d *leaderWrites) creation(ctx context.Context, in runtime.Object, kind, namespace, name, resource, subresource string, options *metav1.CreateOptions) (admission.Attributes, error) {
	gv := corev1.SchemeGroupVersion
	attributes := admission.NewAttributesRecord(in, nil, gv.WithKind(kind), namespace, name, gv.WithResource(resource), subresource, admission.Create, options, false, d.user)
	if m, ok := d.admit.(admission.MutationInterface); ok && d.admit.Handles(admission.Create) {
		if err := m.Admit(ctx, attributes, d.scope); err != nil {
			return nil, err
		}
	}
	return attributes, nil
}
