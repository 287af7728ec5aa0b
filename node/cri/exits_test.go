package cri_test

import (
	"os"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/ttrpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"skein.io/skein/node/cri"
)

// gone tells that a container's first process has ended and was reaped by its shim.
func gone(pid int) bool { return syscall.Kill(pid, 0) == syscall.ESRCH }

// TestExitCodesSurvive ends containers in every way while the daemon, containerd or both are dead, and wants to
// see the right codes when they are back, and the other containers untouched.
func TestExitCodesSurvive(t *testing.T) {
	faults := map[string]func(t *testing.T, c *cri.Containerd, cfg cri.Config, killDaemon func(), daemonPid, ctrd int) (back func()){
		"daemon": func(t *testing.T, c *cri.Containerd, cfg cri.Config, killDaemon func(), _, _ int) func() {
			killDaemon()
			return func() { daemon(t, cfg) }
		},
		"containerd": func(t *testing.T, c *cri.Containerd, cfg cri.Config, _ func(), daemonPid, ctrd int) func() {
			// The daemon would have it back within 0.2 s: stop it that long.
			if err := syscall.Kill(daemonPid, syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			kill9(t, ctrd)
			return func() {
				if err := syscall.Kill(daemonPid, syscall.SIGCONT); err != nil {
					t.Fatal(err)
				}
			}
		},
		"both": func(t *testing.T, c *cri.Containerd, cfg cri.Config, killDaemon func(), _, ctrd int) func() {
			killDaemon()
			kill9(t, ctrd)
			return func() { daemon(t, cfg) }
		},
	}
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			cfg := newConfig(t)
			c, stop := start(t, cfg) // makes things ready and cleans up; a process of its own is the daemon
			ready(t, c)
			importWork(t, c)
			ctrd := pidOf(t, c)
			stop()
			killDaemon, daemonPid := daemonProcess(t, cfg)
			rt := dial(t, c)

			type want struct {
				pod    *pod
				code   int32
				reason string
				pid    int
			}
			add := func(code int32, reason, name, mode string, args ...string) want {
				p := runPod(t, rt, cfg, name, mode, args...)
				return want{p, code, reason, p.initPid(t, rt)}
			}
			earlier := add(3, "Error", "earlier", "exit", "3")
			stays := add(0, "", "stays", "exit", "0")
			cases := []want{
				add(0, "Completed", "zero", "exit", "0"),
				add(7, "Error", "seven", "exit", "7"),
				add(137, "Error", "killed", "exit", "0"),
				add(137, "OOMKilled", "oom", "eat"),
			}
			earlier.pod.fire(t)
			waitFor(t, "the first container to end", func() bool {
				return earlier.pod.status(t, rt).State == runtimeapi.ContainerState_CONTAINER_EXITED
			})

			back := fault(t, c, cfg, killDaemon, daemonPid, ctrd)
			began := time.Now()
			for i, w := range cases {
				if i == 2 {
					kill9(t, w.pid)
				} else {
					w.pod.fire(t)
				}
			}
			for _, w := range cases {
				waitFor(t, "a container to end", func() bool { return gone(w.pid) })
			}
			ended := time.Now().Add(time.Second) // the shim looks at the clock a little after it has reaped a process
			back()
			rt = redial(t, c)
			for _, w := range append(cases, earlier) {
				waitFor(t, w.pod.cfg.Metadata.Name+" to be seen as ended", func() bool {
					return w.pod.status(t, rt).State == runtimeapi.ContainerState_CONTAINER_EXITED
				})
				st := w.pod.status(t, rt)
				if st.ExitCode != w.code || st.Reason != w.reason {
					t.Errorf("%s: exit code %d, reason %s; want %d, %s", w.pod.cfg.Metadata.Name, st.ExitCode, st.Reason, w.code, w.reason)
				}
				at := time.Unix(0, st.FinishedAt)
				if w.pod != earlier.pod && (at.Before(began) || at.After(ended)) {
					t.Errorf("%s: ended at %v, was between %v and %v", w.pod.cfg.Metadata.Name, at, began, ended)
				}
			}
			if st := stays.pod.status(t, rt); st.State != runtimeapi.ContainerState_CONTAINER_RUNNING || stays.pod.initPid(t, rt) != stays.pid || gone(stays.pid) {
				t.Errorf("the other container was touched: %v", st)
			}
			// The first layer alone: containerd itself knows the codes, so other CRI clients do as well.
			raw, err := cri.Dial(t.Context(), cri.DialConfig{Endpoint: c.Endpoint()})
			if err != nil {
				t.Fatal(err)
			}
			defer raw.Close(t.Context())
			for _, w := range cases {
				if st := w.pod.status(t, raw); st.ExitCode != w.code {
					t.Errorf("%s: containerd itself says exit code %d (%s), want %d", w.pod.cfg.Metadata.Name, st.ExitCode, st.Reason, w.code)
				}
			}
			for _, w := range append(cases, earlier, stays) {
				w.pod.remove(t, rt)
			}
			if es, err := os.ReadDir(c.ExitDir()); err != nil || len(es) != 0 {
				t.Errorf("records left after all containers were removed: %v, %v", es, err)
			}
		})
	}
}

// redial waits until containerd is back.
func redial(t *testing.T, c *cri.Containerd) *cri.Runtime {
	t.Helper()
	var rt *cri.Runtime
	waitFor(t, "containerd to be back", func() bool {
		var err error
		rt, err = cri.Dial(t.Context(), cri.DialConfig{Endpoint: c.Endpoint(), ExitDir: c.ExitDir()})
		return err == nil
	})
	t.Cleanup(func() { rt.Close(t.Context()) })
	return rt
}

// TestExitCodeTakenButNotWritten kills containerd after it took the finished task from the shim and before it wrote down what
// that had said. No other process knows the code then; the record does.
func TestExitCodeTakenButNotWritten(t *testing.T) {
	cfg := newConfig(t)
	c, _ := start(t, cfg)
	ready(t, c)
	importWork(t, c)
	rt := dial(t, c)
	p := runPod(t, rt, cfg, "a", "exit", "42")
	pid := p.initPid(t, rt)
	ctrd := pidOf(t, c)
	if err := syscall.Kill(ctrd, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	p.fire(t)
	waitFor(t, "the container to end", func() bool { return gone(pid) })
	// In place of containerd.
	conn := shimConn(t, cfg, p.sandbox)
	cl := ttrpc.NewClient(conn)
	defer cl.Close()
	shim := task.NewTTRPCTaskClient(cl)
	var res *task.DeleteResponse
	waitFor(t, "the shim to give the task away", func() bool {
		var err error
		res, err = shim.Delete(t.Context(), &task.DeleteRequest{ID: p.id})
		return err == nil
	})
	if res.ExitStatus != 42 {
		t.Fatalf("shim says %d", res.ExitStatus)
	}
	kill9(t, ctrd)
	waitFor(t, "another containerd", func() bool { st, _ := c.State(); return st.Ready && st.Pid != ctrd })

	raw, err := cri.Dial(t.Context(), cri.DialConfig{Endpoint: c.Endpoint()})
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close(t.Context())
	if st := p.status(t, raw); st.ExitCode != 255 {
		t.Errorf("containerd says %d; this test means to make it forget", st.ExitCode)
	}
	rt = redial(t, c)
	if st := p.status(t, rt); st.ExitCode != 42 || st.Reason != "Error" || st.State != runtimeapi.ContainerState_CONTAINER_EXITED {
		t.Errorf("status %v, want exit code 42", st)
	}
	p.remove(t, rt)
}

// TestKilledAtAnyMoment kills containerd at random moments around the end of a container.
func TestKilledAtAnyMoment(t *testing.T) {
	cfg := newConfig(t)
	cfg.RestartMax = 50 * time.Millisecond
	c, _ := start(t, cfg)
	ready(t, c)
	importWork(t, c)
	const rounds = 25
	for i := range rounds {
		code := int32(i % 5)
		rt := redial(t, c)
		p := runPod(t, rt, cfg, "r"+strconv.Itoa(i), "exit", strconv.Itoa(int(code)))
		ctrd := pidOf(t, c)
		p.fire(t)
		time.Sleep(time.Duration(i) * 4 * time.Millisecond) // the moments are the input of this test
		kill9(t, ctrd)
		waitFor(t, "another containerd", func() bool { st, _ := c.State(); return st.Ready && st.Pid != ctrd })
		rt = redial(t, c)
		waitFor(t, "the end to be seen", func() bool { return p.status(t, rt).State == runtimeapi.ContainerState_CONTAINER_EXITED })
		if st := p.status(t, rt); st.ExitCode != code {
			t.Errorf("killed %d ms after: exit code %d (%s), want %d", 4*i, st.ExitCode, st.Reason, code)
		}
		p.remove(t, rt)
	}
}
