package service

import (
	"cmp"
	"slices"
)

// Table names one of the kernel's tables.
type Table uint8

// The tables, as in datapath/bpf/maps.h.
const (
	Frontends Table = iota + 1
	Slots
	Members
)

func (t Table) String() string {
	return [...]string{"?", "front ends", "back ends", "members"}[t]
}

// Op is one change of one entry: Key is a FrontendKey, SlotKey or MemberKey, Value the matching value, nil = delete.
type Op struct {
	Table Table
	Key   any
	Value any
}

// Diff returns the steps from have to want in an order that hurts nobody: front ends that end go first, members and slots
// are written before a front end counts on them, and deleted only after none does. A reader that catches the moment between a front end's new count
// and a slot's deletion looks again (pick.h).
func Diff(have, want Entries) []Op {
	var ops []Op
	ops = drop(ops, Frontends, have.Frontends, want.Frontends, compareFront)
	ops = put(ops, Members, have.Members, want.Members, compareMember)
	ops = put(ops, Slots, have.Slots, want.Slots, compareSlot)
	ops = put(ops, Frontends, have.Frontends, want.Frontends, compareFront)
	ops = drop(ops, Slots, have.Slots, want.Slots, compareSlot)
	ops = drop(ops, Members, have.Members, want.Members, compareMember)
	return ops
}

func put[K comparable, V comparable](ops []Op, t Table, have, want map[K]V, order func(a, b K) int) []Op {
	var keys []K
	for k, v := range want {
		if old, ok := have[k]; !ok || old != v {
			keys = append(keys, k)
		}
	}
	slices.SortFunc(keys, order)
	for _, k := range keys {
		ops = append(ops, Op{t, k, want[k]})
	}
	return ops
}

func drop[K comparable, V comparable](ops []Op, t Table, have, want map[K]V, order func(a, b K) int) []Op {
	var keys []K
	for k := range have {
		if _, ok := want[k]; !ok {
			keys = append(keys, k)
		}
	}
	slices.SortFunc(keys, order)
	for _, k := range keys {
		ops = append(ops, Op{t, k, nil})
	}
	return ops
}

func compareSlot(a, b SlotKey) int {
	return cmp.Or(cmp.Compare(a.Set, b.Set), cmp.Compare(a.Slot, b.Slot))
}

func compareMember(a, b MemberKey) int {
	return cmp.Or(cmp.Compare(a.Set, b.Set), slices.Compare(a.IP[:], b.IP[:]), slices.Compare(a.Port[:], b.Port[:]))
}

// Apply carries one step out on tables in memory (the loader's mirror, and tests).
func (e Entries) Apply(op Op) {
	switch k := op.Key.(type) {
	case FrontendKey:
		set1(e.Frontends, k, op.Value)
	case SlotKey:
		set1(e.Slots, k, op.Value)
	case MemberKey:
		set1(e.Members, k, op.Value)
	}
}

func set1[K comparable, V any](m map[K]V, k K, v any) {
	if v == nil {
		delete(m, k)
	} else {
		m[k] = v.(V)
	}
}
