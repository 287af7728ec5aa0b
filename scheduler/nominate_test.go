package scheduler

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	v1 "k8s.io/api/core/v1"
	resourceapi "k8s.io/api/resource/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/fake"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	clienttesting "k8s.io/client-go/testing"
	volumehelpers "k8s.io/component-helpers/storage/volume"

	"skein.io/skein/scheduler/controller/controllertest"
)

func important(priority int32) func(*v1.Pod) { return func(p *v1.Pod) { p.Spec.Priority = &priority } }

func nominated(t *testing.T, client *fake.Clientset, name, want string) {
	t.Helper()
	if n := get(t, client, name).Status.NominatedNodeName; n != want {
		t.Errorf("%s is nominated to %q, want %q", name, n, want)
	}
}

// endSlowly makes pods that are deleted stay, as they do until their node's agent has ended them.
func endSlowly(client *fake.Clientset) {
	client.PrependReactor("delete", "pods", func(a clienttesting.Action) (bool, runtime.Object, error) {
		obj, err := client.Tracker().Get(a.GetResource(), a.GetNamespace(), a.(clienttesting.DeleteAction).GetName())
		if err != nil {
			return true, nil, err
		}
		p, now := obj.(*v1.Pod).DeepCopy(), metav1.Now()
		p.DeletionTimestamp = &now
		return true, nil, client.Tracker().Update(a.GetResource(), p, p.Namespace)
	})
}

// While volumes are prepared the pod's status names its node, written once; it does not any more if they cannot be.
func TestStatusNamesTheNodeWhileVolumesArePrepared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := newClient(nil, testNode("a", "4"), testNode("b", "4"), testClass("dyn", "csi.example"), testClaim("d", "dyn"))
		api := volumesOf{t, client}
		placing(t, client, newHealth())
		settle(time.Second)
		client.ClearActions()
		create(t, client, testPod("p", "1", claiming("d"), func(p *v1.Pod) { p.Spec.NodeSelector = map[string]string{v1.LabelHostname: "b"} }), testPod("plain", "1"))
		settle(time.Minute)
		nominated(t, client, "p", "b")
		nominated(t, client, "plain", "")
		if n := controllertest.Writes(client, "patch", "pods/status"); n != 1 {
			t.Errorf("%d writes of status, want 1", n)
		}
		// The provisioner cannot, and the node takes nobody any more.
		n := testNode("b", "4")
		n.Spec.Unschedulable = true
		if _, err := client.CoreV1().Nodes().Update(t.Context(), n, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		c := api.claim("d")
		delete(c.Annotations, volumehelpers.AnnSelectedNode)
		api.write(c)
		settle(500 * time.Millisecond)
		nominated(t, client, "p", "")
		settle(time.Minute)
		nominated(t, client, "p", "")
		client.ClearActions()
		settle(time.Hour)
		if a := client.Actions(); len(a) != 0 {
			t.Errorf("requests while nothing changes: %v", a)
		}
	})
}

// The same for devices, however often the binding rests; and a status that cannot be written is no obstacle.
func TestStatusNamesTheNodeWhileDevicesArePrepared(t *testing.T) {
	for _, refused := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			client := newClient(nil, testNode("a", "4"), gpuClass(), gpuSlice("a", 1, func(d *resourceapi.Device) { d.BindingConditions = []string{"ready"} }), gpuClaim("c"))
			client.PrependReactor("patch", "pods", func(clienttesting.Action) (bool, runtime.Object, error) {
				return refused, nil, errors.New("no")
			})
			placing(t, client, newHealth())
			create(t, client, testPod("p", "4", using("c")))
			settle(10 * time.Second)
			if !refused {
				nominated(t, client, "p", "a")
			}
			c := getClaim(t, client, "c")
			r := c.Status.Allocation.Devices.Results[0]
			for _, what := range []string{"warm", "ready"} {
				c.Status.Devices = []resourceapi.AllocatedDeviceStatus{{Driver: r.Driver, Pool: r.Pool, Device: r.Device,
					Conditions: []metav1.Condition{{Type: what, Status: metav1.ConditionTrue, Reason: "Why"}}}}
				var err error
				if c, err = client.ResourceV1().ResourceClaims("default").UpdateStatus(t.Context(), c, metav1.UpdateOptions{}); err != nil {
					t.Fatal(err)
				}
				settle(time.Second)
			}
			if n := get(t, client, "p").Spec.NodeName; n != "a" {
				t.Errorf("on %q", n)
			}
			if n := controllertest.Writes(client, "patch", "pods/status"); n != 1 {
				t.Errorf("%d writes of status, want 1", n)
			}
		})
	}
}

// Who gets a node by evictions takes it from less important pods that it was kept for: they look elsewhere at once.
func TestPreemptionDisplacesNominations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		on := func(node string) func(*v1.Pod) { return func(p *v1.Pod) { p.Spec.NodeName = node } }
		client := newClient(nil, testNode("a", "4"), testNode("b", "4"), testPod("old1", "3", on("a")), testPod("busy", "4", on("b"), important(5)), testPod("old2", "1", on("a"), important(2)))
		endSlowly(client)
		placing(t, client, newHealth())
		settle(time.Second)
		create(t, client, testPod("low", "3", important(10)))
		settle(time.Second)
		nominated(t, client, "low", "a") // its victim, old1, is less important than the one on b
		create(t, client, testPod("high", "4", important(100), func(p *v1.Pod) { p.Spec.NodeSelector = map[string]string{v1.LabelHostname: "a"} }))
		settle(20 * time.Second)
		nominated(t, client, "high", "a")
		nominated(t, client, "low", "b")
		if get(t, client, "busy").DeletionTimestamp == nil {
			t.Error("the displaced pod made no room elsewhere")
		}
	})
}

// lateClient takes its time to write pods, for each a different one.
type lateClient struct {
	kubernetes.Interface
	deletes atomic.Int64
}

type lateCore struct {
	typedcorev1.CoreV1Interface
	c *lateClient
}

type latePods struct {
	typedcorev1.PodInterface
	c *lateClient
}

func (c *lateClient) CoreV1() typedcorev1.CoreV1Interface { return lateCore{c.Interface.CoreV1(), c} }

func (c lateCore) Pods(namespace string) typedcorev1.PodInterface {
	return latePods{c.CoreV1Interface.Pods(namespace), c.c}
}

func late() { time.Sleep(time.Second + rand.N(400*time.Millisecond)) }

func (p latePods) Patch(ctx context.Context, name string, pt types.PatchType, data []byte, o metav1.PatchOptions, sub ...string) (*v1.Pod, error) {
	late()
	return p.PodInterface.Patch(ctx, name, pt, data, o, sub...)
}

func (p latePods) Delete(ctx context.Context, name string, o metav1.DeleteOptions) error {
	late()
	p.c.deletes.Add(1)
	return p.PodInterface.Delete(ctx, name, o)
}

// Pods that wait for their victims to end evict nobody else, however slowly the API writes and whatever ends elsewhere meanwhile.
func TestEachEvictsOnlyItsOwn(t *testing.T) {
	for _, slow := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			const pods, victims = 20, 3
			var objs []runtime.Object
			for i := range 2 * pods {
				objs = append(objs, testNode(fmt.Sprint("n", i), "4"))
				for k := range victims + 1 {
					objs = append(objs, testPod(fmt.Sprintf("low-%d-%d", i, k), "900m", func(p *v1.Pod) { p.Spec.NodeName = fmt.Sprint("n", i) }))
				}
			}
			client := newClient(nil, objs...)
			if slow {
				endSlowly(client)
			}
			api := &lateClient{Interface: client}
			placing(t, client, newHealth(), func(c *Config) { c.Client = api })
			settle(time.Second)
			for i := range pods {
				create(t, client, testPod(fmt.Sprint("high-", i), "3", important(10)))
			}
			settle(1100 * time.Millisecond) // a back-off; then all of them are tried again
			for i := range pods {
				p := get(t, client, fmt.Sprint("high-", i))
				p.Labels = map[string]string{"changed": "yes"}
				if _, err := client.CoreV1().Pods(p.Namespace).Update(t.Context(), p, metav1.UpdateOptions{}); err != nil {
					t.Fatal(err)
				}
			}
			settle(time.Minute)
			if slow { // their agents end them, one after the other
				for _, o := range objs {
					if p, ok := o.(*v1.Pod); ok && get(t, client, p.Name).DeletionTimestamp != nil {
						if err := client.Tracker().Delete(v1.SchemeGroupVersion.WithResource("pods"), "default", p.Name); err != nil {
							t.Fatal(err)
						}
						settle(100 * time.Millisecond)
					}
				}
				settle(time.Minute)
			}
			for i := range pods {
				if p := get(t, client, fmt.Sprint("high-", i)); p.Spec.NodeName == "" {
					t.Errorf("%s is not bound", p.Name)
				}
			}
			if n := api.deletes.Load(); n != pods*victims {
				t.Errorf("%d pods were evicted, want %d", n, pods*victims)
			}
		})
	}
}

// A pod learns that the node which is kept for it is gone, or takes nobody any more when its victims have ended.
func TestANominationThatCameToNothing(t *testing.T) {
	for _, gone := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			client := newClient(nil, testNode("a", "4"), testPod("old", "3", func(p *v1.Pod) { p.Spec.NodeName = "a" }))
			endSlowly(client)
			placing(t, client, newHealth())
			settle(time.Second)
			create(t, client, testPod("p", "3", important(10)))
			settle(time.Second)
			nominated(t, client, "p", "a")
			if gone {
				if err := client.CoreV1().Nodes().Delete(t.Context(), "a", metav1.DeleteOptions{}); err != nil {
					t.Fatal(err)
				}
			} else {
				n := testNode("a", "4")
				n.Spec.Unschedulable = true
				if _, err := client.CoreV1().Nodes().Update(t.Context(), n, metav1.UpdateOptions{}); err != nil {
					t.Fatal(err)
				}
				settle(time.Second)
				if err := client.Tracker().Delete(v1.SchemeGroupVersion.WithResource("pods"), "default", "old"); err != nil {
					t.Fatal(err)
				}
			}
			settle(11 * time.Second) // a back-off
			nominated(t, client, "p", "")
		})
	}
}

// A pod that waits for its volumes is not deleted for a more important one: it has not begun to run, and is planned again.
func TestAPodBeingPreparedGivesWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := newClient(nil, testNode("a", "4"), testClass("dyn", "csi.example"), testClaim("d", "dyn"))
		rec := placing(t, client, newHealth())
		settle(time.Second)
		create(t, client, testPod("low", "3", claiming("d")))
		settle(time.Second)
		nominated(t, client, "low", "a")
		create(t, client, testPod("high", "4", important(100)))
		settle(20 * time.Second)
		if n := get(t, client, "high").Spec.NodeName; n != "a" {
			t.Errorf("high is on %q", n)
		}
		if p := get(t, client, "low"); p.DeletionTimestamp != nil || p.Spec.NodeName != "" {
			t.Errorf("low is on %q, deleted at %v", p.Spec.NodeName, p.DeletionTimestamp)
		}
		nominated(t, client, "low", "")
		if events := strings.Join(controllertest.Events(rec), "\n"); !strings.Contains(events, "Preempted by pod pod-high on node a (in kube-scheduler memory).") {
			t.Errorf("events: %s", events)
		}
	})
}
