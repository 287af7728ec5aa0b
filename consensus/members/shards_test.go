package members

import (
	"fmt"
	"math/rand"
	"slices"
	"strings"
	"testing"
	"time"
)

// fleetSim is three shards on the same nodes, with one sim each; the nodes are
// shared. Steps may fail in the middle, leaders change, disks become slow, zones
// are lost, and a shard may be out of reach for a while.
type fleetSim struct {
	t      *testing.T
	rnd    *rand.Rand
	shards []*sim
	broken []bool // the shard cannot be looked at
	trace  []string
	votes  map[string]int // changes of votes since the last event, by node
}

func newFleetSim(t *testing.T, rnd *rand.Rand) *fleetSim {
	f := &fleetSim{t: t, rnd: rnd, broken: make([]bool, 3), votes: map[string]int{}}
	for i := range 3 {
		s := newSim(t)
		if i > 0 {
			s.nodes, s.follows = f.shards[0].nodes, true
		}
		f.shards = append(f.shards, s)
	}
	return f
}

func (f *fleetSim) nodes() []*simNode { return f.shards[0].nodes }

func (f *fleetSim) log(format string, args ...any) {
	f.trace = append(f.trace, fmt.Sprintf(format, args...))
}

func (f *fleetSim) fail(format string, args ...any) {
	f.t.Helper()
	var b strings.Builder
	for i, s := range f.shards {
		fmt.Fprintf(&b, "shard %d: %s\n", i, s)
	}
	f.t.Fatalf("%s\n%s\n%s", fmt.Sprintf(format, args...), b.String(), strings.Join(f.trace, "\n"))
}

// round is what Manager.round does.
func (f *fleetSim) round() (steps int, decisions []Decision) {
	all := make([]*facts, len(f.shards))
	for i, s := range f.shards {
		all[i] = &facts{in: s.input()}
		all[i].shard.ID, all[i].shard.Name = 1, "system"
		if i > 0 {
			all[i].shard.ID, all[i].shard.Name = 2, fmt.Sprint("shard", i)
		}
		if f.broken[i] {
			all[i].err = fmt.Errorf("broken")
		}
	}
	var system *Decision
	for i, s := range f.shards {
		if f.broken[i] {
			decisions = append(decisions, Decision{})
			continue
		}
		for range 4 {
			d := Plan(all[i].input(all, system))
			if i == 0 {
				system = &d
			}
			if d.Step.Action == Nothing {
				decisions = append(decisions, d)
				break
			}
			steps++
			f.log("shard %d: %v %s %d: %s", i, d.Step.Action, d.Step.Node, d.Step.Replica, d.Step.Reason)
			if f.rnd.Intn(8) == 0 {
				f.log("  failed before it began")
				break
			}
			f.check(i, d)
			s.apply(d.Step)
			if d.Step.Action == Promote || d.Step.Action == Remove {
				f.votes[d.Step.Node]++
			}
			all[i].in = s.input()
			if f.rnd.Intn(8) == 0 {
				f.log("  and then this leader of the cluster died")
				return steps, nil
			}
		}
	}
	return steps, decisions
}

// check: whoever votes in the system shard holds the other shards.
func (f *fleetSim) check(i int, d Decision) {
	f.t.Helper()
	for j, s := range f.shards {
		holds := slices.ContainsFunc(s.ids(), func(id uint64) bool { return s.replicas[id].Node == d.Step.Node })
		if i == 0 && j > 0 && d.Step.Action == Promote && !f.broken[j] && !holds {
			f.fail("%s votes in the system shard without a replica of shard %d", d.Step.Node, j)
		}
	}
	if i > 0 && d.Step.Action == Remove {
		r := f.shards[i].replicas[d.Step.Replica]
		for _, o := range f.shards[0].replicas {
			if o.Node == d.Step.Node && o.Voter && r != nil && f.shards[i].running(r) {
				f.fail("%s loses its replica of shard %d but votes in the system shard", d.Step.Node, i)
			}
		}
	}
}

// alive: every shard keeps its majority if that node goes.
func (f *fleetSim) alive(without func(*simNode) bool) bool {
	for _, s := range f.shards {
		all, up := 0, 0
		for _, r := range s.replicas {
			if r.Voter {
				all++
				if s.running(r) && !without(s.node(r.Node)) {
					up++
				}
			}
		}
		if up < quorum(all) {
			return false
		}
	}
	return true
}

func (f *fleetSim) set(n *simNode, up bool) {
	f.log("%s up=%v", n.Name, up)
	f.shards[0].set(n.Name, up)
}

func (f *fleetSim) event(step int) {
	pick := func() *simNode { return f.nodes()[f.rnd.Intn(len(f.nodes()))] }
	zones := []string{"x", "y", "z"}
	switch f.rnd.Intn(24) {
	case 0, 1, 2:
		if len(f.nodes()) < 10 {
			n := f.shards[0].join(fmt.Sprintf("n%d", step), zones[f.rnd.Intn(3)], []Preference{"", "", "", "", Never, Prefer}[f.rnd.Intn(6)])
			for _, s := range f.shards {
				s.nodes = f.shards[0].nodes
			}
			f.log("%s joins zone %s %q", n.Name, n.Zone, n.Voter())
		}
	case 3, 4:
		n := pick()
		if n.up && f.alive(func(o *simNode) bool { return o == n }) {
			f.set(n, false)
		}
	case 5, 6, 7:
		if n := pick(); !n.up {
			f.set(n, true)
		}
	case 8:
		z := zones[f.rnd.Intn(3)]
		if f.alive(func(o *simNode) bool { return o.Zone == z }) {
			f.log("zone %s is lost", z)
			for _, n := range f.nodes() {
				if n.Zone == z && n.up {
					f.set(n, false)
				}
			}
		}
	case 9:
		n := pick()
		n.Node.Voter = []Preference{"", Never, Prefer}[f.rnd.Intn(3)]
		f.log("label %s %q", n.Name, n.Node.Voter)
	case 10:
		n := pick()
		n.Leaving = !n.Leaving
		f.log("%s leaving=%v", n.Name, n.Leaving)
	case 11, 12:
		n := pick()
		n.Disk = Disk{Sync: time.Duration(1+f.rnd.Intn(3)) * time.Millisecond}
		if f.rnd.Intn(3) == 0 {
			n.Disk = Disk{Sync: time.Duration(200+f.rnd.Intn(300)) * time.Millisecond, Slow: true}
		}
		f.log("disk of %s: %+v", n.Name, n.Disk)
	case 13:
		i := f.rnd.Intn(3)
		f.broken[i] = i > 0 && !f.broken[i]
		f.log("shard %d broken=%v", i, f.broken[i])
	case 14: // another leader, of one shard
		s := f.shards[f.rnd.Intn(3)]
		for _, r := range s.replicas {
			r.Leader = false
		}
		s.elect()
	case 15, 16:
		for range 35 {
			f.tick()
		}
	}
}

func (f *fleetSim) tick() {
	for i, s := range f.shards {
		s.tick()
		if i > 0 { // the nodes are shared: their clocks went on once already
			for _, n := range s.nodes {
				n.since--
			}
		}
	}
}

// Whatever happens: no majority is given away, no ID is used twice (sim.apply
// checks both), whoever may lead the cluster holds all shards; and when it calms
// down all shards have the same, odd number of voters on the same nodes, spread
// over the zones, and nothing moves any more.
func TestShardsProperties(t *testing.T) {
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewSource(seed))
	rounds := 60
	if testing.Short() {
		rounds = 30
	}
	calm := 0
	for range rounds {
		f := newFleetSim(t, rnd)
		for step := range 250 {
			f.event(step)
			f.round()
			if rnd.Intn(2) == 0 {
				f.tick()
			}
		}
		for i := range f.broken {
			f.broken[i] = false
		}
		for _, n := range f.nodes() {
			n.Leaving = false
			if !n.up && rnd.Intn(2) == 0 {
				f.set(n, true)
			}
			if n.up {
				n.State = Alive
			}
		}
		if !f.alive(func(*simNode) bool { return false }) {
			continue // lost by deaths, not by steps
		}
		calm++
		f.settle()
	}
	t.Logf("%d of %d histories ended with a majority", calm, rounds)
	if calm < rounds/2 {
		t.Error("too few to show anything")
	}
}

func (f *fleetSim) settle() {
	f.t.Helper()
	f.log("-- calm")
	var last []Decision
	for quiet, i := 0, 0; quiet < 60; i++ {
		steps, decisions := f.round()
		if quiet++; steps > 0 {
			quiet = 0
		}
		if i > 1500 {
			f.fail("does not settle")
		}
		if decisions != nil {
			last = decisions
		}
		f.tick()
	}
	up, zones := 0, map[string]int{}
	for _, n := range f.nodes() {
		if n.up && n.Voter() != Never {
			up++
			zones[n.Zone]++
		}
	}
	voters := func(s *sim) (out []string) {
		for _, r := range s.replicas {
			if r.Voter {
				out = append(out, r.Node)
			}
		}
		slices.Sort(out)
		return out
	}
	want := voters(f.shards[0])
	refused := 0
	for i, s := range f.shards {
		refused += len(last[i].Refused) + len(last[i].Blocked)
		if got := voters(s); !slices.Equal(got, want) && len(last[i].Blocked) == 0 {
			f.fail("shard %d has the voters %v, the system shard %v; blocked: %v", i, got, want, last[i].Blocked)
		}
		if all, living := s.voters(); living < quorum(all) || (all%2 == 0 && len(last[i].Blocked) == 0) || (living < min(3, up) && living < 3 && up >= 3) {
			f.fail("shard %d: %d of %d voters live, %d nodes could vote; blocked: %v", i, living, all, up, last[i].Blocked)
		}
	}
	// Without labels that pull voters together and dead ones that are kept, each of
	// three zones has one.
	plain := refused == 0 && len(zones) >= 3 && len(want) >= 3
	for _, n := range f.nodes() {
		plain = plain && n.Voter() != Prefer
	}
	have := map[string]bool{}
	for _, v := range want {
		n := f.shards[0].node(v)
		have[n.Zone] = true
		plain = plain && n.up
	}
	if plain && len(have) < 3 {
		f.fail("the voters %v are in the zones %v, there are %v", want, have, zones)
	}
}
