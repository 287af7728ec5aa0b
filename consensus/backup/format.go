package backup

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"math"
	"time"

	"skein.io/skein/gossip/identity"
)

// A file is the magic, whose last byte is the format's version, and sections:
//
//	tag:4 length:8 payload SHA-256(tag length payload):32
//
// in this order: one HEAD (JSON, Header), one KEYS (Box), a SHRD for each shard of the
// header in its order (a bbolt database), and one DONE, whose payload is the
// SHA-256 of every byte before it. Numbers are big-endian. Nothing may follow.
var magic = [8]byte{'S', 'K', 'E', 'I', 'N', 'B', 'K', version}

const (
	version = 1

	tagHead = "HEAD"
	tagKeys = "KEYS"
	tagShrd = "SHRD"
	tagDone = "DONE"

	sectionHead = 12
	// maxSmall bounds the sections that are read into memory, in bytes.
	maxSmall = 1 << 20
	// maxShards bounds the table.
	maxShards = 64
	// copyBuffer is the size of the buffer of a copy.
	copyBuffer = 256 << 10
)

// Header says what a file holds.
type Header struct {
	// Cluster is the cluster's id, Generation counts its restores and recoveries.
	Cluster    string `json:"cluster"`
	Generation uint64 `json:"generation,omitempty"`
	// Created by the clock of Node, which made the backup with this Version.
	Created time.Time `json:"created"`
	Node    string    `json:"node"`
	Version string    `json:"version"`
	// Scheduled tells a file that the cluster made by itself from one that
	// somebody asked for.
	Scheduled bool `json:"scheduled,omitempty"`
	// Settings are those of the whole cluster.
	Settings identity.Cluster `json:"settings"`
	// HeldMicroseconds is how long writers waited for the cut.
	HeldMicroseconds int64   `json:"heldMicroseconds"`
	Shards           []Shard `json:"shards"`
}

// Shard is a row of the shard table.
type Shard struct {
	ID       uint64   `json:"id"`
	Name     string   `json:"name"`
	Prefixes []string `json:"prefixes,omitempty"`
	// Revision and Index (of the Raft log) of the state.
	Revision int64  `json:"revision"`
	Index    uint64 `json:"index"`
	// Size of the database in bytes.
	Size int64 `json:"size"`
}

func (h *Header) check() error {
	switch {
	case h.Cluster == "":
		return errors.New("it names no cluster")
	case len(h.Shards) == 0 || len(h.Shards) > maxShards:
		return fmt.Errorf("it names %d shards", len(h.Shards))
	}
	seen := map[uint64]bool{}
	for _, s := range h.Shards {
		if s.ID == 0 || seen[s.ID] || s.Name == "" || s.Size <= 0 {
			return fmt.Errorf("shard %d %q of %d bytes is impossible or there twice", s.ID, s.Name, s.Size)
		}
		seen[s.ID] = true
	}
	if err := h.Settings.Validate(); err != nil {
		return fmt.Errorf("its settings: %w", err)
	}
	return nil
}

// Error says what is wrong with a file, and where.
type Error struct {
	// Section is the part that is bad: "magic", "header", "key ring", "shard NAME", "end".
	Section string
	// Offset of the fault in bytes: of the place where reading it failed, or of the
	// start of the section whose checksum is wrong.
	Offset int64
	Reason error
}

func (e *Error) Error() string {
	return fmt.Sprintf("bad backup: %s, at byte %d: %v", e.Section, e.Offset, e.Reason)
}

func (e *Error) Unwrap() error { return e.Reason }

// The reasons of an Error that callers tell apart.
var (
	// ErrNotBackup is for a file of another kind.
	ErrNotBackup = errors.New("this is not a backup file of skein")
	// ErrNewer is for a format that a later version of skein wrote.
	ErrNewer = errors.New("the format is newer than this skein")
	// ErrTruncated is for a file that ends too early.
	ErrTruncated = errors.New("the file ends here, the rest is missing")
	// ErrChecksum is for bytes that were changed.
	ErrChecksum = errors.New("the checksum is wrong: the file is damaged")
)

// Source is the content of a shard's section: exactly Size bytes.
type Source = io.WriterTo

type writer struct {
	w   io.Writer
	all hash.Hash
	sum hash.Hash // of the section, nil outside
	n   int64     // written into the section's payload
}

func (w *writer) Write(p []byte) (int, error) {
	n, err := w.w.Write(p)
	w.all.Write(p[:n])
	if w.sum != nil {
		w.sum.Write(p[:n])
	}
	w.n += int64(n)
	return n, err
}

func (w *writer) section(tag string, size int64, payload func(io.Writer) error) error {
	w.sum = sha256.New()
	if _, err := w.Write(binary.BigEndian.AppendUint64([]byte(tag), uint64(size))); err != nil {
		return err
	}
	w.n = 0
	if err := payload(w); err != nil {
		return err
	}
	if w.n != size {
		return fmt.Errorf("section %s has %d bytes, announced were %d", tag, w.n, size)
	}
	sum := w.sum.Sum(nil)
	w.sum = nil
	_, err := w.Write(sum)
	return err
}

func (w *writer) small(tag string, payload []byte) error {
	if len(payload) > maxSmall {
		return fmt.Errorf("section %s: %d bytes, at most %d are possible", tag, len(payload), maxSmall)
	}
	return w.section(tag, int64(len(payload)), func(out io.Writer) error { _, err := out.Write(payload); return err })
}

// Write writes a backup. sources are the databases of h.Shards, in that order.
func Write(out io.Writer, h Header, ring Box, sources []Source) error {
	if err := h.check(); err != nil {
		return fmt.Errorf("backup: header: %w", err)
	}
	if len(sources) != len(h.Shards) {
		return fmt.Errorf("backup: %d databases for %d shards", len(sources), len(h.Shards))
	}
	head, err := json.Marshal(h)
	if err != nil {
		return fmt.Errorf("backup: header: %w", err)
	}
	keys, err := json.Marshal(ring)
	if err != nil {
		return fmt.Errorf("backup: key ring: %w", err)
	}
	w := &writer{w: out, all: sha256.New()}
	if _, err := w.Write(magic[:]); err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	if err := w.small(tagHead, head); err != nil {
		return fmt.Errorf("backup: header: %w", err)
	}
	if err := w.small(tagKeys, keys); err != nil {
		return fmt.Errorf("backup: key ring: %w", err)
	}
	for i, s := range h.Shards {
		if err := w.section(tagShrd, s.Size, func(out io.Writer) error { _, err := sources[i].WriteTo(out); return err }); err != nil {
			return fmt.Errorf("backup: shard %s: %w", s.Name, err)
		}
	}
	if err := w.small(tagDone, w.all.Sum(nil)); err != nil {
		return fmt.Errorf("backup: end: %w", err)
	}
	return nil
}

// Handler gets the parts of a file as they are read. Nil functions skip.
type Handler struct {
	Header func(Header) error
	// Ring gets the box of the key ring.
	Ring func(Box) error
	// Shard gets a database. What it does not read is skipped, and checked.
	Shard func(Shard, io.Reader) error
}

type reader struct {
	r    io.Reader
	all  hash.Hash
	sum  hash.Hash
	off  int64
	left int64 // of the payload
	part string
}

// Read implements io.Reader for a section's payload.
func (r *reader) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), r.left)]
	n, err := r.raw(p)
	r.left -= int64(n)
	if err == io.EOF {
		err = nil // full reads below turn it into ErrTruncated
		if n == 0 {
			err = r.bad(ErrTruncated)
		}
	}
	return n, err
}

func (r *reader) raw(p []byte) (int, error) {
	n, err := r.r.Read(p)
	r.off += int64(n)
	r.all.Write(p[:n])
	if r.sum != nil {
		r.sum.Write(p[:n])
	}
	return n, err
}

func (r *reader) full(p []byte) error {
	for done := 0; done < len(p); {
		n, err := r.raw(p[done:])
		done += n
		if err == io.EOF && done < len(p) {
			return r.bad(ErrTruncated)
		}
		if err != nil && err != io.EOF {
			return fmt.Errorf("read the backup at byte %d: %w", r.off, err)
		}
	}
	return nil
}

func (r *reader) bad(reason error) error {
	return &Error{Section: r.part, Offset: r.off, Reason: reason}
}

// section reads a section; size is what its length has to be, or -1 for any
// small one. The handler's error ends the reading.
func (r *reader) section(part, tag string, size int64, payload func(io.Reader) error) error {
	r.part = part
	start := r.off
	r.sum = sha256.New()
	defer func() { r.sum = nil }()
	var head [sectionHead]byte
	if err := r.full(head[:]); err != nil {
		return err
	}
	if string(head[:4]) != tag {
		return &Error{part, start, fmt.Errorf("%w: section %q is here, %q was expected", ErrChecksum, head[:4], tag)}
	}
	length := binary.BigEndian.Uint64(head[4:])
	if size < 0 && length > maxSmall || size >= 0 && length != uint64(size) || length > math.MaxInt64 {
		return &Error{part, start, fmt.Errorf("%w: a length of %d bytes is impossible here", ErrChecksum, length)}
	}
	r.left = int64(length)
	if err := payload(r); err != nil {
		return err
	}
	if _, err := io.CopyBuffer(io.Discard, struct{ io.Reader }{r}, make([]byte, min(copyBuffer, r.left+1))); err != nil {
		return err
	}
	want := r.sum.Sum(nil)
	r.sum = nil
	var got [sha256.Size]byte
	if err := r.full(got[:]); err != nil {
		return err
	}
	if !bytes.Equal(got[:], want) {
		return &Error{part, start, ErrChecksum}
	}
	return nil
}

// small reads a whole section; it is given out only when its checksum is right.
func (r *reader) small(part, tag string) (b []byte, err error) {
	err = r.section(part, tag, -1, func(in io.Reader) (err error) { b, err = io.ReadAll(in); return err })
	return b, err
}

// ReadHeader reads and checks the beginning of a backup alone.
func ReadHeader(in io.Reader) (Header, error) {
	r := &reader{r: in, all: sha256.New(), part: "magic"}
	return r.header()
}

// Read reads a whole backup and checks every byte of it.
func Read(in io.Reader, h Handler) (Header, error) {
	r := &reader{r: in, all: sha256.New(), part: "magic"}
	head, err := r.header()
	if err == nil && h.Header != nil {
		err = h.Header(head)
	}
	if err != nil {
		return head, err
	}
	if err := r.ring(h.Ring); err != nil {
		return head, err
	}
	for _, s := range head.Shards {
		err := r.section("shard "+s.Name, tagShrd, s.Size, func(in io.Reader) error {
			if h.Shard == nil {
				return nil
			}
			return h.Shard(s, in)
		})
		if err != nil {
			return head, err
		}
	}
	return head, r.end()
}

func (r *reader) header() (head Header, err error) {
	var m [len(magic)]byte
	if err := r.full(m[:]); err != nil {
		return head, err
	}
	if !bytes.Equal(m[:7], magic[:7]) {
		return head, &Error{"magic", 0, ErrNotBackup}
	}
	if m[7] != version {
		return head, &Error{"magic", 7, fmt.Errorf("%w: version %d, known is %d", ErrNewer, m[7], version)}
	}
	start := r.off
	b, err := r.small("header", tagHead)
	if err == nil {
		err = parse(b, &head, &Error{Section: "header", Offset: start})
	}
	if err == nil {
		if why := head.check(); why != nil {
			err = &Error{"header", start, why}
		}
	}
	return head, err
}

func (r *reader) ring(handle func(Box) error) error {
	start := r.off
	b, err := r.small("key ring", tagKeys)
	if err != nil {
		return err
	}
	var box Box
	if err := parse(b, &box, &Error{Section: "key ring", Offset: start}); err != nil {
		return err
	}
	if handle == nil {
		return nil
	}
	return handle(box)
}

func (r *reader) end() error {
	all := r.all.Sum(nil)
	start := r.off
	b, err := r.small("end", tagDone)
	if err != nil {
		return err
	}
	if !bytes.Equal(b, all) {
		return &Error{"end", start, ErrChecksum}
	}
	var more [1]byte
	if n, err := io.ReadFull(r.r, more[:]); n != 0 {
		return &Error{"end", r.off, errors.New("something follows the end")}
	} else if err != io.EOF {
		return fmt.Errorf("read the backup at byte %d: %w", r.off, err)
	}
	return nil
}

func parse(b []byte, v any, e *Error) error {
	if err := json.Unmarshal(b, v); err != nil {
		e.Reason = err
		return e
	}
	return nil
}
