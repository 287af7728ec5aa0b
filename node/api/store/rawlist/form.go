package rawlist

import (
	"bytes"
	"context"
	"encoding/json"
	"hash/maphash"
	"io"
	"sync"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/encoding/protowire"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"skein.io/skein/consensus/loan"
	"skein.io/skein/node/api/internal/pause"
	"skein.io/skein/node/api/store/transcode"
)

// chunk is how much of an answer is written at once.
const chunk = 32 << 10

// Form is what answers look like. It is not changed any more when it is used.
type Form struct {
	Kind schema.GroupVersionKind
	// Plan is of the kind.
	Plan *transcode.Plan
	// JSON is asked for; false: protobuf.
	JSON bool
	// Encode is upstream's encoder for the objects of the kind.
	Encode func(runtime.Object) ([]byte, error)
}

// Answer writes an answer. Its first write is the beginning of every list alone, as upstream's encoders do it: the writer of responses takes a list
// by that. The error is the writer's. It is called once: the memory of a list is others' then.
type Answer func(io.Writer) error

// form makes one answer.
type form struct {
	Form
	l        *Lister
	id       uint64 // goes into what is remembered
	typeMeta []byte // of the objects as they are stored
	scratch  []byte // for the object that is being written
	key      keyContext
	work     *pause.Work
}

// buffers is the memory of one list.
type buffers struct {
	loan         loan.Loan // what is stored
	items        []item
	scratch, out []byte
}

const (
	// keptItems and keptBytes are how much buffers may have grown to be used again.
	keptItems, keptBytes = 4 * pageSize, 4 * chunk
)

var pool = sync.Pool{New: func() any { return &buffers{out: make([]byte, 0, chunk+chunk/4)} }}

// release lets others use the memory. Nothing of the list is looked at any more.
func (b *buffers) release() {
	b.loan.Return()
	if cap(b.items) > keptItems || cap(b.scratch) > keptBytes || cap(b.out) > keptBytes {
		return
	}
	clear(b.items)
	b.items, b.scratch, b.out = b.items[:0], b.scratch[:0], b.out[:0]
	pool.Put(b)
}

func (l *Lister) form(f Form) *form {
	id := maphash.String(l.seed, f.Kind.String())
	if f.JSON {
		id++
	}
	return &form{Form: f, l: l, id: id, typeMeta: encodeTypeMeta(f.Kind)}
}

// item is an object of an answer: as it is stored, which is smaller than what is sent, or as upstream makes it.
type item struct {
	stored
	version int64  // resourceVersion
	sent    []byte // in protobuf without the envelope, in JSON without kind and version; nil: stored
}

type keyContext struct{ key []byte }

// AuthenticatedData implements value.Context.
func (k *keyContext) AuthenticatedData() []byte { return k.key }

func (f *form) item(ctx context.Context, kv *mvccpb.KeyValue) (item, error) {
	f.key.key = kv.Key
	data, _, err := f.l.cfg.Transformer.TransformFromStorage(ctx, kv.Value, &f.key)
	if err != nil {
		return item{}, err
	}
	i := item{version: kv.ModRevision}
	var ok bool
	var shape uint64
	if i.stored, ok = parse(data, f.typeMeta); ok {
		shape, err = f.Plan.Shape(f.l.seed, i.raw)
		ok = err == nil
	}
	same, known := false, true // stored in some other way
	if ok {
		same, known = f.l.known(shape ^ f.id)
	}
	if same && !f.l.again() {
		return i, nil
	}
	sent, err := f.upstream(data, kv.ModRevision)
	if err != nil {
		return i, err
	}
	if !known || same {
		ours, err := f.append(nil, i)
		same = err == nil && bytes.Equal(ours, sent)
		f.l.remember(shape^f.id, same)
	}
	if same {
		return i, nil
	}
	return item{sent: sent}, nil
}

// upstream is an item as upstream makes it.
func (f *form) upstream(data []byte, rev int64) ([]byte, error) {
	o, err := runtime.Decode(f.l.cfg.Codec, data)
	if err != nil {
		return nil, err
	}
	if err := f.l.cfg.Versioner.UpdateObject(o, uint64(rev)); err != nil {
		return nil, err
	}
	sent, err := f.Encode(o)
	if err != nil {
		return nil, err
	}
	if !f.JSON {
		return unwrap(sent, f.typeMeta)
	}
	begin := append(append([]byte("{"), jsonTypeMeta(f.Kind)...), ',')
	sent, ok := bytes.CutPrefix(sent, begin)
	sent, end := bytes.CutSuffix(sent, []byte("\n"))
	if !ok || !end {
		return nil, errOther
	}
	return append([]byte("{"), sent...), nil
}

// append appends an item. It does not fail for what has been compared.
func (f *form) append(dst []byte, i item) ([]byte, error) {
	if i.sent != nil {
		return append(dst, i.sent...), nil
	}
	if !f.JSON {
		return i.stored.append(dst, i.version), nil
	}
	return f.appendJSON(dst, i, nil)
}

func (f *form) appendJSON(dst []byte, i item, first []byte) ([]byte, error) {
	f.scratch = i.stored.append(f.scratch[:0], i.version)
	return f.Plan.Append(dst, f.scratch, first)
}

// one is the answer with one object.
func (f *form) one(i item) ([]byte, error) {
	if !f.JSON {
		size := len(i.sent)
		if i.sent == nil {
			_, size = i.stored.size(i.version)
		}
		b := append(make([]byte, 0, size+len(f.typeMeta)+spliced), magic...)
		b, err := f.append(begin(b, f.typeMeta, size), i)
		return append(b, unencoded...), err
	}
	first := jsonTypeMeta(f.Kind)
	if i.sent == nil {
		b, err := f.appendJSON(make([]byte, 0, 3*len(i.raw)), i, first)
		return append(b, '\n'), err
	}
	b := append(append([]byte("{"), first...), ',')
	return append(append(b, i.sent[1:]...), '\n'), nil
}

// list writes the answer with many, and keeps what has grown in b.
func (f *form) list(w io.Writer, m metav1.ListMeta, b *buffers) error {
	kind := f.Kind
	kind.Kind += "List"
	out := &chunks{w: w, work: f.work, b: b.out}
	f.scratch = b.scratch
	defer func() { b.out, b.scratch = out.b, f.scratch }()
	if f.JSON {
		return f.listJSON(out, kind, m, b.items)
	}
	return f.listProtobuf(out, kind, m, b.items)
}

func (f *form) listProtobuf(out *chunks, kind schema.GroupVersionKind, m metav1.ListMeta, items []item) error {
	meta, err := m.Marshal()
	if err != nil {
		return err
	}
	size := protowire.SizeTag(1) + protowire.SizeBytes(len(meta))
	for _, i := range items {
		size += protowire.SizeTag(2) + protowire.SizeBytes(f.size(i))
	}
	out.b = append(out.b, magic...)
	if err := out.flush(); err != nil {
		return err
	}
	out.b = begin(out.b, encodeTypeMeta(kind), size)
	out.b = protowire.AppendBytes(protowire.AppendTag(out.b, 1, protowire.BytesType), meta)
	for _, i := range items {
		out.b = protowire.AppendVarint(protowire.AppendTag(out.b, 2, protowire.BytesType), uint64(f.size(i)))
		if err := out.add(f, i); err != nil {
			return err
		}
	}
	out.b = append(out.b, unencoded...)
	return out.flush()
}

// size is that of an item in protobuf.
func (f *form) size(i item) int {
	if i.sent != nil {
		return len(i.sent)
	}
	_, n := i.stored.size(i.version)
	return n
}

func (f *form) listJSON(out *chunks, kind schema.GroupVersionKind, m metav1.ListMeta, items []item) error {
	meta, err := json.Marshal(m)
	if err != nil {
		return err
	}
	out.b = append(out.b, '{')
	if err := out.flush(); err != nil {
		return err
	}
	out.b = append(append(out.b, jsonTypeMeta(kind)...), `,"metadata":`...)
	out.b = append(append(out.b, meta...), `,"items":[`...)
	for n, i := range items {
		if n > 0 {
			out.b = append(out.b, ',')
		}
		if err := out.add(f, i); err != nil {
			return err
		}
	}
	out.b = append(out.b, "]}\n"...)
	return out.flush()
}

// chunks collects an answer into writes of a fair size.
type chunks struct {
	w    io.Writer
	b    []byte
	work *pause.Work
}

func (c *chunks) add(f *form, i item) error {
	b, err := f.append(c.b, i)
	if err != nil {
		return err
	}
	if c.b = b; len(b) < chunk {
		return nil
	}
	return c.flush()
}

func (c *chunks) flush() error {
	_, err := c.w.Write(c.b)
	c.b = c.b[:0]
	c.work.Pause()
	return err
}

func jsonTypeMeta(k schema.GroupVersionKind) []byte {
	b, err := json.Marshal(metav1.TypeMeta{Kind: k.Kind, APIVersion: k.GroupVersion().String()})
	if err != nil {
		panic("rawlist: two strings cannot be encoded: " + err.Error())
	}
	return b[1 : len(b)-1]
}

func encodeTypeMeta(k schema.GroupVersionKind) []byte {
	b, err := (&runtime.TypeMeta{APIVersion: k.GroupVersion().String(), Kind: k.Kind}).Marshal()
	if err != nil {
		panic("rawlist: two strings cannot be encoded: " + err.Error())
	}
	return b
}
