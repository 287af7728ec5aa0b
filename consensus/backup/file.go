package backup

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"io"

	"golang.org/x/sys/unix"
)

// WriteFile makes a private file (0600) of what write writes. It appears under
// its name only when all of it is on disk; until then, and after a failure, there
// is at most a file NAME.partial-* beside it. An existing file is refused, wrapping
// fs.ErrExist, unless it may be replaced.
func WriteFile(path string, replace bool, write func(io.Writer) error) (err error) {
	if _, err := os.Lstat(path); err == nil && !replace {
		return fmt.Errorf("%s: %w", path, fs.ErrExist)
	}
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, filepath.Base(path)+".partial-") // 0600
	if err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = os.Remove(f.Name())
		}
	}()
	w := bufio.NewWriterSize(f, copyBuffer)
	if err := write(w); err != nil {
		return err
	}
	if err := errors.Join(w.Flush(), f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	flags := uint(unix.RENAME_NOREPLACE)
	if replace {
		flags = 0
	}
	err = unix.Renameat2(unix.AT_FDCWD, f.Name(), unix.AT_FDCWD, path, flags)
	if errors.Is(err, unix.EINVAL) { // a file system without the flag, as NFS: looked at above
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("backup: name it %s: %w", path, err)
	}
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("backup: %w", err)
	}
	return nil
}
