package real

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"skein.io/skein/datapath/podnet"
	"skein.io/skein/node/cri"
	"skein.io/skein/node/cri/cgroup"
	"skein.io/skein/node/cri/containerd"
	"skein.io/skein/node/cri/image"
)

// The tests run real containers against a real API, in a mount and a network
// namespace of their own and below a cgroup named after this process. What a killed run left is removed by the next one,
// which finds it by that name and the death of that process.
const (
	cgroupPrefix = "/skein-agent-test-"
	childEnv     = "SKEIN_AGENT_TEST"
	nodeAddress  = "192.0.2.8"
	appImage     = "skein.local/app:1"
)

var (
	workPrefix = filepath.Join(os.TempDir(), "skein-agent-")
	cgroupRoot = cgroupPrefix + strconv.Itoa(os.Getpid())
	work       string // scratch directory of this run
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "containerd" {
		containerd.Exit(os.Args[2:])
	}
	if len(os.Args) > 1 && os.Args[1] == "agent" {
		fmt.Fprintln(os.Stderr, "agent:", agentMain())
		os.Exit(1)
	}
	if os.Geteuid() != 0 {
		fmt.Println("SKIP: these tests start containers and need root")
		return
	}
	if os.Getenv(childEnv) == "" { // same process, other namespaces
		path, err := exec.LookPath("unshare")
		if err == nil {
			args := append([]string{"unshare", "--net", "--mount", "--propagation", "slave", os.Args[0]}, os.Args[1:]...)
			err = syscall.Exec(path, args, append(os.Environ(), childEnv+"=1"))
		}
		fmt.Fprintln(os.Stderr, "unshare:", err)
		os.Exit(1)
	}
	for _, args := range [][]string{{"link", "set", "lo", "up"}, {"address", "add", nodeAddress + "/32", "dev", "lo"}} {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "ip %v: %v\n%s", args, err, out)
			os.Exit(1)
		}
	}
	sweep()
	work = workPrefix + strconv.Itoa(os.Getpid())
	if err := os.Mkdir(work, 0o755); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := errors.Join(removeCgroup(ctx, cgroupRoot), unmountBelow(work), os.RemoveAll(work)); err != nil {
		fmt.Fprintln(os.Stderr, "clean-up:", err)
		code = 1
	}
	os.Exit(code)
}

func removeCgroup(ctx context.Context, p string) error {
	if there, err := cgroup.Exists(p); err != nil || !there {
		return err
	}
	if err := cgroup.Kill(ctx, p); err != nil {
		return err
	}
	return cgroup.Remove(ctx, p)
}

// sweep removes what killed runs left: their mounts went with their namespaces.
func sweep() {
	hs, err := cgroup.Hierarchies()
	if err != nil {
		return
	}
	stale := func(prefix string, remove func(pid string) error) {
		found, _ := filepath.Glob(prefix + "*")
		for _, f := range found {
			pid, err := strconv.Atoi(strings.TrimPrefix(f, prefix))
			if err != nil || pid == os.Getpid() || syscall.Kill(pid, 0) == nil {
				continue
			}
			if err := remove(strconv.Itoa(pid)); err != nil {
				fmt.Fprintln(os.Stderr, "sweep:", err)
			}
		}
	}
	for _, h := range hs {
		stale(h.Mount+cgroupPrefix, func(pid string) error {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			return removeCgroup(ctx, cgroupPrefix+pid)
		})
	}
	stale(workPrefix, func(pid string) error { return os.RemoveAll(workPrefix + pid) })
}

// unmountBelow is for the directory to be removable; the mounts would go with the namespace anyway.
func unmountBelow(dir string) error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	lines := strings.Split(string(b), "\n")
	for i := len(lines) - 1; i >= 0; i-- {
		if f := strings.Fields(lines[i]); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			if err := syscall.Unmount(f[4], syscall.MNT_DETACH); err != nil {
				return fmt.Errorf("unmount %s: %w", f[4], err)
			}
		}
	}
	return nil
}

func goBuild(t *testing.T, out, pkg string) {
	t.Helper()
	build := exec.Command("go", "build", "-tags", "grpcnotrace", "-ldflags", "-s -w", "-o", out, pkg)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", pkg, err, b)
	}
}

// startContainerd runs a containerd with the pod network and the test image, until the end of the test.
func startContainerd(t *testing.T, dir, cgroupRoot string) (*cri.Containerd, *cri.Runtime) {
	t.Helper()
	helper, app := filepath.Join(work, cri.HelperName), filepath.Join(work, "app")
	goBuild(t, helper, "skein.io/skein/cmd/skein-helper")
	goBuild(t, app, "skein.io/skein/test/images/app")
	c, err := cri.New(cri.Config{Dir: dir, CgroupRoot: cgroupRoot, Helper: helper})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("containerd: %v", err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := errors.Join(c.Shutdown(ctx), removeCgroup(ctx, cgroupRoot)); err != nil {
			t.Errorf("clean-up of containerd: %v", err)
		}
	})
	wctx, wcancel := context.WithTimeout(ctx, 30*time.Second)
	defer wcancel()
	if err := c.WaitReady(wctx); err != nil {
		t.Fatal(err)
	}
	list, err := podnet.Conflist("skein-"+filepath.Base(work), cri.HelperName, filepath.Join(dir, "ipam"),
		netip.MustParsePrefix("10.244.8.0/24"), netip.MustParseAddr(nodeAddress), 1500)
	if err != nil {
		t.Fatal(err)
	}
	if err := cri.WriteCNI(c.CNIDir(), list); err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(app)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	err = image.Write(&b, image.Spec{Name: appImage, Arch: runtime.GOARCH, Entrypoint: []string{"/app"},
		Files: []image.File{{Path: "/app", Mode: 0o755, Content: program}, {Path: "/tmp", Dir: true, Mode: 0o1777}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.ImportImage(t.Context(), &b); err != nil {
		t.Fatal(err)
	}
	rt, err := cri.Dial(t.Context(), cri.DialConfig{Endpoint: c.Endpoint(), ExitDir: c.ExitDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = rt.Close(context.Background()) })
	return c, rt
}
