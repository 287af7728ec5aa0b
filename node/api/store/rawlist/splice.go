package rawlist

import (
	"bytes"
	"errors"
	"strconv"

	"google.golang.org/protobuf/encoding/protowire"
)

// Numbers of fields in runtime.Unknown, in every object, and in ObjectMeta. They never change: they are what clients are built on.
const (
	unknownTypeMeta = 1
	unknownRaw      = 2
	objectMetadata  = 1
	metaVersion     = 6
)

var (
	// magic begins everything that Kubernetes stores or sends as protobuf.
	magic = []byte("k8s\x00")
	// unencoded ends it: no contentEncoding and no contentType.
	unencoded = []byte{3<<3 | byte(protowire.BytesType), 0, 4<<3 | byte(protowire.BytesType), 0}

	errOther = errors.New("not a stored object of this kind")
)

// spliced is more than how much longer a message is than what is in it and its type.
const spliced = 48

// begin appends what stands before a message of a size: its type.
func begin(b, typeMeta []byte, size int) []byte {
	b = protowire.AppendBytes(protowire.AppendTag(b, unknownTypeMeta, protowire.BytesType), typeMeta)
	return protowire.AppendVarint(protowire.AppendTag(b, unknownRaw, protowire.BytesType), uint64(size))
}

// unwrap gives the object inside a message with this type.
func unwrap(b, typeMeta []byte) (raw []byte, err error) {
	b, ok := bytes.CutPrefix(b, magic)
	if !ok {
		return nil, errOther
	}
	typed := false
	for len(b) > 0 {
		n, t, l := protowire.ConsumeTag(b)
		if l < 0 || t != protowire.BytesType {
			return nil, errOther
		}
		v, m := protowire.ConsumeBytes(b[l:])
		if m < 0 {
			return nil, errOther
		}
		b = b[l+m:]
		switch n {
		case unknownTypeMeta:
			typed = bytes.Equal(v, typeMeta)
		case unknownRaw:
			raw = v
		default:
			if len(v) > 0 { // encoded in some other way
				return nil, errOther
			}
		}
	}
	if !typed || raw == nil {
		return nil, errOther
	}
	return raw, nil
}

// stored is an object as it is stored, without the envelope.
type stored struct {
	raw         []byte
	meta, after int // where the content of its metadata begins and ends
	from, to    int // where its resourceVersion is, or would be
}

// parse looks into a stored object of a type; false = it is stored in another way.
func parse(b, typeMeta []byte) (s stored, ok bool) {
	raw, err := unwrap(b, typeMeta)
	if err != nil {
		return s, false
	}
	n, t, l := protowire.ConsumeTag(raw)
	if l < 0 || n != objectMetadata || t != protowire.BytesType {
		return s, false
	}
	meta, m := protowire.ConsumeBytes(raw[l:])
	if m < 0 {
		return s, false
	}
	start, end, ok := versionIn(meta)
	after := l + m
	at := after - len(meta)
	return stored{raw: raw, meta: at, after: after, from: at + start, to: at + end}, ok
}

// size is that of the metadata with a resourceVersion, and of the whole object.
func (s stored) size(version int64) (meta, all int) {
	var text [maxDigits]byte
	meta = s.from - s.meta + protowire.SizeTag(metaVersion) + protowire.SizeBytes(len(strconv.AppendInt(text[:0], version, 10))) + s.after - s.to
	return meta, protowire.SizeTag(objectMetadata) + protowire.SizeBytes(meta) + len(s.raw) - s.after
}

// append appends the object with its resourceVersion.
func (s stored) append(b []byte, version int64) []byte {
	meta, _ := s.size(version)
	b = protowire.AppendVarint(protowire.AppendTag(b, objectMetadata, protowire.BytesType), uint64(meta))
	b = append(b, s.raw[s.meta:s.from]...)
	var text [maxDigits]byte
	b = protowire.AppendBytes(protowire.AppendTag(b, metaVersion, protowire.BytesType), strconv.AppendInt(text[:0], version, 10))
	return append(b, s.raw[s.to:]...)
}

// maxDigits is how long an int64 is as text at most.
const maxDigits = 20

// versionIn finds where the resourceVersion is in an ObjectMeta, or where it would be.
func versionIn(meta []byte) (start, end int, ok bool) {
	for at := 0; at < len(meta); {
		n, t, l := protowire.ConsumeTag(meta[at:])
		if l < 0 {
			return 0, 0, false
		}
		m := protowire.ConsumeFieldValue(n, t, meta[at+l:])
		if m < 0 {
			return 0, 0, false
		}
		switch {
		case n == metaVersion:
			return at, at + l + m, true
		case n > metaVersion:
			return at, at, true
		}
		at += l + m
	}
	return len(meta), len(meta), true
}
