package host

import (
	"os"
	"strconv"
	"strings"
	"testing"
)

func TestTheMonitorIsCalm(t *testing.T) {
	if err := calmMonitor(); err != nil {
		t.Fatal(err)
	}
	ents, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, e := range ents {
		b, err := os.ReadFile("/proc/" + e.Name() + "/timerslack_ns")
		if err == nil && strings.TrimSpace(string(b)) == strconv.Itoa(monitorSlack) {
			found++
		}
	}
	if found == 0 {
		t.Error("no thread has the slack")
	}
}
