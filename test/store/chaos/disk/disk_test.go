package disk

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// mounted gives a disk in a mount namespace of its own, which ends with the test
// or with its process, and a function that runs something inside.
func mounted(t *testing.T) (d *Disk, at string, inside func(func() error), remount func(seed int64) (int, int)) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	d, err := New(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	at = t.TempDir()
	holder := exec.Command("unshare", "--mount", "--propagation", "slave", "sh", "-c", "echo ready; exec cat")
	if _, err := holder.StdinPipe(); err != nil { // it ends with us
		t.Fatal(err)
	}
	out, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = holder.Process.Kill(); _ = holder.Wait() })
	if _, err := out.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	pid := holder.Process.Pid
	if err := d.Mount(pid, at); err != nil {
		t.Fatal(err)
	}
	inside = func(f func() error) {
		t.Helper()
		if err := (place{pid, at}).within(f); err != nil {
			t.Fatal(err)
		}
	}
	remount = func(seed int64) (int, int) {
		t.Helper()
		if err := d.Unmount(pid, at); err != nil {
			t.Fatal(err)
		}
		w, n, err := d.PowerCut(seed)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Mount(pid, at); err != nil {
			t.Fatal(err)
		}
		return w, n
	}
	return d, at, inside, remount
}

// store writes with plain system calls: os files would poll, which a process must
// not do on a file system that it serves itself.
func store(path string, flags int, off int64, data []byte, sync bool) error {
	fd, err := unix.Open(path, flags|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	_, err = unix.Pwrite(fd, data, off)
	if err == nil && sync {
		err = unix.Fdatasync(fd)
	}
	return errors.Join(err, unix.Close(fd))
}

func syncDir(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return errors.Join(unix.Fsync(fd), unix.Close(fd))
}

// What was synchronised survives every power cut; what was not sometimes does.
func TestPowerCut(t *testing.T) {
	first := time.Now().UnixNano()
	t.Logf("seed %d", first)
	d, at, inside, remount := mounted(t)
	kept, lost, torn := 0, 0, 0
	for i := range 40 {
		name := filepath.Join(at, fmt.Sprintf("f%d", i))
		other := filepath.Join(at, fmt.Sprintf("unsynced%d", i))
		inside(func() error {
			return errors.Join(
				store(name, unix.O_CREAT, 0, bytes.Repeat([]byte{'a'}, 4096), true),
				store(name, 0, 0, bytes.Repeat([]byte{'b'}, 2048), false),
				store(name, 0, 4096, bytes.Repeat([]byte{'c'}, 4096), false),
				store(other, unix.O_CREAT, 0, []byte("x"), false))
		})
		remount(first + int64(i))
		b, err := os.ReadFile(filepath.Join(d.data, fmt.Sprintf("f%d", i)))
		if err != nil {
			t.Fatalf("a synchronised file is gone: %v", err)
		}
		if len(b) < 4096 || !bytes.Equal(b[2048:4096], bytes.Repeat([]byte{'a'}, 2048)) {
			t.Fatalf("synchronised data changed: %d bytes", len(b))
		}
		if b[0] == 'b' {
			kept++
		}
		if _, err := os.Stat(filepath.Join(d.data, fmt.Sprintf("unsynced%d", i))); err != nil {
			lost++
		}
		if len(b) > 4096 && len(b) < 8192 {
			torn++
		}
	}
	t.Logf("of 40: %d overwrites kept, %d names lost, %d appends torn", kept, lost, torn)
	if kept == 0 || kept == 40 || lost == 0 || lost == 40 || torn == 0 {
		t.Error("power cuts should lose some of it, not none and not all")
	}
}

// Replacing a file by rename is all or nothing, and durable after fsync.
func TestRename(t *testing.T) {
	d, at, inside, remount := mounted(t)
	old, next := filepath.Join(at, "db"), filepath.Join(at, "db.tmp")
	seen := map[string]int{}
	for i := range 20 {
		inside(func() error {
			return errors.Join(store(old, unix.O_CREAT|unix.O_TRUNC, 0, []byte("old"), true), syncDir(at),
				store(next, unix.O_CREAT|unix.O_TRUNC, 0, []byte("new"), true), unix.Rename(next, old))
		})
		remount(int64(i))
		b, err := os.ReadFile(filepath.Join(d.data, "db"))
		if err != nil {
			t.Fatal(err)
		}
		seen[string(b)]++
	}
	if seen["old"] == 0 || seen["new"] == 0 || len(seen) != 2 {
		t.Errorf("without fsync of the directory: %v", seen)
	}
	inside(func() error {
		return errors.Join(store(next, unix.O_CREAT|unix.O_TRUNC, 0, []byte("new"), true), unix.Rename(next, old), syncDir(at))
	})
	remount(1)
	if b, err := os.ReadFile(filepath.Join(d.data, "db")); err != nil || string(b) != "new" {
		t.Errorf("after fsync of the directory: %q %v", b, err)
	}
}

// The file system behaves like a plain one for a program that does not notice it.
func TestSameAsPlain(t *testing.T) {
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewSource(seed))
	d, at, inside, remount := mounted(t)
	want := map[string][]byte{}
	for i := range 400 {
		name := fmt.Sprintf("f%d", r.Intn(6))
		path := filepath.Join(at, name)
		switch r.Intn(5) {
		case 0, 1, 2:
			data := bytes.Repeat([]byte{byte(i)}, r.Intn(9000)+1)
			off := r.Intn(20000)
			inside(func() error { return store(path, unix.O_CREAT, int64(off), data, r.Intn(2) == 0) })
			b := want[name]
			if len(b) < off+len(data) {
				b = append(b, make([]byte, off+len(data)-len(b))...)
			}
			copy(b[off:], data)
			want[name] = b
		case 3:
			if b, ok := want[name]; ok {
				n := r.Intn(len(b) + 1)
				inside(func() error { return unix.Truncate(path, int64(n)) })
				want[name] = b[:n:n]
			}
		case 4:
			if _, ok := want[name]; ok {
				inside(func() error { return unix.Unlink(path) })
				delete(want, name)
			}
		}
	}
	inside(func() error {
		for name := range want {
			if err := store(filepath.Join(at, name), 0, 0, want[name][:0], true); err != nil {
				return err
			}
		}
		return syncDir(at)
	})
	if w, n := remount(seed); w+n != 0 {
		t.Errorf("%d writes and %d names lost although all was synchronised", w, n)
	}
	ents, err := os.ReadDir(d.data)
	if err != nil || len(ents) != len(want) {
		t.Errorf("%d files, want %d (%v)", len(ents), len(want), err)
	}
	for name, b := range want {
		got, err := os.ReadFile(filepath.Join(d.data, name))
		if err != nil || !bytes.Equal(got, b) {
			t.Errorf("%s: %d bytes, want %d (%v)", name, len(got), len(b), err)
		}
	}
}

func TestFullSlowAndFailing(t *testing.T) {
	d, at, inside, _ := mounted(t)
	path := filepath.Join(at, "f")
	inside(func() error { return store(path, unix.O_CREAT, 0, make([]byte, 1000), true) })
	d.SetFree(100)
	var err error
	inside(func() error { err = store(path, 0, 1000, make([]byte, 100), true); return nil })
	if err != nil {
		t.Errorf("there was room: %v", err)
	}
	inside(func() error { err = store(path, 0, 1100, make([]byte, 1), true); return nil })
	if !errors.Is(err, unix.ENOSPC) {
		t.Errorf("a full disk: %v", err)
	}
	inside(func() error { err = store(path, 0, 0, make([]byte, 1100), true); return nil })
	if err != nil {
		t.Errorf("overwriting on a full disk: %v", err)
	}
	d.SetFree(-1)
	d.SetDelays(50*time.Millisecond, 0)
	start := time.Now()
	inside(func() error { return store(path, 0, 0, []byte("x"), true) })
	if took := time.Since(start); took < 50*time.Millisecond {
		t.Errorf("a slow fsync took %v", took)
	}
	d.SetDelays(0, 0)
	d.FailSyncs(1)
	inside(func() error { err = store(path, 0, 0, []byte("y"), true); return nil })
	if !errors.Is(err, unix.EIO) {
		t.Errorf("a failing fsync: %v", err)
	}
	if s := d.Stats(); s.Refused == 0 || s.Failed != 1 {
		t.Errorf("%+v", s)
	}
}
