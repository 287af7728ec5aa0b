package rawlist

import (
	"bytes"
	"maps"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Numbers of fields in Pod, ObjectMeta, PodSpec, PodStatus and PodCondition, and in the entries of maps.
const (
	podStatus           = 3
	metaUID             = 5
	metaDeleted         = 9
	metaLabels          = 11
	specGates           = 38
	statusConditions    = 2
	statusNominatedNode = 11
	conditionType       = 1
	conditionStatus     = 2
	entryKey            = 1
	entryValue          = 2
)

// Binding is what a binding changes about a pod.
type Binding struct {
	UID  string // of the pod; "": any
	Node string
	// Labels are put in, over those of the same key.
	Labels map[string]string
	// KeepNominated leaves status.nominatedNodeName as it is.
	KeepNominated bool
	At            metav1.Time
}

// Bind does to a stored pod what upstream's storage of bindings does to the object (setPodNodeAndMetadata in pkg/registry/core/pod/storage), and gives the same bytes as
// decoding, changing and encoding it, for a tenth of that. ok = false when only upstream can do it, or will refuse it: the pod is another, bound, gated, being deleted, or
// stored in some other way. It keeps fields that this version does not know, which upstream would drop.
func Bind(stored []byte, b Binding) (bound []byte, ok bool) {
	raw, err := unwrap(stored, podTypeMeta)
	if err != nil {
		return nil, false
	}
	var parts [podStatus]edited
	for number := protowire.Number(1); len(raw) > 0; number++ { // metadata, spec and status are always written, and in this order
		n, t, l := protowire.ConsumeTag(raw)
		if l < 0 || n != number || n > podStatus || t != protowire.BytesType {
			return nil, false
		}
		v, m := protowire.ConsumeBytes(raw[l:])
		if m < 0 {
			return nil, false
		}
		parts[n-1].b = v
		raw = raw[l+m:]
	}
	if parts[podStatus-1].b == nil || !parts[0].bindMeta(b) || !parts[podSpec-1].bindSpec(b) || !parts[podStatus-1].bindStatus(b) {
		return nil, false
	}
	size := 0
	for i := range parts {
		size += protowire.SizeTag(protowire.Number(i+1)) + protowire.SizeBytes(parts[i].size())
	}
	out := append(make([]byte, 0, size+len(podTypeMeta)+spliced), magic...)
	out = begin(out, podTypeMeta, size)
	for i := range parts {
		out = protowire.AppendVarint(protowire.AppendTag(out, protowire.Number(i+1), protowire.BytesType), uint64(parts[i].size()))
		out = parts[i].append(out)
	}
	return append(out, unencoded...), true
}

// edited is a message with some of its fields replaced.
type edited struct {
	b     []byte
	edits []edit // in their order
}

type edit struct {
	from, to int
	with     []byte
}

func (e *edited) replace(from, to int, with []byte) {
	e.edits = append(e.edits, edit{from, to, with})
}

func (e *edited) size() int {
	n := len(e.b)
	for _, x := range e.edits {
		n += len(x.with) - (x.to - x.from)
	}
	return n
}

func (e *edited) append(out []byte) []byte {
	at := 0
	for _, x := range e.edits {
		out = append(append(out, e.b[at:x.from]...), x.with...)
		at = x.to
	}
	return append(out, e.b[at:]...)
}

// fields calls do for each field of a message: where it begins and ends, and its value if that is of bytes, else nil. False when it is no message, or its fields
// are not in the order in which they are always encoded, or do says so.
func fields(b []byte, do func(n protowire.Number, from, to int, v []byte) bool) bool {
	last := protowire.Number(0)
	for at := 0; at < len(b); {
		n, t, l := protowire.ConsumeTag(b[at:])
		if l < 0 || n < last {
			return false
		}
		m := protowire.ConsumeFieldValue(n, t, b[at+l:])
		if m < 0 {
			return false
		}
		var v []byte
		if t == protowire.BytesType {
			v, _ = protowire.ConsumeBytes(b[at+l:])
		}
		if !do(n, at, at+l+m, v) {
			return false
		}
		last, at = n, at+l+m
	}
	return true
}

func (e *edited) bindMeta(b Binding) bool {
	add := slices.Sorted(maps.Keys(b.Labels))
	labels := 0 // where they end, or would be
	seen := false
	last := ""
	put := func(at int) {
		e.replace(at, at, appendEntry(nil, add[0], b.Labels[add[0]]))
		add = add[1:]
	}
	ok := fields(e.b, func(n protowire.Number, from, to int, v []byte) bool {
		switch {
		case n == metaUID:
			if seen || b.UID != "" && string(v) != b.UID {
				return false
			}
			seen = true
		case n == metaDeleted:
			return false
		case n == metaLabels && len(b.Labels) > 0:
			key, ok := entry(v)
			if !ok || key < last {
				return false
			}
			for len(add) > 0 && add[0] < key {
				put(from)
			}
			if len(add) > 0 && add[0] == key {
				e.replace(from, to, appendEntry(nil, key, b.Labels[key]))
				add = add[1:]
			}
			last = key
		}
		if n <= metaLabels {
			labels = to
		}
		return true
	})
	for ok && len(add) > 0 {
		put(labels)
	}
	return ok && seen
}

// entry gives the key of an entry of a map of strings; false when it is not encoded as always.
func entry(b []byte) (key string, ok bool) {
	count := 0
	ok = fields(b, func(n protowire.Number, _, _ int, v []byte) bool {
		count++
		if n == entryKey {
			key = string(v)
		}
		return v != nil && int(n) == count && n <= entryValue
	})
	return key, ok && count == entryValue
}

func appendEntry(b []byte, key, value string) []byte {
	size := protowire.SizeTag(entryKey) + protowire.SizeBytes(len(key)) + protowire.SizeTag(entryValue) + protowire.SizeBytes(len(value))
	b = protowire.AppendVarint(protowire.AppendTag(b, metaLabels, protowire.BytesType), uint64(size))
	b = protowire.AppendString(protowire.AppendTag(b, entryKey, protowire.BytesType), key)
	return protowire.AppendString(protowire.AppendTag(b, entryValue, protowire.BytesType), value)
}

func (e *edited) bindSpec(b Binding) bool {
	seen := false
	return fields(e.b, func(n protowire.Number, from, to int, v []byte) bool {
		switch n {
		case specNode:
			if seen || v == nil || len(v) > 0 {
				return false
			}
			seen = true
			e.replace(from, to, protowire.AppendString(protowire.AppendTag(nil, specNode, protowire.BytesType), b.Node))
		case specGates:
			return false
		}
		return true
	}) && seen
}

func (e *edited) bindStatus(b Binding) bool {
	scheduled, err := (&corev1.PodCondition{Type: corev1.PodScheduled, Status: corev1.ConditionTrue, LastTransitionTime: b.At}).Marshal()
	if err != nil {
		return false
	}
	with := protowire.AppendBytes(protowire.AppendTag(make([]byte, 0, len(scheduled)+4), statusConditions, protowire.BytesType), scheduled)
	end, done, nominated := 0, false, false
	var node edit
	ok := fields(e.b, func(n protowire.Number, from, to int, v []byte) bool {
		if n <= statusConditions {
			end = to
		}
		switch n {
		case statusConditions:
			kind, known := last(v, conditionType)
			if !known {
				return false
			}
			if string(kind) != string(corev1.PodScheduled) {
				return true
			}
			status, known := last(v, conditionStatus)
			if !known || done || bytes.Equal(status, []byte(corev1.ConditionTrue)) {
				return false // there are two, or it says so already and keeps its time
			}
			done = true
			e.replace(from, to, with)
		case statusNominatedNode:
			if nominated || v == nil {
				return false
			}
			nominated = true
			if len(v) > 0 && !b.KeepNominated {
				node = edit{from, to, protowire.AppendString(protowire.AppendTag(nil, statusNominatedNode, protowire.BytesType), "")}
			}
		}
		return true
	})
	if !done {
		e.replace(end, end, with)
	}
	if node.with != nil {
		e.edits = append(e.edits, node)
	}
	return ok && nominated
}
