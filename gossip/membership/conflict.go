package membership

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/hashicorp/memberlist"

	"skein.io/skein/gossip/health"
	"skein.io/skein/gossip/identity"
)

var (
	// ErrNameTaken says that another living node has this node's name, and keeps it.
	ErrNameTaken = errors.New("the node's name is taken")
	// ErrPortBusy says that another program has the gossip port.
	ErrPortBusy = errors.New("port in use")
	// errFormerAddress says that the others still believe in this node's former address.
	errFormerAddress = errors.New("the others still see this node at its former address")
)

// Conflict is two nodes that claim one name.
type Conflict struct {
	Name  string
	Known netip.AddrPort // who had the name first, as far as this node knows
	Other netip.AddrPort // who claims it too
	Self  bool           // it is this node's name
}

// String says what to do.
func (c Conflict) String() string {
	return fmt.Sprintf("two nodes are called %q: %s and %s; give one of them another name (leave, then join with --name)", c.Name, c.Known, c.Other)
}

// claim is a node that memberlist is about to believe in.
type claim struct {
	name string
	addr netip.AddrPort
	tags map[string]string
}

func claimOf(n *memberlist.Node) claim {
	addr, _ := netip.AddrFromSlice(n.Addr)
	return claim{n.Name, netip.AddrPortFrom(addr.Unmap(), n.Port), decodeTags(n.Meta)}
}

// gate decides whom this node lets into its view. It is called by memberlist, NotifyAlive even under memberlist's lock, so it
// must not call serf or memberlist; it has only what m.mu guards.
type gate struct{ m *Membership }

// NotifyMerge is asked before this node and another one exchange all they know in a join, on both sides. An error ends the join.
func (g gate) NotifyMerge(nodes []*memberlist.Node) error {
	for _, n := range nodes {
		if n.State != memberlist.StateAlive && n.State != memberlist.StateSuspect {
			continue // the past binds nobody
		}
		c := claimOf(n)
		err := g.checkName(c, len(nodes) == 1)
		if err == nil && c.name != g.m.cfg.Name { // of ourselves others may still know the version before an upgrade
			err = g.checkLevels(c)
		}
		if err != nil {
			g.m.refused(err)
			return err
		}
	}
	return nil
}

// NotifyAlive is asked whenever news of a living node arrives. An error makes memberlist ignore the news.
func (g gate) NotifyAlive(n *memberlist.Node) error {
	c := claimOf(n)
	if c.name == g.m.cfg.Name {
		if c.addr == g.m.addr {
			return nil
		}
		g.m.conflict(Conflict{Name: c.name, Known: g.m.addr, Other: c.addr, Self: true}, sameID(g.m.Tags(), c.tags))
		if g.former(c) {
			return errFormerAddress // it will be forgotten; without this refusal serf would hold a vote, which we might lose
		}
		return nil // serf lets the members vote; the loser shuts down
	}
	if err := g.checkLevels(c); err != nil {
		return err // memberlist logs it
	}
	if known, ok := g.m.holder(c.name); ok && known.AddrPort() != c.addr {
		g.m.conflict(Conflict{Name: c.name, Known: known.AddrPort(), Other: c.addr}, sameID(known.Tags, c.tags))
	}
	return nil // memberlist itself keeps the first of two claims
}

func (g gate) checkLevels(c claim) error {
	if err := identity.Compatible(g.m.cfg.Levels, levelsOf(c.tags)); err != nil {
		return fmt.Errorf("node %q at %s: %w", c.name, c.addr, err)
	}
	return nil
}

// checkName looks for the reason not to merge with a node that knows c: that c is another node with our name, or, when the
// other side knows nobody but itself and so wants to join, that it has the name of a living member. Of larger lists nothing is
// refused here: a clone somewhere must not keep two halves of a cluster apart.
func (g gate) checkName(c claim, joiner bool) error {
	if c.name == g.m.cfg.Name {
		if c.addr == g.m.addr {
			return nil
		}
		conflict := Conflict{Name: c.name, Known: c.addr, Other: g.m.addr, Self: true}
		if g.former(c) {
			return fmt.Errorf("%w, %s; they let go of it within seconds", errFormerAddress, c.addr)
		}
		g.m.conflict(conflict, sameID(g.m.Tags(), c.tags))
		return fmt.Errorf("%w: %s", ErrNameTaken, conflict)
	}
	if known, ok := g.m.holder(c.name); joiner && ok && known.AddrPort() != c.addr {
		conflict := Conflict{Name: c.name, Known: known.AddrPort(), Other: c.addr}
		g.m.conflict(conflict, sameID(known.Tags, c.tags))
		return errors.New(conflict.String())
	}
	return nil
}

// former tells whether a claim to our name can be ourselves, as we were before a restart with another address: the host id, if we
// know ours yet, is the same, and not enough time has passed for everyone to have given up the old address.
func (g gate) former(c claim) bool {
	own := g.m.Tags()
	return (own[TagID] == "" || sameID(own, c.tags)) && time.Since(g.m.started) < g.m.timing.settle
}

func sameID(a, b map[string]string) bool { return a[TagID] != "" && a[TagID] == b[TagID] }

// holder is the member with the name, if it is thought to live.
func (m *Membership) holder(name string) (Member, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	known, ok := m.view.members[name]
	return known, ok && (known.Verdict == health.Alive || known.Verdict == health.Suspect)
}

const (
	conflictEvery = time.Minute // between two reports of one conflict; it is over when it was not seen for twice as long
	maxConflicts  = 64          // pairs that are remembered, to be quiet about
)

// sighting is what is remembered of a conflict.
type sighting struct{ first, last, told time.Time }

// conflict passes a conflict on to the goroutine that may talk, unless it did lately. If both claimants have one host id it is
// most likely one node that moved and whose former address is not given up yet; then only what lasts is told.
func (m *Membership) conflict(c Conflict, sameID bool) {
	now := time.Now()
	m.mu.Lock()
	for k, s := range m.sightings {
		if now.Sub(s.last) >= 2*conflictEvery {
			delete(m.sightings, k)
		}
	}
	s, known := m.sightings[c]
	if !known {
		s.first = now
	}
	s.last = now
	tell := (!sameID || now.Sub(s.first) >= m.timing.settle) && (s.told.IsZero() || now.Sub(s.told) >= conflictEvery)
	if tell {
		s.told = now
	}
	if known || len(m.sightings) < maxConflicts {
		m.sightings[c] = s
	}
	m.mu.Unlock()
	if !tell {
		return
	}
	select {
	case m.conflicts <- c:
	default: // the queue is full of others
	}
}
