package host

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"sync"
	"time"

	"github.com/lni/dragonboat/v4/raftio"
	"github.com/lni/dragonboat/v4/raftpb"
)

// link is one outgoing connection. It belongs to one goroutine of dragonboat.
type link struct {
	t      *transport
	target string
	conn   net.Conn
	dead   chan struct{} // closed when the connection has ended
	ack    chan struct{} // the peer's answer to frameEnd
	buf    []byte
	reader sync.WaitGroup
}

func (l *link) connect(ctx context.Context) error {
	c, err := l.t.dial(ctx, l.target)
	if err != nil {
		return err
	}
	l.conn, l.dead, l.ack = c, make(chan struct{}), make(chan struct{}, 1)
	dead, ack := l.dead, l.ack
	l.reader.Go(func() {
		defer close(dead)
		var b [1]byte
		for {
			if _, err := c.Read(b[:]); err != nil {
				_ = c.Close()
				return
			}
			select {
			case ack <- struct{}{}:
			default:
			}
		}
	})
	return nil
}

func (l *link) alive() bool {
	select {
	case <-l.dead:
		return false
	default:
		return true
	}
}

// send marshals at most size bytes into one frame and writes it.
func (l *link) send(kind byte, size int, marshal func([]byte) int) error {
	if cap(l.buf) < frameHead+size {
		l.buf = make([]byte, frameHead+size)
	}
	b := l.buf[:frameHead+size]
	n := marshal(b[frameHead:])
	b[0] = kind
	binary.BigEndian.PutUint32(b[1:], uint32(n))
	err := l.write(b[:frameHead+n])
	if cap(l.buf) > keepBuffer {
		l.buf = nil
	}
	return err
}

func (l *link) write(b []byte) error {
	if err := l.conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	_, err := l.conn.Write(b)
	return err
}

// Close waits for the reader.
func (l *link) Close() {
	_ = l.conn.Close()
	l.reader.Wait()
}

// messages is a link for Raft messages.
type messages struct{ link }

func (m *messages) SendMessageBatch(b raftpb.MessageBatch) error {
	if m.t.muted.Load() {
		return nil // of a replica that is being given up
	}
	b.DeploymentId = m.t.stamp()
	send := func() error {
		return m.send(frameBatch, b.SizeUpperLimit(), func(d []byte) int { return len(raftpb.MustMarshalTo(&b, d)) })
	}
	if m.alive() && send() == nil {
		return nil
	}
	// Raft tolerates duplicates, so what may have arrived is sent again.
	m.link.Close()
	if err := m.connect(m.t.ctx); err != nil {
		return err
	}
	return send()
}

// snapshots is a link for one snapshot.
type snapshots struct {
	link
	stamp uint64 // of the generation that it began in
}

func (s *snapshots) SendChunk(c raftpb.Chunk) error {
	if !s.alive() {
		return io.ErrUnexpectedEOF
	}
	c.DeploymentId = s.stamp
	return s.send(frameChunk, c.Size(), func(d []byte) int { return len(raftpb.MustMarshalTo(&c, d)) })
}

// Close waits until the peer has consumed everything.
func (s *snapshots) Close() {
	if s.alive() && s.send(frameEnd, 0, func([]byte) int { return 0 }) == nil {
		select {
		case <-s.ack:
		case <-s.dead:
		case <-s.t.ctx.Done():
		case <-time.After(snapshotAck):
		}
	}
	s.link.Close()
}

func (t *transport) GetConnection(ctx context.Context, target string) (raftio.IConnection, error) {
	m := &messages{link{t: t, target: target}}
	if err := m.connect(ctx); err != nil {
		return nil, err
	}
	return m, nil
}

func (t *transport) GetSnapshotConnection(ctx context.Context, target string) (raftio.ISnapshotConnection, error) {
	s := &snapshots{link{t: t, target: target}, t.stamp()}
	if err := s.connect(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

// call sends one request to a node and returns its answer.
func (t *transport) call(ctx context.Context, target string, req []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	c, err := t.dial(ctx, target)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer func() { stop(); _ = c.Close() }()
	if _, err := c.Write(appendFrame(nil, frameCall, req)); err != nil {
		return nil, err
	}
	var buf bytes.Buffer
	if _, err := readFrame(c, &buf); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}
