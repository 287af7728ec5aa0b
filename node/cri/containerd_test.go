package cri_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"skein.io/skein/datapath/podnet"
	"skein.io/skein/node/cri"
	"skein.io/skein/node/cri/cgroup"
	"skein.io/skein/node/cri/image"
)

func TestRunPod(t *testing.T) {
	cfg := newConfig(t)
	began := time.Now()
	c, _ := start(t, cfg)
	ready(t, c)
	t.Logf("start to ready: %v", time.Since(began).Round(time.Millisecond))
	importWork(t, c)
	rt := dial(t, c)
	imgs, err := rt.Images.ListImages(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	pinned := map[string]bool{}
	for _, i := range imgs {
		for _, tag := range i.RepoTags {
			pinned[tag] = i.Pinned
		}
	}
	if !pinned[image.PauseName] || pinned[workName] || len(pinned) != 2 {
		t.Errorf("images and whether pinned: %v", pinned)
	}
	began = time.Now()
	p := runPod(t, rt, cfg, "a", "exit", "7")
	t.Logf("pod start: %v", time.Since(began).Round(time.Millisecond))
	defer p.remove(t, rt)
	if st := p.status(t, rt); st.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Fatalf("state %v", st)
	}
	p.fire(t)
	waitFor(t, "the container to end", func() bool { return p.status(t, rt).State == runtimeapi.ContainerState_CONTAINER_EXITED })
	if st := p.status(t, rt); st.ExitCode != 7 || st.Reason != "Error" {
		t.Errorf("exit code %d, reason %s", st.ExitCode, st.Reason)
	}
}

// TestPodNetwork has the helper connect a pod, as CNI plugin, and reaches the pod.
func TestPodNetwork(t *testing.T) {
	cfg := newConfig(t)
	c, _ := start(t, cfg)
	ready(t, c)
	importWork(t, c)
	rt := dial(t, c)
	networkReady := func() bool {
		st, err := rt.Status(t.Context(), false)
		if err != nil {
			t.Fatal(err)
		}
		for _, cond := range st.Status.Conditions {
			if cond.Type == runtimeapi.NetworkReady {
				return cond.Status
			}
		}
		return false
	}
	if networkReady() {
		t.Fatal("the network is ready without a configuration")
	}
	if out, err := exec.Command("ip", "address", "add", "192.0.2.7/32", "dev", "lo").CombinedOutput(); err != nil {
		t.Fatalf("node address: %v\n%s", err, out)
	}
	list, err := podnet.Conflist("skein-"+filepath.Base(cfg.Dir), cri.HelperName, filepath.Join(cfg.Dir, "ipam"),
		netip.MustParsePrefix("10.244.7.0/24"), netip.MustParseAddr("192.0.2.7"), 1500)
	if err != nil {
		t.Fatal(err)
	}
	if err := cri.WriteCNI(c.CNIDir(), list); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the network to be ready", networkReady)
	sb := &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: "n", Namespace: "default", Uid: "n"}, Hostname: "n",
		Linux: &runtimeapi.LinuxPodSandboxConfig{CgroupParent: cri.NewCgroups(cfg.CgroupRoot).Pods + "/n"}}
	began := time.Now()
	id, err := rt.RunPodSandbox(t.Context(), sb, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("sandbox with a network: %v", time.Since(began).Round(time.Millisecond))
	st, err := rt.PodSandboxStatus(t.Context(), id, false)
	if err != nil {
		t.Fatal(err)
	}
	ip := st.Status.Network.Ip
	// Nothing listens there; that the pod says so is the proof.
	if _, err := net.DialTimeout("tcp", net.JoinHostPort(ip, "9"), 2*time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("connect to the pod at %s: %v", ip, err)
	}
	if err := errors.Join(rt.StopPodSandbox(t.Context(), id), rt.RemovePodSandbox(t.Context(), id)); err != nil {
		t.Error(err)
	}
	if out, _ := exec.Command("ip", "-o", "link").CombinedOutput(); strings.Count(string(out), "\n") != 1 {
		t.Errorf("links left:\n%s", out)
	}
}

// daemonProcess starts a process that only supervises, and gives back how to kill it.
func daemonProcess(t *testing.T, cfg cri.Config) (kill func(), pid int) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", "supervise", cfg.Dir, cfg.CgroupRoot)
	cmd.Env = append(os.Environ(), "SKEIN_CRI_TEST_HELPER="+cfg.Helper)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	dead := false
	kill = func() {
		if !dead {
			dead = true
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}
	t.Cleanup(kill)
	return kill, cmd.Process.Pid
}

func daemon(t *testing.T, cfg cri.Config) { daemonProcess(t, cfg) }

func pidOf(t *testing.T, c *cri.Containerd) int {
	t.Helper()
	st, _ := c.State()
	if st.Pid == 0 {
		t.Fatalf("no containerd: %+v", st)
	}
	return st.Pid
}

func kill9(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

func TestRestartsAtOnce(t *testing.T) {
	c, _ := start(t, newConfig(t))
	ready(t, c)
	first := pidOf(t, c)
	began := time.Now()
	kill9(t, first)
	waitFor(t, "another process", func() bool { st, _ := c.State(); return st.Pid != first && st.Ready })
	t.Logf("killed to ready again: %v", time.Since(began).Round(time.Millisecond))
	if st, _ := c.State(); st.Restarts != 1 || st.Err != nil || st.Adopted {
		t.Errorf("state %+v", st)
	}
}

func TestStaysAndIsAdopted(t *testing.T) {
	cfg := newConfig(t)
	c, stop := start(t, cfg)
	ready(t, c)
	first := pidOf(t, c)
	stop()
	if err := syscall.Kill(first, 0); err != nil {
		t.Fatalf("containerd ended with the supervisor: %v", err)
	}
	c2, stop2 := start(t, cfg)
	ready(t, c2)
	if st, _ := c2.State(); st.Pid != first || !st.Adopted {
		t.Errorf("not adopted: %+v, want process %d", st, first)
	}
	// An adopted one is supervised as well, though it is no child.
	kill9(t, first)
	waitFor(t, "another process", func() bool { st, _ := c2.State(); return st.Pid != first && st.Ready })
	stop2()

	// Another configuration: replaced.
	second := pidOf(t, c2)
	cfg.LogLevel = "debug"
	c3, _ := start(t, cfg)
	ready(t, c3)
	if st, _ := c3.State(); st.Pid == second || st.Adopted {
		t.Errorf("containerd with an old configuration was adopted: %+v", st)
	}
}

func TestSecondOnTheSameDirectory(t *testing.T) {
	cfg := newConfig(t)
	c, _ := start(t, cfg)
	ready(t, c)
	out, err := exec.Command("/proc/self/exe", "containerd", "-config", cfg.Dir+"/config.toml", "-lock", cfg.Dir+"/containerd.lock").CombinedOutput()
	if err == nil {
		t.Fatalf("a second containerd ran: %s", out)
	}
	t.Logf("%s", out)
	rt := dial(t, c)
	if _, err := rt.Status(context.Background(), false); err != nil {
		t.Errorf("the first one was disturbed: %v", err)
	}
}

// TestPowerCut kills everything at once, takes away what a reboot would, and starts again on the same disk.
func TestPowerCut(t *testing.T) {
	cfg := newConfig(t)
	c, stop := start(t, cfg)
	ready(t, c)
	importWork(t, c)
	rt := dial(t, c)
	var pods []*pod
	for _, name := range []string{"a", "b", "c"} {
		pods = append(pods, runPod(t, rt, cfg, name, "exit", "0"))
	}
	stop()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := removeCgroup(ctx, cfg.CgroupRoot); err != nil {
		t.Fatal(err)
	}
	if err := unmountBelow(cfg.Dir); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	c, _ = start(t, cfg)
	ready(t, c)
	t.Logf("ready after a power cut with 3 pods: %v", time.Since(began).Round(time.Millisecond))
	rt = redial(t, c)
	sbs, err := rt.ListPodSandbox(ctx, nil)
	if err != nil || len(sbs) != len(pods) {
		t.Fatalf("sandboxes %v, %v", sbs, err)
	}
	for _, sb := range sbs {
		if sb.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
			t.Errorf("sandbox %s: %v", sb.Metadata.Name, sb.State)
		}
	}
	for _, p := range pods {
		if st := p.status(t, rt); st.State != runtimeapi.ContainerState_CONTAINER_EXITED || st.ExitCode == 0 {
			t.Errorf("%s: %v, exit code %d; nobody knows how it ended, so not with 0", p.cfg.Metadata.Name, st.State, st.ExitCode)
		}
		p.remove(t, rt)
	}
	again := runPod(t, rt, cfg, "d", "exit", "5")
	again.fire(t)
	waitFor(t, "a new container to end", func() bool { return again.status(t, rt).State == runtimeapi.ContainerState_CONTAINER_EXITED })
	if st := again.status(t, rt); st.ExitCode != 5 {
		t.Errorf("exit code %d", st.ExitCode)
	}
	again.remove(t, rt)
}

func TestPurge(t *testing.T) {
	cfg := newConfig(t)
	cfg.Dir = filepath.Join(cfg.Dir, strings.Repeat("long", 20)) // so that sockets lie elsewhere
	c, stop := start(t, cfg)
	ready(t, c)
	if err := c.Purge(); err == nil {
		t.Fatal("purged while it runs")
	}
	stop()
	if err := c.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.Purge(); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{cfg.Dir, filepath.Dir(strings.TrimPrefix(c.Endpoint(), "unix://"))} {
		if _, err := os.Stat(p); err == nil {
			t.Errorf("%s is still there", p)
		}
	}
}

// TestMemory prints what the node's own processes cost, and holds them to a bound.
func TestMemory(t *testing.T) {
	cfg := newConfig(t)
	c, _ := start(t, cfg)
	ready(t, c)
	importWork(t, c)
	rt := dial(t, c)
	rss, anon := memory(t, pidOf(t, c))
	t.Logf("containerd without pods: %d MB resident, %d MB of it anonymous", rss, anon)
	if anon > 40 && !raceEnabled {
		t.Errorf("containerd takes %d MB", anon)
	}
	var times []time.Duration
	for _, name := range []string{"a", "b", "c", "d", "e"} {
		began := time.Now()
		p := runPod(t, rt, cfg, name, "exit", "0")
		times = append(times, time.Since(began).Round(time.Millisecond))
		defer p.remove(t, rt)
	}
	t.Logf("pod starts: %v", times)
	rss, anon = memory(t, pidOf(t, c))
	t.Logf("containerd with 5 pods: %d MB resident, %d MB anonymous", rss, anon)
	shims, err := cgroup.Pids(cri.NewCgroups(cfg.CgroupRoot).Shims)
	if err != nil || len(shims) != 5 {
		t.Fatalf("shims %v, %v", shims, err)
	}
	rss, anon = memory(t, shims[0])
	t.Logf("a shim: %d MB resident, %d MB anonymous", rss, anon)
}

// memory of a process, in MB.
func memory(t *testing.T, pid int) (rss, anon int) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range strings.Split(string(b), "\n") {
		f := strings.Fields(l)
		if len(f) < 2 {
			continue
		}
		n, _ := strconv.Atoi(f[1])
		switch f[0] {
		case "VmRSS:":
			rss = n / 1000
		case "RssAnon:":
			anon = n / 1000
		}
	}
	return rss, anon
}
