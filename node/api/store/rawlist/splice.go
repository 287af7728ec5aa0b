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

var errOther = errors.New("not a stored object of this kind")

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

// appendStored appends a stored object to the items of a list, with its resourceVersion; false = it is stored in another way.
func appendStored(items, stored, typeMeta []byte, rev int64) ([]byte, bool) {
	raw, err := unwrap(stored, typeMeta)
	if err != nil {
		return items, false
	}
	n, t, l := protowire.ConsumeTag(raw)
	if l < 0 || n != objectMetadata || t != protowire.BytesType {
		return items, false
	}
	meta, m := protowire.ConsumeBytes(raw[l:])
	if m < 0 {
		return items, false
	}
	after := raw[l+m:]
	start, end, ok := versionIn(meta)
	if !ok {
		return items, false
	}
	version := strconv.FormatInt(rev, 10)
	size := start + 1 + protowire.SizeBytes(len(version)) + len(meta) - end
	items = protowire.AppendTag(items, 2, protowire.BytesType)
	items = protowire.AppendVarint(items, uint64(1+protowire.SizeBytes(size)+len(after)))
	items = protowire.AppendTag(items, objectMetadata, protowire.BytesType)
	items = protowire.AppendVarint(items, uint64(size))
	items = append(items, meta[:start]...)
	items = protowire.AppendString(protowire.AppendTag(items, metaVersion, protowire.BytesType), version)
	items = append(items, meta[end:]...)
	return append(items, after...), true
}

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
