package scheduler

import (
	"fmt"
	"sync"
	"testing"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"skein.io/skein/scheduler/controller/controllertest"
)

// fakeHealth is a failure detector that says what it is told.
type fakeHealth struct {
	mu       sync.Mutex
	verdicts map[string]NodeHealth
	subs     map[chan struct{}]bool
}

func newHealth() *fakeHealth {
	return &fakeHealth{verdicts: map[string]NodeHealth{}, subs: map[chan struct{}]bool{}}
}

func (h *fakeHealth) set(name string, v NodeHealth) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.verdicts[name] = v
	for ch := range h.subs {
		select {
		case ch <- struct{}{}:
		default:
		}
	}
}

func (h *fakeHealth) Verdicts() map[string]NodeHealth {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := map[string]NodeHealth{}
	for name, v := range h.verdicts {
		out[name] = v
	}
	return out
}

func (h *fakeHealth) Subscribe() (<-chan struct{}, func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	ch := make(chan struct{}, 1)
	h.subs[ch] = true
	return ch, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.subs, ch)
	}
}

// newClient is the fake API with a binding subresource that works: it binds
// once, and refuses what refuse names.
func newClient(refuse func(pod, node string) error, objs ...runtime.Object) *fake.Clientset {
	client := controllertest.NewClient(objs...)
	pods := schema.GroupVersionResource{Version: "v1", Resource: "pods"}
	client.PrependReactor("create", "pods", func(a clienttesting.Action) (bool, runtime.Object, error) {
		if a.GetSubresource() != "binding" {
			return false, nil, nil
		}
		b := a.(clienttesting.CreateAction).GetObject().(*v1.Binding)
		if refuse != nil {
			if err := refuse(b.Name, b.Target.Name); err != nil {
				return true, nil, err
			}
		}
		obj, err := client.Tracker().Get(pods, a.GetNamespace(), b.Name)
		if err != nil {
			return true, nil, err
		}
		pod := obj.(*v1.Pod).DeepCopy()
		if pod.UID != b.UID || pod.Spec.NodeName != "" {
			return true, nil, apierrors.NewConflict(pods.GroupResource(), b.Name, fmt.Errorf("is already assigned to node %q", pod.Spec.NodeName))
		}
		pod.Spec.NodeName = b.Target.Name
		return true, b, client.Tracker().Update(pods, pod, pod.Namespace)
	})
	return client
}

func testNode(name string, cpu string, edit ...func(*v1.Node)) *v1.Node {
	n := &v1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("node-" + name), Labels: map[string]string{v1.LabelHostname: name}},
		Status: v1.NodeStatus{
			Allocatable: v1.ResourceList{
				v1.ResourceCPU: resource.MustParse(cpu), v1.ResourceMemory: resource.MustParse("16Gi"), v1.ResourcePods: resource.MustParse("110"),
			},
			Conditions: []v1.NodeCondition{{Type: v1.NodeReady, Status: v1.ConditionTrue}},
		},
	}
	for _, fn := range edit {
		fn(n)
	}
	return n
}

func testPod(name string, cpu string, edit ...func(*v1.Pod)) *v1.Pod {
	p := &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID("pod-" + name)},
		Spec: v1.PodSpec{
			SchedulerName: v1.DefaultSchedulerName,
			Containers: []v1.Container{{Name: "c", Image: "web", Resources: v1.ResourceRequirements{
				Requests: v1.ResourceList{v1.ResourceCPU: resource.MustParse(cpu), v1.ResourceMemory: resource.MustParse("64Mi")},
			}}},
		},
		Status: v1.PodStatus{Phase: v1.PodPending},
	}
	for _, fn := range edit {
		fn(p)
	}
	return p
}

func create(t *testing.T, client *fake.Clientset, pods ...*v1.Pod) {
	t.Helper()
	for _, p := range pods {
		if err := client.Tracker().Create(schema.GroupVersionResource{Version: "v1", Resource: "pods"}, p.DeepCopy(), p.Namespace); err != nil {
			t.Fatal(err)
		}
	}
}

func get(t *testing.T, client *fake.Clientset, name string) *v1.Pod {
	t.Helper()
	p, err := client.CoreV1().Pods("default").Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return p
}
