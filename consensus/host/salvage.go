package host

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/lni/dragonboat/v4/raftpb"
	dsm "github.com/lni/dragonboat/v4/statemachine"

	"skein.io/skein/consensus/mvcc"
	"skein.io/skein/consensus/shard"
)

// Wreck is what this node has of a shard, and who else of it is there.
type Wreck struct {
	Shard   string
	Replica uint64 // this node's
	// Voters as this node last knew them; Answering are those of them, with this
	// node, whose replicas answered.
	Voters    []Member
	Answering []Member
	// Ahead are replicas on other nodes that answered and have applied more.
	Ahead []Member
	// Leader is somebody that leads now; zero for none.
	Leader Member
	// Applied is the last log index in the database here, Committed the last one
	// known to be, Last the end of the log here.
	Applied, Committed, Last uint64
	Revision                 int64
	// Contact is when a leader was last heard, zero when that is not known.
	Contact time.Time
}

// Quorum is how many voters are a majority.
func (w Wreck) Quorum() int { return len(w.Voters)/2 + 1 }

// Lost tells whether the shard has no majority any more.
func (w Wreck) Lost() bool { return len(w.Answering) < w.Quorum() && w.Leader == (Member{}) }

// Inspect looks at all shards for at least the given time, in which a leader may
// turn up. Errors are ErrNoReplica and those of the log.
func (h *Host) Inspect(ctx context.Context, atLeast time.Duration) ([]Wreck, error) {
	contacts := h.loadContacts()
	select {
	case <-time.After(atLeast):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	var out []Wreck
	for _, s := range h.cfg.Shards.Shards() {
		r, err := h.byName(s.Name)
		if err != nil {
			return nil, fmt.Errorf("recover: %w", err)
		}
		w, err := r.inspect(ctx)
		if err != nil {
			return nil, fmt.Errorf("recover: shard %s: %w", s.Name, err)
		}
		w.Contact = contacts[s.Name]
		out = append(out, w)
	}
	return out, nil
}

func (r *replica) inspect(ctx context.Context) (Wreck, error) {
	log, err := r.h.nh.GetLogReader(uint64(r.shard.ID))
	if err != nil {
		return Wreck{}, err
	}
	state, _ := log.NodeState()
	_, last := log.GetRange()
	w := Wreck{Shard: r.shard.Name, Replica: r.id, Applied: r.machine.Applied(), Committed: max(state.Commit, r.machine.Applied()), Last: max(last, r.machine.Applied()), Revision: r.machine.Rev()}
	voters := r.localVoters()
	leader, _ := r.Leader()
	for _, id := range slices.Sorted(maps.Keys(voters)) {
		m := Member{Replica: id, NodeHostID: voters[id], Node: r.h.cfg.Name(voters[id])}
		w.Voters = append(w.Voters, m)
		if id == leader {
			w.Leader = m
		}
		if id == r.id {
			w.Answering = append(w.Answering, m)
			continue
		}
		p, err := r.h.Progress(ctx, m.NodeHostID, r.shard.Name)
		if err == nil && p.Replica == id {
			w.Answering = append(w.Answering, m)
			if p.Applied > w.Applied {
				w.Ahead = append(w.Ahead, m)
			}
		}
	}
	return w, nil
}

// localVoters are the voters in the membership that the replica has applied.
func (r *replica) localVoters() map[uint64]string {
	if info := r.h.nh.GetNodeHostInfo(nodeHostInfo); info != nil {
		for _, i := range info.ShardInfoList {
			if i.ShardID == uint64(r.shard.ID) && i.ReplicaID == r.id {
				return i.Replicas
			}
		}
	}
	return nil
}

// maxTail bounds what Salvage reads of one shard's log into memory, in bytes.
const maxTail = 1 << 30

// Salvage writes the database of every replica here, with everything that its
// log holds, into dir, ready for Rebuild there. Entries that are in the log and
// not known to be committed count: somebody may have been told that they are. It
// closes the Host, and leaves its directory as it is.
func (h *Host) Salvage(ctx context.Context, dir, reason string, bump int64) error {
	type rest struct {
		s       shard.Shard
		from    string
		entries []dsm.Entry
	}
	var all []rest
	for _, s := range h.cfg.Shards.Shards() {
		r, err := h.byName(s.Name)
		if err != nil {
			return errors.Join(fmt.Errorf("recover: %w", err), h.Close(ctx))
		}
		entries, err := r.tail()
		if err != nil {
			return errors.Join(fmt.Errorf("recover: the log of shard %s: %w", s.Name, err), h.Close(ctx))
		}
		all = append(all, rest{s, h.machineDir(s.ID, r.id), entries})
	}
	if err := h.Close(ctx); err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	for _, x := range all {
		if err := salvage(x.from, RebuildDir(dir, x.s.ID), x.entries, reason, bump); err != nil {
			return fmt.Errorf("recover: shard %s: %w", x.s.Name, err)
		}
	}
	return nil
}

// tail are the entries of the log that the database may not have.
func (r *replica) tail() (out []dsm.Entry, err error) {
	log, err := r.h.nh.GetLogReader(uint64(r.shard.ID))
	if err != nil {
		return nil, err
	}
	first, last := log.GetRange()
	size := 0
	for next := max(first, r.machine.Applied()+1); next <= last; {
		entries, err := log.Entries(next, last+1, 64<<20)
		if err != nil {
			return nil, err
		}
		if len(entries) == 0 {
			return nil, fmt.Errorf("entry %d of %d is missing", next, last)
		}
		for _, e := range entries {
			if e.Index != next {
				return nil, fmt.Errorf("entry %d is where %d should be", e.Index, next)
			}
			cmd, err := command(e)
			if err != nil {
				return nil, fmt.Errorf("entry %d: %w", e.Index, err)
			}
			if size += len(cmd); size > maxTail {
				return nil, fmt.Errorf("more than %d bytes are not in the database", maxTail)
			}
			out = append(out, dsm.Entry{Index: e.Index, Cmd: slices.Clone(cmd)})
			next++
		}
	}
	return out, nil
}

// command is what dragonboat would hand to the state machine; nil for an entry
// that is not for it. We configure neither compression nor sessions.
func command(e raftpb.Entry) ([]byte, error) {
	switch {
	case e.Type == raftpb.ConfigChangeEntry || len(e.Cmd) == 0:
		return nil, nil
	case e.Type == raftpb.ApplicationEntry:
		return e.Cmd, nil
	case e.Type == raftpb.EncodedEntry && e.Cmd[0] == 0: // version 0, no compression, no session
		return e.Cmd[1:], nil
	}
	return nil, fmt.Errorf("of type %v with header %#x, which this version does not write", e.Type, e.Cmd[0])
}

func salvage(from, to string, entries []dsm.Entry, reason string, bump int64) error {
	path, err := mvcc.Database(from)
	if err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	err = mvcc.PlaceImage(to, f)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	m := mvcc.New(mvcc.Config{Dir: to})
	index, err := m.Open(nil)
	if err != nil {
		return err
	}
	for len(entries) > 0 && entries[0].Index <= index {
		entries = entries[1:]
	}
	if len(entries) > 0 && entries[0].Index != index+1 {
		err = fmt.Errorf("the database ends with entry %d, the log begins with %d", index, entries[0].Index)
	} else if len(entries) > 0 {
		_, err = m.Update(entries)
	}
	if err = errors.Join(err, m.Close()); err != nil {
		return err
	}
	_, err = mvcc.Rebase(to, bump, reason)
	return err
}

// contactFile in Dir remembers when leaders were last heard.
const contactFile = "contact.json"

// SaveContacts remembers when each shard's leader was last heard in this life,
// for Inspect in a later one. It is worth a call when contact is lost, and at the
// end.
func (h *Host) SaveContacts() error {
	seen := h.loadContacts()
	for _, s := range h.cfg.Shards.Shards() {
		if r := h.replica(s.ID); r != nil && r.heard.Load() {
			seen[s.Name] = time.Now().Add(-r.SinceContact()).UTC().Truncate(time.Second)
		}
	}
	return writeContacts(filepath.Join(h.cfg.Dir, contactFile), seen)
}
