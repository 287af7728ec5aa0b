package front

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// preface begins a connection that a front passes to another. It cannot be mistaken for TLS, whose
// first byte is 22, nor for HTTP. The number is the version of what follows: the client's bytes.
const preface = "skein-front/1\n"

var errPreface = errors.New("not a preface that this version knows")

// conn is an accepted connection whose first bytes have been looked at.
type conn struct {
	net.Conn
	once   sync.Once
	closed func()

	head []byte // read but not given out; used by one reader at a time
}

// peek reads the beginning of the connection: a preface, which is dropped, or the first byte
// of something else, which is kept.
func (c *conn) peek(timeout time.Duration) (forwarded bool, err error) {
	if err := c.SetReadDeadline(time.Now().Add(timeout)); err != nil {
		return false, err
	}
	first := make([]byte, len(preface))
	if _, err := io.ReadFull(c.Conn, first[:1]); err != nil {
		return false, err
	}
	if first[0] != preface[0] {
		c.head = first[:1]
		return false, c.SetReadDeadline(time.Time{})
	}
	if _, err := io.ReadFull(c.Conn, first[1:]); err != nil {
		return false, err
	}
	if !bytes.Equal(first, []byte(preface)) {
		return false, fmt.Errorf("%w: %q", errPreface, first)
	}
	return true, c.SetReadDeadline(time.Time{})
}

func (c *conn) Read(b []byte) (int, error) {
	if len(c.head) > 0 {
		n := copy(b, c.head)
		c.head = c.head[n:]
		return n, nil
	}
	return c.Conn.Read(b)
}

func (c *conn) Close() error {
	err := c.Conn.Close()
	c.once.Do(c.closed)
	return err
}

// CloseWrite tells the client that nothing more comes.
func (c *conn) CloseWrite() error { return closeWrite(c.Conn) }

func closeWrite(c net.Conn) error {
	if w, ok := c.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return c.Close()
}

// handover is the listener of the server in this process.
type handover struct {
	addr  net.Addr
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func newHandover(a net.Addr) *handover {
	return &handover{addr: a, conns: make(chan net.Conn), done: make(chan struct{})}
}

// give hands c to the server, which owns it then; false when that has stopped.
func (h *handover) give(c net.Conn) bool {
	select {
	case h.conns <- c:
		return true
	case <-h.done:
		return false
	}
}

func (h *handover) stop() { h.once.Do(func() { close(h.done) }) }

// Accept implements net.Listener.
func (h *handover) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (h *handover) Close() error {
	h.stop()
	return nil
}

// Addr implements net.Listener.
func (h *handover) Addr() net.Addr { return h.addr }
