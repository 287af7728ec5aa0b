package mvcc

import (
	"bufio"
	"context"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"
)

// The process that TestDefragCrash kills: it applies the script of a seed from
// where the database is, defragments all the time, and says what is durable.
func TestDefragCrashChild(t *testing.T) {
	dir := os.Getenv("SKEIN_CRASH_DIR")
	if dir == "" {
		t.Skip("for TestDefragCrash")
	}
	seed, err := strconv.ParseInt(os.Getenv("SKEIN_CRASH_SEED"), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	m, index := open(t, dir)
	go func() {
		for {
			if _, err := m.Defragment(context.Background()); err != nil {
				fmt.Println("error", err)
				os.Exit(1)
			}
		}
	}()
	s := &script{rnd: rand.New(rand.NewSource(seed))}
	l := &log{t: t}
	for i := uint64(1); ; i++ {
		c := s.next(2000)
		l.add(c)
		if i <= index {
			continue
		}
		l.replay(m, i-1)
		if i%7 == 0 {
			if err := m.Sync(); err != nil {
				t.Error(err)
				return
			}
			fmt.Println("synced", i)
		}
	}
}

// A process that is killed at any moment of defragmenting leaves a database that
// is whole, and holds everything that it called durable.
func TestDefragCrash(t *testing.T) {
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	dir := t.TempDir()
	rnd := rand.New(rand.NewSource(seed))
	model, _ := open(t, t.TempDir())
	defer model.Close()
	s, l := &script{rnd: rand.New(rand.NewSource(seed))}, &log{t: t}
	leftovers := 0
	for round := range 15 {
		synced := kill(t, dir, seed, time.Duration(rnd.Int63n(int64(250*time.Millisecond))))
		leftovers += len(files(t, &Machine{cfg: Config{Dir: dir}})) - 1
		m, index := open(t, dir)
		if index < synced {
			t.Fatalf("round %d: the database is at %d, durable was %d", round, index, synced)
		}
		for from := uint64(len(l.cmds)); uint64(len(l.cmds)) < index; from++ {
			l.add(s.next(2000))
			l.replay(model, from)
		}
		want, got := image(t, model), image(t, m)
		if got != want {
			t.Fatalf("round %d, index %d:\nafter the crash: %s\nwant:            %s", round, index, got, want)
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		if f := files(t, m); len(f) != 1 {
			t.Fatalf("left over: %v", f)
		}
	}
	t.Logf("%d commands, %d unfinished or replaced files found", len(l.cmds), leftovers)
}

// kill runs the child, kills it after a while, and returns the last index that
// it said was durable.
func kill(t *testing.T, dir string, seed int64, after time.Duration) (synced uint64) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestDefragCrashChild$")
	cmd.Env = append(os.Environ(), "SKEIN_CRASH_DIR="+dir, fmt.Sprintf("SKEIN_CRASH_SEED=%d", seed))
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	var timer *time.Timer
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		var n uint64
		if _, err := fmt.Sscanf(lines.Text(), "synced %d", &n); err != nil {
			t.Errorf("the child says %q", lines.Text())
			continue
		}
		synced = n
		if timer == nil { // it works
			timer = time.AfterFunc(after, func() { _ = cmd.Process.Kill() })
		}
	}
	if timer == nil {
		_ = cmd.Process.Kill()
		t.Fatal("the child has not come to work")
	}
	_ = cmd.Wait()
	return synced
}
