package controller

import "sync"

// Running holds the controller of one kind that runs in this process, for others to look at. Those of two leaderships may overlap for a
// moment; the later one counts. The zero value is ready; it is safe for concurrent use.
type Running[C comparable] struct {
	mu  sync.Mutex // guards cur
	cur C
}

// Follow shows c until the returned function is called.
func (r *Running[C]) Follow(c C) (stop func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cur = c
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.cur == c {
			var none C
			r.cur = none
		}
	}
}

// Get returns the controller that runs; the zero value if none does.
func (r *Running[C]) Get() C {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.cur
}
