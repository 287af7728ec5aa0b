package node

import (
	"fmt"
	"time"
)

// ZoneCount is how many nodes of a zone are ready and how many are not.
type ZoneCount struct{ Ready, NotReady int }

// Pace is how fast the pods of lost nodes may be evicted in a zone.
type Pace struct {
	Stop  bool          // not at all
	Every time.Duration // at least so long between two nodes; 0: no limit
}

// String says it in words.
func (p Pace) String() string {
	switch {
	case p.Stop:
		return "stopped"
	case p.Every > 0:
		return fmt.Sprintf("one node every %v", p.Every)
	}
	return "free"
}

// fewLost is the number of nodes that may always be lost without a brake.
const fewLost = 2

// PaceOf decides how fast each zone may evict. Nodes die one by one; when a
// large part of a zone vanishes at once, it is more likely that it was cut
// off and still runs its pods. The rules and numbers are upstream's
// (ComputeZoneState, handleDisruption and ReducedQPSFunc of its node lifecycle
// controller):
//
//   - all nodes of all zones lost: stop everywhere, the fault is here;
//   - all nodes of one zone lost: go on slowly (DarkEvery), the zone is dark,
//     and zones are there so that others go on for it;
//   - at least 3 nodes and UnhealthyFraction of a zone lost: stop, or in a
//     zone of more than LargeZone nodes go on very slowly (SlowEvery);
//   - else no limit. (Upstream limits to one node per 10 s here, too; a verdict
//     of gossip is worth more than a late heartbeat.)
func PaceOf(zones map[string]ZoneCount, set Settings) map[string]Pace {
	set.setDefaults()
	out := make(map[string]Pace, len(zones))
	allDark := len(zones) > 0
	for zone, count := range zones {
		total := count.Ready + count.NotReady
		switch {
		case count.Ready == 0 && count.NotReady > 0:
			out[zone] = Pace{Every: set.DarkEvery}
			continue
		case count.NotReady > fewLost && float64(count.NotReady) >= set.UnhealthyFraction*float64(total):
			out[zone] = Pace{Stop: true}
			if total > set.LargeZone {
				out[zone] = Pace{Every: set.SlowEvery}
			}
		default:
			out[zone] = Pace{}
		}
		allDark = false
	}
	if allDark {
		for zone := range out {
			out[zone] = Pace{Stop: true}
		}
	}
	return out
}

// brake remembers the paces and which nodes have been let through.
type brake struct {
	settings Settings
	paces    map[string]Pace
	since    map[string]time.Time // when the pace of a zone came about
	granted  map[string]string    // node -> zone
	last     map[string]time.Time
}

func newBrake(set Settings) brake {
	return brake{settings: set, paces: map[string]Pace{}, since: map[string]time.Time{}, granted: map[string]string{}, last: map[string]time.Time{}}
}

func (b *brake) pace(zone string) Pace { return b.paces[zone] }

// set takes in a new count of all zones and returns those whose pace changed
// from or to a limit. Where evictions slow down or stop, grants end: the nodes
// of a zone vanish one after the other, and the first went when it was not yet
// known that more would. Pods that have not been evicted yet stay, or wait for
// their node's turn.
func (b *brake) set(census map[string]ZoneCount, now time.Time) (changed []string) {
	paces := PaceOf(census, b.settings)
	for zone, pace := range paces {
		if _, known := b.since[zone]; !known {
			b.since[zone] = now
		}
		if pace == b.paces[zone] {
			continue
		}
		b.since[zone] = now
		changed = append(changed, zone)
		if pace == (Pace{}) {
			continue
		}
		for node, z := range b.granted {
			if z == zone {
				delete(b.granted, node)
			}
		}
	}
	for zone := range b.since {
		if _, still := paces[zone]; !still {
			delete(b.since, zone)
		}
	}
	for zone := range b.last {
		if _, still := paces[zone]; !still {
			delete(b.last, zone)
		}
	}
	b.paces = paces
	return changed
}

// allow asks whether the pods of a node may be evicted now. If not, but later,
// wait says when to ask again.
func (b *brake) allow(zone, node string, now time.Time) (ok bool, wait time.Duration) {
	pace := b.paces[zone]
	if pace.Stop {
		return false, 0
	}
	if _, had := b.granted[node]; had {
		return true, 0
	}
	if last, any := b.last[zone]; any && pace.Every > 0 {
		if wait = last.Add(pace.Every).Sub(now); wait > 0 {
			return false, wait
		}
	}
	b.granted[node], b.last[zone] = zone, now
	return true, 0
}

// has reports whether a node has been let through.
func (b *brake) has(node string) bool {
	_, ok := b.granted[node]
	return ok
}

// forget ends a node's grant: it lives, or is gone.
func (b *brake) forget(node string) { delete(b.granted, node) }
