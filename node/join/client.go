package join

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"skein.io/skein/gossip/identity"
)

const (
	dialTimeout   = 5 * time.Second  // TCP, and again TLS
	answerTimeout = 20 * time.Second // more than the server's own
	pause         = time.Second      // between two rounds over all addresses
	// DefaultPatience covers an election and a replica's start.
	DefaultPatience = 15 * time.Second
)

// Request is what a machine that wants to join knows.
type Request struct {
	// Addresses of nodes of the cluster, host or host:port (default [DefaultPort]); any one that answers is enough.
	Addresses []string
	Token     identity.Token
	// Name of the new node.
	Name string
	// IPs are the addresses under which the others reach this node; empty: the one from which it reached the cluster.
	IPs []netip.Addr
	// Key is the node's key, if it has one from a former join; nil makes one.
	Key *ecdsa.PrivateKey
	// Version of this binary, for people.
	Version string
	// Levels of the protocol; default identity.OwnLevels.
	Levels identity.Levels
	// Patience is for how long a cluster that answers, but cannot decide at the moment, is asked again; default
	// [DefaultPatience], negative: not at all.
	Patience time.Duration

	addresses []string // as host:port
}

func (r *Request) setDefaults() {
	if r.Levels == (identity.Levels{}) {
		r.Levels = identity.OwnLevels()
	}
	if r.Patience == 0 {
		r.Patience = DefaultPatience
	}
}

// Validate reports all faults at once.
func (r *Request) Validate() error {
	var errs []error
	if err := identity.ValidateName(r.Name); err != nil {
		errs = append(errs, err)
	}
	if len(r.Addresses) == 0 {
		errs = append(errs, fmt.Errorf("%w: it needs the address of at least one node of the cluster", ErrBadRequest))
	}
	if r.Token == (identity.Token{}) {
		errs = append(errs, fmt.Errorf("%w: it needs a token; `skein token create` on any node of the cluster prints one", ErrBadRequest))
	}
	r.addresses = nil
	for _, a := range r.Addresses {
		full, err := fullAddress(a)
		if err != nil {
			errs = append(errs, err)
		}
		r.addresses = append(r.addresses, full)
	}
	return errors.Join(errs...)
}

// fullAddress adds the default port.
func fullAddress(a string) (string, error) {
	bare := strings.TrimSuffix(strings.TrimPrefix(strings.TrimSpace(a), "https://"), "/")
	if ip, err := netip.ParseAddr(strings.Trim(bare, "[]")); err == nil { // IPv6 without a port has colons too
		return net.JoinHostPort(ip.String(), strconv.Itoa(DefaultPort)), nil
	}
	host, port, err := net.SplitHostPort(bare)
	if err != nil {
		host, port = bare, strconv.Itoa(DefaultPort)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	_, noIP := netip.ParseAddr(host)
	if err != nil || n == 0 || host == "" || noIP != nil && strings.ContainsAny(host, " /@:") {
		return "", fmt.Errorf("%w: %q is no address: host or host:port is expected", ErrBadRequest, a)
	}
	return net.JoinHostPort(host, port), nil
}

// Result is what else is known after a join.
type Result struct {
	Address string     // the node that answered
	LocalIP netip.Addr // this machine's address on the way there
	Version string     // of the cluster's binary, for people
	Levels  identity.Levels
}

// Join makes this machine a node of the token's cluster. It asks one address after the other; a refusal by the cluster itself is
// final. Errors wrap what this package and identity name, each is one line that says what to do, and with several addresses
// there is one for each. Nothing is written: the identity is the caller's to save.
func Join(ctx context.Context, r Request) (*identity.Identity, Result, error) {
	r.setDefaults()
	if err := r.Validate(); err != nil {
		return nil, Result{}, err
	}
	if r.Key == nil {
		key, err := identity.NewKey()
		if err != nil {
			return nil, Result{}, err
		}
		r.Key = key
	}
	deadline := time.Now().Add(r.Patience)
	for {
		var errs []error
		again := false
		for _, address := range r.addresses {
			id, result, err := joinThrough(ctx, &r, address)
			if err == nil {
				return id, result, nil
			}
			if final(err) {
				return nil, Result{}, err
			}
			again = again || errors.Is(err, ErrUnavailable)
			errs = append(errs, err)
		}
		if !again || ctx.Err() != nil || time.Now().Add(pause).After(deadline) {
			return nil, Result{}, errors.Join(errs...)
		}
		select {
		case <-ctx.Done():
			return nil, Result{}, errors.Join(errs...)
		case <-time.After(pause):
		}
	}
}

// final tells whether the cluster itself refused, so that another address would answer the same.
func final(err error) bool {
	var said *refused
	return errors.As(err, &said) && said.reason.final
}

// refused is an answer of the cluster: its reason for the program, its words for people.
type refused struct {
	reason  reason
	message string
}

func (r *refused) Error() string { return r.message }
func (r *refused) Unwrap() error { return r.reason.err }

func joinThrough(ctx context.Context, r *Request, address string) (*identity.Identity, Result, error) {
	fail := func(err error) (*identity.Identity, Result, error) {
		return nil, Result{}, fmt.Errorf("joining through %s: %w", address, err)
	}
	conn, err := dial(ctx, address, r.Token)
	if err != nil {
		return fail(err)
	}
	defer conn.Close()
	result := Result{Address: address}
	if at, err := netip.ParseAddrPort(conn.LocalAddr().String()); err == nil {
		result.LocalIP = at.Addr().Unmap()
	}
	// A node that reaches no replica ends TLS itself, with its node certificate, to say so. Any node can do that, a stolen one
	// too, and none but a replica may learn the token's secret.
	if identity.IsNodeCert(conn.ConnectionState().PeerCertificates[0]) {
		_, err := exchange(ctx, conn, http.MethodGet, Path, nil)
		if err == nil {
			err = errors.New("it gave no reason")
		}
		return fail(fmt.Errorf("%w: that node reaches no API replica of its cluster: %w; try another node, or wait", ErrUnavailable, err))
	}
	ips := r.IPs
	if len(ips) == 0 {
		ips = []netip.Addr{result.LocalIP}
	}
	csr, err := identity.NewNodeCSR(r.Key, r.Name)
	if err != nil {
		return fail(err)
	}
	body, err := json.Marshal(request{Version: wireVersion, TokenID: r.Token.ID, TokenSecret: r.Token.Secret, Name: r.Name, IPs: ips, CSR: csr,
		SkeinVersion: r.Version, Levels: r.Levels})
	if err != nil {
		return fail(err)
	}
	raw, err := exchange(ctx, conn, http.MethodPost, Path, body)
	if err != nil {
		return fail(err)
	}
	id, reply, err := accept(r, raw, time.Now())
	if err != nil {
		return fail(err)
	}
	result.Version, result.Levels = reply.SkeinVersion, reply.Levels
	return id, result, nil
}

// dial connects, and returns only if the other end belongs to the token's cluster.
func dial(ctx context.Context, address string, token identity.Token) (*tls.Conn, error) {
	raw, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("%w: %w: check that skein runs there and that no firewall is in between", ErrUnreachable, err)
	}
	config := identity.PinnedTLS(token.CAHash)
	if host, _, err := net.SplitHostPort(address); err == nil {
		config.ServerName = host
	}
	conn := tls.Client(raw, config)
	shake, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	if err := conn.HandshakeContext(shake); err != nil {
		raw.Close()
		var noTLS tls.RecordHeaderError
		switch {
		case errors.Is(err, identity.ErrWrongCA):
			return nil, fmt.Errorf("%w; nothing was sent; use a token of that cluster, or the address of a node of the token's", err)
		case errors.As(err, &noTLS):
			return nil, fmt.Errorf("%w: something else than skein answers there (no TLS): is it the API port (%d by default)?", ErrUnreachable, DefaultPort)
		case shake.Err() != nil || errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed):
			return nil, fmt.Errorf("%w: it accepts connections but does not answer: %w: check what runs there", ErrUnreachable, err)
		}
		return nil, fmt.Errorf("%w: TLS: %w", ErrUnreachable, err)
	}
	return conn, nil
}

// exchange sends one request over the connection and reads the answer. There are no redirects and no proxies.
func exchange(ctx context.Context, conn *tls.Conn, method, path string, body []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "https://"+conn.RemoteAddr().String()+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	used := false
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialTLSContext: func(context.Context, string, string) (net.Conn, error) {
			if used { // the transport would try again on a new connection, which was not checked
				return nil, errors.New("the connection ended")
			}
			used = true
			return conn, nil
		},
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("%w: it ended the connection without an answer: %w: try again", ErrUnavailable, err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("%w: its answer was cut off: %w: try again", ErrUnavailable, err)
	}
	if resp.StatusCode == http.StatusOK {
		return data, nil
	}
	return nil, decodeRefusal(resp.StatusCode, data)
}

// decodeRefusal reads an answer that is not the wished one, whoever wrote it.
func decodeRefusal(status int, data []byte) error {
	var said refusal
	if err := json.Unmarshal(data, &said); err == nil && said.Message != "" {
		for _, r := range reasons {
			if r.name == said.Reason {
				return &refused{r, oneLine(said.Message)}
			}
		}
	}
	message := oneLine(said.Message)
	if message == "" {
		message = "no reason given"
	}
	if status == http.StatusNotFound {
		message += "; no join service runs there: is its skein older than this one?"
	}
	return fmt.Errorf("%w: HTTP %d: %s", ErrUnavailable, status, message)
}

// oneLine makes words of another machine fit to be shown.
func oneLine(s string) string {
	const most = 1000
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s)
	return strings.TrimSpace(s[:min(len(s), most)])
}

// accept checks every part of the answer: what is saved must work at the next start, without anyone.
func accept(r *Request, raw []byte, now time.Time) (*identity.Identity, answer, error) {
	refuse := func(err error) (*identity.Identity, answer, error) {
		return nil, answer{}, fmt.Errorf("%w: the cluster's answer is not usable: %w", ErrUnavailable, err)
	}
	var a answer
	if err := json.Unmarshal(raw, &a); err != nil {
		return refuse(err)
	}
	if a.Version != wireVersion {
		return nil, answer{}, &refused{reason{err: identity.ErrIncompatible, final: true},
			fmt.Sprintf("the cluster's answer has version %d, this skein understands %d: install the cluster's version (%s)", a.Version, wireVersion, oneLine(a.SkeinVersion))}
	}
	if err := identity.Compatible(r.Levels, a.Levels); err != nil {
		return nil, answer{}, &refused{reason{err: identity.ErrIncompatible, final: true}, err.Error()}
	}
	ca, err := identity.ParseCert([]byte(a.CA))
	if err != nil {
		return refuse(err)
	}
	if identity.CertHash(ca) != r.Token.CAHash {
		return refuse(identity.ErrWrongCA)
	}
	cert, err := identity.ParseCert([]byte(a.Certificate))
	if err != nil {
		return refuse(err)
	}
	id := &identity.Identity{Name: r.Name, ClusterID: a.ClusterID, Key: r.Key, Cert: cert, CA: ca, GossipKey: a.GossipKey, Cluster: a.Cluster,
		Seeds: a.Seeds[:min(len(a.Seeds), maxSeeds)]}
	if err := id.Validate(); err != nil {
		return refuse(err)
	}
	if now.Before(cert.NotBefore) || now.After(cert.NotAfter) {
		return refuse(fmt.Errorf("the certificate is valid from %s to %s, and it is %s on this machine: set its clock",
			cert.NotBefore.UTC().Format(time.RFC3339), cert.NotAfter.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339)))
	}
	return id, a, nil
}
