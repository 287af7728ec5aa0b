package host

import (
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

const mib = 1 << 20

func always(bytes uint64) func(uint64) uint64 { return func(uint64) uint64 { return bytes } }

// daemon is like that of a node with an API.
func daemon() Pace {
	p := Pace{Percent: 25, Share: 10, Most: always(160 * mib), CalmAfter: time.Hour}
	p.setDefaults()
	return p
}

// process is one that runs in virtual time: the accounts that the runtime would give.
type process struct {
	account
	mark float64 // nanoseconds of a collection for each byte in use
}

// collect allocates as much as a percentage allows, at a rate in bytes a second on a number of processors, until the next collection.
func (p *process) collect(percent int, rate, processors float64) account {
	room := p.live * uint64(percent) / 100
	took := time.Duration(float64(room) / rate * float64(time.Second))
	p.at = p.at.Add(took)
	p.allocated += room
	p.used += time.Duration(float64(took) * processors)
	p.collector += time.Duration(float64(p.live) * p.mark)
	p.collections++
	return p.account
}

func pace(p Pace) *pacer { return &pacer{Pace: p, now: p.Percent} }

// There is as much room as keeps the collector within its share, no less than the floor, no more than the bound.
func TestRoom(t *testing.T) {
	for name, c := range map[string]struct {
		live, rate uint64  // MiB, and a second
		processors float64 // that are used meanwhile
		burst      bool
		want       uint64 // MiB
	}{
		"idle":                          {40, 1, 0.02, false, 10},
		"Leases of 5,000 nodes":         {120, 20, 0.4, false, 30},
		"creates":                       {60, 300, 1, false, 160},
		"creates, in turns with others": {60, 200, 0.66, false, 160},
		"creates, on a larger machine":  {60, 600, 4, false, 94},
		"creates, much in use":          {120, 250, 2, false, 157},
		"lists, much in use":            {100, 400, 1, false, 160},
		"a list now and then":           {100, 8, 0.1, false, 25},
		"bindings, a burst":             {60, 200, 2, true, 160},
		"a burst of nothing":            {60, 1, 0.02, true, 160},
		"more in use than the bound":    {1000, 1000, 2, false, 250},
		"nothing in use":                {0, 1000, 2, false, 0},
	} {
		costs := costs{mark: 1}.of(account{}, account{at: time.Time{}.Add(time.Second), allocated: c.rate * mib, used: time.Duration(c.processors * float64(time.Second))})
		if got := (daemon().room(costs, c.live*mib, c.burst) + mib/2) / mib; got != c.want {
			t.Errorf("%s: %d MiB, want %d", name, got, c.want)
		}
	}
}

// Whatever a process does, the room lies between floor and bound; and when it goes on doing the same, the collector takes its share.
func TestPaceOfAnyProcess(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	p := pace(daemon())
	defer p.set(100) // Go's default
	sim := process{account: account{live: 50 * mib}}
	for phase := range 200 {
		sim.mark = 0.5 + 2*r.Float64()
		sim.live = uint64(1+r.IntN(500)) * mib
		rate, processors := mib*(0.1+500*r.Float64()*r.Float64()), 0.01+2*r.Float64()
		var was account
		for range 60 {
			was = sim.account
			p.collected(sim.collect(p.now, rate, processors))
			room := sim.live * uint64(p.now) / 100
			if p.now < 25 || room > max(160*mib, sim.live/4) {
				t.Fatalf("phase %d: room for %d MiB with %d in use (%d %%)", phase, room/mib, sim.live/mib, p.now)
			}
		}
		took := float64(sim.collector - was.collector)
		share, ofSpare := took/float64(sim.used-was.used), took/(spare*float64(sim.at.Sub(was.at)))
		room := sim.live * uint64(p.now) / 100
		if p.now > 25 && share < 0.095 || room+sim.live/100 < 160*mib && min(share, ofSpare) > 0.105 {
			t.Errorf("phase %d: the collector takes %.1f %% of what the rest uses and %.1f %% of spare processors with room for %d MiB and %d in use", phase, 100*share, 100*ofSpare, room/mib, sim.live/mib)
		}
	}
	p.calm.Stop()
}

// A load has its room with the next collection, and what comes after it loses that with the first.
func TestPaceFollowsTheLoad(t *testing.T) {
	p := pace(daemon())
	defer p.set(100) // Go's default
	sim := process{account: account{live: 60 * mib}, mark: 1}
	steps := func(n int, rate, processors float64) (took time.Duration) {
		from := sim.at
		for range n {
			p.collected(sim.collect(p.now, rate*mib, processors))
		}
		return sim.at.Sub(from)
	}
	steps(5, 0.3, 0.02)
	if p.now != 25 || p.calm != nil {
		t.Fatalf("idle: %d %%", p.now)
	}
	if took := steps(1, 300, 1); p.now < 150 || took > 200*time.Millisecond {
		t.Errorf("under load: %d %% after %v", p.now, took)
	}
	if p.calm == nil {
		t.Fatal("memory is not given back after the load")
	}
	if steps(1, 0.3, 0.02); p.now != 25 {
		t.Errorf("after the load: %d %%", p.now)
	}
	if !p.calm.Stop() {
		t.Error("memory is not given back after the load")
	}
	// The heap grows under load: marking takes longer, up to the bound.
	for sim.live = 60 * mib; sim.live < 1000*mib; sim.live += 20 * mib {
		steps(1, 300, 1)
	}
	if steps(1, 300, 1); p.now != 25 {
		t.Errorf("with 1,000 MiB in use: %d %%", p.now)
	}
	p.calm.Stop()
}

// After a load its memory is given back, though a smaller one goes on, and when that is over what it had.
func TestPaceGivesBackUnderLessLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := daemon()
		d.CalmAfter = 10 * time.Second
		p := pace(d)
		defer p.set(100) // Go's default
		sim := process{account: account{live: 60 * mib}, mark: 1}
		state := func() (percent int, most uint64) { p.mu.Lock(); defer p.mu.Unlock(); return p.now, p.most / mib }
		run := func(d time.Duration, rate float64) {
			for end := time.Now().Add(d); time.Now().Before(end); {
				at := sim.at
				percent, _ := state()
				sim.collect(percent, rate*mib, 1)
				time.Sleep(sim.at.Sub(at))
				p.collected(sim.account)
			}
		}
		run(time.Minute, 600)
		if _, most := state(); most != 160 {
			t.Errorf("under load: %d MiB", most)
		}
		run(12*time.Second, 80) // some 25 MiB
		if percent, most := state(); most >= 80 || percent <= 25 {
			t.Errorf("under less load: %d MiB were not given back, now %d %%", most, percent)
		}
		run(time.Minute, 80)
		if _, most := state(); most == 0 {
			t.Error("memory is given back under a steady load")
		}
		time.Sleep(11 * time.Second)
		synctest.Wait()
		if percent, most := state(); most != 0 || percent != 25 {
			t.Errorf("without load: %d MiB were not given back, now %d %%", most, percent)
		}
	})
}

// What is asked for the bound counts at once, in a burst as well.
func TestPaceIsBounded(t *testing.T) {
	most := uint64(160 * mib)
	d := daemon()
	d.Most = func(uint64) uint64 { return most }
	p := pace(d)
	defer p.set(100) // Go's default
	sim := process{account: account{live: 64 * mib}, mark: 1}
	for range 3 {
		p.collected(sim.collect(p.now, 400*mib, 1))
	}
	if p.now < 200 {
		t.Errorf("under load: %d %%", p.now)
	}
	most = 32 * mib
	p.burst = sim.at.Add(time.Hour)
	if p.collected(sim.collect(p.now, 400*mib, 1)); p.now != 50 {
		t.Errorf("with less room: %d %%", p.now)
	}
	p.calm.Stop()
}

func TestPaceIsChecked(t *testing.T) {
	if err := (Pace{}).Validate(); err == nil {
		t.Error("settings without defaults are taken")
	}
	var p Pace
	p.setDefaults()
	if err := p.Validate(); err != nil {
		t.Error(err)
	}
	err := Pace{Percent: -1, Share: -2, BurstFor: -3, CalmAfter: -4}.Validate()
	for _, what := range []string{"Percent -1", "Share -2", "Most", "BurstFor -3ns", "CalmAfter -4ns"} {
		if err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%v, nothing about %s", err, what)
		}
	}
}

// Told of a burst, the collector leaves room at once, within the bound, and takes it back when it is over.
func TestPaceWhenTold(t *testing.T) {
	p := pace(daemon())
	p.BurstFor = 2 * time.Second
	defer p.set(100) // Go's default
	at := time.Unix(1e9, 0)
	live := func(n uint64) func() account {
		return func() account { return account{live: n * mib} }
	}
	if p.hurry(at, live(40)); p.now != 400 {
		t.Errorf("at the beginning of a burst: %d %%, want 400", p.now)
	}
	if p.calm == nil {
		t.Fatal("memory is not given back after the burst")
	}
	p.hurry(at.Add(time.Second), func() account { t.Error("a burst that goes on is looked at"); return account{} })
	p.collected(account{at: at.Add(2 * time.Second), live: 80 * mib, allocated: 160 * mib, collections: 1, collector: 80 * time.Millisecond})
	if p.now != 200 {
		t.Errorf("with more in use: %d %%, want 200: no more than the bound", p.now)
	}
	p.collected(account{at: at.Add(time.Minute), live: 80 * mib, allocated: 200 * mib, collections: 2, collector: 160 * time.Millisecond})
	if p.now != 25 {
		t.Errorf("after the burst: %d %%", p.now)
	}
	if !p.calm.Stop() {
		t.Error("memory is not given back after the burst")
	}
}

// The runtime's own figures make sense: a collection takes time and tells what is in use.
func TestAccountOfTheRuntime(t *testing.T) {
	keep := make([]*[64]byte, 1<<16)
	for i := range keep {
		keep[i] = new([64]byte)
	}
	was := collectAndTake()
	is := collectAndTake()
	if is.collections <= was.collections || is.collector <= was.collector || is.used < was.used || is.allocated < was.allocated || is.live < 64<<16 {
		t.Errorf("%+v, after that %+v", was, is)
	}
	if c := (costs{}).of(was, is); c.mark <= 0 || c.mark > 1000 {
		t.Errorf("%v ns for each byte", c.mark)
	}
	runtime.KeepAlive(keep)
}

func collectAndTake() account {
	runtime.GC()
	return takeAccount()
}
