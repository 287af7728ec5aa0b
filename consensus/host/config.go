package host

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"time"

	"github.com/google/uuid"

	"skein.io/skein/consensus/etcdapi"
	"skein.io/skein/consensus/shard"
	"skein.io/skein/consensus/space"
)

// Config of a Host. The zero value of an optional field means its default.
type Config struct {
	// NodeName appears in logs. Required.
	NodeName string
	// NodeHostID names this node in the membership of its shards for ever, also
	// when its address changes. A UUID. Empty: the one in Dir, made at first start.
	NodeHostID string
	// Dir holds logs, snapshots and databases; nothing else may be in it. Required.
	Dir string
	// ListenAddr is the address of the Raft transport, host:port. Port 0 picks one
	// (see Host.Addr). Required.
	ListenAddr string

	// ServerTLS terminates connections of other nodes; it must demand and verify
	// their certificates. ClientTLS returns what to dial a node with, and should
	// verify that it is that node. Both or neither; without, the transport is
	// neither encrypted nor authenticated, which only tests want.
	ServerTLS *tls.Config
	ClientTLS func(nodeHostID string) *tls.Config
	// Authorize, if set, decides whether the bearer of a verified certificate may
	// speak for a NodeHostID. An error closes the connection.
	Authorize func(cert *x509.Certificate, nodeHostID string) error

	// Resolve returns the present transport address (host:port) of a node, as
	// gossip knows it. Called for every message: it must be fast. Required.
	Resolve func(nodeHostID string) (addr string, ok bool)
	// Peers returns the NodeHostIDs of the nodes that are alive. A replica without
	// a leader asks them whether it has been removed. Optional.
	Peers func() []string
	// Name returns the name of a node, for Status. Optional; default is the ID.
	Name func(nodeHostID string) string

	// OnRemoved is told that a replica here has lost its membership and has been
	// stopped; Removed.Clear deletes what is left of it. It is called after New,
	// without locks held, once a start of the replica, and may call methods of the
	// Host other than Close. Optional.
	OnRemoved func(Removed)

	// VerifyGeneration returns the number, above 0, of the generation that a proof is
	// for, or why it is none of this cluster's (see Host.Adopt). Without it there is
	// generation 0 alone.
	VerifyGeneration func(proof []byte) (uint64, error)

	// Full, if set, tells why this node has no room for more data, nil while it has.
	// Requests made here that make the store grow are refused with it, others are
	// not, so that things can be deleted. It must be fast. Optional.
	Full func() error

	// Batch tells whether every node of the cluster understands entries of the log
	// that hold several commands (identity.BatchLevel); it is asked twice in an election
	// timeout. Default: yes.
	Batch func() bool

	// Shards is the table of all shards. Default shard.Default().
	Shards shard.Table

	// Etcd serves etcd's API over gRPC. Default: not at all.
	Etcd EtcdConfig

	// RTT is the unit of Raft's clock; default 50 ms. Elections start after
	// ElectionRTT to 2*ElectionRTT units of silence (default 10, so 0.5 to 1 s: a
	// dead leader costs about a second), heartbeats are sent every HeartbeatRTT
	// units (default 2). Slow links want a longer RTT.
	RTT          time.Duration
	ElectionRTT  uint64
	HeartbeatRTT uint64

	// SnapshotEntries bounds the log: after so many entries it is cut down to
	// CompactionOverhead (defaults 10000, as etcd, and 5000). MaxLogBytes does so
	// by size as well (default 64 MiB).
	SnapshotEntries    uint64
	CompactionOverhead uint64
	MaxLogBytes        uint64

	// Space bounds what the shards hold: quota, compaction, defragmentation.
	Space space.Config

	// RequestTimeout bounds every request that has no earlier deadline, to a tenth more; default
	// 5 s plus two elections, as etcd.
	RequestTimeout time.Duration

	// Disk says when this node's disk counts as slow (Host.Disk).
	Disk DiskRules
	// MeasureDisk makes a small write durable and tells how long that took. Default:
	// a block of 4 KiB in Dir.
	MeasureDisk func() (time.Duration, error)

	// WatchProgress is how often an idle watch that asks for it is told the
	// revision; default 10 min, as etcd.
	WatchProgress time.Duration

	// Logger; nil discards. Dragonboat's log goes there as debug output; in a
	// process with several hosts that of all goes to the newest one's.
	Logger *slog.Logger
}

func (c *Config) setDefaults() {
	if len(c.Shards.Shards()) == 0 {
		c.Shards = shard.Default()
	}
	if c.RTT == 0 {
		c.RTT = 50 * time.Millisecond
	}
	for p, v := range map[*uint64]uint64{
		&c.ElectionRTT: 10, &c.HeartbeatRTT: 2, &c.SnapshotEntries: 10000, &c.CompactionOverhead: 5000, &c.MaxLogBytes: 64 << 20,
	} {
		if *p == 0 {
			*p = v
		}
	}
	c.Space.SetDefaults()
	c.Etcd.setDefaults()
	if c.RequestTimeout == 0 {
		c.RequestTimeout = 5*time.Second + 2*c.electionTimeout()
	}
	if c.WatchProgress == 0 {
		c.WatchProgress = etcdapi.DefaultProgress
	}
	c.Disk.setDefaults()
	if c.MeasureDisk == nil {
		path := filepath.Join(c.Dir, "probe")
		c.MeasureDisk = func() (time.Duration, error) { return measureDisk(path) }
	}
	if c.Batch == nil {
		c.Batch = func() bool { return true }
	}
	if c.Peers == nil {
		c.Peers = func() []string { return nil }
	}
	if c.Name == nil {
		c.Name = func(id string) string { return id }
	}
	if c.OnRemoved == nil {
		c.OnRemoved = func(Removed) {}
	}
}

// Validate reports everything that is wrong with the configuration.
func (c Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.NodeName == "" {
		bad("NodeName is empty")
	}
	if c.Dir == "" {
		bad("Dir is empty")
	}
	if c.NodeHostID != "" {
		if _, err := uuid.Parse(c.NodeHostID); err != nil {
			bad("NodeHostID %q: %v", c.NodeHostID, err)
		}
	}
	if _, _, err := net.SplitHostPort(c.ListenAddr); err != nil {
		bad("ListenAddr %q: %v", c.ListenAddr, err)
	}
	if (c.ServerTLS == nil) != (c.ClientTLS == nil) {
		bad("ServerTLS and ClientTLS: one is set, the other is not")
	}
	if c.Resolve == nil {
		bad("Resolve is nil")
	}
	if c.RTT < time.Millisecond || c.RTT%time.Millisecond != 0 {
		bad("RTT %v: it has to be a whole number of milliseconds", c.RTT)
	}
	if c.ElectionRTT <= 2*c.HeartbeatRTT {
		bad("ElectionRTT %d: it has to exceed twice HeartbeatRTT (%d)", c.ElectionRTT, c.HeartbeatRTT)
	}
	if c.CompactionOverhead >= c.SnapshotEntries {
		bad("CompactionOverhead %d: it has to be below SnapshotEntries (%d)", c.CompactionOverhead, c.SnapshotEntries)
	}
	if c.RequestTimeout < c.electionTimeout() {
		bad("RequestTimeout %v is shorter than an election (%v)", c.RequestTimeout, c.electionTimeout())
	}
	if err := c.Space.Validate(); err != nil {
		bad("Space: %w", err)
	}
	if err := c.Disk.validate(); err != nil {
		errs = append(errs, err)
	}
	if err := c.Etcd.validate(len(c.Shards.Shards())); err != nil {
		bad("Etcd: %w", err)
	}
	if len(errs) > 0 {
		return fmt.Errorf("host config: %w", errors.Join(errs...))
	}
	return nil
}

func (c Config) electionTimeout() time.Duration { return time.Duration(c.ElectionRTT) * c.RTT }
