package keyring

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

var now = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

func newRing(t testing.TB, keys int) Ring {
	t.Helper()
	var r Ring
	for range keys {
		k, err := NewKey(rand.Reader, now)
		if err != nil {
			t.Fatal(err)
		}
		if r, err = r.Add(k); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

func TestRingIsAValue(t *testing.T) {
	r := newRing(t, 3)
	ids := r.IDs()
	if r.Primary() != ids[0] {
		t.Errorf("primary %s, want the first key %s", r.Primary(), ids[0])
	}
	used, err := r.Use(ids[2])
	if err != nil || used.Primary() != ids[2] || r.Primary() != ids[0] {
		t.Errorf("Use: %v, %v; the receiver is %v", used, err, r)
	}
	if _, err := used.Drop(ids[2]); !errors.Is(err, ErrPrimary) {
		t.Errorf("the primary key was dropped: %v", err)
	}
	dropped, err := used.Drop(ids[0])
	if err != nil || dropped.Has(ids[0]) || !used.Has(ids[0]) {
		t.Errorf("Drop: %v, %v; the receiver is %v", dropped, err, used)
	}
	if _, err := dropped.Use(ids[0]); !errors.Is(err, ErrUnknownKey) {
		t.Errorf("a dropped key was made primary: %v", err)
	}
	if again, err := dropped.Drop(ids[0]); err != nil || !again.Equal(dropped) {
		t.Errorf("dropping twice: %v, %v", again, err)
	}
	both, err := dropped.Merge(r)
	if err != nil || len(both.IDs()) != 3 || both.Primary() != ids[2] {
		t.Errorf("Merge: %v, %v, want three keys and the primary kept", both, err)
	}
	if got, err := (Ring{}).Merge(used); err != nil || !got.Equal(used) {
		t.Errorf("an empty ring took %v, %v, want %v", got, err, used)
	}
	full := newRing(t, MaxKeys)
	k, _ := NewKey(rand.Reader, now)
	if _, err := full.Add(k); !errors.Is(err, ErrFull) {
		t.Errorf("key %d was taken: %v", MaxKeys+1, err)
	}
	k.ID = ids[0]
	if _, err := (Ring{}).Add(k); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a key under another key's name was taken: %v", err)
	}
}

func TestSeal(t *testing.T) {
	r, plain := newRing(t, 1), []byte("the CA's key")
	sealed, err := r.Seal("/skein/cluster/keys", plain)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(sealed, plain) || len(sealed) != len(plain)+Overhead {
		t.Fatalf("sealed value %q", sealed)
	}
	if id, ok := SealedBy(sealed); !ok || id != r.Primary() {
		t.Errorf("sealed by %q, %v, want %q", id, ok, r.Primary())
	}
	k, _ := NewKey(rand.Reader, now)
	rotated, _ := r.Add(k)
	rotated, _ = rotated.Use(k.ID)
	for name, ring := range map[string]Ring{"same ring": r, "after a rotation": rotated} {
		if got, err := ring.Open("/skein/cluster/keys", sealed); err != nil || !bytes.Equal(got, plain) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if again, _ := r.Seal("/skein/cluster/keys", plain); bytes.Equal(again, sealed) {
		t.Error("two seals of the same are the same")
	}
	dropped, _ := rotated.Drop(r.Primary())
	if _, err := dropped.Open("/skein/cluster/keys", sealed); !errors.Is(err, ErrUnknownKey) || !strings.Contains(err.Error(), r.Primary()) {
		t.Errorf("without the key: %v, want ErrUnknownKey that names it", err)
	}
	if _, err := r.Open("/skein/other", sealed); !errors.Is(err, ErrSealed) {
		t.Errorf("opened for another purpose: %v", err)
	}
	if _, err := (Ring{}).Seal("x", plain); !errors.Is(err, ErrNone) {
		t.Errorf("an empty ring sealed: %v", err)
	}
	for i := range sealed {
		bad := slices.Clone(sealed)
		bad[i] ^= 1
		if _, err := r.Open("/skein/cluster/keys", bad); err == nil {
			t.Fatalf("byte %d was changed and nobody noticed", i)
		}
		if _, err := r.Open("/skein/cluster/keys", sealed[:i]); err == nil {
			t.Fatalf("the first %d of %d bytes were enough", i, len(sealed))
		}
	}
}

func TestNothingPrintsAKey(t *testing.T) {
	r := newRing(t, 2)
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "ring", r, "key", r.Keys()[0])
	fmt.Fprintf(&log, "%v %+v %#v %s %q %v %+v %#v", r, r, r, r, r, r.Keys()[0], r.Keys(), r.Keys())
	type outer struct{ ring Ring }
	fmt.Fprintf(&log, "%v %+v %#v", outer{r}, outer{r}, &outer{r})
	_, err := r.Use("nokey")
	fmt.Fprint(&log, err)
	for _, k := range r.keys {
		for what, s := range map[string]string{"raw": string(k.secret[:]), "base64": base64.StdEncoding.EncodeToString(k.secret[:]),
			"hex": fmt.Sprintf("%x", *k.secret), "Go": strings.Trim(fmt.Sprint(*k.secret), "[]"), "Go syntax": strings.TrimPrefix(fmt.Sprintf("%#v", *k.secret), "[32]uint8")} {
			if strings.Contains(log.String(), s) {
				t.Errorf("the key appears (%s) in %s", what, log.String())
			}
		}
		if !strings.Contains(log.String(), k.ID) {
			t.Errorf("key %s is not named", k.ID)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	r := newRing(t, 2)
	change := func(f func(*record)) []byte {
		var x record
		if err := json.Unmarshal(r.Encode(), &x); err != nil {
			t.Fatal(err)
		}
		f(&x)
		b, _ := json.Marshal(x)
		return b
	}
	for name, c := range map[string]struct {
		in   []byte
		want error
	}{
		"empty":           {nil, ErrCorrupt},
		"cut off":         {r.Encode()[:100], ErrCorrupt},
		"twice":           {append(r.Encode(), r.Encode()...), ErrCorrupt},
		"no version":      {change(func(x *record) { x.Version = 0 }), ErrCorrupt},
		"newer":           {change(func(x *record) { x.Version = 2 }), ErrNewer},
		"flipped bit":     {change(func(x *record) { x.Keys[1].Secret[7] ^= 1 }), ErrCorrupt},
		"short key":       {change(func(x *record) { x.Keys[0].Secret = x.Keys[0].Secret[:16] }), ErrCorrupt},
		"same key twice":  {change(func(x *record) { x.Keys[1] = x.Keys[0] }), ErrCorrupt},
		"no primary":      {change(func(x *record) { x.Primary = "" }), ErrCorrupt},
		"foreign primary": {change(func(x *record) { x.Primary = "0011223344556677" }), ErrCorrupt},
		"huge":            {bytes.Repeat([]byte(" "), maxEncoded+1), ErrCorrupt},
	} {
		if _, err := Decode(c.in); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	back, err := Decode(r.Encode())
	if err != nil || !back.Equal(r) || !back.Keys()[0].Created.Equal(now) {
		t.Errorf("the ring did not survive: %v, %v", back, err)
	}
}

func TestHolder(t *testing.T) {
	path := filepath.Join(t.TempDir(), FileName)
	if _, err := Load(path); !errors.Is(err, ErrNone) {
		t.Errorf("no file: %v", err)
	}
	if err := os.WriteFile(path+newInfix+"123", []byte("half a ring"), 0o600); err != nil {
		t.Fatal(err)
	}
	h, err := NewHolder(path)
	if err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(path + "*"); len(left) != 0 {
		t.Errorf("an interrupted write left %v", left)
	}
	r0, changed := h.Ring()
	want := newRing(t, 1)
	if _, err := h.Update(func(r Ring) (Ring, error) { return r.Merge(want) }); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	default:
		t.Error("nobody was told of the change")
	}
	if r, _ := h.Ring(); !r0.Empty() || !r.Equal(want) {
		t.Errorf("the ring was %v and is %v, want %v", r0, r, want)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	refusal := errors.New("no")
	if _, err := h.Update(func(Ring) (Ring, error) { return Ring{}, refusal }); !errors.Is(err, refusal) {
		t.Errorf("error %v", err)
	}
	old, err := os.Open(path) // what a thief of freed blocks would find
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	k, _ := NewKey(rand.Reader, now)
	if _, err := h.Update(func(r Ring) (Ring, error) { return r.Add(k) }); err != nil {
		t.Fatal(err)
	}
	back, err := NewHolder(path)
	if err != nil {
		t.Fatal(err)
	}
	if r, _ := back.Ring(); len(r.IDs()) != 2 || !r.Has(k.ID) {
		t.Errorf("after a restart: %v", r)
	}
	now, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer now.Close()
	if err := h.Destroy(); err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]*os.File{"replaced": old, "destroyed": now} {
		b := make([]byte, maxEncoded)
		n, _ := f.ReadAt(b, 0)
		if n == 0 || len(bytes.Trim(b[:n], "\x00")) != 0 {
			t.Errorf("the %s file still has %q", name, b[:n])
		}
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file is still there: %v", err)
	}
	if r, _ := h.Ring(); !r.Empty() {
		t.Errorf("still in memory: %v", r)
	}
	if err := h.Destroy(); err != nil {
		t.Errorf("destroying nothing: %v", err)
	}
}

func TestHolderConcurrentUpdates(t *testing.T) {
	path := filepath.Join(t.TempDir(), FileName)
	h, err := NewHolder(path)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			k, err := NewKey(rand.Reader, now)
			if err == nil {
				_, err = h.Update(func(r Ring) (Ring, error) { return r.Add(k) })
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	onDisk, err := Load(path)
	if r, _ := h.Ring(); err != nil || len(r.IDs()) != 8 || !onDisk.Equal(r) {
		t.Errorf("in memory %v, on disk %v, %v, want the same eight keys", r, onDisk, err)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(newRing(f, 2).Encode())
	f.Add([]byte(`{"version":1,"primary":"","keys":[]}`))
	f.Add([]byte("{"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := Decode(b)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNewer) {
				t.Fatalf("error of another kind: %v", err)
			}
			return
		}
		if back, err := Decode(r.Encode()); err != nil || !back.Equal(r) {
			t.Fatalf("%v became %v, %v", r, back, err)
		}
		if !r.Empty() {
			s, err := r.Seal("p", b)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := r.Open("p", s); err != nil || !bytes.Equal(got, b) {
				t.Fatalf("opened %q, %v", got, err)
			}
		}
	})
}

func FuzzOpen(f *testing.F) {
	r := newRing(f, 1)
	s, err := r.Seal("p", []byte("x"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(s)
	f.Add([]byte(sealPrefix + r.Primary() + ":"))
	f.Add([]byte(sealPrefix))
	f.Fuzz(func(t *testing.T, b []byte) {
		if plain, err := r.Open("p", b); err == nil && !bytes.Equal(b, s) {
			t.Fatalf("forged: %q opens as %q", b, plain)
		} else if err != nil && !errors.Is(err, ErrSealed) && !errors.Is(err, ErrUnknownKey) {
			t.Fatalf("error of another kind: %v", err)
		}
	})
}
