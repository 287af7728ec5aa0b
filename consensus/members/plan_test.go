package members

import (
	"fmt"
	"math/rand"
	"slices"
	"strings"
	"testing"
	"time"
)

// sim is a cluster in which every step takes effect at once and time goes by in
// rounds of a second.
type sim struct {
	t        testing.TB
	nodes    []*simNode
	replicas map[uint64]*simReplica
	ccid     uint64
	used     map[uint64]bool
	trace    []string
	policy   Policy
	follows  bool // the shard does as the system shard
}

type simNode struct {
	Node
	up    bool
	since int // rounds in this state
}

type simReplica struct {
	Replica
	started bool
	rounds  int // running for
	down    int // not running for
}

func newSim(t testing.TB) *sim {
	s := &sim{t: t, replicas: map[uint64]*simReplica{}, ccid: 1, used: map[uint64]bool{1: true}}
	n := s.join("a", "", NoPreference)
	s.replicas[1] = &simReplica{Replica: Replica{ID: 1, Node: n.ID, Voter: true, Leader: true}, started: true, rounds: 5}
	return s
}

func (s *sim) join(name, zone string, pref Preference) *simNode {
	n := &simNode{Node: Node{ID: "id-" + name, Name: name, Zone: zone, Voter: pref}, up: true, since: 100}
	s.nodes = append(s.nodes, n)
	return n
}

func (s *sim) node(id string) *simNode {
	for _, n := range s.nodes {
		if n.ID == id {
			return n
		}
	}
	return nil
}

func (s *sim) named(name string) *simNode { return s.node("id-" + name) }

func (s *sim) set(name string, up bool) {
	n := s.named(name)
	n.up, n.since = up, 0
	n.State = Alive
	if !up {
		n.State = Dead
	}
}

func (s *sim) running(r *simReplica) bool {
	n := s.node(r.Node)
	return n != nil && n.up && r.started
}

func (s *sim) input() Input {
	in := Input{Shard: "system", Policy: s.policy}
	for _, n := range s.nodes {
		x := n.Node
		x.For = time.Duration(n.since) * time.Second
		in.Nodes = append(in.Nodes, x)
	}
	for _, id := range s.ids() {
		r := s.replicas[id]
		x := r.Replica
		x.Running = s.running(r)
		x.CaughtUp = x.Running && r.rounds >= 3 && !r.Corrupt
		x.NotRunningFor = time.Duration(r.down) * time.Second
		if x.Running && !x.CaughtUp {
			x.BehindFor = time.Duration(r.rounds+1) * time.Second
		}
		in.Replicas = append(in.Replicas, x)
	}
	rand.Shuffle(len(in.Replicas), func(i, j int) { in.Replicas[i], in.Replicas[j] = in.Replicas[j], in.Replicas[i] })
	return in
}

func (s *sim) ids() (out []uint64) {
	for id := range s.replicas {
		out = append(out, id)
	}
	slices.Sort(out)
	return out
}

func (s *sim) sound() (n int) {
	for _, r := range s.replicas {
		if s.running(r) && r.rounds >= 3 && !r.Corrupt {
			n++
		}
	}
	return n
}

// spoil the replicas on some nodes.
func (s *sim) spoil(names ...string) {
	for _, r := range s.replicas {
		if slices.Contains(names, strings.TrimPrefix(r.Node, "id-")) {
			r.Corrupt = true
		}
	}
}

func (s *sim) voters() (all, up int) {
	for _, r := range s.replicas {
		if r.Voter {
			all++
			if s.running(r) {
				up++
			}
		}
	}
	return all, up
}

// elect moves the leadership to a running voter when the leader is gone.
func (s *sim) elect() {
	var best *simReplica
	for _, id := range s.ids() {
		r := s.replicas[id]
		if r.Voter && s.running(r) {
			if r.Leader {
				return
			}
			if best == nil {
				best = r
			}
		} else {
			r.Leader = false
		}
	}
	if all, up := s.voters(); best != nil && up >= quorum(all) {
		best.Leader = true
	}
}

func (s *sim) tick() {
	for _, n := range s.nodes {
		n.since++
	}
	for _, r := range s.replicas {
		if s.running(r) {
			r.rounds, r.down = r.rounds+1, 0
		} else {
			r.rounds, r.down = 0, r.down+1
		}
	}
	s.elect()
}

func (s *sim) fail(format string, args ...any) {
	s.t.Helper()
	s.t.Fatalf("%s\n%s\n%s", fmt.Sprintf(format, args...), s, strings.Join(s.trace, "\n"))
}

func (s *sim) String() string {
	var b strings.Builder
	for _, n := range s.nodes {
		fmt.Fprintf(&b, "%s(%s %s zone=%q voter=%q leaving=%v) ", n.Name, n.State, time.Duration(n.since)*time.Second, n.Zone, n.Voter(), n.Leaving)
	}
	for _, id := range s.ids() {
		r := s.replicas[id]
		fmt.Fprintf(&b, "\n  %d on %s voter=%v leader=%v running=%v rounds=%d down=%d", id, r.Node, r.Voter, r.Leader, s.running(r), r.rounds, r.down)
	}
	return b.String()
}

// Voter of a simNode is its preference.
func (n *simNode) Voter() Preference { return n.Node.Voter }

// apply executes a step and checks that it was safe.
func (s *sim) apply(st Step) {
	s.t.Helper()
	s.trace = append(s.trace, fmt.Sprintf("%v %s %d: %s", st.Action, st.Node, st.Replica, st.Reason))
	all, up := s.voters()
	if st.Reason == "" {
		s.fail("a step without a reason: %+v", st)
	}
	if strings.HasSuffix(st.Reason, anew) && s.sound() < agreeing {
		s.fail("what may be the last good copy is deleted: %+v", st)
	}
	r := s.replicas[st.Replica]
	switch st.Action {
	case Add:
		id := s.ccid + 1
		if s.used[id] {
			s.fail("replica ID %d used twice", id)
		}
		for _, r := range s.replicas {
			if r.Node == st.Node {
				s.fail("%s has a replica already", st.Node)
			}
		}
		if n := s.node(st.Node); n.State != Alive || (!s.follows && (n.Voter() == Never || n.Leaving)) {
			s.fail("%s must not get a replica", st.Node)
		}
		s.used[id], s.ccid = true, id+uint64(rand.Intn(3))
		s.replicas[id] = &simReplica{Replica: Replica{ID: id, Node: st.Node}, started: s.node(st.Node).up && rand.Intn(4) > 0}
		return
	case Start:
		if r.Voter {
			s.fail("a voter was started anew")
		}
		r.started = s.node(st.Node).up
		return
	case Promote:
		if r.Voter || !s.running(r) || r.rounds < 3 {
			s.fail("%d is not ready to vote", st.Replica)
		}
		r.Voter = true
	case Transfer:
		if !r.Voter || !s.running(r) {
			s.fail("%d cannot lead", st.Replica)
		}
		for _, o := range s.replicas {
			o.Leader = o == r
		}
		return
	case Remove:
		if r.Leader {
			s.fail("the leader is removed")
		}
		delete(s.replicas, st.Replica)
	default:
		s.fail("unknown action %v", st.Action)
	}
	s.ccid += 1 + uint64(rand.Intn(3))
	if all2, up2 := s.voters(); up >= quorum(all) && up2 < quorum(all2) {
		s.fail("the majority was given away: %d of %d voters up, before %d of %d", up2, all2, up, all)
	}
	s.elect()
}

// settle runs until nothing happens for a while.
func (s *sim) settle() Decision {
	s.t.Helper()
	var d Decision
	quiet := 0
	for i := 0; quiet < 50; i++ {
		if i > 2000 {
			s.fail("does not settle")
		}
		d = Plan(s.input())
		if d.Step.Action == Nothing {
			s.tick()
			quiet++
			continue
		}
		quiet = 0
		s.apply(d.Step)
		if rand.Intn(3) == 0 {
			s.tick()
		}
	}
	return d
}

func (s *sim) shape() string {
	var voters, spares []string
	for _, r := range s.replicas {
		n := strings.TrimPrefix(r.Node, "id-")
		if r.Voter {
			voters = append(voters, n)
		} else {
			spares = append(spares, n)
		}
	}
	slices.Sort(voters)
	slices.Sort(spares)
	return strings.Join(voters, "") + "/" + strings.Join(spares, "")
}

func TestPlan(t *testing.T) {
	joinAll := func(names ...string) func(*sim) {
		return func(s *sim) {
			for _, n := range names {
				s.join(n, "", NoPreference)
			}
		}
	}
	down := func(names ...string) func(*sim) {
		return func(s *sim) {
			for _, n := range names {
				s.set(n, false)
			}
		}
	}
	back := func(names ...string) func(*sim) {
		return func(s *sim) {
			for _, n := range names {
				s.set(n, true)
			}
		}
	}
	spoil := func(names ...string) func(*sim) { return func(s *sim) { s.spoil(names...) } }
	leave := func(name string) func(*sim) { return func(s *sim) { s.named(name).Leaving = true } }
	type stage struct {
		do      func(*sim)
		shape   string
		blocked string // a part of a reason that must be given
		refused string
	}
	for _, c := range []struct {
		name   string
		stages []stage
	}{
		{"one node", []stage{{func(*sim) {}, "a/", "", ""}}},
		{"two nodes never have two voters", []stage{{joinAll("b"), "a/b", "", ""}}},
		{"three nodes", []stage{{joinAll("b", "c"), "abc/", "", ""}}},
		{"four nodes", []stage{{joinAll("b", "c", "d"), "abc/d", "", ""}}},
		{"five nodes", []stage{{joinAll("b", "c", "d", "e"), "abc/de", "", ""}}},
		{"seven nodes", []stage{{joinAll("b", "c", "d", "e", "f", "g"), "abcde/fg", "", ""}}},
		{"eight nodes", []stage{{joinAll("b", "c", "d", "e", "f", "g", "h"), "abcde/fg", "", ""}}},
		{"grow in steps", []stage{{joinAll("b"), "a/b", "", ""}, {joinAll("c"), "abc/", "", ""}, {joinAll("d"), "abc/d", "", ""}, {joinAll("e"), "abc/de", "", ""}, {joinAll("f"), "abc/de", "", ""}, {joinAll("g"), "abcde/fg", "", ""}}},
		{"dead voter with a spare", []stage{{joinAll("b", "c", "d"), "abc/d", "", ""}, {down("b"), "acd/", "", ""}, {back("b"), "acd/b", "", ""}}},
		{"dead leader with a spare", []stage{{joinAll("b", "c", "d"), "abc/d", "", ""}, {down("a"), "bcd/", "", ""}}},
		{"dead voter without a spare is kept", []stage{{joinAll("b", "c"), "abc/", "", ""}, {down("b"), "abc/", "no spare to replace it", ""}, {back("b"), "abc/", "", ""}}},
		{"dead voter replaced by a joiner", []stage{{joinAll("b", "c"), "abc/", "", ""}, {down("b"), "abc/", "no spare", ""}, {joinAll("d"), "acd/", "", ""}, {back("b"), "acd/b", "", ""}}},
		{"two of five dead", []stage{{joinAll("b", "c", "d", "e", "f", "g"), "abcde/fg", "", ""}, {down("f", "g"), "abcde/fg", "", ""}, {down("d", "e"), "abc/fg", "", ""}, {back("d", "e", "f", "g"), "abcfg/de", "", ""}}},
		{"one of five dead", []stage{{joinAll("b", "c", "d", "e", "f", "g"), "abcde/fg", "", ""}, {down("e"), "abcdf/g", "", ""}, {down("f"), "abcdg/", "", ""}, {down("g"), "abcdg/", "no spare", ""}}},
		{"majority lost", []stage{{joinAll("b", "c"), "abc/", "", ""}, {down("b", "c"), "abc/", "without a majority", ""}}},
		{"leave of a spare", []stage{{joinAll("b"), "a/b", "", ""}, {leave("b"), "a/", "", ""}}},
		{"leave of the voter of two", []stage{{joinAll("b"), "a/b", "", ""}, {leave("a"), "b/", "", ""}}},
		{"leave of one of three", []stage{{joinAll("b", "c"), "abc/", "", ""}, {leave("c"), "a/b", "", ""}}},
		{"leave of the leader of three", []stage{{joinAll("b", "c"), "abc/", "", ""}, {leave("a"), "b/c", "", ""}}},
		{"leave of a voter with a spare", []stage{{joinAll("b", "c", "d"), "abc/d", "", ""}, {leave("b"), "acd/", "", ""}}},
		{"leave of the only node", []stage{{leave("a"), "a/", "", "only node"}}},
		{"leave while another voter is dead", []stage{{joinAll("b", "c"), "abc/", "", ""}, {down("b"), "abc/", "", ""}, {leave("c"), "abc/", "", "not reachable (b)"}}},
		{"leave of the dead one", []stage{{joinAll("b", "c", "d"), "abc/d", "", ""}, {func(s *sim) { s.set("b", false); s.named("b").Leaving = true }, "acd/", "", ""}}},
		{"label never", []stage{{joinAll("b", "c", "d"), "abc/d", "", ""}, {func(s *sim) { s.named("b").Node.Voter = Never }, "acd/", "", ""}}},
		{"label prefer", []stage{{joinAll("b", "c", "d"), "abc/d", "", ""}, {func(s *sim) { s.named("d").Node.Voter = Prefer }, "abd/c", "", ""}}},
		{"spread over zones", []stage{{joinAll("b", "c"), "abc/", "", ""}, {func(s *sim) { s.join("d", "z2", NoPreference) }, "abd/c", "", ""}}},
		{"gossip says left", []stage{{joinAll("b", "c", "d"), "abc/d", "", ""}, {func(s *sim) { s.set("b", false); s.named("b").State = Left }, "acd/", "", ""}}},
		{"other data on a voter", []stage{{joinAll("b", "c"), "abc/", "", ""}, {spoil("b"), "abc/", "", ""}}},
		{"other data on the leader", []stage{{joinAll("b", "c", "d"), "abc/d", "", ""}, {spoil("a"), "bcd/a", "", ""}}},
		{"other data on a spare", []stage{{joinAll("b", "c", "d"), "abc/d", "", ""}, {spoil("d"), "abc/d", "", ""}}},
		{"other data on two of five", []stage{{joinAll("b", "c", "d", "e"), "abc/de", "", ""}, {spoil("a", "b"), "cde/ab", "", ""}}},
		{"two that differ", []stage{{joinAll("b"), "a/b", "", ""}, {spoil("b"), "a/b", "other replicas that agree", ""}, {joinAll("c"), "abc/", "", ""}}},
		{"voter loses its disk", []stage{{joinAll("b", "c"), "abc/", "", ""}, {func(s *sim) {
			for _, r := range s.replicas {
				if r.Node == "id-b" {
					r.started = false
				}
			}
		}, "abc/", "", ""}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSim(t)
			for i, st := range c.stages {
				s.trace = append(s.trace, fmt.Sprintf("-- stage %d", i))
				st.do(s)
				d := s.settle()
				if s.shape() != st.shape {
					s.fail("stage %d: voters/spares are %s, want %s; blocked: %v", i, s.shape(), st.shape, d.Blocked)
				}
				for _, r := range s.replicas {
					if r.Corrupt && st.blocked == "" {
						s.fail("stage %d: replica %d is as it was; blocked: %v", i, r.ID, d.Blocked)
					}
				}
				if st.blocked != "" && !strings.Contains(strings.Join(d.Blocked, "\n"), st.blocked) {
					s.fail("stage %d: reason %q not in %q", i, st.blocked, d.Blocked)
				}
				if (len(d.Refused) > 0) != (st.refused != "") {
					s.fail("stage %d: refused %v", i, d.Refused)
				}
				for _, r := range d.Refused {
					if !strings.Contains(r, st.refused) {
						s.fail("stage %d: refused %q, want %q", i, r, st.refused)
					}
				}
			}
		})
	}
	// A voter that lost its disk comes back under a new replica ID.
	s := newSim(t)
	joinAll("b", "c")(s)
	s.settle()
	for id, r := range s.replicas {
		if r.Node == "id-b" {
			r.started = false
			s.settle()
			if _, still := s.replicas[id]; still {
				s.fail("the wiped voter %d still votes", id)
			}
			break
		}
	}
}

// Whatever happens to the nodes, no step gives a majority away, no ID is used
// twice, and when things calm down there is an odd number of voters, as many as
// the living nodes carry, and nothing flaps.
func TestPlanProperties(t *testing.T) {
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewSource(seed))
	rounds := 150
	if testing.Short() {
		rounds = 60
	}
	for range rounds {
		s := newSim(t)
		for step := range 300 {
			s.event(rnd, step)
			d := Plan(s.input())
			if d.Step.Action != Nothing {
				s.apply(d.Step)
			}
			if rnd.Intn(2) == 0 {
				s.tick()
			}
		}
		if all, up := s.voters(); up < quorum(all) {
			continue // lost by deaths, not by steps: nothing can be done
		}
		// Calm: everybody who is alive stays so.
		for _, n := range s.nodes {
			n.Leaving = false
			if n.up {
				n.State = Alive
			}
		}
		d := s.settle()
		if strings.Contains(strings.Join(d.Blocked, "\n"), "other replicas that agree") {
			continue // those that did have died: it waits for people
		}
		all, up := s.voters()
		eligible := 0
		for _, n := range s.nodes {
			if n.up && n.Voter() != Never {
				eligible++
			}
		}
		if all%2 == 0 && !slices.ContainsFunc(s.nodes, func(n *simNode) bool { return !n.up }) {
			s.fail("%d voters, all nodes are up; blocked: %v", all, d.Blocked)
		}
		want := 1
		if eligible >= 3 {
			want = 3
		}
		if up < want {
			s.fail("%d voters are up, %d nodes could carry %d; blocked: %v", up, eligible, want, d.Blocked)
		}
		for _, r := range s.replicas {
			if n := s.node(r.Node); n != nil && n.Voter() == Never && s.running(r) && d.Refused[n.ID] == "" && len(d.Blocked) == 0 {
				s.fail("%s holds a replica", r.Node)
			}
		}
	}
}

// event makes something happen to a node, mostly something bad.
func (s *sim) event(rnd *rand.Rand, step int) {
	pick := func() *simNode { return s.nodes[rnd.Intn(len(s.nodes))] }
	switch rnd.Intn(40) {
	case 0, 1, 2:
		if len(s.nodes) < 9 {
			s.join(fmt.Sprintf("n%d", step), []string{"", "x", "y", "z"}[rnd.Intn(4)], []Preference{"", "", "", Never, Prefer}[rnd.Intn(5)])
			s.trace = append(s.trace, "join")
		}
	case 3, 4:
		n := pick()
		all, up := s.voters()
		if up-1 >= quorum(all) { // keep the shard alive, or there is nothing to test
			s.set(n.Name, false)
			s.trace = append(s.trace, "down "+n.Name)
		}
	case 5, 6, 7:
		if n := pick(); !n.up {
			s.set(n.Name, true)
			s.trace = append(s.trace, "up "+n.Name)
		}
	case 8:
		n := pick()
		n.Leaving = !n.Leaving
		s.trace = append(s.trace, fmt.Sprintf("leaving %s %v", n.Name, n.Leaving))
	case 9:
		n := pick()
		n.Node.Voter = []Preference{"", Never, Prefer}[rnd.Intn(3)]
		s.trace = append(s.trace, fmt.Sprintf("label %s %q", n.Name, n.Node.Voter))
	case 10:
		n := pick()
		if n.up {
			n.State, n.since = Suspect, 0
		}
	case 11:
		n := pick()
		if n.up {
			n.State, n.since = Alive, 0
		}
	case 13:
		spoiled := 0
		for _, r := range s.replicas {
			if r.Corrupt {
				spoiled++
			}
		}
		if n := pick(); 2*(spoiled+1) < len(s.replicas) { // what most have is what is right
			s.spoil(n.Name)
			s.trace = append(s.trace, "spoil "+n.Name)
		}
	case 12:
		for range 35 { // let the stabilisation time pass
			s.tick()
		}
	}
}
