// Command conformance runs the upstream Kubernetes conformance suite (directory suite) against a real Skein cluster: nodes in
// namespaces (package test/cluster), and beside them a machine that is no node, which serves the images by plain http and runs
// the suite, so that its tests come from outside of the cluster. It prints what passed by SIG, keeps docs/conformance.md, and fails if any test
// failed.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"skein.io/skein/node/client"
	"skein.io/skein/test/cluster"
)

type options struct {
	Focus   string        `help:"Regular expression over the names of the tests." default:"."`
	Skip    string        `help:"The same for tests to leave out." default:"^$$"`
	Nodes   int           `help:"Nodes of the cluster." default:"3"`
	Procs   int           `help:"Tests that run side by side." default:"3"`
	Limit   time.Duration `help:"Give up after this time." default:"4h"`
	Doc     string        `help:"Record to update; empty for none." type:"path"`
	Bin     string        `help:"Directory of skein, skein-helper and kubectl." type:"path" default:"bin"`
	Suite   string        `help:"Directory that suite/build.sh filled." type:"path" default:"out/conformance"`
	Report  string        `help:"Directory for the logs of tests and nodes." type:"path" default:"out/conformance/report"`
	Images  bool          `help:"Serve the tests' images. Without them only tests that run no container pass." default:"true" negatable:""`
	Keep    bool          `help:"Leave the cluster up, to look at it (skein-lab -l conform), and use the one that is up."`
	NodeEnv []string      `help:"Settings of the nodes (SKEIN_NAME=VALUE)." sep:"none"`
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	var o options
	kong.Parse(&o, kong.Name("skein-conformance"), kong.Description("Kubernetes' conformance suite on a Skein cluster of this machine."), kong.UsageOnError())
	ok, err := o.run(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
	}
	if err != nil || !ok {
		os.Exit(1)
	}
}

// labName is the laboratory's; outside is the machine that is no node; registryPort is where it serves images.
const (
	labName      = "conform"
	outside      = "outside"
	registryPort = "5000"
)

func (o *options) run(ctx context.Context) (ok bool, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, o.Limit, fmt.Errorf("not finished within %s", o.Limit))
	defer cancel()
	if err := os.MkdirAll(o.Report, 0o755); err != nil {
		return false, err
	}
	lab, err := o.lab(ctx)
	if err != nil {
		return false, err
	}
	defer func() {
		for _, n := range lab.Nodes() {
			if b, err := os.ReadFile(n.LogFile()); err == nil {
				_ = os.WriteFile(filepath.Join(o.Report, n.Name()+".log"), b, 0o644)
			}
		}
		if o.Keep {
			lab.Release()
			return
		}
		cctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, lab.Close(cctx))
	}()
	began := time.Now()
	res, err := o.suite(ctx, lab)
	if len(res.tests) == 0 {
		return false, err
	}
	fmt.Print(res.table())
	fmt.Printf("%d nodes, %d tests side by side, %s\n", o.Nodes, o.Procs, time.Since(began).Round(time.Second))
	if o.Doc != "" {
		err = errors.Join(err, record(o.Doc, &res, time.Now()))
	}
	return res.good(), err
}

// lab gives a laboratory with a cluster that is ready for the suite.
func (o *options) lab(ctx context.Context) (_ *cluster.Cluster, err error) {
	if o.Keep {
		if lab, err := cluster.Open(labName); err == nil {
			return lab, nil
		} else if !errors.Is(err, cluster.ErrNoLab) {
			return nil, err
		}
	}
	if err := cluster.Sweep(ctx); err != nil {
		return nil, err
	}
	lab, err := cluster.New(ctx, cluster.Config{Name: labName, Dir: filepath.Join(o.Report, "lab"), Persistent: o.Keep})
	if err != nil {
		return nil, err
	}
	if err := o.form(ctx, lab); err != nil {
		if o.Keep {
			lab.Release()
			return nil, err
		}
		return nil, errors.Join(err, lab.Close(context.WithoutCancel(ctx)))
	}
	return lab, nil
}

// form makes the machines, the registry and the cluster.
func (o *options) form(ctx context.Context, lab *cluster.Cluster) error {
	out, err := lab.AddNode(ctx, outside, 0)
	if err != nil {
		return err
	}
	registry := out.IP().String() + ":" + registryPort
	if o.Images {
		if err := out.Start(ctx, nil, filepath.Join(o.Suite, "registry"), "serve", "-layout", filepath.Join(o.Suite, "images"), "-addr", registry); err != nil {
			return err
		}
	}
	env := append([]string{"SKEIN_INSECURE_REGISTRY=" + registry}, o.NodeEnv...)
	line := []string{filepath.Join(o.Bin, "skein"), "up"}
	var first *cluster.Node
	var ctl *client.Client
	for i := range o.Nodes {
		n, err := lab.AddNode(ctx, fmt.Sprintf("n%d", i+1), 0)
		if err != nil {
			return err
		}
		if err := n.Start(ctx, env, line...); err != nil {
			return err
		}
		if i > 0 {
			continue
		}
		first, ctl = n, client.Unix(client.SocketPath(n.StateDir()))
		if err := o.connect(ctx, first, ctl); err != nil {
			return err
		}
		token, err := ctl.CreateToken(ctx, client.TokenRequest{Description: "conformance", TTLSeconds: 3600})
		if err != nil {
			return err
		}
		line = []string{filepath.Join(o.Bin, "skein"), "join", first.IP().String(), "--token", token.Text}
	}
	if err := o.settled(ctx, lab); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(o.Report, "repos.yaml"), []byte(strings.ReplaceAll(repos, "REGISTRY", registry)), 0o644)
}

func (o *options) kubeconfig() string { return filepath.Join(o.Report, "kubeconfig") }

// connect waits for the first node's API and writes an administrator's kubeconfig.
func (o *options) connect(ctx context.Context, n *cluster.Node, ctl *client.Client) error {
	return poll(ctx, time.Minute, "API of "+n.Name(), func(ctx context.Context) error {
		if !n.Running() {
			return fmt.Errorf("its daemon ended, see %s", n.LogFile())
		}
		raw, err := ctl.Kubeconfig(ctx, "https://"+n.IP().String()+":6443")
		if err != nil {
			return err
		}
		return os.WriteFile(o.kubeconfig(), raw, 0o600)
	})
}

// settled waits for all nodes to be Ready, and for their votes.
func (o *options) settled(ctx context.Context, lab *cluster.Cluster) error {
	cfg, err := clientcmd.BuildConfigFromFlags("", o.kubeconfig())
	if err != nil {
		return err
	}
	cfg.Dial = lab.DialContext
	kube, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return err
	}
	return poll(ctx, 2*time.Minute, "all nodes Ready", func(ctx context.Context) error {
		l, err := kube.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		ready := 0
		for _, n := range l.Items {
			for _, c := range n.Status.Conditions {
				if c.Type == "Ready" && c.Status == "True" {
					ready++
				}
			}
		}
		if ready < o.Nodes {
			return fmt.Errorf("%d of %d are", ready, o.Nodes)
		}
		return nil
	})
}

// poll repeats f until it succeeds.
func poll(ctx context.Context, limit time.Duration, what string, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		err := f(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: not within %s: %w", what, limit, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// repos names the registry of each kind of image (test/utils/image of upstream).
const repos = `promoterE2eRegistry: REGISTRY/e2e-test-images
buildImageRegistry: REGISTRY/build-image
gcEtcdRegistry: REGISTRY
gcRegistry: REGISTRY
sigStorageRegistry: REGISTRY/sig-storage
privateRegistry: REGISTRY/private
dockerLibraryRegistry: REGISTRY/library
cloudProviderGcpRegistry: REGISTRY/cloud-provider-gcp
invalidRegistry: 127.0.0.1:5999/invalid
`

// suite runs the tests, first those that may run side by side, then the others, outside of the cluster. With an error it gives what it
// knows until then.
func (o *options) suite(ctx context.Context, lab *cluster.Cluster) (all results, err error) {
	n := lab.Node(outside)
	if n == nil {
		return all, fmt.Errorf("the lab has no machine %s", outside)
	}
	for _, part := range []struct {
		name  string
		flags []string
	}{
		{"parallel", []string{fmt.Sprintf("--procs=%d", o.Procs), "--focus=(" + o.Focus + `).*\[Conformance\]`, `--skip=\[Serial\]|` + o.Skip}},
		{"serial", []string{"--focus=(" + o.Focus + `).*\[Serial\].*\[Conformance\]`, `--focus=\[Serial\].*(` + o.Focus + `).*\[Conformance\]`, "--skip=" + o.Skip}},
	} {
		report := filepath.Join(o.Report, part.name+".json")
		if err := os.Remove(report); err != nil && !os.IsNotExist(err) {
			return all, err
		}
		args := append([]string{filepath.Join(o.Suite, "ginkgo"), "run", "--timeout=" + o.Limit.String(), "--no-color", "--keep-going", "--silence-skips",
			"--json-report=" + part.name + ".json", "--output-dir=" + o.Report}, part.flags...)
		args = append(args, filepath.Join(o.Suite, "e2e.test"), "--", "--kubeconfig="+o.kubeconfig(), "--provider=skeleton", "--kubectl-path="+filepath.Join(o.Bin, "kubectl"))
		cmd, err := n.Command(ctx, args...)
		if err != nil {
			return all, err
		}
		log, err := os.Create(filepath.Join(o.Report, part.name+".log"))
		if err != nil {
			return all, err
		}
		cmd.Env = append(cmd.Env, "KUBECONFIG="+o.kubeconfig(), "KUBE_TEST_REPO_LIST="+filepath.Join(o.Report, "repos.yaml"))
		cmd.Stdout, cmd.Stderr = log, log
		// Ended by a signal, ginkgo still writes its report.
		cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
		cmd.WaitDelay = time.Minute
		fmt.Printf("%s tests, see %s\n", part.name, log.Name())
		err = cmd.Run()
		log.Close()
		var ee *exec.ExitError
		if err != nil && !errors.As(err, &ee) {
			return all, err
		}
		if err := all.read(report); err != nil {
			return all, fmt.Errorf("%w (see %s)", err, log.Name())
		}
		if ctx.Err() != nil {
			return all, context.Cause(ctx)
		}
	}
	return all, nil
}
