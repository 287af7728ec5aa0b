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

// Label of a Node whose value is a Preference.
const Label = "skein.io/voter"

// Preference is the value of a node's label skein.io/voter. Others than those
// below mean NoPreference.
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
	// Disk is what it says of its disk; zero if it said nothing.
	Disk Disk
}

// Disk of a node, as it measures it itself (host.Disk).
type Disk struct {
	// Sync is what nine of ten writes take at most, 0 if it is not known.
	Sync time.Duration
	// Slow is the node's own verdict, which does not change quickly: it has been
	// slow for a while, and has not been fast for long since.
	Slow bool
}

func (d Disk) String() string {
	return fmt.Sprintf("fsync p90 %v", d.Sync.Round(time.Millisecond))
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
	// Corrupt: its data differs from that of most others (the shard's CORRUPT alarm).
	Corrupt bool
	// NotRunningFor is how long it has not been running, 0 if it is. BehindFor is
	// how long it has been running without catching up.
	NotRunningFor, BehindFor time.Duration
}

// Policy has the numbers of the rules. The zero value of a field means its
// default.
type Policy struct {
	// MaxVoters: 1, 3 or 5 (default 5).
	MaxVoters int
	// FiveFrom is how many nodes that may vote it takes to have five voters;
	// default 7, so that two spares are left; at least 5.
	FiveFrom int
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
	p.FiveFrom = max(5, cmp.Or(p.FiveFrom, 7))
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
	// Follow is what was decided for the system shard, whose nodes the others
	// share. Nil for the system shard itself.
	Follow *Decision
	// Unready says by NodeHostID why a node must not be promoted yet: it lacks a
	// copy of another shard. Only for the system shard, whose leader needs all.
	Unready map[string]string
	// Held nodes must not lose their living replica: they vote in the system shard.
	Held map[string]bool
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
	// Goal is the voters that the shard should have, Spares the nodes that should
	// have a copy without a vote, both as NodeHostIDs in order.
	Goal, Spares []string
	// Blocked says why what the rules want cannot be done now.
	Blocked []string
	// Refused has, by NodeHostID, why a node cannot leave or lose its vote as it was
	// told to. One that only has to wait is in Blocked.
	Refused map[string]string
	// Slow has the nodes whose disk is so slow that they should not lead.
	Slow map[string]bool
	// Why has a word on every node, by NodeHostID: why it votes, or not.
	Why map[string]string
}

// Plan derives the next step.
func Plan(in Input) Decision {
	p := newPlanner(in)
	p.refuseUnsafe()
	p.setGoal()
	p.setSpares()
	p.d.Step = p.next()
	p.explain()
	return p.d
}

// member is a node with its replica, either of which may be missing: a replica's
// node may be unknown to the failure detector.
type member struct {
	Node
	*Replica
	known bool // the failure detector has heard of it
	kept  bool // it was told to go, which is refused
	slow  bool // its disk counts as slow
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

func (m *member) eligible() bool { return m.known && m.State != Left && !m.goes() }

// goes: the user wants it without a replica, and that is not refused.
func (m *member) goes() bool { return !m.kept && (m.Leaving || m.Node.Voter == Never) }

// prefers: between equals it is to vote. A slow disk outweighs that.
func (m *member) prefers() bool { return m.Node.Voter == Prefer && !m.slow }

type planner struct {
	in     Input
	policy Policy
	all    []*member // by name
	goal   map[string]bool
	spares map[string]bool
	d      Decision
}

func newPlanner(in Input) *planner {
	p := &planner{in: in, policy: in.Policy.withDefaults(), goal: map[string]bool{}, spares: map[string]bool{}}
	p.d.Refused, p.d.Why, p.d.Slow = map[string]string{}, map[string]string{}, map[string]bool{}
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
	p.judgeDisks()
	return p
}

// contrast is by how much a voter's disk has to be slower than the fastest one:
// if all are slow, or share one, there is nothing to gain.
const contrast = 4

// fastDisk is below which no voter's disk counts as slow, however fast the others are: its own verdict stays for minutes after it
// has become fast again, and next to a disk of 1 ms one of 3 ms and one of 5 ms would take turns in leading.
const fastDisk = 100 * time.Millisecond

// judgeDisks tells which disks count as slow. A voter needs both its own verdict
// and a better one to compare with; a node without a vote its verdict alone, so
// what was demoted does not come back because the others have a bad day too.
func (p *planner) judgeDisks() {
	var best time.Duration
	for _, m := range p.all {
		if d := m.Disk.Sync; d > 0 && m.up() && (best == 0 || d < best) {
			best = d
		}
	}
	for _, m := range p.all {
		m.slow = m.Disk.Slow && (!m.votes() || m.Disk.Sync >= max(contrast*best, fastDisk))
		if m.slow {
			p.d.Slow[m.Node.ID] = true
		}
	}
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

// agreeing is how many replicas that are alike it takes to make another one anew: with one
// alone nobody can tell which of the two is right, and what is deleted may be the last good
// copy.
const agreeing = 2

// spoiled: its data differs from that of enough others, from which it can be made anew.
func (p *planner) spoiled(m *member) bool {
	return m.Replica != nil && m.Corrupt && m.up() && p.settled(m) && len(p.sound()) >= agreeing
}

// sound are the replicas that have what the leader has.
func (p *planner) sound() []*member {
	return p.filter(func(m *member) bool { return m.Replica != nil && m.Running && m.CaughtUp && !m.Corrupt })
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
