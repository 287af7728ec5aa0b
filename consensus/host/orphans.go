package host

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/lni/dragonboat/v4/raftio"

	"skein.io/skein/consensus/shard"
)

// removeOrphans deletes databases of replicas that the log does not know: a crash
// came between the deletion of a replica's log and that of its database. Where
// the log knows nothing at all, nothing is touched: a database without a log may
// be all that is left of a store, or wait to be founded on (Rebuild).
func (h *Host) removeOrphans(logs []raftio.NodeInfo) error {
	known := map[string]bool{}
	shards := map[uint64]bool{}
	for _, i := range logs {
		known[filepath.Base(h.machineDir(shard.ID(i.ShardID), i.ReplicaID))] = true
		shards[i.ShardID] = true
	}
	ents, err := os.ReadDir(h.cfg.Dir)
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	for _, e := range ents {
		var s, r uint64
		if n, err := fmt.Sscanf(e.Name(), "shard-%d-replica-%d", &s, &r); n != 2 || err != nil || !shards[s] || known[e.Name()] ||
			e.Name() != filepath.Base(h.machineDir(shard.ID(s), r)) {
			continue
		}
		if err := os.RemoveAll(filepath.Join(h.cfg.Dir, e.Name())); err != nil {
			return fmt.Errorf("delete what is left of replica %d of shard %d: %w", r, s, err)
		}
		h.log.Info("deleted what was left of a replica", "shard", s, "replica", r)
	}
	return nil
}
