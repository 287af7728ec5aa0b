package store

import (
	"context"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/authentication/user"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/storage"

	"skein.io/skein/node/api/lastknown"
	"skein.io/skein/node/client"
)

type localKey struct{}

// leaderless has lost its leader after the first page of a list; under a local context it answers.
type leaderless struct{ failing }

func (leaderless) Get(ctx context.Context, _ string, _ storage.GetOptions, out runtime.Object) error {
	if ctx.Value(localKey{}) == nil {
		return rpctypes.ErrNoLeader
	}
	out.(*corev1.Pod).Name = "old"
	return nil
}

func (leaderless) GetList(ctx context.Context, _ string, _ storage.ListOptions, list runtime.Object) error {
	l := list.(*corev1.PodList)
	l.Items = append(l.Items, corev1.Pod{})
	if ctx.Value(localKey{}) == nil {
		return rpctypes.ErrNoLeader
	}
	return nil
}

// Reads without a leader come from the local copy, where they may; nothing else does.
func TestReadsLocalCopy(t *testing.T) {
	lost := true
	s := refusing{leaderless{failing{err: rpctypes.ErrNoLeader}}, "/registry/pods/", "pods", func(ctx context.Context, prefix string) (context.Context, time.Duration, bool) {
		if prefix != "/registry/pods/" {
			t.Errorf("asked for %s", prefix)
		}
		return context.WithValue(ctx, localKey{}, true), 4 * time.Second, lost
	}}
	ask := func(max string) (get, list, watch, write error, n int, age string) {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		if max != "" {
			r.Header.Set(client.MaxAgeHeader, max)
		}
		w := httptest.NewRecorder()
		lastknown.Filter(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			ctx := apirequest.WithRequestInfo(apirequest.WithUser(r.Context(), &user.DefaultInfo{Name: "x"}), &apirequest.RequestInfo{IsResourceRequest: true, Verb: "get"})
			pod, pods := &corev1.Pod{}, &corev1.PodList{}
			get, list = s.Get(ctx, "k", storage.GetOptions{}, pod), s.GetList(ctx, "k", storage.ListOptions{}, pods)
			_, watch = s.Watch(ctx, "k", storage.ListOptions{})
			write = s.Create(ctx, "k", pod, pod, 0)
			n = len(pods.Items)
			w.WriteHeader(http.StatusOK)
		})).ServeHTTP(w, r)
		return get, list, watch, write, n, w.Header().Get(client.AgeHeader)
	}
	get, list, watch, write, n, age := ask("")
	if get != nil || list != nil || n != 1 || age != "4" {
		t.Errorf("get %v, list %v of %d, age %q", get, list, n, age)
	}
	for what, err := range map[string]error{"watch": watch, "write": write} {
		if !apierrors.IsServiceUnavailable(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for _, max := range []string{"0", "3"} {
		if get, list, _, _, _, age = ask(max); !apierrors.IsServiceUnavailable(get) || !apierrors.IsServiceUnavailable(list) || age != "" {
			t.Errorf("at most %s s old: get %v, list %v, age %q", max, get, list, age)
		}
	}
	lost = false // the leader has changed, that is all
	if get, list, _, _, _, age = ask(""); !apierrors.IsServiceUnavailable(get) || !apierrors.IsServiceUnavailable(list) || age != "" {
		t.Errorf("while a leader may be found: get %v, list %v, age %q", get, list, age)
	}
}
