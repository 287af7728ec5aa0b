package host

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"skein.io/skein/consensus/shard"
)

// A cluster's Raft groups are replaced by new ones when it is restored from a
// backup or recovered from the loss of its majority. That begins the next
// generation. A member of an older one that comes back must not be heard: it may
// have what the new one does not, and IDs and terms of the two mean nothing to
// each other. So every message carries a stamp of the generation, and what has
// another stamp is refused.
//
// A generation is proven by a document that only a holder of the cluster's keys
// can make: nobody else can make a node give up its replicas.

// generationFile in Dir holds the proof; there is none in generation 0.
const generationFile = "generation"

// termBits of a term are Raft's; those above are the generation, so that the
// terms of a later generation are above all of the ones before.
const termBits = 40

// drainQueues is how long the queues of a muted transport have to become empty;
// they are emptied as fast as a goroutine runs.
const drainQueues = 200 * time.Millisecond

// ErrOtherGeneration is the answer to a node of another generation.
var ErrOtherGeneration = errors.New("host: the node belongs to another generation of the cluster, before or after a restore or recovery")

type generation struct {
	number uint64
	proof  []byte
	// stamp of messages: deploymentID in generation 0, else made of the proof, so
	// that two recoveries of one cluster do not mix either.
	stamp uint64
}

func newGeneration(number uint64, proof []byte) *generation {
	if number == 0 {
		return &generation{stamp: deploymentID}
	}
	sum := sha256.Sum256(proof)
	return &generation{number: number, proof: proof, stamp: binary.BigEndian.Uint64(sum[:])}
}

// term makes Raft's term one of the cluster's.
func (g *generation) term(raft uint64) uint64 { return g.number<<termBits | raft }

// callStamp is the stamp in calls, whose format is older than generations.
func (g *generation) callStamp() uint64 {
	if g.number == 0 {
		return 0
	}
	return g.stamp
}

// RaftTerm is the part of a term that Raft counts.
func RaftTerm(term uint64) uint64 { return term & (1<<termBits - 1) }

func loadGeneration(c *Config) (*generation, error) {
	path := filepath.Join(c.Dir, generationFile)
	proof, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return newGeneration(0, nil), nil
	}
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	number, err := c.verifyGeneration(proof)
	if err != nil {
		return nil, fmt.Errorf("store: %s: %w", path, err)
	}
	return newGeneration(number, proof), nil
}

func (c *Config) verifyGeneration(proof []byte) (uint64, error) {
	if c.VerifyGeneration == nil {
		return 0, errors.New("this node cannot verify a generation")
	}
	n, err := c.VerifyGeneration(proof)
	if err == nil && (n == 0 || n >= 1<<(64-termBits)) {
		err = fmt.Errorf("generation %d is impossible", n)
	}
	return n, err
}

// WriteGeneration makes a store's directory that of a generation, durably.
func WriteGeneration(dir string, proof []byte) error {
	path := filepath.Join(dir, generationFile)
	if err := writeSync(path+".tmp", proof); err != nil {
		return fmt.Errorf("store: remember the generation: %w", err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		return fmt.Errorf("store: remember the generation: %w", err)
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Generation is the number of restores and recoveries that this node knows of,
// with the proof of the last, nil in generation 0.
func (h *Host) Generation() (number uint64, proof []byte) {
	g := h.gen.Load()
	return g.number, g.proof
}

// FetchGeneration asks a node for its generation's proof, nil in generation 0.
func (h *Host) FetchGeneration(ctx context.Context, nodeHostID string) ([]byte, error) {
	resp, err := h.call(ctx, nodeHostID, callRequest{Method: methodGeneration})
	return resp.Proof, err
}

// Adopt makes this node one of a later generation: its replicas belong to groups
// that have been replaced, so they are stopped and deleted; the leader gives it
// new ones. It does nothing when the generation is not later than this node's.
func (h *Host) Adopt(ctx context.Context, proof []byte) (adopted bool, err error) {
	number, err := h.cfg.verifyGeneration(proof)
	if err != nil {
		return false, fmt.Errorf("store: adopt a generation: %w", err)
	}
	h.op.Lock()
	defer h.op.Unlock()
	if h.ctx.Err() != nil {
		return false, ErrClosed
	}
	if number <= h.gen.Load().number {
		return false, nil
	}
	// What the replicas have put into queues must not go out with a new stamp.
	h.trans.muted.Store(true)
	defer h.trans.muted.Store(false)
	for _, s := range h.cfg.Shards.Shards() {
		if r := h.replica(s.ID); r != nil {
			h.stop(r)
		}
	}
	select {
	case <-time.After(drainQueues):
	case <-ctx.Done():
		return false, ctx.Err()
	}
	// The data goes first: a replica of the old generation must not wake up in the
	// new one.
	for _, s := range h.cfg.Shards.Shards() {
		if err := h.removeAll(ctx, s.ID); err != nil {
			return false, err
		}
		h.reg.RemoveShard(uint64(s.ID)) // replica IDs mean others now
	}
	if err := WriteGeneration(h.cfg.Dir, proof); err != nil {
		return false, err
	}
	h.gen.Store(newGeneration(number, proof))
	h.log.Warn("joined a later generation of the cluster; the replicas of the one before were deleted", "generation", number)
	h.notify()
	return true, nil
}

func (h *Host) removeAll(ctx context.Context, id shard.ID) error {
	for _, replicaID := range h.onDisk(id) {
		if err := h.removeData(ctx, id, replicaID); err != nil {
			return err
		}
	}
	return nil
}
