package agent

import (
	"encoding/base64"
	"os"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func writeFile(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func quantity(s string) *resource.Quantity {
	q := resource.MustParse(s)
	return &q
}

func TestExpand(t *testing.T) {
	env := lookupEnv([]envVar{{"A", "1"}, {"EMPTY", ""}})
	for in, want := range map[string]string{"": "", "plain": "plain", "$(A)": "1", "x$(A)y$(A)": "x1y1", "$$(A)": "$(A)", "$$$(A)": "$1", "$(B)": "$(B)", "$(EMPTY)": "", "$": "$", "$(": "$(", "$(A": "$(A", "$x": "$x", "$()": "$()"} {
		if got := expand(in, env, nil); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func FuzzExpand(f *testing.F) {
	f.Add("a$(A)$$(B)$(")
	f.Fuzz(func(t *testing.T, s string) {
		// Without variables and escapes nothing changes.
		if got := expand(s, func(string) (string, bool) { return "", false }, nil); !strings.Contains(s, "$$") && got != s {
			t.Fatalf("%q became %q", s, got)
		}
	})
}

func TestServiceEnv(t *testing.T) {
	svc := func(ns, name, ip string, ports ...corev1.ServicePort) *corev1.Service {
		return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}, Spec: corev1.ServiceSpec{ClusterIP: ip, Ports: ports}}
	}
	all := []*corev1.Service{svc("default", "kubernetes", "10.96.0.1", corev1.ServicePort{Name: "https", Port: 443, Protocol: "TCP"}),
		svc("ns", "my-db", "10.96.0.7", corev1.ServicePort{Name: "a-b", Port: 53, Protocol: "UDP"}, corev1.ServicePort{Port: 54}), svc("ns", "headless", "None", corev1.ServicePort{Port: 1}), svc("other", "x", "10.96.0.8", corev1.ServicePort{Port: 1})}
	m := serviceEnv(all, "ns", true)
	for k, want := range map[string]string{"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT_HTTPS": "443", "KUBERNETES_PORT": "tcp://10.96.0.1:443", "MY_DB_SERVICE_PORT": "53", "MY_DB_SERVICE_PORT_A_B": "53",
		"MY_DB_PORT_53_UDP": "udp://10.96.0.7:53", "MY_DB_PORT_53_UDP_PROTO": "udp", "MY_DB_PORT_54_TCP_ADDR": "10.96.0.7", "HEADLESS_SERVICE_HOST": "", "X_SERVICE_HOST": ""} {
		if m[k] != want {
			t.Errorf("%s=%q, want %q", k, m[k], want)
		}
	}
	if m = serviceEnv(all, "ns", false); m["MY_DB_SERVICE_HOST"] != "" || m["KUBERNETES_SERVICE_HOST"] == "" {
		t.Errorf("without service links: %v", m)
	}
}

func TestResolver(t *testing.T) {
	node := parseResolvConf([]byte("# c\nnameserver 1.1.1.1 ; x\nnameserver 2.2.2.2\nsearch old.example\nsearch example. lan\noptions timeout:2\nbroken\n"))
	one := "1"
	cases := []struct {
		policy                     corev1.DNSPolicy
		host                       bool
		cfg                        *corev1.PodDNSConfig
		servers, searches, options string
	}{
		{corev1.DNSClusterFirst, false, nil, "10.96.0.10", "ns.svc.c.l svc.c.l c.l example lan", "ndots:5"},
		{corev1.DNSClusterFirst, true, nil, "1.1.1.1 2.2.2.2", "example lan", "timeout:2"},
		{corev1.DNSClusterFirstWithHostNet, true, nil, "10.96.0.10", "ns.svc.c.l svc.c.l c.l example lan", "ndots:5"},
		{corev1.DNSDefault, false, nil, "1.1.1.1 2.2.2.2", "example lan", "timeout:2"},
		{corev1.DNSNone, false, &corev1.PodDNSConfig{Nameservers: []string{"9.9.9.9"}, Searches: []string{"s"}, Options: []corev1.PodDNSConfigOption{{Name: "ndots", Value: &one}, {Name: "edns0"}}}, "9.9.9.9", "s", "edns0 ndots:1"},
		{corev1.DNSClusterFirst, false, &corev1.PodDNSConfig{Nameservers: []string{"10.96.0.10", "9.9.9.9"}, Options: []corev1.PodDNSConfigOption{{Name: "ndots", Value: &one}}}, "10.96.0.10 9.9.9.9", "ns.svc.c.l svc.c.l c.l example lan", "ndots:1"},
	}
	for _, c := range cases {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns"}, Spec: corev1.PodSpec{DNSPolicy: c.policy, HostNetwork: c.host, DNSConfig: c.cfg}}
		r := podResolver(p, node, []string{"10.96.0.10"}, "c.l")
		if got := strings.Join(r.servers, " "); got != c.servers {
			t.Errorf("%s: servers %q, want %q", c.policy, got, c.servers)
		}
		if got := strings.Join(r.searches, " "); got != c.searches {
			t.Errorf("%s: searches %q, want %q", c.policy, got, c.searches)
		}
		if got := strings.Join(r.options, " "); got != c.options {
			t.Errorf("%s: options %q, want %q", c.policy, got, c.options)
		}
	}
	many := &corev1.PodDNSConfig{Nameservers: []string{"a", "b", "c", "d", "e"}, Searches: strings.Fields(strings.Repeat(strings.Repeat("x", 60)+" ", 1))}
	for i := range 50 {
		many.Searches = append(many.Searches, strings.Repeat("y", 60)+string(rune('a'+i%26))+string(rune('a'+i/26)))
	}
	r := podResolver(&corev1.Pod{Spec: corev1.PodSpec{DNSPolicy: corev1.DNSNone, DNSConfig: many}}, node, nil, "")
	if len(r.servers) != maxNameservers || len(r.searches) > maxSearches || len(strings.Join(r.searches, " ")) > maxSearchChars {
		t.Errorf("%d servers, %d searches", len(r.servers), len(r.searches))
	}
}

func FuzzResolvConf(f *testing.F) {
	f.Add([]byte("nameserver 1.1.1.1\nsearch a b.\noptions x\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, s := range parseResolvConf(b).searches {
			if s == "" {
				t.Fatal("an empty search domain")
			}
		}
	})
}

func TestHostname(t *testing.T) {
	a := &Agent{cfg: Config{ClusterDomain: "c.l"}}
	yes := true
	for _, c := range []struct {
		spec         corev1.PodSpec
		host, domain string
	}{
		{corev1.PodSpec{}, "pod", ""},
		{corev1.PodSpec{Hostname: "h", Subdomain: "s"}, "h", "s.ns.svc.c.l"},
		{corev1.PodSpec{Subdomain: "s", SetHostnameAsFQDN: &yes}, "pod.s.ns.svc.c.l", "s.ns.svc.c.l"},
		{corev1.PodSpec{Hostname: strings.Repeat("x", 62) + "-yz"}, strings.Repeat("x", 62), ""},
	} {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "pod"}, Spec: c.spec}
		if h, d := a.hostname(p); h != c.host || d != c.domain {
			t.Errorf("%q %q, want %q %q", h, d, c.host, c.domain)
		}
	}
}

func TestCredentials(t *testing.T) {
	js := func(s string) *corev1.Secret {
		return &corev1.Secret{Data: map[string][]byte{corev1.DockerConfigJsonKey: []byte(s)}}
	}
	auth := base64.StdEncoding.EncodeToString([]byte("user:p:w"))
	secrets := []*corev1.Secret{js(`{"auths":{"reg.example":{"auth":"` + auth + `"},"https://reg.example/team/":{"username":"team","password":"x"},"https://index.docker.io/v1/":{"username":"hub"}}}`), js("broken"),
		{Data: map[string][]byte{corev1.DockerConfigKey: []byte(`{"localhost:5000":{"username":"local"}}`)}}}
	for image, want := range map[string]string{"reg.example/a:1": "user", "reg.example/team/b@sha256:00": "team user", "busybox": "hub", "lib/x": "hub", "docker.io/lib/x:2": "hub", "localhost:5000/x": "local", "reg.example.org/a": "", "reg.example:5000/a": ""} {
		var got []string
		for _, a := range credentials(image, secrets) {
			got = append(got, a.Username)
		}
		if s := strings.Join(got, " "); s != want {
			t.Errorf("%s: %q, want %q", image, s, want)
		}
	}
	if a := credentials("reg.example/a", secrets)[0]; a.Password != "p:w" {
		t.Errorf("password %q", a.Password)
	}
}

func TestFits(t *testing.T) {
	mk := func(name, cpu, mem string, port int32) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{}}}}}}
		r := p.Spec.Containers[0].Resources.Requests
		if cpu != "" {
			r[corev1.ResourceCPU] = *quantity(cpu)
		}
		if mem != "" {
			r[corev1.ResourceMemory] = *quantity(mem)
		}
		if port > 0 {
			p.Spec.Containers[0].Ports = []corev1.ContainerPort{{HostPort: port, Protocol: corev1.ProtocolTCP}}
		}
		return p
	}
	alloc := corev1.ResourceList{corev1.ResourceCPU: *quantity("2"), corev1.ResourceMemory: *quantity("1Gi"), corev1.ResourcePods: *quantity("3")}
	others := []*corev1.Pod{mk("a", "1500m", "512Mi", 80)}
	selected := mk("s", "", "", 0)
	selected.Spec.NodeSelector = map[string]string{"disk": "fast"}
	wide := mk("w", "", "", 0)
	wide.Spec.InitContainers = []corev1.Container{{Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceCPU: *quantity("600m")}}}}
	extended := mk("e", "", "", 0)
	extended.Spec.Containers[0].Resources.Requests["example.com/x"] = *quantity("1")
	for _, c := range []struct {
		name            string
		p               *corev1.Pod
		others          []*corev1.Pod
		reason, message string
	}{
		{"fits", mk("b", "500m", "512Mi", 81), others, "", ""},
		{"cpu", mk("b", "501m", "", 0), others, "OutOfcpu", "Node didn't have enough resource: cpu, requested: 501, used: 1500, capacity: 2000"},
		{"cpu of an init container", wide, others, "OutOfcpu", "requested: 600, used: 1500"},
		{"memory", mk("b", "", "513Mi", 0), others, "OutOfmemory", "memory, requested: 537919488, used: 536870912, capacity: 1073741824"},
		{"pods", mk("b", "", "", 0), []*corev1.Pod{mk("x", "", "", 0), mk("y", "", "", 0), mk("z", "", "", 0)}, "OutOfpods", "pods, requested: 1, used: 3, capacity: 3"},
		{"port", mk("b", "", "", 80), others, "NodePorts", "TCP port 80 is used by pod ns/a"},
		{"selector", selected, nil, "NodeAffinity", "didn't match"},
		{"unknown extended resource", extended, nil, "", ""},
	} {
		v := Fits(c.p, c.others, map[string]string{"disk": "slow"}, alloc)
		switch {
		case c.reason == "" && v != nil:
			t.Errorf("%s: %+v", c.name, v)
		case c.reason != "" && (v == nil || v.Reason != c.reason || !strings.Contains(v.Message, c.message)):
			t.Errorf("%s: %+v, want %s %s", c.name, v, c.reason, c.message)
		}
	}
}

func TestMergeConditions(t *testing.T) {
	old, now := metav1.NewTime(time.Unix(100, 0)), metav1.NewTime(time.Unix(200, 0))
	have := []corev1.NodeCondition{{Type: "Foreign", Status: "True"}, {Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "r", LastHeartbeatTime: old, LastTransitionTime: old}}
	same := mergeConditions(have, []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "r"}}, now)
	if same[1] != have[1] || len(same) != 2 {
		t.Errorf("an unchanged condition changed: %+v", same)
	}
	other := mergeConditions(have, []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "s"}}, now)
	if other[1].LastTransitionTime != old || other[1].LastHeartbeatTime != now {
		t.Errorf("%+v", other[1])
	}
	flip := mergeConditions(have, []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionFalse}, {Type: corev1.NodeDiskPressure, Status: corev1.ConditionFalse}}, now)
	if flip[1].LastTransitionTime != now || len(flip) != 3 || have[1].Status != corev1.ConditionTrue {
		t.Errorf("%+v", flip)
	}
}

func TestUnusedImages(t *testing.T) {
	im := func(id string, size uint64, tags ...string) *runtimeapi.Image {
		return &runtimeapi.Image{Id: id, Size: size, RepoTags: tags}
	}
	pinned := im("p", 9)
	pinned.Pinned = true
	got := unusedImages([]*runtimeapi.Image{im("a", 1), im("b", 5), im("c", 3, "tag:1"), pinned, im("d", 7)}, map[string]bool{"d": true, "tag:1": true})
	if len(got) != 2 || got[0].Id != "b" || got[1].Id != "a" {
		t.Errorf("%v", got)
	}
}

func TestOOMScore(t *testing.T) {
	qos := func(q corev1.PodQOSClass) *corev1.Pod {
		return &corev1.Pod{Status: corev1.PodStatus{QOSClass: q}}
	}
	for _, c := range []struct {
		p        *corev1.Pod
		req, cap int64
		want     int64
	}{{qos(corev1.PodQOSGuaranteed), 1, 2, 0}, {qos(corev1.PodQOSBestEffort), 0, 2, 1000}, {qos(corev1.PodQOSBurstable), 25, 100, 750}, {qos(corev1.PodQOSBurstable), 0, 100, 999}, {qos(corev1.PodQOSBurstable), 100, 100, 3}, {qos(""), 1, 0, 999}} {
		if got := oomScore(c.p, c.req, c.cap); got != c.want {
			t.Errorf("%s %d/%d: %d, want %d", c.p.Status.QOSClass, c.req, c.cap, got, c.want)
		}
	}
}

func TestStatusPatch(t *testing.T) {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "u"}, Status: corev1.PodStatus{Phase: corev1.PodPending, QOSClass: corev1.PodQOSBurstable, NominatedNodeName: "x",
		Conditions: []corev1.PodCondition{{Type: "DisruptionTarget", Status: corev1.ConditionTrue}, {Type: corev1.PodReady, Status: corev1.ConditionFalse}}}}
	want := &corev1.PodStatus{Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}}
	b, err := statusPatch(p, want)
	if err != nil {
		t.Fatal(err)
	}
	for _, in := range []string{`"phase":"Running"`, `"metadata":{"uid":"u"}`, `"type":"Ready"`} {
		if !strings.Contains(string(b), in) {
			t.Errorf("no %s in %s", in, b)
		}
	}
	for _, out := range []string{"qosClass", "nominatedNodeName", `$patch`} {
		if strings.Contains(string(b), out) {
			t.Errorf("%s in %s", out, b)
		}
	}
	p.Status.Phase = corev1.PodRunning
	p.Status.Conditions[1].Status = corev1.ConditionTrue
	if b, err = statusPatch(p, want); err != nil || b != nil {
		t.Errorf("a patch without a change: %s %v", b, err)
	}
}

func TestTailOfLog(t *testing.T) {
	name := t.TempDir() + "/0.log"
	if err := touch(name, 0o644); err != nil {
		t.Fatal(err)
	}
	if tailOfLog(name) != "" || tailOfLog("/nonexistent") != "" {
		t.Error("text out of nothing")
	}
	writeFile(t, name, "2026-01-01T00:00:00Z stdout F first\n2026-01-01T00:00:00Z stderr P half \n2026-01-01T00:00:00Z stderr F whole\ntorn\n"+strings.Repeat("2026-01-01T00:00:00Z stdout F x\n", 3))
	if got := tailOfLog(name); got != "first\nhalf whole\nx\nx\nx\n" {
		t.Errorf("%q", got)
	}
	writeFile(t, name, strings.Repeat("2026-01-01T00:00:00Z stdout F "+strings.Repeat("y", 100)+"\n", 500))
	if got := tailOfLog(name); len(got) > maxTerminationLog || !strings.HasSuffix(got, "y\n") {
		t.Errorf("%d bytes", len(got))
	}
}

// TestUpdateMakesVolumesStale shows that a pod's volumes follow what the downward API shows of it, and nothing else.
func TestUpdateMakesVolumesStale(t *testing.T) {
	old := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "u", Labels: map[string]string{"l": "1"}, Annotations: map[string]string{"a": "1"}}}
	for name, c := range map[string]struct {
		change func(*corev1.Pod)
		stale  bool
	}{
		"status":     {func(p *corev1.Pod) { p.Status.Phase = corev1.PodRunning }, false},
		"label":      {func(p *corev1.Pod) { p.Labels["l"] = "2" }, true},
		"annotation": {func(p *corev1.Pod) { p.Annotations["a"] = "2" }, true},
	} {
		w := newWorker(&Agent{}, old, false, nil)
		w.stale = false // as after the first set-up
		p := old.DeepCopy()
		c.change(p)
		if w.update(p, false); w.stale != c.stale {
			t.Errorf("%s: stale is %v, want %v", name, w.stale, c.stale)
		}
	}
}

func TestWithExtended(t *testing.T) {
	q := resource.MustParse
	have := corev1.ResourceList{"cpu": q("1"), "example.com/fake": q("7"), "hugepages-2Mi": q("4Mi"), "kubernetes.io/x": q("1")}
	own := corev1.ResourceList{"cpu": q("2")}
	want := corev1.ResourceList{"cpu": q("2"), "example.com/fake": q("7")}
	if got := withExtended(have, own); !apiequality.Semantic.DeepEqual(got, want) || len(own) != 1 {
		t.Errorf("%v, want %v", got, want)
	}
}
