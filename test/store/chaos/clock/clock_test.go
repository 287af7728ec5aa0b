package clock

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"
)

// TestMain is also the process whose clock is moved: it answers each line with its
// wall clock, and with what it believes to have passed since the line before.
func TestMain(m *testing.M) {
	if os.Getenv("SKEIN_CLOCK_CHILD") == "" {
		os.Exit(m.Run())
	}
	last := time.Now()
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		now := time.Now()
		fmt.Println(now.UnixNano(), int64(now.Sub(last)))
		last = now
	}
}

// The wall clock of a static Go program jumps, its monotonic clock and our own
// clock do not.
func TestJump(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "SKEIN_CLOCK_CHILD=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}()
	answers := bufio.NewScanner(out)
	ask := func() (wall time.Time, passed time.Duration) {
		t.Helper()
		fmt.Fprintln(in)
		if !answers.Scan() {
			t.Fatal("the process has gone")
		}
		var ns int64
		if _, err := fmt.Sscan(answers.Text(), &ns, &passed); err != nil {
			t.Fatal(err)
		}
		return time.Unix(0, ns), passed
	}
	ask()
	c, err := Take(cmd.Process.Pid)
	if errors.Is(err, ErrUnsupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, off := range []time.Duration{0, time.Hour, -24 * time.Hour, -3 * time.Second, 10 * 365 * 24 * time.Hour, 0} {
		before := time.Now()
		if err := c.Set(off); err != nil {
			t.Fatal(err)
		}
		wall, passed := ask()
		if d := wall.Sub(before) - off; d < -time.Second || d > 10*time.Second {
			t.Errorf("moved by %v, it is off by %v", off, d)
		}
		if passed < 0 || passed > 10*time.Second {
			t.Errorf("moved by %v, its monotonic clock went %v", off, passed)
		}
	}
}
