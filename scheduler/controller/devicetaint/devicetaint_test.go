package devicetaint

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	resourceapi "k8s.io/api/resource/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"skein.io/skein/scheduler/controller/controllertest"
)

func mkPod(name string) *corev1.Pod {
	claim := "c"
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID(name), ResourceVersion: "1"},
		Spec: corev1.PodSpec{NodeName: "n", ResourceClaims: []corev1.PodResourceClaim{{Name: "x", ResourceClaimName: &claim}}}}
}

func mkClaim(tolerations []resourceapi.DeviceToleration, users ...string) *resourceapi.ResourceClaim {
	c := &resourceapi.ResourceClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "c", UID: "c", ResourceVersion: "1"}}
	c.Status.Allocation = &resourceapi.AllocationResult{Devices: resourceapi.DeviceAllocationResult{Results: []resourceapi.DeviceRequestAllocationResult{
		{Request: "r", Driver: "d", Pool: "p", Device: "dev", Tolerations: tolerations}}}}
	for _, u := range users {
		c.Status.ReservedFor = append(c.Status.ReservedFor, resourceapi.ResourceClaimConsumerReference{Resource: "pods", Name: u, UID: types.UID(u)})
	}
	return c
}

func taint(effect resourceapi.DeviceTaintEffect, at int64) resourceapi.DeviceTaint {
	return resourceapi.DeviceTaint{Key: "sick", Value: "very", Effect: effect, TimeAdded: &metav1.Time{Time: time.Unix(at, 0)}}
}

func mkSlice(name string, generation int64, taints ...resourceapi.DeviceTaint) *resourceapi.ResourceSlice {
	node := "n"
	return &resourceapi.ResourceSlice{ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID(name), ResourceVersion: "1"}, Spec: resourceapi.ResourceSliceSpec{
		Driver: "d", NodeName: &node, Pool: resourceapi.ResourcePool{Name: "p", Generation: generation, ResourceSliceCount: 1},
		Devices: []resourceapi.Device{{Name: "other"}, {Name: "dev", Taints: taints}}}}
}

func tolerate(seconds ...int64) []resourceapi.DeviceToleration {
	t := resourceapi.DeviceToleration{Key: "sick", Operator: resourceapi.DeviceTolerationOpExists, Effect: resourceapi.DeviceTaintEffectNoExecute}
	if len(seconds) > 0 {
		t.TolerationSeconds = &seconds[0]
	}
	return []resourceapi.DeviceToleration{t}
}

func TestEvictAt(t *testing.T) {
	const no, soon = resourceapi.DeviceTaintEffectNoSchedule, resourceapi.DeviceTaintEffectNoExecute
	for _, tc := range []struct {
		what   string
		pod    func(*corev1.Pod)
		claim  *resourceapi.ResourceClaim
		slices []*resourceapi.ResourceSlice
		want   string // seconds, or "never"
	}{
		{"healthy", nil, mkClaim(nil, "a"), []*resourceapi.ResourceSlice{mkSlice("s", 1)}, "never"},
		{"another effect", nil, mkClaim(nil, "a"), []*resourceapi.ResourceSlice{mkSlice("s", 1, taint(no, 5))}, "never"},
		{"tainted", nil, mkClaim(nil, "a"), []*resourceapi.ResourceSlice{mkSlice("s", 1, taint(soon, 5))}, "5"},
		{"the earliest counts", nil, mkClaim(nil, "a"), []*resourceapi.ResourceSlice{mkSlice("s", 1, taint(soon, 7), taint(soon, 5))}, "5"},
		{"tolerated for ever", nil, mkClaim(tolerate(), "a"), []*resourceapi.ResourceSlice{mkSlice("s", 1, taint(soon, 5))}, "never"},
		{"tolerated for a while", nil, mkClaim(tolerate(30), "a"), []*resourceapi.ResourceSlice{mkSlice("s", 1, taint(soon, 5))}, "35"},
		{"the shortest toleration counts", nil, mkClaim(append(tolerate(30), tolerate(10)...), "a"), []*resourceapi.ResourceSlice{mkSlice("s", 1, taint(soon, 5))}, "15"},
		{"a negative toleration", nil, mkClaim(tolerate(-3), "a"), []*resourceapi.ResourceSlice{mkSlice("s", 1, taint(soon, 5))}, "5"},
		{"an old list of the driver", nil, mkClaim(nil, "a"), []*resourceapi.ResourceSlice{mkSlice("s", 1, taint(soon, 5)), mkSlice("t", 2)}, "never"},
		{"the device is gone", nil, mkClaim(nil, "a"), nil, "never"},
		{"not the user", nil, mkClaim(nil, "b"), []*resourceapi.ResourceSlice{mkSlice("s", 1, taint(soon, 5))}, "never"},
		{"not placed", func(p *corev1.Pod) { p.Spec.NodeName = "" }, mkClaim(nil, "a"), []*resourceapi.ResourceSlice{mkSlice("s", 1, taint(soon, 5))}, "never"},
		{"no claim", nil, nil, []*resourceapi.ResourceSlice{mkSlice("s", 1, taint(soon, 5))}, "never"},
	} {
		pod := mkPod("a")
		if tc.pod != nil {
			tc.pod(pod)
		}
		at, evict := evictAt(pod, func(string) *resourceapi.ResourceClaim { return tc.claim },
			func(r *resourceapi.DeviceRequestAllocationResult) *resourceapi.Device {
				return find(tc.slices, r.Device)
			})
		got := "never"
		if evict {
			got = fmt.Sprint(at.Unix())
		}
		if got != tc.want {
			t.Errorf("%s: %s, want %s", tc.what, got, tc.want)
		}
	}
}

func TestPodsLeaveTaintedDevices(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := controllertest.NewClient(mkPod("a"), mkPod("unused"), mkClaim(tolerate(60), "a"), mkSlice("s", 1))
		rec := controllertest.Start(t, client, nil, New)
		there := func(name string) bool {
			t.Helper()
			synctest.Wait()
			_, err := client.CoreV1().Pods("ns").Get(t.Context(), name, metav1.GetOptions{})
			if err != nil && !apierrors.IsNotFound(err) {
				t.Fatal(err)
			}
			return err == nil
		}
		write := func(taints ...resourceapi.DeviceTaint) {
			t.Helper()
			s, err := client.ResourceV1().ResourceSlices().Get(t.Context(), "s", metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			s.Spec.Devices[1].Taints = taints
			if _, err := client.ResourceV1().ResourceSlices().Update(t.Context(), s, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			synctest.Wait()
		}
		time.Sleep(time.Second)
		write(taint(resourceapi.DeviceTaintEffectNoExecute, time.Now().Unix()))
		time.Sleep(30 * time.Second)
		if !there("a") {
			t.Fatal("evicted while it tolerates the taint")
		}
		write() // and gone again
		time.Sleep(time.Hour)
		if e := strings.Join(controllertest.Events(rec), ";"); !there("a") || e != "Normal DeviceTaintManagerEviction Cancelling deletion" {
			t.Fatalf("after the taint went: %s", e)
		}
		write(taint(resourceapi.DeviceTaintEffectNoExecute, time.Now().Unix()))
		time.Sleep(58 * time.Second)
		if !there("a") {
			t.Fatal("evicted too early")
		}
		time.Sleep(2 * time.Second)
		if e := strings.Join(controllertest.Events(rec), ";"); there("a") || !there("unused") || e != "Normal DeviceTaintManagerEviction Marking for deletion" {
			t.Errorf("after the time: %s", e)
		}
		if n := controllertest.Writes(client, "patch", "pods/status"); n != 1 {
			t.Errorf("%d conditions written", n)
		}
		client.ClearActions()
		time.Sleep(time.Hour)
		synctest.Wait()
		if a := client.Actions(); len(a) != 0 {
			t.Errorf("requests while nothing changes: %v", a)
		}
	})
}
