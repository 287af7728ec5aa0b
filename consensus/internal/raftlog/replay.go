package raftlog

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/lni/dragonboat/v4/raftpb"
)

// replay reads the log into memory. What a crash left behind the last record is
// passed over; the next segment begins after it.
func (d *DB) replay() error {
	numbers, useless, err := listSegments(d.dir)
	if err != nil {
		return err
	}
	for _, name := range useless {
		if path := filepath.Join(d.dir, name); path != d.spare.path() {
			if err := os.Remove(path); err != nil {
				return fmt.Errorf("raftlog: %w", err)
			}
		}
	}
	if err := d.spare.adopt(); err != nil {
		return fmt.Errorf("raftlog: %w", err)
	}
	for i, number := range numbers {
		s, err := openSegment(d.dir, number)
		if err != nil {
			return err
		}
		d.segments = append(d.segments, s)
		if err := d.replaySegment(s); err != nil {
			return err
		}
		if i < len(numbers)-1 && !d.ended {
			return fmt.Errorf("%w: no record in %s at offset %d, and it is not the newest segment", ErrCorrupt, s.path, d.end)
		}
	}
	for n, x := range d.nodes {
		if err := x.check(); err != nil {
			return fmt.Errorf("shard %d, replica %d: %w", n.ShardID, n.ReplicaID, err)
		}
	}
	return nil
}

// replaySegment reads a segment up to its end; end is where its records end, and
// ended is whether that was on purpose.
func (d *DB) replaySegment(s *segment) error {
	d.end, d.ended, d.records = headerSize, false, 0
	var buf []byte
	for !d.ended {
		var err error
		buf, err = s.record(d.end, buf)
		if errors.Is(err, errTorn) {
			if d.end == headerSize { // a segment has its name only after its checkpoint
				return fmt.Errorf("%w: %s has no checkpoint", ErrCorrupt, s.path)
			}
			return s.damaged(d.end)
		}
		if err != nil {
			return fmt.Errorf("read %s: %w", s.path, err)
		}
		err = decode(buf[recordHead:], func(it *item) error { return d.apply(it, s, d.end+recordHead) })
		if err != nil {
			return fmt.Errorf("%s at offset %d: %w", s.path, d.end, err)
		}
		d.end += int64(len(buf))
		d.records++
	}
	return nil
}

// apply repeats what an item has noted.
func (d *DB) apply(it *item, s *segment, off int64) error {
	switch it.kind {
	case kindEnd:
		d.ended = true
		return nil
	case kindForget:
		delete(d.nodes, it.node)
		return nil
	}
	x := d.nodes[it.node]
	if x == nil {
		x = newNode()
		d.nodes[it.node] = x
	}
	switch it.kind {
	case kindEntries:
		x.put(it.first, places(s, off, it.entries))
	case kindMoved:
		x.move(it.first, places(s, off, it.entries))
	case kindState:
		x.state, x.hasState = it.state, true
	case kindSnapshot:
		if it.snapshot.Index > x.snapshot.Index {
			x.snapshot = it.snapshot
		}
	case kindInstalled:
		x.install(it.snapshot)
	case kindBootstrap:
		b := raftpb.Bootstrap(it.bootstrap)
		x.bootstrap = &b
	case kindRemoved:
		x.removed = max(x.removed, it.index)
	}
	return nil
}
