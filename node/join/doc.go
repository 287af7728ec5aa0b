// Package join lets a machine become a node: the tokens that invite it, the handler on API replicas that signs its certificate,
// and the client that asks for it.
//
// Contract: the client sends nothing secret before it has verified that the server is an API replica of the cluster whose CA the
// token pins; it writes nothing to disk, so a failed join leaves nothing behind; the caller saves the identity that it returns.
// The server accepts a machine only by one transaction of the store that claims the node's name for the machine's key and counts the
// use of the token, so that of two machines that ask for one name at the same moment, through whichever replicas, one gets it,
// and a machine that asks again with the same key (because the answer was lost) is the same machine. Tokens are stored as
// hashes. The daemon mounts [Server] at [Path] on replicas, and uses [TokenStore] for the token commands.
package join

import (
	"errors"
	"net/http"
	"net/netip"

	"skein.io/skein/gossip/identity"
)

// Path is where the handler is mounted on an API replica's front.
const Path = "/skein/v1/join"

// RenewPath is where certificates are renewed, on the same front.
const RenewPath = "/skein/v1/renew"

// DefaultPort of the API front.
const DefaultPort = 6443

const (
	wireVersion  = 1        // of request and answer
	maxRequest   = 32 << 10 // bytes; a request has about 1 KiB
	maxAnswer    = 256 << 10
	maxAddresses = 8  // of one node
	maxSeeds     = 16 // gossip addresses in an answer
)

// Why a join failed. Errors of [Join], [Server] and [TokenStore] wrap one of these, or identity.ErrWrongCA,
// identity.ErrIncompatible, identity.ErrBadName.
var (
	ErrUnreachable  = errors.New("not reachable")
	ErrUnavailable  = errors.New("the cluster cannot answer now")
	ErrTokenUnknown = errors.New("the token is not known")
	ErrTokenExpired = errors.New("the token has expired")
	ErrTokenRevoked = errors.New("the token was revoked")
	ErrTokenUsedUp  = errors.New("the token is used up")
	ErrNameTaken    = errors.New("the node name is taken")
	ErrAddressTaken = errors.New("the node address is taken")
	ErrBadRequest   = errors.New("the request was refused")
	ErrTooMany      = errors.New("too many failed attempts")
	ErrNotEnrolled  = errors.New("the node is not enrolled")
)

// reason is how an error travels: its name in the answer and the HTTP status. If final, another replica would say the same.
type reason struct {
	err    error
	name   string
	status int
	final  bool
}

var reasons = []reason{
	{ErrTokenUnknown, "TokenUnknown", http.StatusUnauthorized, true},
	{ErrTokenExpired, "TokenExpired", http.StatusForbidden, true},
	{ErrTokenRevoked, "TokenRevoked", http.StatusForbidden, true},
	{ErrTokenUsedUp, "TokenUsedUp", http.StatusForbidden, true},
	{ErrNameTaken, "NameTaken", http.StatusConflict, true},
	{ErrAddressTaken, "AddressTaken", http.StatusConflict, true},
	{ErrNotEnrolled, "NotEnrolled", http.StatusForbidden, true},
	{identity.ErrIncompatible, "Incompatible", http.StatusConflict, true},
	{identity.ErrBadName, "BadName", http.StatusBadRequest, true},
	{ErrTooMany, "TooManyRequests", http.StatusTooManyRequests, false},
	{ErrBadRequest, "BadRequest", http.StatusBadRequest, true},
	{ErrUnavailable, "ServiceUnavailable", http.StatusServiceUnavailable, false},
}

func reasonOf(err error) reason {
	for _, r := range reasons {
		if errors.Is(err, r.err) {
			return r
		}
	}
	return reasons[len(reasons)-1]
}

// request is what a machine asks with.
type request struct {
	Version      int             `json:"version"`
	TokenID      string          `json:"tokenID"`
	TokenSecret  string          `json:"tokenSecret"`
	Name         string          `json:"name"`
	IPs          []netip.Addr    `json:"ips"`
	CSR          []byte          `json:"csr"` // DER
	SkeinVersion string          `json:"skeinVersion"`
	Levels       identity.Levels `json:"levels"`
}

// answer is what makes a node of it.
type answer struct {
	Version      int              `json:"version"`
	Certificate  string           `json:"certificate"` // PEM
	CA           string           `json:"ca"`          // PEM
	ClusterID    string           `json:"clusterID"`
	GossipKey    []byte           `json:"gossipKey"`
	Cluster      identity.Cluster `json:"cluster"`
	Seeds        []netip.AddrPort `json:"seeds"`
	SkeinVersion string           `json:"skeinVersion"`
	Levels       identity.Levels  `json:"levels"`
}

// refusal is the body of every other answer. Its fields are those of a Kubernetes Status, which the front of a node without a
// replica answers with.
type refusal struct {
	Kind       string `json:"kind"`
	APIVersion string `json:"apiVersion"`
	Status     string `json:"status"`
	Reason     string `json:"reason"`
	Message    string `json:"message"`
	Code       int    `json:"code"`
}
