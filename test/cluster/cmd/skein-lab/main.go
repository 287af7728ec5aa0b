// Command skein-lab makes and works with a laboratory from the shell (package test/cluster): machines in namespaces, on which
// the demo runs its cluster.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"

	"skein.io/skein/test/cluster"
)

// CLI is the whole command line.
type CLI struct {
	Lab string `short:"l" help:"Name of the laboratory." env:"SKEIN_LAB" default:"demo"`

	Up         upCmd         `cmd:"" help:"Make a laboratory with N nodes, n1, n2, ...; nothing runs in them yet."`
	Add        addCmd        `cmd:"" help:"Add a node."`
	Start      startCmd      `cmd:"" help:"Switch a node on and start its daemon; without a command, the one of the last time."`
	Stop       stopCmd       `cmd:"" help:"Ask the daemon of a node to end."`
	Kill       killCmd       `cmd:"" help:"Cut the power of a node."`
	KillDaemon killDaemonCmd `cmd:"" help:"Kill the daemon of a node alone, as a crash."`
	Pause      pauseCmd      `cmd:"" help:"Stop the daemon of a node with SIGSTOP."`
	Resume     resumeCmd     `cmd:"" help:"Let it go on."`
	Freeze     freezeCmd     `cmd:"" help:"Stop every process of a node."`
	Thaw       thawCmd       `cmd:"" help:"Let them go on."`
	Cut        cutCmd        `cmd:"" help:"Drop all packets between two nodes, or take the cable out of one."`
	Partition  partitionCmd  `cmd:"" help:"Cut groups of nodes from each other: n1,n2 n3."`
	Heal       healCmd       `cmd:"" help:"End all cuts, put all cables back."`
	Exec       execCmd       `cmd:"" passthrough:"" help:"Run a command in a node: exec NODE COMMAND..."`
	List       listCmd       `cmd:"" aliases:"ls" help:"Show the nodes."`
	Down       downCmd       `cmd:"" help:"Remove the laboratory and everything in it."`
	Sweep      sweepCmd      `cmd:"" help:"Remove laboratories of tests that were killed."`
}

// app is what commands get.
type app struct {
	ctx context.Context
	lab string
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	var cli CLI
	k := kong.Parse(&cli, kong.Name("skein-lab"), kong.Description("Machines in namespaces, to try clusters on."), kong.UsageOnError())
	err := k.Run(&app{ctx, cli.Lab})
	var ee *exec.ExitError
	if errors.As(err, &ee) && strings.HasPrefix(k.Command(), "exec") {
		os.Exit(ee.ExitCode())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "skein-lab:", err)
		os.Exit(1)
	}
}

// change opens the laboratory, does something, and leaves it as it is then. It waits a little for others who work on it.
func (a *app) change(f func(*cluster.Cluster) error) error {
	c, err := cluster.Open(a.lab)
	for try := 0; errors.Is(err, cluster.ErrBusy) && try < 100; try++ {
		select {
		case <-a.ctx.Done():
			return a.ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
		c, err = cluster.Open(a.lab)
	}
	if err != nil {
		return err
	}
	defer c.Release()
	return f(c)
}

func (a *app) node(name string, f func(*cluster.Node) error) error {
	return a.change(func(c *cluster.Cluster) error {
		n := c.Node(name)
		if n == nil {
			return fmt.Errorf("lab %s has no node %q", a.lab, name)
		}
		return f(n)
	})
}

type upCmd struct {
	Nodes    int    `arg:"" optional:"" default:"3" help:"How many nodes."`
	Segments int    `default:"1" help:"Ethernet segments: 1, or 2 with a router between; nodes take turns."`
	Dir      string `help:"Directory of the nodes." type:"path"`
	HostLink bool   `help:"Connect this machine to the first segment."`
}

func (u *upCmd) Run(a *app) error {
	if u.Nodes < 1 {
		return fmt.Errorf("%d nodes: at least one is needed", u.Nodes)
	}
	c, err := cluster.New(a.ctx, cluster.Config{Name: a.lab, Dir: u.Dir, Segments: u.Segments, HostLink: u.HostLink, Persistent: true})
	if err != nil {
		return err
	}
	defer c.Release()
	for i := range u.Nodes {
		if _, err := c.AddNode(a.ctx, fmt.Sprintf("n%d", i+1), i%u.Segments+1); err != nil {
			return errors.Join(err, c.Close(context.WithoutCancel(a.ctx)))
		}
	}
	show(c)
	return nil
}

type addCmd struct {
	Node    string `arg:""`
	Segment int    `default:"1"`
}

func (x *addCmd) Run(a *app) error {
	return a.change(func(c *cluster.Cluster) error {
		_, err := c.AddNode(a.ctx, x.Node, x.Segment)
		return err
	})
}

type startCmd struct {
	Node    string   `arg:""`
	Command []string `arg:"" optional:"" passthrough:"" help:"The daemon's command line; its settings for this node are in the environment."`
	Env     []string `short:"e" help:"NAME=VALUE for the daemon."`
}

func (x *startCmd) Run(a *app) error {
	argv := x.Command
	if len(argv) > 0 && argv[0] == "--" {
		argv = argv[1:]
	}
	return a.node(x.Node, func(n *cluster.Node) error { return n.Start(a.ctx, x.Env, argv...) })
}

type nodeArg struct {
	Node string `arg:""`
}

type (
	stopCmd struct {
		nodeArg
		Timeout time.Duration `default:"30s" help:"How long it may take."`
	}
	killCmd       struct{ nodeArg }
	killDaemonCmd struct{ nodeArg }
	pauseCmd      struct{ nodeArg }
	resumeCmd     struct{ nodeArg }
	freezeCmd     struct{ nodeArg }
	thawCmd       struct{ nodeArg }
)

func (x *stopCmd) Run(a *app) error {
	ctx, cancel := context.WithTimeout(a.ctx, x.Timeout)
	defer cancel()
	return a.node(x.Node, func(n *cluster.Node) error { return n.Stop(ctx) })
}

func (x *killCmd) Run(a *app) error {
	return a.node(x.Node, func(n *cluster.Node) error { return n.Kill(a.ctx) })
}

func (x *killDaemonCmd) Run(a *app) error {
	return a.node(x.Node, func(n *cluster.Node) error { return n.KillDaemon(a.ctx) })
}

func (x *pauseCmd) Run(a *app) error {
	return a.node(x.Node, func(n *cluster.Node) error { return n.Signal(syscall.SIGSTOP) })
}

func (x *resumeCmd) Run(a *app) error {
	return a.node(x.Node, func(n *cluster.Node) error { return n.Signal(syscall.SIGCONT) })
}

func (x *freezeCmd) Run(a *app) error { return a.node(x.Node, (*cluster.Node).Freeze) }

func (x *thawCmd) Run(a *app) error { return a.node(x.Node, (*cluster.Node).Thaw) }

type cutCmd struct {
	A string `arg:""`
	B string `arg:"" optional:""`
}

func (x *cutCmd) Run(a *app) error {
	if x.B == "" {
		return a.node(x.A, func(n *cluster.Node) error { return n.Link(a.ctx, false) })
	}
	return a.change(func(c *cluster.Cluster) error { return c.Cut(a.ctx, x.A, x.B) })
}

type partitionCmd struct {
	Groups []string `arg:"" help:"Nodes with commas between them."`
}

func (x *partitionCmd) Run(a *app) error {
	var groups [][]string
	for _, g := range x.Groups {
		groups = append(groups, strings.Split(g, ","))
	}
	return a.change(func(c *cluster.Cluster) error { return c.Partition(a.ctx, groups...) })
}

type healCmd struct{}

func (*healCmd) Run(a *app) error {
	return a.change(func(c *cluster.Cluster) error { return c.Heal(a.ctx) })
}

type execCmd struct {
	Args []string `arg:"" help:"NODE COMMAND..."`
}

func (x *execCmd) Run(a *app) error {
	args := slices.Clone(x.Args)
	if len(args) > 1 && args[1] == "--" {
		args = append(args[:1], args[2:]...)
	}
	if len(args) < 2 {
		return errors.New("usage: skein-lab exec NODE COMMAND...")
	}
	c, err := cluster.View(a.lab)
	if err != nil {
		return err
	}
	n := c.Node(args[0])
	if n == nil {
		return fmt.Errorf("lab %s has no node %q", a.lab, args[0])
	}
	cmd, err := n.Command(a.ctx, args[1:]...)
	if err != nil {
		return err
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd.Run()
}

type listCmd struct{}

func (*listCmd) Run(a *app) error {
	c, err := cluster.View(a.lab)
	if errors.Is(err, cluster.ErrNoLab) {
		names, _ := cluster.List()
		return fmt.Errorf("%w; there are: %s", err, strings.Join(names, " "))
	}
	if err != nil {
		return err
	}
	show(c)
	return nil
}

func show(c *cluster.Cluster) {
	fmt.Printf("%-12s %-14s %-4s %-8s %s\n", "NODE", "ADDRESS", "ON", "DAEMON", "DIRECTORY")
	for _, n := range c.Nodes() {
		on, pid := "no", "-"
		if n.On() {
			on = "yes"
		}
		if p := n.Pid(); p != 0 {
			pid = fmt.Sprint(p)
		}
		fmt.Printf("%-12s %-14s %-4s %-8s %s\n", n.Name(), n.IP(), on, pid, n.Dir())
	}
}

type downCmd struct{}

func (*downCmd) Run(a *app) error {
	err := a.change(func(c *cluster.Cluster) error { return c.Close(a.ctx) })
	if errors.Is(err, cluster.ErrNoLab) {
		return nil // as wanted
	}
	return err
}

type sweepCmd struct{}

func (*sweepCmd) Run(a *app) error { return cluster.Sweep(a.ctx) }
