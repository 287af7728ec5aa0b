// Package cputime reads what processes have used of the CPUs, for the benchmarks. It keeps nothing; any goroutine may call it.
package cputime

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// tick is the unit of CPU times in /proc; USER_HZ is 100 on every architecture that Go supports.
const tick = 10 * time.Millisecond

// Of sums user and system time of processes. The error names the file of a process that is gone.
func Of(pids []int) (time.Duration, error) {
	var sum int64
	for _, p := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p))
		if err != nil {
			return 0, err
		}
		f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:])) // the name may contain anything
		if len(f) < 13 {
			return 0, fmt.Errorf("/proc/%d/stat: %d fields", p, len(f))
		}
		for _, x := range f[11:13] {
			n, err := strconv.ParseInt(x, 10, 64)
			if err != nil {
				return 0, err
			}
			sum += n
		}
	}
	return time.Duration(sum) * tick, nil
}
