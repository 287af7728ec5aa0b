package daemon

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/utils/ptr"

	"skein.io/skein/consensus/keyring"
	"skein.io/skein/datapath/service"
	"skein.io/skein/gossip/health"
	"skein.io/skein/gossip/identity"
	"skein.io/skein/node/dns"
)

func svc(ns, name, ip string, ports ...corev1.ServicePort) *corev1.Service {
	return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}, Spec: corev1.ServiceSpec{ClusterIP: ip, ClusterIPs: []string{ip}, Ports: ports}}
}

func slice(ns, name, port string, number int32, eps ...discoveryv1.Endpoint) *discoveryv1.EndpointSlice {
	return &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: ns, Name: name + "-x", Labels: map[string]string{discoveryv1.LabelServiceName: name}},
		AddressType: discoveryv1.AddressTypeIPv4, Endpoints: eps,
		Ports: []discoveryv1.EndpointPort{{Name: &port, Port: &number}},
	}
}

func endpoint(ip, node string, ready, serving, terminating bool) discoveryv1.Endpoint {
	return discoveryv1.Endpoint{Addresses: []string{ip}, NodeName: &node,
		Conditions: discoveryv1.EndpointConditions{Ready: &ready, Serving: &serving, Terminating: &terminating}}
}

func TestTranslate(t *testing.T) {
	loc := local{api: netip.MustParseAddrPort("192.0.2.1:6443"), dns: dnsAddr}
	web := svc("d", "web", "10.96.0.7", corev1.ServicePort{Name: "http", Port: 80, NodePort: 30080})
	web.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
	web.Spec.ExternalIPs = []string{"198.51.100.1"}
	web.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
	headless := svc("d", "headless", "None", corev1.ServicePort{Port: 1})
	sctp := svc("d", "sctp", "10.96.0.8", corev1.ServicePort{Port: 1, Protocol: corev1.ProtocolSCTP})
	external := svc("d", "external", "10.96.0.9", corev1.ServicePort{Port: 1})
	external.Spec.Type = corev1.ServiceTypeExternalName
	got := translate([]*corev1.Service{
		web, headless, sctp, external,
		svc("default", "kubernetes", "10.96.0.1", corev1.ServicePort{Name: "https", Port: 443}),
		svc("kube-system", "kube-dns", "10.96.0.10", corev1.ServicePort{Name: "dns", Port: 53, Protocol: corev1.ProtocolUDP}),
	}, []*discoveryv1.EndpointSlice{
		slice("d", "web", "http", 8080,
			endpoint("10.244.1.2", "n2", true, true, false),
			endpoint("10.244.0.2", "n1", false, true, true),  // ends, still serves
			endpoint("10.244.0.3", "n1", false, false, true), // ends, serves no more
			endpoint("10.244.0.4", "n1", false, false, false)),
		slice("d", "web", "other", 9090, endpoint("10.244.1.9", "n2", true, true, false)),
		slice("default", "kubernetes", "https", 6443, endpoint("192.0.2.9", "n9", true, true, false)),
	}, loc)
	want := []service.Service{
		{Name: "d/web:http", Proto: service.TCP, NodePort: 30080, Affinity: 3 * time.Hour, ExternalLocal: true,
			Frontends: []service.Frontend{{Addr: netip.MustParseAddrPort("10.96.0.7:80")}, {Addr: netip.MustParseAddrPort("198.51.100.1:80"), External: true}},
			Backends: []service.Backend{{Addr: netip.MustParseAddrPort("10.244.0.2:8080"), Node: "n1", Terminating: true},
				{Addr: netip.MustParseAddrPort("10.244.1.2:8080"), Node: "n2"}}},
		{Name: "default/kubernetes:https", Proto: service.TCP, Frontends: []service.Frontend{{Addr: netip.MustParseAddrPort("10.96.0.1:443")}},
			Backends: []service.Backend{{Addr: loc.api}}}, // this node's own front, whatever the slices say
		{Name: "kube-system/kube-dns:dns", Proto: service.UDP, Frontends: []service.Frontend{{Addr: netip.MustParseAddrPort("10.96.0.10:53")}},
			Backends: []service.Backend{{Addr: loc.dns}}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v\nwant\n%+v", got, want)
	}
}

func TestTranslatePublishesNotReady(t *testing.T) {
	s := svc("d", "db", "10.96.0.7", corev1.ServicePort{Name: "p", Port: 1})
	s.Spec.PublishNotReadyAddresses = true
	got := translate([]*corev1.Service{s}, []*discoveryv1.EndpointSlice{slice("d", "db", "p", 5, endpoint("10.244.0.4", "n1", false, false, false))}, local{})
	if len(got) != 1 || len(got[0].Backends) != 1 {
		t.Errorf("got %+v, want the endpoint that is not ready", got)
	}
}

func TestWithhold(t *testing.T) {
	at := func(ip, node string) service.Backend {
		return service.Backend{Addr: netip.AddrPortFrom(netip.MustParseAddr(ip), 80), Node: node}
	}
	all := []service.Service{
		{Name: "mixed", Backends: []service.Backend{at("10.244.0.2", "a"), at("10.244.1.2", "b"), at("10.244.2.2", "c"), at("192.0.2.1", "")}},
		{Name: "onlyB", Backends: []service.Backend{at("10.244.1.3", "b")}},
		{Name: "onlyC", Backends: []service.Backend{at("10.244.2.3", "c")}},
	}
	for name, c := range map[string]struct {
		verdicts map[string]health.Verdict
		counts   [3]int
		withheld int
	}{
		"all alive":         {map[string]health.Verdict{"a": health.Alive, "b": health.Suspect, "c": health.Alive}, [3]int{4, 1, 1}, 0},
		"b dead":            {map[string]health.Verdict{"a": health.Alive, "b": health.Dead, "c": health.Alive}, [3]int{3, 1, 1}, 1}, // the last one stays
		"c left":            {map[string]health.Verdict{"a": health.Alive, "b": health.Alive, "c": health.Left}, [3]int{3, 1, 0}, 2}, // it said so itself
		"most of them dead": {map[string]health.Verdict{"a": health.Alive, "b": health.Dead, "c": health.Dead}, [3]int{4, 1, 1}, 0},
	} {
		got, withheld := withhold(all, health.PanicThreshold{}.Decide("a", c.verdicts))
		if withheld != c.withheld {
			t.Errorf("%s: %d back ends withheld, want %d", name, withheld, c.withheld)
		}
		for i, want := range c.counts {
			if len(got[i].Backends) != want {
				t.Errorf("%s: %s has %d back ends, want %d", name, got[i].Name, len(got[i].Backends), want)
			}
		}
		if len(all[0].Backends) != 4 || all[0].Backends[1].Node != "b" {
			t.Fatalf("%s: the argument was changed", name)
		}
	}
}

func TestIndexNames(t *testing.T) {
	s := svc("d", "web", "10.96.0.7", corev1.ServicePort{Name: "http", Port: 80, Protocol: corev1.ProtocolTCP})
	e := endpoint("10.244.0.2", "n1", true, true, false)
	e.Hostname = ptr.To("web-0")
	x := indexNames([]*corev1.Service{s, svc("d", "none", "None")}, []*discoveryv1.EndpointSlice{slice("d", "web", "http", 8080, e, endpoint("10.244.0.3", "n1", false, false, false))})
	if got := x.services["d/none"]; got.ClusterIPs != nil {
		t.Errorf("the headless Service has the addresses %v", got.ClusterIPs)
	}
	if got := x.owners[netip.MustParseAddr("10.244.0.2")]; !reflect.DeepEqual(got, []dns.Owner{{Namespace: "d", Name: "web", Endpoint: "web-0"}}) {
		t.Errorf("owners of the named endpoint: %+v", got)
	}
	if got := x.owners[netip.MustParseAddr("10.244.0.3")]; len(got) != 1 || got[0].Endpoint != "10-244-0-3" {
		t.Errorf("owners of the nameless endpoint: %+v", got)
	}
	if eps := x.endpoints["d/web"]; len(eps) != 2 || !eps[0].Ready || eps[1].Ready {
		t.Errorf("endpoints: %+v", eps)
	}
	if !x.namespaces["d"] {
		t.Error("namespace d is not known")
	}
}

func testKeys(t testing.TB) clusterKeys {
	t.Helper()
	a, err := identity.NewAuthority("c1", time.Now(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sa, err := identity.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return clusterKeys{authority: a, sa: sa}
}

func TestKeysSurviveEncoding(t *testing.T) {
	k := testKeys(t)
	f := founding{filepath.Join(t.TempDir(), "founding.json")}
	if _, _, pending, err := f.load(); err != nil || pending {
		t.Fatalf("no file: pending %v, %v", pending, err)
	}
	ring := testRing(t)
	if err := f.save(k, ring); err != nil {
		t.Fatal(err)
	}
	got, gotRing, pending, err := f.load()
	if err != nil || !pending || !gotRing.Equal(ring) {
		t.Fatalf("saved file: pending %v, ring %v instead of %v, %v", pending, gotRing, ring, err)
	}
	if !got.authority.Key.Equal(k.authority.Key) || !got.sa.Equal(k.sa) || !got.authority.Cert.Equal(k.authority.Cert) {
		t.Error("other keys came back")
	}
	if st, err := os.Stat(f.path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v: others may read the cluster's keys", st.Mode(), err)
	}
}

func testRing(t testing.TB) keyring.Ring {
	t.Helper()
	r, err := keyring.New(rand.Reader, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestStoredKeysAreSealed(t *testing.T) {
	k, ring := testKeys(t), testRing(t)
	sealed, err := k.seal(ring)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := k.encode()
	if err != nil {
		t.Fatal(err)
	}
	var r keysRecord
	if err := json.Unmarshal(plain, &r); err != nil {
		t.Fatal(err)
	}
	for _, secret := range [][]byte{r.CAKey, r.SAKey, []byte(base64.StdEncoding.EncodeToString(r.CAKey))} {
		if bytes.Contains(sealed, secret) || !bytes.Contains(append(plain, secret...), secret) {
			t.Error("the stored form has a key in clear")
		}
	}
	for name, b := range map[string][]byte{"sealed": sealed, "of an earlier version": plain} {
		if got, err := openKeys(b, ring); err != nil || !got.sa.Equal(k.sa) || !got.authority.Key.Equal(k.authority.Key) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := openKeys(sealed, testRing(t)); !errors.Is(err, keyring.ErrUnknownKey) {
		t.Errorf("another ring: %v", err)
	}
	if _, err := decodeKeys([]byte(`{"caKey": SECRET}`)); err == nil || strings.Contains(err.Error(), "SE") {
		t.Errorf("the error quotes what may be a key: %v", err)
	}
}

func TestDecodeKeysRefusesNewerVersions(t *testing.T) {
	if _, err := decodeKeys([]byte(`{"version":2}`)); err == nil || !strings.Contains(err.Error(), "upgrade this node") {
		t.Errorf("got %v", err)
	}
}

func FuzzDecodeKeys(f *testing.F) {
	b, err := testKeys(f).encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"version":1,"caCert":"AA=="}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if k, err := decodeKeys(b); err == nil && (k.authority == nil || k.sa == nil) {
			t.Error("accepted without keys")
		}
	})
}

func TestKubeconfigIsAnAdministrators(t *testing.T) {
	k := testKeys(t)
	b, err := kubeconfig(k.authority, "https://192.0.2.1:6443", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := clientcmd.RESTConfigFromKubeConfig(b)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := identity.ParseCert(cfg.CertData)
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Host != "https://192.0.2.1:6443" || cert.Subject.Organization[0] != "system:masters" || cert.CheckSignatureFrom(k.authority.Cert) != nil {
		t.Errorf("host %s, subject %s", cfg.Host, cert.Subject)
	}
}

func TestHostIDIsOfTheKey(t *testing.T) {
	a, b := testKeys(t).sa, testKeys(t).sa
	one, err := hostIDOf(a.Public())
	if err != nil {
		t.Fatal(err)
	}
	again, _ := hostIDOf(a.Public())
	other, _ := hostIDOf(b.Public())
	if one != again || one == other || len(one) != 36 || one[14] != '8' {
		t.Errorf("%s, %s, %s", one, again, other)
	}
}

func TestConfigReportsEveryFault(t *testing.T) {
	c := Config{Name: "Not_A_Label", StateDir: "relative", Address: netip.MustParseAddr("127.0.0.1"), CgroupRoot: "/", Voter: "maybe", Profile: "wan",
		PodCIDR: netip.MustParsePrefix("10.0.0.1/8"), ServiceCIDR: netip.MustParsePrefix("10.96.0.0/16"), EvictionGrace: -1}
	c.setDefaults()
	err := c.Validate()
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{"Not_A_Label", "relative", "127.0.0.1", "cgroup root", "maybe", "wan", "10.0.0.1/8", "overlap", "eviction grace"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not name %q: %v", want, err)
		}
	}
	good := Config{Name: "n1", Address: netip.MustParseAddr("192.0.2.1")}
	good.setDefaults()
	if err := good.Validate(); err != nil {
		t.Errorf("the defaults are refused: %v", err)
	}
}

func TestPeerOf(t *testing.T) {
	n := func(name, ip, cidr string) *corev1.Node {
		return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{PodCIDR: cidr},
			Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: ip}}}}
	}
	for _, tc := range []struct {
		why  string
		node *corev1.Node
		want bool
	}{
		{"all is known", n("c", "192.0.2.3", "10.244.3.0/24"), true},
		{"no range yet", n("b", "192.0.2.2", ""), false},
		{"no address", n("d", "bad", "10.244.4.0/24"), false},
		{"no node", nil, false},
	} {
		if got, ok := peerOf(tc.node); ok != tc.want || ok && got.Node != tc.node.Name {
			t.Errorf("%s: %+v, %v", tc.why, got, ok)
		}
	}
}
