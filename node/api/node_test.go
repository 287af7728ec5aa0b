package api

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"skein.io/skein/gossip/identity"
)

// joined gives a client with the certificate of a node, after making its Node object.
func joined(t *testing.T, name string) kubernetes.Interface {
	t.Helper()
	k := client(t, cluster.as(cluster.servers[0], "system:node:"+name, "system:nodes"))
	makeNode(t, k, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}})
	return k
}

func bound(t *testing.T, k kubernetes.Interface, ns, name, node string, change func(*corev1.PodSpec)) *corev1.Pod {
	t.Helper()
	p := simplePod(name)
	p.Spec.NodeName = node
	if change != nil {
		change(&p.Spec)
	}
	p, err := k.CoreV1().Pods(ns).Create(t.Context(), p, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// A node sees what its pods need, what its datapath needs, and nothing else.
func TestNodeRights(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	one, two := joined(t, "right-1"), joined(t, "right-2")
	for _, name := range []string{"mine", "other", "env"} {
		if _, err := k.CoreV1().Secrets(ns).Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	pod := bound(t, k, ns, "p", "right-1", func(s *corev1.PodSpec) {
		s.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "mine"}}}}
		s.Containers[0].EnvFrom = []corev1.EnvFromSource{{SecretRef: &corev1.SecretEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "env"}}}}
	})
	foreign := bound(t, k, ns, "q", "right-2", nil)
	get := func(c kubernetes.Interface, name string) error {
		_, err := c.CoreV1().Secrets(ns).Get(ctx, name, metav1.GetOptions{})
		return err
	}
	for _, name := range []string{"mine", "env"} {
		eventually(t, func(context.Context) error { return get(one, name) })
		if err := get(two, name); !apierrors.IsForbidden(err) {
			t.Errorf("%s for a node without the pod: %v", name, err)
		}
	}
	if err := get(one, "other"); !apierrors.IsForbidden(err) {
		t.Errorf("a secret that no pod uses: %v", err)
	}
	w, err := one.CoreV1().Secrets(ns).Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=mine"})
	if err != nil {
		t.Errorf("watch of one secret: %v", err)
	} else {
		w.Stop()
	}
	if _, err := one.CoreV1().Secrets(ns).List(ctx, metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("all secrets: %v", err)
	}
	// What the datapath and DNS follow.
	for what, list := range map[string]func() error{
		"services": func() error { _, err := one.CoreV1().Services("").List(ctx, metav1.ListOptions{}); return err },
		"endpoint slices": func() error {
			_, err := one.DiscoveryV1().EndpointSlices("").List(ctx, metav1.ListOptions{})
			return err
		},
		"nodes": func() error { _, err := one.CoreV1().Nodes().List(ctx, metav1.ListOptions{}); return err },
		"own pods": func() error {
			l, err := one.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=right-1"})
			if err == nil && len(l.Items) != 1 {
				err = fmt.Errorf("%d pods", len(l.Items))
			}
			return err
		},
		"own status": func() error {
			p := pod.DeepCopy()
			p.Status.Phase = corev1.PodRunning
			_, err := one.CoreV1().Pods(ns).UpdateStatus(ctx, p, metav1.UpdateOptions{})
			return err
		},
		"token for its pod": func() error {
			_, err := one.CoreV1().ServiceAccounts(ns).CreateToken(ctx, "default", &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
				BoundObjectRef: &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: "p", UID: pod.UID}}}, metav1.CreateOptions{})
			return err
		},
	} {
		if err := list(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	for what, do := range map[string]func() error{
		"status of another node's pod": func() error {
			_, err := one.CoreV1().Pods(ns).UpdateStatus(ctx, foreign, metav1.UpdateOptions{})
			return err
		},
		"another node": func() error {
			_, err := one.CoreV1().Nodes().Patch(ctx, "right-2", "application/merge-patch+json", []byte(`{"metadata":{"labels":{"a":"b"}}}`), metav1.PatchOptions{})
			return err
		},
		"pods of another node": func() error {
			_, err := one.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=right-2"})
			return err
		},
		"token for another node's pod": func() error {
			_, err := one.CoreV1().ServiceAccounts(ns).CreateToken(ctx, "default", &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
				BoundObjectRef: &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: "q", UID: foreign.UID}}}, metav1.CreateOptions{})
			return err
		},
	} {
		if err := do(); !apierrors.IsForbidden(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	// With its pod the node loses the right.
	zero := int64(0)
	if err := k.CoreV1().Pods(ns).Delete(ctx, "p", metav1.DeleteOptions{GracePeriodSeconds: &zero}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func(context.Context) error {
		if err := get(one, "mine"); !apierrors.IsForbidden(err) {
			return fmt.Errorf("after its pod went: %v", err)
		}
		return nil
	})
}

// agent is a TLS server like a node's.
func agent(t *testing.T, ca *identity.Authority, name string, h http.Handler) netip.AddrPort {
	t.Helper()
	key, err := identity.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	der, err := identity.NewNodeCSR(key, name)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	// The address in the certificate is not the one that is called.
	crt, err := ca.SignNode(csr, name, []netip.Addr{netip.MustParseAddr("198.51.100.1")}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(cluster.ca.Cert)
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{crt.Raw}, PrivateKey: key}},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool})
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h, ErrorLog: log.New(io.Discard, "", 0)}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	t.Cleanup(func() {
		srv.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return netip.MustParseAddrPort(l.Addr().String())
}

// reachable makes a Node whose agent is at addr.
func reachable(t *testing.T, k kubernetes.Interface, name string, addr netip.AddrPort) {
	t.Helper()
	joined(t, name)
	n, err := k.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: addr.Addr().String()}}
	n.Status.DaemonEndpoints.KubeletEndpoint.Port = int32(addr.Port())
	if _, err := k.CoreV1().Nodes().UpdateStatus(t.Context(), n, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// Requests for logs go to the node's agent, over TLS where each proves who it is; the address in the
// certificate does not matter, the name does.
func TestLogsComeFromTheAgent(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	foreign, err := newFixtureCA()
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, certName string
		ca             *identity.Authority
		want           string
	}{
		{"agent-1", "agent-1", cluster.ca, "agent-1 /containerLogs/" + ns + "/agent-1/c?tailLines=3 by " + AgentClientUser},
		{"agent-2", "agent-1", cluster.ca, `certificate is for \"system:node:agent-1\", not \"system:node:agent-2\"`},
		{"agent-3", "agent-3", foreign, "certificate signed by unknown authority"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			reachable(t, k, tc.name, agent(t, tc.ca, tc.certName, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				fmt.Fprintf(w, "%s %s by %s", tc.certName, r.URL, r.TLS.PeerCertificates[0].Subject.CommonName)
			})))
			bound(t, k, ns, tc.name, tc.name, nil)
			three := int64(3)
			b, err := k.CoreV1().Pods(ns).GetLogs(tc.name, &corev1.PodLogOptions{TailLines: &three}).DoRaw(ctx)
			if got := fmt.Sprint(string(b), err); !strings.Contains(got, tc.want) {
				t.Fatalf("got %s\nwant %s", got, tc.want)
			}
		})
	}
}

// An upgrade (exec, attach, port-forward) is passed through to the agent byte by byte.
func TestExecReachesTheAgent(t *testing.T) {
	k := admin(t)
	ns := namespace(t, k)
	reachable(t, k, "exec-1", agent(t, cluster.ca, "exec-1", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasPrefix(r.URL.Path, "/exec/") || r.URL.Query().Get("command") != "ls" {
			http.Error(w, r.URL.String(), http.StatusTeapot)
			return
		}
		conn, rw, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n")
		_, _ = io.Copy(conn, rw)
	})))
	bound(t, k, ns, "p", "exec-1", nil)
	conn := dialTLS(t, cluster.as(cluster.servers[0], "admin", "system:masters"))
	fmt.Fprintf(conn, "POST /api/v1/namespaces/%s/pods/p/exec?command=ls&container=c&stdout=1 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\nContent-Length: 0\r\n\r\n", ns)
	buf := make([]byte, 4096)
	read, err := conn.Read(buf)
	if err != nil || !strings.HasPrefix(string(buf[:read]), "HTTP/1.1 101") {
		t.Fatalf("got %q, %v", buf[:read], err)
	}
	fmt.Fprint(conn, "ping")
	if _, err := io.ReadFull(conn, buf[:4]); err != nil || string(buf[:4]) != "ping" {
		t.Fatalf("echo %q, %v", buf[:4], err)
	}
}
