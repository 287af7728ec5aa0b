package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/util/connrotation"

	"skein.io/skein/node/client"
	"skein.io/skein/test/cluster"
)

// world is the cluster that the tests share.
type world struct {
	lab   *cluster.Cluster
	token string
	admin *rest.Config // an administrator's, without an address
	// deployed tells whether webYAML was applied.
	deployed bool

	mu    sync.Mutex // guards the rest
	conns map[string]*connrotation.Dialer
	kubes map[string]*kubernetes.Clientset
}

func skein() string { return filepath.Join(bin, "skein") }

// eventually tries f until it has no complaint; its last one fails the test.
func eventually(t testing.TB, within time.Duration, what string, f func() error) time.Duration {
	t.Helper()
	began := time.Now()
	for {
		err := f()
		if err == nil {
			return time.Since(began)
		}
		if time.Since(began) > within {
			t.Fatalf("%s: not within %s: %v", what, within, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func get[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		must(t, err)
		return v
	}
}

func (w *world) node(name string) *cluster.Node {
	if n := w.lab.Node(name); n != nil {
		return n
	}
	panic("no node " + name)
}

func (w *world) control(node string) *client.Client {
	return client.Unix(client.SocketPath(w.node(node).StateDir()))
}

// timeout is for operations that should be short.
func timeout(d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), d)
}

// on gives a client of one node's API, as a user outside of the cluster has it.
func (w *world) on(node string) *kubernetes.Clientset {
	w.mu.Lock()
	defer w.mu.Unlock()
	if k := w.kubes[node]; k != nil {
		return k
	}
	cfg := w.configFor(node, w.lab.DialContext)
	k, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		panic(err)
	}
	w.kubes[node] = k
	return k
}

// configFor makes an administrator's configuration for one node. The caller has the lock.
func (w *world) configFor(node string, dial func(context.Context, string, string) (net.Conn, error)) *rest.Config {
	cfg := rest.CopyConfig(w.admin)
	cfg.Host = fmt.Sprintf("https://%s:6443", w.node(node).IP())
	d := connrotation.NewDialer(dial)
	w.conns[node] = d
	cfg.Dial = d.DialContext
	cfg.QPS, cfg.Timeout = -1, 5*time.Second
	// A test that waits for something must not find it in what a cut-off node remembers.
	cfg.Wrap(func(rt http.RoundTripper) http.RoundTripper { return present{rt} })
	return cfg
}

// present asks for the present.
type present struct{ http.RoundTripper }

func (p present) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set(client.MaxAgeHeader, "0")
	return p.RoundTripper.RoundTrip(r)
}

// hangUp forgets connections to a node that will never answer on them.
func (w *world) hangUp(node string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if d := w.conns[node]; d != nil {
		d.CloseAll()
	}
}

// fetchAdmin gets the credentials from a node.
func (w *world) fetchAdmin(t testing.TB, node string) {
	t.Helper()
	ctx, cancel := timeout(10 * time.Second)
	defer cancel()
	raw := get(w.control(node).Kubeconfig(ctx, ""))(t)
	w.admin = get(clientcmd.RESTConfigFromKubeConfig(raw))(t)
}

// cli runs skein inside a node, as its administrator types it.
func (w *world) cli(node string, args ...string) (string, error) {
	return w.cliIn(node, "", args...)
}

// cliIn is cli with something on standard input.
func (w *world) cliIn(node, stdin string, args ...string) (string, error) {
	ctx, cancel := timeout(2 * time.Minute)
	defer cancel()
	return w.runIn(ctx, node, stdin, append([]string{skein()}, args...)...)
}

func (w *world) runIn(ctx context.Context, node, stdin string, argv ...string) (string, error) {
	cmd, err := w.node(node).Command(ctx, argv...)
	if err != nil {
		return "", err
	}
	if stdin != "" {
		cmd.Stdin = strings.NewReader(stdin)
	}
	if path := w.kubeconfig(node); exists(path) {
		cmd.Env = append(cmd.Env, "KUBECONFIG="+path)
	}
	var out, msg bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &msg
	if err := cmd.Run(); err != nil {
		return out.String(), &cliError{err, strings.TrimSpace(msg.String()), strings.Join(argv, " ")}
	}
	return out.String(), nil
}

// kubeconfig is where a node's own administrator's credentials are, if it needs some: a node without a replica cannot issue them.
func (w *world) kubeconfig(node string) string {
	return filepath.Join(w.lab.Dir(), node+".kubeconfig")
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// cliError is a command that failed.
type cliError struct {
	err     error
	message string // on standard error
	command string
}

func (e *cliError) Error() string { return fmt.Sprintf("%s: %v: %s", e.command, e.err, e.message) }
func (e *cliError) Unwrap() error { return e.err }

// refused checks that a command failed with a message that has all the words, and gives it.
func refused(t testing.TB, err error, words ...string) string {
	t.Helper()
	var e *cliError
	if !errors.As(err, &e) {
		t.Fatalf("no refusal with %q: %v", words, err)
	}
	var code *exec.ExitError
	if !errors.As(e.err, &code) || code.ExitCode() <= 0 {
		t.Errorf("%s: ended with %v, not with an exit code", e.command, e.err)
	}
	for _, x := range words {
		if !strings.Contains(e.message, x) {
			t.Errorf("%s: the message %q does not say %q", e.command, e.message, x)
		}
	}
	return e.message
}

// do runs skein in a node and gives what it says.
func (w *world) do(t testing.TB, node string, args ...string) string {
	t.Helper()
	out, err := w.cli(node, args...)
	must(t, err)
	return out
}

// apply sends manifests through `skein apply -f -` on a node.
func (w *world) apply(t testing.TB, node, yaml string) {
	t.Helper()
	if out, err := w.cliIn(node, yaml, "apply", "-f", "-"); err != nil {
		t.Fatalf("%s\n%v", out, err)
	}
}

// start starts a node's daemon: the founder's when via is nobody.
func (w *world) start(t testing.TB, node, via string, flags ...string) {
	t.Helper()
	argv := []string{skein(), "up"}
	if via != "" {
		argv = []string{skein(), "join", w.node(via).IP().String(), "--token", w.token}
	}
	must(t, w.node(node).Start(context.Background(), nil, append(argv, flags...)...))
}

// awaitReady waits until a node is Ready in the eyes of another, and has the images.
func (w *world) awaitReady(t testing.TB, node, asks string, within time.Duration) time.Duration {
	t.Helper()
	return eventually(t, within, "node "+node+" is Ready", func() error { return w.nodeReady(node, asks, true) })
}

func (w *world) nodeReady(node, asks string, want bool) error {
	ctx, cancel := timeout(3 * time.Second)
	defer cancel()
	n, err := w.on(asks).CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
	if err != nil {
		return err
	}
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady && (c.Status == corev1.ConditionTrue) == want {
			return nil
		}
	}
	return fmt.Errorf("conditions %v", n.Status.Conditions)
}

// loadImages gives a node the test images.
func (w *world) loadImages(t testing.TB, node string) {
	t.Helper()
	w.do(t, node, "images", "import", archives.Web, archives.Tools)
}

// leader is who leads, as a node knows it.
func (w *world) leader(node string) (string, error) {
	ctx, cancel := timeout(3 * time.Second)
	defer cancel()
	s, err := w.control(node).Status(ctx)
	if err != nil {
		return "", err
	}
	for _, x := range s.Shards {
		if x.Name == "system" && x.Leader != "" {
			return x.Leader, nil
		}
	}
	return "", fmt.Errorf("node %s knows no leader: %+v", node, s.Shards)
}

// voters are those of the store, as a node knows it.
func (w *world) voters(node string) ([]string, error) {
	ctx, cancel := timeout(3 * time.Second)
	defer cancel()
	s, err := w.control(node).Status(ctx)
	if err != nil {
		return nil, err
	}
	for _, x := range s.Shards {
		if x.Name == "system" {
			return x.Voters, nil
		}
	}
	return nil, fmt.Errorf("node %s knows no shard", node)
}

// others are the running nodes that are not among those named.
func (w *world) others(not ...string) (out []string) {
next:
	for _, n := range w.lab.Nodes() {
		for _, x := range not {
			if x == n.Name() {
				continue next
			}
		}
		if n.Running() {
			out = append(out, n.Name())
		}
	}
	return out
}

// prober sends requests from a node.
type prober struct {
	cmd  *exec.Cmd
	done chan struct{}

	mu    sync.Mutex // guards shots
	shots []shot
}

// probe starts requests from inside a node, a new one every interval.
func (w *world) probe(t testing.TB, node, url string, interval time.Duration) *prober {
	t.Helper()
	cmd := get(w.node(node).Command(context.Background(), os.Args[0], url, interval.String(), "1s"))(t)
	cmd.Env = append(cmd.Env, roleEnv+"=probe")
	out := get(cmd.StdoutPipe())(t)
	must(t, cmd.Start())
	p := &prober{cmd: cmd, done: make(chan struct{})}
	go func() { // ends with the process, for which stop waits
		defer close(p.done)
		for sc := bufio.NewScanner(out); sc.Scan(); {
			var s shot
			if json.Unmarshal(sc.Bytes(), &s) == nil {
				p.mu.Lock()
				p.shots = append(p.shots, s)
				p.mu.Unlock()
			}
		}
	}()
	t.Cleanup(func() { p.stop() })
	return p
}

// all gives the requests so far.
func (p *prober) all() []shot {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.shots[:len(p.shots):len(p.shots)]
}

// stop ends the requests and gives them.
func (p *prober) stop() []shot {
	_ = p.cmd.Process.Signal(os.Interrupt)
	<-p.done
	_ = p.cmd.Wait()
	return p.all()
}

// failed are the requests that were not answered.
func failed(shots []shot) (out []shot) {
	for _, s := range shots {
		if s.Err != "" {
			out = append(out, s)
		}
	}
	return out
}

// healed is how long after a moment the last failed request ended; 0 if none failed.
func healed(shots []shot, since time.Time) time.Duration {
	var last time.Duration
	for _, s := range failed(shots) {
		if end := s.At.Add(s.Took); end.After(since) {
			last = end.Sub(since)
		}
	}
	return last
}

// fetch gets a URL from inside a node, once.
func (w *world) fetch(node, url string) (string, error) {
	ctx, cancel := timeout(10 * time.Second)
	defer cancel()
	cmd, err := w.node(node).Command(ctx, os.Args[0], url, "1h", "3s")
	if err != nil {
		return "", err
	}
	cmd.Env = append(cmd.Env, roleEnv+"=probe")
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := cmd.Start(); err != nil {
		return "", err
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	var s shot
	if err := json.NewDecoder(out).Decode(&s); err != nil {
		return "", err
	}
	if s.Err != "" {
		return s.Body, errors.New(s.Err)
	}
	return s.Body, nil
}

// podsReady checks that there are n pods with a label in the namespace default, all Ready; it gives them. Those that are being deleted do
// not count: on a node that is dead nobody can confirm that they ended.
func (w *world) podsReady(asks, selector string, n int) ([]corev1.Pod, error) {
	ctx, cancel := timeout(3 * time.Second)
	defer cancel()
	l, err := w.on(asks).CoreV1().Pods("default").List(ctx, metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		return nil, err
	}
	ready := 0
	var pods []corev1.Pod
	var state []string
	for i := range l.Items {
		p := &l.Items[i]
		if p.DeletionTimestamp == nil {
			pods = append(pods, *p)
		}
		if podReady(p) && p.DeletionTimestamp == nil {
			ready++
		}
		state = append(state, fmt.Sprintf("%s on %s %s ready=%v deleting=%v %s", p.Name, p.Spec.NodeName, p.Status.Phase, podReady(p), p.DeletionTimestamp != nil, p.Status.Reason))
	}
	if ready != n || len(pods) != n {
		return nil, fmt.Errorf("%d of %d pods are Ready, want %d:\n%s", ready, len(pods), n, strings.Join(state, "\n"))
	}
	return pods, nil
}

func podReady(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// awaitPods waits for podsReady.
func (w *world) awaitPods(t testing.TB, asks, selector string, n int, within time.Duration) (pods []corev1.Pod, took time.Duration) {
	t.Helper()
	took = eventually(t, within, fmt.Sprintf("%d pods %s", n, selector), func() (err error) {
		pods, err = w.podsReady(asks, selector, n)
		return err
	})
	return pods, took
}

// dump shows what a person would look at first.
func (w *world) dump(t testing.TB) {
	for _, n := range w.lab.Nodes() {
		if !n.Running() {
			t.Logf("node %s: its daemon does not run", n.Name())
		} else if ctx, cancel := timeout(5 * time.Second); true {
			for _, args := range [][]string{{"status"}, {"members"}} {
				out, err := w.runIn(ctx, n.Name(), "", append([]string{skein()}, args...)...)
				t.Logf("skein %s on %s: %v\n%s", args[0], n.Name(), err, out)
			}
			cancel()
		}
		b, _ := os.ReadFile(n.LogFile())
		t.Logf("end of the log of %s:\n%s", n.Name(), b[max(0, len(b)-6<<10):])
	}
	if rest := w.others(); len(rest) > 0 {
		ctx, cancel := timeout(10 * time.Second)
		defer cancel()
		for _, args := range [][]string{{"get", "pods", "-A", "-o", "wide"}, {"get", "events", "-A"}} {
			out, err := w.runIn(ctx, rest[0], "", append([]string{skein()}, args...)...)
			t.Logf("skein %s: %v\n%s", strings.Join(args, " "), err, out[max(0, len(out)-8<<10):])
		}
	}
}

// gone checks that there is no such Node object.
func (w *world) gone(asks, node string) error {
	ctx, cancel := timeout(3 * time.Second)
	defer cancel()
	_, err := w.on(asks).CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
	if err == nil {
		return fmt.Errorf("the Node object %s is still there", node)
	}
	if !apierrors.IsNotFound(err) {
		return err
	}
	return nil
}
