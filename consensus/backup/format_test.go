package backup

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"skein.io/skein/gossip/identity"
)

func header(sizes ...int64) Header {
	h := Header{Cluster: "c1", Created: time.Unix(1e9, 0).UTC(), Node: "n1", Version: "v", Settings: identity.DefaultCluster()}
	for i, s := range sizes {
		h.Shards = append(h.Shards, Shard{ID: uint64(i + 1), Name: fmt.Sprintf("s%d", i), Revision: 7, Index: 9, Size: s})
	}
	return h
}

func sample(t testing.TB, ring Box, data ...[]byte) []byte {
	t.Helper()
	var sizes []int64
	var src []Source
	for _, d := range data {
		sizes, src = append(sizes, int64(len(d))), append(src, bytes.NewReader(d))
	}
	var out bytes.Buffer
	if err := Write(&out, header(sizes...), ring, src); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestRoundTrip(t *testing.T) {
	a, b := bytes.Repeat([]byte("abc"), 100_000), []byte{1}
	file := sample(t, Box{Data: []byte("ring")}, a, b)
	var got [][]byte
	var ring Box
	h, err := Read(bytes.NewReader(file), Handler{
		Ring:  func(b Box) error { ring = b; return nil },
		Shard: func(_ Shard, r io.Reader) error { x, err := io.ReadAll(r); got = append(got, x); return err },
	})
	if err != nil || len(got) != 2 || !bytes.Equal(got[0], a) || !bytes.Equal(got[1], b) || string(ring.Data) != "ring" {
		t.Fatalf("read: %v, %d shards, ring %q", err, len(got), ring.Data)
	}
	if h.Cluster != "c1" || h.Shards[1].Size != 1 || h.Settings != identity.DefaultCluster() {
		t.Errorf("header %+v", h)
	}
	if _, err := Read(bytes.NewReader(file), Handler{Shard: func(_ Shard, r io.Reader) error { _, err := r.Read(make([]byte, 10)); return err }}); err != nil {
		t.Errorf("a handler that reads little: %v", err)
	}
	mine := errors.New("mine")
	if _, err := Read(bytes.NewReader(file), Handler{Shard: func(Shard, io.Reader) error { return mine }}); !errors.Is(err, mine) {
		t.Errorf("the handler's error came as %v", err)
	}
}

// Every byte that is missing or changed is noticed, and the error says where.
func TestDamage(t *testing.T) {
	file := sample(t, Box{Data: []byte("ring")}, bytes.Repeat([]byte("x"), 300), bytes.Repeat([]byte("y"), 200))
	for n := range file {
		var e *Error
		_, err := Read(bytes.NewReader(file[:n]), Handler{})
		if !errors.As(err, &e) || !errors.Is(err, ErrTruncated) || e.Offset != int64(n) {
			t.Fatalf("%d of %d bytes: %v", n, len(file), err)
		}
		bad := bytes.Clone(file)
		bad[n] ^= 0x10
		if _, err = Read(bytes.NewReader(bad), Handler{}); !errors.As(err, &e) {
			t.Fatalf("byte %d changed: %v", n, err)
		}
		if e.Section == "" || !strings.Contains(err.Error(), "at byte") {
			t.Fatalf("byte %d changed: the error names no place: %v", n, err)
		}
	}
	at := bytes.Index(file, []byte("yyyy"))
	bad := bytes.Clone(file)
	bad[at+5] = 'z'
	if _, err := Read(bytes.NewReader(bad), Handler{}); !errors.Is(err, ErrChecksum) || !strings.Contains(err.Error(), "shard s1") {
		t.Errorf("a damaged shard: %v", err)
	}
	if _, err := Read(bytes.NewReader(append(bytes.Clone(file), 0)), Handler{}); err == nil || !strings.Contains(err.Error(), "follows") {
		t.Errorf("a byte too many: %v", err)
	}
	if _, err := Read(strings.NewReader("PK\x03\x04 something else"), Handler{}); !errors.Is(err, ErrNotBackup) {
		t.Errorf("another file: %v", err)
	}
	newer := bytes.Clone(file)
	newer[7]++
	if _, err := Read(bytes.NewReader(newer), Handler{}); !errors.Is(err, ErrNewer) {
		t.Errorf("a newer file: %v", err)
	}
}

func TestBox(t *testing.T) {
	for _, pass := range []string{"", "open sesame"} {
		b, err := Seal([]byte("ring"), []byte(pass))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := b.Open([]byte(pass)); err != nil || string(got) != "ring" {
			t.Errorf("passphrase %q: %q, %v", pass, got, err)
		}
		if pass != "" {
			for _, wrong := range []string{"", "open sesamE"} {
				if _, err := b.Open([]byte(wrong)); !errors.Is(err, ErrPassphrase) {
					t.Errorf("passphrase %q opened it, or: %v", wrong, err)
				}
			}
			if bytes.Contains(b.Data, []byte("ring")) {
				t.Error("sealed in clear")
			}
		}
	}
	for _, b := range []Box{{Sealed: true}, {Sealed: true, LogN: 60, Salt: make([]byte, 16)}, {Sealed: true, LogN: 1, Salt: make([]byte, 16), Nonce: []byte{1}}} {
		if _, err := b.Open([]byte("x")); err == nil {
			t.Errorf("%+v opened", b)
		}
	}
}

// A file of 100 MB is written and read in little memory.
func TestMemory(t *testing.T) {
	const size = 100 << 20
	path := filepath.Join(t.TempDir(), "f")
	peak := func(f func()) uint64 {
		runtime.GC()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		f()
		runtime.ReadMemStats(&after)
		return after.TotalAlloc - before.TotalAlloc
	}
	start := time.Now()
	wrote := peak(func() {
		err := WriteFile(path, false, func(w io.Writer) error { return Write(w, header(size), Box{}, []Source{random{size}}) })
		if err != nil {
			t.Fatal(err)
		}
	})
	took := time.Since(start)
	start = time.Now()
	read := peak(func() {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := Read(f, Handler{}); err != nil {
			t.Fatal(err)
		}
	})
	t.Logf("100 MB: written in %s with %d kB allocated in all, checked in %s with %d kB", took, wrote>>10, time.Since(start), read>>10)
	if wrote > 4<<20 || read > 4<<20 {
		t.Errorf("%d and %d bytes were allocated", wrote, read)
	}
}

// random is a source of so many bytes.
type random struct{ n int64 }

func (r random) WriteTo(w io.Writer) (int64, error) { return io.CopyN(w, rand.Reader, r.n) }

func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	write := func(text string, replace bool, fail error) error {
		return WriteFile(path, replace, func(w io.Writer) error {
			_, err := io.WriteString(w, text)
			return errors.Join(err, fail)
		})
	}
	broken := errors.New("broken")
	if err := write("a", false, broken); !errors.Is(err, broken) {
		t.Errorf("a failure came as %v", err)
	}
	if err := write("b", false, nil); err != nil {
		t.Fatal(err)
	}
	if err := write("c", false, nil); !errors.Is(err, fs.ErrExist) {
		t.Errorf("an existing file: %v", err)
	}
	if err := write("d", true, broken); !errors.Is(err, broken) {
		t.Error(err)
	}
	if b, _ := os.ReadFile(path); string(b) != "b" {
		t.Errorf("the file holds %q", b)
	}
	if err := write("e", true, nil); err != nil {
		t.Error(err)
	}
	ents, _ := os.ReadDir(dir)
	info, err := os.Stat(path)
	if err != nil || len(ents) != 1 || info.Mode().Perm() != 0o600 {
		t.Errorf("%v: %d files, mode %v", err, len(ents), info.Mode())
	}
}

func FuzzRead(f *testing.F) {
	file := sample(f, Box{Data: []byte("ring")}, []byte("some data"), []byte("more"))
	f.Add(file)
	f.Add(file[:40])
	f.Add([]byte{})
	sealed, err := Seal([]byte("r"), []byte("p"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(sample(f, sealed, []byte("x")))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := Read(bytes.NewReader(b), Handler{Shard: func(_ Shard, r io.Reader) error { _, err := io.Copy(io.Discard, r); return err }})
		var e *Error
		if err != nil && !errors.As(err, &e) {
			t.Fatalf("%v is no *Error", err)
		}
		if err == nil && h.check() != nil {
			t.Fatal("a bad header was accepted")
		}
	})
}
