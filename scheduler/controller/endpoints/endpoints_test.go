package endpoints

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	clienttesting "k8s.io/client-go/testing"

	"skein.io/skein/scheduler/controller/controllertest"
)

func service(edit func(*corev1.Service)) *corev1.Service {
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "web", ResourceVersion: "1", Labels: map[string]string{"l": "x"}},
		Spec: corev1.ServiceSpec{ClusterIP: "10.96.0.7", Selector: map[string]string{"app": "web"}, Ports: []corev1.ServicePort{
			{Name: "http", Protocol: corev1.ProtocolTCP, TargetPort: intstr.FromString("web")},
			{Name: "admin", Protocol: corev1.ProtocolTCP, TargetPort: intstr.FromInt32(9)},
		}},
	}
	if edit != nil {
		edit(s)
	}
	return s
}

func pod(name, ip string, port int32, ready bool) *corev1.Pod {
	st := corev1.ConditionFalse
	if ready {
		st = corev1.ConditionTrue
	}
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID(name), ResourceVersion: "1", Labels: map[string]string{"app": "web"}},
		Spec:       corev1.PodSpec{NodeName: "n", Containers: []corev1.Container{{Name: "c", Ports: []corev1.ContainerPort{{Name: "web", ContainerPort: port, Protocol: corev1.ProtocolTCP}}}}},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip, PodIPs: []corev1.PodIP{{IP: ip}, {IP: "fd00::" + ip[len(ip)-1:]}},
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: st}}},
	}
}

func text(subsets []corev1.EndpointSubset) string {
	var out []string
	for _, s := range subsets {
		var ports, ips []string
		for _, p := range s.Ports {
			ports = append(ports, fmt.Sprintf("%s:%d", p.Name, p.Port))
		}
		for _, a := range s.Addresses {
			ips = append(ips, a.IP)
		}
		for _, a := range s.NotReadyAddresses {
			ips = append(ips, "!"+a.IP)
		}
		out = append(out, strings.Join(ports, ",")+"="+strings.Join(ips, ","))
	}
	return strings.Join(out, " ")
}

func TestWhatAServiceReaches(t *testing.T) {
	ends := pod("e", "10.0.0.5", 80, true)
	ends.DeletionTimestamp = &metav1.Time{Time: time.Unix(1, 0)}
	done := pod("d", "10.0.0.6", 80, false)
	done.Status.Phase = corev1.PodSucceeded
	pods := []*corev1.Pod{pod("b", "10.0.0.2", 80, false), pod("a", "10.0.0.1", 80, true), pod("c", "10.0.0.3", 8080, true), ends, done}
	for _, tc := range []struct {
		what string
		edit func(*corev1.Service)
		want string
	}{
		{"ports with other addresses apart", nil, "admin:9=10.0.0.1,10.0.0.3,!10.0.0.2 http:80=10.0.0.1,!10.0.0.2 http:8080=10.0.0.3"},
		{"ports with the same addresses together", func(s *corev1.Service) {
			s.Spec.Ports[0].TargetPort = intstr.FromInt32(1)
		}, "admin:9,http:1=10.0.0.1,10.0.0.3,!10.0.0.2"},
		{"not ready ones published, and those that end", func(s *corev1.Service) {
			s.Spec.PublishNotReadyAddresses, s.Spec.Ports = true, s.Spec.Ports[1:]
		}, "admin:9=10.0.0.1,10.0.0.2,10.0.0.3,10.0.0.5"},
		{"headless without ports", func(s *corev1.Service) {
			s.Spec.ClusterIP, s.Spec.Ports = corev1.ClusterIPNone, nil
		}, "=10.0.0.1,10.0.0.3,!10.0.0.2"},
		{"IPv6", func(s *corev1.Service) {
			s.Spec.IPFamilies, s.Spec.Ports = []corev1.IPFamily{corev1.IPv6Protocol}, s.Spec.Ports[1:]
		}, "admin:9=fd00::1,fd00::3,!fd00::2"},
	} {
		if got := text(pack(reach(service(tc.edit), pods))); got != tc.want {
			t.Errorf("%s: %s, want %s", tc.what, got, tc.want)
		}
	}
}

func TestTruncateKeepsReadyOnes(t *testing.T) {
	s := corev1.EndpointSubset{}
	for i := range 900 {
		s.Addresses = append(s.Addresses, corev1.EndpointAddress{IP: fmt.Sprint(i)})
		s.NotReadyAddresses = append(s.NotReadyAddresses, corev1.EndpointAddress{IP: fmt.Sprint("n", i)})
	}
	got, cut := truncate([]corev1.EndpointSubset{s})
	if !cut || len(got[0].Addresses) != 900 || len(got[0].NotReadyAddresses) != 100 {
		t.Errorf("%d ready and %d not, cut %t", len(got[0].Addresses), len(got[0].NotReadyAddresses), cut)
	}
	if _, cut := truncate([]corev1.EndpointSubset{{Addresses: s.Addresses[:3]}}); cut {
		t.Error("cut though it fits")
	}
}

func TestEndpointsFollowServicesAndPods(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mine := &corev1.Endpoints{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "left-over", ResourceVersion: "1", Labels: map[string]string{managedBy: manager}}}
		other := &corev1.Endpoints{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "by-hand", ResourceVersion: "1"}}
		client := controllertest.NewClient(service(nil), pod("a", "10.0.0.1", 80, true), mine, other)
		controllertest.Start(t, client, nil, New)
		state := func() map[string]string {
			time.Sleep(5 * time.Second)
			synctest.Wait()
			l, err := client.CoreV1().Endpoints("ns").List(t.Context(), metav1.ListOptions{})
			if err != nil {
				t.Fatal(err)
			}
			out := map[string]string{}
			for _, e := range l.Items {
				out[e.Name] = text(e.Subsets) + " " + e.Labels["l"]
			}
			return out
		}
		if got, want := fmt.Sprint(state()), "map[by-hand:  web:admin:9,http:80=10.0.0.1 x]"; got != want {
			t.Errorf("at first %s, want %s", got, want)
		}
		if _, err := client.CoreV1().Pods("ns").Create(t.Context(), pod("b", "10.0.0.2", 80, false), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		if got, want := state()["web"], "admin:9,http:80=10.0.0.1,!10.0.0.2 x"; got != want {
			t.Errorf("with a second pod %s, want %s", got, want)
		}
		client.ClearActions()
		time.Sleep(time.Hour)
		synctest.Wait()
		if a := client.Actions(); len(a) != 0 {
			t.Errorf("requests while nothing changes: %v", a)
		}
		if err := client.CoreV1().Services("ns").Delete(t.Context(), "web", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		if got, want := fmt.Sprint(state()), "map[by-hand: ]"; got != want {
			t.Errorf("after the Service went %s, want %s", got, want)
		}
	})
}

// Endpoints that the API refuses are told of, and tried ever less often.
func TestRefusedEndpoints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := controllertest.NewClient(service(nil), pod("a", "10.0.0.1", 80, true))
		client.PrependReactor("create", "endpoints", func(clienttesting.Action) (bool, runtime.Object, error) {
			return true, nil, apierrors.NewForbidden(corev1.Resource("endpoints"), "web", errors.New("quota"))
		})
		rec := controllertest.Start(t, client, nil, New)
		time.Sleep(20 * time.Minute)
		synctest.Wait()
		if e := controllertest.Events(rec); len(e) == 0 || !strings.Contains(e[0], "FailedToCreateEndpoint Failed to create endpoint for service ns/web: ") {
			t.Errorf("events %q", e)
		}
		client.ClearActions()
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := controllertest.Writes(client, "create", "endpoints") + len(controllertest.Events(rec)); n > 60 {
			t.Errorf("%d writes and events in an hour", n)
		}
	})
}
