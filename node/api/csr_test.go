package api

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"skein.io/skein/gossip/identity"
)

// ask asks for a certificate and returns the key that it is for.
func ask(t *testing.T, k kubernetes.Interface, name, signer string, template x509.CertificateRequest, seconds *int32, usages ...certificatesv1.KeyUsage) (*ecdsa.PrivateKey, error) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &template, key)
	if err != nil {
		t.Fatal(err)
	}
	_, err = k.CertificatesV1().CertificateSigningRequests().Create(t.Context(), &certificatesv1.CertificateSigningRequest{ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: certificatesv1.CertificateSigningRequestSpec{Request: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}),
			SignerName: signer, ExpirationSeconds: seconds, Usages: usages}}, metav1.CreateOptions{})
	return key, err
}

// request is ask, which works.
func request(t *testing.T, k kubernetes.Interface, name, signer string, template x509.CertificateRequest, seconds *int32, usages ...certificatesv1.KeyUsage) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ask(t, k, name, signer, template, seconds, usages...)
	if err != nil {
		t.Fatalf("request %s: %v", name, err)
	}
	return key
}

func approve(t *testing.T, k kubernetes.Interface, name string) error {
	t.Helper()
	api := k.CertificatesV1().CertificateSigningRequests()
	csr, err := api.Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(csr.Status.Conditions) > 0 {
		return nil // the approver was faster
	}
	csr.Status.Conditions = append(csr.Status.Conditions, certificatesv1.CertificateSigningRequestCondition{Type: certificatesv1.CertificateApproved, Status: corev1.ConditionTrue, Reason: "Test"})
	if _, err = api.UpdateApproval(t.Context(), name, csr, metav1.UpdateOptions{}); apierrors.IsConflict(err) {
		return approve(t, k, name)
	}
	return err
}

// issued waits for the certificate of a request, or for the reason why there is none.
func issued(t *testing.T, k kubernetes.Interface, name string) (cert *x509.Certificate, failed string) {
	t.Helper()
	eventually(t, func(ctx context.Context) error {
		csr, err := k.CertificatesV1().CertificateSigningRequests().Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, c := range csr.Status.Conditions {
			if c.Type == certificatesv1.CertificateFailed {
				failed = c.Reason + ": " + c.Message
				return nil
			}
		}
		block, _ := pem.Decode(csr.Status.Certificate)
		if block == nil {
			return fmt.Errorf("request %s has no certificate yet: %+v", name, csr.Status)
		}
		cert, err = x509.ParseCertificate(block.Bytes)
		return err
	})
	return cert, failed
}

func subject(cn string, orgs ...string) x509.CertificateRequest {
	return x509.CertificateRequest{Subject: pkix.Name{CommonName: cn, Organization: orgs}}
}

// A user's certificate: asked for, approved, signed, and good for the API.
func TestCertificateForAUser(t *testing.T) {
	k := admin(t)
	key := request(t, k, "jane", certificatesv1.KubeAPIServerClientSignerName, subject("jane", "devs"), ptr(int32(3600)), certificatesv1.UsageClientAuth, certificatesv1.UsageDigitalSignature)
	if err := approve(t, k, "jane"); err != nil {
		t.Fatal(err)
	}
	cert, failed := issued(t, k, "jane")
	if failed != "" {
		t.Fatal(failed)
	}
	if life := time.Until(cert.NotAfter); life > time.Hour || life < 50*time.Minute {
		t.Errorf("asked for an hour, got one until %s", cert.NotAfter)
	}
	c := cluster.anonymous(cluster.servers[1])
	pemKey, err := identity.EncodeKey(key)
	if err != nil {
		t.Fatal(err)
	}
	c.CertData, c.KeyData = identity.EncodeCert(cert), pemKey
	_, err = client(t, c).CoreV1().Nodes().List(t.Context(), metav1.ListOptions{})
	if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), `User "jane"`) {
		t.Errorf("the holder is: %v", err)
	}
}

// Each of upstream's signers signs what it is for, and says why not otherwise.
func TestSigners(t *testing.T) {
	k := admin(t)
	client, server, sig := certificatesv1.UsageClientAuth, certificatesv1.UsageServerAuth, certificatesv1.UsageDigitalSignature
	serving := func(r x509.CertificateRequest) x509.CertificateRequest {
		r.DNSNames, r.IPAddresses = []string{"n7"}, []net.IP{net.IPv4(10, 0, 0, 7)}
		return r
	}
	for name, c := range map[string]struct {
		signer  string
		request x509.CertificateRequest
		usages  []certificatesv1.KeyUsage
		failed  string
	}{
		"kubelet-client":           {certificatesv1.KubeAPIServerClientKubeletSignerName, subject("system:node:n7", "system:nodes"), []certificatesv1.KeyUsage{client, sig}, ""},
		"kubelet-client-user":      {certificatesv1.KubeAPIServerClientKubeletSignerName, subject("n7", "system:nodes"), []certificatesv1.KeyUsage{client, sig}, "does not begin with"},
		"kubelet-client-server":    {certificatesv1.KubeAPIServerClientKubeletSignerName, subject("system:node:n7", "system:nodes"), []certificatesv1.KeyUsage{client, server, sig}, "usages did not match"},
		"kubelet-serving":          {certificatesv1.KubeletServingSignerName, serving(subject("system:node:n7", "system:nodes")), []certificatesv1.KeyUsage{server, sig}, ""},
		"kubelet-serving-nameless": {certificatesv1.KubeletServingSignerName, subject("system:node:n7", "system:nodes"), []certificatesv1.KeyUsage{server, sig}, "DNS or IP"},
		"client-server":            {certificatesv1.KubeAPIServerClientSignerName, subject("x"), []certificatesv1.KeyUsage{client, server}, "invalid usage"},
		"client-no-client":         {certificatesv1.KubeAPIServerClientSignerName, subject("x"), []certificatesv1.KeyUsage{sig}, "missing required usage"},
	} {
		t.Run(name, func(t *testing.T) {
			request(t, k, name, c.signer, c.request, nil, c.usages...)
			if err := approve(t, k, name); err != nil {
				t.Fatal(err)
			}
			cert, failed := issued(t, k, name)
			if c.failed != "" {
				if !strings.Contains(failed, c.failed) || !strings.HasPrefix(failed, "SignerValidationFailure") {
					t.Errorf("failed for %q, want %q", failed, c.failed)
				}
				return
			}
			if failed != "" {
				t.Fatal(failed)
			}
			if err := cert.CheckSignatureFrom(cluster.ca.Cert); err != nil || cert.IsCA || cert.Subject.CommonName != c.request.Subject.CommonName || len(cert.DNSNames) != len(c.request.DNSNames) {
				t.Errorf("the certificate is for %s %v: %v", cert.Subject, cert.DNSNames, err)
			}
			if life := cert.NotAfter.Sub(cert.NotBefore); life > maxCertLife {
				t.Errorf("it lives for %s", life)
			}
		})
	}
	// Somebody else's signer is left alone, and a signed request is not signed again.
	request(t, k, "others", "example.com/signer", subject("x"), nil, client)
	if err := approve(t, k, "others"); err != nil {
		t.Fatal(err)
	}
	request(t, k, "after", certificatesv1.KubeAPIServerClientSignerName, subject("x"), nil, client)
	if err := approve(t, k, "after"); err != nil {
		t.Fatal(err)
	}
	issued(t, k, "after") // by then the signer has seen the one before
	if csr, err := k.CertificatesV1().CertificateSigningRequests().Get(t.Context(), "others", metav1.GetOptions{}); err != nil || len(csr.Status.Certificate) > 0 || len(csr.Status.Conditions) != 1 {
		t.Errorf("another's request is %+v, %v", csr.Status, err)
	}
}

// A node renews its certificate by itself when it may, a bootstrap token gets a node's first one when it may; others wait for a person.
func TestApprovalOfNodes(t *testing.T) {
	ctx, k, s := t.Context(), admin(t), cluster.servers[0]
	usages := []certificatesv1.KeyUsage{certificatesv1.UsageClientAuth, certificatesv1.UsageDigitalSignature}
	node := client(t, cluster.as(s, "system:node:n8", "system:nodes"))
	request(t, node, "renew-early", certificatesv1.KubeAPIServerClientKubeletSignerName, subject("system:node:n8", "system:nodes"), nil, usages...)

	b := roleBinding("system:certificates.k8s.io:certificatesigningrequests:selfnodeclient", "Group", "system:nodes")
	crb, err := k.RbacV1().ClusterRoleBindings().Create(ctx, clusterRoleBinding("renew-nodes", b.RoleRef.Name, "Group", "system:nodes"), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = k.RbacV1().ClusterRoleBindings().Delete(context.WithoutCancel(ctx), crb.Name, metav1.DeleteOptions{})
	})
	n := 0
	eventually(t, func(ctx context.Context) error { // the authorizer has to hear of the binding first: the approver tries again by itself, more and more slowly
		n++
		name := fmt.Sprintf("renew-%d", n)
		request(t, node, name, certificatesv1.KubeAPIServerClientKubeletSignerName, subject("system:node:n8", "system:nodes"), nil, usages...)
		time.Sleep(50 * time.Millisecond)
		csr, err := k.CertificatesV1().CertificateSigningRequests().Get(ctx, name, metav1.GetOptions{})
		if err == nil && len(csr.Status.Certificate) == 0 {
			err = fmt.Errorf("%s: %+v", name, csr.Status)
		}
		return err
	})
	// Not for another node, and not for a user.
	if _, err := ask(t, node, "steal", certificatesv1.KubeAPIServerClientKubeletSignerName, subject("system:node:n9", "system:nodes"), nil, usages...); !apierrors.IsForbidden(err) {
		t.Errorf("a node asks in the name of another: %v", err)
	}
	alice := client(t, cluster.as(s, "alice"))
	grant(t, k, alice, "alice", rule("create", "certificates.k8s.io", "certificatesigningrequests"), rule("update,get", "certificates.k8s.io", "certificatesigningrequests/approval", "certificatesigningrequests"))
	request(t, alice, "wish", certificatesv1.KubeAPIServerClientKubeletSignerName, subject("system:node:n9", "system:nodes"), nil, usages...)
	if csr, err := k.CertificatesV1().CertificateSigningRequests().Get(ctx, "wish", metav1.GetOptions{}); err != nil || len(csr.Status.Conditions) > 0 {
		t.Errorf("her request: %+v, %v", csr.Status, err)
	}
	// Whoever may approve for one signer may not for another; and a certificate for administrators is not asked for at all.
	if err := approve(t, alice, "wish"); !apierrors.IsForbidden(err) {
		t.Errorf("alice approves: %v", err)
	}
	_, err = ask(t, k, "masters", certificatesv1.KubeAPIServerClientSignerName, subject("root", "system:masters"), nil, usages...)
	if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "system:masters") {
		t.Errorf("a certificate of system:masters: %v", err)
	}
}

// What the API signs in a node's name is good for the API, not for being a member of the cluster.
func TestSignedNodesAreNoMembers(t *testing.T) {
	k := admin(t)
	request(t, k, "member", certificatesv1.KubeAPIServerClientKubeletSignerName, subject("system:node:n1", "system:nodes"), nil, certificatesv1.UsageClientAuth, certificatesv1.UsageDigitalSignature)
	if err := approve(t, k, "member"); err != nil {
		t.Fatal(err)
	}
	cert, failed := issued(t, k, "member")
	if failed != "" {
		t.Fatal(failed)
	}
	if name, err := identity.PeerNode(tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert}}); err == nil {
		t.Errorf("with a certificate from the API one is node %s", name)
	}
}

// The API of this version takes no requests for the legacy signer, but what it once took is signed, whatever it asks for: nodes excepted.
func TestLegacySigner(t *testing.T) {
	usages := []certificatesv1.KeyUsage{certificatesv1.UsageClientAuth, certificatesv1.UsageServerAuth}
	for org, want := range map[string]error{"anybody": nil, "system:nodes": errNodesJoin} {
		r := subject("x", org)
		if known, err := signable(&r, usages, legacyUnknown); !known || !errors.Is(err, want) {
			t.Errorf("%s: %v, %v", org, known, err)
		}
	}
	for seconds, want := range map[int32]time.Duration{1: minCertLife, 3600: time.Hour, 1 << 30: maxCertLife} {
		if got := certLife(&seconds); got != want {
			t.Errorf("%d s: %s", seconds, got)
		}
	}
}

// Requests that nobody needs any more are cleared away when the leader begins, others stay.
func TestOldRequestsGo(t *testing.T) {
	k := admin(t)
	api := k.CertificatesV1().CertificateSigningRequests()
	const signer = "example.org/nobody"
	for name, age := range map[string]time.Duration{"denied-long-ago": 2 * time.Hour, "denied-just-now": 0} {
		request(t, k, name, signer, subject("x"), nil, certificatesv1.UsageClientAuth)
		csr, err := api.Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		csr.Status.Conditions = []certificatesv1.CertificateSigningRequestCondition{{Type: certificatesv1.CertificateDenied, Status: corev1.ConditionTrue, Reason: "Test",
			LastUpdateTime: metav1.NewTime(time.Now().Add(-age))}}
		if _, err := api.UpdateApproval(t.Context(), name, csr, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	request(t, k, "waits", signer, subject("x"), nil, certificatesv1.UsageClientAuth)
	ca, err := newSigner(cluster.servers[0].cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	f := informers.NewSharedInformerFactory(k, 0)
	wait := runCertificates(ctx, k, f, ca)
	f.StartWithContext(ctx)
	defer func() { cancel(); wait(); f.Shutdown() }()
	eventually(t, func(ctx context.Context) error {
		if _, err := api.Get(ctx, "denied-long-ago", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			return fmt.Errorf("a request that was denied two hours ago is still there: %w", err)
		}
		return nil
	})
	for _, name := range []string{"denied-just-now", "waits"} {
		if _, err := api.Get(t.Context(), name, metav1.GetOptions{}); err != nil {
			t.Errorf("request %s: %v", name, err)
		}
	}
}
