package e2e

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/connrotation"

	"skein.io/skein/test/cluster"
)

// TestCorners tries what surrounds a node: full disks, machines that lack something, a runtime of somebody else. Each node is a
// cluster of its own.
func TestCorners(t *testing.T) {
	w := &world{
		lab:   cluster.ForTest(t, 3, cluster.Config{}),
		conns: map[string]*connrotation.Dialer{}, kubes: map[string]*kubernetes.Clientset{},
	}
	for _, n := range w.lab.Nodes() { // switch them on
		must(t, n.Start(background, nil, "true"))
		eventually(t, 5*time.Second, "the command ends", func() error {
			if n.Running() {
				return fmt.Errorf("%s runs", n.Name())
			}
			return nil
		})
	}
	t.Run("missing", w.missing)
	t.Run("full disk", w.fullDisk)
	t.Run("foreign runtime", w.foreignRuntime)
}

// missing starts nodes on machines that lack something: each says what, ends, and leaves nothing.
func (w *world) missing(t *testing.T) {
	const node = "n1"
	n := w.node(node)
	lone := filepath.Join(n.Dir(), "lone") // a skein without its helper beside it
	must(t, os.Mkdir(lone, 0o755))
	b := get(os.ReadFile(skein()))(t)
	must(t, os.WriteFile(filepath.Join(lone, "skein"), b, 0o755))
	for _, c := range []struct {
		name  string
		argv  []string // $0 is skein
		words []string
	}{
		{"cgroup v2", []string{"unshare", "-m", "sh", "-c", `for m in $(awk '$3=="cgroup2"{print $2}' /proc/mounts); do umount -l $m; done; exec "$0" up`, skein()}, []string{"cgroup v2", "mount -t cgroup2"}},
		{"runc", []string{"unshare", "-m", "sh", "-c", `for r in $(which -a runc) /usr/sbin/runc /usr/bin/runc; do [ -e $r ] && mount --bind /dev/null $r; done; exec "$0" up`, skein()}, []string{"apt-get install runc"}},
		{"helper", []string{filepath.Join(lone, "skein"), "up"}, []string{"skein-helper", "beside skein"}},
		{"runtime", []string{skein(), "up", "--cri-endpoint", "unix:///nowhere.sock"}, []string{"/nowhere.sock", "start it"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := timeout(20 * time.Second)
			defer cancel()
			_, err := w.runIn(ctx, node, "", c.argv...)
			t.Log(refused(t, err, c.words...))
			if left := get(os.ReadDir(n.StateDir()))(t); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
	t.Run("port of the loopback", func(t *testing.T) {
		cmd := get(n.Command(background, os.Args[0], "127.0.0.1:6443"))(t)
		cmd.Env = append(cmd.Env, roleEnv+"=listen")
		out := get(cmd.StdoutPipe())(t)
		must(t, cmd.Start())
		defer func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}()
		get(bufio.NewReader(out).ReadString('\n'))(t)
		refused(t, errOf(w.cli(node, "up")), "6443", "127.0.0.1", "taken")
		if left := get(os.ReadDir(n.StateDir()))(t); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})
}

// fullDisk fills the disk under a node: first it takes no more objects, then it ends; with room again nothing is lost.
func (w *world) fullDisk(t *testing.T) {
	const node = "n2"
	n := w.node(node)
	dir := n.StateDir()
	// In the node's own mount namespace, so it goes with the node.
	get(n.Exec(background, "mount", "-t", "tmpfs", "-o", "size=100m", "disk", dir))(t)
	fill := func(leave int) {
		t.Helper()
		get(n.Exec(background, "sh", "-c", `free=$(df -k "$1" | awk 'END{print $4}'); head -c $(( (free - $2*1024) * 1024 )) /dev/zero >> "$1/fill"`, "sh", dir, fmt.Sprint(leave)))(t)
	}
	empty := func() { t.Helper(); get(n.Exec(background, "rm", filepath.Join(dir, "fill")))(t) }
	object := func(name string) error {
		_, err := w.cliIn(node, "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: "+name+"}\n", "apply", "-f", "-")
		return err
	}
	answers := func() {
		t.Helper()
		eventually(t, 30*time.Second, "the API answers", func() error {
			_, err := w.cli(node, "get", "nodes", "--no-headers", "--max-age=0s") // not from what it knew before
			return err
		})
	}
	must(t, n.Start(background, nil, skein(), "up"))
	answers()
	must(t, object("before"))

	fill(20) // the log may take some MB more by itself
	eventually(t, 10*time.Second, "the store refuses objects", func() error {
		err := object("while-full")
		if err == nil {
			_, _ = w.cli(node, "delete", "configmap", "while-full")
			return fmt.Errorf("it takes one")
		}
		t.Log(refused(t, err, "disk is full"))
		return nil
	})
	must(t, errOf(w.cli(node, "delete", "configmap", "before")))
	empty()
	eventually(t, 10*time.Second, "the store takes objects again", func() error { return object("after") })

	fill(5)
	ctx, cancel := timeout(20 * time.Second)
	defer cancel()
	must(t, n.Wait(ctx))
	if b := string(get(os.ReadFile(n.LogFile()))(t)); strings.Contains(b, "panic") || !strings.Contains(b, "free some space and start it again") {
		t.Errorf("the daemon ended without a clear word:\n%s", b[max(0, len(b)-2<<10):])
	}
	t.Log(refused(t, errOf(w.cli(node, "up")), "disk is full", dir))
	empty()
	must(t, n.Start(background, nil))
	answers()
	must(t, errOf(w.cli(node, "get", "configmap", "after")))
	refused(t, errOf(w.cli(node, "get", "configmap", "before")), "not found")
	must(t, n.Kill(background))
}

// foreignRuntime runs a node's pods in a containerd that is not the node's, and looks at what systemd would be told meanwhile.
func (w *world) foreignRuntime(t *testing.T) {
	const node = "n3"
	n := w.node(node)
	dir := get(os.MkdirTemp("", "skein-cri-"))(t) // short, for sockets
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	must(t, os.Mkdir(filepath.Join(dir, "path"), 0o755))
	must(t, os.Symlink(filepath.Join(bin, "skein-helper"), filepath.Join(dir, "path", "containerd-shim-runc-v2")))
	config := filepath.Join(dir, "config.toml")
	must(t, os.WriteFile(config, []byte(strings.ReplaceAll(foreignConfig, "DIR", dir)), 0o600))
	start := func() func() {
		t.Helper()
		cmd := get(n.Command(background, skein(), "containerd", "-config", config, "-lock", filepath.Join(dir, "lock")))(t)
		cmd.Env = append(cmd.Env, "PATH="+filepath.Join(dir, "path")+":"+os.Getenv("PATH"))
		log := get(os.Create(filepath.Join(dir, "log")))(t)
		cmd.Stderr = log
		must(t, cmd.Start())
		log.Close()
		return func() {
			_ = cmd.Process.Signal(syscall.SIGTERM)
			_ = cmd.Wait()
		}
	}
	stop := start()
	defer func() { stop() }()
	endpoint := "unix://" + filepath.Join(dir, "c.sock")
	eventually(t, 20*time.Second, "containerd serves", func() error {
		return errOf(w.cli(node, "images", "import", "--cri-endpoint", endpoint, archives.Web))
	})

	notify := get(net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"}))(t)
	defer notify.Close()
	env := []string{"NOTIFY_SOCKET=" + filepath.Join(dir, "notify")}
	told := func(within time.Duration) (string, error) {
		must(t, notify.SetReadDeadline(time.Now().Add(within)))
		b := make([]byte, 1024)
		k, err := notify.Read(b)
		return string(b[:k]), err
	}
	must(t, n.Start(background, env, skein(), "up", "--cri-endpoint", endpoint))
	if s := get(told(30 * time.Second))(t); s != "READY=1" {
		t.Errorf("systemd is told %q first", s)
	}
	w.fetchAdmin(t, node)
	must(t, w.nodeReady(node, node, true))
	w.apply(t, node, `apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec: {containers: [{name: c, image: skein.local/web:1, imagePullPolicy: IfNotPresent}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {clusterIP: 10.96.7.7, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
`)
	w.awaitPods(t, node, "app=web", 1, 30*time.Second)
	eventually(t, 5*time.Second, "the Service answers", func() error { return errOf(w.fetch(node, "http://10.96.7.7/")) })
	if to := get(os.Readlink(filepath.Join(dir, "bin", "skein-helper")))(t); to != filepath.Join(bin, "skein-helper") {
		t.Errorf("the plugin leads to %s", to)
	}

	// A node that starts before its runtime waits, says so, and is not ready until it has it.
	must(t, n.Stop(background))
	stop()
	must(t, n.Start(background, env))
	w.hangUp(node)
	eventually(t, 20*time.Second, "the node is not Ready", func() error { return w.nodeReady(node, node, false) })
	if s, err := told(10 * time.Millisecond); err == nil {
		t.Errorf("systemd is told %q by a node without a runtime", s)
	}
	if err := errOf(w.fetch(node, "http://10.96.7.7/")); err != nil {
		t.Errorf("the pod does not go on: %v", err)
	}
	stop = start()
	if s := get(told(30 * time.Second))(t); s != "READY=1" {
		t.Errorf("systemd is told %q", s)
	}
	eventually(t, 20*time.Second, "the node is Ready", func() error { return w.nodeReady(node, node, true) })
	must(t, w.on(node).CoreV1().Pods("default").Delete(background, "web", metav1.DeleteOptions{}))
	eventually(t, 20*time.Second, "the pod goes", func() error { return w.noPod(node, "web") })
	must(t, n.Stop(background))
}

const foreignConfig = `version = 3
root = "DIR/root"
state = "DIR/st"
imports = []
disabled_plugins = ["io.containerd.nri.v1.nri", "io.containerd.internal.v1.opt"]
[grpc]
address = "DIR/c.sock"
[ttrpc]
address = "DIR/c.sock.ttrpc"
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "skein.local/pause:1"
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["DIR/bin"]
conf_dir = "DIR/net.d"
use_internal_loopback = true
`
