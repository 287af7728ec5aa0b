package members

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// short rounds a duration for people.
func short(d time.Duration) time.Duration { return d.Round(time.Second) }

func (p *planner) step(a Action, m *member, format string, args ...any) Step {
	s := Step{Action: a, Node: m.Node.ID, Reason: fmt.Sprintf(format, args...)}
	if m.Replica != nil {
		s.Replica = m.Replica.ID
	}
	return s
}

// next returns the first step that is wanted and safe.
func (p *planner) next() Step {
	voters, up := p.voters(), p.upVoters()
	if len(up) < quorum(len(voters)) {
		p.block("%d of %d voters are reachable (%s): without a majority nothing can be changed", len(up), len(voters), names(up))
		return Step{}
	}
	p.explainSpoiled()
	for _, try := range []func() (Step, bool){p.cleanUp, p.promote, p.retire, p.start, p.add, p.unburden} {
		if s, ok := try(); ok {
			return s
		}
	}
	return Step{}
}

// cleanUp removes replicas without a vote that nobody wants or that are stuck.
// That is always safe.
func (p *planner) cleanUp() (Step, bool) {
	for _, m := range p.filter(func(m *member) bool { return m.Replica != nil && !m.votes() && !p.held(m) }) {
		switch {
		case p.spoiled(m):
			return p.step(Remove, m, "%s: %s", m.Name, anew), true
		case m.goes() && m.Leaving:
			return p.step(Remove, m, "%s is leaving", m.Name), true
		case m.known && m.goes():
			return p.step(Remove, m, "%s is labelled %s=never", m.Name, Label), true
		case !m.known || m.State == Left:
			if p.gone(m) {
				return p.step(Remove, m, "%s has left the cluster", m.Name), true
			}
		case p.gone(m) && p.replaceable():
			return p.step(Remove, m, "the spare on %s has not been reachable for %v and another node can take its place", m.Name, short(m.NotRunningFor)), true
		case m.BehindFor >= p.policy.StuckAfter:
			return p.step(Remove, m, "the replica on %s has not caught up in %v; it will be made anew", m.Name, short(m.BehindFor)), true
		case !p.gone(m) && !p.wanted(m):
			return p.step(Remove, m, "%s holds one spare more than the %d allowed", m.Name, p.policy.Spares), true
		}
	}
	return Step{}, false
}

// replaceable: a settled node without a replica is wanted.
func (p *planner) replaceable() bool {
	return len(p.filter(func(m *member) bool { return p.wanted(m) && m.Replica == nil && p.settled(m) })) > 0
}

// held: it votes in the system shard, so it may have to lead the cluster at any
// moment, which takes a replica of every shard. What is lost or spoiled cannot be held.
func (p *planner) held(m *member) bool {
	return p.in.Held[m.Node.ID] && !p.lost(m) && !p.spoiled(m)
}

// heirs are spares that are to vote and can at once.
func (p *planner) heirs() []*member {
	return p.filter(func(m *member) bool {
		return p.goal[m.Node.ID] && m.Replica != nil && !m.votes() && m.up() && m.CaughtUp && p.in.Unready[m.Node.ID] == ""
	})
}

// surplus are voters to remove: those that the goal does not have, and those
// that are lost or spoiled although their node is alive, which gets a new replica
// then. The unreachable come first, then those that leave.
func (p *planner) surplus() []*member {
	s := p.filter(func(m *member) bool {
		return m.votes() && !p.held(m) && (!p.goal[m.Node.ID] || p.lost(m) || p.spoiled(m))
	})
	slices.SortStableFunc(s, func(a, b *member) int {
		return cmp.Or(first(!a.up(), !b.up()), first(a.goes(), b.goes()))
	})
	return s
}

// lost: the node is well, but does not run its replica any more.
func (p *planner) lost(m *member) bool { return p.gone(m) && p.settled(m) }

// promote gives a vote to an heir, if the number of voters becomes odd by it or
// will at once by the next steps. A dead voter is removed before its heir is
// promoted (retire): in between, one more death is then no worse than before.
func (p *planner) promote() (Step, bool) {
	heirs, surplus := p.heirs(), p.surplus()
	if len(heirs) == 0 {
		return Step{}, false
	}
	if len(surplus) > 0 && !surplus[0].up() {
		return Step{}, false
	}
	voters, up := len(p.voters()), len(p.upVoters())
	odd := (voters+1)%2 == 1
	pair := len(heirs) >= 2      // the second follows
	moved := len(surplus) > 0    // a removal follows
	if !odd && !pair && !moved { // e.g. the spare of a cluster of two, or the first of two new voters
		if held := p.filter(func(m *member) bool { return m.votes() && !p.goal[m.Node.ID] && p.held(m) }); len(held) > 0 {
			p.block("%s is to take the place of %s, which votes in the system shard still", names(heirs), names(held))
			return Step{}, false
		}
		p.block("%s has caught up, but %d voters are no safer than %d: waiting for another node", names(heirs), voters+1, voters)
		return Step{}, false
	}
	if up+1 < quorum(voters+1) {
		p.block("cannot promote %s: %d of then %d voters would be reachable", heirs[0].Name, up+1, voters+1)
		return Step{}, false
	}
	h := heirs[0]
	if moved {
		return p.step(Promote, h, "%s has caught up and takes the place of %s", h.Name, surplus[0].Name), true
	}
	return p.step(Promote, h, "%s has caught up: voter %d of %d", h.Name, voters+1, len(p.goal)), true
}

// retire removes a voter that the goal does not have.
func (p *planner) retire() (Step, bool) {
	surplus := p.surplus()
	if len(surplus) == 0 {
		p.explainMissing()
		return Step{}, false
	}
	m := surplus[0]
	if !m.up() && !p.gone(m) {
		p.block("%s has not been reachable for %v: waiting until it has been %v", m.Name, short(m.NotRunningFor), p.policy.ReplaceAfter)
		return Step{}, false
	}
	voters, up := p.voters(), p.upVoters()
	left, alive := len(voters)-1, len(up)
	if m.up() {
		alive--
	}
	if left < 1 || alive < quorum(left) {
		p.block("cannot remove %s: %d of then %d voters would be reachable", m.Name, alive, left)
		return Step{}, false
	}
	// Some are to vote but do not yet: the shard must not get smaller meanwhile.
	missing := p.filter(func(o *member) bool { return p.goal[o.Node.ID] && !o.votes() })
	if len(missing) > 0 && !p.lost(m) && !p.replaced(m, left, len(p.heirs())) {
		p.block("%s is to be replaced by %s, which %s not ready", m.Name, names(missing), plural(len(missing), "is", "are"))
		return Step{}, false
	}
	if m.Leader {
		to := p.filter(func(o *member) bool { return o != m && o.votes() && o.up() && p.goal[o.Node.ID] && !o.Corrupt })
		if len(to) == 0 {
			p.block("%s leads and is to be removed, but no other voter is reachable", m.Name)
			return Step{}, false
		}
		slices.SortStableFunc(to, func(a, b *member) int { return first(a.CaughtUp, b.CaughtUp) })
		return p.step(Transfer, to[0], "%s leads and is to be removed", m.Name), true
	}
	return p.step(Remove, m, "%s: %s", m.Name, p.whyNot(m)), true
}

// replaced: with `left` voters and the heirs the shard is as well off without m.
// A living one goes when its heir votes already, which makes the number odd
// again; a dead one as soon as its heir is ready.
func (p *planner) replaced(m *member, left, heirs int) bool {
	if m.up() {
		return left%2 == 1 && (left >= 3 || left+heirs >= len(p.goal))
	}
	return left+heirs >= min(len(p.goal), left+1)
}

// anew is why a spoiled replica goes.
const anew = "its data differs from that of the other replicas; it is made anew from them"

func (p *planner) whyNot(m *member) string {
	switch {
	case p.spoiled(m):
		return anew
	case m.goes() && m.Leaving:
		return "it is leaving"
	case !m.known || m.State == Left:
		return "it has left the cluster"
	case m.goes():
		return fmt.Sprintf("it is labelled %s=never", Label)
	case p.lost(m):
		return "its node is alive but has lost the replica; it gets a new one"
	case !m.up():
		return fmt.Sprintf("it has not been reachable for %v", short(m.NotRunningFor))
	}
	return p.whySpare(m)
}

// explainSpoiled says why replicas with other data than the others stay.
func (p *planner) explainSpoiled() {
	for _, m := range p.filter(func(m *member) bool { return m.Replica != nil && m.Corrupt && !p.spoiled(m) }) {
		if sound := p.sound(); len(sound) < agreeing {
			p.block("the data of the replica on %s differs from that of the leader, and it takes %d other replicas that agree to make it anew (%s): add a node, or take %s out of the cluster and let it join again",
				m.Name, agreeing, cmp.Or(names(sound), "there is none"), m.Name)
		}
	}
}

// explainMissing says why unreachable voters stay.
func (p *planner) explainMissing() {
	for _, m := range p.voters() {
		if p.gone(m) {
			p.block("voter %s has not been reachable for %v and there is no spare to replace it: %d of %d voters are left, %d more may fail",
				m.Name, short(m.NotRunningFor), len(p.upVoters()), len(p.voters()), tolerance(len(p.voters()), len(p.upVoters())))
		}
	}
}

// start repeats the order to run a replica that is a member already. A voter is
// never started this way: if its disk is gone, it must not vote again.
func (p *planner) start() (Step, bool) {
	for _, m := range p.filter(func(m *member) bool {
		return m.Replica != nil && !m.votes() && !m.Running && m.known && m.State <= Suspect && !m.goes()
	}) {
		return p.step(Start, m, "%s does not run its replica", m.Name), true
	}
	return Step{}, false
}

// add makes a new replica.
func (p *planner) add() (Step, bool) {
	candidates := p.filter(func(m *member) bool { return p.wanted(m) && m.Replica == nil && p.settled(m) })
	slices.SortStableFunc(candidates, func(a, b *member) int { return first(p.goal[a.Node.ID], p.goal[b.Node.ID]) })
	if len(candidates) == 0 {
		return Step{}, false
	}
	m := candidates[0]
	if p.goal[m.Node.ID] {
		return p.step(Add, m, "%s is to be one of %d voters", m.Name, len(p.goal)), true
	}
	return p.step(Add, m, "%s is to be a spare", m.Name), true
}

// unburden takes the leadership from a slow disk: every write waits for the
// leader's, and only for the fastest of the others.
func (p *planner) unburden() (Step, bool) {
	for _, m := range p.voters() {
		if !m.Leader || !m.slow || !m.up() {
			continue
		}
		to := p.filter(func(o *member) bool { return o.votes() && o.up() && o.CaughtUp && !o.slow && p.goal[o.Node.ID] })
		if len(to) > 0 {
			return p.step(Transfer, to[0], "the disk of %s, which leads, is slow: %s", m.Name, m.Disk), true
		}
	}
	return Step{}, false
}
