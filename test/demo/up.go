package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"skein.io/skein/node/client"
	"skein.io/skein/test/cluster"
	"skein.io/skein/test/images/bundle"
)

//go:embed web.yaml
var manifest []byte

// nodePort is the one that the manifest asks for.
const nodePort = 30080

// machine is a node with the ways to talk to it.
type machine struct {
	*cluster.Node
	ctl  *client.Client        // its control socket
	kube *kubernetes.Clientset // its API, over the network, as an administrator
}

// demo is one run.
type demo struct {
	r     *report
	lab   *cluster.Cluster
	skein string // path of the executable
	nodes []*machine
	fig   figures
}

// Run shows everything, in order.
func (u *upCmd) Run(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, u.Limit, fmt.Errorf("the demo takes longer than %s", u.Limit))
	defer cancel()
	d := &demo{r: &report{w: os.Stdout, start: time.Now()}, skein: filepath.Join(u.Bin, "skein")}
	err := d.run(ctx, u)
	if d.lab != nil {
		defer d.lab.Release()
	}
	if err != nil {
		return d.r.fail(err, d.lab)
	}
	return nil
}

func (d *demo) run(ctx context.Context, u *upCmd) error {
	for _, f := range []func(context.Context) error{d.prepare, d.form, d.deploy, d.request, d.kill, d.comeBack, d.unplug, d.weigh} {
		if err := f(ctx); err != nil {
			return err
		}
	}
	d.fig.Total = seconds(time.Since(d.r.start))
	if err := d.fig.write(u.Figures); err != nil {
		return err
	}
	d.bye(u)
	return nil
}

// poll asks until f says yes; its last error, or what it is waiting for, becomes the error when limit has passed.
func poll(parent context.Context, what string, limit time.Duration, f func(context.Context) (bool, error)) error {
	ctx, cancel := context.WithTimeout(parent, limit)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, err := f(ctx)
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			if parent.Err() != nil {
				return fmt.Errorf("%s: %w", what, context.Cause(parent))
			}
			if err != nil && !errors.Is(err, context.DeadlineExceeded) {
				return fmt.Errorf("%s: not within %s: %w", what, limit, err)
			}
			return fmt.Errorf("%s: not within %s", what, limit)
		case <-tick.C:
		}
	}
}

// subnets are candidates for the demo's network: the first that this machine has no address in is taken.
var subnets = []string{"10.99.0.0/16", "10.98.0.0/16", "172.29.0.0/16", "192.168.0.0/16"}

func (d *demo) prepare(ctx context.Context) error {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return err
	}
	d.fig.Machine.CPUs, d.fig.Machine.Kernel = runtime.NumCPU(), unix.ByteSliceToString(uts.Release[:])
	d.r.step(fmt.Sprintf("Skein demo: three nodes in namespaces of this machine (%d CPUs, Linux %s)", d.fig.Machine.CPUs, d.fig.Machine.Kernel))
	d.fig.Binaries = map[string]float64{}
	for _, name := range []string{"skein", "skein-helper"} {
		st, err := os.Stat(filepath.Join(filepath.Dir(d.skein), name))
		if err != nil {
			return fmt.Errorf("%w (make build)", err)
		}
		d.fig.Binaries[name] = float64(st.Size()) / 1e6
	}
	there, err := tearDown(ctx)
	if err != nil {
		return err
	}
	if there {
		d.r.say("the demo that was up is removed")
	}
	subnet, err := freeSubnet()
	if err != nil {
		return err
	}
	d.lab, err = cluster.New(ctx, cluster.Config{Name: labName, Dir: labDir, Subnet: subnet, HostLink: true, Persistent: true})
	if err != nil {
		return err
	}
	for _, name := range []string{"n1", "n2", "n3"} {
		n, err := d.lab.AddNode(ctx, name, 0)
		if err != nil {
			return err
		}
		d.nodes = append(d.nodes, &machine{Node: n, ctl: client.Unix(client.SocketPath(n.StateDir()))})
	}
	if _, err := bundle.Build(ctx, bundle.Config{Out: d.file("images"), Busybox: "none"}); err != nil {
		return err
	}
	d.r.say("three empty machines on one Ethernet segment, and the image %s, built here", bundle.Web)
	return nil
}

func freeSubnet() (netip.Prefix, error) {
	used, err := ownAddrs()
	if err != nil {
		return netip.Prefix{}, err
	}
	for _, s := range subnets {
		if p := netip.MustParsePrefix(s); !slices.ContainsFunc(used, p.Contains) {
			return p, nil
		}
	}
	return netip.Prefix{}, fmt.Errorf("this machine has addresses in each of %v: none is free for the demo", subnets)
}

func (d *demo) file(name string) string { return filepath.Join(d.lab.Dir(), name) }

// form makes the cluster: the first node alone, the second through the first, the third through the second.
func (d *demo) form(ctx context.Context) error {
	d.r.step("1. A cluster: n1 starts it, n2 joins through n1, n3 through n2")
	first, began := d.nodes[0], time.Now()
	if err := first.Start(ctx, nil, d.skein, "up"); err != nil {
		return err
	}
	if err := d.connect(ctx); err != nil {
		return err
	}
	if err := d.awaitNode(ctx, first, first.kube); err != nil {
		return err
	}
	d.fig.OneNodeReady = seconds(time.Since(began))
	d.r.say("n1: skein up                        Ready %.2f s after its process started", d.fig.OneNodeReady)
	token, err := first.ctl.CreateToken(ctx, client.TokenRequest{Description: "demo", TTLSeconds: 3600})
	if err != nil {
		return err
	}
	d.fig.Joined = map[string]float64{}
	for i, n := range d.nodes[1:] {
		via, start := d.nodes[i], time.Now()
		if err := n.Start(ctx, nil, d.skein, "join", via.IP().String(), "--token", token.Text); err != nil {
			return err
		}
		if err := d.awaitNode(ctx, n, via.kube); err != nil {
			return err
		}
		d.fig.Joined[n.Name()] = seconds(time.Since(start))
		d.r.say("%s: skein join %s (%s)      Ready %.2f s after its process started", n.Name(), via.IP(), via.Name(), d.fig.Joined[n.Name()])
	}
	d.fig.ThreeNodesReady = seconds(time.Since(began))
	if err := awaitVoters(ctx, d.nodes[2], "n1", "n2", "n3"); err != nil {
		return err
	}
	d.fig.ThreeVoters = seconds(time.Since(began))
	d.r.say("three Ready nodes after %.2f s, three voters of the store after %.2f s:", d.fig.ThreeNodesReady, d.fig.ThreeVoters)
	return d.showMembers(ctx, d.nodes[2])
}

// connect gets an administrator's credentials from the first node, makes the clients, and writes the kubeconfig.
func (d *demo) connect(ctx context.Context) error {
	first := d.nodes[0]
	var raw []byte
	err := poll(ctx, "API of "+first.Name(), time.Minute, func(ctx context.Context) (_ bool, err error) {
		if !first.Running() {
			return true, nil // said below
		}
		raw, err = first.ctl.Kubeconfig(ctx, "")
		return err == nil, err
	})
	if err != nil {
		return err
	}
	if raw == nil {
		return fmt.Errorf("the daemon of %s ended, see %s", first.Name(), first.LogFile())
	}
	cfg, err := clientcmd.Load(raw)
	if err != nil {
		return err
	}
	one := cfg.Contexts[cfg.CurrentContext]
	many := clientcmdapi.NewConfig()
	many.AuthInfos["admin"] = cfg.AuthInfos[one.AuthInfo]
	for _, n := range d.nodes {
		c := cfg.Clusters[one.Cluster].DeepCopy()
		c.Server = "https://" + netip.AddrPortFrom(n.IP(), 6443).String()
		many.Clusters[n.Name()] = c
		many.Contexts[n.Name()] = &clientcmdapi.Context{Cluster: n.Name(), AuthInfo: "admin"}
		rc, err := clientcmd.NewNonInteractiveClientConfig(*many, n.Name(), nil, nil).ClientConfig()
		if err != nil {
			return err
		}
		rc.QPS = -1
		if n.kube, err = kubernetes.NewForConfig(rc); err != nil {
			return err
		}
	}
	many.CurrentContext = d.nodes[1].Name()
	return clientcmd.WriteToFile(*many, d.file("kubeconfig"))
}

// awaitNode waits until a node's object is Ready, asking at the API of any node.
func (d *demo) awaitNode(ctx context.Context, n *machine, kube *kubernetes.Clientset) error {
	ended := false
	err := poll(ctx, "node "+n.Name()+" Ready", time.Minute, func(ctx context.Context) (bool, error) {
		if !n.Running() {
			ended = true
			return true, nil
		}
		o, err := kube.CoreV1().Nodes().Get(ctx, n.Name(), metav1.GetOptions{})
		return err == nil && nodeReady(o), err
	})
	if ended {
		return fmt.Errorf("the daemon of %s ended, see %s", n.Name(), n.LogFile())
	}
	return err
}

func nodeReady(n *corev1.Node) bool {
	return slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	})
}

// awaitVoters waits until a node knows that others hold a vote of the store.
func awaitVoters(ctx context.Context, at *machine, names ...string) error {
	return poll(ctx, fmt.Sprintf("votes of %v", names), time.Minute, func(ctx context.Context) (bool, error) {
		ms, err := at.ctl.Members(ctx)
		if err != nil {
			return false, err
		}
		left := slices.Clone(names)
		for _, m := range ms {
			if m.Role == "leader" || m.Role == "voter" {
				left = slices.DeleteFunc(left, func(n string) bool { return n == m.Name })
			}
		}
		if len(left) > 0 {
			return false, fmt.Errorf("%v hold none yet", left)
		}
		return true, nil
	})
}

// showMembers prints the gossip view and the store's shards as one node sees them.
func (d *demo) showMembers(ctx context.Context, n *machine) error {
	ms, err := n.ctl.Members(ctx)
	if err != nil {
		return err
	}
	st, err := n.ctl.Status(ctx)
	if err != nil {
		return err
	}
	rows := [][]string{{"NODE", "ADDRESS", "STATUS", "ROLE", "RTT"}}
	for _, m := range ms {
		rtt := "-"
		if m.RTTMillis >= 0 && !m.Self {
			rtt = fmt.Sprintf("%.1f ms", m.RTTMillis)
		}
		rows = append(rows, []string{m.Name, m.Address, m.Status, m.Role, rtt})
	}
	d.r.table(rows...)
	for _, s := range st.Shards {
		d.r.more(fmt.Sprintf("shard %s: leader %s, term %d, applied %d, voters %s", s.Name, s.Leader, s.Term, s.Applied, strings.Join(s.Voters, " ")))
	}
	return nil
}

// deploy loads the image into every node and applies the manifest, with the same commands that a person would type.
func (d *demo) deploy(ctx context.Context) error {
	d.r.step("2. A Deployment of six pods, behind a Service with a ClusterIP and a NodePort")
	g, gctx := errgroup.WithContext(ctx)
	for _, n := range d.nodes {
		g.Go(func() error {
			_, err := d.cli(gctx, n.Env(), "images", "import", d.file("images/web.tar"))
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	d.r.say("skein images import web.tar         on each node")
	if err := os.WriteFile(d.file("web.yaml"), manifest, 0o644); err != nil {
		return err
	}
	began := time.Now()
	if _, err := d.cli(ctx, nil, "apply", "--kubeconfig", d.file("kubeconfig"), "-f", d.file("web.yaml")); err != nil {
		return err
	}
	applied := time.Since(began)
	pods, err := d.awaitPods(ctx, d.nodes[1], 6, "", time.Minute)
	if err != nil {
		return err
	}
	d.fig.DeployReady = seconds(time.Since(began))
	d.r.say("skein apply -f web.yaml             took %.2f s; six pods Ready after %.2f s: %s", applied.Seconds(), d.fig.DeployReady, placement(pods))
	return nil
}

// cli runs bin/skein with words as a person would.
func (d *demo) cli(ctx context.Context, env []string, words ...string) (string, error) {
	cmd := exec.CommandContext(ctx, d.skein, words...)
	mine := slices.DeleteFunc(os.Environ(), func(kv string) bool { return strings.HasPrefix(kv, "SKEIN_") })
	cmd.Env = append(mine, env...)
	var out, msg strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &msg
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("skein %s: %w: %s", strings.Join(words, " "), err, strings.TrimSpace(msg.String()))
	}
	return out.String(), nil
}

// awaitPods waits until want web pods are Ready on nodes other than one, and gives them. It asks at the API of a node.
func (d *demo) awaitPods(ctx context.Context, at *machine, want int, not string, limit time.Duration) (ready []corev1.Pod, err error) {
	err = poll(ctx, fmt.Sprintf("%d Ready pods", want), limit, func(ctx context.Context) (bool, error) {
		l, err := at.kube.CoreV1().Pods("default").List(ctx, metav1.ListOptions{LabelSelector: "app=web"})
		if err != nil {
			return false, err
		}
		ready = slices.DeleteFunc(l.Items, func(p corev1.Pod) bool { return !podReady(&p) || p.Spec.NodeName == not })
		if len(ready) < want {
			return false, fmt.Errorf("%d are Ready", len(ready))
		}
		return true, nil
	})
	if err != nil && !errors.Is(err, context.Canceled) {
		err = errors.Join(err, troubles(ctx, at))
	}
	return ready, err
}

// troubles gives the last thing that the cluster itself complains about.
func troubles(ctx context.Context, at *machine) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	l, err := at.kube.CoreV1().Events("default").List(ctx, metav1.ListOptions{FieldSelector: "type=Warning"})
	if err != nil || len(l.Items) == 0 {
		return err
	}
	e := slices.MaxFunc(l.Items, func(a, b corev1.Event) int { return a.LastTimestamp.Compare(b.LastTimestamp.Time) })
	return fmt.Errorf("last warning, about %s: %s: %s", e.InvolvedObject.Name, e.Reason, e.Message)
}

func podReady(p *corev1.Pod) bool {
	return p.DeletionTimestamp == nil && slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// placement counts pods by node.
func placement(pods []corev1.Pod) string {
	n := map[string]int{}
	for _, p := range pods {
		n[p.Spec.NodeName]++
	}
	var parts []string
	for _, node := range sortedKeys(n) {
		parts = append(parts, fmt.Sprintf("%d on %s", n[node], node))
	}
	return strings.Join(parts, ", ")
}
