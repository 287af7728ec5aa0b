package volume

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"time"
)

// File is one file of a volume's content.
type File struct {
	Data []byte
	// Mode holds the permission bits.
	Mode os.FileMode
	// UID owns the file; nil: root.
	UID *int64
}

// Payload is the content of a volume: files by slash-separated relative path.
type Payload map[string]File

const (
	dataLink    = "..data"
	newDataLink = "..data_tmp"
	maxPath     = 4096
	maxName     = 255
)

var errBadPath = errors.New("invalid path")

// checkPath refuses a path that could leave the volume or hide the writer's own entries.
func checkPath(p string) error {
	switch {
	case p == "":
		return fmt.Errorf("%w: it is empty", errBadPath)
	case path.IsAbs(p):
		return fmt.Errorf("%w %q: it must be relative", errBadPath, p)
	case len(p) > maxPath:
		return fmt.Errorf("%w: %d characters, at most %d", errBadPath, len(p), maxPath)
	case strings.HasPrefix(p, ".."):
		return fmt.Errorf("%w %q: it must not start with '..'", errBadPath, p)
	}
	for _, part := range strings.Split(p, "/") {
		if part == ".." {
			return fmt.Errorf("%w %q: it must not contain '..'", errBadPath, p)
		}
		if len(part) > maxName {
			return fmt.Errorf("%w %q: a part has %d characters, at most %d", errBadPath, p, len(part), maxName)
		}
	}
	return nil
}

// writeAtomically makes the content of dir equal to payload in one step, as kubelet's atomic writer does: files are
// written to a new directory dir/..<time>, then dir/..data, a symbolic link to it, is replaced by rename(2). What the user
// sees, dir/<name>, are links through ..data. own is called on the new directory before it becomes visible. It reports
// whether anything changed.
func writeAtomically(dir string, payload Payload, own func(dir string) error, now time.Time) (bool, error) {
	clean := make(Payload, len(payload))
	for p, f := range payload {
		if err := checkPath(p); err != nil {
			return false, err
		}
		clean[path.Clean(p)] = f
	}
	old, err := os.Readlink(filepath.Join(dir, dataLink))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, err
	}
	if old != "" && sameContent(filepath.Join(dir, old), clean) {
		// A crash may have come between the switch and the links.
		return false, errors.Join(linkVisible(dir, clean), dropStale(dir, clean, old))
	}
	fresh, err := os.MkdirTemp(dir, now.UTC().Format("..2006_01_02_15_04_05."))
	if err != nil {
		return false, err
	}
	if err := writeFiles(fresh, clean, own); err != nil {
		return false, errors.Join(err, os.RemoveAll(fresh))
	}
	tmp := filepath.Join(dir, newDataLink)
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, err
	}
	if err := os.Symlink(filepath.Base(fresh), tmp); err != nil {
		return false, errors.Join(err, os.RemoveAll(fresh))
	}
	if err := os.Rename(tmp, filepath.Join(dir, dataLink)); err != nil {
		return false, errors.Join(err, os.Remove(tmp), os.RemoveAll(fresh))
	}
	return true, errors.Join(linkVisible(dir, clean), dropStale(dir, clean, filepath.Base(fresh)))
}

func writeFiles(root string, payload Payload, own func(string) error) error {
	if err := os.Chmod(root, 0o755); err != nil {
		return err
	}
	for p, f := range payload {
		name := filepath.Join(root, filepath.FromSlash(p))
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(name, f.Data, f.Mode); err != nil {
			return err
		}
		// WriteFile's mode passes through the umask.
		if err := os.Chmod(name, f.Mode); err != nil {
			return err
		}
		if f.UID != nil {
			if err := os.Chown(name, int(*f.UID), -1); err != nil {
				return err
			}
		}
	}
	if own != nil {
		return own(root)
	}
	return nil
}

// sameContent says whether a directory holds exactly the payload. Modes are not compared: ownership rules change them, and
// they cannot change while a pod lives.
func sameContent(dir string, payload Payload) bool {
	n := 0
	err := filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		f, ok := payload[filepath.ToSlash(rel)]
		if !ok {
			return os.ErrExist
		}
		have, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		if !bytes.Equal(have, f.Data) {
			return os.ErrExist
		}
		n++
		return nil
	})
	return err == nil && n == len(payload)
}

// visible returns the first path elements of a payload, sorted.
func visible(payload Payload) []string {
	set := map[string]bool{}
	for p := range payload {
		first, _, _ := strings.Cut(p, "/")
		set[first] = true
	}
	out := make([]string, 0, len(set))
	for n := range set {
		out = append(out, n)
	}
	sort.Strings(out)
	return out
}

func linkVisible(dir string, payload Payload) error {
	for _, n := range visible(payload) {
		link := filepath.Join(dir, n)
		if _, err := os.Lstat(link); err == nil {
			continue
		}
		if err := os.Symlink(filepath.Join(dataLink, n), link); err != nil {
			return err
		}
	}
	return nil
}

// dropStale removes links to files that are gone and all data directories but the current one.
func dropStale(dir string, payload Payload, current string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	keep := map[string]bool{dataLink: true, current: true}
	for _, n := range visible(payload) {
		keep[n] = true
	}
	var errs []error
	for _, e := range entries {
		if !keep[e.Name()] {
			errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}
