// Command demo shows a whole Skein cluster on this one machine: three nodes, each in namespaces of its own with its own
// state, cgroups and containerd (package test/cluster). It joins them, runs a Deployment behind a Service, cuts the power of the
// leader while requests and writes go on, brings it back, and measures all of it. The cluster stays up; "down" removes it and
// proves that nothing is left.
//
// The figures are shown as they come and written to a JSON file, see figures. Nothing here waits for a time to pass: each
// step polls a condition and has a deadline.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"

	"skein.io/skein/test/cluster"
)

// labName is the laboratory's name in the kernel; labDir, on a disk, as a real node's state would be, holds all its files.
const (
	labName = "demo"
	labDir  = "/var/tmp/skein-demo"
)

type cli struct {
	Up   upCmd   `cmd:"" default:"withargs" help:"Show it. An earlier demo is removed first; the new one stays up."`
	Down downCmd `cmd:"" help:"Remove everything that the demo made."`
	Exec execCmd `cmd:"" passthrough:"" help:"Run a command inside a node: exec NODE COMMAND..."`
	Load loadCmd `cmd:"" hidden:"" help:"Send requests and print what became of each (the demo runs it inside nodes)."`
}

type upCmd struct {
	Bin     string        `help:"Directory of the executables skein and skein-helper." type:"path" default:"bin"`
	Figures string        `help:"File to write the figures to." type:"path" default:"out/demo.json"`
	Limit   time.Duration `help:"Give up after this time." default:"5m"`
}

type downCmd struct{}

type execCmd struct {
	Args []string `arg:"" help:"NODE COMMAND..."`
}

type loadCmd struct {
	URL     string        `arg:""`
	Rate    int           `default:"50" help:"Requests a second."`
	Timeout time.Duration `default:"1s" help:"Of each request."`
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	var c cli
	k := kong.Parse(&c, kong.Name("skein-demo"), kong.Description("A Skein cluster of three nodes on this machine."), kong.UsageOnError())
	k.BindTo(ctx, (*context.Context)(nil))
	err := k.Run()
	var ee *exec.ExitError
	if errors.As(err, &ee) && strings.HasPrefix(k.Command(), "exec") {
		os.Exit(ee.ExitCode())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "skein-demo:", err)
		os.Exit(1)
	}
}

func (x *execCmd) Run(ctx context.Context) error {
	args := x.Args
	if len(args) > 1 && args[1] == "--" {
		args = append(args[:1:1], args[2:]...)
	}
	if len(args) < 2 {
		return errors.New("usage: skein-demo exec NODE COMMAND...")
	}
	lab, err := cluster.View(labName)
	if errors.Is(err, cluster.ErrNoLab) {
		return errors.New("no demo is up: start one with 'make demo'")
	}
	if err != nil {
		return err
	}
	n := lab.Node(args[0])
	if n == nil {
		return fmt.Errorf("the demo has no node %q", args[0])
	}
	cmd, err := n.Command(ctx, args[1:]...)
	if err != nil {
		return err
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd.Run()
}
