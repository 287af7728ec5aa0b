package node

import (
	"cmp"
	"slices"
	"sync"
	"time"

	"skein.io/skein/scheduler/controller"
)

// ZoneState is how a zone fares and what the brake on evictions does there.
type ZoneState struct {
	// Zone is REGION/ZONE by the nodes' well-known labels, "(none)" for nodes
	// without them.
	Zone string
	ZoneCount
	// Pace is how fast the pods of lost nodes are evicted, Since when it came to
	// that (by this node's clock).
	Pace  Pace
	Since time.Time
	// Held is how many nodes keep their pods for the brake alone.
	Held int
	// Brakes is how often evictions were slowed or stopped, Evictions from how
	// many nodes pods were driven off; both since the Board was made.
	Brakes, Evictions int
}

// Board shows the zones of a running Controller and counts over all that used
// it, one after the other. The zero value is ready; it is safe for concurrent
// use. A nil Board shows and counts nothing.
type Board struct {
	running controller.Running[*Controller]

	mu        sync.Mutex // guards all below
	brakes    map[string]int
	evictions map[string]int
}

// Zones returns the state of each zone, in order of their names; nil while no
// controller runs.
func (b *Board) Zones() []ZoneState {
	if b == nil {
		return nil
	}
	c := b.running.Get()
	if c == nil {
		return nil
	}
	out := c.zones() // takes the controller's lock, under which it may count here
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range out {
		out[i].Brakes, out[i].Evictions = b.brakes[out[i].Zone], b.evictions[out[i].Zone]
	}
	return out
}

// follow shows c until the returned function is called.
func (b *Board) follow(c *Controller) (stop func()) {
	if b == nil {
		return func() {}
	}
	return b.running.Follow(c)
}

func (b *Board) braked(zone string) {
	if b != nil {
		b.mu.Lock()
		defer b.mu.Unlock()
		count(&b.brakes, zone)
	}
}

func (b *Board) evicted(zone string) {
	if b != nil {
		b.mu.Lock()
		defer b.mu.Unlock()
		count(&b.evictions, zone)
	}
}

func count(in *map[string]int, zone string) {
	if *in == nil {
		*in = map[string]int{}
	}
	(*in)[zoneName(zone)]++
}

// zones returns what the controller alone knows of ZoneState.
func (c *Controller) zones() []ZoneState {
	c.mu.Lock()
	defer c.mu.Unlock()
	held := map[string]int{}
	for name, j := range c.judged {
		if j.evicts() && !c.brake.has(name) && c.brake.pace(j.zone) != (Pace{}) {
			held[j.zone]++
		}
	}
	out := make([]ZoneState, 0, len(c.census))
	for zone, count := range c.census {
		out = append(out, ZoneState{
			Zone: zoneName(zone), ZoneCount: count, Pace: c.brake.pace(zone), Since: c.brake.since[zone], Held: held[zone],
		})
	}
	slices.SortFunc(out, func(a, b ZoneState) int { return cmp.Compare(a.Zone, b.Zone) })
	return out
}
