package api

import (
	"context"
	"errors"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	"k8s.io/kubernetes/pkg/apis/core"

	"skein.io/skein/node/api/store"
)

// Binder carries out bindings of pods as the API does, without a request for each (see leaderWrites).
type Binder struct {
	leaderWrites
	storage rest.NamedCreater
}

// Binder gives one that decorates the context of each binding as Loopback does.
func (s *Server) Binder(userAgent string, decorate func(context.Context) context.Context) (*Binder, error) {
	d, err := s.leaderWrites(userAgent, decorate)
	if err != nil {
		return nil, err
	}
	storage, ok := s.build.bindings.(rest.NamedCreater)
	if !ok {
		return nil, errors.New("this version of the API has no storage of bindings")
	}
	return &Binder{d, storage}, nil
}

// Bind binds each pod or says why not; the errors are those of the API. It calls done for each as soon as that is known, several at a
// time, and returns after the last.
func (b *Binder) Bind(ctx context.Context, all []*corev1.Binding, done func(i int, err error)) {
	b.each(ctx, len(all), func(ctx context.Context, i int) { done(i, b.bind(ctx, all[i])) })
}

func (b *Binder) bind(ctx context.Context, o *corev1.Binding) error {
	if b.requests != nil {
		return b.requests.CoreV1().Pods(o.Namespace).Bind(ctx, o, metav1.CreateOptions{})
	}
	ctx, end := b.enter(ctx, o.Namespace, o.Name, "pods", "binding")
	defer end()
	var in core.Binding
	if err := legacyscheme.Scheme.Convert(o, &in, nil); err != nil {
		return apierrors.NewBadRequest(err.Error())
	}
	options := &metav1.CreateOptions{}
	attributes, err := b.creation(ctx, &in, "Binding", o.Namespace, o.Name, "pods", "binding", options)
	if err == nil {
		_, err = b.storage.Create(store.WithBinding(ctx, &in), o.Name, &in, rest.AdmissionToValidateObjectFunc(b.admit, attributes, b.scope), options)
	}
	return err
}
