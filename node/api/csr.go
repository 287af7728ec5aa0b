package api

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	capihelper "k8s.io/kubernetes/pkg/apis/certificates"
	"k8s.io/kubernetes/pkg/controller/certificates"
	"k8s.io/kubernetes/pkg/controller/certificates/approver"
	"k8s.io/kubernetes/pkg/controller/certificates/authority"
	"k8s.io/kubernetes/pkg/controller/certificates/cleaner"
)

const (
	// maxCertLife is the longest life of a certificate that is signed on request; upstream's default.
	maxCertLife = 365 * 24 * time.Hour
	// minCertLife is the shortest, whatever was asked for; upstream's.
	minCertLife = 10 * time.Minute
	// certBackdate and certShort are upstream's: clocks differ, and a certificate of less than certShort gets its whole life.
	certBackdate = 5 * time.Minute
	certShort    = 8 * time.Hour
	// csrWorkers is how many requests are worked on at once.
	csrWorkers = 2
)

// runCertificates approves what upstream's approver would, signs what was approved for upstream's four signers, and clears old requests
// away, until ctx ends. Upstream's controllers do it, but for the signer, whose own wants the CA's key in a file.
func runCertificates(ctx context.Context, client kubernetes.Interface, f informers.SharedInformerFactory, ca *authority.CertificateAuthority) func() {
	view := f.Certificates().V1().CertificateSigningRequests()
	approve := approver.NewCSRApprovingController(ctx, client, view)
	sign := certificates.NewCertificateController(ctx, "csrsigning", client, view, (&csrSigner{client, ca, time.Now}).handle)
	clean := cleaner.NewCSRCleanerController(client.CertificatesV1().CertificateSigningRequests(), view)
	var wg sync.WaitGroup
	wg.Go(func() { approve.Run(ctx, csrWorkers) })
	wg.Go(func() { sign.Run(ctx, csrWorkers) })
	wg.Go(func() {
		// It looks once an hour, at once for the first time.
		select {
		case <-view.Informer().HasSyncedChecker().Done():
			clean.Run(ctx, 1)
		case <-ctx.Done():
		}
	})
	return wg.Wait
}

// newSigner gives the CA for requests; nil when there is no key.
func newSigner(cfg *Config) (*authority.CertificateAuthority, error) {
	if cfg.CAKey == nil {
		return nil, nil
	}
	block, _ := pem.Decode(cfg.ClientCA)
	if block == nil {
		return nil, errors.New("ClientCA has no certificate in PEM")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("ClientCA: %w", err)
	}
	return &authority.CertificateAuthority{Certificate: cert, PrivateKey: cfg.CAKey}, nil
}

// csrSigner signs approved requests as upstream's signers do, and refuses the same.
type csrSigner struct {
	client kubernetes.Interface
	ca     *authority.CertificateAuthority
	now    func() time.Time
}

func (s *csrSigner) handle(ctx context.Context, csr *certificatesv1.CertificateSigningRequest) error {
	if !certificates.IsCertificateRequestApproved(csr) || certificates.HasTrueCondition(csr, certificatesv1.CertificateFailed) || len(csr.Status.Certificate) > 0 {
		return nil
	}
	api := s.client.CertificatesV1().CertificateSigningRequests()
	request, err := capihelper.ParseCSR(csr.Spec.Request)
	if err != nil {
		return fmt.Errorf("certificate request %s: %w", csr.Name, err)
	}
	known, err := signable(request, csr.Spec.Usages, csr.Spec.SignerName)
	switch {
	case err != nil:
		csr.Status.Conditions = append(csr.Status.Conditions, certificatesv1.CertificateSigningRequestCondition{Type: certificatesv1.CertificateFailed,
			Status: corev1.ConditionTrue, Reason: "SignerValidationFailure", Message: err.Error(), LastUpdateTime: metav1.Time{Time: s.now()}})
	case !known:
		return nil // another signer's
	default:
		der, err := s.ca.Sign(request.Raw, authority.PermissiveSigningPolicy{TTL: certLife(csr.Spec.ExpirationSeconds), Usages: csr.Spec.Usages,
			Backdate: certBackdate, Short: certShort, Now: s.now})
		if err != nil {
			return fmt.Errorf("sign certificate request %s: %w", csr.Name, err)
		}
		csr.Status.Certificate = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	}
	if _, err := api.UpdateStatus(ctx, csr, metav1.UpdateOptions{}); err != nil {
		return fmt.Errorf("status of certificate request %s: %w", csr.Name, err)
	}
	return nil
}

func certLife(seconds *int32) time.Duration {
	if seconds == nil {
		return maxCertLife
	}
	return min(max(time.Duration(*seconds)*time.Second, minCertLife), maxCertLife)
}

// legacyUnknown is the signer that signs what it is asked to.
const legacyUnknown = "kubernetes.io/legacy-unknown"

// errNodesJoin keeps requests from making members of the cluster: with a certificate for both ends of a connection, whoever holds it
// could speak to the store.
var errNodesJoin = errors.New("a certificate of group " + user.NodesGroup + " is not given for the signer " + legacyUnknown + ": nodes get theirs when they join")

// signable tells whether a signer of ours is meant, and what it has against the request.
func signable(r *x509.CertificateRequest, usages []certificatesv1.KeyUsage, signer string) (known bool, err error) {
	set := sets.New[string]()
	for _, u := range usages {
		set.Insert(string(u))
	}
	switch signer {
	case certificatesv1.KubeletServingSignerName:
		return true, capihelper.ValidateKubeletServingCSR(r, sets.NewString(set.UnsortedList()...))
	case certificatesv1.KubeAPIServerClientKubeletSignerName:
		return true, capihelper.ValidateKubeletClientCSR(r, sets.NewString(set.UnsortedList()...))
	case certificatesv1.KubeAPIServerClientSignerName:
		return true, clientUsages(usages)
	case legacyUnknown:
		if slices.Contains(r.Subject.Organization, user.NodesGroup) {
			return true, errNodesJoin
		}
		return true, nil
	}
	return false, nil
}

func clientUsages(usages []certificatesv1.KeyUsage) error {
	for _, u := range usages {
		switch u {
		case certificatesv1.UsageDigitalSignature, certificatesv1.UsageKeyEncipherment, certificatesv1.UsageClientAuth:
		default:
			return fmt.Errorf("invalid usage for client certificate: %s", u)
		}
	}
	if !slices.Contains(usages, certificatesv1.UsageClientAuth) {
		return fmt.Errorf("missing required usage for client certificate: %s", certificatesv1.UsageClientAuth)
	}
	return nil
}
