package join

import (
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	failureBurst = 10               // failed attempts of one address that are answered at once
	failureEvery = 10 * time.Second // one more after each of these
	maxSources   = 1024             // addresses that are remembered
)

// failures counts failed attempts by address. Guessing a secret of 160 bits is hopeless in any case: this keeps a machine with
// a wrong token in a loop from costing the store and the log more than it should. An address that others hide behind (a node
// that forwards) is limited as one.
type failures struct {
	mu      sync.Mutex // guards sources
	sources map[netip.Addr]*rate.Limiter
	others  *rate.Limiter // for those that there is no room for
}

func newFailures() *failures {
	return &failures{sources: map[netip.Addr]*rate.Limiter{}, others: newLimiter()}
}

func newLimiter() *rate.Limiter { return rate.NewLimiter(rate.Every(failureEvery), failureBurst) }

// allowed tells whether the address may try, and if not, for how long it should wait.
func (f *failures) allowed(from netip.Addr, now time.Time) (wait time.Duration, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l, known := f.sources[from]
	if !known {
		l = f.others
		if len(f.sources) < maxSources {
			return 0, true
		}
	}
	if l.TokensAt(now) >= 1 {
		return 0, true
	}
	return failureEvery, false
}

// count notes a failed attempt.
func (f *failures) count(from netip.Addr, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l, known := f.sources[from]
	if !known && len(f.sources) >= maxSources {
		for addr, old := range f.sources { // those that have been quiet long enough are as new
			if old.TokensAt(now) >= failureBurst {
				delete(f.sources, addr)
			}
		}
	}
	if !known {
		l = f.others
		if len(f.sources) < maxSources {
			l = newLimiter()
			f.sources[from] = l
		}
	}
	l.AllowN(now, 1)
}
