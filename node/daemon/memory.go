package daemon

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"skein.io/skein/consensus/host"
)

const (
	// gcPercent trades a little CPU for memory: an idle node has CPU to spare, and an edge node little memory. Under load a pacer
	// decides. An idle leader allocates some 300 KB a second, so it collects about once in half a minute, for 50 ms.
	gcPercent = 25
	// trimAfter is when start-up is over and what only it used can be given back.
	trimAfter = 10 * time.Second
)

// pacing is begun once: the collector is the process's.
var pacing sync.Once

// tuneRuntime sets the collector, unless the operator did, and calms the runtime's monitor thread.
func tuneRuntime() error {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
		pacing.Do((&pacer{now: gcPercent, started: time.Now(), at: time.Now()}).arm)
	}
	return host.Tune(0, 0)
}

// trimMemory gives back what starting used: some time after the node became ready, and after it began to lead.
func (n *node) trimMemory(ctx context.Context) error {
	if n.awaitReady(ctx) != nil {
		return nil
	}
	for pause(ctx, trimAfter) {
		n.logIf("give memory back", trim())
		select {
		case <-ctx.Done():
		case <-n.leads:
		}
	}
	return nil
}

// trim returns freed heap to the kernel, and drops the pages of the executable from this process's page tables: initialisation
// touches most of them, and hardly any is needed again. Those that are come back from the page cache, without a read.
func trim() error {
	debug.FreeOSMemory()
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		return err
	}
	defer f.Close()
	var errs []error
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		var lo, hi uintptr
		var perm string
		if _, err := fmt.Sscanf(sc.Text(), "%x-%x %s", &lo, &hi, &perm); err != nil {
			errs = append(errs, fmt.Errorf("/proc/self/maps: %w", err))
			continue
		}
		// Never a writable mapping: MADV_DONTNEED would throw its contents away.
		if len(perm) < 2 || perm[1] == 'w' || !strings.HasSuffix(sc.Text(), exe) {
			continue
		}
		if _, _, e := unix.Syscall(unix.SYS_MADVISE, lo, hi-lo, unix.MADV_DONTNEED); e != 0 {
			errs = append(errs, fmt.Errorf("madvise: %w", e))
		}
	}
	return errors.Join(append(errs, sc.Err())...)
}
