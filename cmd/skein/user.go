package main

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"skein.io/skein/gossip/identity"
)

const (
	// signWait is how long the leader may take to sign; a new one needs a second or two.
	signWait = 30 * time.Second
	signPoll = 100 * time.Millisecond
)

// userKubeconfig turns an administrator's kubeconfig into one of another user: a key is made here, and the API asked for a certificate,
// as by anybody else.
func userKubeconfig(ctx context.Context, admin []byte, user string, groups []string, life time.Duration) ([]byte, error) {
	c, err := clientcmd.Load(admin)
	if err != nil {
		return nil, fmt.Errorf("the administrator's kubeconfig: %w", err)
	}
	rc, err := clientcmd.NewDefaultClientConfig(*c, nil).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("the administrator's kubeconfig: %w", err)
	}
	k, err := kubernetes.NewForConfig(rc)
	if err != nil {
		return nil, err
	}
	key, err := identity.NewKey()
	if err != nil {
		return nil, err
	}
	keyPEM, err := identity.EncodeKey(key)
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: user, Organization: groups}}, key)
	if err != nil {
		return nil, fmt.Errorf("certificate request for %q: %w", user, err)
	}
	cert, err := signed(ctx, k, der, life)
	if err != nil {
		return nil, fmt.Errorf("certificate for %q: %w", user, err)
	}
	for name := range c.AuthInfos {
		c.AuthInfos[name] = &clientcmdapi.AuthInfo{ClientCertificateData: cert, ClientKeyData: keyPEM}
	}
	return clientcmd.Write(*c)
}

// signed asks for a certificate, approves the request as the administrator, and removes it when it has been answered.
func signed(ctx context.Context, k kubernetes.Interface, der []byte, life time.Duration) ([]byte, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, signWait, fmt.Errorf("not signed within %s: no node leads the cluster", signWait))
	defer cancel()
	api, seconds := k.CertificatesV1().CertificateSigningRequests(), int32(life/time.Second)
	csr, err := api.Create(ctx, &certificatesv1.CertificateSigningRequest{ObjectMeta: metav1.ObjectMeta{GenerateName: "skein-kubeconfig-"},
		Spec: certificatesv1.CertificateSigningRequestSpec{Request: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}),
			SignerName: certificatesv1.KubeAPIServerClientSignerName, ExpirationSeconds: &seconds,
			Usages: []certificatesv1.KeyUsage{certificatesv1.UsageClientAuth, certificatesv1.UsageDigitalSignature}}}, metav1.CreateOptions{})
	if err != nil {
		return nil, err
	}
	defer func() { // what is left is cleared away by the cluster within the hour
		_ = api.Delete(context.WithoutCancel(ctx), csr.Name, metav1.DeleteOptions{})
	}()
	csr.Status.Conditions = append(csr.Status.Conditions, certificatesv1.CertificateSigningRequestCondition{Type: certificatesv1.CertificateApproved,
		Status: corev1.ConditionTrue, Reason: "SkeinKubeconfig", Message: "asked for by an administrator on the command line"})
	if _, err := api.UpdateApproval(ctx, csr.Name, csr, metav1.UpdateOptions{}); err != nil {
		return nil, err
	}
	for {
		now, err := api.Get(ctx, csr.Name, metav1.GetOptions{})
		if err != nil && ctx.Err() == nil {
			return nil, err
		}
		if err == nil {
			for _, c := range now.Status.Conditions {
				if c.Type == certificatesv1.CertificateFailed {
					return nil, errors.New(c.Message)
				}
			}
			if len(now.Status.Certificate) > 0 {
				return now.Status.Certificate, nil
			}
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(signPoll):
		}
	}
}
