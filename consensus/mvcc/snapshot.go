package mvcc

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	dsm "github.com/lni/dragonboat/v4/statemachine"
	"go.etcd.io/etcd/pkg/v3/traceutil"
	"go.etcd.io/etcd/server/v3/lease"
	"go.etcd.io/etcd/server/v3/storage/backend"
)

// A snapshot stream is this magic, whose last byte is the format's version, the
// database's size as eight bytes, and the database. Dragonboat checks its
// blocks' checksums.
var snapshotMagic = [8]byte{'S', 'K', 'E', 'I', 'N', 'S', 'N', 1}

// ErrBadSnapshot is returned for a snapshot that is not one, or of another
// version.
var ErrBadSnapshot = errors.New("mvcc: not a snapshot of this version")

// path of a generation's database. A snapshot and a defragmentation write a new
// generation beside the one in use, and give it its name when it is whole.
func (m *Machine) path(gen uint64) string {
	return filepath.Join(m.cfg.Dir, fmt.Sprintf("db.%08d", gen))
}

// newestGeneration finds the database to open, and deletes what a crash left of
// others: an unfinished file, or a generation that had been replaced.
func (m *Machine) newestGeneration() (uint64, error) {
	ents, err := os.ReadDir(m.cfg.Dir)
	if err != nil {
		return 0, fmt.Errorf("mvcc: %w", err)
	}
	var gens []uint64
	for _, e := range ents {
		v, ok := strings.CutPrefix(e.Name(), "db.")
		if !ok {
			continue
		}
		if strings.HasSuffix(v, ".tmp") {
			if err := os.Remove(filepath.Join(m.cfg.Dir, e.Name())); err != nil {
				return 0, fmt.Errorf("mvcc: %w", err)
			}
		} else if g, err := strconv.ParseUint(v, 10, 64); err == nil {
			gens = append(gens, g)
		}
	}
	if len(gens) == 0 {
		return 1, nil
	}
	slices.Sort(gens)
	newest := gens[len(gens)-1]
	for _, g := range gens[:len(gens)-1] {
		if err := os.Remove(m.path(g)); err != nil {
			return 0, fmt.Errorf("mvcc: %w", err)
		}
	}
	return newest, nil
}

// PrepareSnapshot implements IOnDiskStateMachine: it pins the state as of the
// last applied entry, whose index is part of it.
func (m *Machine) PrepareSnapshot() (s any, err error) {
	err = m.beside(func(be *database) error { s = be.Snapshot(); return nil })
	return s, err
}

// stoppable ends a copy when dragonboat stops the replica. It keeps the error:
// bbolt hides it in a text, and dragonboat, which compares it, would end the
// process because a receiver went away.
type stoppable struct {
	w    io.Writer
	done <-chan struct{}
	err  error
}

func (s *stoppable) Write(p []byte) (n int, err error) {
	select {
	case <-s.done:
		s.err = dsm.ErrSnapshotStopped
		return 0, s.err
	default:
		n, s.err = s.w.Write(p)
		return n, s.err
	}
}

// SaveSnapshot implements IOnDiskStateMachine; it runs beside Update.
func (m *Machine) SaveSnapshot(prepared any, w io.Writer, done <-chan struct{}) error {
	snap := prepared.(backend.Snapshot)
	out := &stoppable{w: w, done: done}
	_, err := out.Write(binary.BigEndian.AppendUint64(snapshotMagic[:], uint64(snap.Size())))
	if err == nil {
		_, err = snap.WriteTo(out)
	}
	if cerr := snap.Close(); cerr != nil {
		m.log.Warn("cannot close a snapshot", "error", cerr)
	}
	if out.err != nil {
		return out.err
	}
	return err
}

// receive writes the snapshot into a new generation's file, durably.
func (m *Machine) receive(gen uint64, r io.Reader, done <-chan struct{}) (err error) {
	var head [16]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	if [8]byte(head[:8]) != snapshotMagic {
		return fmt.Errorf("%w: it begins with %x", ErrBadSnapshot, head[:8])
	}
	size := binary.BigEndian.Uint64(head[8:])
	if size > math.MaxInt64 {
		return fmt.Errorf("%w: %d bytes", ErrBadSnapshot, size)
	}
	tmp := m.path(gen) + ".tmp"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(tmp))
		}
	}()
	_, err = io.CopyN(&stoppable{w: f, done: done}, r, int64(size))
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp, m.path(gen)); err != nil {
		return err
	}
	return syncDir(m.cfg.Dir)
}

// RecoverFromSnapshot implements IOnDiskStateMachine. The order of the switch is
// etcd's: index, lessor, store, hook; only then may the old generation go.
func (m *Machine) RecoverFromSnapshot(r io.Reader, done <-chan struct{}) error {
	start := time.Now()
	defer m.endDefrag()()
	old := m.backend()
	next := m.gen.Add(1)
	if err := m.receive(next, r, done); err != nil {
		if errors.Is(err, dsm.ErrSnapshotStopped) {
			return dsm.ErrSnapshotStopped // compared by == in dragonboat
		}
		return fmt.Errorf("mvcc: receive snapshot: %w", err)
	}
	m.installed.Lock()
	defer m.installed.Unlock()
	be := newDatabase(m.openFile(m.path(next)))
	m.index.SetBackend(be)
	index := m.index.ConsistentIndex()
	m.lessor.Recover(be, func() lease.TxnDelete { return m.kv.Write(traceutil.TODO()) })
	if err := m.kv.Restore(be); err != nil { // open watches catch up from here
		return fmt.Errorf("mvcc: restore snapshot: %w", err)
	}
	m.loadFences(be)
	if err := m.loadPart(be, index); err != nil {
		return err
	}
	if err := m.loadAlarms(be); err != nil {
		return fmt.Errorf("mvcc: read the alarms of a snapshot: %w", err)
	}
	be.SetTxPostLockInsideApplyHook(m.postLock)
	m.beMu.Lock()
	m.be = be
	m.beMu.Unlock()
	m.applied.Store(index)
	m.recoveries.Add(1)
	m.waiters.failBelow(math.MaxUint64, ErrLost)
	old.cur.Load().recording.Store(false) // its last commit is not of this log any more
	m.retire(old.cur.Load())
	m.log.Info("installed a snapshot", "index", index, "revision", m.kv.Rev(), "took", time.Since(start))
	return nil
}
