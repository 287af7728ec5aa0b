// Package rawlist answers lists in protobuf with what is stored, where that is what upstream would send: protobuf of the version that is
// asked for. An object is then neither decoded, converted, nor encoded; only its resourceVersion, which is not
// stored, is put in. Of 500 pods that leaves a quarter of the work.
//
// It is the same answer, byte for byte, and that is not assumed but seen: an object is decoded and encoded as upstream does it when it
// is met first, and the result compared; from then on, until it changes, the stored bytes are used, or if they differ (an older
// version may have stored it without today's defaults) upstream's again. What has been compared is remembered as numbers, 16 bytes an object.
//
// A Lister does lists of one resource, without selectors. Whatever is unusual (an error, a forgotten revision, a store without
// a leader) it leaves to upstream's path: List then says no and has done nothing. It is safe for concurrent use.
package rawlist

import (
	"bytes"
	"context"
	"encoding/binary"
	"hash/maphash"
	"slices"
	"strconv"
	"strings"
	"sync"

	"go.etcd.io/etcd/api/v3/mvccpb"
	etcdclient "go.etcd.io/etcd/client/v3/kubernetes"
	"google.golang.org/protobuf/encoding/protowire"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/value"
)

const (
	// pageSize is how many objects are read at once for an unlimited list.
	pageSize = 500
	// remembered bounds the objects of which it is known how they are stored, twice.
	remembered = 1 << 15
	// spliced is how much longer an item may be than what is stored.
	spliced = 32
)

// magic begins everything that Kubernetes stores or sends as protobuf.
var magic = []byte("k8s\x00")

// Config says what is listed. All fields are required.
type Config struct {
	Client      *etcdclient.Client
	Codec       runtime.Codec
	Transformer value.Transformer
	Versioner   storage.Versioner
	// PathPrefix begins all keys, ResourcePrefix those of the resource behind it: "/registry" and "/pods".
	PathPrefix, ResourcePrefix string
}

// Lister lists one resource.
type Lister struct {
	cfg  Config
	seed maphash.Seed

	mu       sync.Mutex // guards the rest
	now, old map[uint64]bool
}

// New makes a Lister.
func New(cfg Config) *Lister {
	return &Lister{cfg: cfg, seed: maphash.MakeSeed(), now: map[uint64]bool{}}
}

// List gives the answer to a list of a namespace, or of all, in parts; the first is what begins every message. encode is upstream's encoder for the
// objects of kind. ok = false leaves it to upstream.
func (l *Lister) List(ctx context.Context, namespace string, o storage.ListOptions, kind schema.GroupVersionKind, encode func(runtime.Object) ([]byte, error)) (parts [][]byte, ok bool) {
	key := l.cfg.ResourcePrefix
	if namespace != "" {
		key = strings.TrimSuffix(key, "/") + "/" + namespace
	}
	key, err := storage.PrepareKey(l.cfg.ResourcePrefix, key, true)
	if err != nil {
		return nil, false
	}
	prefix := strings.TrimSuffix(l.cfg.PathPrefix, "/") + "/" + strings.TrimPrefix(key, "/")
	rev, from, err := storage.ValidateListOptions(prefix, l.cfg.Versioner, o)
	if err != nil {
		return nil, false
	}
	w := &writer{l: l, kind: kind, typeMeta: encodeTypeMeta(kind), encode: encode}
	limit := o.Predicate.Limit
	var last string
	for {
		page := int64(pageSize)
		if limit > 0 {
			page = min(page, limit-int64(w.n))
		}
		r, err := l.cfg.Client.Kubernetes.List(ctx, prefix, etcdclient.ListOptions{Revision: rev, Limit: page, Continue: from})
		if err != nil || !l.fresh(o, r.Revision) {
			return nil, false
		}
		if rev == 0 {
			rev = r.Revision
		}
		size := 0
		for _, kv := range r.Kvs {
			size += len(kv.Value) + spliced
		}
		w.items = slices.Grow(w.items, size)
		for i, kv := range r.Kvs {
			r.Kvs[i] = nil
			if err := w.add(ctx, kv); err != nil {
				return nil, false
			}
			last = string(kv.Key)
		}
		from = last + "\x00"
		more := int64(len(r.Kvs)) < r.Count
		if !more || limit > 0 && int64(w.n) >= limit {
			token, remaining, err := storage.PrepareContinueToken(last, prefix, rev, r.Count-int64(len(r.Kvs))+int64(w.n), more, o)
			if err != nil {
				return nil, false
			}
			head, tail, err := w.finish(metav1.ListMeta{ResourceVersion: strconv.FormatInt(rev, 10), Continue: token, RemainingItemCount: remaining})
			return [][]byte{magic, head, w.items, tail}, err == nil
		}
		if len(r.Kvs) == 0 {
			return nil, false
		}
	}
}

// fresh tells whether a list of a revision is not older than what was asked for.
func (l *Lister) fresh(o storage.ListOptions, rev int64) bool {
	least, err := l.cfg.Versioner.ParseResourceVersion(o.ResourceVersion)
	return err == nil && least <= uint64(rev)
}

func (l *Lister) hash(kv *mvccpb.KeyValue, kind string) uint64 {
	var h maphash.Hash
	h.SetSeed(l.seed)
	h.Write(kv.Key)
	h.WriteString(kind)
	_ = binary.Write(&h, binary.LittleEndian, kv.ModRevision) // a hash does not fail
	return h.Sum64()
}

// known tells whether a stored object has been compared, and whether it is what upstream would send.
func (l *Lister) known(id uint64) (same, known bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if same, known = l.now[id]; !known {
		if same, known = l.old[id]; known {
			l.put(id, same)
		}
	}
	return same, known
}

func (l *Lister) remember(id uint64, same bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.put(id, same)
}

// put remembers. The caller has the lock.
func (l *Lister) put(id uint64, same bool) {
	if len(l.now) >= remembered {
		l.old, l.now = l.now, map[uint64]bool{}
	}
	l.now[id] = same
}

// writer collects a list.
type writer struct {
	l        *Lister
	kind     schema.GroupVersionKind
	typeMeta []byte
	encode   func(runtime.Object) ([]byte, error)
	items    []byte
	n        int
}

type keyContext string

// AuthenticatedData implements value.Context.
func (k keyContext) AuthenticatedData() []byte { return []byte(k) }

func (w *writer) add(ctx context.Context, kv *mvccpb.KeyValue) error {
	data, _, err := w.l.cfg.Transformer.TransformFromStorage(ctx, kv.Value, keyContext(kv.Key))
	if err != nil {
		return err
	}
	id := w.l.hash(kv, w.kind.Kind+w.kind.Version)
	same, known := w.l.known(id)
	before := len(w.items)
	fits := false
	if same || !known {
		w.items, fits = appendStored(w.items, data, w.typeMeta, kv.ModRevision)
	}
	if !(same && fits) {
		sent, err := w.upstream(data, kv.ModRevision)
		if err != nil {
			return err
		}
		if !known {
			w.l.remember(id, fits && bytes.Equal(w.items[before:], sent))
		}
		w.items = append(w.items[:before], sent...)
	}
	w.n++
	return nil
}

// upstream is an item as upstream makes it.
func (w *writer) upstream(data []byte, rev int64) ([]byte, error) {
	o, err := runtime.Decode(w.l.cfg.Codec, data)
	if err != nil {
		return nil, err
	}
	if err := w.l.cfg.Versioner.UpdateObject(o, uint64(rev)); err != nil {
		return nil, err
	}
	sent, err := w.encode(o)
	if err != nil {
		return nil, err
	}
	raw, err := unwrap(sent, w.typeMeta)
	if err != nil {
		return nil, err
	}
	return protowire.AppendBytes(protowire.AppendTag(nil, 2, protowire.BytesType), raw), nil
}

// finish gives what comes before and behind the items.
func (w *writer) finish(m metav1.ListMeta) (head, tail []byte, err error) {
	meta, err := m.Marshal()
	if err != nil {
		return nil, nil, err
	}
	size := protowire.SizeTag(1) + protowire.SizeBytes(len(meta)) + len(w.items)
	list := w.kind
	list.Kind += "List"
	head = protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), encodeTypeMeta(list))
	head = protowire.AppendVarint(protowire.AppendTag(head, 2, protowire.BytesType), uint64(size))
	head = protowire.AppendBytes(protowire.AppendTag(head, 1, protowire.BytesType), meta)
	for _, empty := range []protowire.Number{3, 4} { // contentEncoding, contentType
		tail = protowire.AppendBytes(protowire.AppendTag(tail, empty, protowire.BytesType), nil)
	}
	return head, tail, nil
}

func encodeTypeMeta(k schema.GroupVersionKind) []byte {
	b, err := (&runtime.TypeMeta{APIVersion: k.GroupVersion().String(), Kind: k.Kind}).Marshal()
	if err != nil {
		panic("rawlist: two strings cannot be encoded: " + err.Error())
	}
	return b
}

// Compared is how many objects it is known of how they are stored.
func (l *Lister) Compared() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.now) + len(l.old)
}
