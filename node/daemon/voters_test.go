package daemon

import (
	"reflect"
	"testing"

	"skein.io/skein/consensus/members"
	"skein.io/skein/node/client"
)

func TestPlacement(t *testing.T) {
	nodes := []members.Node{{ID: "2", Name: "n2"}, {ID: "1", Name: "n1", Zone: "z"}, {ID: "3", Name: "n3"}}
	if p := placement(nil, []string{"system"}, nodes); p != nil {
		t.Errorf("a node that does not lead says %+v", p)
	}
	got := placement(map[string]members.Decision{
		"system": {Why: map[string]string{"1": "votes", "2": "spare"}, Refused: map[string]string{"1": "the last one"}, Blocked: []string{"waiting"}},
		"pods":   {Step: members.Step{Action: members.Promote, Node: "2", Reason: "caught up"}},
	}, []string{"system", "pods", "events"}, nodes)
	want := &client.Placement{
		Nodes: []client.NodePlacement{{Node: "n1", Zone: "z", Why: "votes"}, {Node: "n2", Why: "spare"}},
		Shards: []client.ShardPlan{{Shard: "system", Blocked: []string{"n1 keeps what it holds: the last one", "waiting"}},
			{Shard: "pods", Next: "promote n2: caught up"}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
}
