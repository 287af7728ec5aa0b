package members

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/shard"
)

// leaders is a store in which leaderships move at once, or not at all.
type leaders struct {
	mu    sync.Mutex // guards below
	at    map[string]uint64
	fail  error
	moves []time.Time
}

func (l *leaders) Shards() shard.Table { return shard.Default() }

func (l *leaders) Status() (out []host.ShardStatus) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var voters []host.Member
	for i := range 3 {
		voters = append(voters, host.Member{Replica: uint64(i + 1), NodeHostID: fmt.Sprint(i + 1), Node: fmt.Sprint("n", i+1)})
	}
	for _, s := range shard.Default().Shards() {
		out = append(out, host.ShardStatus{Shard: s.Name, Leader: voters[l.at[s.Name]-1], Voters: voters})
	}
	return out
}

func (l *leaders) TransferLeadership(_ context.Context, shardName string, to uint64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.moves = append(l.moves, time.Now())
	if l.fail == nil {
		l.at[shardName] = to
	}
	return l.fail
}

func (l *leaders) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.moves)
}

// balance runs a Balancer in virtual time.
func balance(t *testing.T, step *Action, f func(*leaders)) {
	synctest.Test(t, func(t *testing.T) {
		l := &leaders{at: map[string]uint64{"system": 1, "pods": 1, "events": 1}}
		b, err := NewBalancer(BalancerConfig{Store: l,
			Decisions: func() map[string]Decision {
				d := Decision{Step: Step{Action: *step}, Goal: []string{"1", "2", "3"}}
				return map[string]Decision{"system": d, "pods": d, "events": d}
			},
			Members: func() []Node { return []Node{{ID: "1"}, {ID: "2"}, {ID: "3"}} }})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { b.Run(ctx) })
		f(l)
		cancel()
		wg.Wait()
	})
}

func TestBalancerMovesOneAtATime(t *testing.T) {
	step := Nothing
	balance(t, &step, func(l *leaders) {
		time.Sleep(4 * time.Second)
		if n := l.count(); n != 0 {
			t.Errorf("%d moves before the time to settle", n)
		}
		time.Sleep(time.Minute)
		l.mu.Lock()
		if len(l.moves) != 2 || l.moves[1].Sub(l.moves[0]) < 15*time.Second || l.at["system"] != 1 || l.at["pods"] == l.at["events"] || l.at["pods"] == 1 {
			t.Errorf("moves at %v lead to %v", l.moves, l.at)
		}
		l.mu.Unlock()
		time.Sleep(time.Hour)
		if n := l.count(); n != 2 {
			t.Errorf("%d moves in an hour, although all is even", n)
		}
	})
}

func TestBalancerWaitsForReplicas(t *testing.T) {
	step := Promote
	balance(t, &step, func(l *leaders) {
		time.Sleep(time.Minute)
		if n := l.count(); n != 0 {
			t.Errorf("%d moves while replicas are being moved", n)
		}
	})
}

// A transfer that fails is tried less and less often.
func TestBalancerBacksOff(t *testing.T) {
	step := Nothing
	balance(t, &step, func(l *leaders) {
		l.mu.Lock()
		l.fail = errors.New("no")
		l.mu.Unlock()
		time.Sleep(time.Hour)
		if n := l.count(); n < 10 || n > 20 { // 3600 s / 240 s, and some at the beginning
			t.Errorf("%d attempts in an hour", n)
		}
	})
}
