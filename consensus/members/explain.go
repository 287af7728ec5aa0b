package members

import (
	"fmt"
	"strings"
)

// explain says of every node why it votes or not. What is said already stays.
func (p *planner) explain() {
	for _, m := range p.all {
		if p.d.Why[m.Node.ID] == "" {
			p.d.Why[m.Node.ID] = p.why(m)
		}
	}
}

func (p *planner) why(m *member) string {
	switch {
	case m.Leaving:
		return "leaving"
	case !m.known:
		return "not in the cluster any more"
	case m.State == Left:
		return "has left"
	case m.goes():
		return fmt.Sprintf("label %s=never", Label)
	case p.goal[m.Node.ID]:
		return p.whyVotes(m)
	case p.gone(m):
		return "not reachable"
	}
	role := "no copy"
	switch {
	case m.votes():
		role = "votes until another does"
	case m.Replica != nil || p.spares[m.Node.ID]:
		role = "spare"
	}
	return role + ": " + p.whySpare(m)
}

func (p *planner) whyVotes(m *member) string {
	var extra []string
	if m.Node.Voter == Prefer {
		extra = append(extra, fmt.Sprintf("label %s=prefer", Label))
	}
	if m.slow {
		extra = append(extra, fmt.Sprintf("slow disk (%s), but nobody in a better place", m.Disk))
	}
	if m.Replica != nil && !m.up() {
		extra = append(extra, fmt.Sprintf("not reachable for %v", short(m.NotRunningFor)))
	}
	text := "votes"
	switch {
	case m.Replica == nil:
		text = "is to vote: waiting until it has been alive for long enough"
		if p.settled(m) {
			text = "is to vote: gets a copy next"
		}
	case !m.votes() && p.in.Unready[m.Node.ID] != "":
		text = "is to vote: " + p.in.Unready[m.Node.ID]
	case !m.votes() && !m.CaughtUp:
		text = "is to vote: copies the data"
	case !m.votes():
		text = "is to vote"
	}
	if len(p.d.Goal) > 1 && m.Zone != "" {
		text += " for zone " + m.Zone
	}
	return strings.Join(append([]string{text}, extra...), "; ")
}

// whySpare says what the voters have over it.
func (p *planner) whySpare(m *member) string {
	voters := p.filter(func(o *member) bool { return p.goal[o.Node.ID] })
	inZone := 0
	for _, o := range voters {
		if o.Zone == m.Zone {
			inZone++
		}
	}
	switch {
	case m.slow:
		return fmt.Sprintf("slow disk: %s", m.Disk)
	case !p.settled(m):
		return "not alive for long enough"
	case m.Zone != "" && inZone > 0:
		return fmt.Sprintf("zone %s has %d of the %d voters", m.Zone, inZone, len(voters))
	case len(voters) == 1:
		return "two voters are no safer than one"
	}
	return fmt.Sprintf("the %d voters are others", len(voters))
}
