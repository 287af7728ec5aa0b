package host

import (
	"math"
	"strings"
	"testing"
	"time"
)

// Under load the collector leaves as much room as the heap may grow by; without, and while the process starts, memory counts.
func TestPace(t *testing.T) {
	node := Pace{Percent: 25, StartPercent: 100, BusyHeap: 144 << 20, LeastRoom: 32 << 20, MostRoom: 96 << 20} // a daemon
	store := Pace{BusyHeap: 64 << 20, LeastRoom: 32 << 20, MostRoom: 32 << 20}                                 // the same room always
	for name, c := range map[string]struct {
		pace       Pace
		now        int
		age        time.Duration
		live, rate uint64 // MiB, and a second
		want       int
	}{
		"idle":              {node, 25, time.Minute, 40, 1, 25},
		"starting":          {node, 100, 10 * time.Second, 40, 500, 100},
		"has started":       {node, 100, time.Minute, 40, 1, 25},
		"busy":              {node, 25, time.Minute, 48, 50, 200},
		"much to mark":      {node, 25, time.Minute, 64, 50, 125},
		"too much":          {node, 25, time.Minute, 160, 50, 25}, // least room is less than that
		"hardly anything":   {node, 25, time.Minute, 16, 50, 600},
		"no more":           {node, 200, time.Minute, 48, 1, 25},
		"about the same":    {node, 200, time.Minute, 50, 50, 200},
		"no longer so":      {node, 200, time.Minute, 72, 50, 100},
		"nothing in use":    {node, 25, time.Minute, 0, 50, math.MaxInt32},
		"over the bound":    {node, 25, time.Minute, 128, 50, 25},
		"least room counts": {node, 25, time.Minute, 112, 50, 28},

		"store: idle":                            {store, 50, time.Minute, 10, 1, 50},
		"store: starting":                        {store, 50, 10 * time.Second, 10, 500, 50},
		"store: a small heap":                    {store, 50, time.Minute, 4, 100, 800},
		"store: not worth a change":              {store, 290, time.Minute, 10, 100, 290},
		"store: a little larger":                 {store, 400, time.Minute, 11, 100, 290},
		"store: twice":                           {store, 290, time.Minute, 20, 100, 160},
		"store: a large heap needs no help":      {store, 160, time.Minute, 500, 100, 50},
		"store: the bound of the heap gives way": {store, 50, time.Minute, 50, 100, 64},
	} {
		c.pace.setDefaults()
		if got := c.pace.next(c.now, c.age, float64(c.rate<<20), c.live<<20, false); got != c.want {
			t.Errorf("%s: %d %%, want %d", name, got, c.want)
		}
	}
}

// While a crowd reads, there is the least room; what a user waits for has its own all the same.
func TestPaceInACrowd(t *testing.T) {
	crowd := false
	p := Pace{Percent: 25, BusyHeap: 144 << 20, LeastRoom: 32 << 20, MostRoom: 96 << 20, BurstPercent: 200, BurstMost: 256 << 20, More: func() uint64 { return 64 << 20 }, Crowd: func() bool { return crowd }}
	p.setDefaults()
	for _, c := range []struct {
		crowd, burst bool
		want         int
	}{{false, false, 225}, {true, false, 50}, {true, true, 200}} {
		crowd = c.crowd
		if got := p.next(25, time.Minute, 200<<20, 64<<20, c.burst); got != c.want {
			t.Errorf("crowd %v, burst %v: %d %%, want %d", c.crowd, c.burst, got, c.want)
		}
	}
}

// The pacer takes the rate from what was allocated between two collections.
func TestPacerMeasuresTheRate(t *testing.T) {
	start := time.Unix(1e9, 0)
	p := &pacer{Pace: Pace{CalmAfter: time.Hour}, started: start, now: 50, at: start}
	p.setDefaults()
	defer p.set(100) // Go's default
	for i, c := range []struct {
		after time.Duration
		alloc uint64 // MiB
		want  int
	}{
		{time.Minute, 10, 50}, {100 * time.Millisecond, 1, 150}, {100 * time.Millisecond, 24, 150}, {time.Minute, 24, 50},
	} {
		p.collected(p.at.Add(c.after), 16<<20, p.allocated+c.alloc<<20)
		if p.now != c.want {
			t.Errorf("%d: %d %%, want %d", i, p.now, c.want)
		}
	}
	if p.calm == nil || !p.calm.Stop() {
		t.Error("memory is not given back after the load")
	}
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
	err := Pace{Percent: -1, StartPercent: 1, LeastRoom: 3, MostRoom: 2, BusyHeap: 1, StartFor: -1, BurstPercent: -2}.Validate()
	for _, what := range []string{"Percent -1", "BurstPercent -2", "BusyRate", "LeastRoom 3", "BusyHeap 1", "StartFor"} {
		if err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%v, nothing about %s", err, what)
		}
	}
}

// With more room for a burst, it is given in a burst alone.
func TestPaceOfABurst(t *testing.T) {
	p := Pace{More: func() uint64 { return 64 << 20 }}
	p.setDefaults()
	const live = 200 << 20
	p.Percent = 25
	if got := p.next(25, time.Hour, 20<<20, live, false); got != 25 {
		t.Errorf("under load: %d %%", got)
	}
	if got := p.next(25, time.Hour, 200<<20, live, false); got != 44 { // 24 MiB and 64 more of 200
		t.Errorf("in a burst: %d %%, want 44", got)
	}
}

// Told of a burst, the collector leaves room at once, within the bound, and takes it back when it is over.
func TestPaceWhenTold(t *testing.T) {
	start := time.Unix(1e9, 0)
	p := &pacer{Pace: Pace{Percent: 25, BurstPercent: 200, BurstMost: 128 << 20, CalmAfter: time.Hour}, started: start, now: 25}
	p.setDefaults()
	defer p.set(100) // Go's default
	at := start.Add(time.Second)
	live := func(mib uint64) func() (uint64, uint64) {
		return func() (uint64, uint64) { return mib << 20, mib << 20 }
	}
	if p.hurry(at, live(32)); p.now != 200 {
		t.Errorf("while it starts: %d %%, want 200", p.now)
	}
	p.set(25)
	at = start.Add(time.Minute)
	if p.hurry(at, live(32)); p.now != 200 {
		t.Errorf("at the beginning of a burst: %d %%, want 200", p.now)
	}
	if p.calm == nil {
		t.Error("memory is not given back after the burst")
	}
	p.hurry(at.Add(time.Second), func() (uint64, uint64) { t.Error("a burst that goes on is looked at"); return 0, 0 })
	p.collected(at.Add(2*time.Second), 128<<20, 1<<30)
	if p.now != 100 {
		t.Errorf("with much in use: %d %%, want 100: no more than the bound", p.now)
	}
	p.collected(at.Add(time.Minute), 128<<20, 1<<30)
	if p.now != 25 {
		t.Errorf("after the burst: %d %%", p.now)
	}
	if !p.calm.Stop() {
		t.Error("memory is not given back after the burst")
	}
	at = at.Add(time.Hour)
	if p.hurry(at, func() (uint64, uint64) { return 32 << 20, 48 << 20 }); p.now != 250 {
		t.Errorf("with 16 MiB of garbage at the beginning: %d %%, want 250", p.now)
	}
	p.set(25)
	if p.hurry(at.Add(time.Minute), func() (uint64, uint64) { return 64 << 20, 128 << 20 }); p.now != 200 {
		t.Errorf("with as much garbage: %d %%, want 200: no more than the bound", p.now)
	}
	p.calm.Stop()
}
