package exits

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

func TestWriteReadRemove(t *testing.T) {
	dir := t.TempDir()
	at := time.Unix(5, 6)
	if _, err := Read(dir, "a"); !errors.Is(err, ErrNone) {
		t.Errorf("before: %v", err)
	}
	if err := WriteOOM(dir, "a"); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(dir, "a"); !errors.Is(err, ErrNone) {
		t.Errorf("with an oom mark only: %v", err)
	}
	if err := errors.Join(Write(dir, "a", 137, at), Write(dir, "b", 0, at)); err != nil {
		t.Fatal(err)
	}
	if r, err := Read(dir, "a"); err != nil || r.Status != 137 || !r.At.Equal(at) || !r.OOM {
		t.Errorf("a: %+v, %v", r, err)
	}
	if r, err := Read(dir, "b"); err != nil || r.Status != 0 || r.OOM {
		t.Errorf("b: %+v, %v", r, err)
	}
	if err := os.WriteFile(filepath.Join(dir, ".tmp-1"), nil, 0o600); err != nil { // what a killed writer leaves
		t.Fatal(err)
	}
	ids, err := IDs(dir)
	slices.Sort(ids)
	if err != nil || !slices.Equal(ids, []string{"a", "b"}) {
		t.Errorf("ids %v, %v", ids, err)
	}
	if err := errors.Join(Remove(dir, "a"), Remove(dir, "a")); err != nil {
		t.Error(err)
	}
	if ids, _ := IDs(dir); !slices.Equal(ids, []string{"b"}) {
		t.Errorf("ids %v after removing a", ids)
	}
}

func TestBadIDs(t *testing.T) {
	for _, id := range []string{"", ".", "../x", "a/b", "a\x00"} {
		if Write(t.TempDir(), id, 0, time.Now()) == nil || WriteOOM(t.TempDir(), id) == nil || Remove(t.TempDir(), id) == nil {
			t.Errorf("id %q was accepted", id)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"v":1,"status":7,"at":"2026-01-02T03:04:05Z"}`))
	f.Add([]byte(`{"v":2,"status":7}`))
	f.Add([]byte(`{`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decode(b)
		if err == nil && (r.Version != version || r.OOM) {
			t.Errorf("accepted %+v from %q", r, b)
		}
	})
}
