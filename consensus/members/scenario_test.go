package members_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"skein.io/skein/consensus/internal/storetest"
	"skein.io/skein/consensus/members"
	"skein.io/skein/consensus/shard"
)

// writers write to every shard through the nodes that run, and know what was
// acknowledged.
type writers struct {
	f      *fleet
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu    sync.Mutex // guards below
	acked map[string]string
	gap   time.Duration // the longest time without an acknowledged write, of any shard
}

func (f *fleet) write() *writers {
	ctx, cancel := context.WithCancel(context.Background())
	w := &writers{f: f, cancel: cancel, acked: map[string]string{}}
	for i, s := range shard.Default().Shards() {
		prefix := "/skein/x/"
		if len(s.Prefixes) > 0 {
			prefix = s.Prefixes[0] + "x/"
		}
		w.wg.Go(func() { w.run(ctx, s.Name, prefix, i) })
	}
	f.t.Cleanup(func() { cancel(); w.wg.Wait() })
	return w
}

func (w *writers) run(ctx context.Context, shardName, prefix string, via int) {
	last := time.Now()
	for n := 0; ctx.Err() == nil; n++ {
		via = (via + 1) % len(w.f.c.Nodes)
		h := w.f.c.Nodes[via].Host()
		if h == nil {
			continue
		}
		c, ok := h.Client(shardName)
		if !ok {
			continue
		}
		key, value := fmt.Sprintf("%s%04d", prefix, n), fmt.Sprint(n)
		wctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		_, err := c.Put(wctx, key, value)
		cancel()
		if err != nil {
			continue // not acknowledged: it may be there or not
		}
		w.mu.Lock()
		w.acked[key] = value
		w.gap = max(w.gap, time.Since(last))
		last = time.Now()
		w.mu.Unlock()
		time.Sleep(5 * time.Millisecond) // enough of them, not as many as possible
	}
}

// stop ends the writes and checks that every acknowledged one is there.
func (w *writers) stop(via int) {
	t := w.f.t
	t.Helper()
	w.cancel()
	w.wg.Wait()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for key, value := range w.acked {
		s := shard.Default().ForKey(key)
		c, ok := w.f.c.Nodes[via].Host().Client(s.Name)
		if !ok {
			t.Fatalf("node %d holds no replica of %s", via, s.Name)
		}
		if r, err := c.KV.Get(ctx, key); err != nil || len(r.Kvs) != 1 || string(r.Kvs[0].Value) != value {
			t.Fatalf("the acknowledged write of %s is lost: %v %v", key, r, err)
		}
	}
	t.Logf("%d acknowledged writes, none lost; the longest time without one in a shard: %v", len(w.acked), w.gap.Round(time.Millisecond))
	if len(w.acked) < 50 {
		t.Errorf("only %d writes: the test shows nothing", len(w.acked))
	}
}

func (f *fleet) kill(i int) {
	f.c.Nodes[i].Kill()
	f.stops[i]()
	f.stops[i] = func() {}
	f.set(i, members.Dead)
}

func (f *fleet) revive(i int) {
	f.c.Nodes[i].Start()
	f.run(i)
	f.set(i, members.Alive)
}

func (f *fleet) why(i int) string {
	for _, m := range f.mgr {
		if d, ok := m.Decisions()[storetest.Shard]; ok && d.Why[f.c.Nodes[i].ID] != "" {
			return d.Why[f.c.Nodes[i].ID]
		}
	}
	return ""
}

// Five nodes in three zones: one voter in each. A zone is lost and comes back.
func TestZoneIsLost(t *testing.T) {
	f := newFleet(t, 5, "x", "y", "z", "x", "y")
	f.grow(5)
	f.wait(0, "012/34")
	if why := f.why(3); !strings.Contains(why, "zone x has 1 of the 3 voters") {
		t.Errorf("node 3: %q", why)
	}
	w := f.write()
	f.kill(2)
	f.c.Until("the replacement of the dead voter", func() error {
		got, _, err := f.shape(0)
		if err == nil && got != "013/4" && got != "014/3" {
			err = fmt.Errorf("it is %s; %+v", got, f.mgr[0].Decisions())
		}
		return err
	})
	f.revive(2)
	f.c.Until("a voter in each zone again", func() error {
		got, _, err := f.shape(0)
		if voters, _, _ := strings.Cut(got, "/"); err == nil && (!strings.Contains(voters, "2") || len(got) != 6 || voters == "023" || voters == "124") {
			err = fmt.Errorf("it is %s; %+v", got, f.mgr[0].Decisions())
		}
		return err
	})
	f.ready(2)
	w.stop(2)
}

// The leader's disk becomes slow: it loses the leaderships and its votes, and gets
// them back neither when the others have a bad day too nor when it is fast for a
// moment. Nobody loses a vote when all are slow.
func TestSlowDisk(t *testing.T) {
	f := newFleet(t, 4)
	f.grow(4)
	f.wait(0, "012/3")
	w := f.write()
	slow := f.c.Leader()
	via := (slow + 1) % 3
	f.setDisk(350*time.Millisecond, slow)
	want := strings.Replace("0123", fmt.Sprint(slow), "", 1) + "/" + fmt.Sprint(slow)
	f.wait(via, want)
	for _, s := range shard.Default().Shards() {
		if l := f.c.LeaderOf(s.Name); l == slow {
			t.Errorf("the slow node leads shard %s", s.Name)
		}
	}
	f.c.Until("the reason", func() error {
		if why := f.why(slow); !strings.Contains(why, "slow disk: fsync p90 350ms") {
			return errors.New(why)
		}
		return nil
	})
	f.setDisk(300*time.Millisecond, 0, 1, 2, 3)
	f.steady(via, want, 2*time.Second)
	f.setDisk(time.Millisecond, slow)
	f.steady(via, want, time.Second)
	w.stop(via)
}

func (f *fleet) setDisk(d time.Duration, nodes ...int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, n := range nodes {
		f.disk[n] = d
	}
}

// steady checks that nothing changes for a while, which is what it is about.
func (f *fleet) steady(via int, want string, d time.Duration) {
	f.t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if got, _, err := f.shape(via); err == nil && got != want {
			f.t.Fatalf("it is %s, no longer %s; %+v", got, want, f.mgr[via].Decisions())
		}
	}
}

// Labels are obeyed when that is safe, and refused for the last who could vote.
func TestLabels(t *testing.T) {
	f := newFleet(t, 4)
	f.grow(4)
	f.wait(0, "012/3")
	w := f.write()
	label := func(i int, p members.Preference) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.voter[f.c.Nodes[i].ID] = p
	}
	label(1, members.Never)
	f.wait(0, "023/")
	label(1, members.Prefer)
	f.c.Until("the preferred node to vote", func() error {
		got, _, err := f.shape(0)
		if voters, spares, _ := strings.Cut(got, "/"); err == nil && (!strings.Contains(voters, "1") || len(voters) != 3 || len(spares) != 1) {
			err = fmt.Errorf("it is %s; %+v", got, f.mgr[0].Decisions())
		}
		return err
	})
	before, _, err := f.shape(0)
	if err != nil {
		t.Fatal(err)
	}
	voters, spare, _ := strings.Cut(before, "/")
	label(int(spare[0]-'0'), members.Never)
	f.wait(0, voters+"/")
	for _, v := range voters {
		label(int(v-'0'), members.Never)
	}
	f.steady(0, voters+"/", time.Second)
	for _, v := range voters {
		if why := f.why(int(v - '0')); !strings.Contains(why, "is not obeyed") {
			t.Errorf("node %c: %q", v, why)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := f.mgr[0].MayLabel(ctx, f.c.Nodes[0].ID, members.Never); !errors.Is(err, members.ErrUnsafeLabel) {
		t.Errorf("the label of the last ones: %v", err)
	} else {
		t.Log(err)
	}
	label(0, members.NoPreference)
	f.wait(0, "0/")
	w.stop(0)
}
