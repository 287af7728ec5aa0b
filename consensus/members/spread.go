package members

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// Seat is the leadership of a shard.
type Seat struct {
	Shard string
	// System: it is the shard whose leader leads the cluster.
	System bool
	// Leader is the NodeHostID of its leader, "" if unknown.
	Leader string
	Voters []Candidate
}

// Candidate is a voter of a shard.
type Candidate struct {
	// Node is its NodeHostID, Name what people call it.
	Node, Name string
	Replica    uint64
	// Fit to lead: alive, and to stay a voter.
	Fit bool
	// RTT is the time of a round trip between it and the cluster's leader, 0 if
	// unknown or itself.
	RTT time.Duration
}

// Move of a leadership.
type Move struct {
	Shard, From, To string // nodes by NodeHostID
	Replica         uint64 // on To
	Reason          string
}

// systemLoad is what the cluster's leader carries for it, in shards: it runs the
// scheduler and the controllers too.
const systemLoad = 2

// Spread names the one leadership to move, if any, so that they are spread over
// the voters. It is a pure function, and stable: a move makes the loads strictly
// more even, or brings a leader from afar near, and never the reverse, so moves
// come to an end. It waits (false) while a leader is unknown.
//
// The leader of the system shard is never moved, since that stops the scheduler
// and the controllers for a moment. A voter whose round trip to the cluster's
// leader takes longer than far gets nothing: a write of the controllers to a shard
// that another node leads takes one round trip more. One that takes more than
// twice as long loses what it leads to a near one; the gap keeps estimates that
// waver from moving anything.
func Spread(seats []Seat, far time.Duration) (Move, bool) {
	load, names := map[string]int{}, map[string]string{}
	for _, s := range seats {
		if s.Leader == "" {
			return Move{}, false
		}
		load[s.Leader] += weight(s)
		for _, v := range s.Voters {
			names[v.Node] = v.Name
		}
	}
	seats = slices.Clone(seats)
	slices.SortFunc(seats, func(a, b Seat) int {
		return cmp.Or(cmp.Compare(load[b.Leader], load[a.Leader]), cmp.Compare(a.Shard, b.Shard))
	})
	for _, s := range seats {
		if s.System {
			continue
		}
		to, ok := bestSeat(s, load, far)
		if !ok {
			continue
		}
		m := Move{Shard: s.Shard, From: s.Leader, To: to.Node, Replica: to.Replica}
		switch i := slices.IndexFunc(s.Voters, func(v Candidate) bool { return v.Node == s.Leader }); {
		case i >= 0 && s.Voters[i].RTT > 2*far:
			m.Reason = fmt.Sprintf("%s is %v from the cluster's leader, %s is %v", names[s.Leader], s.Voters[i].RTT.Round(time.Millisecond), to.Name, to.RTT.Round(time.Millisecond))
			return m, true
		case load[s.Leader]-load[to.Node] > weight(s):
			m.Reason = fmt.Sprintf("%s carries %s, %s %s", names[s.Leader], led(seats, s.Leader), to.Name, led(seats, to.Node))
			return m, true
		}
	}
	return Move{}, false
}

func weight(s Seat) int {
	if s.System {
		return systemLoad
	}
	return 1
}

// bestSeat is the fit and near voter that carries least, but the leader.
func bestSeat(s Seat, load map[string]int, far time.Duration) (best Candidate, ok bool) {
	for _, v := range s.Voters {
		if !v.Fit || v.Node == s.Leader || v.RTT > far {
			continue
		}
		if !ok || cmp.Or(cmp.Compare(load[v.Node], load[best.Node]), cmp.Compare(v.Name, best.Name), cmp.Compare(v.Node, best.Node)) < 0 {
			best, ok = v, true
		}
	}
	return best, ok
}

// led names the shards that a node leads.
func led(seats []Seat, node string) string {
	out := "nothing"
	n := 0
	for _, s := range seats {
		if s.Leader == node {
			if n++; n == 1 {
				out = s.Shard
			} else {
				out += "+" + s.Shard
			}
		}
	}
	return out
}
