// Package power tests what a loss of power, at any moment of defragmenting, does
// to a shard's database: it is the old file or the new one, whole, with everything
// that had been called durable.
package power

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	dsm "github.com/lni/dragonboat/v4/statemachine"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"skein.io/skein/consensus/mvcc"
	"skein.io/skein/test/store/chaos/disk"
)

const (
	keys = 60
	size = 3000
)

// entry i of the log; it is the same in every process.
func entry(i uint64) dsm.Entry {
	c := mvcc.Command{Kind: mvcc.KindRequest, Request: &pb.InternalRaftRequest{Put: &pb.PutRequest{Key: key(i), Value: value(i)}}}
	if i%50 == 0 { // something to defragment
		c.Request = &pb.InternalRaftRequest{Compaction: &pb.CompactionRequest{Revision: int64(i)/50*49 - 20}}
	}
	b, err := c.Encode()
	if err != nil {
		panic(err)
	}
	return dsm.Entry{Index: i, Cmd: b}
}

func key(i uint64) []byte { return fmt.Appendf(nil, "/k/%03d", i%keys) }

func value(i uint64) []byte {
	return append(fmt.Appendf(nil, "%d.", i), bytes.Repeat([]byte{byte(i)}, size)...)
}

// The process that loses its machine's power.
func TestChild(t *testing.T) {
	dir := os.Getenv("SKEIN_POWER_DIR")
	if dir == "" {
		t.Skip("for TestPowerCutDuringDefrag")
	}
	m := mvcc.New(mvcc.Config{Dir: dir})
	index, err := m.Open(nil)
	if err != nil {
		t.Fatal(err)
	}
	if os.Getenv("SKEIN_POWER_SWITCH") != "" {
		switches(m, dir, index)
		return
	}
	go func() {
		for {
			if _, err := m.Defragment(context.Background()); err != nil {
				fmt.Println("error", err)
			}
			time.Sleep(20 * time.Millisecond) // the next one commits first, which would hide what this one did not
		}
	}()
	for i := index + 1; ; i++ {
		if _, err := m.Update([]dsm.Entry{entry(i)}); err != nil {
			fmt.Println("error", err)
			return
		}
		if i%40 == 0 { // seldom: a switch is followed by a while in which nothing else makes it durable
			if err := m.Sync(); err != nil {
				fmt.Println("error", err)
				return
			}
			fmt.Println("synced", i)
		}
	}
}

// switches writes, makes that durable, and puts a copy of the database in its place, again
// and again. It says so each time, when the old file is gone, and waits to be killed then.
func switches(m *mvcc.Machine, dir string, index uint64) {
	for i := index + 1; i <= index+40; i++ {
		if _, err := m.Update([]dsm.Entry{entry(i)}); err != nil {
			fmt.Println("error", err)
		}
	}
	if err := m.Sync(); err != nil {
		fmt.Println("error", err)
	}
	if _, err := m.Defragment(context.Background()); err != nil {
		fmt.Println("error", err)
	}
	for ents := []os.DirEntry{nil, nil}; len(ents) != 1; {
		ents, _ = os.ReadDir(dir)
	}
	fmt.Println("synced", index+40)
	select {}
}

// machine is a disk with a process on it, whose power is cut again and again.
type machine struct {
	t      *testing.T
	d      *disk.Disk
	pid    int
	root   string
	at     string
	seed   int64
	rnd    *rand.Rand
	lost   int // writes
	names  int
	rounds int
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	m := &machine{t: t, root: t.TempDir(), at: t.TempDir(), seed: time.Now().UnixNano()}
	t.Logf("seed %d", m.seed)
	m.rnd = rand.New(rand.NewSource(m.seed))
	var err error
	if m.d, err = disk.New(m.root); err != nil {
		t.Fatal(err)
	}
	m.pid = namespace(t)
	return m
}

// cut runs the process for a while, and cuts its power. It returns the directory behind
// the disk, as a process must not use the one it serves, and what was called durable.
func (m *machine) cut(atSwitch bool) (dir string, synced uint64) {
	m.t.Helper()
	after := time.Duration(m.rnd.Int63n(int64(300 * time.Millisecond)))
	var env []string
	if atSwitch {
		after, env = 0, []string{"SKEIN_POWER_SWITCH=1"}
	}
	if err := m.d.Mount(m.pid, m.at); err != nil {
		m.t.Fatal(err)
	}
	synced = run(m.t, m.pid, filepath.Join(m.at, "db"), after, env...)
	if err := m.d.Unmount(m.pid, m.at); err != nil {
		m.t.Fatal(err)
	}
	w, n, err := m.d.PowerCut(m.seed + int64(m.rounds))
	if err != nil {
		m.t.Fatal(err)
	}
	m.lost, m.names, m.rounds = m.lost+w, m.names+n, m.rounds+1
	return filepath.Join(m.root, "data", "db"), synced
}

func TestPowerCutDuringDefrag(t *testing.T) {
	m := newMachine(t)
	files, index := 0, uint64(0)
	// A quick machine may have synchronised all by the moment of each cut; one that takes nothing proves nothing.
	for round := 0; round < 12 || m.lost == 0 && round < 60; round++ {
		m.d.SetUnordered(round%2 == 1)
		dir, synced := m.cut(round%3 == 2)
		ents, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		files += len(ents)
		if index = check(t, dir, synced); t.Failed() {
			t.Fatalf("round %d", round)
		}
	}
	t.Logf("%d entries, %d files found in %d rounds, %d writes and %d names lost", index, files, m.rounds, m.lost, m.names)
	if m.lost == 0 {
		t.Error("no power cut has taken anything")
	}
}

// A store that does not synchronise the copy that a defragmentation makes, or the
// directory in which the copy gets its name, is found out.
func TestMissingSync(t *testing.T) {
	for name, of := range map[string]func(path string) bool{
		"the copy":      func(path string) bool { return strings.HasSuffix(path, ".tmp") },
		"the directory": func(path string) bool { return !strings.Contains(filepath.Base(path), ".") },
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			m.d.IgnoreSyncs(of)
			m.d.SetUnordered(true)
			for m.rounds < 40 {
				dir, synced := m.cut(true)
				// In a process of its own: a database with holes can end it.
				c := exec.Command(os.Args[0], "-test.run=^TestCheck$")
				c.Env = append(os.Environ(), "SKEIN_POWER_CHECK="+dir, fmt.Sprintf("SKEIN_POWER_SYNCED=%d", synced))
				if out, err := c.CombinedOutput(); err != nil {
					t.Logf("found in round %d: %.300s", m.rounds, out)
					return
				}
			}
			t.Errorf("nothing was missed in %d power cuts", m.rounds)
		})
	}
}

// TestCheck is the process that looks at what a power cut left.
func TestCheck(t *testing.T) {
	dir := os.Getenv("SKEIN_POWER_CHECK")
	if dir == "" {
		t.Skip("for TestMissingSync")
	}
	synced, err := strconv.ParseUint(os.Getenv("SKEIN_POWER_SYNCED"), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	check(t, dir, synced)
}

// check opens the database and compares it with what the log says up to its index.
func check(t *testing.T, dir string, synced uint64) uint64 {
	t.Helper()
	m := mvcc.New(mvcc.Config{Dir: dir})
	index, err := m.Open(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if index < synced {
		t.Errorf("the database is at %d, durable was %d", index, synced)
	}
	r, err := m.Range(t.Context(), &pb.RangeRequest{Key: []byte("/k/"), RangeEnd: []byte("/k0")})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string][]byte{}
	for i := uint64(1); i <= index; i++ {
		if i%50 != 0 {
			want[string(key(i))] = value(i)
		}
	}
	if len(r.Kvs) != len(want) {
		t.Errorf("%d keys, want %d", len(r.Kvs), len(want))
	}
	for _, kv := range r.Kvs {
		if !bytes.Equal(kv.Value, want[string(kv.Key)]) {
			t.Errorf("at %d: %s is %.10q, want %.10q", index, kv.Key, kv.Value, want[string(kv.Key)])
		}
	}
	return index
}

// namespace returns a process with mounts of its own, which end with the test.
func namespace(t *testing.T) int {
	t.Helper()
	// Pdeathsig follows the thread, and threads that enter other namespaces end.
	runtime.LockOSThread()
	holder := exec.Command("unshare", "--mount", "--propagation", "slave", "sh", "-c", "echo ready; exec cat")
	holder.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if _, err := holder.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := holder.StdoutPipe()
	if err == nil {
		err = holder.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = holder.Process.Kill(); _ = holder.Wait() })
	if _, err := io.ReadFull(out, make([]byte, len("ready\n"))); err != nil {
		t.Fatal(err)
	}
	return holder.Process.Pid
}

// run runs the child until it is killed, and returns what it called durable.
func run(t *testing.T, pid int, dir string, after time.Duration, env ...string) (synced uint64) {
	t.Helper()
	cmd := exec.Command("nsenter", fmt.Sprintf("--mount=/proc/%d/ns/mnt", pid), "--", os.Args[0], "-test.run=^TestChild$")
	cmd.Env = append(append(os.Environ(), "SKEIN_POWER_DIR="+dir), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
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
		if n, err := fmt.Sscanf(lines.Text(), "synced %d", &synced); n == 1 && err == nil {
			if timer == nil {
				timer = time.AfterFunc(after, func() { _ = cmd.Process.Kill() })
			}
		} else if strings.TrimSpace(lines.Text()) != "" {
			t.Errorf("the child says %q", lines.Text())
		}
	}
	if timer == nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		t.Fatal("the child has not come to work")
	}
	_ = cmd.Wait()
	return synced
}
