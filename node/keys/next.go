package keys

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Settle is how long after the last replica took the new key the stored values are counted: requests that were sealed with the old key
// have ended by then (the API ends every request but watches after a minute).
const Settle = 65 * time.Second

// Member is a node that holds a replica, and what it answered.
type Member struct {
	Node  string // its name
	Voter bool
	// Silent says why there is no answer; the rest is empty then.
	Silent  string
	Keys    []string // ids of its ring
	Primary string   // of its ring
}

// Usage is a look at the stored values.
type Usage struct {
	ByKey map[string]int // number of values by the id of the key that they need
	Plain int            // values that should be sealed and are not
	Stale int            // values that are not sealed as they would be now
	// Whole: every value of every shard was looked at, each shard at one revision.
	Whole     bool
	Revisions map[string]int64 // by shard
}

// Observed is what a decision is made of.
type Observed struct {
	Record  *Record  // nil: the store has none
	Keys    []string // ids of the leader's own ring
	Members []Member // the leader too
	// SealedBy is the id of the key that seals the cluster's own keys; "" when they are not sealed.
	SealedBy string
	// Usage is the latest complete look in this term, nil before the first, and since the primary key changed.
	Usage *Usage
	// Agreed is for how long all members have been seen to seal with the primary key; negative while not all do.
	Agreed time.Duration
	// Counted is what Agreed was when Usage was begun.
	Counted time.Duration
	// Settle to go by; normally the constant.
	Settle time.Duration
}

// Action is a kind of step.
type Action string

// The actions.
const (
	Wait     Action = "wait"     // nothing can be done now; Reason says why, or is empty when all is done
	Refuse   Action = "refuse"   // end the rotation that was asked for
	Make     Action = "make"     // make a key, on this node
	Spread   Action = "spread"   // give the ring to Nodes
	Found    Action = "found"    // write the first record
	Switch   Action = "switch"   // make the new key the primary one
	SealKeys Action = "sealkeys" // seal the cluster's own keys with the primary one
	Reseal   Action = "reseal"   // seal stale values anew
	Count    Action = "count"    // look at every value
	Retire   Action = "retire"   // let the replicas drop the old key
	Finish   Action = "finish"   // the rotation has ended
)

// Step is what is to be done next.
type Step struct {
	Action Action
	Nodes  []string // of Spread
	Reason string
}

func wait(format string, a ...any) Step {
	return Step{Action: Wait, Reason: fmt.Sprintf(format, a...)}
}

// Next decides on the next step. It is pure.
func Next(o Observed) Step {
	if o.Record == nil {
		return first(o)
	}
	r := o.Record.Rotation
	if r == nil {
		switch {
		case !slices.Contains(o.Keys, o.Record.Primary):
			return wait("this node lacks the primary key %s and asks the others for it", o.Record.Primary)
		case o.SealedBy != o.Record.Primary:
			return Step{Action: SealKeys, Reason: "the cluster's own keys are not sealed by the primary key"}
		case o.Usage == nil || o.Usage.Stale > 0:
			return Step{Action: Reseal, Reason: "values may be plain or sealed by an older key"}
		}
		return Step{Action: Wait}
	}
	switch r.Phase {
	case Requested:
		return requested(o, *r)
	case Spreading:
		return spreading(o, *r)
	case Resealing:
		return resealing(o, *r)
	case Retiring:
		return retiring(o, *r)
	}
	return wait("the rotation is in the phase %q, which this version does not know", r.Phase)
}

// first makes the ring of a cluster that has none: one of an earlier version.
func first(o Observed) Step {
	if len(o.Keys) == 0 {
		return Step{Action: Make, Reason: "the cluster has no key ring"}
	}
	if lack := lacking(o.Members, o.Keys[0]); len(lack) > 0 {
		return Step{Action: Spread, Nodes: lack, Reason: "they have no key ring"}
	}
	if have, need := holders(o.Members, o.Keys[0]); have < need {
		return wait("%d voters have a key ring, %d are needed: %s", have, need, silence(o.Members, false))
	}
	return Step{Action: Found, Reason: "a majority of the voters has the ring"}
}

func requested(o Observed, r Rotation) Step {
	if s := silence(o.Members, true); s != "" && !r.Force {
		return Step{Action: Refuse, Reason: "every voter has to take the new key before it is used, and not all answer: " + s +
			". Start them, or wait until they have been replaced; --force goes on without them (they fetch the key when they are back)"}
	}
	if have, need := answering(o.Members); have < need {
		return Step{Action: Refuse, Reason: fmt.Sprintf("only %d voters answer, at least %d have to keep the new key: %s", have, need, silence(o.Members, true))}
	}
	return Step{Action: Make, Reason: "a rotation was asked for"}
}

func spreading(o Observed, r Rotation) Step {
	if !slices.Contains(o.Keys, r.To) {
		// The leader that made it is gone, and it has sealed nothing.
		return Step{Action: Make, Reason: fmt.Sprintf("the key %s was made by a former leader and is not here", r.To)}
	}
	if lack := lacking(o.Members, r.To); len(lack) > 0 {
		return Step{Action: Spread, Nodes: lack, Reason: "they lack the new key"}
	}
	if s := silence(o.Members, true); s != "" && !r.Force {
		return wait("every voter has to take the new key: %s (skein keys rotate --force goes on without)", s)
	}
	if have, need := holders(o.Members, r.To); have < need {
		return wait("%d voters have the new key, %d are needed: %s", have, need, silence(o.Members, true))
	}
	return Step{Action: Switch, Reason: "the replicas have the new key"}
}

func resealing(o Observed, r Rotation) Step {
	if !slices.Contains(o.Keys, r.To) {
		return wait("this node lacks the primary key %s and asks the others for it", r.To)
	}
	if o.SealedBy != r.To {
		return Step{Action: SealKeys, Reason: "the cluster's own keys are sealed by the old key"}
	}
	if o.Usage == nil || o.Usage.Stale > 0 || o.Usage.ByKey[r.From] > 0 {
		return Step{Action: Reseal, Reason: "values are sealed by the old key"}
	}
	if o.Agreed < 0 {
		return wait("every replica has to seal with the new key before the old one can go: %s", disagreement(o.Members, r.To))
	}
	if o.Agreed < o.Settle {
		return wait("requests from before the change have to end first: %s more", (o.Settle - o.Agreed).Round(time.Second))
	}
	if !o.Usage.Whole || o.Counted < o.Settle {
		return Step{Action: Count, Reason: "all replicas seal with the new key"}
	}
	return Step{Action: Retire, Reason: "nothing needs the old key"}
}

func retiring(o Observed, r Rotation) Step {
	var keep []string
	for _, m := range o.Members {
		if m.Silent != "" {
			keep = append(keep, m.Node+" ("+m.Silent+")")
		} else if slices.ContainsFunc(m.Keys, func(k string) bool { return k != r.To }) {
			keep = append(keep, m.Node)
		}
	}
	if len(keep) > 0 {
		return wait("the old key goes when the store's history no longer needs it (some minutes); still on %s", strings.Join(keep, ", "))
	}
	return Step{Action: Finish, Reason: "no replica has the old key"}
}

// lacking are the members that answer and have not the key.
func lacking(ms []Member, key string) (nodes []string) {
	for _, m := range ms {
		if m.Silent == "" && !slices.Contains(m.Keys, key) {
			nodes = append(nodes, m.Node)
		}
	}
	return nodes
}

// holders counts the voters that have the key, and a majority.
func holders(ms []Member, key string) (have, need int) {
	voters := 0
	for _, m := range ms {
		if m.Voter {
			voters++
			if m.Silent == "" && slices.Contains(m.Keys, key) {
				have++
			}
		}
	}
	return have, voters/2 + 1
}

// answering counts the voters that answer, and a majority.
func answering(ms []Member) (have, need int) {
	voters := 0
	for _, m := range ms {
		if m.Voter {
			voters++
			if m.Silent == "" {
				have++
			}
		}
	}
	return have, voters/2 + 1
}

// silence names the members that do not answer, with the reason.
func silence(ms []Member, votersOnly bool) string {
	var out []string
	for _, m := range ms {
		if m.Silent != "" && (m.Voter || !votersOnly) {
			out = append(out, m.Node+" ("+m.Silent+")")
		}
	}
	return strings.Join(out, ", ")
}

// disagreement names the members that are not known to seal with the key.
func disagreement(ms []Member, key string) string {
	var out []string
	for _, m := range ms {
		switch {
		case m.Silent != "":
			out = append(out, m.Node+" ("+m.Silent+")")
		case m.Primary != key:
			out = append(out, fmt.Sprintf("%s (seals with %s)", m.Node, m.Primary))
		}
	}
	return strings.Join(out, ", ")
}
