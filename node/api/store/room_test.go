package store

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/storage"

	"skein.io/skein/consensus/host"
)

type failing struct {
	storage.Interface
	err error
}

func (f failing) Create(context.Context, string, runtime.Object, runtime.Object, uint64) error {
	return f.err
}

func (f failing) GuaranteedUpdate(context.Context, string, runtime.Object, bool, *storage.Preconditions, storage.UpdateFunc, runtime.Object) error {
	return f.err
}

func TestNoRoom(t *testing.T) {
	full := &host.SpaceError{Shard: "pods", InUse: 2 << 30, Quota: 2 << 30}
	for name, c := range map[string]struct {
		err  error
		code int32 // 0: as it is
	}{
		"nothing":    {nil, 0},
		"full":       {full, 507},
		"wrapped":    {fmt.Errorf("x: %w", full), 507},
		"full disk":  {&host.SpaceError{Shard: "pods", Cause: errors.New("the disk is full")}, 507},
		"from afar":  {rpctypes.Error(rpctypes.ErrGRPCNoSpace), 507},
		"busy":       {rpctypes.Error(rpctypes.ErrGRPCRequestTooManyRequests), 0},
		"another":    {errors.New("x"), 0},
		"a conflict": {storage.NewKeyExistsError("k", 1), 0},
	} {
		s := refusing{Interface: failing{err: c.err}}
		for _, err := range []error{s.Create(t.Context(), "k", nil, nil, 0), s.GuaranteedUpdate(t.Context(), "k", nil, false, nil, nil, nil)} {
			if c.code == 0 {
				if err != c.err {
					t.Errorf("%s: %v became %v", name, c.err, err)
				}
				continue
			}
			var st apierrors.APIStatus
			if !errors.As(err, &st) || st.Status().Code != c.code || st.Status().Reason != ReasonNoRoom || st.Status().Message != c.err.Error() {
				t.Errorf("%s: %#v", name, err)
			}
		}
	}
}
