package identity

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

const (
	// NodePrefix precedes the node's name in its certificate's common name, as Kubernetes' node authorizer expects
	// (k8s.io/apiserver/pkg/authentication/user).
	NodePrefix = "system:node:"
	// NodesGroup is the organisation in every node certificate, and only there.
	NodesGroup = "system:nodes"
	// MaxNameLength is the longest node name in bytes: one DNS label (RFC 1123, RFC 1035 section 2.3.4).
	MaxNameLength = 63
)

// reservedNames may not be node names: a node's certificate is valid for the node's name, and these names mean something else
// to clients that trust the cluster's CA.
var reservedNames = []string{"kubernetes", "localhost"}

// ErrBadName is wrapped by every refusal of a node name.
var ErrBadName = errors.New("not a valid node name")

// ValidateName checks that name can be a node's name: one RFC 1123 label in lower case, at most [MaxNameLength] bytes, not one
// of the names that the cluster's own endpoints go by. The error says which rule was broken.
func ValidateName(name string) error {
	refuse := func(why string) error {
		return fmt.Errorf("node name %q: %w: %s", name, ErrBadName, why)
	}
	switch {
	case name == "":
		return refuse("it is empty")
	case len(name) > MaxNameLength:
		return refuse(fmt.Sprintf("it has %d characters, at most %d are allowed", len(name), MaxNameLength))
	case slices.Contains(reservedNames, name):
		return refuse("it is reserved for the cluster itself")
	case name[0] == '-' || name[len(name)-1] == '-':
		return refuse("it must begin and end with a letter or a digit")
	}
	for i := 0; i < len(name); i++ {
		c := name[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return refuse("only a-z, 0-9 and '-' are allowed (one DNS label, RFC 1123)")
		}
	}
	return nil
}

// DefaultName makes a node name of a host name: the first label, in lower case. The result still has to be validated.
func DefaultName(hostname string) string {
	label, _, _ := strings.Cut(strings.TrimSpace(hostname), ".")
	return strings.ToLower(label)
}

// NodeUser is the common name, and so the Kubernetes user name, of the node called name.
func NodeUser(name string) string { return NodePrefix + name }

// validateNodeIP refuses addresses that cannot be one machine's own.
func validateNodeIP(ip netip.Addr) error {
	switch {
	case !ip.IsValid():
		return errors.New("node address is empty")
	case ip.IsUnspecified(), ip.IsMulticast(), ip.Zone() != "":
		return fmt.Errorf("node address %s: not an address of one machine", ip)
	}
	return nil
}
