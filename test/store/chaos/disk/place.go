package disk

import (
	"cmp"
	"fmt"
	"maps"
	"os"
	"runtime"
	"slices"

	"golang.org/x/sys/unix"
)

// within runs f on a thread in the mount namespace, and ends that thread.
func (p place) within(f func() error) error {
	if p.pid == 0 {
		return f()
	}
	done := make(chan error, 1)
	go func() { // its thread is never used again: it is not unlocked
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			// Not the main thread: it cannot end, and is what /proc/self shows.
			done <- p.within(f)
			runtime.UnlockOSThread()
			return
		}
		done <- func() error {
			ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", p.pid))
			if err != nil {
				return err
			}
			defer ns.Close()
			if err := unix.Unshare(unix.CLONE_FS); err != nil {
				return fmt.Errorf("unshare: %w", err)
			}
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS); err != nil {
				return fmt.Errorf("enter the mount namespace of process %d: %w", p.pid, err)
			}
			return f()
		}()
	}()
	return <-done
}

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }
