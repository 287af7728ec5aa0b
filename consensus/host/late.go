package host

import (
	"sync"
	"time"
)

// lateness bounds requests in time without a timer for each: those that begin in the
// same interval share one, and end together, up to an interval late.
type lateness struct {
	after, interval time.Duration

	mu    sync.Mutex // guards the rest
	until time.Time  // of the requests that share c
	c     chan struct{}
}

// newLateness makes a bound of so long, and up to a tenth more.
func newLateness(after time.Duration) *lateness {
	return &lateness{after: after, interval: after / 10}
}

// begin returns the channel that is closed when a request that begins now is late.
func (l *lateness) begin(now time.Time) <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.c == nil || !now.Before(l.until) {
		c := make(chan struct{})
		l.until, l.c = now.Add(l.interval), c
		time.AfterFunc(l.after+l.interval, func() { close(c) })
	}
	return l.c
}
