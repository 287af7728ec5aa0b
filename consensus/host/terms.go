package host

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
)

// termFile remembers over restarts the highest term that this node has obeyed.
// Its content is "1 <term>\n"; the 1 is the format's version.
type termFile struct {
	path string

	mu   sync.Mutex // guards term and the file
	term uint64
}

func openTerms(path string) (*termFile, error) {
	t := &termFile{path: path}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return t, nil
	}
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	version, term, _ := strings.Cut(strings.TrimSpace(string(b)), " ")
	if version != "1" {
		return nil, fmt.Errorf("store: %s has format %q, this version knows 1", path, version)
	}
	if t.term, err = strconv.ParseUint(term, 10, 64); err != nil {
		return nil, fmt.Errorf("store: %s: %w", path, err)
	}
	return t, nil
}

// admit accepts a term that is not below any before it.
func (t *termFile) admit(term uint64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if term < t.term {
		return fmt.Errorf("%w: term %d, this node has obeyed %d", ErrFenced, term, t.term)
	}
	if term == t.term {
		return nil
	}
	// Rare (once a leader), tiny, and has to be durable before the command acts:
	// the lock covers the write on purpose.
	tmp := t.path + ".tmp"
	if err := writeSync(tmp, fmt.Appendf(nil, "1 %d\n", term)); err != nil {
		return fmt.Errorf("store: remember the term: %w", err)
	}
	if err := os.Rename(tmp, t.path); err != nil {
		return fmt.Errorf("store: remember the term: %w", err)
	}
	t.term = term
	return nil
}

func writeSync(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Sync(), f.Close())
}

// Admit decides whether this node obeys a command of the cluster's leader of
// that term: not if it has obeyed a later one, or knows from its own replica of
// one (ErrFenced). What it admits it remembers over restarts.
func (h *Host) Admit(term uint64) error {
	for _, s := range h.cfg.Shards.Shards() {
		if r := h.replica(s.ID); r != nil && term < r.machine.FenceTerm() {
			return fmt.Errorf("%w: term %d, shard %s has seen %d", ErrFenced, term, s.Name, r.machine.FenceTerm())
		}
	}
	return h.terms.admit(term)
}

// flagFile is dragonboat's mark in a log directory. It records the host name
// that the directory is named after.
const flagFile = "dragonboat.ds"

// adoptHostname makes the log of a machine that was renamed usable: dragonboat
// keeps its data in a directory with the machine's name and would begin an empty
// one. The mark goes first: a crash in between leaves a directory that the next
// start renames.
func adoptHostname(dir string) error {
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	ents, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var old []string
	for _, e := range ents {
		if e.IsDir() && e.Name() != name {
			old = append(old, e.Name())
		} else if e.IsDir() {
			return nil // ours
		}
	}
	if len(old) == 0 {
		return nil
	}
	if len(old) > 1 {
		return fmt.Errorf("%s holds the logs of several machines (%s), none is called %s", dir, strings.Join(old, ", "), name)
	}
	marks, err := filepath.Glob(filepath.Join(dir, old[0], "*", flagFile))
	if err != nil {
		return err
	}
	for _, m := range append(marks, filepath.Join(dir, flagFile)) {
		if err := os.Remove(m); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return os.Rename(filepath.Join(dir, old[0]), filepath.Join(dir, name))
}
