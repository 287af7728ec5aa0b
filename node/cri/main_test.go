package cri_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"skein.io/skein/node/cri"
	"skein.io/skein/node/cri/cgroup"
	"skein.io/skein/node/cri/containerd"
	"skein.io/skein/node/cri/image"
)

// The tests run real containers, in a mount and a network namespace of their own and below a cgroup named after this process. What a killed run
// left behind is removed by the next one, which finds it by that name and the death of that process.
const (
	cgroupPrefix = "/skein-cri-test-"
	childEnv     = "SKEIN_CRI_TEST"
)

var workPrefix = filepath.Join(os.TempDir(), "skein-cri-")

var (
	cgroupRoot = cgroupPrefix + strconv.Itoa(os.Getpid())
	work       string // scratch directory of this run
	helper     string // skein-helper
	workload   string // the program of the containers
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "containerd" {
		containerd.Exit(os.Args[2:])
	}
	if len(os.Args) > 1 && os.Args[1] == "supervise" {
		superviseMain(os.Args[2], os.Args[3])
		return
	}
	if os.Geteuid() != 0 {
		fmt.Println("SKIP: these tests start containers and need root")
		return
	}
	if os.Getenv(childEnv) == "" { // same process, other namespaces
		args := append([]string{"unshare", "--net", "--mount", "--propagation", "slave", os.Args[0]}, os.Args[1:]...)
		path, err := exec.LookPath(args[0])
		if err == nil {
			err = syscall.Exec(path, args, append(os.Environ(), childEnv+"=1"))
		}
		fmt.Fprintln(os.Stderr, "unshare:", err)
		os.Exit(1)
	}
	// containerd's CNI library keeps results below /var/lib, wherever its own state is.
	for _, c := range [][]string{{"ip", "link", "set", "lo", "up"}, {"mount", "-t", "tmpfs", "tmpfs", "/var/lib"}} {
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "%v: %v\n%s", c, err, out)
			os.Exit(1)
		}
	}
	sweep()
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	work = workPrefix + strconv.Itoa(os.Getpid())
	if err := os.Mkdir(work, 0o755); err != nil {
		return 0, err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		err = errors.Join(err, removeCgroup(ctx, cgroupRoot), unmountBelow(work), os.RemoveAll(work))
	}()
	helper, workload = filepath.Join(work, cri.HelperName), filepath.Join(work, "workload")
	for out, pkg := range map[string]string{helper: "skein.io/skein/cmd/skein-helper", workload: "./testdata/workload"} {
		build := exec.Command("go", "build", "-tags", "grpcnotrace", "-ldflags", "-s -w", "-o", out, pkg)
		build.Env = append(os.Environ(), "CGO_ENABLED=0") // static, also when the tests are not
		if msg, err := build.CombinedOutput(); err != nil {
			return 0, fmt.Errorf("build %s: %w\n%s", pkg, err, msg)
		}
	}
	return m.Run(), nil
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
	stale := func(pattern, prefix string, remove func(pid string) error) {
		found, _ := filepath.Glob(pattern)
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
		stale(h.Mount+cgroupPrefix+"*", h.Mount+cgroupPrefix, func(pid string) error {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			return removeCgroup(ctx, cgroupPrefix+pid)
		})
	}
	stale(workPrefix+"*", workPrefix, func(pid string) error { return os.RemoveAll(workPrefix + pid) })
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

// newConfig gives a containerd of its own to a test.
func newConfig(t *testing.T) cri.Config {
	t.Helper()
	name := strconv.FormatInt(time.Now().UnixNano()%1e9, 36)
	cfg := cri.Config{Dir: filepath.Join(work, name), CgroupRoot: cgroupRoot + "/" + name, Helper: helper, LogLevel: "info"}
	if testing.Verbose() {
		cfg.Logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	return cfg
}

// start runs a supervisor in this process, until stop or the end of the test, which ends containerd too.
func start(t *testing.T, cfg cri.Config) (c *cri.Containerd, stop func()) {
	t.Helper()
	c, err := cri.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
	t.Cleanup(func() {
		stop()
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := c.Shutdown(ctx); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		if err := removeCgroup(ctx, cfg.CgroupRoot); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			b, _ := os.ReadFile(c.LogFile())
			t.Logf("log of containerd:\n%s", b[max(0, len(b)-6000):])
		}
	})
	return c, stop
}

func ready(t *testing.T, c *cri.Containerd) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := c.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
}

func dial(t *testing.T, c *cri.Containerd) *cri.Runtime {
	t.Helper()
	rt, err := cri.Dial(t.Context(), cri.DialConfig{Endpoint: c.Endpoint(), ExitDir: c.ExitDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { rt.Close(context.Background()) })
	return rt
}

const workName = "skein.local/work:1"

// importWork loads an image with the workload.
func importWork(t *testing.T, c *cri.Containerd) {
	t.Helper()
	program, err := os.ReadFile(workload)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	err = image.Write(&b, image.Spec{Name: workName, Arch: runtime.GOARCH, Entrypoint: []string{"/work"},
		Files: []image.File{{Path: "/work", Mode: 0o755, Content: program}, {Path: "/tmp", Dir: true, Mode: 0o1777}}})
	if err != nil {
		t.Fatal(err)
	}
	names, err := c.ImportImage(t.Context(), &b)
	if err != nil || len(names) != 1 || names[0] != workName {
		t.Fatalf("imported %v: %v", names, err)
	}
}

// pod is a sandbox in the host's network with one container.
type pod struct {
	sandbox, id string
	cfg         *runtimeapi.PodSandboxConfig
	trigger     string // a file on the host: the container ends when it appears
}

func nsOptions() *runtimeapi.NamespaceOption {
	return &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE, Pid: runtimeapi.NamespaceMode_CONTAINER}
}

// runPod starts a pod. mode is "exit", "eat"; args follow the trigger file.
func runPod(t *testing.T, rt *cri.Runtime, cfg cri.Config, name, mode string, args ...string) *pod {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	dir := filepath.Join(cfg.Dir, "pods", name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	p := &pod{trigger: filepath.Join(dir, "go")}
	p.cfg = &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "default", Uid: name},
		LogDirectory: dir,
		Linux: &runtimeapi.LinuxPodSandboxConfig{CgroupParent: cri.NewCgroups(cfg.CgroupRoot).Pods + "/" + name,
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: nsOptions()}},
	}
	var err error
	if p.sandbox, err = rt.RunPodSandbox(ctx, p.cfg, ""); err != nil {
		t.Fatal(err)
	}
	lin := &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: nsOptions()}}
	if mode == "eat" {
		lin.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 64 << 20}
	}
	p.id, err = rt.CreateContainer(ctx, p.sandbox, &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "c"}, Image: &runtimeapi.ImageSpec{Image: workName}, LogPath: "c.log",
		Args:   append([]string{mode, "/trigger/go"}, args...),
		Mounts: []*runtimeapi.Mount{{ContainerPath: "/trigger", HostPath: dir}}, Linux: lin}, p.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := rt.StartContainer(ctx, p.id); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *pod) fire(t *testing.T) {
	t.Helper()
	if err := os.WriteFile(p.trigger, nil, 0o644); err != nil {
		t.Fatal(err)
	}
}

func (p *pod) status(t *testing.T, rt *cri.Runtime) *runtimeapi.ContainerStatus {
	t.Helper()
	res, err := rt.ContainerStatus(t.Context(), p.id, false)
	if err != nil {
		t.Fatal(err)
	}
	return res.Status
}

// initPid is the container's first process, as the node sees it.
func (p *pod) initPid(t *testing.T, rt *cri.Runtime) int {
	t.Helper()
	res, err := rt.ContainerStatus(t.Context(), p.id, true)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(res.Info["info"], `"pid":`)
	n, err := strconv.Atoi(rest[:strings.IndexAny(rest, ",}")])
	if err != nil || n == 0 {
		t.Fatalf("no pid in %.200s", res.Info["info"])
	}
	return n
}

func (p *pod) remove(t *testing.T, rt *cri.Runtime) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := errors.Join(rt.StopPodSandbox(ctx, p.sandbox), rt.RemovePodSandbox(ctx, p.sandbox)); err != nil {
		t.Error(err)
	}
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited 20 s for %s", what)
		}
	}
}

// superviseMain is a daemon that does nothing but supervise; the tests kill it.
func superviseMain(dir, group string) {
	c, err := cri.New(cri.Config{Dir: dir, CgroupRoot: group, Helper: os.Getenv("SKEIN_CRI_TEST_HELPER"), LogLevel: "info"})
	if err == nil {
		err = c.Run(context.Background())
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// shimConn connects to the shim of a sandbox, whose address containerd keeps in the bundle.
func shimConn(t *testing.T, cfg cri.Config, sandbox string) net.Conn {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(cfg.Dir, "state/io.containerd.runtime.v2.task/k8s.io", sandbox, "bootstrap.json"))
	if err != nil {
		t.Fatal(err)
	}
	var boot struct{ Address string }
	if err := json.Unmarshal(b, &boot); err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", strings.TrimPrefix(boot.Address, "unix://"))
	if err != nil {
		t.Fatal(err)
	}
	return conn
}
