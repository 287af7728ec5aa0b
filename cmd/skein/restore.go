package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"

	"skein.io/skein/node/daemon"
)

type restoreCmd struct {
	nodeFlags
	passphraseFlag
	File string `arg:"" help:"The backup ('-': standard input)."`
}

func (r *restoreCmd) Run(ctx context.Context) error {
	c, err := r.config()
	if err != nil {
		return err
	}
	r.quiet(&c)
	pass, err := r.read()
	if err != nil {
		return err
	}
	out, err := daemon.Restore(ctx, c, r.File, pass)
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
	describeBackup(w, out.BackupInfo)
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Printf("\nrestored as generation %d of cluster %s; node %s is its first member\n", out.Number, out.Cluster, out.Node)
	if len(out.Forgotten) > 0 {
		fmt.Printf("not members any more, until they join again: %s\n", strings.Join(out.Forgotten, ", "))
	}
	fmt.Println("join tokens were not restored; now start the node with 'skein up', which prints a new one")
	return nil
}
