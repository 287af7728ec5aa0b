package membership

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"skein.io/skein/gossip/health"
)

const childEnv = "SKEIN_MEMBERSHIP_CHILD"

// childConfig is what a member in a process of its own needs to know.
type childConfig struct {
	Name    string
	Addr    netip.Addr
	Key     []byte
	Profile Profile
	Seeds   []netip.AddrPort
}

// TestMain runs the test binary as a member if it was started as one.
func TestMain(m *testing.M) {
	if text := os.Getenv(childEnv); text != "" {
		child(text)
		return
	}
	os.Exit(m.Run())
}

// child is a member until its standard input ends, which it does when the test process is gone, however that came.
func child(text string) {
	var c childConfig
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		panic(err)
	}
	m, err := Start(context.Background(), Config{Name: c.Name, Addr: c.Addr, Key: c.Key, Profile: c.Profile, Seeds: c.Seeds})
	if err != nil {
		panic(err)
	}
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
	m.Shutdown()
}

// process starts node host as a process of its own and returns a function that kills it as kill -9 does.
func (n *network) process(host int, profile Profile) (kill func()) {
	n.t.Helper()
	text, err := json.Marshal(childConfig{fmt.Sprintf("n%d", host), n.addr(host), n.key, profile, []netip.AddrPort{n.at(1)}})
	if err != nil {
		n.t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+string(text))
	cmd.Stderr = os.Stderr
	if _, err := cmd.StdinPipe(); err != nil { // stays open as long as this process lives
		n.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		n.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		n.t.Fatalf("the child said %q: %v", line, err)
	}
	var once sync.Once
	kill = func() {
		once.Do(func() {
			cmd.Process.Signal(syscall.SIGKILL)
			cmd.Wait()
		})
	}
	n.t.Cleanup(kill)
	return kill
}

// rounds of the measurement; SKEIN_KILL_ROUNDS asks for more than a test run needs.
func rounds(usual int) int {
	if n, err := strconv.Atoi(os.Getenv("SKEIN_KILL_ROUNDS")); err == nil {
		return n
	}
	return usual
}

// A process that is killed must be dead for everyone within the profile's promise, and alive again as soon as it is back.
func TestKilledProcess(t *testing.T) {
	for _, c := range []struct {
		profile    Profile
		size       int
		rounds     int
		low, limit time.Duration // of the detection; the limit leaves room for a machine that is busy with other tests
	}{
		{LAN, 2, 2, 1500 * time.Millisecond, 5 * time.Second},
		{LAN, 3, 3, 1500 * time.Millisecond, 6 * time.Second},
		{LAN, 8, 2, 1500 * time.Millisecond, 8 * time.Second},
		{Edge, 3, 1, 10 * time.Second, 30 * time.Second},
	} {
		t.Run(fmt.Sprintf("%s-%d", c.profile, c.size), func(t *testing.T) {
			t.Parallel()
			n := newNetwork(t)
			all := n.cluster(c.size-1, func(cfg *Config) { cfg.Profile = c.profile })
			var dead, suspect, back []time.Duration
			for range rounds(c.rounds) {
				start := time.Now()
				kill := n.process(c.size, c.profile)
				ready := time.Since(start)
				for _, m := range all {
					n.await(m, c.size, health.Alive, c.limit)
				}
				back = append(back, time.Since(start)-ready)
				kill()
				killed := time.Now()
				var mu sync.Mutex
				var wg sync.WaitGroup
				for _, m := range all {
					wg.Go(func() {
						s, d := n.death(m, c.size, killed, c.limit)
						mu.Lock()
						defer mu.Unlock()
						if s > 0 {
							suspect = append(suspect, s)
						}
						dead = append(dead, d)
					})
				}
				wg.Wait()
			}
			t.Logf("kill -9, %s, %d nodes: dead for a survivor after %s; suspect after %s (%d of %d views); alive again after %s",
				c.profile, c.size, spread(dead), spread(suspect), len(suspect), len(dead), spread(back))
			if worst := slices.Max(dead); worst > c.limit {
				t.Errorf("a survivor took %s to see the death, at most %s are allowed", worst, c.limit)
			}
			if best := slices.Min(dead); best < c.low {
				t.Errorf("a survivor gave the node up after %s, before it had %s to object", best, c.low)
			}
		})
	}
}

// death waits until m sees the node dead and returns how long after the kill it was suspect (0: never seen) and dead.
func (n *network) death(m *Membership, host int, killed time.Time, limit time.Duration) (suspect, dead time.Duration) {
	eventually(m, limit, func() bool {
		x, _ := m.Member(fmt.Sprintf("n%d", host))
		switch {
		case x.Verdict == health.Suspect && suspect == 0:
			suspect = x.Since.Sub(killed)
		case x.Verdict == health.Dead:
			dead = x.Since.Sub(killed)
		}
		return dead != 0
	})
	if dead == 0 {
		return suspect, limit + time.Hour // reported as too late
	}
	return suspect, dead
}

func spread(d []time.Duration) string {
	if len(d) == 0 {
		return "never"
	}
	slices.Sort(d)
	r := func(x time.Duration) time.Duration { return x.Round(10 * time.Millisecond) }
	return fmt.Sprintf("%s (min %s, max %s)", r(d[len(d)/2]), r(d[0]), r(d[len(d)-1]))
}
