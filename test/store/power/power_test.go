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

func TestPowerCutDuringDefrag(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewSource(seed))
	root, at := t.TempDir(), t.TempDir()
	d, err := disk.New(root)
	if err != nil {
		t.Fatal(err)
	}
	pid := namespace(t)
	lost, names, files, index := 0, 0, 0, uint64(0)
	for round := range 12 {
		if err := d.Mount(pid, at); err != nil {
			t.Fatal(err)
		}
		synced := run(t, pid, filepath.Join(at, "db"), time.Duration(rnd.Int63n(int64(300*time.Millisecond))))
		if err := d.Unmount(pid, at); err != nil {
			t.Fatal(err)
		}
		w, n, err := d.PowerCut(seed + int64(round))
		if err != nil {
			t.Fatal(err)
		}
		lost, names = lost+w, names+n
		// The directory behind the disk: a process must not use the one it serves.
		dir := filepath.Join(root, "data", "db")
		ents, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		files += len(ents)
		if index = check(t, dir, synced); t.Failed() {
			t.Fatalf("round %d", round)
		}
	}
	t.Logf("%d entries, %d files found in 12 rounds, %d writes and %d names lost", index, files, lost, names)
	if lost == 0 {
		t.Error("no power cut has taken anything")
	}
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
func run(t *testing.T, pid int, dir string, after time.Duration) (synced uint64) {
	t.Helper()
	cmd := exec.Command("nsenter", fmt.Sprintf("--mount=/proc/%d/ns/mnt", pid), "--", os.Args[0], "-test.run=^TestChild$")
	cmd.Env = append(os.Environ(), "SKEIN_POWER_DIR="+dir)
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
