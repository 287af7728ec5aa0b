package store

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/apiserver/pkg/storage"

	"skein.io/skein/consensus/etcdapi"
	"skein.io/skein/consensus/host"
)

func (f failing) Delete(context.Context, string, runtime.Object, *storage.Preconditions, storage.ValidateObjectFunc, runtime.Object, storage.DeleteOptions) error {
	return f.err
}
func (f failing) Get(context.Context, string, storage.GetOptions, runtime.Object) error { return f.err }
func (f failing) GetList(context.Context, string, storage.ListOptions, runtime.Object) error {
	return f.err
}
func (f failing) Watch(context.Context, string, storage.ListOptions) (watch.Interface, error) {
	return nil, f.err
}

func TestRefusals(t *testing.T) {
	fenced := etcdapi.Error(fmt.Errorf("%w: term 3, the shard has seen 5", host.ErrFenced))
	for name, c := range map[string]struct {
		err           error
		write, read   int32 // codes; 0: as it is
		reason        metav1.StatusReason
		retry, retryR int32
	}{
		"fenced":           {err: fenced, write: 409, reason: ReasonFenced},
		"fenced, wrapped":  {err: fmt.Errorf("x: %w", fenced), write: 409, reason: ReasonFenced},
		"no leader":        {err: rpctypes.ErrNoLeader, write: 503, read: 503, reason: metav1.StatusReasonServiceUnavailable, retry: 1, retryR: 1},
		"timed out":        {err: rpctypes.ErrTimeout, write: 504, read: 503, reason: metav1.StatusReasonTimeout, retryR: 1},
		"the node stops":   {err: rpctypes.ErrStopped, write: 504, read: 503, reason: metav1.StatusReasonTimeout, retryR: 1},
		"a lease is there": {err: rpctypes.ErrLeaseExist},
		"a conflict":       {err: storage.NewKeyExistsError("k", 1)},
		"not found":        {err: storage.NewKeyNotFoundError("k", 1)},
		"compacted":        {err: rpctypes.ErrCompacted},
		"the caller left":  {err: context.Canceled},
		"another":          {err: errors.New("x")},
		"nothing":          {},
	} {
		s := refusing{Interface: failing{err: c.err}}
		_, watched := s.Watch(t.Context(), "k", storage.ListOptions{})
		for verb, r := range map[string]struct {
			err  error
			code int32
			wait int32
		}{
			"create": {s.Create(t.Context(), "k", nil, nil, 0), c.write, c.retry},
			"update": {s.GuaranteedUpdate(t.Context(), "k", nil, false, nil, nil, nil), c.write, c.retry},
			"delete": {s.Delete(t.Context(), "k", nil, nil, nil, nil, storage.DeleteOptions{}), c.write, c.retry},
			"get":    {s.Get(t.Context(), "k", storage.GetOptions{}, nil), c.read, c.retryR},
			"list":   {s.GetList(t.Context(), "k", storage.ListOptions{}, nil), c.read, c.retryR},
			"watch":  {watched, c.read, c.retryR},
		} {
			if r.code == 0 {
				if r.err != c.err {
					t.Errorf("%s, %s: %v became %v", name, verb, c.err, r.err)
				}
				continue
			}
			var st apierrors.APIStatus
			if !errors.As(r.err, &st) || st.Status().Code != r.code {
				t.Errorf("%s, %s: %#v, want code %d", name, verb, r.err, r.code)
				continue
			}
			wait, _ := apierrors.SuggestsClientDelay(r.err)
			if int32(wait) != r.wait {
				t.Errorf("%s, %s: retry after %d s, want %d", name, verb, wait, r.wait)
			}
			if verb == "create" && st.Status().Reason != c.reason {
				t.Errorf("%s: reason %q", name, st.Status().Reason)
			}
		}
	}
}
