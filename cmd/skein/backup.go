package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"skein.io/skein/node/daemon"
)

// passphraseFlag names a file whose content, without the line's end, is a passphrase.
type passphraseFlag struct {
	PassphraseFile string `help:"File with the passphrase that seals the keys in the backup." type:"path"`
}

func (p passphraseFlag) read() ([]byte, error) {
	if p.PassphraseFile == "" {
		return nil, nil
	}
	b, err := os.ReadFile(p.PassphraseFile)
	if err != nil {
		return nil, fmt.Errorf("passphrase: %w", err)
	}
	b = bytes.TrimRight(b, "\r\n")
	if len(b) == 0 {
		return nil, fmt.Errorf("passphrase: %s is empty", p.PassphraseFile)
	}
	return b, nil
}

type backupCmd struct {
	Make   backupMakeCmd   `cmd:"" default:"withargs" help:"Write a backup to FILE ('-': standard output)."`
	Verify backupVerifyCmd `cmd:"" help:"Check every byte of a backup and say what is in it."`
}

type backupMakeCmd struct {
	targetFlag
	passphraseFlag
	File  string `arg:"" help:"Where the backup goes; it appears when all of it is on disk ('-': standard output)."`
	Force bool   `help:"Replace FILE if it exists."`
}

func (b *backupMakeCmd) Run(ctx context.Context) error {
	pass, err := b.read()
	if err != nil {
		return err
	}
	c, err := b.client()
	if err != nil {
		return err
	}
	start := time.Now()
	info, err := daemon.SaveBackup(ctx, c, b.File, daemon.BackupOptions{Replace: b.Force, Passphrase: pass})
	if err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	fmt.Fprintf(os.Stderr, "cluster %s: %d shards, %s in %s; writers waited %s\n", info.Cluster, len(info.Shards), size(info.Size), time.Since(start).Round(10*time.Millisecond), info.Held.Round(100*time.Microsecond))
	if !info.Sealed {
		fmt.Fprintln(os.Stderr, "keep it safe: it holds every secret of the cluster in clear (--passphrase-file seals the keys)")
	}
	return nil
}

type backupVerifyCmd struct {
	output
	File string `arg:"" help:"The backup ('-': standard input)."`
}

func (b *backupVerifyCmd) Run() error {
	info, err := daemon.VerifyBackup(b.File)
	if err != nil {
		return err
	}
	return b.print(info, func(w io.Writer) { describeBackup(w, info) })
}

// describeBackup says what is in a backup.
func describeBackup(w io.Writer, b daemon.BackupInfo) {
	keys := "in clear"
	if b.Sealed {
		keys = "sealed with a passphrase"
	}
	fmt.Fprintf(w, "cluster\t%s\ncreated\t%s on node %s by %s\nkeys\t%s\n\n", b.Cluster, b.Created.Format(time.RFC3339), b.Node, b.Version, keys)
	fmt.Fprintln(w, "SHARD\tREVISION\tINDEX\tSIZE\tKEYS")
	for _, s := range b.Shards {
		p := strings.Join(s.Prefixes, ",")
		if p == "" {
			p = "all others"
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%s\t%s\n", s.Name, s.Revision, s.Index, size(s.Size), p)
	}
	fmt.Fprintln(w, "\nevery checksum is right")
}

// size in bytes, for people.
func size(n int64) string {
	if n < 10<<20 {
		return fmt.Sprintf("%d kB", n>>10)
	}
	return fmt.Sprintf("%d MB", n>>20)
}
