package desired

import (
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	"k8s.io/apimachinery/pkg/watch"
)

var seenKey = []byte("seen")

// Watched says whether the copy follows the API now: pods, Services, EndpointSlices and Nodes have been listed in this process, and a
// watch of each is open. An open watch of a node that has just been cut off ends only when that is noticed.
func (s *Store) Watched() bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, t := range []*table{s.pods, s.services, s.slices, s.nodes} {
		if !t.synced || t.open == 0 {
			return false
		}
	}
	return true
}

// Saw notes that at a moment of this node's clock the copy was the truth.
func (s *Store) Saw(at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen = at
}

// Seen is the last such moment, of an earlier process too, as far as it was saved; zero when there is none.
func (s *Store) Seen() time.Time {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.seen
}

// SaveSeen writes it to the disk.
func (s *Store) SaveSeen() error {
	at := s.Seen()
	if at.IsZero() {
		return nil
	}
	err := s.db.Update(func(tx *bbolt.Tx) error {
		return tx.Bucket(metaBucket).Put(seenKey, binary.BigEndian.AppendUint64(nil, uint64(at.UnixMilli())))
	})
	if err != nil {
		return fmt.Errorf("write desired state %s: %w", s.db.Path(), err)
	}
	return nil
}

// loadSeen reads it. It is for people: what is damaged is as good as nothing.
func loadSeen(meta *bbolt.Bucket) time.Time {
	b := meta.Get(seenKey)
	if len(b) != 8 {
		return time.Time{}
	}
	return time.UnixMilli(int64(binary.BigEndian.Uint64(b)))
}

// counted counts a watch of the table as open until it is stopped, which the reflector does in any case.
func (t *table) counted(w watch.Interface) watch.Interface {
	t.s.mu.Lock()
	t.open++
	t.s.mu.Unlock()
	return &openWatch{Interface: w, closed: sync.OnceFunc(func() {
		t.s.mu.Lock()
		t.open--
		t.s.mu.Unlock()
	})}
}

type openWatch struct {
	watch.Interface
	closed func()
}

func (w *openWatch) Stop() {
	w.closed()
	w.Interface.Stop()
}
