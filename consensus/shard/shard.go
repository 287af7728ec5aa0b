// Package shard says which Raft group keeps which key. It is pure: a Table is
// immutable, its methods keep no state and may be called from anywhere.
//
// Keys are routed by the longest matching prefix; the one shard without
// prefixes keeps all else. A request has to stay within one shard, because
// there is no revision common to two.
package shard

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// ID is the Raft group's number. It is on disk and in every message: an ID
// never changes its meaning.
type ID uint64

// The shards of Default.
const (
	// System keeps what no other shard keeps; its leader is the cluster's leader.
	System ID = 1
	// Pods change most often, in a fleet that is at work.
	Pods ID = 2
	// Events keeps what is written often and may be lost without harm: events and
	// the leases by which clients elect leaders.
	Events ID = 3
)

// Shard is one Raft group.
type Shard struct {
	ID   ID
	Name string
	// Prefixes of the keys it keeps. Empty: every key that no other shard keeps.
	Prefixes []string
}

// ErrCrossShard is returned for a range that spans shards.
var ErrCrossShard = errors.New("shard: the range spans several shards")

// Table is a set of shards.
type Table struct {
	shards []Shard // by ID
	rest   int     // index of the shard without prefixes
}

// Default is the table of a cluster of this version.
func Default() Table {
	t, err := New(
		Shard{ID: System, Name: "system"},
		Shard{ID: Pods, Name: "pods", Prefixes: []string{"/registry/pods/"}},
		Shard{ID: Events, Name: "events", Prefixes: []string{"/registry/events/", "/registry/leases/"}})
	if err != nil {
		panic(err) // a constant table
	}
	return t
}

// New checks the shards and returns their table. It reports all faults.
func New(shards ...Shard) (Table, error) {
	t := Table{shards: slices.Clone(shards), rest: -1}
	slices.SortFunc(t.shards, func(a, b Shard) int { return int(a.ID) - int(b.ID) })
	var errs []error
	ids, names, prefixes := map[ID]bool{}, map[string]bool{}, map[string]string{}
	for i, s := range t.shards {
		if s.ID == 0 || ids[s.ID] {
			errs = append(errs, fmt.Errorf("shard %q: ID %d is zero or used twice", s.Name, s.ID))
		}
		if s.Name == "" || names[s.Name] {
			errs = append(errs, fmt.Errorf("shard %d: name %q is empty or used twice", s.ID, s.Name))
		}
		ids[s.ID], names[s.Name] = true, true
		if len(s.Prefixes) == 0 {
			if t.rest >= 0 {
				errs = append(errs, fmt.Errorf("shards %q and %q both have no prefixes", t.shards[t.rest].Name, s.Name))
			}
			t.rest = i
		}
		for _, p := range s.Prefixes {
			if o, used := prefixes[p]; p == "" || used {
				errs = append(errs, fmt.Errorf("shard %q: prefix %q is empty or used twice (%s)", s.Name, p, o))
			}
			prefixes[p] = s.Name
		}
	}
	if t.rest < 0 {
		errs = append(errs, errors.New("no shard keeps the keys without a prefix"))
	}
	if err := errors.Join(errs...); err != nil {
		return Table{}, fmt.Errorf("shard table: %w", err)
	}
	return t, nil
}

// Shards returns all shards by ascending ID.
func (t Table) Shards() []Shard { return slices.Clone(t.shards) }

// ByName returns the shard called name.
func (t Table) ByName(name string) (Shard, bool) {
	i := slices.IndexFunc(t.shards, func(s Shard) bool { return s.Name == name })
	if i < 0 {
		return Shard{}, false
	}
	return t.shards[i], true
}

// ByID returns the shard with that ID.
func (t Table) ByID(id ID) (Shard, bool) {
	i := slices.IndexFunc(t.shards, func(s Shard) bool { return s.ID == id })
	if i < 0 {
		return Shard{}, false
	}
	return t.shards[i], true
}

// ForKey returns the shard that keeps key.
func (t Table) ForKey(key string) Shard {
	best, length := t.rest, 0
	for i, s := range t.shards {
		for _, p := range s.Prefixes {
			if len(p) > length && strings.HasPrefix(key, p) {
				best, length = i, len(p)
			}
		}
	}
	return t.shards[best]
}

// ForRange returns the shard that keeps every key of [key, end), with etcd's
// conventions: an empty end means key alone, "\x00" every key from key on.
// The error is ErrCrossShard when there is none.
func (t Table) ForRange(key, end string) (Shard, error) {
	s := t.ForKey(key)
	if end == "" || len(t.shards) == 1 {
		return s, nil
	}
	open := end == "\x00"
	// A boundary between shards lies at the first and behind the last key of a
	// prefix. If none is inside the range, all of it is on one side.
	for _, o := range t.shards {
		for _, p := range o.Prefixes {
			for _, b := range []string{p, prefixEnd(p)} {
				if b == "" || b <= key || (!open && b >= end) {
					continue
				}
				if t.ForKey(b).ID != s.ID {
					return Shard{}, fmt.Errorf("%w: %q to %q crosses %q", ErrCrossShard, key, end, b)
				}
			}
		}
	}
	return s, nil
}

// prefixEnd is the first key behind all keys with that prefix, "" if none is.
func prefixEnd(p string) string {
	b := []byte(p)
	for i := len(b) - 1; i >= 0; i-- {
		if b[i] < 0xff {
			b[i]++
			return string(b[:i+1])
		}
	}
	return ""
}
