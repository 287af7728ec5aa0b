package transcode

import (
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// kind is how a value is written.
type kind uint8

const (
	kString kind = iota
	kBool
	kInt32
	kInt64
	kBytes
	kMessage
	kTime
	kQuantity
	kFields // FieldsV1
	kOther  // decoded and marshalled: anything with methods of its own for JSON
)

// value is a Go type as an element of something.
type value struct {
	kind kind
	wire protowire.Type
	msg  *message     // of kMessage
	typ  reflect.Type // of kOther
}

// shape is what holds the values of a field.
type shape uint8

const (
	single shape = iota
	pointer
	list
	mapping
)

type field struct {
	value
	shape  shape
	name   []byte // with quotes and colon
	omit   bool   // when it is empty
	inline bool   // its fields are the message's
}

// message is a Go struct. It is built once and then read only.
type message struct {
	fields []field // in the order of JSON
	// byNumber gives the index of the field with a number, plus one.
	byNumber []uint8
	// always are those that are written though they are not there, as bits.
	always uint64
}

const (
	// maxNumber bounds the numbers of fields; the largest in use is below 100.
	maxNumber = 255
	// maxFields bounds how many a message has; a pod's spec has 43.
	maxFields = 64
)

var (
	timeType      = reflect.TypeFor[metav1.Time]()
	quantityType  = reflect.TypeFor[resource.Quantity]()
	fieldsType    = reflect.TypeFor[metav1.FieldsV1]()
	typeMetaType  = reflect.TypeFor[metav1.TypeMeta]()
	marshalerType = reflect.TypeFor[json.Marshaler]()
	textType      = reflect.TypeFor[encoding.TextMarshaler]()
	protoType     = reflect.TypeFor[unmarshaler]()
)

type unmarshaler interface{ Unmarshal([]byte) error }

// planner builds messages; types may contain themselves.
type planner struct{ known, built map[reflect.Type]*message }

func (p planner) message(t reflect.Type) (*message, error) {
	if m := p.known[t]; m != nil {
		return m, nil
	}
	if m := p.built[t]; m != nil {
		return m, nil
	}
	m := &message{}
	p.built[t] = m
	for i := range t.NumField() {
		sf := t.Field(i)
		if sf.Type == typeMetaType && sf.Anonymous {
			continue // not in protobuf; the caller says what it is
		}
		f, number, err := p.field(sf)
		if err != nil {
			return nil, fmt.Errorf("%s.%s: %w", t, sf.Name, err)
		}
		m.fields = append(m.fields, f)
		for len(m.byNumber) <= number {
			m.byNumber = append(m.byNumber, 0)
		}
		if m.byNumber[number] != 0 || len(m.fields) > maxFields {
			return nil, fmt.Errorf("%s.%s: the number %d is taken, or there are more than %d fields", t, sf.Name, number, maxFields)
		}
		if !f.omit || f.inline {
			m.always |= 1 << (len(m.fields) - 1)
		}
		m.byNumber[number] = uint8(len(m.fields))
	}
	return m, m.unambiguous()
}

// unambiguous refuses names that are there twice: encoding/json has rules for them that are not followed here.
func (m *message) unambiguous() error {
	var names []string
	var collect func(*message)
	collect = func(m *message) {
		for _, f := range m.fields {
			if f.inline {
				collect(f.msg)
			} else {
				names = append(names, string(f.name))
			}
		}
	}
	collect(m)
	slices.Sort(names)
	for i := range len(names) - 1 {
		if names[i] == names[i+1] {
			return fmt.Errorf("two fields are called %s", names[i])
		}
	}
	return nil
}

var errUnsupported = errors.New("not supported")

func (p planner) field(sf reflect.StructField) (f field, number int, err error) {
	tag := strings.Split(sf.Tag.Get("protobuf"), ",")
	if len(tag) < 2 || !sf.IsExported() {
		return f, 0, fmt.Errorf("%w: not a field of protobuf", errUnsupported)
	}
	if number, err = strconv.Atoi(tag[1]); err != nil || number < 1 || number > maxNumber {
		return f, 0, fmt.Errorf("%w: number %q", errUnsupported, tag[1])
	}
	name, options, _ := strings.Cut(sf.Tag.Get("json"), ",")
	zero := false
	for o := range strings.SplitSeq(options, ",") {
		switch o {
		case "omitempty":
			f.omit = true
		case "omitzero":
			zero = true
		case "", "inline":
		default:
			return f, 0, fmt.Errorf("%w: option %q of json", errUnsupported, o)
		}
	}
	t := sf.Type
	switch {
	case t.Kind() == reflect.Pointer:
		f.shape, t = pointer, t.Elem()
	case t.Kind() == reflect.Slice && t.Elem().Kind() != reflect.Uint8 && !own(t):
		f.shape, t = list, t.Elem()
	case t.Kind() == reflect.Map && !own(t):
		if t.Key().Kind() != reflect.String {
			return f, 0, fmt.Errorf("%w: keys are %s", errUnsupported, t.Key())
		}
		f.shape, t = mapping, t.Elem()
	}
	if f.value, err = p.value(t); err != nil {
		return f, 0, err
	}
	if f.shape == single && f.kind >= kMessage {
		f.omit = false // a struct is never empty
		if f.kind == kTime {
			f.omit = zero
		} else if zero {
			return f, 0, fmt.Errorf("%w: omitzero", errUnsupported)
		}
	} else if zero && !f.omit {
		return f, 0, fmt.Errorf("%w: omitzero", errUnsupported)
	}
	switch {
	case name == "-":
		return f, 0, fmt.Errorf("%w: not a field of JSON", errUnsupported)
	case sf.Anonymous && name == "":
		if f.inline = f.shape == single && f.kind == kMessage; !f.inline {
			return f, 0, fmt.Errorf("%w: embedded", errUnsupported)
		}
		return f, number, nil
	case name == "":
		name = sf.Name
	}
	f.name = append(strconv.AppendQuote(nil, name), ':')
	return f, number, nil
}

// own tells whether a type that is no struct encodes itself.
func own(t reflect.Type) bool { return reflect.PointerTo(t).Implements(protoType) }

func (p planner) value(t reflect.Type) (value, error) {
	switch t {
	case timeType:
		return value{kind: kTime, wire: protowire.BytesType, typ: t}, nil
	case quantityType:
		return value{kind: kQuantity, wire: protowire.BytesType, typ: t}, nil
	case fieldsType:
		return value{kind: kFields, wire: protowire.BytesType, typ: t}, nil
	}
	q := reflect.PointerTo(t)
	if q.Implements(marshalerType) || q.Implements(textType) || t.Kind() != reflect.Struct && own(t) {
		if !own(t) || t.Kind() != reflect.Struct { // empty or not there: each such type has rules of its own
			return value{}, fmt.Errorf("%w: %s", errUnsupported, t)
		}
		return value{kind: kOther, wire: protowire.BytesType, typ: t}, nil
	}
	switch t.Kind() {
	case reflect.String:
		return value{kind: kString, wire: protowire.BytesType}, nil
	case reflect.Bool:
		return value{kind: kBool, wire: protowire.VarintType}, nil
	case reflect.Int32:
		return value{kind: kInt32, wire: protowire.VarintType}, nil
	case reflect.Int64:
		return value{kind: kInt64, wire: protowire.VarintType}, nil
	case reflect.Slice:
		if t.Elem().Kind() == reflect.Uint8 {
			return value{kind: kBytes, wire: protowire.BytesType}, nil
		}
	case reflect.Struct:
		m, err := p.message(t)
		return value{kind: kMessage, wire: protowire.BytesType, msg: m}, err
	}
	return value{}, fmt.Errorf("%w: %s", errUnsupported, t)
}
