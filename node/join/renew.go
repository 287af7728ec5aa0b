package join

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"time"

	"skein.io/skein/gossip/identity"
)

// renewRequest asks for a new certificate for an enrolled key. The certificate request in it is signed by that key, which is all the
// proof that is needed, so a node whose certificate has expired can ask too. Whoever repeats it gets a certificate without its key.
type renewRequest struct {
	Version int          `json:"version"`
	Name    string       `json:"name"`
	IPs     []netip.Addr `json:"ips"`
	CSR     []byte       `json:"csr"` // DER
}

type renewAnswer struct {
	Version     int    `json:"version"`
	Certificate string `json:"certificate"` // PEM
}

// Renew asks the API at address (host:port; any node's front) for a new certificate of this node for its addresses. Errors are as of
// [Join]; ErrNotEnrolled is final.
func Renew(ctx context.Context, id *identity.Identity, ips []netip.Addr, address string) (*x509.Certificate, error) {
	fail := func(err error) (*x509.Certificate, error) {
		return nil, fmt.Errorf("renew the certificate of node %s through %s: %w", id.Name, address, err)
	}
	csr, err := identity.NewNodeCSR(id.Key, id.Name)
	if err != nil {
		return fail(err)
	}
	body, err := json.Marshal(renewRequest{Version: wireVersion, Name: id.Name, IPs: ips, CSR: csr})
	if err != nil {
		return fail(err)
	}
	conn, err := dial(ctx, address, identity.Token{CAHash: identity.CertHash(id.CA)})
	if err != nil {
		return fail(err)
	}
	defer conn.Close()
	raw, err := exchange(ctx, conn, http.MethodPost, RenewPath, body)
	if err != nil {
		return fail(err)
	}
	var a renewAnswer
	if err := json.Unmarshal(raw, &a); err != nil || a.Version != wireVersion {
		return fail(fmt.Errorf("%w: its answer cannot be read", ErrUnavailable))
	}
	cert, err := identity.ParseCert([]byte(a.Certificate))
	if err != nil {
		return fail(fmt.Errorf("%w: %w", ErrUnavailable, err))
	}
	return cert, nil
}

// Renewal is the handler of [RenewPath].
func (s *Server) Renewal() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			w.Header().Set("Allow", http.MethodPost)
			http.Error(w, "only POST renews", http.StatusMethodNotAllowed)
			return
		}
		from := sourceOf(r)
		select {
		case s.slots <- struct{}{}:
			defer func() { <-s.slots }()
		default:
			s.refuse(w, from, "", fmt.Errorf("%w: %d machines are asking at this moment; try again in a few seconds", ErrUnavailable, maxAtOnce))
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), handleTimeout)
		defer cancel()
		_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(readTimeout)) // see ServeHTTP
		var ask renewRequest
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest)).Decode(&ask); err != nil || ask.Version != wireVersion {
			s.refuse(w, from, "", fmt.Errorf("%w: it cannot be read, or has another version than %d", ErrBadRequest, wireVersion))
			return
		}
		cert, err := s.renew(ctx, ask)
		if err != nil {
			s.refuse(w, from, ask.Name, err)
			return
		}
		s.cfg.Logger.Info("certificate renewed", "node", ask.Name, "from", from.String(), "until", cert.NotAfter)
		writeJSON(w, http.StatusOK, renewAnswer{Version: wireVersion, Certificate: string(identity.EncodeCert(cert))})
	})
}

func (s *Server) renew(ctx context.Context, ask renewRequest) (*x509.Certificate, error) {
	ca := s.cfg.Authority()
	if ca == nil {
		return nil, fmt.Errorf("%w: this node does not hold the cluster's CA", ErrUnavailable)
	}
	csr, err := x509.ParseCertificateRequest(ask.CSR)
	if err != nil {
		return nil, fmt.Errorf("%w: its certificate request cannot be read: %w", ErrBadRequest, err)
	}
	// The request's own signature is checked by SignNode; nothing leaves before.
	keyHash, err := identity.KeyHash(csr.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBadRequest, err)
	}
	if err := s.cfg.Tokens.Enrolled(ctx, ask.Name, keyHash); err != nil {
		return nil, err
	}
	info, err := s.cfg.Info(ctx)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if _, err := s.checkPlace(ctx, request{Name: ask.Name, IPs: ask.IPs}, info.Cluster); err != nil {
		return nil, err
	}
	cert, err := ca.SignNode(csr, ask.Name, ask.IPs, s.cfg.Now())
	if errors.Is(err, identity.ErrBadCSR) {
		err = fmt.Errorf("%w: %w", ErrBadRequest, err)
	}
	return cert, err
}
