package desired

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	authv1 "k8s.io/api/authentication/v1"
	"k8s.io/apimachinery/pkg/types"
)

var (
	metaBucket = []byte("meta")
	versionKey = []byte("version")
	nodeKey    = []byte("node")
)

// lockTimeout is how long Open waits for another process to let go of the file.
const lockTimeout = 2 * time.Second

var (
	// ErrInUse says that another process holds the file.
	ErrInUse = errors.New("the file is in use by another process")
	// ErrNewer says that a later release wrote the file.
	ErrNewer = errors.New("the file was written by a later version")
)

// Open loads the store from a file, or makes a new one. A corrupt file is moved aside (to path + ".corrupt", replacing an
// older one), reported through log, and replaced by an empty one, which Run fills again from the API; until it has, Synced
// is false. A file in use (ErrInUse) or of a later version (ErrNewer) is refused and left alone. log may be nil.
//
// key (KeySize bytes) seals Secrets and tokens in the file; nil leaves them in clear. Entries that another key sealed are dropped: the
// API is asked for them anew.
func Open(path string, key []byte, log *slog.Logger) (*Store, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("open desired state: %w", err)
	}
	sealer, err := newSealer(key)
	if err != nil {
		return nil, err
	}
	s, err := load(path, sealer, log)
	if err == nil || !errors.Is(err, ErrCorrupt) {
		return s, err
	}
	aside := path + ".corrupt"
	if rerr := os.Rename(path, aside); rerr != nil {
		return nil, fmt.Errorf("open desired state: %w; and it cannot be moved aside: %w", err, rerr)
	}
	if log != nil {
		log.Error("desired state is corrupt: moved aside, to be rebuilt from the API", "err", err, "moved_to", aside)
	}
	return load(path, sealer, log)
}

// load opens the file and reads all of it. bbolt panics on some damaged pages, and a truncated map faults: both are
// reported as ErrCorrupt.
func load(path string, sealer *sealer, log *slog.Logger) (s *Store, err error) {
	if st, serr := os.Stat(path); serr == nil && st.Size() == 0 {
		return nil, fmt.Errorf("open desired state %s: %w: the file is empty", path, ErrCorrupt)
	}
	s = newStore(log)
	s.sealer = sealer
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", ErrCorrupt, p)
		}
		if err != nil {
			if s.db != nil {
				_ = s.db.Close()
			}
			s, err = nil, fmt.Errorf("open desired state %s: %w", path, err)
		}
	}()
	s.db, err = bbolt.Open(path, 0o600, &bbolt.Options{Timeout: lockTimeout, NoFreelistSync: true, FreelistType: bbolt.FreelistMapType})
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return s, ErrInUse
	case errors.Is(err, bolterrors.ErrInvalid), errors.Is(err, bolterrors.ErrVersionMismatch), errors.Is(err, bolterrors.ErrChecksum):
		return s, fmt.Errorf("%w: %w", ErrCorrupt, err)
	case err != nil:
		return s, damaged(path, err)
	}
	if err := s.db.Update(prepare); err != nil {
		return s, err
	}
	return s, s.db.View(s.read)
}

// damaged tells a file too short to be one of ours, for which bbolt has no error value, from a failing disk.
func damaged(path string, err error) error {
	if st, serr := os.Stat(path); serr == nil && st.Size() > 0 && st.Size() < int64(2*os.Getpagesize()) {
		return fmt.Errorf("%w: %d bytes: %w", ErrCorrupt, st.Size(), err)
	}
	return err
}

// prepare checks the version and makes missing buckets.
func prepare(tx *bbolt.Tx) error {
	meta, err := tx.CreateBucketIfNotExists(metaBucket)
	if err != nil {
		return err
	}
	switch v := meta.Get(versionKey); {
	case v == nil, len(v) == 4 && binary.BigEndian.Uint32(v) < formatVersion: // a former version's entries are read as they are
		if err := meta.Put(versionKey, binary.BigEndian.AppendUint32(nil, formatVersion)); err != nil {
			return err
		}
	case len(v) != 4:
		return fmt.Errorf("%w: version of %d bytes", ErrCorrupt, len(v))
	case binary.BigEndian.Uint32(v) > formatVersion:
		return fmt.Errorf("%w: it has version %d, this binary knows up to %d", ErrNewer, binary.BigEndian.Uint32(v), formatVersion)
	}
	for _, k := range []Kind{Pods, Services, EndpointSlices, Nodes, ConfigMaps, Secrets, Claims, Volumes, tokens, Records} {
		if _, err := tx.CreateBucketIfNotExists([]byte(k)); err != nil {
			return err
		}
	}
	return nil
}

// read loads all buckets into memory.
func (s *Store) read(tx *bbolt.Tx) error {
	each := func(k Kind, f func(key string, flag byte, payload []byte) error) error {
		return tx.Bucket([]byte(k)).ForEach(func(key, v []byte) error {
			flag, payload, err := open(v)
			if err == nil {
				if flag, payload, err = s.unseal(k, string(key), flag, payload); errors.Is(err, errForeign) {
					return nil // unseal has seen to it
				}
			}
			if err == nil {
				err = f(string(key), flag, payload)
			}
			if err != nil {
				return fmt.Errorf("%s %q: %w", k, key, err)
			}
			return nil
		})
	}
	for kind, t := range s.tables {
		if err := each(kind, func(key string, flag byte, payload []byte) error {
			if flag == flagAbsent {
				t.items[key] = nil
				return nil
			}
			o := t.make()
			if err := o.Unmarshal(payload); err != nil {
				return corrupt("object", err)
			}
			t.items[key] = s.keep(o)
			return nil
		}); err != nil {
			return err
		}
	}
	if err := each(tokens, func(key string, _ byte, payload []byte) error {
		t := &authv1.TokenRequest{}
		s.tokens[key] = t
		return corrupt("token", t.Unmarshal(payload))
	}); err != nil {
		return err
	}
	return each(Records, func(key string, _ byte, payload []byte) error {
		r := &Record{}
		if err := r.unmarshal(payload); err != nil {
			return err
		}
		if string(r.UID) != key {
			return fmt.Errorf("%w: record of pod %q", ErrCorrupt, r.UID)
		}
		s.records[types.UID(key)] = r
		return nil
	})
}

// unseal opens what is sealed. An entry that was sealed with another key is dropped, a plain one that should be sealed is written anew,
// both by the next flush.
func (s *Store) unseal(kind Kind, key string, flag byte, payload []byte) (byte, []byte, error) {
	if flag != flagSealed {
		if flag == flagObject && s.sealer != nil && secret(kind) {
			s.dirty[dirtyKey{kind, key}] = struct{}{}
		}
		return flag, payload, nil
	}
	plain, err := s.sealer.open(kind, key, payload)
	if err != nil {
		s.log.Warn("an entry of the desired state was sealed with another key and is dropped", "kind", kind, "key", key)
		s.dirty[dirtyKey{kind, key}] = struct{}{}
	}
	return flagObject, plain, err
}

// claim notes for which node the file is. A file of another node (a cloned or renamed machine) is emptied: nothing in it
// concerns this one.
func (s *Store) claim(node string) error {
	var old string
	err := s.db.Update(func(tx *bbolt.Tx) error {
		meta := tx.Bucket(metaBucket)
		if old = string(meta.Get(nodeKey)); old == node {
			s.Saw(loadSeen(meta))
		}
		return meta.Put(nodeKey, []byte(node))
	})
	if err != nil || old == "" || old == node {
		return err
	}
	s.log.Warn("desired state was another node's: emptied", "was", old, "is", node)
	s.mu.Lock()
	defer s.mu.Unlock()
	for kind, t := range s.tables {
		for k := range t.items {
			delete(t.items, k)
			s.changed(kind, k)
		}
	}
	for k := range s.tokens {
		delete(s.tokens, k)
		s.changed(tokens, k)
	}
	for k := range s.records {
		delete(s.records, k)
		s.changed(Records, string(k))
	}
	return nil
}

// Close writes what is left and closes the file. Run must have returned.
func (s *Store) Close() error {
	err := errors.Join(s.Flush(), s.SaveSeen())
	if cerr := s.db.Close(); cerr != nil {
		err = errors.Join(err, fmt.Errorf("close desired state: %w", cerr))
	}
	return err
}
