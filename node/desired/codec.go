package desired

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"sort"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// formatVersion is the version of the file: of the buckets, the envelope and the record. A file with a higher one was
// written by a later release and is refused; see Open. Version 2 seals Secrets and tokens.
const formatVersion = 2

// envelopeVersion is the version of an envelope's head.
const envelopeVersion = 1

// ErrCorrupt says that stored bytes are not what this package once wrote.
var ErrCorrupt = errors.New("corrupt data")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Flags of an envelope.
const (
	flagObject byte = 0 // the payload is an object
	flagAbsent byte = 1 // no payload: the API said that the object does not exist
	flagSealed byte = 2 // the payload is an object, sealed with the node's key
)

// seal wraps a payload: version, flag, CRC-32C of the two and the payload, payload. bbolt checks only its own two meta
// pages, so a flipped bit in a value would otherwise pass.
func seal(flag byte, payload []byte) []byte {
	out := make([]byte, 6, 6+len(payload))
	out[0], out[1] = envelopeVersion, flag
	binary.LittleEndian.PutUint32(out[2:], crc32.Update(crc32.Checksum(out[:2], castagnoli), castagnoli, payload))
	return append(out, payload...)
}

// open unwraps what seal made. The payload aliases b.
func open(b []byte) (flag byte, payload []byte, err error) {
	if len(b) < 6 {
		return 0, nil, fmt.Errorf("%w: %d bytes are no envelope", ErrCorrupt, len(b))
	}
	if b[0] != envelopeVersion {
		return 0, nil, fmt.Errorf("%w: envelope version %d, known is %d", ErrCorrupt, b[0], envelopeVersion)
	}
	if b[1] != flagObject && b[1] != flagAbsent && b[1] != flagSealed {
		return 0, nil, fmt.Errorf("%w: envelope flag %d", ErrCorrupt, b[1])
	}
	want := binary.LittleEndian.Uint32(b[2:])
	if got := crc32.Update(crc32.Checksum(b[:2], castagnoli), castagnoli, b[6:]); got != want {
		return 0, nil, fmt.Errorf("%w: checksum %08x, stored %08x", ErrCorrupt, got, want)
	}
	return b[1], b[6:], nil
}

// Record is what the agent itself remembers about a pod, beyond what the API and the container runtime know.
type Record struct {
	UID       types.UID
	Namespace string
	Name      string
	// Admitted: the pod passed the node's own check and was started once; it is not checked again after a restart.
	Admitted bool
	// Status is the last status decided here; it may be ahead of the API's.
	Status *corev1.PodStatus
	// Pod is the last known pod, kept from the moment its termination begins, so that it can be completed (hooks, grace)
	// by a daemon that no longer finds the pod in the API.
	Pod *corev1.Pod
	// Containers by name.
	Containers map[string]ContainerRecord
	// Allocated is what the node has granted to the pod, which counts while its spec asks for something else. Nil: not noted yet.
	Allocated *Resources
	// Actuated is what the containers' cgroups were set to last, by the names of those that were made. Nil: none was.
	Actuated *Resources
}

// ContainerRecord is the restart history of one container.
type ContainerRecord struct {
	// Restarts so far, of all sandboxes of the pod.
	Restarts int32
	// Backoff is the delay that applies after the latest exit, zero before the first restart.
	Backoff time.Duration
	// BackoffAt is the exit from which Backoff counts.
	BackoffAt time.Time
}

// Fields of the record's protobuf encoding. Numbers are never reused.
const (
	fieldUID, fieldNamespace, fieldName, fieldAdmitted, fieldStatus, fieldPod, fieldContainer, fieldAllocated, fieldActuated = 1, 2, 3, 4, 5, 6, 7, 8, 9
	fieldCName, fieldCRestarts, fieldCBackoff, fieldCBackoffAt                                                               = 1, 2, 3, 4
)

func (r *Record) marshal() ([]byte, error) {
	var b []byte
	str := func(n protowire.Number, s string) {
		if s != "" {
			b = protowire.AppendString(protowire.AppendTag(b, n, protowire.BytesType), s)
		}
	}
	str(fieldUID, string(r.UID))
	str(fieldNamespace, r.Namespace)
	str(fieldName, r.Name)
	if r.Admitted {
		b = protowire.AppendVarint(protowire.AppendTag(b, fieldAdmitted, protowire.VarintType), 1)
	}
	if r.Status != nil {
		s, err := r.Status.Marshal()
		if err != nil {
			return nil, fmt.Errorf("encode status of pod %s/%s: %w", r.Namespace, r.Name, err)
		}
		b = protowire.AppendBytes(protowire.AppendTag(b, fieldStatus, protowire.BytesType), s)
	}
	if r.Pod != nil {
		p, err := r.Pod.Marshal()
		if err != nil {
			return nil, fmt.Errorf("encode pod %s/%s: %w", r.Namespace, r.Name, err)
		}
		b = protowire.AppendBytes(protowire.AppendTag(b, fieldPod, protowire.BytesType), p)
	}
	names := make([]string, 0, len(r.Containers))
	for n := range r.Containers {
		names = append(names, n)
	}
	sort.Strings(names)
	for _, n := range names {
		b = protowire.AppendBytes(protowire.AppendTag(b, fieldContainer, protowire.BytesType), r.Containers[n].marshal(n))
	}
	for i, res := range []*Resources{r.Allocated, r.Actuated} {
		if res == nil {
			continue
		}
		data, err := res.marshal()
		if err != nil {
			return nil, fmt.Errorf("encode resources of pod %s/%s: %w", r.Namespace, r.Name, err)
		}
		b = protowire.AppendBytes(protowire.AppendTag(b, protowire.Number(fieldAllocated+i), protowire.BytesType), data)
	}
	return b, nil
}

func (c ContainerRecord) marshal(name string) []byte {
	b := protowire.AppendString(protowire.AppendTag(nil, fieldCName, protowire.BytesType), name)
	num := func(n protowire.Number, v uint64) {
		if v != 0 {
			b = protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), v)
		}
	}
	num(fieldCRestarts, uint64(uint32(c.Restarts)))
	num(fieldCBackoff, uint64(c.Backoff))
	if !c.BackoffAt.IsZero() {
		num(fieldCBackoffAt, uint64(c.BackoffAt.UnixNano()))
	}
	return b
}

// eachField walks the fields of a protobuf message; unknown ones are passed too and may be ignored.
func eachField(b []byte, f func(n protowire.Number, v uint64, data []byte) error) error {
	for len(b) > 0 {
		n, t, l := protowire.ConsumeTag(b)
		if l < 0 {
			return fmt.Errorf("%w: %w", ErrCorrupt, protowire.ParseError(l))
		}
		b = b[l:]
		var v uint64
		var data []byte
		switch t {
		case protowire.VarintType:
			v, l = protowire.ConsumeVarint(b)
		case protowire.BytesType:
			data, l = protowire.ConsumeBytes(b)
		default:
			l = protowire.ConsumeFieldValue(n, t, b)
		}
		if l < 0 {
			return fmt.Errorf("%w: field %d: %w", ErrCorrupt, n, protowire.ParseError(l))
		}
		b = b[l:]
		if err := f(n, v, data); err != nil {
			return err
		}
	}
	return nil
}

func (r *Record) unmarshal(b []byte) error {
	return eachField(b, func(n protowire.Number, v uint64, data []byte) error {
		switch n {
		case fieldUID:
			r.UID = types.UID(data)
		case fieldNamespace:
			r.Namespace = string(data)
		case fieldName:
			r.Name = string(data)
		case fieldAdmitted:
			r.Admitted = v != 0
		case fieldStatus:
			r.Status = &corev1.PodStatus{}
			return corrupt("pod status", r.Status.Unmarshal(data))
		case fieldPod:
			r.Pod = &corev1.Pod{}
			return corrupt("pod", r.Pod.Unmarshal(data))
		case fieldContainer:
			name, c, err := unmarshalContainer(data)
			if err != nil {
				return err
			}
			if r.Containers == nil {
				r.Containers = map[string]ContainerRecord{}
			}
			r.Containers[name] = c
		case fieldAllocated:
			r.Allocated = &Resources{}
			return r.Allocated.unmarshal(data)
		case fieldActuated:
			r.Actuated = &Resources{}
			return r.Actuated.unmarshal(data)
		}
		return nil
	})
}

func unmarshalContainer(b []byte) (name string, c ContainerRecord, err error) {
	err = eachField(b, func(n protowire.Number, v uint64, data []byte) error {
		switch n {
		case fieldCName:
			name = string(data)
		case fieldCRestarts:
			c.Restarts = int32(uint32(v))
		case fieldCBackoff:
			c.Backoff = time.Duration(v)
		case fieldCBackoffAt:
			c.BackoffAt = time.Unix(0, int64(v)).UTC()
		}
		return nil
	})
	return name, c, err
}

func corrupt(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w: %s: %w", ErrCorrupt, what, err)
}
