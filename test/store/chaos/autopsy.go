package chaos

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// autopsy tells what a process that does not answer is doing: where its threads wait
// in the kernel, and, after a SIGQUIT that ends it, where its goroutines do.
func (n *node) autopsy() string {
	var out strings.Builder
	pid := n.lab.Pid()
	if pid == 0 {
		return n.name + " does not run"
	}
	waits := map[string]int{}
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	for _, task := range tasks {
		stat, _ := os.ReadFile(filepath.Join(task, "stat"))
		_, state, _ := strings.Cut(string(stat), ") ")
		stack, _ := os.ReadFile(filepath.Join(task, "stack"))
		top, _, _ := strings.Cut(string(stack), "\n")
		waits[state[:min(1, len(state))]+" "+top]++
	}
	fmt.Fprintf(&out, "%s, pid %d, threads: %v\n", n.name, pid, waits)
	log, _ := os.ReadFile(n.lab.LogFile())
	if err := n.lab.Signal(syscall.SIGQUIT); err != nil {
		return out.String() + err.Error()
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := n.lab.Wait(ctx); err != nil {
		fmt.Fprintf(&out, "after SIGQUIT: %v\n", err)
	}
	if after, err := os.ReadFile(n.lab.LogFile()); err == nil && len(after) > len(log) {
		out.Write(after[len(log):])
	}
	return out.String()
}
