package store

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/apiserver/pkg/storage"

	"skein.io/skein/node/api/lastknown"
)

// ReasonFenced is the reason of the Status that answers a write that acts for a leader of the cluster
// that has been replaced. Its code is 409: what the writer knew is out of date.
const ReasonFenced metav1.StatusReason = "Fenced"

// retryAfter is when a client that found no leader should come again, in seconds: an election takes
// about one.
const retryAfter = 1

// LastKnown tells how long this node has heard no leader of the store of the keys with a prefix, if that is so long that the store
// refuses requests, and gives a context under which it answers reads from the local copy.
type LastKnown func(ctx context.Context, prefix string) (local context.Context, age time.Duration, lost bool)

// refusing makes a Status of the store's refusals; without it the API would answer with an internal
// error, which says nothing to clients, nor to people. Reads that accept it are answered from the local copy instead.
type refusing struct {
	storage.Interface
	prefix    string    // of the keys
	kind      string    // what they are, for people
	lastKnown LastKnown // nil: never
}

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
	return s.read(ctx, func(ctx context.Context) error { return s.Interface.Get(ctx, key, o, out) })
}

func (s refusing) GetList(ctx context.Context, key string, o storage.ListOptions, list runtime.Object) error {
	again := false
	return s.read(ctx, func(ctx context.Context) error {
		if again && meta.LenList(list) > 0 { // the first attempt may have come some pages far
			if err := meta.SetList(list, nil); err != nil {
				return err
			}
		}
		again = true
		return s.Interface.GetList(ctx, key, o, list)
	})
}

// refuse says why there can be no watch now: there is no truth to follow.
func (s refusing) refuse(ctx context.Context) error {
	if why, _, _, lost := s.lost(ctx); lost {
		return unavailable(errors.New(why))
	}
	return nil
}

func (s refusing) Watch(ctx context.Context, key string, o storage.ListOptions) (watch.Interface, error) {
	// Upstream would begin a watch and put the error into it.
	if err := s.refuse(ctx); err != nil {
		return nil, err
	}
	w, err := s.Interface.Watch(ctx, key, o)
	return w, refusedRead(err)
}

// lost tells why the local copy is all that there is to be read.
func (s refusing) lost(ctx context.Context) (why string, local context.Context, age time.Duration, lost bool) {
	if s.lastKnown == nil {
		return "", nil, 0, false
	}
	if local, age, lost = s.lastKnown(ctx, s.prefix); !lost {
		return "", nil, 0, false
	}
	return fmt.Sprintf("this node has heard no leader of the store of %s for %s: a majority of its voters cannot be reached from here",
		s.kind, age.Round(100*time.Millisecond)), local, age, true
}

// read reads the truth, or what was the truth last.
func (s refusing) read(ctx context.Context, read func(context.Context) error) error {
	err := read(ctx)
	if err == nil || codeOf(err) != codes.Unavailable {
		return err
	}
	why, local, age, lost := s.lost(ctx)
	if !lost {
		return refusedRead(err)
	}
	ok, no := lastknown.Use(ctx, age, why)
	switch {
	case no != nil:
		return no
	case !ok:
		return refusedRead(err)
	}
	return refusedRead(read(local))
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
