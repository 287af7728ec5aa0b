// Package controllertest is the fake cluster that the controllers' tests run
// against: client-go's fake clientset, made to behave more like the API in what
// controllers depend on (uids, generated names, resource versions, conflicts,
// generations, the status subresource). Tests only.
package controllertest

import (
	"fmt"
	"reflect"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/record"
	"k8s.io/utils/clock"

	"skein.io/skein/scheduler/controller"
)

// NewClient returns a fake API that holds objs.
func NewClient(objs ...runtime.Object) *fake.Clientset {
	client := fake.NewClientset(objs...)
	var n atomic.Int64
	n.Store(1000)
	client.PrependReactor("create", "*", func(a clienttesting.Action) (bool, runtime.Object, error) {
		if a.GetSubresource() != "" {
			return false, nil, nil
		}
		acc, err := meta.Accessor(a.(clienttesting.CreateAction).GetObject())
		if err != nil {
			return true, nil, err
		}
		id := n.Add(1)
		if acc.GetName() == "" {
			acc.SetName(fmt.Sprintf("%s%05d", acc.GetGenerateName(), id))
		}
		if acc.GetNamespace() == "" {
			acc.SetNamespace(a.GetNamespace())
		}
		acc.SetUID(types.UID(fmt.Sprintf("uid-%05d", id)))
		acc.SetResourceVersion(strconv.FormatInt(id, 10))
		acc.SetGeneration(1)
		acc.SetCreationTimestamp(metav1.NewTime(time.Now().Truncate(time.Second)))
		return false, nil, nil
	})
	client.PrependReactor("update", "*", func(a clienttesting.Action) (bool, runtime.Object, error) {
		obj := a.(clienttesting.UpdateAction).GetObject()
		acc, err := meta.Accessor(obj)
		if err != nil {
			return true, nil, err
		}
		heldObj, err := client.Tracker().Get(a.GetResource(), acc.GetNamespace(), acc.GetName())
		if err != nil {
			return true, nil, err
		}
		held, err := meta.Accessor(heldObj)
		if err != nil {
			return true, nil, err
		}
		if rv := acc.GetResourceVersion(); rv != "" && rv != held.GetResourceVersion() {
			return true, nil, apierrors.NewConflict(a.GetResource().GroupResource(), acc.GetName(), fmt.Errorf("have %s, got %s", held.GetResourceVersion(), rv))
		}
		acc.SetResourceVersion(strconv.FormatInt(n.Add(1), 10))
		subresource(a.GetSubresource(), heldObj, obj)
		return false, nil, nil
	})
	return client
}

// subresource keeps of upd what an update of that subresource may not change,
// and raises the generation where the spec changed.
func subresource(name string, held, upd runtime.Object) {
	h, u := reflect.ValueOf(held).Elem(), reflect.ValueOf(upd).Elem()
	spec, status := u.FieldByName("Spec"), u.FieldByName("Status")
	switch {
	case name == "status" && spec.IsValid():
		spec.Set(h.FieldByName("Spec"))
	case name == "" && status.IsValid():
		status.Set(h.FieldByName("Status"))
	}
	changed := !spec.IsValid() || !equality.Semantic.DeepEqual(spec.Interface(), h.FieldByName("Spec").Interface())
	if name == "" && changed {
		if acc, err := meta.Accessor(upd); err == nil {
			acc.SetGeneration(acc.GetGeneration() + 1)
		}
	}
}

// Start makes controllers with mk on a shared view of client and runs them
// until the test ends. Events go to the returned recorder. Inside a synctest
// bubble everything runs on its clock.
func Start(t *testing.T, client *fake.Clientset, edit func(*controller.Deps), mk ...func(controller.Deps) controller.Controller) *record.FakeRecorder {
	t.Helper()
	rec := record.NewFakeRecorder(10000)
	deps := controller.Deps{
		Client:   client,
		Factory:  controller.NewFactory(client),
		Recorder: func(string) record.EventRecorder { return rec },
		Clock:    clock.RealClock{},
	}
	if edit != nil {
		edit(&deps)
	}
	var cs []controller.Controller
	for _, m := range mk {
		cs = append(cs, m(deps))
	}
	ctx := t.Context()
	stopped := make(chan error, len(cs))
	deps.Factory.Start(ctx.Done())
	for _, c := range cs {
		go func() { stopped <- c.Run(ctx) }()
	}
	t.Cleanup(func() { // after ctx has ended
		for range cs {
			if err := <-stopped; err != nil {
				t.Errorf("a controller ended with %v", err)
			}
		}
		deps.Factory.Shutdown()
	})
	return rec
}

// Events returns the events recorded so far.
func Events(rec *record.FakeRecorder) []string {
	var out []string
	for {
		select {
		case e := <-rec.Events:
			out = append(out, e)
		default:
			return out
		}
	}
}

// Writes counts the writing requests of that verb and resource so far
// ("status" and other subresources as "resource/status").
func Writes(client *fake.Clientset, verb, resource string) int {
	n := 0
	for _, a := range client.Actions() {
		res := a.GetResource().Resource
		if a.GetSubresource() != "" {
			res += "/" + a.GetSubresource()
		}
		if a.GetVerb() == verb && res == resource {
			n++
		}
	}
	return n
}
