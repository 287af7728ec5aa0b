package host

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/lni/dragonboat/v4/config"
	"github.com/lni/dragonboat/v4/raftio"
	"github.com/lni/dragonboat/v4/raftpb"
	"golang.org/x/sys/unix"
)

// A connection carries frames: kind:1 length:4 payload. One direction is enough:
// the dialling side sends, the other only acknowledges the end of a snapshot or
// answers a call.
const (
	frameBatch byte = 1 // raftpb.MessageBatch
	frameChunk byte = 2 // raftpb.Chunk
	frameEnd   byte = 3 // end of a snapshot; answered by one byte
	frameCall  byte = 4 // a call (calls.go); answered by a frame of the same kind

	frameHead = 5
	// maxFrame is twice dragonboat's largest batch.
	maxFrame = 128 << 20
	// keepBuffer is the largest buffer that is kept after a burst.
	keepBuffer = 1 << 20
	// keepRequests are as many messages as room is kept for, of some 400 bytes each.
	keepRequests = 256

	dialTimeout      = time.Second
	handshakeTimeout = 3 * time.Second
	writeTimeout     = 5 * time.Second
	// deadPeer is how long sent data may stay unacknowledged before the kernel
	// gives the connection up. Without it a healed partition waits for TCP's
	// backed-off retransmission.
	deadPeer = 4 * time.Second
	// snapshotAck is how long the sender of a snapshot waits for the receiver.
	snapshotAck = 10 * time.Second
)

// transport is dragonboat's link to other nodes. Against the built-in one it
// notices that a peer has gone before it writes to it: a reader watches every
// outgoing connection, and a dead one is dialled anew before the next batch.
// The built-in transport loses that batch and then holds back the votes of all
// shards for up to 1.5 s. Buffers are sized by use, not 2 MiB a direction.
type transport struct {
	cfg    *Config
	log    *slog.Logger
	onCall func(ctx context.Context, cert *x509.Certificate, req []byte) []byte
	onRaft func(raftpb.Message)
	// stamp of messages that may come and go: the generation's.
	stamp func() uint64
	// muted drops what is to be sent.
	muted atomic.Bool
	// hears says whether a replica on a node is a member of a shard.
	hears func(shardID, replicaID uint64, nodeHostID string) bool
	// member is the node of a replica, as far as it is known.
	member func(shardID, replicaID uint64) (nodeHostID string, ok bool)

	addr    string
	onMsg   raftio.MessageHandler
	onChunk raftio.ChunkHandler

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu       sync.Mutex // guards listener, in, closed
	listener net.Listener
	in       map[net.Conn]bool
	closed   bool
}

var (
	_ config.TransportFactory = (*transport)(nil)
	_ raftio.ITransport       = (*transport)(nil)
)

func newTransport(cfg *Config, log *slog.Logger) *transport {
	t := &transport{cfg: cfg, log: log, stamp: func() uint64 { return deploymentID }, in: map[net.Conn]bool{}}
	t.ctx, t.cancel = context.WithCancel(context.Background())
	return t
}

// Create implements config.TransportFactory; a transport serves one NodeHost.
func (t *transport) Create(nhc config.NodeHostConfig, h raftio.MessageHandler, c raftio.ChunkHandler) raftio.ITransport {
	t.addr, t.onMsg, t.onChunk = nhc.GetListenAddress(), h, c
	return t
}

// Validate implements config.TransportFactory.
func (t *transport) Validate(addr string) bool {
	_, _, err := net.SplitHostPort(addr)
	return err == nil
}

func (t *transport) Name() string { return "skein" }

func (t *transport) Start() error {
	l, err := net.Listen("tcp", t.addr)
	if err != nil {
		return fmt.Errorf("raft transport: %w", err)
	}
	t.mu.Lock()
	t.listener = l
	t.mu.Unlock()
	t.wg.Go(func() { t.accept(l) })
	return nil
}

// Addr is the address it listens on.
func (t *transport) Addr() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.listener == nil {
		return ""
	}
	return t.listener.Addr().String()
}

func (t *transport) accept(l net.Listener) {
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // out of file descriptors and the like must not end the node
			t.log.Warn("raft transport cannot accept", "error", err)
			select {
			case <-t.ctx.Done():
				return
			case <-time.After(50 * time.Millisecond):
			}
			continue
		}
		t.mu.Lock()
		if t.closed {
			t.mu.Unlock()
			_ = c.Close()
			return
		}
		t.in[c] = true
		t.mu.Unlock()
		t.wg.Go(func() {
			if err := t.serve(c); err != nil && t.ctx.Err() == nil {
				t.log.Debug("raft connection ended", "peer", c.RemoteAddr(), "error", err)
			}
			_ = c.Close()
			t.mu.Lock()
			delete(t.in, c)
			t.mu.Unlock()
		})
	}
}

func (t *transport) Close() error {
	t.cancel()
	t.mu.Lock()
	t.closed = true
	l := t.listener
	for c := range t.in {
		_ = c.Close()
	}
	t.mu.Unlock()
	var err error
	if l != nil {
		err = l.Close()
	}
	t.wg.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil // dragonboat closes it twice when it fails to start
	}
	return err
}

// serverHandshake returns the connection to read from and the certificate of the
// peer, nil without TLS.
func (t *transport) serverHandshake(c net.Conn) (net.Conn, *x509.Certificate, error) {
	if t.cfg.ServerTLS == nil {
		return c, nil, nil
	}
	tc := tls.Server(c, t.cfg.ServerTLS)
	ctx, cancel := context.WithTimeout(t.ctx, handshakeTimeout)
	defer cancel()
	if err := tc.HandshakeContext(ctx); err != nil {
		return nil, nil, err
	}
	certs := tc.ConnectionState().PeerCertificates
	if len(certs) == 0 {
		return nil, nil, errors.New("the peer showed no certificate")
	}
	return tc, certs[0], nil
}

func (t *transport) serve(raw net.Conn) error {
	setDeadPeer(raw)
	c, cert, err := t.serverHandshake(raw)
	if err != nil {
		return err
	}
	r := bufio.NewReaderSize(c, 64<<10)
	var buf bytes.Buffer
	var source string                 // NodeHostID that the peer was allowed to speak for
	room := make([]raftpb.Message, 1) // for the messages of a batch: dragonboat copies them
	for {
		kind, err := readFrame(r, &buf)
		if err != nil {
			return err
		}
		switch kind {
		case frameBatch:
			// An empty slice would be made anew; what follows its first message is decoded.
			m := raftpb.MessageBatch{Requests: room[:1]}
			if err := m.Unmarshal(buf.Bytes()); err != nil {
				return err
			}
			if room = m.Requests; cap(room) > keepRequests {
				room = make([]raftpb.Message, 1)
			}
			m.Requests = m.Requests[1:]
			if m.DeploymentId != t.stamp() {
				return fmt.Errorf("peer %s: %w", m.SourceAddress, ErrOtherGeneration)
			}
			m.DeploymentId = deploymentID
			if t.cfg.Authorize != nil && m.SourceAddress != source {
				if err := t.cfg.Authorize(cert, m.SourceAddress); err != nil {
					return fmt.Errorf("peer speaks for %s: %w", m.SourceAddress, err)
				}
				source = m.SourceAddress
			}
			t.deliver(m)
			clear(m.Requests)
		case frameChunk:
			var k raftpb.Chunk
			if err := k.Unmarshal(buf.Bytes()); err != nil {
				return err
			}
			if k.DeploymentId != t.stamp() {
				return fmt.Errorf("a snapshot: %w", ErrOtherGeneration)
			}
			k.DeploymentId = deploymentID
			if err := t.authorizeChunk(cert, k); err != nil {
				return err
			}
			if !t.onChunk(k) {
				return errors.New("snapshot chunk refused")
			}
		case frameEnd:
			_, err := c.Write([]byte{1})
			return err
		case frameCall:
			ctx, cancel := context.WithTimeout(t.ctx, callTimeout)
			resp := t.onCall(ctx, cert, bytes.Clone(buf.Bytes()))
			cancel()
			_ = c.SetWriteDeadline(time.Now().Add(writeTimeout))
			if _, err := c.Write(appendFrame(nil, frameCall, resp)); err != nil {
				return err
			}
		default:
			return fmt.Errorf("frame of unknown kind %d", kind)
		}
		if buf.Cap() > keepBuffer {
			buf = bytes.Buffer{}
		}
	}
}

// authorizeChunk: a snapshot replaces all data, so it has to come from a member. A
// stranger makes itself known by its messages, which come before.
func (t *transport) authorizeChunk(cert *x509.Certificate, k raftpb.Chunk) error {
	if t.cfg.Authorize == nil {
		return nil
	}
	node, ok := t.member(k.ShardID, k.From)
	if !ok {
		return fmt.Errorf("snapshot from replica %d, which is no known member of shard %d", k.From, k.ShardID)
	}
	return t.cfg.Authorize(cert, node)
}

// deliver hands a batch to dragonboat, without the messages that it answers with
// a panic (those that only a replica sends to itself, or that have no receiver)
// and without those of strangers to their shard.
func (t *transport) deliver(m raftpb.MessageBatch) {
	kept := m.Requests[:0]
	for _, q := range m.Requests {
		switch q.Type {
		case raftpb.Election, raftpb.LeaderHeartbeat, raftpb.LocalTick, raftpb.CheckQuorum, raftpb.Unreachable,
			raftpb.SnapshotStatus, raftpb.BatchedReadIndex, raftpb.ConfigChangeEvent, raftpb.LogQuery:
			continue
		}
		if q.To == 0 || (t.cfg.Authorize != nil && !t.hears(q.ShardID, q.From, m.SourceAddress)) {
			continue
		}
		t.onRaft(q)
		kept = append(kept, q)
	}
	m.Requests = kept
	if len(kept) > 0 {
		t.onMsg(m)
	}
}

func readFrame(r io.Reader, buf *bytes.Buffer) (byte, error) {
	var h [frameHead]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return 0, err
	}
	n := int64(binary.BigEndian.Uint32(h[1:]))
	if n > maxFrame {
		return 0, fmt.Errorf("frame of %d bytes, at most %d are allowed", n, maxFrame)
	}
	buf.Reset()
	// CopyN grows the buffer with what really arrives, not with what is announced.
	_, err := io.CopyN(buf, r, n)
	return h[0], err
}

func appendFrame(b []byte, kind byte, payload []byte) []byte {
	b = append(b, kind)
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	return append(b, payload...)
}

func setDeadPeer(c net.Conn) {
	tc, ok := c.(*net.TCPConn)
	if !ok {
		return
	}
	if raw, err := tc.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = userTimeout(int(fd)) })
	}
}

func userTimeout(fd int) error {
	return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(deadPeer.Milliseconds()))
}

func (t *transport) dial(ctx context.Context, target string) (net.Conn, error) {
	id, addr := splitTarget(target)
	d := net.Dialer{
		Timeout:         dialTimeout,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: time.Second, Count: 3},
		Control: func(_, _ string, raw syscall.RawConn) error {
			return raw.Control(func(fd uintptr) { _ = userTimeout(int(fd)) })
		},
	}
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	if t.cfg.ClientTLS == nil {
		return c, nil
	}
	tc := tls.Client(c, t.cfg.ClientTLS(id))
	hctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	if err := tc.HandshakeContext(hctx); err != nil {
		_ = c.Close()
		return nil, fmt.Errorf("node %s at %s: %w", id, addr, err)
	}
	return tc, nil
}
