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
)

// Events creates events as the API does, without a request for each (see leaderWrites).
type Events struct {
	leaderWrites
	storage rest.Creater
}

// Events gives one that decorates the context of each creation as Loopback does.
func (s *Server) Events(userAgent string, decorate func(context.Context) context.Context) (*Events, error) {
	d, err := s.leaderWrites(userAgent, decorate)
	if err != nil {
		return nil, err
	}
	storage, ok := s.build.events.(rest.Creater)
	if !ok {
		return nil, errors.New("this version of the API has no storage of events")
	}
	return &Events{d, storage}, nil
}

// Create creates each event or says why not; the errors are those of the API. It calls done for each as soon as that is known, several
// at a time, and returns after the last. The events are not changed.
func (e *Events) Create(ctx context.Context, all []*corev1.Event, done func(i int, err error)) {
	e.each(ctx, len(all), func(ctx context.Context, i int) { done(i, e.create(ctx, all[i])) })
}

func (e *Events) create(ctx context.Context, o *corev1.Event) error {
	if e.requests != nil {
		_, err := e.requests.CoreV1().Events(o.Namespace).Create(ctx, o, metav1.CreateOptions{})
		return err
	}
	ctx, end := e.enter(ctx, o.Namespace, o.Name, "events", "")
	defer end()
	var in core.Event
	if err := legacyscheme.Scheme.Convert(o, &in, nil); err != nil {
		return apierrors.NewBadRequest(err.Error())
	}
	// The two may share maps, and admission may change what it is given.
	in.ObjectMeta = *in.ObjectMeta.DeepCopy()
	options := &metav1.CreateOptions{}
	attributes, err := e.creation(ctx, &in, "Event", o.Namespace, o.Name, "events", "", options)
	if err == nil {
		_, err = e.storage.Create(ctx, &in, rest.AdmissionToValidateObjectFunc(e.admit, attributes, e.scope), options)
	}
	return err
}
