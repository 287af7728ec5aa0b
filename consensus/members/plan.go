package members

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// State of a node in the eyes of the failure detector.
type State int

// The states.
const (
	Alive State = iota
	Suspect
	Dead
	Left
)

func (s State) String() string {
	return [...]string{"alive", "suspect", "dead", "left"}[s]
}

// Preference is the value of a node's label skein.io/voter.
type Preference string

// The preferences.
const (
	NoPreference Preference = ""
	Never        Preference = "never"
	Prefer       Preference = "prefer"
)

// Node of the cluster.
type Node struct {
	// ID is its NodeHostID, Name what people call it.
	ID, Name string
	Zone     string
	Voter    Preference
	State    State
	// For is how long it has been in that state, by the clock of this node.
	For time.Duration
	// Leaving: it was asked to leave the cluster.
	Leaving bool
}

// Replica of the shard.
type Replica struct {
	ID    uint64
	Node  string // NodeHostID
	Voter bool
	// Leader of the shard.
	Leader bool
	// Running: its node answers that it runs it. CaughtUp: and that it has applied
	// what the leader has, but for a moment's writes.
	Running, CaughtUp bool
	// NotRunningFor is how long it has not been running, 0 if it is. BehindFor is
	// how long it has been running without catching up.
	NotRunningFor, BehindFor time.Duration
}

// Policy has the numbers of the rules. The zero value of a field means its
// default.
type Policy struct {
	// MaxVoters: 1, 3 or 5 (default 5).
	MaxVoters int
	// Spares without a vote, default 2; negative for none.
	Spares int
	// ReplaceAfter is the stabilisation time after which a dead voter is replaced;
	// default 30 s.
	ReplaceAfter time.Duration
	// JoinAfter is how long a node has to be alive before it gets a replica;
	// default 2 s.
	JoinAfter time.Duration
	// StuckAfter is how long a replica without a vote may take to catch up before
	// it is given up and made anew; default 10 min.
	StuckAfter time.Duration
}

func (p Policy) withDefaults() Policy {
	p.MaxVoters = cmp.Or(p.MaxVoters, 5)
	p.Spares = max(0, cmp.Or(p.Spares, 2))
	p.ReplaceAfter = cmp.Or(p.ReplaceAfter, 30*time.Second)
	p.JoinAfter = cmp.Or(p.JoinAfter, 2*time.Second)
	p.StuckAfter = cmp.Or(p.StuckAfter, 10*time.Minute)
	return p
}

// Input of Plan.
type Input struct {
	Shard    string
	Replicas []Replica
	Nodes    []Node
	Policy   Policy
}

// Action of a step.
type Action int

// The actions.
const (
	// Nothing to do.
	Nothing Action = iota
	// Start: tell Node to run Replica, which is a member without a vote.
	Start
	// Add Node as a replica without a vote.
	Add
	// Promote Replica on Node to a voter.
	Promote
	// Transfer the leadership to Replica on Node.
	Transfer
	// Remove Replica on Node.
	Remove
)

func (a Action) String() string {
	return [...]string{"nothing", "start", "add", "promote", "transfer", "remove"}[a]
}

// Step is one change.
type Step struct {
	Action  Action
	Replica uint64 // not of Add, which gets a new one
	Node    string // NodeHostID
	Reason  string
}

// Decision of Plan.
type Decision struct {
	Step Step
	// Goal is the voters that the shard should have, as NodeHostIDs.
	Goal []string
	// Blocked says why what the rules want cannot be done now.
	Blocked []string
	// Refused has, by NodeHostID, why a node cannot leave. One that only has to wait
	// is in Blocked.
	Refused map[string]string
}

// Plan derives the next step.
func Plan(in Input) Decision {
	p := newPlanner(in)
	p.refuseUnsafeLeaves()
	p.setGoal()
	p.d.Step = p.next()
	return p.d
}

// member is a node with its replica, either of which may be missing: a replica's
// node may be unknown to the failure detector.
type member struct {
	Node
	*Replica
	known bool // the failure detector has heard of it
}

// up: it answers, or is said to be alive and runs its replica if it has one.
// What the replica says of itself outweighs the detector.
func (m *member) up() bool {
	if m.Replica != nil {
		return m.Running
	}
	return m.known && m.State <= Suspect
}

func (m *member) votes() bool { return m.Replica != nil && m.Voter() }

// Voter hides Node.Voter, the preference.
func (m *member) Voter() bool { return m.Replica.Voter }

func (m *member) eligible() bool {
	return m.known && m.Node.Voter != Never && !m.Leaving && m.State != Left
}

type planner struct {
	in     Input
	policy Policy
	all    []*member // by name
	goal   map[string]bool
	d      Decision
}

func newPlanner(in Input) *planner {
	p := &planner{in: in, policy: in.Policy.withDefaults(), goal: map[string]bool{}}
	p.d.Refused = map[string]string{}
	byID := map[string]*member{}
	for _, n := range in.Nodes {
		m := &member{Node: n, known: true}
		byID[n.ID] = m
		p.all = append(p.all, m)
	}
	for i := range in.Replicas {
		r := &in.Replicas[i]
		m := byID[r.Node]
		if m == nil {
			m = &member{Node: Node{ID: r.Node, Name: r.Node, State: Left, For: r.NotRunningFor}}
			byID[r.Node] = m
			p.all = append(p.all, m)
		}
		m.Replica = r
	}
	slices.SortFunc(p.all, func(a, b *member) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Node.ID, b.Node.ID)) })
	return p
}

func (p *planner) block(format string, args ...any) {
	p.d.Blocked = append(p.d.Blocked, fmt.Sprintf(format, args...))
}

// gone: not up for the stabilisation time.
func (p *planner) gone(m *member) bool {
	if m.up() {
		return false
	}
	if m.Replica != nil {
		return m.NotRunningFor >= p.policy.ReplaceAfter
	}
	return !m.known || m.State == Left || (m.State == Dead && m.For >= p.policy.ReplaceAfter)
}

// settled: alive for long enough to be given something.
func (p *planner) settled(m *member) bool {
	return m.known && m.State == Alive && m.For >= p.policy.JoinAfter
}

func (p *planner) filter(keep func(*member) bool) (out []*member) {
	for _, m := range p.all {
		if keep(m) {
			out = append(out, m)
		}
	}
	return out
}

func (p *planner) voters() []*member { return p.filter((*member).votes) }

func (p *planner) upVoters() []*member {
	return p.filter(func(m *member) bool { return m.votes() && m.up() })
}

func quorum(voters int) int { return voters/2 + 1 }

// tolerance is how many more voters may die.
func tolerance(voters, alive int) int { return alive - quorum(voters) }

func names(ms []*member) string {
	var out []string
	for _, m := range ms {
		out = append(out, m.Name)
	}
	if len(out) == 0 {
		return "none"
	}
	return strings.Join(out, ", ")
}

// refuseUnsafeLeaves lets those leave that can: not the last node, no voter while
// another one is missing with nobody to take its place, and nobody before another
// node has a complete copy.
func (p *planner) refuseUnsafeLeaves() {
	for _, m := range p.all {
		if !m.Leaving || m.Replica == nil {
			continue
		}
		reason, final := p.cannotLeave(m)
		if reason == "" {
			continue
		}
		m.Leaving = false
		if final {
			p.d.Refused[m.Node.ID] = reason
		} else {
			p.block("%s is to leave but has to wait: %s", m.Name, reason)
		}
	}
}

// cannotLeave says why, and whether it is pointless to wait.
func (p *planner) cannotLeave(m *member) (reason string, final bool) {
	others := p.filter(func(o *member) bool { return o != m && o.Replica != nil && !o.Leaving })
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

// votersFor is the number of voters that n nodes carry.
func (p *planner) votersFor(n int) int {
	switch {
	case n >= 5 && p.policy.MaxVoters >= 5:
		return 5
	case n >= 3 && p.policy.MaxVoters >= 3:
		return 3
	}
	return 1
}

// setGoal chooses the voters that there should be.
func (p *planner) setGoal() {
	// A dead voter may return with its copy; a dead node without a vote is nothing
	// to wait for.
	known := p.filter(func(m *member) bool { return m.eligible() && (m.votes() || !p.gone(m)) })
	present := slices.DeleteFunc(slices.Clone(known), p.gone)
	size := p.votersFor(len(known))
	// Fewer living nodes than voters: keep the dead ones, they may return, unless
	// more losses are survived without them.
	if less := p.votersFor(len(present)); less < size && tolerance(less, less) > tolerance(size, min(size, len(present))) {
		size = less
	}
	zones := map[string]int{}
	for range min(size, len(known)) {
		best := slices.MinFunc(known, func(a, b *member) int { return p.rank(a, b, zones) })
		p.goal[best.Node.ID] = true
		zones[best.Zone]++
		known = slices.DeleteFunc(known, func(m *member) bool { return m == best })
		p.d.Goal = append(p.d.Goal, best.Node.ID)
	}
	slices.Sort(p.d.Goal)
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

// rank orders candidates for the next place among the voters.
func (p *planner) rank(a, b *member, zones map[string]int) int {
	return cmp.Or(
		first(!p.gone(a), !p.gone(b)),
		first(a.votes() || p.settled(a), b.votes() || p.settled(b)),
		first(a.Node.Voter == Prefer, b.Node.Voter == Prefer),
		cmp.Compare(zones[a.Zone], zones[b.Zone]),
		first(a.votes(), b.votes()),
		first(a.votes() && a.Leader, b.votes() && b.Leader),
		first(a.Replica != nil && a.CaughtUp, b.Replica != nil && b.CaughtUp),
		first(a.Replica != nil, b.Replica != nil),
		cmp.Compare(a.Name, b.Name),
		cmp.Compare(a.Node.ID, b.Node.ID),
	)
}
