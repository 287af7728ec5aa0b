package raftlog

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/lni/dragonboat/v4/config"
	"github.com/lni/dragonboat/v4/raftio"
	"github.com/lni/dragonboat/v4/raftpb"
)

const (
	// Name and format mark dragonboat's directory, so that another log is not opened
	// with this code.
	Name                = "skein-raftlog"
	binaryFormat uint32 = 0x5ce10001
	// subDir of dragonboat's directory.
	subDir = "raftlog"

	defaultSegment = 8 << 20
	// endRoom is kept for the record that ends a segment.
	endRoom = recordHead + 8
	// keepBuffer is the largest record buffer that is kept.
	keepBuffer = 1 << 20
	// spareSegments beyond twice of what is needed may lie around before entries are
	// moved to free them.
	spareSegments = 4
	// moveBytes is how much is moved at once.
	moveBytes = 1 << 20
)

// Factory makes the log of a dragonboat directory.
type Factory struct {
	// SegmentBytes of a file. Default 8 MiB.
	SegmentBytes int64
	// OnSync is told how long the flush of a batch took, after each. Optional.
	OnSync func(time.Duration)
	// Logger; nil discards.
	Logger *slog.Logger
}

var _ config.LogDBFactory = Factory{}

// Name implements config.LogDBFactory.
func (Factory) Name() string { return Name }

// Create implements config.LogDBFactory.
func (f Factory) Create(_ config.NodeHostConfig, _ config.LogDBCallback, dirs, _ []string) (raftio.ILogDB, error) {
	if len(dirs) != 1 {
		return nil, fmt.Errorf("raftlog: %d directories, one is expected", len(dirs))
	}
	return Open(filepath.Join(dirs[0], subDir), f)
}

// DB is an open log.
type DB struct {
	dir string
	cfg Factory
	log *slog.Logger

	// write serialises writers and guards what only they use. It is held over I/O on
	// purpose: a record is durable before the next is written.
	write   sync.Mutex
	w       builder
	end     int64 // where the next record goes in the newest segment
	ended   bool  // the newest segment takes no more
	rotated bool  // a segment was begun since the last collect
	records int   // that replay found in the newest segment
	broken  error
	pending map[raftio.NodeInfo]bool // commit indexes that are not on disk
	spare   spareFile
	saved   []saved // of the record being made; spans and places likewise
	spans   []span
	places  []place

	// mu guards the rest. Who changes it holds write as well, so that writers need not
	// hold mu to look, and waits for no disk meanwhile. Who reads a segment holds mu for
	// reading, so that the file stays.
	mu       sync.RWMutex
	nodes    map[raftio.NodeInfo]*node
	segments []*segment // oldest first, the last is written to
}

var _ raftio.ILogDB = (*DB)(nil)

// Open reads the log in dir, which is made when missing, and begins a new segment,
// unless the newest holds nothing but its checkpoint: a process that dies soon after every
// start must not fill the disk. It returns ErrCorrupt when the log lacks something.
func Open(dir string, cfg Factory) (*DB, error) {
	if cfg.SegmentBytes == 0 {
		cfg.SegmentBytes = defaultSegment
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("raftlog: %w", err)
	}
	if err := syncDir(filepath.Dir(dir)); err != nil {
		return nil, fmt.Errorf("raftlog: %w", err)
	}
	d := &DB{dir: dir, cfg: cfg, log: cfg.Logger, nodes: map[raftio.NodeInfo]*node{}, pending: map[raftio.NodeInfo]bool{}}
	d.spare = spareFile{dir: dir, size: cfg.SegmentBytes, log: d.log}
	err := d.replay()
	switch {
	case err != nil:
	case d.newest() != nil && !d.ended && d.records == 1:
		d.rotated = true // for collect
	default:
		err = d.rotate(0)
	}
	if err == nil {
		err = d.collect()
	}
	if err != nil {
		return nil, errors.Join(err, d.spare.close(), d.closeFiles())
	}
	return d, nil
}

// Name implements raftio.ILogDB.
func (d *DB) Name() string { return Name }

// BinaryFormat implements raftio.ILogDB.
func (d *DB) BinaryFormat() uint32 { return binaryFormat }

// Close implements raftio.ILogDB. Commit indexes are written, so that a restart
// begins where this process was.
func (d *DB) Close() error {
	d.write.Lock()
	defer d.write.Unlock()
	var err error
	if d.broken == nil && len(d.pending) > 0 {
		d.w.reset()
		_, _, err = d.commit()
	}
	if d.broken == nil {
		d.broken = errors.New("raftlog: closed")
	}
	return errors.Join(err, d.spare.close(), d.closeFiles())
}

func (d *DB) closeFiles() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	for _, s := range d.segments {
		errs = append(errs, s.f.Close())
	}
	d.segments = nil
	return errors.Join(errs...)
}

// newest segment, nil before the first; write is held.
func (d *DB) newest() *segment {
	if len(d.segments) == 0 {
		return nil
	}
	return d.segments[len(d.segments)-1]
}

// commit makes the builder's record durable, with the commit indexes that were held
// back, and returns where it is. write is held.
func (d *DB) commit() (at *segment, off int64, err error) {
	if d.broken != nil {
		return nil, 0, d.broken
	}
	for n := range d.pending {
		if x := d.nodes[n]; x != nil {
			d.w.state(n, x.state)
		}
	}
	clear(d.pending)
	if at, off, err = d.append(); err != nil {
		d.broken = fmt.Errorf("%w: %w", ErrBroken, err)
		return nil, 0, d.broken
	}
	if cap(d.w.b) > keepBuffer {
		d.w.b = nil
	}
	return at, off, nil
}

func (d *DB) append() (*segment, int64, error) {
	size := int64(len(d.w.b))
	if size > maxRecord {
		return nil, 0, fmt.Errorf("raftlog: a record of %d bytes, at most %d are possible", size, maxRecord)
	}
	if d.end+size+endRoom > d.newest().size {
		if err := d.rotate(size); err != nil {
			return nil, 0, err
		}
	}
	s, off := d.newest(), d.end
	if _, err := s.f.WriteAt(d.w.seal(s.number), off); err != nil {
		return nil, 0, fmt.Errorf("write %s: %w", s.path, err)
	}
	start := time.Now()
	if err := fdatasync(s.f); err != nil {
		return nil, 0, fmt.Errorf("sync %s: %w", s.path, err)
	}
	if d.cfg.OnSync != nil {
		d.cfg.OnSync(time.Since(start))
	}
	d.end += size
	return s, off, nil
}

// rotate ends the newest segment and begins another, which has room for a record of
// need bytes. The new one gets its name when its checkpoint is durable, so whatever
// has a name is whole. write is held.
func (d *DB) rotate(need int64) error {
	number := uint64(1)
	if s := d.newest(); s != nil {
		number = s.number + 1
		if !d.ended {
			var w builder
			w.reset()
			w.head(kindEnd, raftio.NodeInfo{})
			if _, err := s.f.WriteAt(w.seal(s.number), d.end); err != nil {
				return fmt.Errorf("write %s: %w", s.path, err)
			}
			if err := fdatasync(s.f); err != nil {
				return fmt.Errorf("sync %s: %w", s.path, err)
			}
			d.ended = true
		}
	}
	var w builder
	d.checkpoint(&w)
	used := headerSize + int64(len(w.b))
	s := &segment{number: number, path: filepath.Join(d.dir, segmentName(number)), size: max(d.cfg.SegmentBytes, used+need+endRoom)}
	f, err := d.spare.take(s.size)
	if err != nil {
		return err
	}
	s.f = f
	if _, err = f.WriteAt(append(segmentHeader(number), w.seal(number)...), 0); err == nil {
		err = fdatasync(f)
	}
	if err == nil {
		err = os.Rename(d.spare.path(), s.path)
	}
	if err == nil {
		err = syncDir(d.dir)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("begin %s: %w", s.path, err), f.Close())
	}
	d.mu.Lock()
	d.segments = append(d.segments, s)
	d.mu.Unlock()
	d.end, d.ended, d.rotated = used, false, true
	return nil
}

// checkpoint builds the record of all state but the entries.
func (d *DB) checkpoint(w *builder) {
	w.reset()
	for _, n := range slices.SortedFunc(maps.Keys(d.nodes), compareNodes) {
		x := d.nodes[n]
		if x.bootstrap != nil {
			w.message(kindBootstrap, n, x.bootstrap)
		}
		if x.hasState {
			w.state(n, x.state)
		}
		if !raftpb.IsEmptySnapshot(x.snapshot) {
			w.message(kindSnapshot, n, &x.snapshot)
		}
		w.removed(n, x.removed)
	}
	if w.empty() { // a record is never empty
		w.head(kindForget, raftio.NodeInfo{})
	}
}

func compareNodes(a, b raftio.NodeInfo) int {
	return cmp.Or(cmp.Compare(a.ShardID, b.ShardID), cmp.Compare(a.ReplicaID, b.ReplicaID))
}

// collect frees the segments that hold nothing needed, if one was begun since the
// last call: its checkpoint is what allows that. When too much is kept by entries of
// quiet groups, these are moved to the end. write is held, and what the builder holds
// is lost.
func (d *DB) collect() error {
	for d.rotated {
		d.rotated = false
		oldest, live := d.liveSegments()
		if err := d.free(oldest); err != nil {
			return err
		}
		var total int64
		for _, s := range d.segments {
			total += s.size
		}
		if s := d.segments[0]; s != d.newest() && total > 2*live+spareSegments*d.cfg.SegmentBytes {
			if err := d.moveAll(s); err != nil {
				return err
			}
			d.rotated = true // look again
		}
	}
	return nil
}

// liveSegments returns the number of the oldest segment with entries that are needed,
// and the bytes of all such entries.
func (d *DB) liveSegments() (oldest uint64, live int64) {
	oldest = d.newest().number
	for _, x := range d.nodes {
		live += x.bytes
		for i := range x.places {
			oldest = min(oldest, x.places[i].seg.number)
		}
	}
	return oldest, live
}

// free removes the segments before a number, or keeps one's file for later.
func (d *DB) free(before uint64) error {
	d.mu.Lock()
	n := 0
	for n < len(d.segments)-1 && d.segments[n].number < before {
		n++
	}
	gone := slices.Clone(d.segments[:n])
	d.segments = slices.Delete(d.segments, 0, n)
	d.mu.Unlock()
	var errs []error
	for _, s := range gone {
		if kept, err := d.spare.keep(s); err != nil || !kept {
			errs = append(errs, err, s.f.Close(), os.Remove(s.path))
		}
	}
	if len(gone) > 0 {
		errs = append(errs, syncDir(d.dir))
	}
	d.spare.prepare()
	return errors.Join(errs...)
}

// moveAll writes the needed entries of a segment once more, so that it can go.
func (d *DB) moveAll(s *segment) error {
	for n, x := range d.nodes {
		for i := 0; i < len(x.places); {
			if x.places[i].seg != s {
				i++
				continue
			}
			j, size := i, 0
			for j < len(x.places) && x.places[j].seg == s && size < moveBytes {
				size += int(x.places[j].len)
				j++
			}
			first := x.first + uint64(i)
			ents, err := readEntries(nil, x.places[i:j])
			if err != nil {
				return err
			}
			d.w.reset()
			spans := slices.Clone(d.w.entries(kindMoved, n, ents))
			at, off, err := d.commit()
			if err != nil {
				return err
			}
			d.mu.Lock()
			x.move(first, places(at, off, spans))
			d.mu.Unlock()
			i = j
		}
	}
	return nil
}

func places(s *segment, off int64, spans []span) []place {
	out := make([]place, len(spans))
	for i, p := range spans {
		out[i] = place{s, span{uint32(off) + p.off, p.len}}
	}
	return out
}
