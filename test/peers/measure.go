package peers

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Memory of processes in MB (2^20 bytes): all that is resident, what no file backs, and the highest that it was since the last reset.
type Memory struct{ RSS, Anon, Peak float64 }

// MemoryOf sums the memory of processes.
func MemoryOf(pids []int) (m Memory, err error) {
	for _, p := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p))
		if err != nil {
			return m, err
		}
		for line := range strings.Lines(string(b)) {
			k, v, _ := strings.Cut(line, ":")
			n, _ := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 64) // other lines are no numbers
			switch k {
			case "VmRSS":
				m.RSS += n / 1024
			case "RssAnon":
				m.Anon += n / 1024
			case "VmHWM":
				m.Peak += n / 1024
			}
		}
	}
	return m, nil
}

// ResetPeak makes the kernel forget the highest resident size so far.
func ResetPeak(pids []int) error {
	for _, p := range pids {
		if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", p), []byte("5"), 0); err != nil {
			return err
		}
	}
	return nil
}

func (m Memory) String() string {
	return fmt.Sprintf("%.0f MB resident, %.0f anonymous, peak %.0f", m.RSS, m.Anon, m.Peak)
}

// HighestAnonymous looks at the anonymous memory of processes every few milliseconds until the function that it returns is called, which gives the most that it saw, in MB.
func HighestAnonymous(pids []int) (most func() float64) {
	stop, done := make(chan struct{}), make(chan float64)
	go func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		most := 0.0
		for {
			if m, err := MemoryOf(pids); err == nil { // a process that is gone has none
				most = max(most, m.Anon)
			}
			select {
			case <-stop:
				done <- most
				return
			case <-tick.C:
			}
		}
	}()
	return sync.OnceValue(func() float64 { close(stop); return <-done })
}
