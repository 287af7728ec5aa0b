package host

import (
	"fmt"
	"os"
	"strconv"
)

// monitorSlack is how much longer than it asks for the monitor of Go's runtime may
// sleep, in nanoseconds; Linux's default is 50 us. The monitor asks for 20 us again
// and again while anything runs, and each waking costs more than what it does: with a
// slack of 500 us a write costs a tenth less CPU, a linearizable read a sixth. What
// waits for it, a goroutine behind another one's long system call when no processor
// is idle, waits so much longer at most.
const monitorSlack = 500_000

// Tune fits Go's runtime to a process that runs a Host: its monitor thread wakes up
// less often, and the collector runs as p says, unless the operator has set GOGC. To be
// called once, early.
func Tune(p Pace) error {
	p.setDefaults()
	if err := p.Validate(); err != nil {
		return fmt.Errorf("host: %w", err)
	}
	if os.Getenv("GOGC") == "" {
		pacing.Do(p.run)
	}
	return calmMonitor()
}

// calmMonitor finds the monitor thread: the runtime starts it first, and the kernel
// lists threads as they were started. If it were another one, that one's timers would
// be a little late.
func calmMonitor() error {
	d, err := os.Open("/proc/self/task")
	if err != nil {
		return fmt.Errorf("host: %w", err)
	}
	defer d.Close()
	names, err := d.Readdirnames(2)
	if err != nil || len(names) < 2 {
		return fmt.Errorf("host: threads of this process: %v, %w", names, err)
	}
	if err := os.WriteFile("/proc/"+names[1]+"/timerslack_ns", []byte(strconv.Itoa(monitorSlack)), 0); err != nil {
		return fmt.Errorf("host: %w", err) // it needs CAP_SYS_NICE
	}
	return nil
}
