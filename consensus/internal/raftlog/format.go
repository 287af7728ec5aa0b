package raftlog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/lni/dragonboat/v4/raftio"
	"github.com/lni/dragonboat/v4/raftpb"
)

var (
	// ErrCorrupt is returned by Open for a log that lacks what had been durable.
	ErrCorrupt = errors.New("raftlog: the log is damaged")
	// ErrBroken is returned by every write after one has failed.
	ErrBroken = errors.New("raftlog: an earlier write failed")
)

// A segment begins with this magic, whose last byte is the format's version, its
// number and the checksum of both.
var segmentMagic = [8]byte{'S', 'K', 'E', 'I', 'N', 'R', 'L', 1}

const (
	headerSize = 8 + 8 + 4
	// A record is magic:4 length:4 checksum:4 payload. The checksum covers the
	// segment's number, so that what an earlier use of the file has left is not taken
	// for a record. A record is durable before the next one is written.
	recordHead = 12
	// recordMagic lets a scan find records behind a damaged one.
	recordMagic uint32 = 0x5ce17e0a
	// maxRecord is above whatever dragonboat saves at once.
	maxRecord = 1 << 30
	// entryHead precedes every entry: length:4 checksum:4.
	entryHead = 8
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// itemKind is on disk.
type itemKind byte

const (
	kindEntries   itemKind = 1 // the end of a group's log from the first one's index on
	kindMoved     itemKind = 2 // entries that are in the log already, at a new place
	kindState     itemKind = 3
	kindSnapshot  itemKind = 4 // newest snapshot; the entries stay
	kindInstalled itemKind = 5 // snapshot that takes the place of all entries
	kindBootstrap itemKind = 6
	kindRemoved   itemKind = 7 // entries up to an index are not needed
	kindForget    itemKind = 8 // the group is deleted
	kindEnd       itemKind = 9 // nothing follows in this segment
)

// item is a part of a record, decoded:
//
//	kind:1 shard:uvarint replica:uvarint, then
//	count:uvarint first:uvarint (length:4 checksum:4 raftpb.Entry)*   kindEntries, kindMoved
//	term:uvarint vote:uvarint commit:uvarint                          kindState
//	length:uvarint raftpb.Snapshot                                    kindSnapshot, kindInstalled
//	length:uvarint raftpb.Bootstrap                                   kindBootstrap
//	index:uvarint                                                     kindRemoved
type item struct {
	kind  itemKind
	node  raftio.NodeInfo
	first uint64 // index of entries[0]
	// entries are where each entry lies in the payload, without its head.
	entries   []span
	state     raftpb.State
	snapshot  raftpb.Snapshot
	bootstrap raftpb.Bootstrap
	index     uint64
}

type span struct{ off, len uint32 }

// builder makes a record.
type builder struct {
	b []byte
	// spans of the entries of the last call of entries, relative to the record.
	spans []span
}

func (w *builder) reset() {
	w.b = append(w.b[:0], make([]byte, recordHead)...)
}

func (w *builder) empty() bool { return len(w.b) == recordHead }

func (w *builder) head(k itemKind, n raftio.NodeInfo) {
	w.b = append(w.b, byte(k))
	w.b = binary.AppendUvarint(w.b, n.ShardID)
	w.b = binary.AppendUvarint(w.b, n.ReplicaID)
}

// entries appends entries that follow each other.
func (w *builder) entries(k itemKind, n raftio.NodeInfo, ents []raftpb.Entry) []span {
	w.head(k, n)
	w.b = binary.AppendUvarint(w.b, uint64(len(ents)))
	w.b = binary.AppendUvarint(w.b, ents[0].Index)
	w.spans = w.spans[:0]
	for i := range ents {
		e := &ents[i]
		size := e.Size()
		at := len(w.b)
		w.grow(entryHead + size)
		body := w.b[at+entryHead:]
		size, _ = e.MarshalTo(body) // never fails
		body = body[:size]
		w.b = w.b[:at+entryHead+size]
		binary.LittleEndian.PutUint32(w.b[at:], uint32(size))
		binary.LittleEndian.PutUint32(w.b[at+4:], crc32.Checksum(body, castagnoli))
		w.spans = append(w.spans, span{uint32(at + entryHead), uint32(size)})
	}
	return w.spans
}

func (w *builder) grow(n int) {
	if need := len(w.b) + n; need > cap(w.b) {
		b := make([]byte, len(w.b), max(need, 2*cap(w.b)))
		copy(b, w.b)
		w.b = b
	}
	w.b = w.b[:len(w.b)+n]
}

func (w *builder) state(n raftio.NodeInfo, s raftpb.State) {
	w.head(kindState, n)
	w.b = binary.AppendUvarint(w.b, s.Term)
	w.b = binary.AppendUvarint(w.b, s.Vote)
	w.b = binary.AppendUvarint(w.b, s.Commit)
}

func (w *builder) message(k itemKind, n raftio.NodeInfo, m raftpb.Marshaler) {
	w.head(k, n)
	b := raftpb.MustMarshal(m)
	w.b = binary.AppendUvarint(w.b, uint64(len(b)))
	w.b = append(w.b, b...)
}

func (w *builder) removed(n raftio.NodeInfo, index uint64) {
	w.head(kindRemoved, n)
	w.b = binary.AppendUvarint(w.b, index)
}

// seal fills in the head of the record for a segment.
func (w *builder) seal(segment uint64) []byte {
	binary.LittleEndian.PutUint32(w.b[0:], recordMagic)
	binary.LittleEndian.PutUint32(w.b[4:], uint32(len(w.b)-recordHead))
	binary.LittleEndian.PutUint32(w.b[8:], recordSum(segment, w.b))
	return w.b
}

// recordSum covers all of a record but the checksum's own place.
func recordSum(segment uint64, record []byte) uint32 {
	var n [8]byte
	binary.LittleEndian.PutUint64(n[:], segment)
	sum := crc32.Checksum(n[:], castagnoli)
	sum = crc32.Update(sum, castagnoli, record[:8])
	return crc32.Update(sum, castagnoli, record[recordHead:])
}

// decode calls f with every item of a record's payload. Offsets of entries are
// relative to the payload.
func decode(payload []byte, f func(*item) error) error {
	d := decoder{b: payload}
	for d.off < len(payload) {
		var it item
		if err := d.item(&it); err != nil {
			return fmt.Errorf("%w: offset %d of a record: %v", ErrCorrupt, d.off, err)
		}
		if err := f(&it); err != nil {
			return err
		}
	}
	return nil
}

var errShort = errors.New("it ends too early")

type decoder struct {
	b   []byte
	off int
}

func (d *decoder) uvarint(v *uint64) error {
	n := 0
	if *v, n = binary.Uvarint(d.b[d.off:]); n <= 0 {
		return errShort
	}
	d.off += n
	return nil
}

func (d *decoder) uvarints(vs ...*uint64) error {
	for _, v := range vs {
		if err := d.uvarint(v); err != nil {
			return err
		}
	}
	return nil
}

func (d *decoder) bytes() ([]byte, error) {
	var n uint64
	if err := d.uvarint(&n); err != nil {
		return nil, err
	}
	if n > uint64(len(d.b)-d.off) {
		return nil, errShort
	}
	b := d.b[d.off : d.off+int(n)]
	d.off += int(n)
	return b, nil
}

// message turns panics into errors: dragonboat's generated code trusts its input.
func message(m raftpb.Unmarshaler, b []byte) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("undecodable: %v", p)
		}
	}()
	return m.Unmarshal(b)
}

func (d *decoder) item(it *item) error {
	it.kind = itemKind(d.b[d.off])
	d.off++
	if err := d.uvarints(&it.node.ShardID, &it.node.ReplicaID); err != nil {
		return err
	}
	switch it.kind {
	case kindEntries, kindMoved:
		return d.entries(it)
	case kindState:
		return d.uvarints(&it.state.Term, &it.state.Vote, &it.state.Commit)
	case kindSnapshot, kindInstalled:
		b, err := d.bytes()
		if err != nil {
			return err
		}
		return message(&it.snapshot, b)
	case kindBootstrap:
		b, err := d.bytes()
		if err != nil {
			return err
		}
		return message(&it.bootstrap, b)
	case kindRemoved:
		return d.uvarint(&it.index)
	case kindForget, kindEnd:
		return nil
	}
	return fmt.Errorf("item of unknown kind %d", it.kind)
}

func (d *decoder) entries(it *item) error {
	var n uint64
	if err := d.uvarints(&n, &it.first); err != nil {
		return err
	}
	if n == 0 || n > uint64(len(d.b)-d.off)/entryHead || it.first == 0 {
		return fmt.Errorf("%d entries from index %d on", n, it.first)
	}
	it.entries = make([]span, 0, n)
	for range n {
		if len(d.b)-d.off < entryHead {
			return errShort
		}
		size := binary.LittleEndian.Uint32(d.b[d.off:])
		sum := binary.LittleEndian.Uint32(d.b[d.off+4:])
		d.off += entryHead
		if uint64(size) > uint64(len(d.b)-d.off) {
			return errShort
		}
		if crc32.Checksum(d.b[d.off:d.off+int(size)], castagnoli) != sum {
			return errors.New("checksum of an entry")
		}
		it.entries = append(it.entries, span{uint32(d.off), size})
		d.off += int(size)
	}
	return nil
}
