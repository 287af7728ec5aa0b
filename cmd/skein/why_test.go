package main

import (
	"strings"
	"testing"
	"time"

	"skein.io/skein/node/client"
)

func TestPrintWhy(t *testing.T) {
	report := func(node string, total int64) client.NodeReport {
		return client.NodeReport{Node: node, Total: total, Scores: []client.ScoreReport{{Rule: "TaintToleration", Points: 300}, {Rule: "NodeResourcesFit", Points: total - 300}}}
	}
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	refusing := client.NodeReport{Node: "n3", Refusals: []client.FilterReport{{Filter: "NodeUnschedulable", Reasons: []string{"node(s) were unschedulable"}, Details: []string{"it is cordoned"}, Help: []string{"kubectl uncordon n3"}}},
		Evict: []string{"default/low"}, BreaksBudgets: 1}
	for _, c := range []struct {
		w    client.Why
		want string
	}{
		{client.Why{Namespace: "default", Pod: "web", Node: "n1", Since: now.Add(-90 * time.Second), Summary: []string{"n1 scores best."}, Nodes: []client.NodeReport{report("n1", 390), report("n2", 350), refusing}}, `
default/web is on n1, since 1m30s.
n1 scores best.

NODE       SCORE  TaintToleration  NodeResourcesFit
n1 (here)  390    300              90
n2         350    300              50

n3 refuses:
  NodeUnschedulable: node(s) were unschedulable
    it is cordoned
    would help: kubectl uncordon n3
  evicting default/low would make room (1 against a disruption budget)
`},
		{client.Why{Namespace: "default", Pod: "web", Summary: []string{"There is no node at all."}, Message: "no nodes available to schedule pods"}, `
default/web is on no node.
There is no node at all.
Its event says: no nodes available to schedule pods
`},
	} {
		var out strings.Builder
		if err := printWhy(&out, &c.w, now, false); err != nil || out.String() != c.want[1:] {
			t.Errorf("%v\n%s\nwant\n%s", err, out.String(), c.want[1:])
		}
	}
	many := client.Why{Namespace: "default", Pod: "web"}
	for range 100 {
		many.Nodes = append(many.Nodes, report("a", 400))
	}
	for range 100 {
		many.Nodes = append(many.Nodes, refusing)
	}
	for all, want := range map[bool]int{false: 20, true: 100} {
		var out strings.Builder
		if err := printWhy(&out, &many, now, all); err != nil || strings.Count(out.String(), "n3 refuses:") != want || strings.Count(out.String(), "\na ") != want {
			t.Errorf("all=%v: %v\n%s", all, err, out.String())
		}
	}
}
