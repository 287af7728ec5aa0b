// Package rawlist answers lists and reads of single objects with what is stored, where that is what upstream would send: objects of the version that is
// asked for, in protobuf as they are, or in JSON made of it (see package transcode). An object is then neither decoded, converted, nor encoded; only its
// resourceVersion, which is not stored, is put in. Of 500 pods that leaves a quarter of the work in protobuf, and less in JSON.
//
// It is the same answer, byte for byte, and that is not assumed but seen: the first object of each shape (which fields are there; see
// transcode.Plan.Shape) is decoded and encoded as upstream does it, and the result compared; from then on the stored bytes of that shape are used, or if they
// differ (an older version may have stored it without today's defaults) upstream's again. One in a thousand is compared all the same, and a shape that is
// caught so is upstream's from then on. What has been compared is remembered as numbers, 16 bytes a shape.
//
// Objects of events that a watch sends are treated alike: which encoder makes what is seen, too.
//
// A Lister does one resource, without selectors. Whatever is unusual (an error, a forgotten revision, a store without
// a leader) it leaves to upstream's path: List and Get then say no and have done nothing. It is safe for concurrent use.
package rawlist

import (
	"context"
	"errors"
	"hash/maphash"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	etcdclient "go.etcd.io/etcd/client/v3/kubernetes"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/etcd3/metrics"
	"k8s.io/apiserver/pkg/storage/value"

	"skein.io/skein/consensus/loan"
	"skein.io/skein/node/api/internal/pause"
)

const (
	// pageSize is how many objects are read at once for an unlimited list.
	pageSize = 500
	// pauseEvery is after how many of them others may need the processor.
	pauseEvery = 100
	// remembered bounds the shapes of which it is known whether they are stored as they are sent, twice.
	remembered = 1 << 12
	// compareEvery is how often an object of a known shape is compared all the same.
	compareEvery = 1 << 10
)

// errGiven is returned by an Answer that is asked for twice.
var errGiven = errors.New("the list has been written already")

// Config says what is listed. All fields are required.
type Config struct {
	Client      *etcdclient.Client
	Codec       runtime.Codec
	Transformer value.Transformer
	Versioner   storage.Versioner
	// Resource names the resource in the metrics of the store.
	Resource schema.GroupResource
	// PathPrefix begins all keys, ResourcePrefix those of the resource behind it: "/registry" and "/pods".
	PathPrefix, ResourcePrefix string
}

// Lister reads one resource.
type Lister struct {
	cfg     Config
	seed    maphash.Seed
	used    atomic.Uint64
	events  atomic.Int64 // whose objects were upstream's
	watched *watched     // nil: events are upstream's

	mu       sync.Mutex // guards the rest
	now, old map[uint64]bool
}

// New makes a Lister.
func New(cfg Config) *Lister {
	return &Lister{cfg: cfg, seed: maphash.MakeSeed(), now: map[uint64]bool{}}
}

// Get gives the answer to a read of one object; ok = false leaves it to upstream, also when there is none.
func (l *Lister) Get(ctx context.Context, namespace, name string, f Form) (Answer, bool) {
	key := strings.TrimSuffix(l.cfg.ResourcePrefix, "/") + "/"
	if namespace != "" {
		key += namespace + "/"
	}
	key, err := storage.PrepareKey(l.cfg.ResourcePrefix, key+name, false)
	if err != nil {
		return nil, false
	}
	began := time.Now()
	r, err := l.cfg.Client.Kubernetes.Get(ctx, l.absolute(key), etcdclient.GetOptions{})
	metrics.RecordEtcdRequest("get", l.cfg.Resource, err, began)
	if err != nil || r.KV == nil {
		return nil, false
	}
	a := l.form(f)
	i, err := a.item(ctx, r.KV)
	if err != nil {
		return nil, false
	}
	b, err := a.one(i)
	return func(w io.Writer) error { _, err := w.Write(b); return err }, err == nil
}

func (l *Lister) absolute(key string) string {
	return strings.TrimSuffix(l.cfg.PathPrefix, "/") + "/" + strings.TrimPrefix(key, "/")
}

// List gives the answer to a list of a namespace, or of all. ok = false leaves it to upstream.
func (l *Lister) List(ctx context.Context, namespace string, o storage.ListOptions, f Form) (_ Answer, ok bool) {
	key := l.cfg.ResourcePrefix
	if namespace != "" {
		key = strings.TrimSuffix(key, "/") + "/" + namespace
	}
	key, err := storage.PrepareKey(l.cfg.ResourcePrefix, key, true)
	if err != nil {
		return nil, false
	}
	prefix := l.absolute(key)
	rev, from, err := storage.ValidateListOptions(prefix, l.cfg.Versioner, o)
	if err != nil {
		return nil, false
	}
	a := l.form(f)
	a.work = pause.Begin(ctx)
	limit := o.Predicate.Limit
	var last string
	b := pool.Get().(*buffers)
	defer func() {
		if !ok {
			b.release()
		}
	}()
	borrowed := loan.With(ctx, &b.loan)
	for {
		page := int64(pageSize)
		if limit > 0 {
			page = min(page, limit-int64(len(b.items)))
		}
		began := time.Now()
		r, err := l.cfg.Client.Kubernetes.List(borrowed, prefix, etcdclient.ListOptions{Revision: rev, Limit: page, Continue: from})
		metrics.RecordEtcdRequest("list", l.cfg.Resource, err, began)
		a.work.Pause()
		if err != nil || !l.fresh(o, r.Revision) {
			return nil, false
		}
		if rev == 0 {
			rev = r.Revision
		}
		b.items = slices.Grow(b.items, len(r.Kvs))
		for _, kv := range r.Kvs {
			i, err := a.item(ctx, kv)
			if err != nil {
				return nil, false
			}
			b.items = append(b.items, i)
			if len(b.items)%pauseEvery == 0 {
				a.work.Pause()
			}
		}
		if len(r.Kvs) > 0 {
			last = string(r.Kvs[len(r.Kvs)-1].Key)
		}
		from = last + "\x00"
		more := int64(len(r.Kvs)) < r.Count
		if !more || limit > 0 && int64(len(b.items)) >= limit {
			token, remaining, err := storage.PrepareContinueToken(last, prefix, rev, r.Count-int64(len(r.Kvs))+int64(len(b.items)), more, o)
			if err != nil {
				return nil, false
			}
			m := metav1.ListMeta{ResourceVersion: strconv.FormatInt(rev, 10), Continue: token, RemainingItemCount: remaining}
			return func(w io.Writer) error {
				if b == nil {
					return errGiven
				}
				err := a.list(w, m, b)
				b.release()
				b = nil
				return err
			}, true
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

// again tells whether something known is to be compared once more.
func (l *Lister) again() bool { return l.used.Add(1)%compareEvery == 0 }

// known tells whether an object of a shape has been compared, and whether it was what upstream would send.
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

// Compared is how many shapes of objects have been compared.
func (l *Lister) Compared() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.now) + len(l.old)
}
