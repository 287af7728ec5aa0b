// Package lockfile is a lock that says who holds it: a POSIX record lock, which the kernel drops when its holder dies, however it
// dies, and for which it tells the holder's process id. So there is no stale pid file, and no pid of somebody else.
//
// A process must open a lock's file through this package only: POSIX drops all locks that a process has on a file when it closes
// any descriptor of it.
package lockfile

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// ErrHeld is returned by Acquire when another process has the lock.
var ErrHeld = errors.New("lock is held")

// Lock is held until Close or the end of the process.
type Lock struct{ f *os.File }

// Acquire takes the lock on path, creating the file, and does not wait: ErrHeld names the holder.
func Acquire(path string) (*Lock, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	lk := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
	if err := unix.FcntlFlock(f.Fd(), unix.F_SETLK, &lk); err != nil {
		defer f.Close()
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			pid, _ := holder(f)
			return nil, fmt.Errorf("%s, by process %d: %w", path, pid, ErrHeld)
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return &Lock{f}, nil
}

// Close gives the lock back.
func (l *Lock) Close() error { return l.f.Close() }

// Holder tells the process that has the lock on path; 0 = nobody, also when there is no such file.
func Holder(path string) (int, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("lock: %w", err)
	}
	defer f.Close()
	return holder(f)
}

func holder(f *os.File) (int, error) {
	lk := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
	if err := unix.FcntlFlock(f.Fd(), unix.F_GETLK, &lk); err != nil {
		return 0, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	if lk.Type == unix.F_UNLCK {
		return 0, nil
	}
	return int(lk.Pid), nil
}
