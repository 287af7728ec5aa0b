package membership

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/hashicorp/serf/serf"

	"skein.io/skein/gossip/health"
	"skein.io/skein/gossip/identity"
)

// Member is one node as this node sees it.
type Member struct {
	Name string
	Addr netip.Addr        // gossip address
	Port uint16            // gossip port
	Tags map[string]string // shared: must not be changed
	Self bool              // this node itself
	// Verdict holds since Since, a time of this process's own clock with its monotonic reading: use time.Since on it, never
	// send it to another node.
	Verdict health.Verdict
	Since   time.Time
}

// AddrPort is where the member's gossip is.
func (m Member) AddrPort() netip.AddrPort { return netip.AddrPortFrom(m.Addr, m.Port) }

// Levels are the protocol levels that the member announces; not valid ones if it announces none.
func (m Member) Levels() identity.Levels { return levelsOf(m.Tags) }

func levelsOf(tags map[string]string) identity.Levels {
	level, _ := strconv.Atoi(tags[tagLevel]) // 0, which is no valid level, when it is no number
	least, _ := strconv.Atoi(tags[tagMinLevel])
	return identity.Levels{Level: level, Min: least}
}

// observed is a member as serf lists it.
type observed struct {
	name   string
	addr   netip.Addr
	port   uint16
	tags   map[string]string
	status serf.MemberStatus
}

// change is one member's change, for the log.
type change struct {
	member Member // as it is now, or was before it was forgotten
	was    health.Verdict
	gone   bool
	lasted time.Duration // of the former verdict
}

// view is what this node knows of the members. It is pure: time comes in as an argument.
type view struct {
	self     string
	members  map[string]Member
	suspects map[string]bool // of members that serf holds for alive, those that do not answer this node
}

func newView(self string) *view {
	return &view{self: self, members: map[string]Member{}, suspects: map[string]bool{}}
}

// observe takes in serf's whole list. It returns what changed for people to read, and whether anything at all did.
func (v *view) observe(now time.Time, list []observed) (changes []change, changed bool) {
	seen := make(map[string]bool, len(list))
	for _, o := range list {
		seen[o.name] = true
		if o.status != serf.StatusAlive {
			delete(v.suspects, o.name) // serf has made up its mind; what comes after begins anew
		}
		old, known := v.members[o.name]
		m := Member{Name: o.name, Addr: o.addr, Port: o.port, Tags: o.tags, Self: o.name == v.self,
			Verdict: verdictOf(o.status, v.suspects[o.name]), Since: now}
		if known && m.Verdict == old.Verdict {
			m.Since = old.Since
		}
		v.members[o.name] = m
		if !known || m.Verdict != old.Verdict {
			c := change{member: m, was: old.Verdict}
			if known {
				c.lasted = now.Sub(old.Since)
			}
			changes = append(changes, c)
		}
		changed = changed || !known || m.Verdict != old.Verdict || m.AddrPort() != old.AddrPort() || !maps.Equal(m.Tags, old.Tags)
	}
	for name, old := range v.members {
		if !seen[name] {
			delete(v.members, name)
			delete(v.suspects, name)
			changes = append(changes, change{member: old, was: old.Verdict, gone: true, lasted: now.Sub(old.Since)})
			changed = true
		}
	}
	return changes, changed
}

// suspect notes whether a member answers this node's own probes.
func (v *view) suspect(now time.Time, name string, suspected bool) (changes []change) {
	m, ok := v.members[name]
	if !ok || m.Self || m.Verdict != health.Alive && m.Verdict != health.Suspect || v.suspects[name] == suspected {
		return nil
	}
	delete(v.suspects, name)
	was, lasted := m.Verdict, now.Sub(m.Since)
	m.Verdict, m.Since = health.Alive, now
	if suspected {
		v.suspects[name], m.Verdict = true, health.Suspect
	}
	v.members[name] = m
	return []change{{member: m, was: was, lasted: lasted}}
}

// sorted are the members by name.
func (v *view) sorted() []Member {
	out := make([]Member, 0, len(v.members))
	for _, m := range v.members {
		out = append(out, m)
	}
	slices.SortFunc(out, func(a, b Member) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// company tells whether any other member is thought to be there.
func (v *view) company() bool {
	for _, m := range v.members {
		if !m.Self && m.Verdict.Usable() {
			return true
		}
	}
	return false
}

func verdictOf(s serf.MemberStatus, suspected bool) health.Verdict {
	switch s {
	case serf.StatusAlive:
		if suspected {
			return health.Suspect
		}
		return health.Alive
	case serf.StatusLeaving, serf.StatusLeft:
		// A node that is about to leave has told everyone to expect nothing of it any more.
		return health.Left
	case serf.StatusFailed:
		return health.Dead
	default:
		return health.Unknown
	}
}
