// Package health says what this node thinks of the others, and which of them its datapath may still send traffic to.
//
// Contract: everything here is pure: no goroutine, no clock, no I/O; all functions may be called from anywhere. Verdicts are one
// node's view; two nodes may differ, and nothing here may be taken for a decision of the cluster. Nothing of Skein is imported.
package health

import (
	"errors"
	"fmt"
	"maps"
	"slices"
)

// Verdict is what this node thinks of a node, now.
type Verdict uint8

// The verdicts. The zero value is Unknown: what gossip never spoke of is not held against a node.
const (
	Unknown Verdict = iota // gossip has not heard of the node (yet)
	Alive                  // answers, or is vouched for by others
	Suspect                // does not answer this node; not given up yet
	Dead                   // did not answer anyone for the detector's time; it may come back
	Left                   // said good-bye; it will not come back by itself
)

var verdictNames = [...]string{Unknown: "unknown", Alive: "alive", Suspect: "suspect", Dead: "dead", Left: "left"}

// String is the verdict as it is shown to people.
func (v Verdict) String() string {
	if int(v) < len(verdictNames) {
		return verdictNames[v]
	}
	return fmt.Sprintf("verdict(%d)", v)
}

// Usable tells whether traffic may be sent to a node of this verdict. A suspect node still gets traffic: most suspicions are
// refuted within a second, and a wrong removal moves load for nothing.
func (v Verdict) Usable() bool { return v != Dead && v != Left }

// DefaultMaxDeadFraction is the share of nodes that may be dead from here before the fault is more likely this node's own
// network than that many deaths. Envoy's panic threshold has the same default, for the same reason.
const DefaultMaxDeadFraction = 0.5

// PanicThreshold decides which nodes' endpoints leave the datapath.
type PanicThreshold struct {
	// MaxDeadFraction (0 to 1, default [DefaultMaxDeadFraction]): when more than this share of the nodes is dead from here, no
	// dead node's endpoints are removed. 1 means that there is no such limit; 0 is read as the default.
	MaxDeadFraction float64
}

// Validate reports a fraction that is none.
func (p PanicThreshold) Validate() error {
	if !(p.MaxDeadFraction >= 0 && p.MaxDeadFraction <= 1) { // NaN too
		return errors.New("panic threshold: the fraction of dead nodes must be between 0 and 1")
	}
	return nil
}

// Decision is what [PanicThreshold.Decide] found. It does not change after that and may be shared.
type Decision struct {
	// Panic is set when so many nodes are dead from here that their endpoints are kept.
	Panic bool
	// Dead of Total nodes are dead from here. Nodes that left, and unknown ones, count in neither.
	Dead, Total int

	drop map[string]Verdict // nodes whose endpoints go: Left always, Dead unless Panic
}

// Decide looks at the verdicts on all nodes of the cluster, by name. self, this node, is alive from here whatever is said of it.
func (p PanicThreshold) Decide(self string, verdicts map[string]Verdict) Decision {
	limit := p.MaxDeadFraction
	if limit == 0 {
		limit = DefaultMaxDeadFraction
	}
	d := Decision{drop: map[string]Verdict{}}
	for name, v := range verdicts {
		if name == self {
			v = Alive
		}
		switch v {
		case Dead:
			d.Dead++
			d.Total++
			d.drop[name] = v
		case Left:
			d.drop[name] = v
		case Alive, Suspect:
			d.Total++
		}
	}
	if float64(d.Dead) > limit*float64(d.Total) {
		d.Panic = true
		maps.DeleteFunc(d.drop, func(_ string, v Verdict) bool { return v == Dead })
	}
	return d
}

// Dropped are the names of the nodes whose endpoints go, sorted.
func (d Decision) Dropped() []string { return slices.Sorted(maps.Keys(d.drop)) }

// Drops tells whether endpoints on the node go, as far as they are not the last ones of their Service ([Decision.Keep]).
func (d Decision) Drops(node string) bool { _, ok := d.drop[node]; return ok }

// Keep decides for one Service: nodes holds the node of each of its endpoints ("" for an endpoint outside the cluster's nodes);
// the result, of the same length, tells which endpoints stay. Endpoints on dead nodes are never removed all: if no other is
// left they stay, since this node may be wrong. Endpoints on nodes that left go in any case: those nodes said so themselves,
// and no endpoint, which refuses connections at once, serves clients better than one that lets them hang.
func (d Decision) Keep(nodes []string) []bool {
	keep := make([]bool, len(nodes))
	any := false
	for i, node := range nodes {
		keep[i] = !d.Drops(node)
		any = any || keep[i]
	}
	if any {
		return keep
	}
	for i, node := range nodes {
		keep[i] = d.drop[node] == Dead
	}
	return keep
}

// String explains the decision with its counts.
func (d Decision) String() string {
	switch {
	case d.Panic:
		return fmt.Sprintf("%d of %d nodes are dead from here, more than the panic threshold: their endpoints are kept", d.Dead, d.Total)
	case len(d.drop) == 0:
		return fmt.Sprintf("%d of %d nodes are dead from here: all endpoints are kept", d.Dead, d.Total)
	default:
		return fmt.Sprintf("%d of %d nodes are dead from here: endpoints on %v are removed", d.Dead, d.Total, d.Dropped())
	}
}
