package host_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/lni/dragonboat/v4/raftio"
	"github.com/lni/dragonboat/v4/raftpb"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/internal/storetest"
)

const forgedTerm = 5000

// forge sends a leader's heartbeat of a far term, in the name of a replica.
func forge(t *testing.T, from, to *storetest.Node, replica, victim uint64) {
	t.Helper()
	b := raftpb.MessageBatch{DeploymentId: 0x5ce1, BinVer: raftio.TransportBinVersion, SourceAddress: from.ID,
		Requests: []raftpb.Message{{Type: raftpb.Heartbeat, ShardID: 1, From: replica, To: victim, Term: forgedTerm}}}
	payload := raftpb.MustMarshal(&b)
	frame := binary.BigEndian.AppendUint32([]byte{1}, uint32(len(payload)))
	conn := from.Dial(to)
	for range 3 {
		if _, err := conn.Write(append(frame, payload...)); err != nil {
			t.Fatal(err)
		}
	}
}

// What a node says that is no member of the shard is not heard, whatever replica it
// claims to be; the same words of a member are.
func TestOnlyMembersAreHeard(t *testing.T) {
	c := storetest.New(t, 4, nil)
	c.Voters(3)
	leader := c.Leader()
	victim := (leader + 1) % 3
	replica := func(i int) uint64 { return c.Nodes[i].Host().Status()[0].Replica }
	term := func() uint64 { return c.Nodes[victim].Host().Status()[0].Term }
	for _, claims := range []uint64{replica(leader), replica(victim), 999, 0} {
		forge(t, c.Nodes[3], c.Nodes[victim], claims, replica(victim))
	}
	put(t, c, victim, "/x", "1")
	// The inquiry about replica 999 is over when what it asks is known to be answered.
	time.Sleep(time.Second)
	forge(t, c.Nodes[3], c.Nodes[victim], 999, replica(victim))
	put(t, c, victim, "/x", "2")
	if got := term(); got >= forgedTerm {
		t.Fatalf("a stranger moved the term to %d", got)
	}
	forge(t, c.Nodes[leader], c.Nodes[victim], replica(leader), replica(victim))
	c.Until("a member to be heard", func() error {
		if got := term(); got < forgedTerm {
			return fmt.Errorf("term %d", got)
		}
		return nil
	})
	put(t, c, victim, "/x", "3")
}

// A voter was away while another joined that it has never heard of and that leads
// when it returns: it asks those that it knows.
func TestStrangerThatLeads(t *testing.T) {
	c := storetest.New(t, 4, nil)
	c.Voters(3)
	bg := ctx(t, 60*time.Second)
	c.Until("node 2 not to lead", func() error {
		if c.Leader() != 2 {
			return nil
		}
		return c.Nodes[2].Host().TransferLeadership(bg, storetest.Shard, 0)
	})
	c.Nodes[2].Kill()
	joined := c.AddTo(bg, storetest.Shard, 0, 3, true)
	c.Until("the new voter to lead", func() error {
		l := c.Leader()
		if l == 3 {
			return nil
		}
		return errors.Join(errors.New("not yet"), c.Nodes[l].Host().TransferLeadership(bg, storetest.Shard, joined))
	})
	// One of those that it knows goes for good.
	h := c.Nodes[3].Host()
	m, err := h.Membership(bg, storetest.Shard)
	if err != nil {
		t.Fatal(err)
	}
	for id, node := range m.Voters {
		if node == c.Nodes[0].ID {
			if err := h.ChangeMembership(bg, storetest.Shard, host.Remove, id, "", m.ConfigChangeID); err != nil {
				t.Fatal(err)
			}
		}
	}
	put(t, c, 3, "/x", "while away")
	c.Nodes[2].Start()
	start := time.Now()
	c.Until("it to catch up", func() error {
		if !c.Nodes[2].Host().Ready(storetest.Shard) {
			return fmt.Errorf("%+v", c.Nodes[2].Host().Status()[0])
		}
		return nil
	})
	t.Logf("heard after %v", time.Since(start).Round(10*time.Millisecond))
	if got := get(t, c, 2, "/x"); got != "while away" {
		t.Errorf("it reads %q", got)
	}
}

// An order alone does not delete a replica, nor does one to start a newer one.
func TestOrdersDoNotDestroy(t *testing.T) {
	c := storetest.New(t, 2, nil)
	c.Voters(1)
	put(t, c, 0, "/x", "kept")
	bg := ctx(t, 20*time.Second)
	id := c.Add(bg, 0, 1, false)
	h := c.Nodes[1].Host()
	if err := h.DropRemoved(bg, storetest.Shard, id); !errors.Is(err, host.ErrNotRemoved) {
		t.Errorf("drop: %v", err)
	}
	if err := h.StartReplica(bg, storetest.Shard, id+100); !errors.Is(err, host.ErrNotRemoved) {
		t.Errorf("start: %v", err)
	}
	if got := get(t, c, 1, "/x"); got != "kept" {
		t.Errorf("it reads %q", got)
	}
	m, err := c.Nodes[0].Host().Membership(bg, storetest.Shard)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Nodes[0].Host().ChangeMembership(bg, storetest.Shard, host.Remove, id, "", m.ConfigChangeID); err != nil {
		t.Fatal(err)
	}
	c.Until("the removed one to be dropped", func() error { return h.DropRemoved(bg, storetest.Shard, id) })
}

// Orders are heard from members alone: by voters, and by a node without a replica,
// which asks those that it knows of.
func TestOrdersOfStrangersAreRefused(t *testing.T) {
	c := storetest.New(t, 5, nil)
	c.Voters(3)
	for _, who := range []int{0, 1, 2, 4} { // node 4 has no replica
		h := c.Nodes[who].Host()
		if err := h.Heeds(c.Nodes[3].ID); err == nil {
			t.Errorf("node %d heeds node 3, which is no member", who)
		}
		for _, member := range []int{0, 1, 2} {
			if err := h.Heeds(c.Nodes[member].ID); err != nil {
				t.Errorf("node %d: %v", who, err)
			}
		}
	}
}
