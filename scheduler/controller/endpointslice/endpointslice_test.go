package endpointslice

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes/fake"

	"skein.io/skein/scheduler/controller/controllertest"
)

func service(name string, edit func(*corev1.Service)) *corev1.Service {
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID(name), ResourceVersion: "1"},
		Spec: corev1.ServiceSpec{
			ClusterIP: "10.96.0.7", Selector: map[string]string{"app": "web"}, IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol},
			Ports: []corev1.ServicePort{{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80, TargetPort: intstr.FromString("web")}},
		},
	}
	if edit != nil {
		edit(s)
	}
	return s
}

func pod(name, node, ip string, port int32, ready bool) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID(name), ResourceVersion: "1", Labels: map[string]string{"app": "web"}},
		Spec: corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "c",
			Ports: []corev1.ContainerPort{{Name: "web", ContainerPort: port, Protocol: corev1.ProtocolTCP}}}}},
		Status: corev1.PodStatus{Phase: corev1.PodPending},
	}
	if ip != "" {
		p.Status = corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip, PodIPs: []corev1.PodIP{{IP: ip}}}
	}
	setReady(p, ready)
	return p
}

func setReady(p *corev1.Pod, ready bool) {
	st := corev1.ConditionFalse
	if ready {
		st = corev1.ConditionTrue
	}
	p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: st}}
}

func node(name string) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelTopologyZone: "z-" + name}}}
}

// endpoints writes down the slices of a Service: ip:port/conditions@node, sorted.
func endpoints(t *testing.T, client *fake.Clientset, service string) string {
	t.Helper()
	time.Sleep(10 * time.Second)
	synctest.Wait()
	l, err := client.DiscoveryV1().EndpointSlices("ns").List(t.Context(), metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=" + service})
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, s := range l.Items {
		if s.Labels[discoveryv1.LabelManagedBy] != managedBy {
			t.Errorf("a slice is managed by %s", s.Labels[discoveryv1.LabelManagedBy])
		}
		for _, e := range s.Endpoints {
			cond := ""
			for letter, c := range map[string]*bool{"r": e.Conditions.Ready, "s": e.Conditions.Serving, "t": e.Conditions.Terminating} {
				if c != nil && *c {
					cond += letter
				}
			}
			b := []byte(cond)
			slices.Sort(b)
			out = append(out, fmt.Sprintf("%s:%d/%s@%s", e.Addresses[0], *s.Ports[0].Port, b, *e.NodeName))
		}
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

func update(t *testing.T, client *fake.Clientset, name string, f func(*corev1.Pod)) {
	t.Helper()
	p, err := client.CoreV1().Pods("ns").Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	f(p)
	if _, err = client.CoreV1().Pods("ns").UpdateStatus(t.Context(), p, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func TestSlicesFollowPods(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := controllertest.NewClient(
			service("web", nil),
			service("early", func(s *corev1.Service) { s.Spec.PublishNotReadyAddresses = true }),
			service("headless", func(s *corev1.Service) { s.Spec.ClusterIP = corev1.ClusterIPNone }),
			service("bare", func(s *corev1.Service) { s.Spec.Selector = nil }),
			service("outside", func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeExternalName }),
			node("n1"), node("n2"),
			pod("a", "n1", "10.244.0.1", 8080, true), pod("b", "n2", "10.244.1.1", 8080, false), pod("c", "n2", "10.244.1.2", 9090, true),
			pod("lost", "gone", "10.244.9.1", 8080, true), pod("pending", "", "", 8080, false),
		)
		controllertest.Start(t, client, nil, New)
		want := "10.244.0.1:8080/rs@n1 10.244.1.1:8080/@n2 10.244.1.2:9090/rs@n2"
		if got := endpoints(t, client, "web"); got != want {
			t.Errorf("web: %s, want %s", got, want)
		}
		if got := endpoints(t, client, "early"); !strings.Contains(got, "10.244.1.1:8080/r") || !strings.Contains(got, "@gone") {
			t.Errorf("early: %s", got)
		}
		if got := endpoints(t, client, "headless"); got != want {
			t.Errorf("headless: %s", got)
		}
		if got := endpoints(t, client, "bare") + endpoints(t, client, "outside"); got != "" {
			t.Errorf("Services without a selector got %s", got)
		}
		l, _ := client.DiscoveryV1().EndpointSlices("ns").List(t.Context(), metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=headless"})
		if _, ok := l.Items[0].Labels[corev1.IsHeadlessService]; !ok || !metav1.IsControlledBy(&l.Items[0], service("headless", nil)) {
			t.Errorf("the slice of a headless Service: %+v", l.Items[0].ObjectMeta)
		}

		update(t, client, "b", func(p *corev1.Pod) { setReady(p, true) })
		update(t, client, "c", func(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{Time: time.Now()} })
		if got, want := endpoints(t, client, "web"), "10.244.0.1:8080/rs@n1 10.244.1.1:8080/rs@n2 10.244.1.2:9090/st@n2"; got != want {
			t.Errorf("after b came and c began to end: %s, want %s", got, want)
		}
		// The node that was missing comes: its pod is in at once.
		if _, err := client.CoreV1().Nodes().Create(t.Context(), node("gone"), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		if got := endpoints(t, client, "web"); !strings.Contains(got, "10.244.9.1:8080/rs@gone") {
			t.Errorf("after the node came: %s", got)
		}
		// Somebody deletes a slice: it is made again.
		l, _ = client.DiscoveryV1().EndpointSlices("ns").List(t.Context(), metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=web"})
		before := endpoints(t, client, "web")
		for _, s := range l.Items {
			if err := client.DiscoveryV1().EndpointSlices("ns").Delete(t.Context(), s.Name, metav1.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		if got := endpoints(t, client, "web"); got != before {
			t.Errorf("after the slices were deleted: %s, want %s", got, before)
		}
		client.ClearActions()
		time.Sleep(time.Hour)
		synctest.Wait()
		if a := client.Actions(); len(a) != 0 {
			t.Errorf("requests while nothing changes: %v", a)
		}
	})
}
