package openapi

import (
	"encoding/json"
	"fmt"
	"sync"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/managedfields"
	"k8s.io/kube-openapi/pkg/validation/spec"
	smdschema "sigs.k8s.io/structured-merge-diff/v6/schema"
	"sigs.k8s.io/structured-merge-diff/v6/typed"
	"sigs.k8s.io/structured-merge-diff/v6/value"
)

// Types gives the merge schemas that server-side apply needs. Each is parsed out of the document of
// its group version when first used.
type Types struct {
	docs    *Documents
	deduced managedfields.TypeConverter

	mu     sync.Mutex // guards parsed
	parsed map[schema.GroupVersion]result

	known sync.Map // of shape by kindAt: kinds that have been validated once
}

// kindAt is a kind at the endpoints of a group version.
type kindAt struct {
	at   schema.GroupVersion
	kind schema.GroupVersionKind
}

// shape is what a kind looks like.
type shape struct {
	schema *smdschema.Schema
	ref    smdschema.TypeRef
}

type result struct {
	managedfields.TypeConverter // nil: no such group version
	err                         error
}

// NewTypes prepares the schemas of docs.
func NewTypes(docs *Documents) *Types {
	return &Types{docs: docs, deduced: managedfields.NewDeducedTypeConverter(), parsed: map[schema.GroupVersion]result{}}
}

// For gives the schema to use at the endpoints of gv.
func (t *Types) For(gv schema.GroupVersion) managedfields.TypeConverter { return scoped{t, gv} }

func (t *Types) of(gv schema.GroupVersion) result {
	t.mu.Lock()
	defer t.mu.Unlock()
	r, ok := t.parsed[gv]
	if !ok {
		r.TypeConverter, r.err = t.parse(gv)
		t.parsed[gv] = r
	}
	return r
}

func (t *Types) parse(gv schema.GroupVersion) (managedfields.TypeConverter, error) {
	path := "apis/" + gv.String()
	if gv.Group == "" {
		path = "api/" + gv.Version
	}
	b, ok, err := t.docs.V3(path)
	if err != nil || !ok {
		return nil, err
	}
	var doc struct {
		Components struct {
			Schemas map[string]*spec.Schema `json:"schemas"`
		} `json:"components"`
	}
	if err := json.Unmarshal(b, &doc); err != nil {
		return nil, fmt.Errorf("embedded OpenAPI document of %s: %w", gv, err)
	}
	c, err := managedfields.NewTypeConverter(doc.Components.Schemas, false)
	if err != nil {
		return nil, fmt.Errorf("merge schema of %s: %w", gv, err)
	}
	return c, nil
}

// scoped looks a kind up in the document of the endpoint's group version first: that one also has
// Scale, Eviction, Binding and TokenRequest, whose own group versions differ.
type scoped struct {
	types *Types
	gv    schema.GroupVersion
}

// ObjectToTyped implements managedfields.TypeConverter. An object that was made by this server's own types cannot have fields that the schema
// lacks, nor values of other types; what validation finds besides, duplicates, is allowed where live objects are
// compared. So only the first of each kind is validated there: it would be a quarter of what managed fields cost.
func (s scoped) ObjectToTyped(o runtime.Object, opts ...typed.ValidationOptions) (*typed.TypedValue, error) {
	_, free := o.(runtime.Unstructured)
	if free || len(opts) != 1 || opts[0] != typed.AllowDuplicates {
		return s.validated(o, opts...)
	}
	id := kindAt{s.gv, o.GetObjectKind().GroupVersionKind()}
	if known, ok := s.types.known.Load(id); ok {
		if v, err := value.NewValueReflect(o); err == nil {
			return typed.AsTypedUnvalidated(origin{v, o}, known.(shape).schema, known.(shape).ref), nil
		}
	}
	v, err := s.validated(o, opts...)
	if err == nil {
		s.types.known.Store(id, shape{v.Schema(), v.TypeRef()})
	}
	return v, err
}

func (s scoped) validated(o runtime.Object, opts ...typed.ValidationOptions) (*typed.TypedValue, error) {
	own := o.GetObjectKind().GroupVersionKind().GroupVersion()
	for _, gv := range []schema.GroupVersion{s.gv, own} {
		r := s.types.of(gv)
		if r.err != nil {
			return nil, r.err
		}
		if r.TypeConverter == nil {
			continue
		}
		if v, err := r.ObjectToTyped(o, opts...); err == nil || gv == own {
			return v, err
		}
	}
	return s.types.deduced.ObjectToTyped(o, opts...)
}

// origin is a value that knows the object that it is of.
type origin struct {
	value.Value
	object runtime.Object
}

// TypedToObject implements managedfields.TypeConverter. What was made of an object and is as it was is that object: for each manager of an
// object's fields upstream comes here to see whether the version of the live object is the manager's, and would make maps of all that is in it for that.
func (s scoped) TypedToObject(v *typed.TypedValue) (runtime.Object, error) {
	if o, ok := v.AsValue().(origin); ok {
		return o.object, nil
	}
	return s.types.deduced.TypedToObject(v)
}
