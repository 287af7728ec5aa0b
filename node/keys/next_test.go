package keys

import (
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"
)

func member(node string, keys ...string) Member {
	m := Member{Node: node, Voter: true, Keys: keys}
	if len(keys) > 0 {
		m.Primary = keys[len(keys)-1]
	}
	return m
}

func silent(node string) Member { return Member{Node: node, Voter: true, Silent: "no route"} }

func rotation(p Phase, force bool) *Record {
	r := &Record{Primary: "a", Rotation: &Rotation{ID: "r", Phase: p, Force: force}}
	if p != Requested {
		r.Rotation.From, r.Rotation.To = "a", "b"
	}
	if p == Resealing || p == Retiring {
		r.Primary = "b"
	}
	return r
}

func TestNext(t *testing.T) {
	clean := &Usage{ByKey: map[string]int{"b": 3}}
	whole := &Usage{ByKey: map[string]int{"b": 3}, Whole: true}
	both := []string{"a", "b"}
	spare := member("n4", "a")
	spare.Voter = false
	quiet := silent("n4")
	quiet.Voter = false
	old := member("n2", "a", "b")
	old.Primary = "a"
	for _, c := range []struct {
		name  string
		in    Observed
		want  Action
		nodes []string
		why   string // part of the reason
	}{
		// No record: a cluster of an earlier version.
		{"no ring at all", Observed{}, Make, nil, "no key ring"},
		{"others have none", Observed{Keys: []string{"a"}, Members: []Member{member("n1", "a"), member("n2"), member("n3")}}, Spread, []string{"n2", "n3"}, ""},
		{"a majority has it", Observed{Keys: []string{"a"}, Members: []Member{member("n1", "a"), member("n2", "a"), silent("n3")}}, Found, nil, ""},
		{"a minority has it", Observed{Keys: []string{"a"}, Members: []Member{member("n1", "a"), silent("n2"), silent("n3")}}, Wait, nil, "n2 (no route), n3 (no route)"},
		// No rotation.
		{"keys in clear", Observed{Record: &Record{Primary: "a"}, Keys: []string{"a"}}, SealKeys, nil, ""},
		{"never looked", Observed{Record: &Record{Primary: "a"}, Keys: []string{"a"}, SealedBy: "a"}, Reseal, nil, ""},
		{"plain values", Observed{Record: &Record{Primary: "a"}, Keys: []string{"a"}, SealedBy: "a", Usage: &Usage{Plain: 1, Stale: 1}}, Reseal, nil, ""},
		{"all is well", Observed{Record: &Record{Primary: "a"}, Keys: []string{"a"}, SealedBy: "a", Usage: &Usage{}}, Wait, nil, ""},
		{"without the key", Observed{Record: &Record{Primary: "a"}, SealedBy: "a"}, Wait, nil, "lacks the primary key a"},
		// Asked for.
		{"all answer", Observed{Record: rotation(Requested, false), Keys: []string{"a"}, Members: []Member{member("n1", "a"), member("n2", "a"), quiet}}, Make, nil, ""},
		{"a voter is silent", Observed{Record: rotation(Requested, false), Keys: []string{"a"}, Members: []Member{member("n1", "a"), member("n2", "a"), silent("n3")}}, Refuse, nil, "n3 (no route)"},
		{"forced", Observed{Record: rotation(Requested, true), Keys: []string{"a"}, Members: []Member{member("n1", "a"), member("n2", "a"), silent("n3")}}, Make, nil, ""},
		{"forced in a minority", Observed{Record: rotation(Requested, true), Keys: []string{"a"}, Members: []Member{member("n1", "a"), silent("n2"), silent("n3")}}, Refuse, nil, "only 1 voters answer"},
		// Spreading.
		{"made by a dead leader", Observed{Record: rotation(Spreading, false), Keys: []string{"a"}, Members: []Member{member("n1", "a")}}, Make, nil, "former leader"},
		{"some lack it", Observed{Record: rotation(Spreading, false), Keys: both, Members: []Member{member("n1", "a", "b"), member("n2", "a"), spare}}, Spread, []string{"n2", "n4"}, ""},
		{"one went silent", Observed{Record: rotation(Spreading, false), Keys: both, Members: []Member{member("n1", "a", "b"), member("n2", "a", "b"), silent("n3")}}, Wait, nil, "n3 (no route)"},
		{"one went silent, forced", Observed{Record: rotation(Spreading, true), Keys: both, Members: []Member{member("n1", "a", "b"), member("n2", "a", "b"), silent("n3")}}, Switch, nil, ""},
		{"two went silent, forced", Observed{Record: rotation(Spreading, true), Keys: both, Members: []Member{member("n1", "a", "b"), silent("n2"), silent("n3")}}, Wait, nil, "1 voters have the new key, 2 are needed"},
		{"all have it", Observed{Record: rotation(Spreading, false), Keys: both, Members: []Member{member("n1", "a", "b"), member("n2", "a", "b"), quiet}}, Switch, nil, ""},
		// Resealing.
		{"a new leader lacks it", Observed{Record: rotation(Resealing, true), Keys: []string{"a"}}, Wait, nil, "lacks the primary key b"},
		{"the cluster's keys first", Observed{Record: rotation(Resealing, false), Keys: both, SealedBy: "a"}, SealKeys, nil, ""},
		{"values then", Observed{Record: rotation(Resealing, false), Keys: both, SealedBy: "b"}, Reseal, nil, ""},
		{"written with the old key since", Observed{Record: rotation(Resealing, false), Keys: both, SealedBy: "b", Agreed: time.Hour,
			Usage: &Usage{ByKey: map[string]int{"a": 1, "b": 2}, Whole: true}}, Reseal, nil, ""},
		{"one seals with the old key", Observed{Record: rotation(Resealing, false), Keys: both, SealedBy: "b", Agreed: -1, Usage: clean,
			Members: []Member{member("n1", "a", "b"), old}}, Wait, nil, "n2 (seals with a)"},
		{"a spare is silent", Observed{Record: rotation(Resealing, false), Keys: both, SealedBy: "b", Agreed: -1, Usage: clean,
			Members: []Member{member("n1", "a", "b"), quiet}}, Wait, nil, "n4 (no route)"},
		{"not long enough", Observed{Record: rotation(Resealing, false), Keys: both, SealedBy: "b", Agreed: time.Second, Settle: time.Minute, Usage: clean}, Wait, nil, "59s"},
		{"long enough", Observed{Record: rotation(Resealing, false), Keys: both, SealedBy: "b", Agreed: time.Hour, Settle: time.Minute, Usage: clean}, Count, nil, ""},
		{"counted too early", Observed{Record: rotation(Resealing, false), Keys: both, SealedBy: "b", Agreed: time.Hour, Counted: time.Second, Settle: time.Minute, Usage: whole}, Count, nil, ""},
		{"counted", Observed{Record: rotation(Resealing, false), Keys: both, SealedBy: "b", Agreed: time.Hour, Counted: time.Hour, Settle: time.Minute, Usage: whole}, Retire, nil, ""},
		// Retiring.
		{"one still has it", Observed{Record: rotation(Retiring, false), Members: []Member{member("n1", "b"), old}}, Wait, nil, "still on n2"},
		{"one is silent", Observed{Record: rotation(Retiring, false), Members: []Member{member("n1", "b"), silent("n2")}}, Wait, nil, "n2 (no route)"},
		{"gone", Observed{Record: rotation(Retiring, false), Members: []Member{member("n1", "b"), member("n2", "b")}}, Finish, nil, ""},
		{"of a later version", Observed{Record: rotation("dancing", false)}, Wait, nil, "dancing"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := Next(c.in)
			if got.Action != c.want || !reflect.DeepEqual(got.Nodes, c.nodes) || !strings.Contains(got.Reason, c.why) {
				t.Errorf("got %+v, want %s %v with %q", got, c.want, c.nodes, c.why)
			}
			if got.Action == Wait && c.name != "all is well" && got.Reason == "" {
				t.Error("it waits without a reason")
			}
		})
	}
}

func TestRecord(t *testing.T) {
	r := *rotation(Resealing, true)
	r.retire(Retired{Key: "a", Revisions: map[string]int64{"system": 7}})
	r.Last = &Outcome{ID: "x", Refused: "no"}
	back, err := Decode(r.Encode())
	r.Version = recordVersion
	if err != nil || !reflect.DeepEqual(back, r) {
		t.Errorf("%+v became %+v, %v", r, back, err)
	}
	c := r.clone()
	c.Rotation.To, c.Retired[0].Key = "x", "x"
	if r.Rotation.To != "b" || r.Retired[0].Key != "a" {
		t.Error("a change of the clone changed the original")
	}
	for i := range 2 * keepRetired {
		r.retire(Retired{Key: strings.Repeat("k", i+1)})
	}
	if len(r.Retired) != keepRetired {
		t.Errorf("%d retired keys are kept", len(r.Retired))
	}
	for _, bad := range []string{"", "{}", `{"version":1}`, `{"version":2,"primary":"a"}`, "[]"} {
		if _, err := Decode([]byte(bad)); !errors.Is(err, ErrRecord) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(rotation(Retiring, true).Encode())
	f.Add([]byte(`{"version":1,"primary":"a"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := Decode(b)
		if err != nil {
			if !errors.Is(err, ErrRecord) {
				t.Fatalf("error of another kind: %v", err)
			}
			return
		}
		if _, err := Decode(r.Encode()); err != nil {
			t.Fatalf("%+v: %v", r, err)
		}
		Next(Observed{Record: &r}) // must not panic, whatever it says
	})
}
