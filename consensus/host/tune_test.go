package host

import (
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestPaceOfTheCollector(t *testing.T) {
	at := time.Unix(100, 0)
	p := &gcPacer{base: 50, now: 50, busyAlloc: 32 << 20, at: at}
	allocated := uint64(0)
	for _, c := range []struct {
		name        string
		live, alloc uint64 // MiB
		after       time.Duration
		want        int
	}{
		{"idle", 10, 5, 10 * time.Second, 50},
		{"busy, a small heap: the bound", 4, 10, 100 * time.Millisecond, 400},
		{"10 MiB: not worth a change", 10, 10, 100 * time.Millisecond, 400},
		{"a little larger", 11, 32, 100 * time.Millisecond, 290},
		{"twice", 20, 32, 100 * time.Millisecond, 160},
		{"a large heap needs no help", 500, 32, 100 * time.Millisecond, 50},
		{"busy again", 16, 10, 100 * time.Millisecond, 200},
		{"idle again", 16, 3, 2 * time.Minute, 50},
	} {
		at, allocated = at.Add(c.after), allocated+c.alloc<<20
		if p.now = p.next(at, c.live<<20, allocated); p.now != c.want {
			t.Errorf("%s: %d %%, want %d", c.name, p.now, c.want)
		}
	}
}

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
