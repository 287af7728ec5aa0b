package cgroup

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

const hybrid = `22 28 0:21 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
30 22 0:26 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
31 22 0:27 / /sys/fs/cgroup/cpu\040set rw,relatime shared:4 - cgroup cgroup rw,cpuset
32 22 0:28 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
33 22 0:28 / /elsewhere rw,relatime - cgroup cgroup rw,cpu,cpuacct
34 22 0:29 /docker/x /bound rw,relatime - cgroup cgroup rw,memory
garbage
`

func TestParseMountinfo(t *testing.T) {
	got, err := parseMountinfo(strings.NewReader(hybrid))
	want := []Hierarchy{{"/sys/fs/cgroup/unified", true, false}, {"/sys/fs/cgroup/cpu set", false, true}, {"/sys/fs/cgroup/cpu,cpuacct", false, false}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %+v, %v", got, err)
	}
}

func FuzzParseMountinfo(f *testing.F) {
	f.Add(hybrid)
	f.Add("1 2 3:4 / \\777\\04 x - cgroup x cpuset")
	f.Fuzz(func(t *testing.T, s string) {
		hs, _ := parseMountinfo(strings.NewReader(s))
		for _, h := range hs {
			if h.V2 && h.Cpuset {
				t.Errorf("%+v from %q", h, s)
			}
		}
	})
}

func TestCheck(t *testing.T) {
	for p, ok := range map[string]bool{"/skein": true, "/skein/n1/pods": true, "": false, "/": false, "skein": false, "/skein/": false, "/a/../b": false} {
		if err := Check(p); (err == nil) != ok {
			t.Errorf("%q: %v", p, err)
		}
	}
}

func TestLife(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("cgroups need root")
	}
	root := "/skein-cgroup-test-" + strconv.Itoa(os.Getpid())
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := Kill(ctx, root); err != nil {
			t.Error(err)
		}
		if err := Remove(ctx, root); err != nil {
			t.Error(err)
		}
		if there, err := Exists(root); err != nil || there {
			t.Errorf("still there: %v, %v", there, err)
		}
	})
	for range 2 { // the second time changes nothing
		if err := Make(root+"/a/b", root+"/c"); err != nil {
			t.Fatal(err)
		}
	}
	hs, err := Hierarchies()
	if err != nil {
		t.Fatal(err)
	}
	// A process with a child of its own, which stays in the group of its parent.
	cmd := exec.Command("sh", "-c", "read x; sleep 1000 & wait")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := Enter(root+"/a/b", cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	for _, h := range hs {
		b, err := os.ReadFile(filepath.Join(h.Mount, root, "a/b/cgroup.procs"))
		if err != nil || strings.TrimSpace(string(b)) != strconv.Itoa(cmd.Process.Pid) {
			t.Errorf("%s holds %q, %v", h.Mount, b, err)
		}
	}
	if _, err := in.Write([]byte("\n")); err != nil {
		t.Fatal(err)
	}
	for n := 0; n < 2; {
		pids, err := Pids(root)
		if err != nil {
			t.Fatal(err)
		}
		n = len(pids)
		if ctx.Err() != nil {
			t.Fatalf("waited for two processes, there are %v", pids)
		}
	}
	short, stop := context.WithTimeout(ctx, 20*time.Millisecond)
	defer stop()
	if err := Remove(short, root); err == nil {
		t.Error("a cgroup with processes was removed")
	}
	if err := Kill(ctx, root); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("the process ended well")
	}
}
