package store

import (
	"context"
	"errors"
	"net/http"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/apiserver/pkg/storage"
)

// ReasonFenced is the reason of the Status that answers a write that acts for a leader of the cluster
// that has been replaced. Its code is 409: what the writer knew is out of date.
const ReasonFenced metav1.StatusReason = "Fenced"

// retryAfter is when a client that found no leader should come again, in seconds: an election takes
// about one.
const retryAfter = 1

// refusing makes a Status of the store's refusals; without it the API would answer with an internal
// error, which says nothing to clients, nor to people.
type refusing struct{ storage.Interface }

func (s refusing) Create(ctx context.Context, key string, obj, out runtime.Object, ttl uint64) error {
	return refusedWrite(s.Interface.Create(ctx, key, obj, out, ttl))
}

func (s refusing) Delete(ctx context.Context, key string, out runtime.Object, p *storage.Preconditions,
	validate storage.ValidateObjectFunc, cached runtime.Object, o storage.DeleteOptions,
) error {
	return refusedWrite(s.Interface.Delete(ctx, key, out, p, validate, cached, o))
}

func (s refusing) GuaranteedUpdate(ctx context.Context, key string, out runtime.Object, ignoreNotFound bool,
	p *storage.Preconditions, update storage.UpdateFunc, cached runtime.Object,
) error {
	return refusedWrite(s.Interface.GuaranteedUpdate(ctx, key, out, ignoreNotFound, p, update, cached))
}

func (s refusing) Get(ctx context.Context, key string, o storage.GetOptions, out runtime.Object) error {
	return refusedRead(s.Interface.Get(ctx, key, o, out))
}

func (s refusing) GetList(ctx context.Context, key string, o storage.ListOptions, list runtime.Object) error {
	return refusedRead(s.Interface.GetList(ctx, key, o, list))
}

func (s refusing) Watch(ctx context.Context, key string, o storage.ListOptions) (watch.Interface, error) {
	w, err := s.Interface.Watch(ctx, key, o)
	return w, refusedRead(err)
}

func codeOf(err error) codes.Code {
	var e rpctypes.EtcdError // it hides its code from gRPC
	if errors.As(err, &e) {
		return e.Code()
	}
	return grpcstatus.Code(err)
}

func refusedWrite(err error) error {
	var e rpctypes.EtcdError
	switch {
	case err == nil:
		return nil
	case errors.Is(err, rpctypes.ErrNoLeader): // nothing has been written
		return unavailable(err)
	case codeOf(err) == codes.Unavailable: // it may have been: the client has to look
		return apierrors.NewTimeoutError("whether this was written is unknown: "+err.Error(), 0)
	case codeOf(err) == codes.FailedPrecondition && !errors.As(err, &e): // not an error of etcd's
		return &apierrors.StatusError{ErrStatus: metav1.Status{
			Status: metav1.StatusFailure, Code: http.StatusConflict, Reason: ReasonFenced, Message: err.Error(),
		}}
	}
	return noRoom(err)
}

func refusedRead(err error) error {
	if err != nil && codeOf(err) == codes.Unavailable {
		return unavailable(err)
	}
	return err
}

func unavailable(err error) error {
	s := apierrors.NewServiceUnavailable(err.Error())
	s.ErrStatus.Details = &metav1.StatusDetails{RetryAfterSeconds: retryAfter}
	return s
}
