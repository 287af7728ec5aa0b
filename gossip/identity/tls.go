package identity

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

var (
	// ErrNotNode says that a peer's certificate is good but no node's.
	ErrNotNode = errors.New("the peer is not a node of this cluster")
	// ErrWrongPeer says that a node answered that is not the one that was called.
	ErrWrongPeer = errors.New("another node than the expected one answered")
	// ErrWrongCA says that a server does not belong to the cluster that a token pins.
	ErrWrongCA = errors.New("wrong cluster CA")
)

// present makes a configuration present the certificate in use at each handshake.
func (i *Identity) present(c *tls.Config) *tls.Config {
	c.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		cert := i.Certificate()
		return &cert, nil
	}
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c.GetCertificate(nil) }
	return c
}

// NodeServerTLS is for servers that only nodes may call: the client must show a certificate of this cluster's CA with the
// organisation [NodesGroup]. The chain that is presented includes the CA. Consensus uses it as it is.
func (i *Identity) NodeServerTLS() *tls.Config {
	return i.present(&tls.Config{
		MinVersion: tls.VersionTLS13,
		ClientAuth: tls.RequireAndVerifyClientCert,
		ClientCAs:  i.Pool(),
		VerifyConnection: func(state tls.ConnectionState) error {
			_, err := PeerNode(state)
			return err
		},
	})
}

// NodeClientTLS is for calls to another node: the server must show a certificate of this cluster's CA with the organisation
// [NodesGroup] and, unless expectName is empty, the name of that node. The address that was dialled does not matter: a node
// keeps its name when its address changes. Consensus uses it as it is.
func (i *Identity) NodeClientTLS(expectName string) *tls.Config {
	roots := i.Pool()
	return i.present(&tls.Config{
		MinVersion: tls.VersionTLS13,
		// The library's check needs a host name, which says nothing here; VerifyConnection does the whole check instead,
		// also for resumed sessions.
		InsecureSkipVerify: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			if err := verifyServer(state, roots, time.Now()); err != nil {
				return err
			}
			name, err := PeerNode(state)
			if err != nil {
				return err
			}
			if expectName != "" && name != expectName {
				return fmt.Errorf("%w: %q, expected %q", ErrWrongPeer, name, expectName)
			}
			return nil
		},
	})
}

// ServerTLS presents the node's certificate and asks clients for one without insisting: whoever shows one must have it from the
// cluster's CA, and what that client may do is the caller's business.
func (i *Identity) ServerTLS() *tls.Config {
	return i.present(&tls.Config{MinVersion: tls.VersionTLS13, ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: i.Pool()})
}

// PinnedTLS is for a client that knows nothing of the cluster but the hash of its CA: the server must present that CA in its
// chain, and a certificate that is valid under it. The handshake fails otherwise, before anything is sent; the error wraps
// [ErrWrongCA] when the server belongs to another cluster. Whether the server may be told a secret is another question: see
// [IsNodeCert].
func PinnedTLS(caHash [sha256.Size]byte) *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, // as in NodeClientTLS: replaced by VerifyConnection
		VerifyConnection: func(state tls.ConnectionState) error {
			return verifyPinned(state, caHash, time.Now())
		},
	}
}

func verifyPinned(state tls.ConnectionState, caHash [sha256.Size]byte, now time.Time) error {
	var seen []string
	for _, cert := range state.PeerCertificates {
		if !cert.IsCA {
			continue
		}
		hash := CertHash(cert)
		if hash == caHash {
			roots := x509.NewCertPool()
			roots.AddCert(cert)
			return verifyServer(state, roots, now)
		}
		seen = append(seen, shortHash(hash))
	}
	if len(seen) == 0 {
		return fmt.Errorf("%w: the server presents no CA certificate, the token pins %s: it is no Skein node, or something in between ends TLS",
			ErrWrongCA, shortHash(caHash))
	}
	return fmt.Errorf("%w: the server belongs to a cluster with CA %s, the token to one with CA %s",
		ErrWrongCA, strings.Join(seen, ", "), shortHash(caHash))
}

// shortHash is enough of a hash for people to compare.
func shortHash(h [sha256.Size]byte) string { return hex.EncodeToString(h[:6]) }

func verifyServer(state tls.ConnectionState, roots *x509.CertPool, now time.Time) error {
	if len(state.PeerCertificates) == 0 {
		return errors.New("the server presented no certificate")
	}
	intermediates := x509.NewCertPool()
	for _, cert := range state.PeerCertificates[1:] {
		intermediates.AddCert(cert)
	}
	_, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{
		Roots:         roots,
		Intermediates: intermediates,
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	if invalid := (x509.CertificateInvalidError{}); errors.As(err, &invalid) && invalid.Reason == x509.Expired {
		return fmt.Errorf("the server's certificate is not valid now (%s to %s, this machine's clock says %s): check the clocks: %w",
			invalid.Cert.NotBefore.UTC().Format(time.RFC3339), invalid.Cert.NotAfter.UTC().Format(time.RFC3339),
			now.UTC().Format(time.RFC3339), err)
	}
	if err != nil {
		return fmt.Errorf("the server's certificate does not verify under the cluster's CA: %w", err)
	}
	return nil
}

// PeerNode is the name of the node at the other end of a connection whose certificate was already verified, and is one that nodes
// get when they join. The error wraps [ErrNotNode].
func PeerNode(state tls.ConnectionState) (string, error) {
	if len(state.PeerCertificates) == 0 {
		return "", fmt.Errorf("%w: it showed no certificate", ErrNotNode)
	}
	leaf := state.PeerCertificates[0]
	name, ok := strings.CutPrefix(leaf.Subject.CommonName, NodePrefix)
	if !ok || !IsNodeCert(leaf) || !bothEnds(leaf) || ValidateName(name) != nil {
		return "", fmt.Errorf("%w: its certificate says %q", ErrNotNode, leaf.Subject)
	}
	return name, nil
}

// IsNodeCert tells whether a certificate of the cluster's CA is a node's, and not that of an API replica or of a user. A
// client that knows only the CA tells its secrets to API replicas, not to any node.
func IsNodeCert(leaf *x509.Certificate) bool {
	return slices.Contains(leaf.Subject.Organization, NodesGroup)
}

// bothEnds tells whether a certificate is for clients and for servers, as those that nodes get when they join. The API gives
// certificates for one end to whoever may ask for them in a node's name; these are good for the API, and not to be a member of the cluster.
func bothEnds(leaf *x509.Certificate) bool {
	return slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth) && slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
}
