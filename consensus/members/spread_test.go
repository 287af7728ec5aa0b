package members

import (
	"fmt"
	"math/rand"
	"strings"
	"testing"
	"time"
)

const farAway = 10 * time.Millisecond

// seatsOf makes seats of "shard=leader" and voters of "name" or "name:rtt" or
// "name!" (not fit); the first shard is system.
func seatsOf(shards, voters string) (out []Seat) {
	var cs []Candidate
	for i, v := range strings.Fields(voters) {
		name, rtt, _ := strings.Cut(v, ":")
		name, down := strings.CutSuffix(name, "!")
		d, _ := time.ParseDuration(rtt)
		cs = append(cs, Candidate{Node: name, Name: name, Replica: uint64(i + 1), Fit: !down, RTT: d})
	}
	for i, s := range strings.Fields(shards) {
		shard, leader, _ := strings.Cut(s, "=")
		out = append(out, Seat{Shard: shard, System: i == 0, Leader: leader, Voters: cs})
	}
	return out
}

func TestSpread(t *testing.T) {
	for _, c := range []struct{ name, shards, voters, want string }{
		{"one voter", "system=a pods=a events=a", "a", ""},
		{"all on one", "system=a pods=a events=a", "a b c", "events a>b"},
		{"two on the cluster's leader", "system=a pods=a events=b", "a b c", "pods a>c"},
		{"one each", "system=a pods=b events=c", "a b c", ""},
		{"two on another", "system=a pods=b events=b", "a b c", "events b>c"},
		{"one of two voters is down", "system=a pods=a events=a", "a b! c", "events a>c"},
		{"no better than before", "system=a pods=c events=c", "a b! c", ""},
		{"all others are down", "system=a pods=a events=a", "a b! c!", ""},
		{"the new cluster leader has pods too", "system=b pods=b events=c", "a b c", "pods b>a"},
		{"a leader is unknown", "system=a pods= events=a", "a b c", ""},
		{"the others are far", "system=a pods=a events=a", "a b:40ms c:60ms", ""},
		{"one is near", "system=a pods=a events=a", "a b:1ms c:60ms", "events a>b"},
		{"a far one leads", "system=a pods=c events=b", "a b:1ms c:60ms", "pods c>b"},
		{"only far ones beside", "system=a pods=c events=b", "a b:50ms c:60ms", "events b>a"},
		{"at the border nothing moves", "system=a pods=c events=b", "a b:1ms c:15ms", ""},
		{"five voters", "system=a pods=a events=b", "a b c d e", "pods a>c"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m, ok := Spread(seatsOf(c.shards, c.voters), farAway)
			got := ""
			if ok {
				got = fmt.Sprintf("%s %s>%s", m.Shard, m.From, m.To)
			}
			if got != c.want {
				t.Errorf("%q (%s), want %q", got, m.Reason, c.want)
			}
			if ok && m.Reason == "" {
				t.Error("a move without a reason")
			}
		})
	}
}

// From any state moves come to an end, none of them touches the system shard or
// goes to a voter that must not lead, and where all voters are fit and near, the
// end is even.
func TestSpreadComesToAnEnd(t *testing.T) {
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewSource(seed))
	for range 5000 {
		nodes, shards := 1+r.Intn(6), 1+r.Intn(7)
		healthy := r.Intn(2) == 0
		var cs []Candidate
		for i := range nodes {
			c := Candidate{Node: fmt.Sprint("n", i), Name: fmt.Sprint("n", i), Replica: uint64(i + 1), Fit: true}
			if !healthy {
				c.Fit, c.RTT = r.Intn(3) > 0, time.Duration(r.Intn(40))*time.Millisecond
			}
			cs = append(cs, c)
		}
		var seats []Seat
		for i := range shards {
			seats = append(seats, Seat{Shard: fmt.Sprint("s", i), System: i == 0, Leader: cs[r.Intn(nodes)].Node, Voters: cs})
		}
		start := fmt.Sprintf("%+v", seats)
		for n := 0; ; n++ {
			m, ok := Spread(seats, farAway)
			if !ok {
				break
			}
			if n > 2*shards {
				t.Fatalf("no end: %s\nnow %+v", start, seats)
			}
			apply(t, seats, m, start)
		}
		if healthy {
			even(t, seats, cs, start)
		}
	}
}

func apply(t *testing.T, seats []Seat, m Move, start string) {
	t.Helper()
	for i := range seats {
		s := &seats[i]
		if s.Shard != m.Shard {
			continue
		}
		if s.System || s.Leader != m.From {
			t.Fatalf("%+v of %+v", m, s)
		}
		for _, v := range s.Voters {
			if v.Node == m.To && (!v.Fit || v.RTT > farAway || v.Replica != m.Replica) {
				t.Fatalf("%+v: the heir is %+v (%s)", m, v, start)
			}
		}
		s.Leader = m.To
	}
}

func even(t *testing.T, seats []Seat, cs []Candidate, start string) {
	t.Helper()
	load := map[string]int{}
	for _, s := range seats {
		load[s.Leader] += weight(s)
	}
	for _, s := range seats {
		for _, c := range cs {
			if !s.System && load[s.Leader]-load[c.Node] > 1 {
				t.Fatalf("%v is not even (%s)", load, start)
			}
		}
	}
}
