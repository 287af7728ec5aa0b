package history

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
)

// Group is the part of a key that requests do not cross: "/chaos/3/b" is in
// "/chaos/3/".
func Group(key string) string {
	if i := strings.LastIndexByte(key, '/'); i >= 0 {
		return key[:i+1]
	}
	return key
}

// registers is a map of keys to values without revisions, in one string so that
// porcupine can compare states quickly.
type registers string

func (r registers) decode() map[string]string {
	m := map[string]string{}
	for p := range strings.SplitSeq(string(r), "\x00") {
		if k, v, ok := strings.Cut(p, "="); ok {
			m[k] = v
		}
	}
	return m
}

func encode(m map[string]string) registers {
	var b strings.Builder
	for _, k := range slices.Sorted(maps.Keys(m)) {
		b.WriteString(k + "=" + m[k] + "\x00")
	}
	return registers(b.String())
}

// linear is an operation as porcupine's model sees it: without revisions.
type linear struct {
	op *Op
	// conditions, with the values that revisions stand for.
	conditions []condition
}

// condition holds while a key has one of the values, or is absent.
type condition struct {
	key    string
	values []string
	absent bool
}

// Linearizable lets porcupine judge the linearizable operations of each group
// of keys, as registers without revisions. What has no answer counts if the log
// shows that it was executed; it had been when a watch first showed it.
// A time-out of the checker is reported as such.
func Linearizable(h *History, timeout time.Duration) (groups, ops int, bad []Violation) {
	for _, shard := range h.shards() {
		var r report
		s := newShardCheck(h, shard, Options{}, &r)
		s.explain()
		byGroup := map[string][]porcupine.Operation{}
		for _, op := range s.ops {
			if o, g, ok := s.linear(op); ok {
				byGroup[g] = append(byGroup[g], o)
				ops++
			}
		}
		for _, rev := range s.log.revisions() { // leases end by themselves
			if s.claimed[rev] == nil {
				if o, g, ok := s.spontaneous(rev); ok {
					byGroup[g] = append(byGroup[g], o)
				}
			}
		}
		for _, g := range slices.Sorted(maps.Keys(byGroup)) {
			groups++
			switch porcupine.CheckOperationsTimeout(model, byGroup[g], timeout) {
			case porcupine.Illegal:
				bad = append(bad, Violation{NotLinear, fmt.Sprintf("shard %s group %s, %d operations", shard, g, len(byGroup[g]))})
			case porcupine.Unknown:
				bad = append(bad, Violation{NotLinear, fmt.Sprintf("shard %s group %s, %d operations: the checker did not finish in %v", shard, g, len(byGroup[g]), timeout)})
			}
		}
	}
	return groups, ops, bad
}

func (s *shardCheck) linear(op *Op) (porcupine.Operation, string, bool) {
	group := ""
	for _, steps := range [][]Step{op.Then, op.Else} {
		for _, st := range steps {
			if st.Rev != 0 && !op.writes() || s.crosses(st) {
				return porcupine.Operation{}, "", false
			}
			group = Group(st.Key)
		}
	}
	out := porcupine.Operation{ClientId: op.Client, Call: int64(op.Call), Return: int64(op.Return)}
	switch rev, took := s.took[op]; {
	case op.Serializable || group == "":
		return out, "", false
	case op.Outcome == Unknown && took:
		out.Return = int64(max(s.seen[rev], op.Call+1))
	case op.Outcome != Done:
		return out, "", false
	}
	l := linear{op: op}
	for _, c := range op.If {
		l.conditions = append(l.conditions, s.condition(c))
	}
	out.Input = l
	return out, group, true
}

// crosses tells whether a step reads several groups.
func (s *shardCheck) crosses(st Step) bool {
	if st.End == "" {
		return false
	}
	for _, name := range s.log.names {
		if inRange(name, st.Key, st.End) && Group(name) != Group(st.Key) {
			return true
		}
	}
	return false
}

// condition with the values that a key had at the revision asked for.
func (s *shardCheck) condition(c Cmp) condition {
	out := condition{key: c.Key, absent: c.Target != Value && c.Number == 0}
	if c.Target == Value {
		out.values = []string{c.Text}
	}
	for _, v := range s.log.keys[c.Key] {
		if v.kv != nil && (c.Target == ModRevision && v.kv.Mod == c.Number || c.Target == CreateRevision && v.kv.Create == c.Number) {
			out.values = append(out.values, v.kv.Value)
		}
	}
	return out
}

// spontaneous is a revision that no client made: the end of a lease.
func (s *shardCheck) spontaneous(rev int64) (porcupine.Operation, string, bool) {
	es := s.log.events[rev]
	op := &Op{Form: Txn, Outcome: Unknown}
	for _, e := range es {
		if !e.Delete || s.h.Background[e.KV.Key] {
			return porcupine.Operation{}, "", false
		}
		op.Then = append(op.Then, Step{Kind: Delete, Key: e.KV.Key})
	}
	if len(es) == 0 {
		return porcupine.Operation{}, "", false
	}
	// Not before the revision before it was made, which was not before it was asked for.
	var call time.Duration
	if before := s.claimed[rev-1]; before != nil {
		call = before.Call
	}
	return porcupine.Operation{ClientId: -1, Input: linear{op: op}, Call: int64(call), Return: int64(max(s.seen[rev], call+1))}, Group(es[0].KV.Key), true
}

var model = porcupine.Model{
	Init: func() any { return registers("") },
	Step: func(state, in, _ any) (bool, any) {
		l := in.(linear)
		before := state.(registers)
		now := before.decode()
		succeeded := true
		for _, c := range l.conditions {
			v, ok := now[c.key]
			if c.absent == ok || (ok && !slices.Contains(c.values, v)) {
				succeeded = false
			}
		}
		answered := l.op.Outcome == Done
		if answered && succeeded != l.op.Succeeded {
			return false, state
		}
		steps := l.op.Then
		if !succeeded {
			steps = l.op.Else
		}
		changed := false
		for i, st := range steps {
			var hit []string
			for k := range now {
				if inRange(k, st.Key, st.End) {
					hit = append(hit, k)
				}
			}
			slices.Sort(hit)
			if answered && !resultFits(st, l.op.Results[i], hit, now) {
				return false, state
			}
			switch st.Kind {
			case Put:
				now[st.Key], changed = st.Value, true
			case Delete:
				for _, k := range hit {
					delete(now, k)
					changed = true
				}
			}
		}
		if !changed {
			return true, state
		}
		return true, encode(now)
	},
	DescribeOperation: func(in, _ any) string { return in.(linear).op.String() },
}

func resultFits(st Step, got StepResult, hit []string, now map[string]string) bool {
	if st.Rev != 0 {
		return true // of the past, which a register does not have
	}
	if st.Kind == Delete && got.Deleted != int64(len(hit)) {
		return false
	}
	if st.Kind != Range && !st.PrevKV {
		return true
	}
	return slices.EqualFunc(got.KVs, hit, func(kv KV, k string) bool { return kv.Key == k && kv.Value == now[k] })
}
