package host

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/lni/dragonboat/v4"

	"skein.io/skein/consensus/mvcc"
	"skein.io/skein/consensus/shard"
)

// RebuildDir is where, in a store's directory, Rebuild expects the database of a
// shard.
func RebuildDir(dir string, id shard.ID) string { return replicaDir(dir, id, founder) }

func replicaDir(dir string, id shard.ID, replicaID uint64) string {
	return filepath.Join(dir, fmt.Sprintf("shard-%d-replica-%d", id, replicaID))
}

// Rebuild makes a store with one voter, cfg.NodeHostID, of databases: those of all
// shards, rebased (mvcc.Rebase), lie in cfg.Dir (RebuildDir), with the proof of
// the new generation (WriteGeneration), and nothing else does. A Host that is
// started on the directory later goes on from there. It listens on no address
// that others know. After an error the directory is worth nothing.
//
// A replica that joins gets the log or, where the log begins later than at its
// first entry, a snapshot. The databases are in no log, so Rebuild ends only when
// the log of every shard has been cut behind its first entries.
func Rebuild(ctx context.Context, cfg Config) (err error) {
	cfg.ListenAddr = "127.0.0.1:0"
	cfg.Resolve = func(string) (string, bool) { return "", false }
	cfg.Peers, cfg.OnRemoved, cfg.ServerTLS, cfg.ClientTLS = nil, nil, nil, nil
	h, err := New(cfg)
	if err != nil {
		return fmt.Errorf("rebuild: %w", err)
	}
	defer func() { err = errors.Join(err, h.Close(ctx)) }()
	if err := h.Bootstrap(ctx); err != nil {
		return fmt.Errorf("rebuild: %w", err)
	}
	for _, s := range h.cfg.Shards.Shards() {
		if err := h.cutLog(ctx, s); err != nil {
			return fmt.Errorf("rebuild: shard %s: %w", s.Name, err)
		}
	}
	return nil
}

func (h *Host) cutLog(ctx context.Context, s shard.Shard) error {
	log, err := h.nh.GetLogReader(uint64(s.ID))
	if err != nil {
		return err
	}
	for {
		attempt, cancel := context.WithTimeout(ctx, 5*time.Second)
		_, err := h.nh.SyncRequestSnapshot(attempt, uint64(s.ID), dragonboat.SnapshotOption{OverrideCompactionOverhead: true, CompactionOverhead: 1})
		cancel()
		if first, _ := log.GetRange(); first > 1 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the log still begins with its first entry: %w", errors.Join(err, ctx.Err()))
		case <-time.After(commandPause):
		}
		// A release of nothing changes nothing: there is something new to cut behind.
		if r, err := h.byName(s.Name); err == nil {
			_ = r.holdCommand(ctx, mvcc.KindRelease, h.ids.Next())
		}
	}
}
