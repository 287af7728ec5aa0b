package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/alecthomas/kong"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"k8s.io/client-go/rest"
	kapply "k8s.io/kubectl/pkg/cmd/apply"
	kdelete "k8s.io/kubectl/pkg/cmd/delete"
	kdescribe "k8s.io/kubectl/pkg/cmd/describe"
	kdrain "k8s.io/kubectl/pkg/cmd/drain"
	kexec "k8s.io/kubectl/pkg/cmd/exec"
	kget "k8s.io/kubectl/pkg/cmd/get"
	klogs "k8s.io/kubectl/pkg/cmd/logs"
	krollout "k8s.io/kubectl/pkg/cmd/rollout"
	kscale "k8s.io/kubectl/pkg/cmd/scale"
	ktop "k8s.io/kubectl/pkg/cmd/top"
	cmdutil "k8s.io/kubectl/pkg/cmd/util"

	"skein.io/skein/node/client"
)

// kubectlCmd runs the kubectl command of the same name: its flags, its output, its errors.
type kubectlCmd struct {
	Args []string `arg:"" optional:"" help:"As kubectl takes them."`
}

var kubectlVerbs = map[string]func(cmdutil.Factory, genericiooptions.IOStreams) *cobra.Command{
	"get": func(f cmdutil.Factory, s genericiooptions.IOStreams) *cobra.Command {
		return kget.NewCmdGet("skein", f, s)
	},
	"describe": func(f cmdutil.Factory, s genericiooptions.IOStreams) *cobra.Command {
		return kdescribe.NewCmdDescribe("skein", f, s)
	},
	"apply": func(f cmdutil.Factory, s genericiooptions.IOStreams) *cobra.Command {
		return kapply.NewCmdApply("skein", f, s)
	},
	"rollout": func(f cmdutil.Factory, s genericiooptions.IOStreams) *cobra.Command {
		return krollout.NewCmdRollout("skein", f, s)
	},
	"delete":   kdelete.NewCmdDelete,
	"logs":     klogs.NewCmdLogs,
	"exec":     kexec.NewCmdExec,
	"scale":    kscale.NewCmdScale,
	"top":      ktop.NewCmdTop,
	"why":      newWhyCmd,
	"cordon":   kdrain.NewCmdCordon,
	"uncordon": kdrain.NewCmdUncordon,
	"drain":    kdrain.NewCmdDrain,
}

// Run executes the verb. Without a kubeconfig of the user's own, the local node is asked for an administrator's.
func (k *kubectlCmd) Run(ctx context.Context, kctx *kong.Context) error {
	verb := kctx.Selected().Name
	streams := genericiooptions.IOStreams{In: os.Stdin, Out: os.Stdout, ErrOut: os.Stderr}
	flags := genericclioptions.NewConfigFlags(true).WithDiscoveryBurst(300).WithDiscoveryQPS(50).WithWarningPrinter(streams)
	var state string
	root := &cobra.Command{Use: "skein", SilenceUsage: true, SilenceErrors: true}
	root.SetContext(ctx)
	flags.AddFlags(root.PersistentFlags())
	root.PersistentFlags().StringVar(&state, "state-dir", envOr("SKEIN_STATE_DIR", client.DefaultStateDir), "State directory of the local node, which gives the credentials when no kubeconfig is named.")
	matchVersion := cmdutil.NewMatchVersionFlags(flags)
	cmd := kubectlVerbs[verb](cmdutil.NewFactory(matchVersion), streams)
	sayskein(cmd)
	// As kubectl's own program does: without it warnings are log lines.
	rest.SetDefaultWarningHandler(rest.NewWarningWriter(os.Stderr, rest.WarningWriterOptions{Deduplicate: true}))
	aged := &agedAnswers{}
	root.PersistentFlags().Var(aged, "max-age", "How old the answer to a read may be while the node that is asked cannot reach the present state, such as 30s; 0s: fail rather than show an old one. Default: any; how old it is is printed as a warning.")
	flags.WrapConfigFn = aged.wrap
	root.AddCommand(cmd)
	root.PersistentPreRunE = func(*cobra.Command, []string) error {
		if *flags.KubeConfig != "" || os.Getenv("KUBECONFIG") != "" || *flags.APIServer != "" {
			return nil
		}
		path, err := localCredentials(ctx, state)
		var refused *client.Error
		if errors.As(err, &refused) && refused.Code == http.StatusServiceUnavailable {
			// No replica is in reach: the node itself answers root, from what it knows.
			aged.socket = client.SocketPath(state)
			*flags.APIServer = "http://" + localNode
			return nil
		}
		if err != nil {
			return err
		}
		*flags.KubeConfig = path
		return nil
	}
	var fatal error
	cmdutil.BehaviorOnFatal(func(msg string, code int) {
		if msg != "" {
			fmt.Fprintln(os.Stderr, strings.TrimRight(msg, "\n"))
		}
		fatal = exitCode(code)
		panic(fatal) // unwinds kubectl's command, which does not expect its fatal handler to return
	})
	root.SetArgs(append([]string{verb}, k.Args...))
	return func() (err error) {
		defer func() {
			if r := recover(); r != nil {
				if fatal == nil || r != any(fatal) {
					panic(r)
				}
				err = fatal
			}
		}()
		return root.Execute()
	}()
}

// localCredentials asks the local node for an administrator's kubeconfig and keeps it in anonymous memory: the path it
// returns is readable by this process alone, and no credential touches the disk.
func localCredentials(ctx context.Context, state string) (string, error) {
	if _, err := os.Stat(client.SocketPath(state)); err != nil {
		home, herr := os.UserHomeDir()
		if herr == nil {
			if _, kerr := os.Stat(home + "/.kube/config"); kerr == nil {
				return "", nil // kubectl's own default applies
			}
		}
		return "", fmt.Errorf("no cluster to talk to: no node runs here (%s) and no kubeconfig is named; use --kubeconfig FILE, or $KUBECONFIG ('skein kubeconfig' on a node prints one)", client.SocketPath(state))
	}
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	b, err := client.Unix(client.SocketPath(state)).Kubeconfig(ctx, "")
	if err != nil {
		return "", err
	}
	fd, err := unix.MemfdCreate("kubeconfig", unix.MFD_CLOEXEC)
	if err != nil {
		return "", fmt.Errorf("memory for the kubeconfig: %w", err)
	}
	f := os.NewFile(uintptr(fd), "kubeconfig")
	if _, err := f.Write(b); err != nil {
		return "", errors.Join(fmt.Errorf("memory for the kubeconfig: %w", err), f.Close())
	}
	memory = f // open until the process ends
	return fmt.Sprintf("/proc/self/fd/%d", fd), nil
}

// memory holds the kubeconfig's descriptor: without a reference the finalizer would close it.
var memory *os.File

func envOr(key, otherwise string) string {
	if v := os.Getenv(key); v != "" {
		return v
	}
	return otherwise
}

// sayskein makes help texts and examples name the program that the user runs.
func sayskein(c *cobra.Command) {
	for _, s := range []*string{&c.Long, &c.Example, &c.Short} {
		*s = strings.ReplaceAll(*s, "kubectl", "skein")
	}
	for _, sub := range c.Commands() {
		sayskein(sub)
	}
}
