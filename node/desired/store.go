package desired

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sort"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
)

// Kind names a kind of content; it is also the name of its bucket in the file.
type Kind string

// The kinds that are watched and may be subscribed to.
const (
	Pods           Kind = "pods"
	Services       Kind = "services"
	EndpointSlices Kind = "endpointslices"
	Nodes          Kind = "nodes"
	ConfigMaps     Kind = "configmaps"
	Secrets        Kind = "secrets"
	// Claims are not watched but read until they are bound, and Volumes with them.
	Claims  Kind = "persistentvolumeclaims"
	Volumes Kind = "persistentvolumes"
)

// Kinds that only the node itself writes.
const (
	tokens Kind = "tokens"
	// Records are the agent's about its pods.
	Records Kind = "records"
)

// FlushInterval is how long a change may wait in memory before it is written, so that a burst costs one fsync.
const FlushInterval = 100 * time.Millisecond

// flushRetry is the pause after a failed write (a full disk): the change stays in memory and is tried again.
const flushRetry = 5 * time.Second

// ErrUnknown says that the API has not yet told whether an object exists.
var ErrUnknown = errors.New("not yet received from the API")

// Store is the persisted copy. Make it with Open, feed it with Run.
type Store struct {
	log    *slog.Logger
	db     *bbolt.DB
	sealer *sealer // of Secrets and tokens; nil: they are not sealed

	pods       *table
	services   *table
	slices     *table
	nodes      *table
	configmaps *table
	secrets    *table
	claims     *table
	volumes    *table
	tables     map[Kind]*table
	self       string // this node's name; set before anything is fed

	// mu guards the items of all tables, tokens, records, dirty, subs, follows (and what they hold), flushErr and seen.
	mu       sync.RWMutex
	tokens   map[string]*authv1.TokenRequest
	records  map[types.UID]*Record
	dirty    map[dirtyKey]struct{}
	subs     map[chan struct{}]map[Kind]bool
	follows  map[*Changes]struct{}
	flushErr error
	seen     time.Time // see Saw

	// flushMu makes flushes follow each other, so that the file never goes back in time.
	flushMu sync.Mutex
	kick    chan struct{}
}

type dirtyKey struct {
	kind Kind
	key  string
}

func newStore(log *slog.Logger) *Store {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s := &Store{log: log, tokens: map[string]*authv1.TokenRequest{}, records: map[types.UID]*Record{},
		dirty: map[dirtyKey]struct{}{}, subs: map[chan struct{}]map[Kind]bool{}, follows: map[*Changes]struct{}{}, kick: make(chan struct{}, 1)}
	s.pods = newTable(s, Pods, func() object { return &corev1.Pod{} })
	s.services = newTable(s, Services, func() object { return &corev1.Service{} })
	s.slices = newTable(s, EndpointSlices, func() object { return &discoveryv1.EndpointSlice{} })
	s.nodes = newTable(s, Nodes, func() object { return &corev1.Node{} })
	s.configmaps = newTable(s, ConfigMaps, func() object { return &corev1.ConfigMap{} })
	s.secrets = newTable(s, Secrets, func() object { return &corev1.Secret{} })
	s.claims = newTable(s, Claims, func() object { return &corev1.PersistentVolumeClaim{} })
	s.volumes = newTable(s, Volumes, func() object { return &corev1.PersistentVolume{} })
	s.tables = map[Kind]*table{Pods: s.pods, Services: s.services, EndpointSlices: s.slices, Nodes: s.nodes, ConfigMaps: s.configmaps, Secrets: s.secrets,
		Claims: s.claims, Volumes: s.volumes}
	return s
}

// list returns the objects of a table in the order of their keys.
func list[T object](t *table) []T {
	t.s.mu.RLock()
	keys := make([]string, 0, len(t.items))
	for k, o := range t.items {
		if o != nil {
			keys = append(keys, k)
		}
	}
	sort.Strings(keys)
	all := make([]held, len(keys))
	for i, k := range keys {
		all[i] = t.items[k]
	}
	t.s.mu.RUnlock()
	out := make([]T, len(keys))
	for i, h := range all {
		out[i] = whole(h).(T)
	}
	return out
}

func get[T object](t *table, key string) (zero T, known bool) {
	t.s.mu.RLock()
	h, ok := t.items[key]
	t.s.mu.RUnlock()
	if h == nil {
		return zero, ok
	}
	return whole(h).(T), true
}

// Pods returns the pods bound to this node.
func (s *Store) Pods() []*corev1.Pod { return list[*corev1.Pod](s.pods) }

// Pod returns one of this node's pods, nil when there is none of that name.
func (s *Store) Pod(namespace, name string) *corev1.Pod {
	p, _ := get[*corev1.Pod](s.pods, namespace+"/"+name)
	return p
}

// ConfigMaps and Secrets return those that this node's pods refer to, as far as they exist.
func (s *Store) ConfigMaps() []*corev1.ConfigMap { return list[*corev1.ConfigMap](s.configmaps) }

// Secrets is described with ConfigMaps.
func (s *Store) Secrets() []*corev1.Secret { return list[*corev1.Secret](s.secrets) }

// Services returns all Services of the cluster.
func (s *Store) Services() []*corev1.Service { return list[*corev1.Service](s.services) }

// EndpointSlices returns all EndpointSlices of the cluster.
func (s *Store) EndpointSlices() []*discoveryv1.EndpointSlice {
	return list[*discoveryv1.EndpointSlice](s.slices)
}

// Nodes returns all Nodes of the cluster: of the others only their names, labels, addresses and pod ranges. They are made anew for each call
// but for this node's own; who asks for one label of many asks NodeLabel.
func (s *Store) Nodes() []*corev1.Node { return list[*corev1.Node](s.nodes) }

// Count is how many objects of a kind there are.
func (s *Store) Count(kind Kind) int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return len(s.tables[kind].items)
}

// Node returns one Node, nil when there is none of that name.
func (s *Store) Node(name string) *corev1.Node {
	n, _ := get[*corev1.Node](s.nodes, name)
	return n
}

// ConfigMap returns a ConfigMap that a pod of this node refers to. The error is a NotFound API error when the API said
// that there is none, and wraps ErrUnknown when the API has not been heard yet.
func (s *Store) ConfigMap(namespace, name string) (*corev1.ConfigMap, error) {
	return lookup[*corev1.ConfigMap](s.configmaps, namespace, name)
}

// Secret is as ConfigMap, for Secrets.
func (s *Store) Secret(namespace, name string) (*corev1.Secret, error) {
	return lookup[*corev1.Secret](s.secrets, namespace, name)
}

func lookup[T interface {
	object
	comparable
}](t *table, namespace, name string) (T, error) {
	key := name
	if namespace != "" {
		key = namespace + "/" + name
	}
	o, known := get[T](t, key)
	var zero T
	switch {
	case o != zero:
		return o, nil
	case known:
		return zero, apierrors.NewNotFound(schema.GroupResource{Resource: string(t.kind)}, name)
	default:
		return zero, fmt.Errorf("%s %s: %w", t.kind, key, ErrUnknown)
	}
}

// Synced says whether the API has listed each of the kinds successfully since this process opened the store; with no
// kinds: pods, Services, EndpointSlices and Nodes.
func (s *Store) Synced(kinds ...Kind) bool {
	if len(kinds) == 0 {
		kinds = []Kind{Pods, Services, EndpointSlices, Nodes}
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, k := range kinds {
		if t := s.tables[k]; t == nil || !t.synced {
			return false
		}
	}
	return true
}

// Known says whether there is something to act on for each of the kinds: the API has listed it in this process, or the file
// holds what an earlier one heard. Kinds of which a cluster always has some (Services, EndpointSlices, Nodes) can be asked for.
func (s *Store) Known(kinds ...Kind) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, k := range kinds {
		if t := s.tables[k]; t == nil || !t.synced && len(t.items) == 0 {
			return false
		}
	}
	return true
}

// Subscribe returns a channel that receives after changes of the given kinds (all watched ones when none is given), also
// after a kind's first successful list, and a function that ends the subscription. Bursts are coalesced.
func (s *Store) Subscribe(kinds ...Kind) (<-chan struct{}, func()) {
	c := make(chan struct{}, 1)
	set := map[Kind]bool{}
	for _, k := range kinds {
		set[k] = true
	}
	if len(kinds) == 0 {
		for k := range s.tables {
			set[k] = true
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.subs[c] = set
	return c, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.subs, c)
	}
}

// Changes tells which objects of one kind have changed, so that whoever has something for each of many does no more than what is
// new. It holds a name for each object at most.
type Changes struct {
	// C receives after a change, and at first if there is anything.
	C <-chan struct{}

	s    *Store
	kind Kind
	c    chan struct{}
	keys map[string]struct{} // guarded by s.mu
}

// Follow begins with all objects that there are.
func (s *Store) Follow(kind Kind) *Changes {
	f := &Changes{s: s, kind: kind, c: make(chan struct{}, 1), keys: map[string]struct{}{}}
	f.C = f.c
	s.mu.Lock()
	defer s.mu.Unlock()
	for k := range s.tables[kind].items {
		f.note(k)
	}
	s.follows[f] = struct{}{}
	return f
}

// note is called with s.mu held.
func (f *Changes) note(keys ...string) {
	for _, k := range keys {
		f.keys[k] = struct{}{}
	}
	select {
	case f.c <- struct{}{}:
	default:
	}
}

// Take returns the keys (namespace/name, or name) of what has been added, changed or deleted since the last call, in no order.
func (f *Changes) Take() []string {
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	out := slices.Collect(maps.Keys(f.keys))
	clear(f.keys)
	return out
}

// End ends the subscription.
func (f *Changes) End() {
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	delete(f.s.follows, f)
}

// changed notes a change for the disk and for the subscribers. mu is held.
func (s *Store) changed(kind Kind, keys ...string) {
	for _, k := range keys {
		s.dirty[dirtyKey{kind, k}] = struct{}{}
	}
	for c, kinds := range s.subs {
		if kinds[kind] {
			select {
			case c <- struct{}{}:
			default:
			}
		}
	}
	for f := range s.follows {
		if f.kind == kind && len(keys) > 0 {
			f.note(keys...)
		}
	}
	if len(keys) > 0 {
		select {
		case s.kick <- struct{}{}:
		default:
		}
	}
}

// Token returns a stored ServiceAccount token, nil when there is none.
func (s *Store) Token(pod types.UID, key string) *authv1.TokenRequest {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.tokens[string(pod)+"/"+key]
}

// PutToken stores a ServiceAccount token of a pod. key tells the pod's tokens apart (audience, life time).
func (s *Store) PutToken(pod types.UID, key string, t *authv1.TokenRequest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := string(pod) + "/" + key
	s.tokens[k] = t
	s.changed(tokens, k)
}

// DeleteTokens forgets all tokens of a pod.
func (s *Store) DeleteTokens(pod types.UID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	prefix := string(pod) + "/"
	for k := range s.tokens {
		if len(k) > len(prefix) && k[:len(prefix)] == prefix {
			delete(s.tokens, k)
			s.changed(tokens, k)
		}
	}
}

// Record returns the agent's record of a pod, nil when there is none. It must not be modified.
func (s *Store) Record(pod types.UID) *Record {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.records[pod]
}

// Records returns all records, in the order of their UIDs.
func (s *Store) Records() []*Record {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := make([]*Record, 0, len(s.records))
	for _, r := range s.records {
		out = append(out, r)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].UID < out[j].UID })
	return out
}

// PutRecord stores the agent's record of a pod; the store takes it over.
func (s *Store) PutRecord(r *Record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.records[r.UID] = r
	s.changed(Records, string(r.UID))
}

// DeleteRecord forgets the record of a pod.
func (s *Store) DeleteRecord(pod types.UID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.records[pod]; ok {
		delete(s.records, pod)
		s.changed(Records, string(pod))
	}
}

// Health returns the error of the latest write to the disk, nil when it succeeded. Changes that could not be written are
// kept in memory and tried again.
func (s *Store) Health() error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.flushErr
}

// runFlusher writes changes until ctx ends.
func (s *Store) runFlusher(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	wait := FlushInterval
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.kick:
		}
		timer.Reset(wait)
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		wait = FlushInterval
		if err := s.Flush(); err != nil {
			s.log.Error("desired state not written, kept in memory and tried again", "err", err, "after", flushRetry)
			wait = flushRetry
			select {
			case s.kick <- struct{}{}:
			default:
			}
		}
	}
}

// Flush writes all changes to the disk now.
func (s *Store) Flush() error {
	s.flushMu.Lock()
	defer s.flushMu.Unlock()
	s.mu.Lock()
	dirty := s.dirty
	s.dirty = map[dirtyKey]struct{}{}
	values := make(map[dirtyKey]func() ([]byte, error), len(dirty))
	for k := range dirty {
		values[k] = s.encoder(k)
	}
	s.mu.Unlock()
	if len(dirty) == 0 {
		return nil
	}
	err := s.write(values)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flushErr = err
	if err != nil {
		for k := range dirty {
			s.dirty[k] = struct{}{}
		}
		return fmt.Errorf("write desired state %s: %w", s.db.Path(), err)
	}
	return nil
}

// encoder returns how to make the bytes of one entry, nil when it is to be deleted. mu is held.
func (s *Store) encoder(k dirtyKey) func() ([]byte, error) {
	switch k.kind {
	case tokens:
		if t := s.tokens[k.key]; t != nil {
			return func() ([]byte, error) {
				b, err := t.Marshal()
				return s.wrap(k, b, err)
			}
		}
	case Records:
		if r := s.records[types.UID(k.key)]; r != nil {
			return func() ([]byte, error) {
				b, err := r.marshal()
				return s.wrap(k, b, err)
			}
		}
	default:
		o, ok := s.tables[k.kind].items[k.key]
		if ok && o == nil {
			return func() ([]byte, error) { return seal(flagAbsent, nil), nil }
		}
		if ok {
			return func() ([]byte, error) {
				b, err := o.Marshal()
				return s.wrap(k, b, err)
			}
		}
	}
	return nil
}

// wrap makes the stored form of an entry.
func (s *Store) wrap(k dirtyKey, b []byte, err error) ([]byte, error) {
	if err != nil {
		return nil, err
	}
	if s.sealer == nil || !secret(k.kind) {
		return seal(flagObject, b), nil
	}
	if b, err = s.sealer.seal(k.kind, k.key, b); err != nil {
		return nil, err
	}
	return seal(flagSealed, b), nil
}

func (s *Store) write(values map[dirtyKey]func() ([]byte, error)) error {
	return s.db.Update(func(tx *bbolt.Tx) error {
		for k, encode := range values {
			b := tx.Bucket([]byte(k.kind))
			if encode == nil {
				if err := b.Delete([]byte(k.key)); err != nil {
					return fmt.Errorf("delete %s %s: %w", k.kind, k.key, err)
				}
				continue
			}
			v, err := encode()
			if err != nil {
				return fmt.Errorf("encode %s %s: %w", k.kind, k.key, err)
			}
			if err := b.Put([]byte(k.key), v); err != nil {
				return fmt.Errorf("put %s %s: %w", k.kind, k.key, err)
			}
		}
		return nil
	})
}
