package front

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// deadPoll is how often connections are compared with the live replicas besides at changes.
const deadPoll = time.Second

// splice is one connection that is passed on.
type splice struct {
	target   string
	once     sync.Once
	from, to net.Conn
	// lost: the target's machine has stopped to acknowledge.
	lost atomic.Bool
}

func (s *splice) close() {
	s.once.Do(func() {
		s.from.Close()
		s.to.Close()
	})
}

// order gives the targets to try, nearest first, those of unknown distance last; behind them those that are behind, in the same order.
func order(all []Target) []Target {
	ready := slices.DeleteFunc(slices.Clone(all), func(t Target) bool { return !t.Ready })
	slices.SortStableFunc(ready, func(a, b Target) int {
		if a.Behind != b.Behind {
			if a.Behind {
				return 1
			}
			return -1
		}
		if (a.RTT == 0) != (b.RTT == 0) {
			return cmp.Compare(b.RTT, a.RTT)
		}
		return cmp.Compare(a.RTT, b.RTT)
	})
	return ready
}

// passOn connects c with the first target that accepts within a time and copies until either end closes. It
// returns false, with c untouched, when there is none. began is when c came.
func (f *Front) passOn(ctx context.Context, c *conn, began time.Time, within time.Duration) bool {
	all := f.cfg.Replicas()
	to, name, failed := f.reach(ctx, order(all), within)
	if to != nil {
		f.outage.end()
		f.copyBoth(ctx, &splice{target: name, from: c, to: to})
		return true
	}
	if f.outage.begin(len(all), failed, began) { // clients ask again and again
		f.cfg.Logger.Warn("no API replica can be reached", "known", len(all), "error", errors.Join(failed...))
	}
	return false
}

// ahead passes a connection to a node that has not lost the store's leader, as this one has, if there is one.
func (f *Front) ahead(ctx context.Context, c *conn) bool {
	better := slices.DeleteFunc(order(f.cfg.Replicas()), func(t Target) bool { return t.Behind })
	to, name, _ := f.reach(ctx, better, minReach)
	if to == nil {
		return false
	}
	f.copyBoth(ctx, &splice{target: name, from: c, to: to})
	return true
}

// reach connects to one of the targets. The nearest gets a head start, and so on: one that has just vanished, or whose cable has, costs
// little. With no connection it returns what came of each.
func (f *Front) reach(ctx context.Context, targets []Target, within time.Duration) (net.Conn, string, []error) {
	ctx, cancel := context.WithTimeout(ctx, within)
	type result struct {
		Target
		conn net.Conn
		err  error
	}
	results := make(chan result)
	var failed []error
	open, next := 0, 0
	defer func() {
		cancel()
		for ; open > 0; open-- {
			if r := <-results; r.conn != nil {
				r.conn.Close()
			}
		}
	}()
	stagger := time.NewTimer(f.cfg.DialStagger)
	defer stagger.Stop()
	for {
		if next < len(targets) && open == 0 {
			stagger.Reset(0)
		}
		if next == len(targets) && open == 0 {
			return nil, "", failed
		}
		select {
		case r := <-results:
			open--
			if r.err == nil {
				return r.conn, r.Name, nil
			}
			failed = append(failed, fmt.Errorf("%s (%s): %w", r.Name, r.Addr, r.err))
		case <-stagger.C:
			if next < len(targets) {
				t := targets[next]
				next++
				open++
				go func() { // waited for by the deferred function
					c, err := f.dial(ctx, t)
					results <- result{t, c, err}
				}()
				stagger.Reset(f.cfg.DialStagger)
			}
		}
	}
}

// dial connects to a target and tells it that it is a front that calls.
func (f *Front) dial(ctx context.Context, t Target) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, f.cfg.DialTimeout)
	defer cancel()
	to, err := f.cfg.Dial(ctx, "tcp", t.Addr.String())
	if err != nil {
		return nil, err
	}
	if _, err := io.WriteString(to, preface); err != nil {
		to.Close()
		return nil, err
	}
	return to, nil
}

func (f *Front) copyBoth(ctx context.Context, s *splice) {
	defer context.AfterFunc(ctx, s.close)()
	f.mu.Lock()
	f.spliced[s] = struct{}{}
	f.mu.Unlock()
	defer func() {
		s.close()
		f.mu.Lock()
		delete(f.spliced, s)
		f.mu.Unlock()
	}()
	// The target may have died between the choice and the entry above.
	if !slices.ContainsFunc(f.cfg.Replicas(), func(t Target) bool { return t.Name == s.target }) {
		return
	}
	c := s.from.(*conn)
	if _, err := s.to.Write(c.head); err != nil {
		return
	}
	c.head = nil
	var wg sync.WaitGroup
	// Below the wrapper: between two TCP connections the kernel copies by itself.
	wg.Go(func() { s.copy(s.to, c.Conn) })
	wg.Go(func() { s.copy(c.Conn, s.to) })
	wg.Wait()
	if s.lost.Load() { // who comes back need not find out again
		f.outage.begin(len(f.cfg.Replicas()), []error{fmt.Errorf("%s: %w", s.target, syscall.ETIMEDOUT)}, time.Now().Add(-unacknowledged))
	}
}

// copy moves bytes one way. A clean end is passed on, so that the other way can finish.
func (s *splice) copy(to, from net.Conn) {
	_, err := io.Copy(to, from)
	if errors.Is(err, syscall.ETIMEDOUT) {
		s.lost.Store(true)
	}
	if err != nil || closeWrite(to) != nil {
		s.close()
	}
}

// closeDead closes connections to nodes that are no longer among the replicas, until ctx ends.
func (f *Front) closeDead(ctx context.Context) {
	changed, unsubscribe := f.cfg.Changed()
	defer unsubscribe()
	tick := time.NewTicker(deadPoll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-tick.C:
		}
		live := map[string]bool{}
		for _, t := range f.cfg.Replicas() {
			live[t.Name] = true
		}
		if n := f.closeSpliced(func(name string) bool { return live[name] }); n > 0 {
			f.cfg.Logger.Info("closed connections to dead API replicas", "connections", n)
		}
	}
}

// closeSpliced closes the connections whose target is not live and tells how many.
func (f *Front) closeSpliced(live func(string) bool) int {
	f.mu.Lock()
	var dead []*splice
	for s := range f.spliced {
		if !live(s.target) {
			dead = append(dead, s)
		}
	}
	f.mu.Unlock()
	for _, s := range dead {
		s.close()
	}
	return len(dead)
}
