package endpointmirror

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
	"k8s.io/client-go/kubernetes/fake"

	"skein.io/skein/scheduler/controller/controllertest"
)

func subset(ports []corev1.EndpointPort, ready []string, unready ...string) corev1.EndpointSubset {
	s := corev1.EndpointSubset{Ports: ports}
	for _, ip := range ready {
		s.Addresses = append(s.Addresses, corev1.EndpointAddress{IP: ip})
	}
	for _, ip := range unready {
		s.NotReadyAddresses = append(s.NotReadyAddresses, corev1.EndpointAddress{IP: ip})
	}
	return s
}

func port(name string, n int32) corev1.EndpointPort {
	return corev1.EndpointPort{Name: name, Port: n, Protocol: corev1.ProtocolTCP}
}

func mkEndpoints(subsets ...corev1.EndpointSubset) *corev1.Endpoints {
	return &corev1.Endpoints{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "e", ResourceVersion: "1",
		Labels: map[string]string{"l": "x"}, Annotations: map[string]string{"a": "y", corev1.LastAppliedConfigAnnotation: "{}", corev1.EndpointsLastChangeTriggerTime: "now"}}, Subsets: subsets}
}

func text(s *discoveryv1.EndpointSlice) string {
	var ports, ends []string
	for _, p := range s.Ports {
		ports = append(ports, fmt.Sprintf("%s:%d", *p.Name, *p.Port))
	}
	for _, e := range s.Endpoints {
		mark := ""
		if !*e.Conditions.Ready {
			mark = "!"
		}
		ends = append(ends, mark+e.Addresses[0])
	}
	return fmt.Sprintf("%s %s=%s", s.AddressType, strings.Join(ports, ","), strings.Join(ends, ","))
}

func texts(all []*discoveryv1.EndpointSlice) string {
	var out []string
	for _, s := range all {
		out = append(out, text(s))
	}
	slices.Sort(out)
	return strings.Join(out, "; ")
}

// The cases are those of upstream's TestReconcile.
func TestWhatIsMirrored(t *testing.T) {
	http, admin := []corev1.EndpointPort{port("http", 80)}, []corev1.EndpointPort{port("admin", 9)}
	var many []string
	for i := range 1002 {
		many = append(many, fmt.Sprintf("10.0.%d.%d", i/250, i%250+1))
	}
	for _, tc := range []struct {
		what             string
		subsets          []corev1.EndpointSubset
		want             string
		invalid, tooMany int
	}{
		{"nothing", nil, "", 0, 0},
		{"ports without addresses", []corev1.EndpointSubset{subset(http, nil)}, "", 0, 0},
		{"one", []corev1.EndpointSubset{subset(http, []string{"10.0.0.1"})}, "IPv4 http:80=10.0.0.1", 0, 0},
		{"no ports", []corev1.EndpointSubset{subset(nil, []string{"10.0.0.1"})}, "IPv4 =10.0.0.1", 0, 0},
		{"not ready", []corev1.EndpointSubset{subset(http, []string{"10.0.0.2"}, "10.0.0.1")}, "IPv4 http:80=!10.0.0.1,10.0.0.2", 0, 0},
		{"ready and not ready", []corev1.EndpointSubset{subset(http, []string{"10.0.0.1"}), subset(http, nil, "10.0.0.1")}, "IPv4 http:80=!10.0.0.1", 0, 0},
		{"two ports", []corev1.EndpointSubset{subset(append(http, admin...), []string{"10.0.0.1"})}, "IPv4 admin:9,http:80=10.0.0.1", 0, 0},
		{"subsets of the same addresses", []corev1.EndpointSubset{subset(http, []string{"10.0.0.1"}), subset(admin, []string{"10.0.0.1"})}, "IPv4 admin:9,http:80=10.0.0.1", 0, 0},
		{"subsets of different addresses", []corev1.EndpointSubset{subset(http, []string{"10.0.0.1"}), subset(admin, []string{"10.0.0.2"})}, "IPv4 admin:9=10.0.0.2; IPv4 http:80=10.0.0.1", 0, 0},
		{"subsets of the same ports", []corev1.EndpointSubset{subset(http, []string{"10.0.0.1"}), subset(http, []string{"10.0.0.2"})}, "IPv4 http:80=10.0.0.1,10.0.0.2", 0, 0},
		{"both families", []corev1.EndpointSubset{subset(http, []string{"10.0.0.1", "fd00::1"})}, "IPv4 http:80=10.0.0.1; IPv6 http:80=fd00::1", 0, 0},
		{"no address", []corev1.EndpointSubset{subset(http, []string{"10.0.0.1", "this-is-none"})}, "IPv4 http:80=10.0.0.1", 1, 0},
		{"an unusual form", []corev1.EndpointSubset{subset(http, []string{"010.000.000.001"})}, "IPv4 http:80=10.0.0.1", 0, 0},
		{"too many", []corev1.EndpointSubset{subset(http, many[:1001], many[1001])}, "", 0, 2},
	} {
		e := mkEndpoints(tc.subsets...)
		groups, invalid, tooMany := wanted(e)
		c := plan(e, groups, nil)
		if tc.tooMany > 0 {
			if n := len(c.create[0].Endpoints); n != perSubset {
				t.Errorf("%s: %d mirrored", tc.what, n)
			}
		} else if got := texts(c.create); got != tc.want {
			t.Errorf("%s: %s, want %s", tc.what, got, tc.want)
		}
		if invalid != tc.invalid || tooMany != tc.tooMany || len(c.update)+len(c.remove) > 0 {
			t.Errorf("%s: %d invalid, %d too many, %+v", tc.what, invalid, tooMany, c)
		}
	}
}

func TestChangesOfSlices(t *testing.T) {
	http, admin := []corev1.EndpointPort{port("http", 80)}, []corev1.EndpointPort{port("admin", 9)}
	before := mkEndpoints(subset(http, []string{"10.0.0.1", "10.0.0.2"}))
	groups, _, _ := wanted(before)
	have := plan(before, groups, nil).create
	have[0].Name, have[0].UID, have[0].ResourceVersion = "web-1", "s", "7"
	twin := have[0].DeepCopy()
	twin.Name = "web-2"
	other := have[0].DeepCopy()
	other.Name, other.Ports = "web-3", slicePorts(admin)
	for _, tc := range []struct {
		what string
		now  *corev1.Endpoints
		have []*discoveryv1.EndpointSlice
		want string // creates | updates | removes
	}{
		{"the same", before, have, " |  | "},
		{"an address less", mkEndpoints(subset(http, []string{"10.0.0.1"})), have, " | IPv4 http:80=10.0.0.1 | "},
		{"not ready", mkEndpoints(subset(http, []string{"10.0.0.1"}, "10.0.0.2")), have, " | IPv4 http:80=10.0.0.1,!10.0.0.2 | "},
		{"other ports: the slice is used again", mkEndpoints(subset(admin, []string{"10.0.0.1"})), have, " | IPv4 admin:9=10.0.0.1 | "},
		{"another family", mkEndpoints(subset(http, []string{"fd00::1"})), have, "IPv6 http:80=fd00::1 |  | IPv4 http:80=10.0.0.1,10.0.0.2"},
		{"a second slice for the same", before, append([]*discoveryv1.EndpointSlice{twin}, have...), " |  | IPv4 http:80=10.0.0.1,10.0.0.2"},
		{"a slice for ports that are gone", before, []*discoveryv1.EndpointSlice{other, have[0]}, " |  | IPv4 admin:9=10.0.0.1,10.0.0.2"},
		{"empty", mkEndpoints(), have, " |  | IPv4 http:80=10.0.0.1,10.0.0.2"},
		{"another label", func() *corev1.Endpoints { e := before.DeepCopy(); e.Labels["l"] = "z"; return e }(), have, " | IPv4 http:80=10.0.0.1,10.0.0.2 | "},
		{"another annotation", func() *corev1.Endpoints { e := before.DeepCopy(); e.Annotations["a"] = "z"; return e }(), have, " | IPv4 http:80=10.0.0.1,10.0.0.2 | "},
		{"an annotation that is not mirrored", func() *corev1.Endpoints {
			e := before.DeepCopy()
			e.Annotations[corev1.EndpointsLastChangeTriggerTime] = "later"
			return e
		}(), have, " |  | "},
		{"made anew", func() *corev1.Endpoints { e := before.DeepCopy(); e.UID = "new"; return e }(), have, " | IPv4 http:80=10.0.0.1,10.0.0.2 | "},
	} {
		groups, _, _ := wanted(tc.now)
		c := plan(tc.now, groups, tc.have)
		if got := texts(c.create) + " | " + texts(c.update) + " | " + texts(c.remove); got != tc.want {
			t.Errorf("%s: %s, want %s", tc.what, got, tc.want)
		}
		for _, s := range c.update {
			if s.Name == "" || s.ResourceVersion == "" || s.GenerateName != "" || s.OwnerReferences[0].UID != tc.now.UID {
				t.Errorf("%s: the update is of %+v", tc.what, s.ObjectMeta)
			}
		}
	}
}

func TestSlicesFollowEndpoints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		service := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "web", ResourceVersion: "1"}}
		lock := &corev1.Endpoints{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "lock", ResourceVersion: "1", Annotations: map[string]string{leaderAnnotation: "{}"}}}
		skipped := mkEndpoints(subset(nil, []string{"10.0.0.9"}))
		skipped.Name, skipped.Labels = "skipped", map[string]string{discoveryv1.LabelSkipMirror: "true"}
		client := controllertest.NewClient(service, lock, skipped, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "skipped"}}, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "lock"}})
		rec := controllertest.Start(t, client, nil, New)
		state := func() string {
			t.Helper()
			time.Sleep(5 * time.Second)
			synctest.Wait()
			l, err := client.DiscoveryV1().EndpointSlices("ns").List(t.Context(), metav1.ListOptions{})
			if err != nil {
				t.Fatal(err)
			}
			var all []*discoveryv1.EndpointSlice
			for i := range l.Items {
				all = append(all, &l.Items[i])
			}
			return texts(all)
		}
		expect := func(want string) {
			t.Helper()
			if got := state(); got != want {
				t.Errorf("%s, want %s", got, want)
			}
		}
		expect("")
		http := []corev1.EndpointPort{port("http", 80)}
		e, err := client.CoreV1().Endpoints("ns").Create(t.Context(), mkEndpoints(subset(http, []string{"10.0.0.1", "none"})), metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		expect("IPv4 http:80=10.0.0.1")
		if ev := controllertest.Events(rec); len(ev) != 1 || ev[0] != "Warning InvalidIPAddress Skipped 1 invalid IP addresses when mirroring to EndpointSlices" {
			t.Errorf("events %q", ev)
		}
		e.Subsets = []corev1.EndpointSubset{subset(http, []string{"10.0.0.2"})}
		if e, err = client.CoreV1().Endpoints("ns").Update(t.Context(), e, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		expect("IPv4 http:80=10.0.0.2")
		clear(t, client) // somebody deletes the slice
		expect("IPv4 http:80=10.0.0.2")
		client.ClearActions()
		time.Sleep(time.Hour)
		synctest.Wait()
		if a := client.Actions(); len(a) != 0 {
			t.Errorf("requests while nothing changes: %v", a)
		}
		select1 := func(s map[string]string) {
			t.Helper()
			svc, err := client.CoreV1().Services("ns").Get(t.Context(), "web", metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			svc.Spec.Selector = s
			if _, err := client.CoreV1().Services("ns").Update(t.Context(), svc, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		select1(map[string]string{"app": "web"})
		expect("") // another controller's now
		select1(nil)
		expect("IPv4 http:80=10.0.0.2")
		if err := client.CoreV1().Endpoints("ns").Delete(t.Context(), "web", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		expect("")
	})
}

func clear(t *testing.T, client *fake.Clientset) {
	t.Helper()
	l, err := client.DiscoveryV1().EndpointSlices("ns").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range l.Items {
		if err := client.DiscoveryV1().EndpointSlices("ns").Delete(t.Context(), l.Items[i].Name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
}
