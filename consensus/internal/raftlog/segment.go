package raftlog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	segmentSuffix = ".seg"
	spareSuffix   = ".spare"
)

// segment is one file. Only the newest is written to.
type segment struct {
	number uint64
	f      *os.File
	path   string
	size   int64 // of the file
}

func segmentName(number uint64) string { return fmt.Sprintf("%016x%s", number, segmentSuffix) }

// zeroChunk is written at once to fill a file.
const zeroChunk = 1 << 20

// allocate makes a file with room for size bytes, filled with zeros: an fdatasync of
// what is written over written blocks need not write the file's size, nor mark blocks
// as used, which costs half as much CPU again (measured on ext4).
func allocate(path string, size int64) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	// At one go, so that the blocks lie together and a full disk is known at once.
	err = unix.Fallocate(int(f.Fd()), 0, 0, size)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		err = nil
	}
	zeros := make([]byte, min(size, zeroChunk))
	for at := int64(0); err == nil && at < size; at += int64(len(zeros)) {
		_, err = f.WriteAt(zeros[:min(int64(len(zeros)), size-at)], at)
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("allocate %s: %w", path, err), f.Close(), os.Remove(path))
	}
	return f, nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func fdatasync(f *os.File) error {
	for {
		err := unix.Fdatasync(int(f.Fd()))
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func segmentHeader(number uint64) []byte {
	b := append([]byte(nil), segmentMagic[:]...)
	b = binary.LittleEndian.AppendUint64(b, number)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// openSegment checks the header.
func openSegment(dir string, number uint64) (*segment, error) {
	path := filepath.Join(dir, segmentName(number))
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	s := &segment{number: number, f: f, path: path}
	var h [headerSize]byte
	st, err := f.Stat()
	if err == nil {
		s.size = st.Size()
		_, err = f.ReadAt(h[:], 0)
	}
	switch {
	case err != nil:
		err = fmt.Errorf("%w: %s: %v", ErrCorrupt, path, err)
	case [7]byte(h[:7]) == [7]byte(segmentMagic[:7]) && h[7] > segmentMagic[7]:
		err = fmt.Errorf("raftlog: %s has format %d, this version knows %d: upgrade this node", path, h[7], segmentMagic[7])
	case string(h[:]) != string(segmentHeader(number)):
		err = fmt.Errorf("%w: %s has a bad header", ErrCorrupt, path)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return s, nil
}

// listSegments returns the numbers of the segments that follow each other up to the
// newest, and the files that are of no use: spares, and segments that a crash left
// behind others that had been deleted.
func listSegments(dir string) (numbers []uint64, useless []string, err error) {
	ents, err := os.ReadDir(dir)
	if err != nil {
		return nil, nil, err
	}
	for _, e := range ents {
		if strings.HasSuffix(e.Name(), spareSuffix) {
			useless = append(useless, e.Name())
		} else if v, ok := strings.CutSuffix(e.Name(), segmentSuffix); ok {
			n, err := strconv.ParseUint(v, 16, 64)
			if err != nil || segmentName(n) != e.Name() {
				return nil, nil, fmt.Errorf("raftlog: %s is not a segment", filepath.Join(dir, e.Name()))
			}
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	for i := len(numbers) - 1; i > 0; i-- {
		if numbers[i-1]+1 == numbers[i] {
			continue
		}
		for _, n := range numbers[:i] {
			useless = append(useless, segmentName(n))
		}
		numbers = numbers[i:]
		break
	}
	return numbers, useless, nil
}

// errTorn ends the records of a segment: what follows is not a record.
var errTorn = errors.New("not a record")

// record reads the record at an offset into buf, which may grow. The error is
// errTorn if there is none.
func (s *segment) record(off int64, buf []byte) ([]byte, error) {
	var h [recordHead]byte
	if off+recordHead > s.size {
		return buf, errTorn
	}
	if _, err := s.f.ReadAt(h[:], off); err != nil {
		return buf, err
	}
	size := int64(binary.LittleEndian.Uint32(h[4:]))
	if binary.LittleEndian.Uint32(h[:]) != recordMagic || size == 0 || size > maxRecord || off+recordHead+size > s.size {
		return buf, errTorn
	}
	buf = slices.Grow(buf[:0], recordHead+int(size))[:recordHead+int(size)]
	if _, err := s.f.ReadAt(buf, off); err != nil {
		return buf, err
	}
	if binary.LittleEndian.Uint32(h[8:]) != recordSum(s.number, buf) {
		return buf, errTorn
	}
	return buf, nil
}

// damaged looks for a record behind a place at which none is: one is durable before
// the next is written, so if there is a later one, the place is not the end of the
// log but damage.
func (s *segment) damaged(off int64) error {
	const step = 1 << 20
	magic := binary.LittleEndian.AppendUint32(nil, recordMagic)
	buf := make([]byte, step+len(magic)-1) // a magic may lie across two steps
	for at := off; at < s.size; at += step {
		n, err := s.f.ReadAt(buf[:min(int64(len(buf)), s.size-at)], at)
		if err != nil {
			return fmt.Errorf("read %s: %w", s.path, err)
		}
		for i := 0; i < n; i++ {
			j := bytes.Index(buf[i:n], magic)
			if j < 0 {
				break
			}
			i += j
			if _, err := s.record(at+int64(i), nil); err == nil {
				return fmt.Errorf("%w: no record in %s at offset %d, but there is a later one at %d", ErrCorrupt, s.path, off, at+int64(i))
			}
		}
	}
	return nil
}
