package transcode

import (
	"hash/maphash"
	"math/bits"

	"google.golang.org/protobuf/encoding/protowire"
)

// Shape is a number for how an object is built: which fields are there, which of them are empty or zero, and the keys of maps, but not what is in them;
// alike neighbours in a list count once. Whether the decoder's defaults and conversions would add anything to an object, or leave something out, is decided
// by that. Shapes of two types, or with two seeds, have nothing to do with each other.
func (p *Plan) Shape(seed maphash.Seed, object []byte) (uint64, error) {
	return p.root.shapeOf(seed, object)
}

func mix(a, b uint64) uint64 {
	hi, lo := bits.Mul64(a^0x9e3779b97f4a7c15, b^0xe7037ed1a0b428db) // odd numbers without a pattern
	return hi ^ lo
}

func (m *message) shapeOf(seed maphash.Seed, data []byte) (uint64, error) {
	h := uint64(len(m.fields))
	var before protowire.Number
	var element uint64
	for len(data) > 0 {
		n, t, number, content, size := next(data)
		if size < 0 {
			return 0, ErrForm
		}
		f := m.field(n, t)
		if f == nil {
			return 0, ErrForm
		}
		data = data[size:]
		e, err := f.shapeOf(seed, number, content)
		if err != nil {
			return 0, err
		}
		if n == before && e == element {
			continue
		}
		before, element = n, e
		h = mix(h^uint64(n), e)
	}
	return h, nil
}

func (f *field) shapeOf(seed maphash.Seed, number uint64, content []byte) (uint64, error) {
	if f.shape != mapping {
		return f.value.shapeOf(seed, number, content)
	}
	key, number, content, err := f.entry(content)
	if err != nil {
		return 0, err
	}
	v, err := f.value.shapeOf(seed, number, content)
	return mix(maphash.Bytes(seed, key), v), err
}

func (v *value) shapeOf(seed maphash.Seed, number uint64, content []byte) (uint64, error) {
	switch {
	case v.kind == kMessage:
		return v.msg.shapeOf(seed, content)
	case number != 0 || len(content) > 0:
		return 2, nil
	}
	return 1, nil
}
