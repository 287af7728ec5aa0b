package api

import (
	"context"
	"fmt"
	"sync"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/authentication/user"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/client-go/kubernetes"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	"k8s.io/kubernetes/pkg/apis/core"
)

// bindAtOnce is how many bindings of a batch are under way at once. Their reads share a round of the store, their writes an entry of its
// log (which holds up to 256).
const bindAtOnce = 128

// Binder carries out bindings of pods as the API does, without a request for each: the same admission with the same webhooks and
// policies, the same validation, the same compare-and-swap of the same storage. What a request has besides - authentication and
// authorization of this process itself, priority and fairness, encoding - decides nothing here. If requests are recorded (audit), bindings
// are made as requests, so that they are, too.
type Binder struct {
	server   *Server
	storage  rest.NamedCreater
	admit    admission.Interface
	user     user.Info
	decorate func(context.Context) context.Context
	requests kubernetes.Interface // set: bindings are made as requests
}

// Binder gives one that decorates the context of each binding as Loopback does.
func (s *Server) Binder(userAgent string, decorate func(context.Context) context.Context) (*Binder, error) {
	b := &Binder{server: s, admit: s.build.generic.AdmissionControl, decorate: decorate,
		user: &user.DefaultInfo{Name: user.APIServerUser, Groups: []string{user.SystemPrivilegedGroup, user.AllAuthenticated}}}
	var ok bool
	if b.storage, ok = s.build.bindings.(rest.NamedCreater); !ok || s.cfg.Access.Audit.Policy != "" {
		client, err := kubernetes.NewForConfig(s.Loopback(userAgent, decorate))
		if err != nil {
			return nil, fmt.Errorf("client for bindings: %w", err)
		}
		b.requests = client
	}
	return b, nil
}

// Bind binds each pod or says why not; the errors are those of the API. It calls done for each as soon as that is known, several at a
// time, and returns after the last.
func (b *Binder) Bind(ctx context.Context, all []*corev1.Binding, done func(i int, err error)) {
	if b.decorate != nil {
		ctx = b.decorate(ctx)
	}
	next := make(chan int)
	var wg sync.WaitGroup
	for range min(bindAtOnce, len(all)) {
		wg.Go(func() {
			for i := range next {
				done(i, b.bind(ctx, all[i]))
			}
		})
	}
	for i := range all {
		next <- i
	}
	close(next)
	wg.Wait()
}

func (b *Binder) bind(ctx context.Context, o *corev1.Binding) error {
	if b.requests != nil {
		return b.requests.CoreV1().Pods(o.Namespace).Bind(ctx, o, metav1.CreateOptions{})
	}
	ctx, cancel := context.WithTimeout(ctx, b.server.build.generic.RequestTimeout)
	defer cancel()
	defer context.AfterFunc(b.server.requests, cancel)()
	var in core.Binding
	if err := legacyscheme.Scheme.Convert(o, &in, nil); err != nil {
		return apierrors.NewBadRequest(err.Error())
	}
	ctx = apirequest.WithUser(apirequest.WithNamespace(ctx, o.Namespace), b.user)
	options := &metav1.CreateOptions{}
	gv := corev1.SchemeGroupVersion
	attributes := admission.NewAttributesRecord(&in, nil, gv.WithKind("Binding"), o.Namespace, o.Name, gv.WithResource("pods"), "binding", admission.Create, options, false, b.user)
	scope := admission.NewObjectInterfacesFromScheme(legacyscheme.Scheme)
	if m, ok := b.admit.(admission.MutationInterface); ok && b.admit.Handles(admission.Create) {
		if err := m.Admit(ctx, attributes, scope); err != nil {
			return err
		}
	}
	_, err := b.storage.Create(ctx, o.Name, &in, rest.AdmissionToValidateObjectFunc(b.admit, attributes, scope), options)
	return err
}
