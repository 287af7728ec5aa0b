package desired

import (
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// held is what the store has in memory of an object: the object, or what it can be made of again.
type held interface {
	GetUID() types.UID
	GetResourceVersion() string
	Marshal() ([]byte, error)
}

// far is another node: a cluster has thousands, each node holds them all, and hardly ever reads one. Encoded, one takes a third of what the
// object does (BenchmarkNodes).
type far struct {
	raw          string
	uid, version string // parts of raw
}

func (f *far) GetUID() types.UID          { return types.UID(f.uid) }
func (f *far) GetResourceVersion() string { return f.version }
func (f *far) Marshal() ([]byte, error)   { return []byte(f.raw), nil }

// keep makes of an object what is to be held of it.
func (s *Store) keep(o object) held {
	n, ok := o.(*corev1.Node)
	if !ok || n.Name == s.self {
		return o
	}
	b, err := n.Marshal()
	if err != nil {
		return o
	}
	f := &far{raw: string(b)}
	var found bool
	if f.uid, found = within(f.raw, string(n.UID)); !found {
		return o
	}
	if f.version, found = within(f.raw, n.ResourceVersion); !found {
		return o
	}
	return f
}

// within returns the part of s that equals part.
func within(s, part string) (_ string, found bool) {
	i := strings.Index(s, part)
	if i < 0 {
		return "", false
	}
	return s[i : i+len(part)], true
}

// whole returns the object of what is held, nil for nothing.
func whole(h held) object {
	switch o := h.(type) {
	case *far:
		n := &corev1.Node{}
		if err := n.Unmarshal([]byte(o.raw)); err != nil {
			panic("desired: a node that was encoded here does not decode: " + err.Error())
		}
		return n
	case object:
		return o
	}
	return nil
}

// Fields of the protobuf encoding of a Node that labels are read from (k8s.io/api/core/v1 and apimachinery's meta/v1, generated.proto).
const fieldNodeMeta, fieldMetaLabels = 1, 11

// NodeLabel returns a label of a Node, "" if it has none of that name or there is no such Node. It costs less than Node, for those that
// ask for many.
func (s *Store) NodeLabel(node, label string) (value string) {
	s.mu.RLock()
	h := s.nodes.items[node]
	s.mu.RUnlock()
	switch o := h.(type) {
	case *corev1.Node:
		return o.Labels[label]
	case *far:
		// What is held decodes, so there is no error.
		_ = eachField([]byte(o.raw), func(n protowire.Number, _ uint64, meta []byte) error {
			if n != fieldNodeMeta {
				return nil
			}
			return eachField(meta, func(n protowire.Number, _ uint64, entry []byte) error {
				if n != fieldMetaLabels {
					return nil
				}
				var k, v string
				err := eachField(entry, func(n protowire.Number, _ uint64, s []byte) error {
					if n == 1 {
						k = string(s)
					} else {
						v = string(s)
					}
					return nil
				})
				if k == label {
					value = v
				}
				return err
			})
		})
	}
	return value
}

// HasNode says whether there is a Node of that name.
func (s *Store) HasNode(name string) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.nodes.items[name] != nil
}
