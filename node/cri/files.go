package cri

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// symlink makes path point to target, atomically.
func symlink(target, path string) error {
	if have, err := os.Readlink(path); err == nil && have == target {
		return nil
	}
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(target, tmp); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// unmountBelow detaches what is mounted below dir in this mount namespace, last mounted first.
func unmountBelow(dir string) error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	lines := strings.Split(string(b), "\n")
	var errs []error
	for i := len(lines) - 1; i >= 0; i-- {
		if f := strings.Fields(lines[i]); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			if err := unix.Unmount(f[4], unix.MNT_DETACH); err != nil {
				errs = append(errs, fmt.Errorf("unmount %s: %w", f[4], err))
			}
		}
	}
	return errors.Join(errs...)
}

// watchLog moves the log away while containerd writes to it: it has the file open for appending, so it goes on with an empty one.
func (c *Containerd) watchLog(ctx context.Context) {
	t := time.NewTicker(time.Minute)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			if err := c.rotateLog(); err != nil {
				c.cfg.Logger.Warn("log of containerd", "error", err)
			}
		}
	}
}

func (c *Containerd) rotateLog() error {
	st, err := os.Stat(c.p.log)
	if errors.Is(err, fs.ErrNotExist) || err == nil && st.Size() <= c.cfg.LogMaxBytes {
		return nil
	}
	if err != nil {
		return err
	}
	src, err := os.OpenFile(c.p.log, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer src.Close()
	// The end of it only, should it have grown far beyond the limit meanwhile.
	if _, err := src.Seek(max(0, st.Size()-c.cfg.LogMaxBytes), io.SeekStart); err != nil {
		return err
	}
	dst, err := os.OpenFile(c.p.log+".1", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, io.LimitReader(src, c.cfg.LogMaxBytes))
	return errors.Join(err, dst.Close(), src.Truncate(0))
}

// lastLine gives the end of a log, for the error that refers to it.
func lastLine(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	const most = 2048
	if st, err := f.Stat(); err == nil {
		_, _ = f.Seek(max(0, st.Size()-most), io.SeekStart)
	}
	b, err := io.ReadAll(io.LimitReader(f, most))
	if err != nil {
		return err.Error()
	}
	lines := bytes.Split(bytes.TrimSpace(b), []byte("\n"))
	last := string(lines[len(lines)-1])
	if last == "" {
		return "it wrote nothing to its log"
	}
	return last
}

// writeFile replaces a file atomically.
func writeFile(path string, b []byte, mode os.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Chmod(mode), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}
