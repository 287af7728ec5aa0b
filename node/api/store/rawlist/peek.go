package rawlist

import (
	"google.golang.org/protobuf/encoding/protowire"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Numbers of fields in Pod and PodSpec.
const (
	podSpec  = 2
	specNode = 10
)

var podTypeMeta = encodeTypeMeta(schema.GroupVersionKind{Version: "v1", Kind: "Pod"})

// PodNode reads spec.nodeName out of a stored pod, which takes a hundredth of decoding it; false when it is stored in another way.
func PodNode(stored []byte) (node string, ok bool) {
	raw, err := unwrap(stored, podTypeMeta)
	if err != nil {
		return "", false
	}
	spec, ok := last(raw, podSpec)
	if !ok {
		return "", false
	}
	name, ok := last(spec, specNode)
	return string(name), ok
}

// last gives the value of a field of bytes in a message, empty when it is not there; false when it is no such message.
func last(b []byte, field protowire.Number) (v []byte, ok bool) {
	for len(b) > 0 {
		n, t, l := protowire.ConsumeTag(b)
		if l < 0 {
			return nil, false
		}
		m := protowire.ConsumeFieldValue(n, t, b[l:])
		if m < 0 {
			return nil, false
		}
		if n == field {
			if t != protowire.BytesType {
				return nil, false
			}
			v, _ = protowire.ConsumeBytes(b[l:])
		}
		b = b[l+m:]
	}
	return v, true
}
