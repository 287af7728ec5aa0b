package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"skein.io/skein/test/cluster"
)

// mono is the time since the machine's boot: one clock for all processes here, which nobody sets.
func mono() time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &t) // cannot fail
	return time.Duration(t.Nano())
}

// sample is one attempt: when it began and ended (mono), who answered, or what went wrong.
type sample struct {
	Start time.Duration `json:"s"`
	End   time.Duration `json:"e"`
	Pod   string        `json:"p,omitempty"`
	Node  string        `json:"n,omitempty"`
	Err   string        `json:"x,omitempty"`
}

// probe makes attempts at a fixed rate whatever becomes of the earlier ones, until ctx ends, and gives each to got as it
// ends. An attempt that is due while as many as fit into one timeout are still under way is counted as failed.
func probe(ctx context.Context, rate int, timeout time.Duration, attempt func(context.Context) (pod, node string, err error), got func(sample)) {
	tick := time.NewTicker(time.Second / time.Duration(rate))
	defer tick.Stop()
	most := int(float64(rate)*timeout.Seconds()) + 5
	slots := make(chan struct{}, most)
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		s := sample{Start: mono()}
		select {
		case slots <- struct{}{}:
		default:
			s.End, s.Err = s.Start, fmt.Sprintf("not sent: %d are under way", most)
			got(s)
			continue
		}
		wg.Go(func() {
			defer func() { <-slots }()
			// What is under way when ctx ends may still finish.
			actx, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
			defer cancel()
			pod, node, err := attempt(actx)
			s.End, s.Pod, s.Node = mono(), pod, node
			if err != nil {
				s.Err = cause(err)
			}
			got(s)
		})
	}
}

// cause shortens an error to what tells kinds of failure apart.
func cause(err error) string {
	var ne net.Error
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &ne) && ne.Timeout():
		return "timeout"
	case errors.Is(err, unix.ECONNREFUSED):
		return "refused"
	case errors.Is(err, unix.ECONNRESET), errors.Is(err, io.EOF):
		return "reset"
	case errors.Is(err, unix.EHOSTUNREACH):
		return "no route"
	}
	return err.Error()
}

// fetch asks a web pod who it is, over a connection of its own.
func fetch(url string) func(context.Context) (pod, node string, err error) {
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	return func(ctx context.Context) (pod, node string, err error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return "", "", err
		}
		res, err := c.Do(req)
		if err != nil {
			return "", "", err
		}
		defer res.Body.Close()
		b, err := io.ReadAll(io.LimitReader(res.Body, 4<<10))
		if err != nil {
			return "", "", err
		}
		if res.StatusCode != http.StatusOK {
			return "", "", fmt.Errorf("status %d", res.StatusCode)
		}
		pod, node = who(string(b))
		return pod, node, nil
	}
}

// who reads what a web pod says of itself: pod=... node=... and more.
func who(line string) (pod, node string) {
	for f := range strings.FieldsSeq(line) {
		if v, ok := strings.CutPrefix(f, "pod="); ok {
			pod = v
		} else if v, ok := strings.CutPrefix(f, "node="); ok {
			node = v
		}
	}
	return pod, node
}

// run of the hidden command writes samples to standard output, one JSON object a line, until standard input ends.
func (l *loadCmd) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // ends with the process at the latest
		_, _ = io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	var mu sync.Mutex // guards out
	out := json.NewEncoder(os.Stdout)
	probe(ctx, l.Rate, l.Timeout, fetch(l.URL), func(s sample) {
		mu.Lock()
		defer mu.Unlock()
		_ = out.Encode(s) // nobody reads any more: standard input has ended too
	})
	return nil
}

// load is a running probe and what it has found so far.
type load struct {
	mu      sync.Mutex // guards samples
	samples []sample
	stop    func() error
}

func (l *load) add(s sample) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.samples = append(l.samples, s)
}

// all are the samples so far, in the order in which the attempts began.
func (l *load) all() []sample {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := slices.Clone(l.samples)
	slices.SortFunc(s, func(a, b sample) int { return int(a.Start - b.Start) })
	return s
}

// startHere probes from this machine, that is from outside the cluster.
func startHere(ctx context.Context, rate int, timeout time.Duration, attempt func(context.Context) (string, string, error)) *load {
	ctx, cancel := context.WithCancel(ctx)
	l, done := &load{}, make(chan struct{})
	go func() {
		defer close(done)
		probe(ctx, rate, timeout, attempt, l.add)
	}()
	l.stop = func() error { cancel(); <-done; return nil }
	return l
}

// startIn probes from inside a node, as one of its processes.
func startIn(ctx context.Context, n *cluster.Node, rate int, timeout time.Duration, url string) (*load, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd, err := n.Command(ctx, self, "load", "--rate", fmt.Sprint(rate), "--timeout", timeout.String(), url)
	if err != nil {
		return nil, err
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	var msg strings.Builder
	cmd.Stderr = &msg
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	l, done := &load{}, make(chan error, 1)
	go func() { done <- l.read(out, cmd, &msg) }()
	l.stop = func() error { in.Close(); return <-done }
	return l, nil
}

func (l *load) read(out io.Reader, cmd *exec.Cmd, msg *strings.Builder) error {
	var bad error
	for sc := bufio.NewScanner(out); sc.Scan(); {
		var s sample
		if err := json.Unmarshal(sc.Bytes(), &s); err != nil && bad == nil {
			bad = fmt.Errorf("load: unreadable line %q", sc.Text())
		}
		l.add(s)
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("load: %w: %s", err, strings.TrimSpace(msg.String()))
	}
	return bad
}

// outage is what a load saw of a fault that began at a moment. Times are seconds since then.
type outage struct {
	// Sent since the fault, and how many of them failed.
	Sent   int `json:"sent"`
	Failed int `json:"failed"`
	// First and Last failed request: when each was sent.
	First float64 `json:"firstFailedSeconds"`
	Last  float64 `json:"lastFailedSeconds"`
	// Causes of failures, with how many each.
	Causes map[string]int `json:"causes,omitempty"`
	// Before the fault: how many failed then, which should be none.
	Before int `json:"failedBefore"`
}

// judge is pure. A request that was under way when the fault began counts as sent at its beginning.
func judge(samples []sample, fault time.Duration) outage {
	o := outage{Causes: map[string]int{}}
	for _, s := range samples {
		if s.End < fault {
			if s.Err != "" {
				o.Before++
			}
			continue
		}
		o.Sent++
		if s.Err == "" {
			continue
		}
		at := seconds(max(0, s.Start-fault))
		if o.Failed == 0 {
			o.First = at
		}
		o.First, o.Last = min(o.First, at), max(o.Last, at)
		o.Failed++
		o.Causes[s.Err]++
	}
	return o
}

// firstSuccess is the end of the first attempt to end well of those that began after a moment, in seconds since another one.
func firstSuccess(samples []sample, after, since time.Duration) (float64, bool) {
	best := time.Duration(math.MaxInt64)
	for _, s := range samples {
		if s.Start >= after && s.Err == "" {
			best = min(best, s.End)
		}
	}
	return seconds(best - since), best != math.MaxInt64
}

func seconds(d time.Duration) float64 { return math.Round(d.Seconds()*1000) / 1000 }

// spread shows how many answers came from each pod, by node.
func spread(samples []sample) string {
	byNode := map[string]map[string]int{}
	for _, s := range samples {
		if s.Err != "" {
			continue
		}
		if byNode[s.Node] == nil {
			byNode[s.Node] = map[string]int{}
		}
		byNode[s.Node][s.Pod]++
	}
	var parts []string
	for _, node := range sortedKeys(byNode) {
		p := node
		for _, pod := range sortedKeys(byNode[node]) {
			p += fmt.Sprintf(" %d", byNode[node][pod])
		}
		parts = append(parts, p)
	}
	return strings.Join(parts, " | ")
}

// latency gives quantiles of the successful attempts, in milliseconds.
func latency(samples []sample) (p50, p99 float64) {
	var d []time.Duration
	for _, s := range samples {
		if s.Err == "" {
			d = append(d, s.End-s.Start)
		}
	}
	if len(d) == 0 {
		return 0, 0
	}
	slices.Sort(d)
	ms := func(q float64) float64 {
		return math.Round(float64(d[int(q*float64(len(d)-1))])/float64(time.Millisecond)*100) / 100
	}
	return ms(0.5), ms(0.99)
}

func failed(samples []sample) int {
	n := 0
	for _, s := range samples {
		if s.Err != "" {
			n++
		}
	}
	return n
}
