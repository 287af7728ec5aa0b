package host

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/lni/dragonboat/v4"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"skein.io/skein/consensus/etcdapi"
	"skein.io/skein/consensus/mvcc"
)

// cutOff is how many election timeouts without a leader it takes until requests
// are refused at once instead of waiting for one; the number at which etcd ends
// watches that need a leader.
const cutOff = 3

// noLeader refuses a request that needs a leader. It is etcd's error of that name,
// with the reason.
type noLeader struct {
	shard string
	since time.Duration
}

func (e noLeader) Error() string {
	return fmt.Sprintf("etcdserver: no leader: shard %s has heard none for %v: a majority of its voters cannot be reached from here", e.shard, e.since.Round(100*time.Millisecond))
}

func (e noLeader) GRPCStatus() *status.Status { return status.New(codes.Unavailable, e.Error()) }

func (e noLeader) Is(err error) bool {
	return err == error(rpctypes.ErrNoLeader) || err == rpctypes.ErrGRPCNoLeader
}

// unreachable is an error while this replica is cut off from its leader.
func (r *replica) unreachable() error {
	if d := r.SinceContact(); d >= cutOff*r.ElectionTimeout() {
		return noLeader{r.shard.Name, d}
	}
	return nil
}

// Silence is how long this node's replica of a shard has heard no leader (0 on the
// leader), and whether that is so long that requests are refused; false also where
// there is no replica.
func (h *Host) Silence(shardName string) (since time.Duration, cutOff bool) {
	r, err := h.byName(shardName)
	if err != nil || r.ctx.Err() != nil {
		return 0, false
	}
	return r.SinceContact(), r.unreachable() != nil
}

// WithLocalReads makes reads under ctx be answered from the local replica as it is,
// as if each asked for it (Serializable): also without a leader.
func WithLocalReads(ctx context.Context) context.Context { return etcdapi.WithLocalReads(ctx) }

type patientKey struct{}

// patient makes requests under ctx wait for a leader until their deadline.
func patient(ctx context.Context) context.Context {
	return context.WithValue(ctx, patientKey{}, true)
}

func isPatient(ctx context.Context) bool { return ctx.Value(patientKey{}) != nil }

// contactLoop notices when entries may hold several commands, or may not any more, and tells those that wait for a result, which may come or not, when this
// replica is cut off: they would wait for their deadline.
func (r *replica) contactLoop() {
	t := time.NewTicker(r.ElectionTimeout() / 2)
	defer t.Stop()
	lost := false
	for {
		select {
		case <-r.ctx.Done():
			return
		case <-t.C:
		}
		r.mayBatch.Store(r.h.cfg.Batch())
		now := r.unreachable() != nil
		if now {
			r.machine.Waiters().Abandon(mvcc.ErrLost)
		}
		if now != lost {
			lost = now
			r.wake() // reads that wait for a leader
			r.h.notify()
		}
	}
}

var nodeHostInfo = dragonboat.NodeHostInfoOption{SkipLogInfo: true}

// loadContacts is empty when nothing is known: it is for people only.
func (h *Host) loadContacts() map[string]time.Time {
	out := map[string]time.Time{}
	b, err := os.ReadFile(filepath.Join(h.cfg.Dir, contactFile))
	if err == nil && json.Unmarshal(b, &out) != nil {
		return map[string]time.Time{}
	}
	return out
}

func writeContacts(path string, seen map[string]time.Time) error {
	b, err := json.Marshal(seen)
	if err != nil {
		return err
	}
	if err := writeSync(path+".tmp", b); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	return os.Rename(path+".tmp", path)
}
