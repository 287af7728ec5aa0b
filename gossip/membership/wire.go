package membership

import (
	"bytes"
	"context"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/hashicorp/go-msgpack/v2/codec"
	"github.com/hashicorp/memberlist"
)

// tagMagic marks tags, as serf writes them before their MessagePack form (serf.tagMagicByte).
const tagMagic = 255

// decodeTags reads the tags of a node that serf does not list (yet). Tags that cannot be read are none.
func decodeTags(meta []byte) map[string]string {
	tags := map[string]string{}
	if len(meta) == 0 || meta[0] != tagMagic || len(meta) > memberlist.MetaMaxSize {
		return tags
	}
	if err := codec.NewDecoder(bytes.NewReader(meta[1:]), &codec.MsgpackHandle{}).Decode(&tags); err != nil || tags == nil {
		return map[string]string{}
	}
	return tags
}

func encodeTags(tags map[string]string) ([]byte, error) {
	var buf bytes.Buffer
	buf.WriteByte(tagMagic)
	err := codec.NewEncoder(&buf, &codec.MsgpackHandle{}).Encode(tags)
	return buf.Bytes(), err
}

// checkTags refuses what would not fit; serf's own check has no counts.
func checkTags(tags map[string]string) error {
	raw, err := encodeTags(tags)
	if err != nil {
		return fmt.Errorf("tags: %w", err)
	}
	if len(raw) > memberlist.MetaMaxSize {
		return fmt.Errorf("tags: %d tags take %d bytes, at most %d are possible", len(tags), len(raw), memberlist.MetaMaxSize)
	}
	return nil
}

// transport is memberlist's, with dials that end when the node shuts down instead of after their time-out, and that leave
// from the node's own address, so that a node with several looks the same in both directions.
type transport struct {
	*memberlist.NetTransport
	ctx         context.Context
	dialer      net.Dialer
	unreachable func(netip.AddrPort) bool // tests
}

func newTransport(ctx context.Context, cfg *Config, logger *log.Logger) (*transport, error) {
	inner, err := memberlist.NewNetTransport(&memberlist.NetTransportConfig{
		BindAddrs: []string{cfg.Addr.String()}, BindPort: int(cfg.Port), Logger: logger,
	})
	if err != nil {
		return nil, explainBind(cfg, err)
	}
	return &transport{
		NetTransport: inner, ctx: ctx,
		dialer:      net.Dialer{LocalAddr: &net.TCPAddr{IP: cfg.Addr.AsSlice()}},
		unreachable: cfg.unreachable,
	}, nil
}

// explainBind says what to do. memberlist flattens the cause to text.
func explainBind(cfg *Config, err error) error {
	at := netip.AddrPortFrom(cfg.Addr, cfg.Port)
	switch text := err.Error(); {
	case strings.Contains(text, "address already in use"):
		return fmt.Errorf("gossip: %s is in use by another program: stop it (`ss -lntup sport = :%d` shows it) or choose another gossip port: %w",
			at, cfg.Port, ErrPortBusy)
	case strings.Contains(text, "cannot assign requested address"):
		return fmt.Errorf("gossip: %s is not an address of this machine: choose one of those that `ip -brief address` shows", cfg.Addr)
	default:
		return fmt.Errorf("gossip: listening on %s: %w", at, err)
	}
}

// DialAddressTimeout opens a stream to another member.
func (t *transport) DialAddressTimeout(addr memberlist.Address, timeout time.Duration) (net.Conn, error) {
	return t.DialTimeout(addr.Addr, timeout)
}

// DialTimeout opens a stream to another member.
func (t *transport) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	if t.cutOff(addr) {
		return nil, fmt.Errorf("dial %s: cut off", addr)
	}
	ctx, cancel := context.WithTimeout(t.ctx, timeout)
	defer cancel()
	conn, err := t.dialer.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	return &boundConn{Conn: conn, stop: context.AfterFunc(t.ctx, func() { conn.Close() })}, nil
}

// WriteToAddress sends a packet.
func (t *transport) WriteToAddress(b []byte, addr memberlist.Address) (time.Time, error) {
	return t.WriteTo(b, addr.Addr)
}

// WriteTo sends a packet.
func (t *transport) WriteTo(b []byte, addr string) (time.Time, error) {
	if t.cutOff(addr) {
		return time.Now(), nil // as if it were lost on the way
	}
	return t.NetTransport.WriteTo(b, addr)
}

func (t *transport) cutOff(addr string) bool {
	if t.unreachable == nil {
		return false
	}
	at, err := netip.ParseAddrPort(addr)
	return err == nil && t.unreachable(at)
}

// boundConn is a connection that its context closes.
type boundConn struct {
	net.Conn
	stop func() bool
}

func (c *boundConn) Close() error {
	c.stop()
	return c.Conn.Close()
}

// libraryLog passes on what serf and memberlist log as text ("[WARN] memberlist: ..."), one level quieter than they call it:
// what they report as an error is mostly a peer that does not answer.
type libraryLog struct{ log *slog.Logger }

var libraryLevels = map[string]slog.Level{
	"[ERR]": slog.LevelWarn, "[WARN]": slog.LevelInfo, "[INFO]": slog.LevelDebug, "[DEBUG]": slog.LevelDebug - 4, "[TRACE]": slog.LevelDebug - 8,
}

func (l libraryLog) Write(line []byte) (int, error) {
	word, rest, _ := strings.Cut(strings.TrimSpace(string(line)), " ")
	level, ok := libraryLevels[word]
	if !ok {
		level, rest = slog.LevelInfo, strings.TrimSpace(string(line))
	}
	if source, text, ok := strings.Cut(rest, ": "); ok && (source == "serf" || source == "memberlist") {
		l.log.Log(context.Background(), level, text, "library", source)
	} else {
		l.log.Log(context.Background(), level, rest)
	}
	return len(line), nil
}
