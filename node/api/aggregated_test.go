package api

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apiserver/pkg/server/options"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	apiregv1 "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"
	aggregatorclient "k8s.io/kube-aggregator/pkg/client/clientset_generated/clientset"
	"skein.io/skein/gossip/identity"
)

func registrations(t *testing.T) aggregatorclient.Interface {
	t.Helper()
	c, err := aggregatorclient.NewForConfig(cluster.as(cluster.servers[0], "admin", "system:masters"))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// register makes the APIService of the extension API server behind Service ns/bolts.
func register(t *testing.T, ns string, change func(*apiregv1.APIServiceSpec)) {
	t.Helper()
	r := registrations(t).ApiregistrationV1().APIServices()
	a := &apiregv1.APIService{ObjectMeta: metav1.ObjectMeta{Name: boltGV.Version + "." + boltGV.Group}, Spec: apiregv1.APIServiceSpec{
		Service: &apiregv1.ServiceReference{Namespace: ns, Name: "bolts", Port: ptr(int32(443))}, Group: boltGV.Group, Version: boltGV.Version,
		GroupPriorityMinimum: 2000, VersionPriority: 200}}
	change(&a.Spec)
	if _, err := r.Create(t.Context(), a, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Delete(context.Background(), a.Name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			t.Error(err)
		}
	})
}

// awaitAvailable waits until the APIService has the reason for being available or not.
func awaitAvailable(t *testing.T, reason string) {
	t.Helper()
	eventually(t, func(ctx context.Context) error {
		a, err := registrations(t).ApiregistrationV1().APIServices().Get(ctx, boltGV.Version+"."+boltGV.Group, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, c := range a.Status.Conditions {
			if c.Type == apiregv1.Available && c.Reason == reason {
				return nil
			}
		}
		return fmt.Errorf("conditions %+v, want %s", a.Status.Conditions, reason)
	})
}

func boltsAs(t *testing.T, s *running, ns, user string, groups ...string) dynamic.ResourceInterface {
	t.Helper()
	dyn, err := dynamic.NewForConfig(cluster.as(s, user, groups...))
	if err != nil {
		t.Fatal(err)
	}
	return dyn.Resource(boltGV.WithResource("bolts")).Namespace(ns)
}

func bolt(name string) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{"apiVersion": boltGV.String(), "kind": "Bolt", "metadata": map[string]any{"name": name}, "size": int64(8)}}
}

// An API server of another group, of upstream's library, is served by every server of the cluster as if it were built in.
func TestAggregatedAPI(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	ext := startExtension(t, k, ns)
	service(t, k, ns, "bolts", ext.addr)
	began := time.Now()
	register(t, ns, func(s *apiregv1.APIServiceSpec) { s.CABundle = ext.ca })
	awaitAvailable(t, "Passed")
	t.Logf("available after %v", time.Since(began).Round(time.Millisecond))

	// The extension server asks this API whether the user may, too.
	role := &rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Name: "bolter"}, Rules: []rbacv1.PolicyRule{
		{APIGroups: []string{boltGV.Group}, Resources: []string{"bolts", "bolts/echo"}, Verbs: []string{"*"}}}}
	if _, err := k.RbacV1().Roles(ns).Create(ctx, role, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	bind := roleBinding("bolter", "Group", "bolters")
	bind.RoleRef.Kind = "Role"
	if _, err := k.RbacV1().RoleBindings(ns).Create(ctx, bind, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	for i, s := range cluster.servers {
		t.Run(fmt.Sprintf("server %d", i+1), func(t *testing.T) {
			ctx := t.Context()
			alice := boltsAs(t, s, ns, "alice", "bolters")
			eventually(t, func(ctx context.Context) error { _, err := alice.List(ctx, metav1.ListOptions{}); return err })
			w, err := alice.Watch(ctx, metav1.ListOptions{})
			if err != nil {
				t.Fatal(err)
			}
			defer w.Stop()
			name := fmt.Sprintf("b%d", i)
			b, err := alice.Create(ctx, bolt(name), metav1.CreateOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if by := b.Object["by"]; by != "alice[bolters system:authenticated]" {
				t.Errorf("the extension server saw %q", by)
			}
			select {
			case e := <-w.ResultChan():
				if got := e.Object.(*unstructured.Unstructured).GetName(); got != name {
					t.Errorf("watch saw %s %s", e.Type, got)
				}
			case <-time.After(patience):
				t.Error("the watch saw nothing")
			}
			if _, err := boltsAs(t, s, ns, "mallory").Get(ctx, name, metav1.GetOptions{}); !apierrors.IsForbidden(err) {
				t.Errorf("without rights: %v", err)
			}
			if _, err := alice.Get(ctx, "none", metav1.GetOptions{}); !apierrors.IsNotFound(err) || !strings.Contains(err.Error(), `bolts.agg.test.skein.io "none" not found`) {
				t.Errorf("an error of the extension server: %v", err)
			}
			if seen := echoed(t, s, ns, name); seen != "alice" {
				t.Errorf("upgrade as %q", seen)
			}
		})
	}
	t.Run("discovery and documents", func(t *testing.T) { checkBoltDocuments(t) })
	t.Run("no front proxy, no faith", func(t *testing.T) { checkHeadersNeedCertificate(t, ext, ns) })
}

// echoed upgrades a connection through the aggregator and gives the user that the far end saw.
func echoed(t *testing.T, s *running, ns, name string) string {
	t.Helper()
	conn := dialTLS(t, cluster.as(s, "alice", "bolters"))
	fmt.Fprintf(conn, "POST /apis/%s/namespaces/%s/bolts/%s/echo HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: echo\r\nX-Remote-User: root\r\nContent-Length: 0\r\n\r\n", boltGV, ns, name)
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("upgrade: %v, %v", resp, err)
	}
	fmt.Fprint(conn, "ping")
	buf := make([]byte, 4)
	if _, err := io.ReadFull(r, buf); err != nil || string(buf) != "ping" {
		t.Fatalf("echo %q, %v", buf, err)
	}
	return resp.Header.Get("X-Seen")
}

func checkBoltDocuments(t *testing.T) {
	for i, s := range cluster.servers {
		k := client(t, cluster.as(s, "admin", "system:masters"))
		eventually(t, func(ctx context.Context) error {
			_, lists, err := k.Discovery().ServerGroupsAndResources()
			if err != nil {
				return err
			}
			found := false
			for _, l := range lists {
				if l.GroupVersion == boltGV.String() {
					found = len(l.APIResources) == 3
				}
			}
			if !found {
				return fmt.Errorf("server %d: bolts are not in discovery", i+1)
			}
			v3, err := k.Discovery().RESTClient().Get().AbsPath("/openapi/v3/apis/" + boltGV.String()).DoRaw(ctx)
			if err != nil || !strings.Contains(string(v3), "Size of a bolt") {
				return fmt.Errorf("server %d: version 3 document: %w", i+1, err)
			}
			v2, err := k.Discovery().RESTClient().Get().AbsPath("/openapi/v2").SetHeader("Accept", "application/json").DoRaw(ctx)
			if err != nil || !strings.Contains(string(v2), "Size of a bolt") || !strings.Contains(string(v2), "/apis/apps/v1/deployments") {
				return fmt.Errorf("server %d: version 2 document of %d bytes: %w", i+1, len(v2), err)
			}
			return nil
		})
	}
}

// checkHeadersNeedCertificate shows that it is our certificate that the extension server believes.
func checkHeadersNeedCertificate(t *testing.T, ext *extension, ns string) {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ext.ca)
	other, err := newFixtureCA()
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		ca   *identity.Authority
		cn   string
		want int
	}{
		"ours": {cluster.proxies, FrontProxyUser, http.StatusOK}, "none": {nil, "", http.StatusForbidden}, "of another CA": {other, FrontProxyUser, http.StatusForbidden},
		"of the cluster's CA": {cluster.ca, FrontProxyUser, http.StatusForbidden}, "with another name": {cluster.proxies, "alice", http.StatusForbidden},
	} {
		cfg := &tls.Config{RootCAs: pool, ServerName: "bolts." + ns + ".svc"}
		if tc.ca != nil {
			crt, err := tc.ca.IssueClient(tc.cn, nil, time.Hour, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &crt, nil }
		}
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+ext.addr+"/apis/"+boltGV.String()+"/namespaces/"+ns+"/bolts", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("X-Remote-User", "root")
		r.Header.Set("X-Remote-Group", "system:masters")
		tr := &http.Transport{TLSClientConfig: cfg}
		resp, err := (&http.Client{Transport: tr}).Do(r)
		if err != nil {
			t.Errorf("certificate %s: %v", name, err)
			continue
		}
		resp.Body.Close()
		tr.CloseIdleConnections()
		if resp.StatusCode != tc.want && (tc.want == http.StatusOK || resp.StatusCode != http.StatusUnauthorized) {
			t.Errorf("certificate %s: %s, want %d", name, resp.Status, tc.want)
		}
	}
}

// An API server that takes everybody as anonymous, as upstream's do for a moment after a start, until they have read whom to believe, is not
// available: its users would be forbidden everything.
func TestAPIServiceThatKnowsNobodyIsUnavailable(t *testing.T) {
	k := admin(t)
	ns := namespace(t, k)
	ext := startExtension(t, k, ns, func(o *options.DelegatingAuthenticationOptions) { o.SkipInClusterLookup = true })
	service(t, k, ns, "bolts", ext.addr)
	register(t, ns, func(s *apiregv1.APIServiceSpec) { s.CABundle = ext.ca })
	eventually(t, func(ctx context.Context) error {
		a, err := registrations(t).ApiregistrationV1().APIServices().Get(ctx, boltGV.Version+"."+boltGV.Group, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, c := range a.Status.Conditions {
			switch {
			case c.Type != apiregv1.Available:
			case c.Status == apiregv1.ConditionTrue:
				t.Fatalf("it passes for available: %+v", c)
			case c.Reason == "FailedDiscoveryCheck" && strings.Contains(c.Message, "403"):
				return nil
			}
		}
		return fmt.Errorf("conditions %+v, want that discovery is forbidden", a.Status.Conditions)
	})
}

// An API server that cannot be reached costs its own group only, and comes back.
func TestUnavailableAPIService(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	register(t, ns, func(s *apiregv1.APIServiceSpec) { s.InsecureSkipTLSVerify = true })
	awaitAvailable(t, "ServiceNotFound")
	ext := startExtension(t, k, ns)
	service(t, k, ns, "bolts", ext.addr)
	awaitAvailable(t, "Passed")
	list := func() error {
		_, err := boltsAs(t, cluster.servers[1], ns, "admin", "system:masters").List(ctx, metav1.ListOptions{})
		return err
	}
	eventually(t, func(context.Context) error { return list() })

	change := func(patch string) {
		t.Helper()
		if _, err := registrations(t).ApiregistrationV1().APIServices().Patch(ctx, "v1."+boltGV.Group, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	other, err := newFixtureCA()
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		what    string
		do      func()
		reason  string
		restore func()
	}{
		{"endpoints go", func() {
			if err := k.DiscoveryV1().EndpointSlices(ns).Delete(ctx, "bolts", metav1.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
		}, "EndpointsNotFound", func() { endpoints(t, k, ns, "bolts") }},
		{"the port is wrong", func() { change(`{"spec":{"service":{"port":444}}}`) }, "ServicePortError", func() { change(`{"spec":{"service":{"port":443}}}`) }},
		{"its certificate is of another CA", func() {
			change(fmt.Sprintf(`{"spec":{"insecureSkipTLSVerify":null,"caBundle":%q}}`, base64Of(other.CertPEM())))
		}, "FailedDiscoveryCheck", func() { change(fmt.Sprintf(`{"spec":{"caBundle":%q}}`, base64Of(ext.ca))) }},
	} {
		step.do()
		awaitAvailable(t, step.reason)
		eventually(t, func(context.Context) error {
			if err := list(); !apierrors.IsServiceUnavailable(err) {
				return fmt.Errorf("%s: list: %v", step.what, err)
			}
			return nil
		})
		checkDiscoveryWithout(t, k, step.what)
		step.restore()
		awaitAvailable(t, "Passed")
		eventually(t, func(context.Context) error { return list() })
	}
	if err := registrations(t).ApiregistrationV1().APIServices().Delete(ctx, "v1."+boltGV.Group, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func(context.Context) error {
		if err := list(); !apierrors.IsNotFound(err) {
			return fmt.Errorf("without registration: %v", err)
		}
		return nil
	})
}

// checkDiscoveryWithout says that discovery gives everything but the group of bolts, which it names as missing.
func checkDiscoveryWithout(t *testing.T, k kubernetes.Interface, what string) {
	t.Helper()
	_, lists, err := k.Discovery().ServerGroupsAndResources()
	var failed *discovery.ErrGroupDiscoveryFailed
	if err != nil && (!errors.As(err, &failed) || len(failed.Groups) != 1 || failed.Groups[boltGV] == nil) {
		t.Errorf("%s: discovery: %v", what, err)
	}
	if len(lists) < 20 {
		t.Errorf("%s: discovery shows %d group versions", what, len(lists))
	}
}
