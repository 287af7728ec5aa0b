package front

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// countedWrites counts what reaches the system.
type countedWrites struct {
	net.Conn
	n atomic.Int64
}

func (c *countedWrites) Write(b []byte) (int, error) {
	c.n.Add(1)
	return c.Conn.Write(b)
}

// Without watches each write is made at once, by who writes.
func TestWritesAtOnceWithoutWatches(t *testing.T) {
	a, b := net.Pipe()
	g := newGatherer(a)
	defer g.Close()
	go func() {
		for range 3 {
			if n, err := g.Write([]byte("abc")); n != 3 || err != nil {
				t.Error(n, err)
			}
			if g.writing { // nobody else is there
				t.Error("handed over")
			}
		}
		g.Close()
	}()
	if got, err := io.ReadAll(b); string(got) != "abcabcabc" || err != nil {
		t.Errorf("%q %v", got, err)
	}
}

// What is written while the connection is busy goes out in one piece behind it.
func TestGathers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		seen := &countedWrites{Conn: a}
		g := newGatherer(seen)
		g.Linger()
		var want []byte
		for i := range 100 {
			x := []byte{byte(i), 1, 2, 3}
			want = append(want, x...)
			if _, err := g.Write(x); err != nil {
				t.Fatal(err)
			}
			if i == 0 {
				synctest.Wait() // that one is under way
			}
		}
		got := make([]byte, len(want))
		if _, err := io.ReadFull(b, got); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%v %v", got, err)
		}
		synctest.Wait()
		if n := seen.n.Load(); n != 2 {
			t.Errorf("%d writes, want 2", n)
		}
		time.Sleep(lingerFor + 1)
		go func() { _, _ = io.ReadFull(b, got[:1]) }()
		if _, err := g.Write([]byte("x")); err != nil || seen.n.Load() != 3 {
			t.Errorf("later: %d writes, %v", seen.n.Load(), err)
		}
		g.Close()
	})
}

// A client that does not read stops the writers, and closing takes a moment at most.
func TestGathersWithinBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := net.Pipe()
		g := newGatherer(a)
		var wrote atomic.Int64
		failed := make(chan error, 1)
		go func() {
			for {
				g.Linger()
				n, err := g.Write(make([]byte, 10<<10))
				wrote.Add(int64(n))
				if err != nil {
					failed <- err
					return
				}
			}
		}()
		synctest.Wait()
		if n := wrote.Load(); n < gathered/2 || n > 2*gathered {
			t.Errorf("%d bytes wait", n)
		}
		began := time.Now()
		if err := g.Close(); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took > lastWords {
			t.Errorf("closed after %s", took)
		}
		if err := <-failed; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the writer: %v", err)
		}
	})
}

// TLS over it: all arrives in order, also what was written just before the end, and the end itself.
func TestGathersUnderTLS(t *testing.T) {
	c := newCluster(t)
	crt, err := c.ca.IssueServer("n", []string{"localhost"}, nil, time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	content := func(yield func([]byte)) {
		r := rand.New(rand.NewPCG(seed, 1))
		for range 2000 {
			b := make([]byte, 1+r.IntN(40)*r.IntN(1000))
			for i := range b {
				b[i] = byte(r.Uint32())
			}
			yield(b)
		}
	}
	ended := make(chan error, 1)
	go func() {
		raw, err := l.Accept()
		if err != nil {
			ended <- err
			return
		}
		g := newGatherer(raw)
		s := tls.Server(g, &tls.Config{Certificates: []tls.Certificate{crt}})
		r := rand.New(rand.NewPCG(seed, 2))
		content(func(b []byte) {
			if r.IntN(3) == 0 {
				g.Linger()
			}
			if _, e := s.Write(b); e != nil && err == nil {
				err = e
			}
		})
		g.Linger()
		ended <- errors.Join(err, s.Close())
	}()
	conn, err := tls.Dial("tcp", l.Addr().String(), &tls.Config{RootCAs: c.pool, ServerName: "localhost"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	got, err := io.ReadAll(conn) // io.ErrUnexpectedEOF without the end
	if err != nil {
		t.Error(err)
	}
	var want []byte
	content(func(b []byte) { want = append(want, b...) })
	if !bytes.Equal(got, want) {
		t.Errorf("%d bytes, want %d, or others", len(got), len(want))
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
