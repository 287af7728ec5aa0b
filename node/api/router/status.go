package router

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/managedfields"
	"k8s.io/apiserver/pkg/endpoints/handlers"
	"sigs.k8s.io/structured-merge-diff/v6/typed"
)

// Nodes report the status of themselves and of their pods all the time, mostly as strategic merge patches of a line or two. Upstream makes maps of
// the whole object for the patch, and an object of them again, and compares all fields of both objects to tell whose they are now. What follows keeps
// from both what cannot change there: the spec, which writes of a status never change (podStatusStrategy and nodeStatusStrategy in pkg/registry/core take the old one, and
// leave it out of what a manager may own), and of the metadata what the patch does not name. A test compares the outcome with upstream's whole way.

// hasLeanStatus tells whether that is done for a kind: those of which nodes patch the status. What is said above holds for them.
func hasLeanStatus(o runtime.Object) bool {
	switch o.(type) {
	case *corev1.Pod, *corev1.Node:
		return true
	}
	return false
}

// statusTypes compares objects without their spec.
type statusTypes struct{ managedfields.TypeConverter }

// ObjectToTyped implements managedfields.TypeConverter.
func (t statusTypes) ObjectToTyped(o runtime.Object, opts ...typed.ValidationOptions) (*typed.TypedValue, error) {
	switch of := o.(type) {
	case *corev1.Pod:
		o = &corev1.Pod{TypeMeta: of.TypeMeta, ObjectMeta: of.ObjectMeta, Status: of.Status}
	case *corev1.Node:
		o = &corev1.Node{TypeMeta: of.TypeMeta, ObjectMeta: of.ObjectMeta, Status: of.Status}
	}
	return t.TypeConverter.ObjectToTyped(o, opts...)
}

// patchScope gives the scope to do a patch in. It belongs to this request.
func (e *endpoint) patchScope(r *http.Request) *handlers.RequestScope {
	media, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	switch {
	case e.statusScope == nil || media == string(types.ApplyYAMLPatchType): // an application merges with all that is there
		return &e.scope
	case media != string(types.StrategicMergePatchType) || r.Body == nil:
		return e.statusScope
	}
	s := *e.statusScope
	p := &statusPatch{ObjectConvertor: s.UnsafeConvertor}
	r.Body = copied{r.Body, &p.body}
	s.UnsafeConvertor = p
	return &s
}

// copied notes what is read.
type copied struct {
	io.ReadCloser
	to *bytes.Buffer
}

func (c copied) Read(b []byte) (int, error) {
	n, err := c.ReadCloser.Read(b)
	c.to.Write(b[:n])
	return n, err
}

// statusPatch is the convertor of one strategic merge patch of a status: what it gives to the patch lacks what the patch cannot change, and what it takes back gets it.
// Upstream converts the object that there is, patches, and converts what came of it, once or, when somebody else wrote in between, again.
type statusPatch struct {
	runtime.ObjectConvertor
	body   bytes.Buffer // the patch, when all of it has been read
	parsed bool
	keep   bool // all
	bare   bool // nothing of the metadata is in the patch
	// hidden is what the object lacks that was given last.
	hidden runtime.Object
}

// ConvertToVersion implements runtime.ObjectConvertor.
func (p *statusPatch) ConvertToVersion(in runtime.Object, to runtime.GroupVersioner) (runtime.Object, error) {
	if p.hidden != nil {
		p.restore(in)
	}
	out, err := p.ObjectConvertor.ConvertToVersion(in, to)
	if err == nil && out != in {
		p.hide(out)
	}
	return out, err
}

// parse reads what the patch is about.
func (p *statusPatch) parse() {
	p.parsed, p.keep, p.bare = true, true, true
	var patch map[string]json.RawMessage
	if json.Unmarshal(p.body.Bytes(), &patch) != nil {
		return // upstream will say so
	}
	for k, v := range patch {
		switch k {
		case "kind", "apiVersion", "status":
		case "metadata":
			p.bare = false
			var fields map[string]json.RawMessage
			if json.Unmarshal(v, &fields) != nil {
				return
			}
			for f := range fields {
				if f == "managedFields" || f[:min(1, len(f))] == "$" {
					return
				}
			}
		default: // the spec, or something that is not known, or says how to patch
			return
		}
	}
	p.keep = false
}

func (p *statusPatch) hide(o runtime.Object) {
	if !p.parsed {
		if p.body.Len() == 0 {
			return
		}
		p.parse()
	}
	if p.keep {
		return
	}
	switch o := o.(type) {
	case *corev1.Pod:
		p.hidden = &corev1.Pod{ObjectMeta: p.hideMeta(&o.ObjectMeta), Spec: o.Spec}
		o.Spec = corev1.PodSpec{}
	case *corev1.Node:
		p.hidden = &corev1.Node{ObjectMeta: p.hideMeta(&o.ObjectMeta), Spec: o.Spec}
		o.Spec = corev1.NodeSpec{}
	}
}

// hideMeta takes from the metadata what the patch does not name. The managers of fields need not come back: whoever writes a status cannot set them.
func (p *statusPatch) hideMeta(m *metav1.ObjectMeta) (hidden metav1.ObjectMeta) {
	m.ManagedFields = nil
	if p.bare {
		hidden, *m = *m, metav1.ObjectMeta{}
	}
	return hidden
}

// restore puts back what is hidden, as a copy: the object that there is must not be changed through the patched one.
func (p *statusPatch) restore(o runtime.Object) {
	switch o := o.(type) {
	case *corev1.Pod:
		h, ok := p.hidden.(*corev1.Pod)
		if !ok {
			return
		}
		h.Spec.DeepCopyInto(&o.Spec)
		if p.bare {
			h.ObjectMeta.DeepCopyInto(&o.ObjectMeta)
		}
	case *corev1.Node:
		h, ok := p.hidden.(*corev1.Node)
		if !ok {
			return
		}
		h.Spec.DeepCopyInto(&o.Spec)
		if p.bare {
			h.ObjectMeta.DeepCopyInto(&o.ObjectMeta)
		}
	default:
		return
	}
	p.hidden = nil
}
