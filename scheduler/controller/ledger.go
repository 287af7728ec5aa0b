package controller

import (
	"errors"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/client-go/tools/cache"
)

// ErrStaleView says that the shared view does not show this controller's own
// writes yet, so that nothing may be decided from it.
var ErrStaleView = errors.New("the shared view does not show own writes yet")

// LedgerTimeout bounds how long a write is waited for that never shows up in
// the view. Upstream's expectations time out after the same 5 minutes.
const LedgerTimeout = 5 * time.Minute

// Ledger remembers which objects of one kind a controller wrote and deleted,
// until the view shows it. A controller that counts objects must not count
// again before: it would create or delete too many.
//
// It replaces upstream's counters of expected events. Those depend on every
// event being delivered once and attributed rightly; a ledger only compares
// states: a write is shown when the view holds the object at that resource
// version or a later one, or when the whole view has passed that version (then
// the object came and went); a deleted object is shown when the view has it no
// longer, has another of that name, or shows it terminating. It is safe for
// concurrent use.
type Ledger struct {
	view Store
	mu   sync.Mutex
	// writes holds, by key of the controller, the writes not shown yet. Guarded by mu.
	writes map[string]map[types.UID]write
}

// Store is the part of a cache.Indexer that a Ledger reads.
type Store interface {
	GetByKey(key string) (any, bool, error)
	LastStoreSyncResourceVersion() string
}

type write struct {
	object  string // namespace/name
	version string // that was written
	deleted bool
	at      time.Time
}

// NewLedger returns an empty ledger for objects of the kind that view holds.
func NewLedger(view Store) *Ledger {
	return &Ledger{view: view, writes: map[string]map[types.UID]write{}}
}

// Wrote records that the worker of key created or updated obj, which is as the
// API returned it.
func (l *Ledger) Wrote(key string, obj metav1.Object, now time.Time) { l.add(key, obj, false, now) }

// Deleted records that the worker of key asked for the deletion of obj.
func (l *Ledger) Deleted(key string, obj metav1.Object, now time.Time) { l.add(key, obj, true, now) }

func (l *Ledger) add(key string, obj metav1.Object, deleted bool, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.writes[key] == nil {
		l.writes[key] = map[types.UID]write{}
	}
	l.writes[key][obj.GetUID()] = write{
		object:  cache.MetaObjectToName(obj).String(),
		version: obj.GetResourceVersion(),
		deleted: deleted,
		at:      now,
	}
}

// Pending returns how many writes of key the view does not show yet, and
// forgets those that it shows. It must be asked before the view is read: what
// was read before may lack a write that the view shows a moment later.
func (l *Ledger) Pending(key string, now time.Time) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	m := l.writes[key]
	for uid, w := range m {
		if now.Sub(w.at) >= LedgerTimeout || l.shown(uid, w) {
			delete(m, uid)
		}
	}
	if len(m) == 0 {
		delete(l.writes, key)
	}
	return len(m)
}

// Forget drops what is known of key, whose object is gone.
func (l *Ledger) Forget(key string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.writes, key)
}

func (l *Ledger) shown(uid types.UID, w write) bool {
	var held metav1.Object
	if obj, ok, err := l.view.GetByKey(w.object); err == nil && ok {
		held, _ = obj.(metav1.Object)
	}
	if w.deleted {
		return held == nil || held.GetUID() != uid || held.GetDeletionTimestamp() != nil
	}
	if held != nil && held.GetUID() == uid && reached(held.GetResourceVersion(), w.version) {
		return true
	}
	at := l.view.LastStoreSyncResourceVersion()
	return at != "" && reached(at, w.version)
}

// reached says that version at is not older than version want. Versions that
// cannot be compared must not hold anything up.
func reached(at, want string) bool {
	c, err := resourceversion.CompareResourceVersion(at, want)
	return err != nil || c >= 0
}
