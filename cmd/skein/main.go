// Command skein is the one binary of a Skein cluster: the daemon that every node runs, and the command line that speaks
// to it. The tree of commands is the CLI struct below; each verb has a file of its own. Everything here is a thin shell over
// package node's folders and kubectl's libraries: no decision about a cluster is taken in it.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/alecthomas/kong"
	"google.golang.org/grpc/grpclog"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"skein.io/skein/node/client"
)

// CLI is the whole command line.
type CLI struct {
	Config string `help:"Configuration file of the node (YAML; its keys are the long names of the flags)." type:"path" env:"SKEIN_CONFIG" default:"/etc/skein/config.yaml"`

	Up      upCmd      `cmd:"" group:"node" help:"Start this node; the first start makes a cluster of one, later starts resume."`
	Join    joinCmd    `cmd:"" group:"node" help:"Start this node as a member of the cluster that ADDRESS belongs to (any live member)."`
	Install installCmd `cmd:"" group:"node" help:"Run the node as a systemd service."`
	Leave   leaveCmd   `cmd:"" group:"node" help:"Take this node out of the cluster, gracefully."`
	Restore restoreCmd `cmd:"" group:"node" help:"Prepare this machine, which has no state, to start the cluster of a backup again."`
	Recover recoverCmd `cmd:"" group:"node" help:"Make this node's data the cluster's, when a majority of the voters is lost for good."`
	Images  imagesCmd  `cmd:"" group:"node" help:"The container images that this node holds."`

	Members    membersCmd    `cmd:"" group:"cluster" help:"The nodes, as this node's gossip sees them."`
	Status     statusCmd     `cmd:"" group:"cluster" help:"The store's shards and the health of each part of this node."`
	Token      tokenCmd      `cmd:"" group:"cluster" help:"Join tokens."`
	Store      storeCmd      `cmd:"" group:"cluster" help:"The store, for etcd's own tools."`
	Keys       keysCmd       `cmd:"" group:"cluster" help:"The keys that seal Secrets in the store."`
	Kubeconfig kubeconfigCmd `cmd:"" group:"cluster" help:"Print a kubeconfig: an administrator's, or a user's."`
	Backup     backupCmd     `cmd:"" group:"cluster" help:"Back the whole cluster up into a file, and check such files."`
	Version    versionCmd    `cmd:"" group:"cluster" help:"Print the version."`

	Get      kubectlCmd `cmd:"" group:"objects" passthrough:"" help:"Show objects (-o wide|json|yaml|name, -n, -l, -w)."`
	Why      kubectlCmd `cmd:"" group:"objects" passthrough:"" help:"Show why a pod is where it is, or why it is nowhere."`
	Describe kubectlCmd `cmd:"" group:"objects" passthrough:"" help:"Show one object with its events."`
	Apply    kubectlCmd `cmd:"" group:"objects" passthrough:"" help:"Make objects as files, directories or stdin say (-f)."`
	Delete   kubectlCmd `cmd:"" group:"objects" passthrough:"" help:"Delete objects."`
	Logs     kubectlCmd `cmd:"" group:"objects" passthrough:"" help:"Show the log of a container."`
	Exec     kubectlCmd `cmd:"" group:"objects" passthrough:"" help:"Run a command in a container."`
	Top      kubectlCmd `cmd:"" group:"objects" passthrough:"" help:"Show what nodes and pods use of CPU and memory."`
	Rollout  kubectlCmd `cmd:"" group:"objects" passthrough:"" help:"Follow, undo or restart a rollout."`
	Scale    kubectlCmd `cmd:"" group:"objects" passthrough:"" help:"Set the number of replicas."`
	Cordon   kubectlCmd `cmd:"" group:"objects" passthrough:"" help:"Let no new pods onto a node."`
	Uncordon kubectlCmd `cmd:"" group:"objects" passthrough:"" help:"Let pods onto a node again."`
	Drain    kubectlCmd `cmd:"" group:"objects" passthrough:"" help:"Move a node's pods elsewhere."`

	Containerd containerdCmd `cmd:"" hidden:"" passthrough:"" help:"Run the embedded containerd (the daemon starts it)."`
}

// stateFlag names the local node, whose control socket a command uses.
type stateFlag struct {
	StateDir string `help:"State directory of the local node." type:"path" env:"SKEIN_STATE_DIR" default:"${state}"`
}

func (s stateFlag) client() *client.Client { return client.Unix(client.SocketPath(s.StateDir)) }

// targetFlag names the node that a command asks: the local one, or any node with the credentials of a kubeconfig.
type targetFlag struct {
	stateFlag
	Kubeconfig string `help:"Ask the node that this kubeconfig names instead of the local one." type:"path"`
}

func (t targetFlag) client() (*client.Client, error) {
	if t.Kubeconfig == "" {
		return t.stateFlag.client(), nil
	}
	cfg, err := clientcmd.BuildConfigFromFlags("", t.Kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", t.Kubeconfig, err)
	}
	hc, err := rest.HTTPClientFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", t.Kubeconfig, err)
	}
	return client.HTTP(strings.TrimRight(cfg.Host, "/"), hc), nil
}

// exitUsage is the exit code for a command line that says nothing sensible, as of most programs.
const exitUsage = 2

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	var cli CLI
	p, err := kong.New(&cli,
		kong.Name("skein"),
		kong.Description("A masterless, Kubernetes-compatible cluster: every node the same, any node answers."),
		kong.UsageOnError(),
		kong.Vars{"state": client.DefaultStateDir, "hostname": defaultName()},
		kong.ExplicitGroups([]kong.Group{
			{Key: "node", Title: "This node:"},
			{Key: "cluster", Title: "The cluster:"},
			{Key: "objects", Title: "Objects (kubectl's own commands and flags):"},
		}),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true}),
	)
	if err != nil {
		panic(err) // the tree above is wrong: our own bug
	}
	if r, err := configResolver(args); err != nil {
		fmt.Fprintln(os.Stderr, "skein:", err)
		return exitUsage
	} else if r != nil {
		kong.Resolvers(r).Apply(p)
	}
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard)) // errors are returned; its chatter is not for people
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	kctx, err := p.Parse(args)
	if err != nil {
		var pe *kong.ParseError
		if errors.As(err, &pe) && len(args) == 0 {
			_ = pe.Context.PrintUsage(false)
			return exitUsage
		}
		fmt.Fprintf(os.Stderr, "skein: %v (see 'skein --help')\n", err)
		return exitUsage
	}
	kctx.BindTo(ctx, (*context.Context)(nil))
	if err := kctx.Run(&cli); err != nil {
		var code exitCode
		if errors.As(err, &code) {
			return int(code)
		}
		if !errors.Is(err, context.Canceled) || ctx.Err() == nil {
			fmt.Fprintln(os.Stderr, "skein:", err)
			return 1
		}
	}
	return 0
}

// exitCode ends the process with a code after its message has been shown.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit status %d", int(e)) }
