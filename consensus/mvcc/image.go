package mvcc

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/pkg/v3/traceutil"
	"go.etcd.io/etcd/server/v3/lease"
	"go.etcd.io/etcd/server/v3/storage/backend"
	etcdmvcc "go.etcd.io/etcd/server/v3/storage/mvcc"
	"go.etcd.io/etcd/server/v3/storage/schema"
)

// Image is the store as it was at one moment. It costs no copy, but the database
// cannot reuse space while it is open. One goroutine uses it at a time.
type Image struct {
	// Revision and Index (of the log) of the state.
	Revision int64
	Index    uint64
	snap     backend.Snapshot
}

// Pin opens an image of the present state. It makes what is applied durable
// first. Close it before the machine, which waits for it.
func (m *Machine) Pin() (i *Image, err error) {
	err = m.use(func() error {
		return m.beside(func(be *database) error {
			i = &Image{Revision: m.kv.Rev(), Index: m.applied.Load(), snap: be.Snapshot()}
			return nil
		})
	})
	return i, err
}

// Size of the image in bytes.
func (i *Image) Size() int64 { return i.snap.Size() }

// Write writes the database. It may be called once. It gives up when done is
// closed.
func (i *Image) Write(w io.Writer, done <-chan struct{}) (int64, error) {
	kept := &stoppable{w: w, done: done} // it keeps the error, which bbolt hides in a text
	n, err := i.snap.WriteTo(kept)
	if kept.err != nil {
		err = kept.err
	}
	return n, err
}

// Close releases the image. Idempotent.
func (i *Image) Close() error {
	if i.snap == nil {
		return nil
	}
	s := i.snap
	i.snap = nil
	return s.Close()
}

// The functions below work on the database of a replica that does not run: of
// one that is to be the first of a new Raft group.

// PlaceImage writes an image to where a machine with the directory dir finds it.
func PlaceImage(dir string, r io.Reader) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("mvcc: %w", err)
	}
	m := Machine{cfg: Config{Dir: dir}}
	f, err := os.OpenFile(m.path(1), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("mvcc: %w", err)
	}
	_, err = io.Copy(f, r)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("mvcc: write %s: %w", f.Name(), err)
	}
	return nil
}

// Database is the file of the newest generation in a machine's directory.
func Database(dir string) (string, error) {
	m := Machine{cfg: Config{Dir: dir}}
	gen, err := m.newestGeneration()
	if err != nil {
		return "", err
	}
	return m.path(gen), nil
}

// Edit deletes all keys with some prefixes and puts others, in one revision, on a
// machine that was opened by hand and that no log drives.
func (m *Machine) Edit(deletePrefixes []string, puts map[string][]byte) {
	tx := m.kv.Write(traceutil.TODO())
	defer tx.End()
	for _, p := range deletePrefixes {
		end := []byte(p)
		end[len(end)-1]++ // prefixes end in a slash
		tx.DeleteRange([]byte(p), end)
	}
	for _, k := range slices.Sorted(maps.Keys(puts)) {
		tx.Put([]byte(k), puts[k], lease.NoLease)
	}
}

// Rebased says what Rebase made of a database.
type Rebased struct {
	// From is the newest revision that the database had, To the one it has.
	From, To int64
}

// rebasedPrefix, and the revision, is the key that Rebase writes.
const rebasedPrefix = "/skein/cluster/rebased/"

// Rebase makes the database in dir the beginning of a new Raft group: it forgets
// the index of the old log and any hold, moves the revision on by bump, and marks
// everything up to there compacted, so that no client that has seen later
// revisions of the old group takes new ones for what it knows (as etcdutl
// snapshot restore --bump-revision --mark-compacted). A key below
// /skein/cluster/rebased/ keeps the reason. The fences stay.
func Rebase(dir string, bump int64, reason string) (out Rebased, err error) {
	path, err := Database(dir)
	if err != nil {
		return out, err
	}
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: time.Second, FreelistType: bolt.FreelistMapType})
	if err != nil {
		return out, fmt.Errorf("mvcc: open %s: %w", path, err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		meta, keys := tx.Bucket(schema.Meta.Name()), tx.Bucket(schema.Key.Name())
		if meta == nil || keys == nil {
			return errors.New("it is not the database of a store")
		}
		if out.From, err = newestRevision(meta, keys); err != nil {
			return err
		}
		if out.From > math.MaxInt64-bump-1 {
			return fmt.Errorf("its revision %d leaves no room", out.From)
		}
		out.To = out.From + bump
		key := fmt.Sprintf("%s%020d", rebasedPrefix, out.To)
		kv := mvccpb.KeyValue{Key: []byte(key), Value: []byte(reason), CreateRevision: out.To, ModRevision: out.To, Version: 1}
		val, err := kv.Marshal()
		if err != nil {
			return err
		}
		at := etcdmvcc.RevToBytes(etcdmvcc.Revision{Main: out.To}, etcdmvcc.NewRevBytes())
		if err := keys.Put(at, val); err != nil {
			return err
		}
		for _, k := range [][]byte{schema.MetaConsistentIndexKeyName, schema.MetaTermKeyName, holdKey, partKey} {
			if err := meta.Delete(k); err != nil {
				return err
			}
		}
		return meta.Put(schema.ScheduledCompactKeyName, at)
	})
	if err = errors.Join(err, db.Sync(), db.Close()); err != nil {
		return out, fmt.Errorf("mvcc: rebase %s: %w", path, err)
	}
	return out, syncPath(filepath.Dir(path))
}

func newestRevision(meta, keys *bolt.Bucket) (int64, error) {
	rev := int64(1) // of an empty store
	last, _ := keys.Cursor().Last()
	for _, b := range [][]byte{last, meta.Get(schema.ScheduledCompactKeyName), meta.Get(schema.FinishedCompactKeyName)} {
		if b == nil {
			continue
		}
		if len(b) < 17 || binary.BigEndian.Uint64(b) > math.MaxInt64 {
			return 0, fmt.Errorf("%x is no revision", b)
		}
		rev = max(rev, int64(binary.BigEndian.Uint64(b)))
	}
	return rev, nil
}

func syncPath(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
