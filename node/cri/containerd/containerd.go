// Package containerd is containerd's own main function, linked in as a library. Only the daemon's executable imports it,
// and calls Main when it was started as "containerd ..." by node/cri: containerd runs as a process of its own, so that neither it
// nor the daemon takes the other down.
package containerd

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	_ "github.com/containerd/containerd/v2/cmd/containerd/builtins" // every plugin that node/cri's configuration names
	"github.com/containerd/containerd/v2/cmd/containerd/command"

	"skein.io/skein/node/cri/cgroup"
	"skein.io/skein/node/cri/lockfile"
)

// Main runs containerd until it gets SIGTERM. args are the command line behind the program's name and the word
// "containerd": -config FILE -lock FILE [-cgroup PATH]. The lock makes sure that there is one containerd for a state
// directory (a second one would wait for its database for ever, or replace live sockets), and tells the supervisor
// which process that is.
func Main(args []string) error {
	fl := flag.NewFlagSet("containerd", flag.ContinueOnError)
	fl.SetOutput(io.Discard)
	config := fl.String("config", "", "")
	lock := fl.String("lock", "", "")
	group := fl.String("cgroup", "", "")
	if err := fl.Parse(args); err != nil {
		return fmt.Errorf("containerd: %w", err)
	}
	if *config == "" || *lock == "" || fl.NArg() > 0 {
		return errors.New("containerd: usage: containerd -config FILE -lock FILE [-cgroup PATH]; skein starts this by itself")
	}
	l, err := lockfile.Acquire(*lock)
	if err != nil {
		return fmt.Errorf("containerd: %w", err)
	}
	defer l.Close()
	if *group != "" {
		if err := cgroup.Enter(*group, 0); err != nil {
			return fmt.Errorf("containerd: %w", err)
		}
	}
	if err := command.App().RunContext(context.Background(), []string{"containerd", "--config", *config}); err != nil {
		return fmt.Errorf("containerd: %w", err)
	}
	return nil
}

// Exit runs Main and ends the process; the message goes to standard error, which is containerd's log.
func Exit(args []string) {
	if err := Main(args); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}
