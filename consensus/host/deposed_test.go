package host

import "testing"

func TestDeposed(t *testing.T) {
	for _, c := range []struct {
		what                             string
		was, leader, self, oldTerm, term uint64
		want                             bool
	}{
		{"no majority answered", 1, 0, 1, 5, 5, true},
		{"another one stands for election", 1, 0, 1, 5, 6, false},
		{"another one leads", 1, 2, 1, 5, 6, false},
		{"it begins to lead", 0, 1, 1, 5, 6, false},
		{"a follower loses its leader", 2, 0, 1, 5, 5, false},
	} {
		if got := deposed(c.was, c.leader, c.self, c.oldTerm, c.term); got != c.want {
			t.Errorf("%s: %v", c.what, got)
		}
	}
}
