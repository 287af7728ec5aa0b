package members

import (
	"cmp"
	"fmt"
	"slices"
)

// refuseUnsafe lets those go that can: not the last node, no voter while another
// one is missing with nobody to take its place, and nobody before another node
// has a complete copy. A refused label is obeyed as soon as that becomes safe.
func (p *planner) refuseUnsafe() {
	if f := p.in.Follow; f != nil { // whom the system shard keeps, the others do
		for _, m := range p.all {
			m.kept = m.goes() && (slices.Contains(f.Goal, m.Node.ID) || slices.Contains(f.Spares, m.Node.ID))
		}
	}
	if !slices.ContainsFunc(p.all, func(m *member) bool { return m.eligible() && (m.votes() || !p.gone(m)) }) {
		// Nobody is left to vote by the labels: keep all, not the one that comes last.
		for _, m := range p.all {
			if m.votes() && m.Node.Voter == Never && !m.Leaving {
				p.keep(m, fmt.Sprintf("every node that could vote in shard %s is labelled %s=never or leaving: one has to", p.in.Shard, Label), true)
			}
		}
	}
	for _, m := range p.all {
		if m.goes() && m.Replica != nil {
			if reason, final := p.cannotGo(m); reason != "" {
				p.keep(m, reason, final)
			}
		}
	}
}

func (p *planner) keep(m *member, reason string, final bool) {
	m.kept = true
	switch {
	case final:
		p.d.Refused[m.Node.ID] = reason
	case m.Leaving:
		p.block("%s is to leave but has to wait: %s", m.Name, reason)
	default:
		p.block("%s is labelled %s=never but has to wait: %s", m.Name, Label, reason)
	}
	if m.Node.Voter == Never {
		p.d.Why[m.Node.ID] = fmt.Sprintf("the label %s=never is not obeyed: %s", Label, reason)
	}
}

// cannotGo says why, and whether it is pointless to wait.
func (p *planner) cannotGo(m *member) (reason string, final bool) {
	others := p.filter(func(o *member) bool { return o != m && o.Replica != nil && !o.goes() })
	copies := slices.DeleteFunc(slices.Clone(others), func(o *member) bool { return !o.up() || !o.CaughtUp })
	if len(copies) == 0 {
		if len(p.filter(func(o *member) bool { return o != m && o.eligible() && o.State <= Suspect })) == 0 {
			return fmt.Sprintf("%s is the only node that can hold the data of shard %s", m.Name, p.in.Shard), true
		}
		return fmt.Sprintf("no other node has a complete copy of shard %s yet (copies on: %s)", p.in.Shard, names(others)), false
	}
	if !m.votes() {
		return "", false
	}
	down := p.filter(func(o *member) bool { return o != m && o.votes() && !o.up() })
	spares := slices.DeleteFunc(slices.Clone(copies), func(o *member) bool { return o.votes() || !o.eligible() })
	if len(down) > len(spares) {
		return fmt.Sprintf("of %d voters of shard %s %d %s not reachable (%s) and %d spares could take over: with %s gone too, too few copies are left; bring %s back first",
			len(p.voters()), p.in.Shard, len(down), plural(len(down), "is", "are"), names(down), len(spares), m.Name, names(down)), true
	}
	return "", false
}

func plural(n int, one, many string) string {
	if n == 1 {
		return one
	}
	return many
}

// setGoal chooses the voters that there should be.
func (p *planner) setGoal() {
	if p.in.Follow != nil {
		p.follow()
		return
	}
	// A dead voter may return with its copy; a dead node without a vote is nothing
	// to wait for.
	known := p.filter(func(m *member) bool { return m.eligible() && (m.votes() || !p.gone(m)) })
	present := slices.DeleteFunc(slices.Clone(known), p.gone)
	size := min(p.size(), capacity(len(known)))
	// Fewer living nodes than voters: keep the dead ones, they may return, unless
	// more losses are survived without them.
	if less := capacity(len(present)); less < size && tolerance(less, less) > tolerance(size, min(size, len(present))) {
		size = less
	}
	for _, m := range p.choose(known, size) {
		p.goal[m.Node.ID] = true
		p.d.Goal = append(p.d.Goal, m.Node.ID)
	}
	slices.Sort(p.d.Goal)
}

// follow takes over what was decided for the system shard.
func (p *planner) follow() {
	for _, m := range p.all {
		if slices.Contains(p.in.Follow.Goal, m.Node.ID) {
			p.goal[m.Node.ID] = true
			p.d.Goal = append(p.d.Goal, m.Node.ID)
		}
	}
	slices.Sort(p.d.Goal)
}

// capacity is how many voters, at most five, that many nodes carry.
func capacity(nodes int) int {
	switch {
	case nodes >= 5:
		return 5
	case nodes >= 3:
		return 3
	}
	return 1
}

// size is the number of voters by the size of the cluster. A dead node counts as
// long as it has not left: one that comes and goes must not take two voters with
// it each time.
func (p *planner) size() int {
	nodes := p.filter((*member).eligible)
	// Three in three zones survive the loss of any zone. Five must not be worse.
	if len(nodes) < p.policy.FiveFrom || p.policy.MaxVoters < 5 || (p.crowd(nodes, 3) < 2 && p.crowd(nodes, 5) > 2) {
		return min(3, p.policy.MaxVoters)
	}
	return 5
}

// crowd is how many of the best voters are in one zone, at most.
func (p *planner) crowd(nodes []*member, size int) (most int) {
	zones := map[string]int{}
	for _, m := range p.choose(nodes, size) {
		zones[m.Zone]++
		most = max(most, zones[m.Zone])
	}
	return most
}

// choose the best, one after the other, spread over zones.
func (p *planner) choose(nodes []*member, size int) (chosen []*member) {
	nodes = slices.Clone(nodes)
	zones := map[string]int{}
	for range min(size, len(nodes)) {
		best := slices.MinFunc(nodes, func(a, b *member) int { return p.rank(a, b, zones) })
		zones[best.Zone]++
		nodes = slices.DeleteFunc(nodes, func(m *member) bool { return m == best })
		chosen = append(chosen, best)
	}
	return chosen
}

// first is -1 if only a has something, 1 if only b, else 0.
func first(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return -1
	}
	return 1
}

// rank orders candidates for the next place among the voters. The spread over
// zones outweighs a slow disk: Raft waits for a majority only, so one slow voter
// costs nothing while it does not lead, but a zone without a voter is a risk.
func (p *planner) rank(a, b *member, zones map[string]int) int {
	return cmp.Or(
		first(!p.gone(a), !p.gone(b)),
		first(a.votes() || p.settled(a), b.votes() || p.settled(b)),
		first(a.prefers(), b.prefers()),
		cmp.Compare(zones[a.Zone], zones[b.Zone]),
		first(!a.slow, !b.slow),
		first(a.votes(), b.votes()),
		first(a.votes() && a.Leader, b.votes() && b.Leader),
		first(a.Replica != nil && a.CaughtUp, b.Replica != nil && b.CaughtUp),
		first(a.Replica != nil, b.Replica != nil),
		cmp.Compare(a.Name, b.Name),
		cmp.Compare(a.Node.ID, b.Node.ID),
	)
}

// setSpares chooses who should hold a copy without a vote: the best others, in
// zones of their own if nobody has to move for that.
func (p *planner) setSpares() {
	// A voter that is not wanted becomes a spare only after it has been removed.
	rest := p.filter(func(m *member) bool {
		return m.eligible() && !p.goal[m.Node.ID] && !p.gone(m) && !m.votes()
	})
	if f := p.in.Follow; f != nil {
		rest = slices.DeleteFunc(rest, func(m *member) bool { return !slices.Contains(f.Spares, m.Node.ID) })
	}
	zones := map[string]int{}
	for range min(len(rest), p.policy.Spares) {
		best := slices.MinFunc(rest, func(a, b *member) int {
			return cmp.Or(first(a.Replica != nil, b.Replica != nil), p.rank(a, b, zones))
		})
		zones[best.Zone]++
		rest = slices.DeleteFunc(rest, func(m *member) bool { return m == best })
		p.spares[best.Node.ID] = true
		p.d.Spares = append(p.d.Spares, best.Node.ID)
	}
	slices.Sort(p.d.Spares)
}

// wanted: the node should hold a replica.
func (p *planner) wanted(m *member) bool { return p.goal[m.Node.ID] || p.spares[m.Node.ID] }
