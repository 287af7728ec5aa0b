package front

import (
	"context"
	"crypto/tls"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"skein.io/skein/node/api/internal/linger"
)

// An event for 200 watches on one connection would be as many frames of HTTP/2, each with a system call of its own: a third of what the event
// costs. So a connection on which watches are telling something is written to by a goroutine that lets others go first, and takes all that they have
// written in the meantime. It waits for no time to pass, only for those who can run.

const (
	// lingerFor is how long after a watch has told something its connection gathers what is written.
	lingerFor = 2 * time.Millisecond
	// gathered is how much waits at most: writers wait when there is more.
	gathered = 64 << 10
	// lastWords is how long a connection that is being closed may take to write what was gathered.
	lastWords = time.Second
)

// gatherer is a connection that gathers. Writes come one after the other, as those of TLS do; all else may come from any goroutine.
type gatherer struct {
	net.Conn
	until atomic.Int64 // gathers; nanoseconds since start

	mu       sync.Mutex // guards the rest
	changed  sync.Cond  // waiting or writing has
	waiting  []byte
	writing  bool // a goroutine that writes what waits
	deadline bool // a write would not wait for ever
	err      error
}

var start = time.Now()

var _ linger.Conn = (*gatherer)(nil)

func newGatherer(c net.Conn) *gatherer {
	g := &gatherer{Conn: c}
	g.changed.L = &g.mu
	return g
}

// connContext has the handlers of a connection find it.
func connContext(ctx context.Context, c net.Conn) context.Context {
	if t, ok := c.(*tls.Conn); ok {
		if g, ok := t.NetConn().(*gatherer); ok {
			return linger.With(ctx, g)
		}
	}
	return ctx
}

// Linger implements linger.Conn.
func (g *gatherer) Linger() { g.until.Store(int64(time.Since(start) + lingerFor)) }

var pieces = sync.Pool{New: func() any { return new([gathered]byte) }}

func piece() []byte { return pieces.Get().(*[gathered]byte)[:0] }

func giveBack(b []byte) {
	if cap(b) == gathered { // else it has grown
		pieces.Put((*[gathered]byte)(b[:gathered]))
	}
}

// Write implements net.Conn. An error is that of an earlier write if need be.
func (g *gatherer) Write(b []byte) (int, error) {
	g.mu.Lock()
	for g.writing && len(g.waiting) > 0 && len(g.waiting)+len(b) > gathered && g.err == nil {
		g.changed.Wait()
	}
	if g.err != nil {
		defer g.mu.Unlock()
		return 0, g.err
	}
	if !g.writing && (len(b) > gathered || int64(time.Since(start)) > g.until.Load()) {
		g.mu.Unlock()
		return g.Conn.Write(b) // nobody else begins to write meanwhile
	}
	if !g.writing {
		g.writing, g.waiting = true, piece()
		go g.write()
	}
	g.waiting = append(g.waiting, b...)
	g.mu.Unlock()
	return len(b), nil
}

// write writes what waits, and ends when there is nothing.
func (g *gatherer) write() {
	spare := piece()
	for {
		g.others()
		g.mu.Lock()
		b := g.waiting
		if len(b) == 0 || g.err != nil {
			g.waiting, g.writing = nil, false
			g.changed.Broadcast()
			g.mu.Unlock()
			giveBack(b)
			giveBack(spare)
			return
		}
		g.waiting = spare
		g.changed.Broadcast()
		g.mu.Unlock()
		_, err := g.Conn.Write(b)
		spare = b[:0]
		if err != nil {
			g.mu.Lock()
			g.err = err
			g.mu.Unlock()
		}
	}
}

// others lets those run who can, as long as they write something.
func (g *gatherer) others() {
	for last := -1; ; {
		g.mu.Lock()
		n := len(g.waiting)
		g.mu.Unlock()
		if n == last || n >= gathered/2 {
			return
		}
		last = n
		runtime.Gosched()
	}
}

// drain waits until all has been written, or cannot be.
func (g *gatherer) drain() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.writing {
		g.changed.Wait()
	}
}

// SetWriteDeadline implements net.Conn. Who makes all writes fail, after a time that he gave the last of them, does not mean those before.
func (g *gatherer) SetWriteDeadline(t time.Time) error {
	g.mu.Lock()
	bounded := g.deadline
	g.deadline = !t.IsZero()
	g.mu.Unlock()
	if bounded {
		g.drain()
	}
	return g.Conn.SetWriteDeadline(t)
}

// SetDeadline implements net.Conn.
func (g *gatherer) SetDeadline(t time.Time) error {
	if err := g.Conn.SetReadDeadline(t); err != nil {
		return err
	}
	return g.SetWriteDeadline(t)
}

// Close implements net.Conn: what has been written goes out, if the client takes it.
func (g *gatherer) Close() error {
	g.mu.Lock()
	writing := g.writing
	g.mu.Unlock()
	if writing {
		if err := g.Conn.SetWriteDeadline(time.Now().Add(lastWords)); err == nil {
			g.drain()
		}
	}
	return g.Conn.Close()
}
