package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"skein.io/skein/node/client"
	"skein.io/skein/test/cluster"
)

// The load during the fault, and before it as a comparison: so many requests a second, each over a connection of its own.
const (
	rate    = 50
	timeout = time.Second
	// sampleSize is how many requests are sent each way to see how they spread.
	sampleSize = 300
	// sampleRate is how fast.
	sampleRate = 300
	// writeRate and writeTimeout are those of the writes through the API during the fault.
	writeRate    = 20
	writeTimeout = 5 * time.Second
)

func ownAddrs() ([]netip.Addr, error) {
	as, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	var out []netip.Addr
	for _, a := range as {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			out = append(out, p.Addr().Unmap())
		}
	}
	return out, nil
}

// request shows the three ways to the pods.
func (d *demo) request(ctx context.Context) error {
	d.r.step("3. Requests, each over a new connection, and how many each pod answered")
	svc, err := d.nodes[0].kube.CoreV1().Services("default").Get(ctx, "web", metav1.GetOptions{})
	if err != nil {
		return err
	}
	clusterIP := "http://" + svc.Spec.ClusterIP + "/"
	d.fig.Requests = map[string]requests{}
	inside, err := startIn(ctx, d.nodes[0].Node, sampleRate, timeout, clusterIP)
	if err := d.sample(ctx, "ClusterIP, from node n1", "clusterIP", inside, err); err != nil {
		return err
	}
	outside := startHere(ctx, sampleRate, timeout, fetch(d.nodePortURL(d.nodes[1])))
	if err := d.sample(ctx, "NodePort of n2, from outside", "nodePort", outside, nil); err != nil {
		return err
	}
	return d.requestFromPod(ctx)
}

func (d *demo) nodePortURL(n *machine) string {
	return fmt.Sprintf("http://%s/", netip.AddrPortFrom(n.IP(), nodePort))
}

// sample lets a load run for sampleSize requests and tells what became of them. All pods must have answered, and nearly all requests
// been answered.
func (d *demo) sample(ctx context.Context, title, key string, l *load, err error) error {
	if err != nil {
		return err
	}
	perr := poll(ctx, title, 30*time.Second, func(context.Context) (bool, error) { return len(l.all()) >= sampleSize, nil })
	if err := errors.Join(perr, l.stop()); err != nil {
		return err
	}
	return d.tell(title, key, l.all())
}

func (d *demo) tell(title, key string, s []sample) error {
	q := requests{Sent: len(s), Failed: failed(s)}
	q.P50, q.P99 = latency(s)
	pods := map[string]bool{}
	for _, x := range s {
		if x.Err == "" {
			pods[x.Pod] = true
		}
	}
	q.Pods = len(pods)
	d.fig.Requests[key] = q
	took := ""
	if q.P50 > 0 {
		took = fmt.Sprintf("median %.1f ms, p99 %.1f; ", q.P50, q.P99)
	}
	d.r.say("%-29s %d sent, %d failed; %s%s", title, q.Sent, q.Failed, took, spread(s))
	// A machine that is short of CPU may miss a time-out or two; that is no fault of the Service.
	if q.Failed*100 > q.Sent || q.Pods < 6 {
		return fmt.Errorf("%s: %d of %d requests failed, %d of 6 pods answered: %v", title, q.Failed, q.Sent, q.Pods, judge(s, 0).Causes)
	}
	return nil
}

// requestFromPod runs the client inside a pod, with "skein exec", by the Service's DNS name.
func (d *demo) requestFromPod(ctx context.Context) error {
	pods, err := d.awaitPods(ctx, d.nodes[2], 6, "", 10*time.Second)
	if err != nil {
		return err
	}
	p := pods[0]
	const count = 120
	out, err := d.cli(ctx, nil, "exec", "--kubeconfig", d.file("kubeconfig"), p.Name, "--", "/app", "get", "http://web.default.svc.cluster.local/", fmt.Sprint(count))
	if err != nil {
		return err
	}
	var s []sample
	for line := range strings.Lines(out) {
		x := sample{}
		if x.Pod, x.Node = who(line); x.Pod == "" {
			x.Err = strings.TrimSpace(line)
		}
		s = append(s, x)
	}
	return d.tell("DNS name, in a pod on "+p.Spec.NodeName, "pod", s)
}

// trial is what goes on while the leader dies.
type trial struct {
	victim, a, b *machine // a: ClusterIP load from inside, b: NodePort and API from outside
	ip, port     *load    // requests
	writes       *load
	cut          time.Duration // mono: when the power was cut
	dead         time.Duration // mono: when the leader's process was gone
}

// kill cuts the power of the leader under load.
func (d *demo) kill(ctx context.Context) error {
	t, err := d.chooseVictim(ctx)
	if err != nil {
		return err
	}
	v := t.victim.Name()
	d.fig.Kill.Node = v
	d.r.step(fmt.Sprintf("4. Power cut of %s, the leader: every process dies at once, its network is gone", v))
	if err := d.startTrial(ctx, t); err != nil {
		return err
	}
	defer func() { // after a failure; a second stop does nothing
		_ = t.stop()
	}()
	// The load must run well before it can show anything.
	err = poll(ctx, "load without failures", 30*time.Second, func(context.Context) (bool, error) {
		for _, l := range []*load{t.ip, t.port, t.writes} {
			if s := l.all(); len(s) < rate/2 || failed(s[len(s)-rate/2:]) > 0 {
				return false, fmt.Errorf("%d attempts so far, %d failed: %v", len(s), failed(s), judge(s, 0).Causes)
			}
		}
		return true, nil
	})
	if err != nil {
		return err
	}
	d.r.say("under way: %d requests/s (time-out %s) to the ClusterIP in %s and to the NodePort of %s, %d writes/s at %s", rate, timeout, t.a.Name(), t.b.Name(), writeRate, t.b.Name())
	if err := d.cutPower(ctx, t); err != nil {
		return err
	}
	if err := d.watchRecovery(ctx, t); err != nil {
		return err
	}
	return d.tellOutage(t)
}

func (d *demo) chooseVictim(ctx context.Context) (*trial, error) {
	st, err := d.nodes[0].ctl.Status(ctx)
	if err != nil {
		return nil, err
	}
	if len(st.Shards) == 0 || st.Shards[0].Leader == "" {
		return nil, errors.New("the store has no leader")
	}
	t := &trial{}
	for _, n := range d.nodes {
		switch {
		case n.Name() == st.Shards[0].Leader:
			t.victim = n
		case t.a == nil:
			t.a = n
		default:
			t.b = n
		}
	}
	if t.victim == nil {
		return nil, fmt.Errorf("the leader %q is none of the nodes", st.Shards[0].Leader)
	}
	return t, nil
}

func (d *demo) startTrial(ctx context.Context, t *trial) error {
	svc, err := t.b.kube.CoreV1().Services("default").Get(ctx, "web", metav1.GetOptions{})
	if err != nil {
		return err
	}
	if t.ip, err = startIn(ctx, t.a.Node, rate, timeout, "http://"+svc.Spec.ClusterIP+"/"); err != nil {
		return err
	}
	t.port = startHere(ctx, rate, timeout, fetch(d.nodePortURL(t.b)))
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: writesNamespace}}
	if _, err := t.b.kube.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil {
		return err
	}
	t.writes = startHere(ctx, writeRate, writeTimeout, writer(t.b.kube))
	return nil
}

// writesNamespace holds what is written during the fault; it is deleted after that.
const writesNamespace = "demo-writes"

// writer makes small objects, so that a write is one that the store has to agree on.
func writer(kube *kubernetes.Clientset) func(context.Context) (string, string, error) {
	return func(ctx context.Context) (string, string, error) {
		_, err := kube.CoreV1().ConfigMaps(writesNamespace).Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{GenerateName: "w-"}}, metav1.CreateOptions{})
		return "", "", err
	}
}

func (t *trial) stop() error {
	var errs []error
	for _, l := range []**load{&t.ip, &t.port, &t.writes} {
		if *l != nil && (*l).stop != nil {
			errs = append(errs, (*l).stop())
			(*l).stop = nil
		}
	}
	return errors.Join(errs...)
}

// cutPower kills every process of the node at once and takes its network away. The time counts from before it; writes
// count from when the daemon is seen to be gone.
func (d *demo) cutPower(ctx context.Context, t *trial) error {
	fd, err := unix.PidfdOpen(t.victim.Pid(), 0)
	if err != nil {
		return fmt.Errorf("the leader's process: %w", err)
	}
	defer unix.Close(fd)
	gone := make(chan time.Duration, 1)
	go func() { // ends with the process, which Kill ends
		for {
			if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 10_000); n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
				gone <- mono()
				return
			}
		}
	}()
	t.cut = mono()
	if err := t.victim.Kill(ctx); err != nil {
		return err
	}
	t.dead = <-gone
	return nil
}

func (t *trial) since() float64 { return seconds(mono() - t.cut) }

// watchRecovery tells what happens as it happens, until all is well again.
func (d *demo) watchRecovery(ctx context.Context, t *trial) error {
	var wg sync.WaitGroup
	var errs [5]error
	k := &d.fig.Kill
	others := []*machine{t.a, t.b}
	watch := func(i int, what string, into *float64, text func() string, f func(context.Context) (bool, error)) {
		wg.Go(func() {
			if errs[i] = poll(ctx, what, 90*time.Second, f); errs[i] == nil {
				*into = t.since()
				d.r.say("%+7.2f s  %s", *into, text())
			}
		})
	}
	said := func(s string) func() string { return func() string { return s } }
	leader := ""
	watch(0, "new leader", &k.NewLeader, func() string { return leader + " leads" }, func(ctx context.Context) (bool, error) {
		for _, n := range others {
			if st, err := n.ctl.Status(ctx); err == nil && len(st.Shards) > 0 && st.Shards[0].Leader == n.Name() {
				leader = n.Name()
				return true, nil
			}
		}
		return false, nil
	})
	watch(1, "next write", &k.FirstWrite, said("next successful write through the API of "+t.b.Name()), func(context.Context) (bool, error) {
		_, ok := firstSuccess(t.writes.all(), t.dead, t.cut)
		return ok, nil
	})
	watch(2, "death seen by gossip", &k.Detected, func() string {
		return t.a.Name() + " and " + t.b.Name() + " hold " + t.victim.Name() + " for dead: its endpoints leave their tables"
	}, func(ctx context.Context) (bool, error) {
		for _, n := range others {
			if ok, err := n.says(ctx, t.victim.Name(), "dead"); !ok {
				return false, err
			}
		}
		return true, nil
	})
	watch(3, "node NotReady", &k.NotReady, said("node "+t.victim.Name()+" is NotReady in the API"), func(ctx context.Context) (bool, error) {
		actx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		n, err := t.b.kube.CoreV1().Nodes().Get(actx, t.victim.Name(), metav1.GetOptions{})
		return err == nil && !nodeReady(n), err
	})
	var pods []corev1.Pod
	watch(4, "six Ready pods on the other nodes", &k.PodsReady, func() string { return "six Ready pods again: " + placement(pods) }, func(ctx context.Context) (ok bool, err error) {
		actx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		l, err := t.b.kube.CoreV1().Pods("default").List(actx, metav1.ListOptions{LabelSelector: "app=web"})
		if err != nil {
			return false, err
		}
		pods = slices.DeleteFunc(l.Items, func(p corev1.Pod) bool { return !podReady(&p) || p.Spec.NodeName == t.victim.Name() })
		return len(pods) >= 6, nil
	})
	wg.Wait()
	if err := errors.Join(errs[:]...); err != nil {
		return err
	}
	// Then it must stay well: the last second of both loads without a failure.
	err := poll(ctx, "a second without failures", 30*time.Second, func(context.Context) (bool, error) {
		for _, l := range []*load{t.ip, t.port} {
			s := l.all()
			if failed(s[max(0, len(s)-rate):]) > 0 {
				return false, nil
			}
		}
		return true, nil
	})
	return errors.Join(err, t.stop(), t.b.kube.CoreV1().Namespaces().Delete(ctx, writesNamespace, metav1.DeleteOptions{}))
}

func (d *demo) tellOutage(t *trial) error {
	k := &d.fig.Kill
	k.FirstWrite, _ = firstSuccess(t.writes.all(), t.dead, t.cut)
	k.FailedWrite = judge(t.writes.all(), t.cut).Failed
	k.ClusterIP, k.NodePort = judge(t.ip.all(), t.cut), judge(t.port.all(), t.cut)
	for _, x := range []struct {
		what string
		o    outage
	}{{"ClusterIP from " + t.a.Name(), k.ClusterIP}, {"NodePort of " + t.b.Name(), k.NodePort}} {
		d.r.say("%-17s  %d of %d failed, the last was sent %.2f s after the cut %s", x.what, x.o.Failed, x.o.Sent, x.o.Last, causes(x.o.Causes))
	}
	d.r.say("%-17s  next success %.2f s after the cut; %d of %d failed", "writes at "+t.b.Name(), k.FirstWrite, k.FailedWrite, judge(t.writes.all(), t.cut).Sent)
	return nil
}

func causes(m map[string]int) string {
	if len(m) == 0 {
		return ""
	}
	var parts []string
	for _, c := range sortedKeys(m) {
		parts = append(parts, fmt.Sprintf("%d %s", m[c], c))
	}
	return "(" + strings.Join(parts, ", ") + ")"
}

// comeBack switches the node on again and gives it work.
func (d *demo) comeBack(ctx context.Context) error {
	i := slices.IndexFunc(d.nodes, func(n *machine) bool { return n.Name() == d.fig.Kill.Node })
	back, at := d.nodes[i], d.nodes[(i+1)%len(d.nodes)]
	d.r.step(fmt.Sprintf("5. %s comes back, with the disk that it had", back.Name()))
	began := time.Now()
	if err := back.Start(ctx, nil, d.skein, "up"); err != nil {
		return err
	}
	if err := d.awaitNode(ctx, back, at.kube); err != nil {
		return err
	}
	d.fig.Back.Ready = seconds(time.Since(began))
	if err := awaitVoters(ctx, at, back.Name()); err != nil {
		return err
	}
	d.fig.Back.Voter = seconds(time.Since(began))
	d.r.say("%s: skein up                        Ready %.2f s after its process started, votes again after %.2f s", back.Name(), d.fig.Back.Ready, d.fig.Back.Voter)
	l := startHere(ctx, rate, timeout, fetch(d.nodePortURL(at)))
	defer func() { _ = l.stop() }()
	scaled := mono()
	if _, err := d.cli(ctx, nil, "scale", "--kubeconfig", d.file("kubeconfig"), "deployment/web", "--replicas=9"); err != nil {
		return err
	}
	err := poll(ctx, "an answer from "+back.Name(), time.Minute, func(context.Context) (bool, error) {
		return slices.ContainsFunc(l.all(), func(s sample) bool {
			if s.Node != back.Name() || s.End < scaled {
				return false
			}
			d.fig.Back.Endpoints = seconds(s.End - scaled)
			return true
		}), nil
	})
	if err != nil {
		return err
	}
	pods, err := d.awaitPods(ctx, at, 9, "", time.Minute)
	if err != nil {
		return err
	}
	d.r.say("scaled to nine: first answer from a pod on %s %.2f s after the command; %s", back.Name(), d.fig.Back.Endpoints, placement(pods))
	return d.showMembers(ctx, at)
}

// unplug takes the cable out of the node that came back, for less than the grace after which its pods would move: the endpoints
// leave and return by gossip alone.
func (d *demo) unplug(ctx context.Context) error {
	i := slices.IndexFunc(d.nodes, func(n *machine) bool { return n.Name() == d.fig.Kill.Node })
	v, a, b := d.nodes[i], d.nodes[(i+1)%len(d.nodes)], d.nodes[(i+2)%len(d.nodes)]
	f := &d.fig.Unplug
	f.Node = v.Name()
	d.r.step(fmt.Sprintf("6. The cable of %s is pulled, and put back as soon as the others have given it up", f.Node))
	before, err := d.awaitPods(ctx, a, 9, "", 10*time.Second)
	if err != nil {
		return err
	}
	svc, err := a.kube.CoreV1().Services("default").Get(ctx, "web", metav1.GetOptions{})
	if err != nil {
		return err
	}
	l, err := startIn(ctx, a.Node, rate, timeout, "http://"+svc.Spec.ClusterIP+"/")
	if err != nil {
		return err
	}
	stop := sync.OnceValue(l.stop)
	defer func() { _ = stop() }()
	if err := poll(ctx, "requests", 10*time.Second, func(context.Context) (bool, error) { return len(l.all()) >= rate, nil }); err != nil {
		return err
	}
	pulled := mono()
	if err := v.Link(ctx, false); err != nil {
		return err
	}
	for _, n := range []*machine{a, b} {
		if err := awaitStatus(ctx, n, v.Name(), "dead"); err != nil {
			return err
		}
	}
	f.Detected = seconds(mono() - pulled)
	d.r.say("%+7.2f s  %s and %s hold %s for dead", f.Detected, a.Name(), b.Name(), v.Name())
	// Only when requests have stopped failing is it known that the tables follow.
	err = poll(ctx, "half a second without failures", 10*time.Second, func(context.Context) (bool, error) {
		s := l.all()
		return failed(s[max(0, len(s)-rate/2):]) == 0, nil
	})
	if err != nil {
		return err
	}
	back := mono()
	if err := v.Link(ctx, true); err != nil {
		return err
	}
	err = poll(ctx, "an answer from "+v.Name(), 30*time.Second, func(context.Context) (bool, error) {
		return slices.ContainsFunc(l.all(), func(s sample) bool {
			if s.Node != v.Name() || s.Start < back || s.Err != "" {
				return false
			}
			f.Endpoints = seconds(s.End - back)
			return true
		}), nil
	})
	if err := errors.Join(err, stop()); err != nil {
		return err
	}
	f.Requests = judge(l.all(), pulled)
	after, err := d.awaitPods(ctx, a, 9, "", 30*time.Second)
	if err != nil {
		return err
	}
	for _, p := range before {
		if !slices.ContainsFunc(after, func(q corev1.Pod) bool { return p.UID == q.UID }) {
			f.Moved++
		}
	}
	if f.Moved > 0 {
		return fmt.Errorf("%d pods were moved, though their node was away for less than the grace", f.Moved)
	}
	d.r.say("%d of %d requests failed, the last was sent %.2f s after the cut %s", f.Requests.Failed, f.Requests.Sent, f.Requests.Last, causes(f.Requests.Causes))
	d.r.say("cable back: its pods answer again after %.2f s, none of them was moved", f.Endpoints)
	return nil
}

// awaitStatus waits until a node's gossip says something of another.
func awaitStatus(ctx context.Context, at *machine, of, status string) error {
	return poll(ctx, fmt.Sprintf("%s is %s for %s", of, status, at.Name()), 30*time.Second, func(ctx context.Context) (bool, error) {
		return at.says(ctx, of, status)
	})
}

// says tells whether a node's gossip now says something of another.
func (m *machine) says(ctx context.Context, of, status string) (bool, error) {
	ms, err := m.ctl.Members(ctx)
	return slices.ContainsFunc(ms, func(x client.Member) bool { return x.Name == of && x.Status == status }), err
}

// weigh shows what the parts take.
func (d *demo) weigh(ctx context.Context) (err error) {
	d.r.step("7. What it takes, idle with nine pods: resident memory (of it anonymous), share of one CPU")
	var nodes []*cluster.Node
	for _, n := range d.nodes {
		nodes = append(nodes, n.Node)
	}
	if d.fig.Idle, err = measureIdle(ctx, nodes, 5*time.Second); err != nil {
		return err
	}
	rows := [][]string{{"NODE", "DAEMON", "CONTAINERD"}}
	for _, n := range sortedKeys(d.fig.Idle) {
		i := d.fig.Idle[n]
		rows = append(rows, []string{n, i.Daemon.String(), i.Containerd.String()})
	}
	d.r.table(rows...)
	d.r.more(fmt.Sprintf("executables: skein %.1f MB, skein-helper %.1f MB", d.fig.Binaries["skein"], d.fig.Binaries["skein-helper"]))
	return nil
}

// bye says how to go on.
func (d *demo) bye(u *upCmd) {
	here := func(path string) string { // as it is typed in this directory
		if dir, err := os.Getwd(); err == nil {
			if rel, err := filepath.Rel(dir, path); err == nil && filepath.IsLocal(rel) {
				return rel
			}
		}
		return path
	}
	bin := here(filepath.Dir(d.skein))
	skein := filepath.Join(bin, "skein")
	d.r.step(fmt.Sprintf("Done in %.0f s. The cluster stays up; look around:", d.fig.Total))
	kubeconfig := d.file("kubeconfig")
	d.r.table(
		[]string{"export KUBECONFIG=" + kubeconfig, "# contexts n1, n2, n3: any node answers"},
		[]string{skein + " get pods -o wide", "# or kubectl"},
		[]string{skein + " members --kubeconfig $KUBECONFIG", "# also: status, token list"},
		[]string{"curl " + d.nodePortURL(d.nodes[0]), "# the NodePort"},
		[]string{filepath.Join(bin, "skein-demo") + " exec n1 sh", "# a shell on n1"},
		[]string{"tail -f " + d.nodes[0].LogFile(), "# logs"},
		[]string{"make demo-down", "# removes all of it"},
	)
	d.r.more("figures: " + here(u.Figures))
}
